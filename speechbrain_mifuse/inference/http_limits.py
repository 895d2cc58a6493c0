"""Limits of the server, and checks of its settings, without any import that the command line would wait for."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re

from speechbrain_mifuse.utils.errors import UserError

# File descriptors that connections leave to the rest of the process, and to those that arrive in one go.
SPARE_DESCRIPTORS = 96


@dataclasses.dataclass(frozen=True)
class Limits:
    """What clients may take up.

    Parameters
    ----------
    max_concurrent, max_connections : int
        Requests that are answered at a time, and connections.
    max_body_bytes : int
        Of a request.
    read_timeout, idle_timeout : float
        Seconds in which a request must arrive, and that a connection may wait for its next one.
    max_seconds : float
        Of a recording.

    Raises
    ------
    UserError
        If a number is of no use, or connections leave no room beside the requests.

    Example
    -------
    >>> Limits(max_concurrent=8, max_connections=8)
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.utils.errors.UserError: max_connections: 8 leaves no room beside max_concurrent, which is 8; ...
    """

    max_concurrent: int = 32
    max_connections: int = 256
    max_body_bytes: int = 32 * 2**20
    read_timeout: float = 10.0
    idle_timeout: float = 120.0
    max_seconds: float = 120.0

    def __post_init__(self):
        for name in ("max_concurrent", "max_connections", "max_body_bytes"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name}: must be a whole number of at least 1, is {value}")
        for name in ("read_timeout", "idle_timeout", "max_seconds"):
            check_seconds(name, getattr(self, name), least=1e-3)
        if self.max_connections <= self.max_concurrent:
            raise UserError(
                f"max_connections: {self.max_connections} leaves no room beside max_concurrent, which is "
                f"{self.max_concurrent}; allow more connections or fewer requests"
            )


def check_seconds(name: str, value: float, least: float = 0.0) -> float:
    """Check a number of seconds."""
    if not math.isfinite(value) or not least <= value <= 1e6:
        raise UserError(f"{name}: must be a number of seconds from {least:g} to 1000000, is {value}")
    return value


def checked_key(key: str | None, name: str) -> str | None:
    """Check a key that clients must send."""
    if key is not None and not re.fullmatch(r"[\x21-\x7e]+", key):
        raise UserError(
            f"{name} is set, but to nothing or to something with blanks or characters beyond ASCII, which no header "
            "carries. Set it to a word, or unset it to serve without a key"
        )
    return key


def room_for_connections(wanted: int) -> int:
    """Count the connections that the process's limit of file descriptors allows."""
    try:
        import resource
    except ImportError:  # on Windows, which has no such limit
        return wanted
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return wanted
    used = 64
    with contextlib.suppress(OSError):
        used = len(os.listdir("/proc/self/fd"))
    room = limit - used - SPARE_DESCRIPTORS
    if room < 1:
        raise UserError(
            f"max_connections: this process may open {limit} files, which leaves no room for connections. "
            f"Raise the limit first: ulimit -n {used + SPARE_DESCRIPTORS + wanted}"
        )
    return min(room, wanted)
