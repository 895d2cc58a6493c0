"""Files that appear whole or not at all, JSON that is what it seems, and where what is made once is kept."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import stat
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from speechbrain_mifuse.utils.errors import writing
from speechbrain_mifuse.utils.texts import shown

# Bytes of a file from which on it must hold data; file systems that compress make holes of zeros.
MAX_SPARSE_BYTES = 100_000_000
# Digits of a whole number in a JSON file: reading thousands of them takes long, and no length or count has so many.
LONGEST_INT = 40


def atomic_write(path: str | Path, data: str | bytes) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part.

    Parameters
    ----------
    path : str or pathlib.Path
        File; folders above it are made.
    data : str or bytes
        Content; text is written in UTF-8.

    Raises
    ------
    WriteError
        If the system does not let it be written.

    Example
    -------
    >>> path = Path(tempfile.mkdtemp()) / "new" / "results.json"
    >>> atomic_write(path, "{}")
    >>> path.read_text()
    '{}'
    """
    with replacing(path) as file:
        # Names of files may hold bytes that are no text; they must not stop a table from being written.
        file.write(data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data)


@contextlib.contextmanager
def replacing(path: str | Path, advice: str = "") -> Iterator[IO[bytes]]:
    """Write a file piece by piece; it appears under its name when the block ends, whole or not at all."""
    path = Path(path)
    with writing(path, advice):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.")
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise


def file_stamp(path: str | Path) -> tuple[int, int] | None:
    """Give size and time of the last change, by which a change is noticed; `None` for what is not a file."""
    try:
        os.fspath(path).encode()  # SQLite takes nothing else
        status = os.stat(path)
    except (OSError, ValueError, TypeError):  # a function that makes a recording has no path
        return None
    return status.st_size, status.st_mtime_ns


def file_digest(path: str | Path) -> str:
    """Identity of a file's content."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def bounded_bytes(path: str | Path, max_bytes: int | None = None) -> bytes:
    """Read a regular file of limited size: a named pipe or a device would never end."""
    refuse_unreadable(path)
    with open(path, "rb") as file:
        content = file.read(-1 if max_bytes is None else max_bytes + 1)
    if max_bytes is not None and len(content) > max_bytes:
        raise ValueError(f"more than {max_bytes} bytes")
    return content


def refuse_unreadable(path: str | Path) -> None:
    """Refuse what is no regular file, and a file made of holes, which takes memory and no disk."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if status.st_size > MAX_SPARSE_BYTES and held_bytes(path) < status.st_size // 2:
        raise ValueError(f"most of its {status.st_size} bytes are holes without data")


def held_bytes(path: str | Path) -> int:
    """Count the bytes that a file holds, without its holes: a sparse file can claim any size."""
    size = Path(path).stat().st_size
    if not hasattr(os, "SEEK_DATA"):
        return size
    held = end = 0
    with open(path, "rb", buffering=0) as file, contextlib.suppress(OSError):  # raised behind the last data
        while end < size:
            start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            held += end - start
    return held


def json_object(path: Path, max_bytes: int | None = None) -> dict:
    """Read a JSON object in which no key stands twice and every number is finite and of usual length."""
    try:
        return strict_object(bounded_bytes(path, max_bytes))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None


def strict_object(text: str | bytes) -> dict:
    """Decode a JSON object in which no key stands twice and every number is finite and of usual length.

    Example
    -------
    >>> strict_object('{"emo": "sad", "emo": "angry"}')
    Traceback (most recent call last):
    ...
    ValueError: the key 'emo' stands twice in one object
    """
    try:
        found = json.loads(
            text,
            object_pairs_hook=_distinct,
            parse_constant=_no_number,
            parse_int=_short_int,
            parse_float=_finite_float,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found


def _distinct(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        # The last one would win, and with it perhaps another label.
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key '{shown(twice)}' stands twice in one object")
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _short_int(digits: str) -> int:
    if len(digits) > LONGEST_INT:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _finite_float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:40]} is no number")
    return number


def encodable(text: str) -> bool:
    r"""Whether a text can be written to a file: halves of surrogate pairs, which JSON can bring, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def cache_folder() -> Path:
    """Folder for what is made once and reused: the demo encoder, extracted frames."""
    chosen = os.environ.get("MIFUSE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "speechbrain_mifuse"
