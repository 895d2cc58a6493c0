"""Warnings about recordings: of each file once, and of many files in one line."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

logger = logging.getLogger(__name__)

# Names that a line gives.
_NAMED = 3

_lock = threading.Lock()
# Recordings that are known to have something: a hash for each.
_seen: set[int] = set()
# Recordings to be warned of at the end of a block, by what they have.
_waiting: dict[str, list[str]] = {}
_blocks = 0


def warn_of(recording: str, what: str) -> None:
    """Warn of a recording, unless that was done before; inside `summarized`, at its end."""
    with _lock:
        key = hash((recording, what))
        if key in _seen:
            return
        _seen.add(key)
        if _blocks:
            _waiting.setdefault(what, []).append(recording)
            return
    logger.warning("%s: %s", recording, what)


@contextlib.contextmanager
def summarized() -> Iterator[None]:
    """Gather the warnings of a block, in all threads, to one line of each kind."""
    global _blocks
    with _lock:
        _blocks += 1
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            waiting = dict(_waiting)
            _waiting.clear()
        for what, recordings in waiting.items():
            logger.warning("%s: %s", _named(recordings), what)


def _named(recordings: list[str]) -> str:
    if len(recordings) == 1:
        return recordings[0]
    more = ", ..." if len(recordings) > _NAMED else ""
    return f"{len(recordings)} recordings ({', '.join(sorted(recordings)[:_NAMED])}{more})"
