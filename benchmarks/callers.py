"""Callers of a server, in a process of their own: `callers.py ADDRESS NUMBER`, a request a line on standard input.

Prints how many requests were answered per second. Each caller has one connection, and sends its next request when the
last one is answered.
"""

from __future__ import annotations

import contextlib
import http.client
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor


def rate(address: str, callers: int, bodies: Sequence[bytes]) -> float:
    """Answers per second."""
    begin = time.perf_counter()
    with ThreadPoolExecutor(callers) as pool:
        list(pool.map(lambda first: ask(address, bodies[first::callers]), range(callers)))
    return len(bodies) / (time.perf_counter() - begin)


def ask(address: str, bodies: Sequence[bytes]) -> None:
    """Send requests one after the other on one connection."""
    with contextlib.closing(http.client.HTTPConnection(address.split("/")[2])) as connection:
        for each in bodies:
            connection.request("POST", "/v1/chat/completions", each, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise RuntimeError(f"status {response.status}: {response.read()!r}")
            response.read()


if __name__ == "__main__":
    print(rate(sys.argv[1], int(sys.argv[2]), sys.stdin.buffer.read().splitlines()))
