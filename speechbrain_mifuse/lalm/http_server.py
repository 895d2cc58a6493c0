"""A small HTTP/1.1 server for few routes, which rude, slow and broken clients neither stop nor fill.

Every connection has a thread. Whoever sends slowly holds nothing but a connection: the place among the requests that
are answered is given when all of a request has arrived, and where connections are scarce the one that keeps the
server waiting for the longest gives way. What is not HTTP as RFC 9112 has it is refused, never guessed at.
"""

from __future__ import annotations

import contextlib
import email.utils
import enum
import hashlib
import hmac
import http
import io
import logging
import re
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from speechbrain_mifuse.errors import UserError
from speechbrain_mifuse.lalm.http_limits import Allowance, Limits, Metrics
from speechbrain_mifuse.lalm.http_request import (
    BLOCK_BYTES,
    FIRST_BYTES,
    Head,
    PacedReader,
    RequestError,
    SlowClientError,
    body_blocks,
    declared_length,
    read_head,
)

MIN_BYTES_PER_SECOND = 2**14
# Time for a client to hear that it was refused while it still sends.
LINGER_SECONDS = 2.0
RETRY_AFTER_SECONDS = 1
JSON_TYPE = "application/json"
_METHODS = {"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"}

# Below the server's own logger, so that whoever silences one silences both.
logger = logging.getLogger("speechbrain_mifuse.lalm.serve.http")


class Route(NamedTuple):
    """What a path leads to.

    Attributes
    ----------
    method : str
        ``GET``, which ``HEAD`` then may use too, or ``POST``, whose requests have a body and are limited in number.
    answer : callable
        Takes the body and returns that of the reply; a `RequestError` becomes an error reply, any other exception
        status 500 without details.
    content_type : str
        Of the reply.
    public : bool
        Whether it needs no key.
    """

    method: str
    answer: Callable[[bytes], bytes]
    content_type: str = JSON_TYPE
    public: bool = False


class _State(enum.Enum):
    """What a connection is about."""

    IDLE = "between two requests"
    READING = "a request is arriving"
    ANSWERING = "the model is at work"
    REPLYING = "the reply is on its way"


class HttpServer(socketserver.ThreadingTCPServer):
    """Serve routes within limits.

    Parameters
    ----------
    address : (str, int)
        To listen on.
    routes : mapping of str to Route
        By path.
    limits : Limits
        For all routes together.
    key : str, optional
        Without it in ``Authorization: Bearer ...`` a request gets status 401, unless its route is public.

    Raises
    ------
    OSError, OverflowError
        If the address cannot be listened on.

    Example
    -------
    >>> import urllib.request
    >>> with HttpServer(("127.0.0.1", 0), {"/": Route("GET", lambda body: b"[]")}, Limits()) as server:
    ...     threading.Thread(target=server.serve_forever, args=(0.05,)).start()
    ...     host, port = server.server_address
    ...     reply = urllib.request.urlopen(f"http://{host}:{port}/").read()
    ...     server.shutdown()
    >>> reply
    b'[]'
    """

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], routes: Mapping[str, Route], limits: Limits, key: str | None = None):
        self.routes = routes
        self.limits = limits
        self.metrics = Metrics()
        self.slots = Allowance(limits.max_concurrent)
        self.memory = Allowance(limits.max_concurrent * limits.max_body_bytes)
        self.closing = False
        # Only a digest is kept: whatever is ever printed of this object, the key is not in it.
        self._key_digest = None if key is None else _digest(key)
        # In the order in which they entered their states.
        self._states: dict[socket.socket, _State] = {}
        self._changed = threading.Condition()
        super().__init__(address, _Handler)

    def metrics_text(self) -> str:
        """Tell what `Metrics` counts, and the requests and connections of this moment.

        Returns
        -------
        str
            In Prometheus's text format.
        """
        return self.metrics.text({"in_flight": self.slots.held, "connections": len(self._states)})

    def admits(self, head: Head) -> bool:
        """Tell whether a request has the key, if one is needed; takes the same time for all wrong ones.

        Parameters
        ----------
        head : Head
            Of the request.

        Returns
        -------
        bool
        """
        if self._key_digest is None:
            return True
        scheme, _, given = head.headers.get("authorization", "").partition(" ")
        return hmac.compare_digest(_digest(given.strip()), self._key_digest) and scheme.lower() == "bearer"

    def enter(self, connection: socket.socket, state: _State) -> None:
        """Note what a connection is about from now on; one that was given up stays so.

        Parameters
        ----------
        connection : socket.socket
            Which.
        state : _State
            About what.
        """
        with self._changed:
            if self._states.pop(connection, None) is not None:
                self._states[connection] = state
            self._changed.notify_all()

    def process_request(self, request, client_address):
        """Start a thread for a connection, and give up another one where there are too many."""
        with self._changed:
            if len(self._states) >= self.limits.max_connections:
                # There always is one: fewer requests than connections are answered at a time.
                longest = next(key for key, state in self._states.items() if state is not _State.ANSWERING)
                del self._states[longest]
                _hang_up(longest)
                self.metrics.crowded_out()
            self._states[request] = _State.IDLE
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        """Close a connection."""
        with self._changed:
            self._states.pop(request, None)
            self._changed.notify_all()
        super().shutdown_request(request)

    def handle_error(self, request, client_address):
        """Log what no client should be able to cause."""
        logger.exception("a connection failed")

    def end_connections(self, grace: float) -> None:
        """Let requests that have begun to arrive be answered, then end all connections.

        Parameters
        ----------
        grace : float
            Seconds that they have.
        """
        self.closing = True
        with self._changed:
            for connection in [key for key, state in self._states.items() if state is _State.IDLE]:
                _hang_up(connection)
            self._changed.wait_for(lambda: set(self._states.values()) <= {_State.IDLE}, grace)
            for connection in self._states:
                _hang_up(connection)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("latin-1")).digest()


def _hang_up(connection: socket.socket) -> None:
    # Its thread then reads the end of the stream, and closes it. The peer may have ended it meanwhile.
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def checked_key(key: str | None, name: str) -> str | None:
    """Check a key that clients shall send.

    Parameters
    ----------
    key : str, optional
        As the environment has it.
    name : str
        Of the environment variable.

    Returns
    -------
    str or None
        The key, or `None` if none is wanted.

    Raises
    ------
    UserError
        If no header can carry it; the message does not show it.

    Example
    -------
    >>> checked_key("", "MIFUSE_SERVE_KEY")
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.errors.UserError: MIFUSE_SERVE_KEY is set, but to nothing or to something with blanks ...
    """
    if key is not None and not re.fullmatch(r"[\x21-\x7e]+", key):
        raise UserError(
            f"{name} is set, but to nothing or to something with blanks or characters beyond ASCII, which no header "
            "carries. Set it to a word, or unset it to serve without a key"
        )
    return key


def _busy(what: str) -> RequestError:
    return RequestError(f"{what}; try again", 503, "overloaded", {"Retry-After": str(RETRY_AFTER_SECONDS)})


class _Handler(socketserver.BaseRequestHandler):
    """The requests of one connection."""

    server: HttpServer

    def setup(self):
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        self._paced = PacedReader(self.request)
        self._file = io.BufferedReader(self._paced, BLOCK_BYTES)

    def handle(self):
        try:
            while self._one_request():
                pass
        except OSError as error:
            logger.debug("a connection ended early (%s)", error)

    def finish(self):
        # A connection that is closed over unread bytes takes the reply from the client.
        self.server.enter(self.request, _State.IDLE)
        with contextlib.suppress(OSError, SlowClientError):
            self.request.shutdown(socket.SHUT_WR)
            self._paced.allow(LINGER_SECONDS)
            until = time.monotonic() + LINGER_SECONDS
            while self._paced.read(BLOCK_BYTES) and time.monotonic() < until:
                pass

    def _one_request(self) -> bool:
        """Answer one request; whether another may follow."""
        self.server.enter(self.request, _State.IDLE)
        self._paced.allow(self.server.limits.idle_timeout)
        try:
            if self.server.closing or not self._file.peek(1):
                return False
        except SlowClientError:
            return False
        self.server.enter(self.request, _State.READING)
        started = time.monotonic()
        self._head: Head | None = None
        # Until all of the request has been read, nobody knows where the next one would begin.
        self._whole = False
        with contextlib.ExitStack() as held:
            status, headers, content = self._outcome(held)
            # Whoever is slow to take a reply must not hold a place that another could be answered in.
            self.server.enter(self.request, _State.REPLYING)
            held.pop_all().close()
            keep = self._whole and self._head.keep_alive and not self.server.closing
            known = self._head is not None and self._head.path in self.server.routes
            self.server.metrics.answered(self._head.path if known else "other", status, time.monotonic() - started)
            self._send(status, headers if keep else {**headers, "Connection": "close"}, content)
        return keep

    def _outcome(self, held: contextlib.ExitStack) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content of the reply; `held` gives back what the request takes up."""
        try:
            return self._answer(held)
        except SlowClientError:
            error = RequestError("the request did not arrive in time", 408)
        except RequestError as caught:
            error = caught
        return error.status, {"Content-Type": JSON_TYPE, **error.headers}, error.body()

    def _answer(self, held: contextlib.ExitStack) -> tuple[int, dict[str, str], bytes]:
        self._paced.allow(self.server.limits.read_timeout)
        if self._file.peek(1)[:1] not in FIRST_BYTES:
            # As when TLS is spoken to this port: no line end may ever come.
            raise RequestError("this is not HTTP; is the address https:// where it should be http://?")
        head = self._head = read_head(self._file)
        self._whole = not head.has_body and head.method in {"GET", "HEAD"}
        route = self._route(head)
        body = b""
        if route.method == "POST":
            body = self._body(head, held)
            if not self.server.slots.take():
                raise _busy(f"{self.server.limits.max_concurrent} requests are being answered")
            held.callback(self.server.slots.give)
            self.server.enter(self.request, _State.ANSWERING)
        try:
            content = route.answer(body)
        except RequestError:
            raise
        except Exception:
            logger.exception("the recogniser failed")
            raise RequestError("the recogniser failed; see the server's log", 500) from None
        return 200, {"Content-Type": route.content_type}, content

    def _route(self, head: Head) -> Route:
        if head.method not in _METHODS:
            raise RequestError("no such method", 501)
        route = self.server.routes.get(head.path)
        if route is None:
            raise RequestError(f"no such route: {head.method} {head.path[:200]}", 404, "not_found")
        if head.method != route.method and (head.method, route.method) != ("HEAD", "GET"):
            message = f"{head.path} takes {route.method}, not {head.method}"
            raise RequestError(message, 405, "method_not_allowed", {"Allow": route.method})
        if not route.public and not self.server.admits(head):
            asked = {"WWW-Authenticate": "Bearer"}
            raise RequestError("the API key is missing or wrong", 401, "invalid_api_key", asked)
        return route

    def _body(self, head: Head, held: contextlib.ExitStack) -> bytes:
        limit = self.server.limits.max_body_bytes
        length = declared_length(head, limit)
        if head.headers.get("expect", "").lower() == "100-continue":
            self._write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._paced.allow(self.server.limits.read_timeout, MIN_BYTES_PER_SECOND)
        body = bytearray()
        for block in body_blocks(self._file, length, limit):
            if not self.server.memory.take(len(block)):
                raise _busy("requests of too many bytes are being read")
            held.callback(self.server.memory.give, len(block))
            body += block
        self._whole = True
        return bytes(body)

    def _send(self, status: int, headers: Mapping[str, str], content: bytes) -> None:
        always = {
            "Server": "speechbrain-mifuse",
            "Date": email.utils.formatdate(usegmt=True),
            "Content-Length": str(len(content)),
        }
        lines = [f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}"]
        lines += [f"{name}: {value}" for name, value in {**always, **headers}.items()]
        bodiless = self._head is not None and self._head.method == "HEAD"
        # No path of unknown content and no header: they may hold a key.
        logger.debug("answered with status %d", status)
        self._write("\r\n".join([*lines, "", ""]).encode("latin-1") + (b"" if bodiless else content))

    def _write(self, data: bytes) -> None:
        self.request.settimeout(self.server.limits.read_timeout)
        self.request.sendall(data)
