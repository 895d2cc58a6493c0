"""Errors that a user can fix: shown as one line, without a traceback."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from speechbrain_mifuse.utils.texts import one_line, printable, shown

# What a disk, a quota or a mount says when it takes no data, and what to do about it.
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Free some space"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "Change its permissions"),
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ENXIO), "Check the disk"),
    **dict.fromkeys((errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP), "Remove what is in its place"),
}
PERMISSIONS = (errno.EACCES, errno.EPERM)
AGAIN = "choose another folder (such as --output_folder), then run the same command again: finished work is kept."
# Free bytes below which nothing is begun.
MIN_FREE_BYTES = 50 * 2**20


class UserError(ValueError):
    """Something outside the code does not fit; the message names it and says what to do.

    Commands of this package print it as one line and exit with status 2. Catch it around a call of the library to do
    likewise.

    Example
    -------
    >>> with one_clear_error():
    ...     raise UserError("labels.csv, line 7: unknown class 'fear'.")
    Traceback (most recent call last):
    ...
    SystemExit: 2
    """


class WriteError(OSError, UserError):
    """A file that the system does not let us write; the message names it and says what to do."""

    @classmethod
    def of(cls, error: OSError, path: str | Path, advice: str = "") -> WriteError:
        """Say that a path cannot be written."""
        found = cls(error.errno, error.strerror or str(error), str(path))
        found.advice = advice or _advice(error)
        return found

    def __str__(self) -> str:
        return f"{shown(self.filename)}: cannot be written ({shown(self.strerror)}). {self.advice}"


def _advice(error: OSError) -> str:
    remedy = REMEDIES.get(error.errno)
    return f"{remedy}, or {AGAIN}" if remedy else f"{AGAIN[0].upper()}{AGAIN[1:]}"


@contextlib.contextmanager
def writing(path: str | Path, advice: str = ""):
    """Turn what the system says against writing a file inside the block into a `WriteError` that names it."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError.of(error, path, advice) from None


@contextlib.contextmanager
def one_clear_error():
    """Turn a `UserError`, and whatever a disk says against writing, into one line on standard error and status 2."""
    error: BaseException | None = None
    with _harmless_output():
        try:
            yield
        except (UserError, OSError, SystemExit) as raised:
            error = raised
    try:
        if sys.stdout is not None:
            _write_out(sys.stdout.flush)
    except OSError as output:
        # A failure that was on its way matters more, unless it is the same one.
        error = error if isinstance(error, UserError) else output
    if isinstance(error, BrokenPipeError):
        error = None  # Whoever reads has read enough, as `head` does.
    elif isinstance(error, OSError) and not isinstance(error, UserError):
        error = _of_the_disk(error)
    if isinstance(error, UserError):
        with contextlib.suppress(OSError):
            print(f"error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    if error is not None:
        raise error


def _of_the_disk(error: OSError) -> OSError | UserError:
    """Give an error that nobody has named, if it is one of a disk, a name and a remedy."""
    if error.errno not in REMEDIES or (error.filename is None and error.errno in PERMISSIONS):
        return error
    name = "a file" if error.filename is None else shown(error.filename)
    return UserError(f"{name}: cannot be read or written ({error.strerror}). {_advice(error)}")


def _write_out(write: Callable, *arguments) -> None:
    """Write to standard output; where that fails, leave nothing behind that would fail again at exit."""
    try:
        write(*arguments)
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise WriteError.of(error, "standard output") from None


class _HarmlessOutput:
    """Standard output without control sequences."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        _write_out(self._stream.write, printable(text))
        return len(text)

    def flush(self) -> None:
        _write_out(self._stream.flush)


class _HarmlessRecord(logging.LogRecord):
    """A line of a log without control sequences."""

    def getMessage(self) -> str:
        return printable(super().getMessage())


@contextlib.contextmanager
def _harmless_output() -> Iterator[None]:
    before = sys.stdout, logging.getLogRecordFactory(), logging.raiseExceptions
    if hasattr(sys.stdout, "reconfigure"):
        # Another encoding than UTF-8 lacks most letters.
        sys.stdout.reconfigure(errors="backslashreplace")
    if sys.stdout is not None:
        sys.stdout = _HarmlessOutput(sys.stdout)
    logging.setLogRecordFactory(_HarmlessRecord)
    # A log on a full disk loses lines; a traceback for each would not bring them back.
    logging.raiseExceptions = False
    try:
        yield
    finally:
        sys.stdout, factory, logging.raiseExceptions = before
        logging.setLogRecordFactory(factory)


@contextlib.contextmanager
def stopped_by_ctrl_c():
    """Turn Ctrl-C and SIGTERM inside the block into one line and exit status 130, for work that resumes."""
    try:
        with terminated_like_ctrl_c():
            yield
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None


@contextlib.contextmanager
def terminated_like_ctrl_c():
    """Let SIGTERM do inside the block what Ctrl-C does: batch systems and service managers send it first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_, frame) -> None:
        # An event loop has a handler of its own. A shell lets background processes ignore Ctrl-C, which has none.
        handler = signal.getsignal(signal.SIGINT)
        (handler if callable(handler) else signal.default_int_handler)(signal.SIGINT, frame)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def require_device(name: str) -> None:
    """Refuse a device that torch cannot use here."""
    import torch

    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device: {name} cannot be used here ({reason}). Leave --device out, or pass cpu.") from None


def require_writable(folder: str | Path, flag: str) -> None:
    """Make a folder, and refuse one that cannot be written or whose disk is nearly full."""
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
