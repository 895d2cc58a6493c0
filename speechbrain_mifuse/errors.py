"""Errors a user can mend: shown as one line, without a traceback."""

from __future__ import annotations

import contextlib
import re
import sys


class UserError(ValueError):
    """Something outside the code does not fit; the message names it and says what to do."""


@contextlib.contextmanager
def one_clear_error():
    """Turn a `UserError` inside the block into one line on standard error and exit status 2.

    So are a flag that the recipe's YAML does not have, and a YAML file that is not there.

    Raises
    ------
    SystemExit
        With status 2, in place of the `UserError`.

    Example
    -------
    >>> with one_clear_error():
    ...     raise UserError("corpus not found: pass --data_folder")
    Traceback (most recent call last):
    ...
    SystemExit: 2
    """
    try:
        yield
    except (UserError, KeyError, FileNotFoundError) as error:
        told = str(error) if isinstance(error, UserError) else _misread_arguments(error)
        if told is None:
            raise
        sys.stdout.flush()
        print(f"error: {told}", file=sys.stderr)
        raise SystemExit(2) from None


def _misread_arguments(error: Exception) -> str | None:
    """Tell what SpeechBrain says of a flag that is none, or of a YAML file that is not there; else nothing."""
    if isinstance(error, FileNotFoundError):
        named = error.filename in sys.argv[1:]
        return f"{error.filename}: no such file. The recipe's YAML file comes first." if named else None
    unknown = re.match(r"Override '(.*?)' not found in: ", str(error.args[0]) if error.args else "")
    return f"--{unknown[1]}: the recipe has no such key." if unknown else None


@contextlib.contextmanager
def stopped_by_ctrl_c():
    """Turn Ctrl-C inside the block into one line on standard error and exit status 130, for work that resumes.

    Raises
    ------
    SystemExit
        With status 130, in place of `KeyboardInterrupt`.

    Example
    -------
    >>> with stopped_by_ctrl_c():
    ...     raise KeyboardInterrupt
    Traceback (most recent call last):
    ...
    SystemExit: 130
    """
    try:
        yield
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None


def require_device(name: str) -> None:
    """Refuse a device that torch cannot use here.

    Parameters
    ----------
    name : str
        As torch calls it.

    Raises
    ------
    UserError
        With torch's reason.

    Example
    -------
    >>> require_device("cuda:99")
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.errors.UserError: --device: cuda:99 cannot be used here (...). Leave --device out, or pass cpu.
    """
    import torch

    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device: {name} cannot be used here ({reason}). Leave --device out, or pass cpu.") from None
