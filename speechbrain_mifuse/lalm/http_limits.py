"""What a server grants its clients, and what it counts of them; no sockets and no models here."""

from __future__ import annotations

import collections
import dataclasses
import math
import threading
from collections.abc import Mapping

from speechbrain_mifuse.errors import UserError

# Statuses by which a request is turned away unheard, and the name under which that is counted.
REJECTIONS = {401: "key", 408: "slow", 413: "too_large", 431: "too_large", 503: "busy"}
CROWDED = "crowded"


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a server grants its clients.

    Attributes
    ----------
    max_concurrent : int
        Requests that are answered, or wait for the model, at a time; one more gets status 503 with ``Retry-After``.
    max_connections : int
        Open connections; one more takes the place of the one that keeps the server waiting for the longest.
    max_body_bytes : int
        Size of a request's body; a larger one gets status 413 before it is read. All bodies together may take up
        `max_concurrent` times as much.
    read_timeout : float
        Seconds for the head of a request, counted from its first byte; seconds that a body may lag behind
        `MIN_BYTES_PER_SECOND`; seconds for a client to take its reply.
    idle_timeout : float
        Seconds that a connection may stay open without a request.

    Raises
    ------
    UserError
        If a value cannot be meant.

    Example
    -------
    >>> Limits(max_concurrent=4).max_body_bytes
    67108864
    >>> Limits(read_timeout=0)
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.errors.UserError: read_timeout: must be a number of seconds from 0.001 to 1000000, is 0
    """

    max_concurrent: int = 32
    max_connections: int = 256
    max_body_bytes: int = 64 * 2**20
    read_timeout: float = 10.0
    idle_timeout: float = 120.0

    def __post_init__(self):
        for name in ("max_concurrent", "max_connections", "max_body_bytes"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name}: must be a whole number of at least 1, is {value}")
        for name in ("read_timeout", "idle_timeout"):
            check_seconds(name, getattr(self, name), least=1e-3)
        if self.max_connections <= self.max_concurrent:
            raise UserError(
                f"max_connections: {self.max_connections} leaves no room beside max_concurrent, which is "
                f"{self.max_concurrent}; allow more connections or fewer requests"
            )


def check_seconds(name: str, value: float, least: float = 0.0) -> float:
    """Check a number of seconds.

    Parameters
    ----------
    name : str
        What it is called in the error.
    value : float
        Seconds.
    least : float
        The smallest that is allowed.

    Returns
    -------
    float
        The value.

    Raises
    ------
    UserError
        If it is smaller, or too large for the clock.

    Example
    -------
    >>> check_seconds("grace", 2.5)
    2.5
    """
    if not math.isfinite(value) or not least <= value <= 1e6:
        raise UserError(f"{name}: must be a number of seconds from {least:g} to 1000000, is {value}")
    return value


class Allowance:
    """A number of things that threads may hold at a time; who comes too late is told so and does not wait.

    Parameters
    ----------
    capacity : int
        How many.

    Example
    -------
    >>> slots = Allowance(2)
    >>> slots.take(), slots.take(), slots.take(), slots.held
    (True, True, False, 2)
    >>> slots.give(2)
    >>> slots.take()
    True
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.held = 0
        self._lock = threading.Lock()

    def take(self, count: int = 1) -> bool:
        """Take so many, or none.

        Parameters
        ----------
        count : int
            How many.

        Returns
        -------
        bool
            Whether they were there.
        """
        with self._lock:
            if self.held + count > self.capacity:
                return False
            self.held += count
            return True

    def give(self, count: int = 1) -> None:
        """Give some back.

        Parameters
        ----------
        count : int
            How many.
        """
        with self._lock:
            self.held -= count


class Metrics:
    """Counters of a server, in the text form that Prometheus reads.

    Example
    -------
    >>> metrics = Metrics()
    >>> metrics.answered("/v1/models", 200, 0.25)
    >>> metrics.answered("/v1/models", 401, 0.25)
    >>> print(metrics.text({"in_flight": 0}))
    # HELP mifuse_requests_total Requests answered, by route and status.
    # TYPE mifuse_requests_total counter
    mifuse_requests_total{route="/v1/models",status="200"} 1
    mifuse_requests_total{route="/v1/models",status="401"} 1
    # HELP mifuse_request_seconds Seconds from the first byte of a request to its reply, by route.
    # TYPE mifuse_request_seconds summary
    mifuse_request_seconds_sum{route="/v1/models"} 0.500000
    mifuse_request_seconds_count{route="/v1/models"} 2
    # HELP mifuse_rejected_total Requests and connections turned away unheard, by reason.
    # TYPE mifuse_rejected_total counter
    mifuse_rejected_total{reason="busy"} 0
    mifuse_rejected_total{reason="crowded"} 0
    mifuse_rejected_total{reason="key"} 1
    mifuse_rejected_total{reason="slow"} 0
    mifuse_rejected_total{reason="too_large"} 0
    # HELP mifuse_in_flight Now, of all routes.
    # TYPE mifuse_in_flight gauge
    mifuse_in_flight 0
    <BLANKLINE>
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._requests: collections.Counter[tuple[str, int]] = collections.Counter()
        self._seconds: collections.Counter[str] = collections.Counter()
        self._rejected = dict.fromkeys(sorted({*REJECTIONS.values(), CROWDED}), 0)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count a request.

        Parameters
        ----------
        route : str
            One of few: every other value is one more line.
        status : int
            HTTP status of the reply.
        seconds : float
            What it took.
        """
        with self._lock:
            self._requests[route, status] += 1
            self._seconds[route] += seconds
            if status in REJECTIONS:
                self._rejected[REJECTIONS[status]] += 1

    def crowded_out(self) -> None:
        """Count a connection that had to give its place to another."""
        with self._lock:
            self._rejected[CROWDED] += 1

    def text(self, gauges: Mapping[str, int]) -> str:
        """All counters.

        Parameters
        ----------
        gauges : mapping of str to int
            What holds at this moment, by name.

        Returns
        -------
        str
            Prometheus's text format, version 0.0.4.
        """
        with self._lock:
            requests, seconds, rejected = sorted(self._requests.items()), dict(self._seconds), dict(self._rejected)
        lines = _heading("requests_total", "counter", "Requests answered, by route and status.")
        lines += [
            f'mifuse_requests_total{{route="{route}",status="{status}"}} {count}' for (route, status), count in requests
        ]
        about = "Seconds from the first byte of a request to its reply, by route."
        lines += _heading("request_seconds", "summary", about)
        for route in sorted(seconds):
            count = sum(number for (of, _), number in requests if of == route)
            lines.append(f'mifuse_request_seconds_sum{{route="{route}"}} {seconds[route]:.6f}')
            lines.append(f'mifuse_request_seconds_count{{route="{route}"}} {count}')
        lines += _heading("rejected_total", "counter", "Requests and connections turned away unheard, by reason.")
        lines += [f'mifuse_rejected_total{{reason="{reason}"}} {count}' for reason, count in rejected.items()]
        for name, value in gauges.items():
            lines += [*_heading(name, "gauge", "Now, of all routes."), f"mifuse_{name} {value}"]
        return "\n".join([*lines, ""])


def _heading(name: str, kind: str, about: str) -> list[str]:
    return [f"# HELP mifuse_{name} {about}", f"# TYPE mifuse_{name} {kind}"]
