"""Errors that a user can fix: shown as one line, without a traceback."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from pathlib import Path

# Free bytes below which nothing is begun.
MIN_FREE_BYTES = 50 * 2**20


class UserError(ValueError):
    """Something outside the code does not fit; the message names it and says what to do."""


@contextlib.contextmanager
def one_clear_error():
    """Turn a `UserError` inside the block into one line on standard error and exit status 2.

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
    except UserError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


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


def require_writable(folder: str | Path, flag: str) -> None:
    """Make a folder, and refuse one that cannot be written or whose disk is nearly full.

    Parameters
    ----------
    folder : str or pathlib.Path
        To be written to.
    flag : str
        What names it, for the message.

    Raises
    ------
    UserError
        With the reason.

    Example
    -------
    >>> require_writable("/dev/null/results", "--output_folder")
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.errors.UserError: --output_folder: /dev/null/results cannot be written (Not a directory). ...
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        # Modes do not say what a read-only disk or the superuser may do; a file does.
        tempfile.TemporaryFile(dir=folder).close()
        free = shutil.disk_usage(folder).free
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{flag}: {folder} cannot be written ({reason}). Name another folder.") from None
    if free < MIN_FREE_BYTES:
        raise UserError(f"{flag}: only {free / 2**20:.0f} MiB are free at {folder}. Free some space, or name another.")
