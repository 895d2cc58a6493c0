"""Reading of HTTP/1.1 requests, strictly and within bounds of size and time."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import socket
import string
import time
from collections.abc import Iterator, Mapping

MAX_HEAD_BYTES = 2**16
MAX_CHUNKS = 2**16
BLOCK_BYTES = 2**16
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
FIRST_BYTES = b"\r\n!#$%&'*+.^_`|~-" + string.digits.encode() + string.ascii_letters.encode()
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])")
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,12})[ \t]*(;[\t\x20-\x7e]*)?")


class RequestError(Exception):
    """A request that is answered with an error in OpenAI's shape.

    Parameters
    ----------
    message : str
        What is wrong.
    status : int
        HTTP status.
    code : str, optional
        Machine-readable name of the error.
    headers : mapping of str to str, optional
        Further headers of the reply.

    Example
    -------
    >>> RequestError("n: must be a number").body()
    b'{"error": {"message": "n: must be a number", "type": "invalid_request_error", "param": null, "code": null}}'
    """

    def __init__(
        self, message: str, status: int = 400, code: str | None = None, headers: Mapping[str, str] | None = None
    ):
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """Put the error in OpenAI's shape.

        Returns
        -------
        bytes
            JSON.
        """
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return json.dumps({"error": {"message": str(self), "type": kind, "param": None, "code": self.code}}).encode()


class SlowClientError(Exception):
    """Nothing, or too little, came in the time that there was."""


@dataclasses.dataclass(frozen=True)
class Head:
    """Request line and headers.

    Attributes
    ----------
    method, target : str
        As they stand in the request line.
    version : tuple of int
        Of HTTP.
    headers : dict
        By name in lower case; values of one name are joined by a comma.
    """

    method: str
    target: str
    version: tuple[int, int]
    headers: dict[str, str]

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.partition("?")[0]

    @property
    def has_body(self) -> bool:
        """Whether more may follow that belongs to this request."""
        return "transfer-encoding" in self.headers or not re.fullmatch("0+", self.headers.get("content-length", "0"))

    @property
    def keep_alive(self) -> bool:
        """Whether the client wants to go on with the same connection."""
        options = {option.strip().lower() for option in self.headers.get("connection", "").split(",")}
        return self.version >= (1, 1) and "close" not in options


def read_head(file: io.BufferedIOBase) -> Head:
    r"""Read the head of a request.

    Parameters
    ----------
    file : binary file
        Stands at the beginning of a request.

    Returns
    -------
    Head

    Raises
    ------
    RequestError
        If it is no head, or a very long one.

    Example
    -------
    >>> read_head(io.BytesIO(b"GET /v1/models?x HTTP/1.1\r\nHost: a\r\n\r\n")).path
    '/v1/models'
    >>> read_head(io.BytesIO(b"GET /v1/models\r\n\r\n"))
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.lalm.http_request.RequestError: this is no request line of HTTP/1.1
    """
    lines: list[bytes] = []
    left = MAX_HEAD_BYTES
    while (line := _line(file, left, "the head of the request", 431)) or not lines:
        left -= len(line) + 2
        if not line:
            continue  # some clients end a body with one too many
        if not lines:
            # Checked before the rest is waited for: what speaks another protocol may never send an empty line.
            found = _REQUEST_LINE.fullmatch(line)
            if found is None:
                raise RequestError("this is no request line of HTTP/1.1")
        lines.append(line)
    method, target, *version = (part.decode("ascii") for part in found.groups())
    if version[0] != "1":
        raise RequestError("this server speaks HTTP/1.1", 505)
    return Head(method, target, (1, int(version[1])), _headers(lines[1:]))


def _line(file: io.BufferedIOBase, limit: int, what: str, status: int) -> bytes:
    """Read one line, without its end."""
    line = file.readline(limit + 2)
    if line.endswith(b"\r\n"):
        return line[:-2]
    if line.endswith(b"\n") or len(line) < limit + 2:
        raise RequestError(f"{what} ends too early, or a line of it without carriage return and line feed")
    raise RequestError(f"{what} is too long", status)


def _headers(lines: list[bytes]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not re.fullmatch(_TOKEN, name) or re.search(rb"[^\t\x20-\x7e\x80-\xff]", value):
            raise RequestError("a header is malformed")
        key, text = name.decode("ascii").lower(), value.strip(b" \t").decode("latin-1")
        headers[key] = f"{headers[key]}, {text}" if key in headers else text
    return headers


def declared_length(head: Head, limit: int) -> int | None:
    """Size of a body that is still to be read.

    Parameters
    ----------
    head : Head
        Of the request.
    limit : int
        The largest number of bytes that is taken.

    Returns
    -------
    int or None
        Bytes; `None` if the body comes in chunks.

    Raises
    ------
    RequestError
        If it is not declared, wrongly declared, or too large.

    Example
    -------
    >>> declared_length(Head("POST", "/", (1, 1), {"content-length": "12"}), 100)
    12
    """
    coding, length = head.headers.get("transfer-encoding"), head.headers.get("content-length")
    if coding is not None:
        # With both, two programs may see two different requests in the same bytes.
        if length is not None or head.version < (1, 1):
            raise RequestError("Transfer-Encoding: not together with Content-Length, and only with HTTP/1.1")
        if coding.lower() != "chunked":
            raise RequestError("Transfer-Encoding: only 'chunked' is understood", 501)
        return None
    if length is None:
        raise RequestError("Content-Length is missing", 411)
    if not re.fullmatch("[0-9]+", length):
        raise RequestError("Content-Length must be one number")
    digits = length.lstrip("0") or "0"
    # Digits are counted first: Python refuses to read numbers of thousands of digits.
    if len(digits) > 18 or int(digits) > limit:
        raise _too_large(limit)
    return int(digits)


def body_blocks(file: io.BufferedIOBase, length: int | None, limit: int) -> Iterator[bytes]:
    r"""Read a body as it arrives.

    Parameters
    ----------
    file : binary file
        Stands at the beginning of the body.
    length : int, optional
        As `declared_length` gives.
    limit : int
        The largest number of bytes that is taken.

    Yields
    ------
    bytes
        At most `BLOCK_BYTES`.

    Raises
    ------
    RequestError
        If the body ends too early, is too large, or its chunks are malformed.

    Example
    -------
    >>> b"".join(body_blocks(io.BytesIO(b"2;x=1\r\n{\n\r\n1\r\n}\r\n0\r\n\r\n"), None, 100))
    b'{\n}'
    """
    if length is not None:
        yield from _exactly(file, length)
        return
    total = 0
    for _ in range(MAX_CHUNKS):
        found = _CHUNK_LINE.fullmatch(_line(file, 256, "the size of a chunk", 400))
        if found is None:
            raise RequestError("the size of a chunk is malformed")
        size = int(found[1], 16)
        if size == 0:
            return _skip_trailer(file)
        total += size
        if total > limit:
            raise _too_large(limit)
        yield from _exactly(file, size)
        _line(file, 0, "a chunk", 400)
    raise RequestError(f"the body comes in more than {MAX_CHUNKS} chunks", 413)


def _exactly(file: io.BufferedIOBase, count: int) -> Iterator[bytes]:
    while count:
        block = file.read1(min(count, BLOCK_BYTES))
        if not block:
            raise RequestError(f"the body ends {count} bytes too early")
        count -= len(block)
        yield block


def _skip_trailer(file: io.BufferedIOBase) -> None:
    left = MAX_HEAD_BYTES
    while line := _line(file, left, "the trailer", 431):
        left -= len(line) + 2


def _too_large(limit: int) -> RequestError:
    return RequestError(f"the request is larger than {limit} bytes", 413, "request_too_large")


class PacedReader(io.RawIOBase):
    """Bytes of a connection, as long as they come in time.

    Parameters
    ----------
    connection : socket.socket
        Where they come from; it is not closed with the reader.

    Example
    -------
    >>> here, there = socket.socketpair()
    >>> reader = PacedReader(here)
    >>> there.sendall(b"abc")
    >>> reader.allow(5.0)
    >>> reader.read(10)
    b'abc'
    >>> reader.allow(0.01)
    >>> reader.read(10)
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.lalm.http_request.SlowClientError
    """

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self.allow(0.0)

    def allow(self, seconds: float, bytes_per_second: float = float("inf")) -> None:
        """Start the clock.

        Parameters
        ----------
        seconds : float
            Until `SlowClientError` is raised.
        bytes_per_second : float
            Every byte that arrives prolongs this by what it takes at such a rate.
        """
        self._until = time.monotonic() + seconds
        self._prolonged = 1 / bytes_per_second

    def readable(self) -> bool:
        """Say that this can be read from.

        Returns
        -------
        bool
            `True`.
        """
        return True

    def readinto(self, buffer) -> int:
        """Take what has arrived, or wait for it.

        Parameters
        ----------
        buffer : writable buffer
            Where to put it.

        Returns
        -------
        int
            Number of bytes; 0 when the client has ended the connection.

        Raises
        ------
        SlowClientError
            If time is up.
        """
        # What is there already is taken even when time is up: then this program was slow, and not the client.
        self._connection.settimeout(max(self._until - time.monotonic(), 0.0))
        try:
            count = self._connection.recv_into(buffer)
        except (TimeoutError, BlockingIOError):
            raise SlowClientError from None
        self._until += count * self._prolonged
        return count
