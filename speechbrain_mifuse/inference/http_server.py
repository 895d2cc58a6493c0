"""HTTP server for a few routes, on aiohttp, with limits against slow, malformed and cross-site requests.

The server runs in an event loop of its own, in a background thread. Connections that keep it waiting are bounded in
number and time; a request takes one of the places for requests only when its whole body has arrived. Heads are bounded
by aiohttp. Rates of single clients and encryption are left to a reverse proxy; see `docs/security.md`.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import hashlib
import hmac
import json
import logging
import re
import socket
import threading
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple

from aiohttp import http_exceptions, web

from speechbrain_mifuse.inference.http_limits import Limits, room_for_connections

MIN_BYTES_PER_SECOND = 2**14
# Bodies of the largest size that may be in memory together.
MAX_LARGE_BODIES = 8
# Connections that wait to be accepted.
BACKLOG = 64
# Time in which a client that was refused while it still sends can read the reply.
LINGER_SECONDS = 2.0
RETRY_AFTER_SECONDS = 1
JSON_TYPE = "application/json"
# Statuses of requests that are refused without an answer, and the name under which that is counted.
REJECTIONS = {401: "key", 403: "origin", 408: "slow", 413: "too_large", 421: "host", 431: "too_large", 503: "busy"}
CROWDED = "crowded"
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
_LOOPBACK_ORIGIN = re.compile(r"https?://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?")

# Below the server's own logger, so that whoever silences one silences both.
logger = logging.getLogger("speechbrain_mifuse.inference.server.http")


class RequestError(Exception):
    """A request that is answered with an error in OpenAI's shape."""

    def __init__(
        self, message: str, status: int = 400, code: str | None = None, headers: Mapping[str, str] | None = None
    ):
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = dict(headers or {})

    def reply(self) -> web.Response:
        """Put the error in OpenAI's shape."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kind, "param": None, "code": self.code}
        return _reply(self.status, json.dumps({"error": error}).encode(), self.headers)


def overloaded(what: str) -> RequestError:
    """Make the error that asks a client to come back."""
    return RequestError(f"{what}; try again", 503, "overloaded", {"Retry-After": str(RETRY_AFTER_SECONDS)})


class Route(NamedTuple):
    """What a path leads to."""

    method: str
    answer: Callable[[bytearray], Awaitable[bytes]]
    content_type: str = JSON_TYPE
    public: bool = False


class Metrics:
    """Counters of a server, in the text form that Prometheus reads."""

    def __init__(self):
        self._requests: collections.Counter[tuple[str, int]] = collections.Counter()
        self._seconds: collections.Counter[str] = collections.Counter()
        self._rejected = dict.fromkeys(sorted({*REJECTIONS.values(), CROWDED}), 0)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests[route, status] += 1
        self._seconds[route] += seconds
        if status in REJECTIONS:
            self._rejected[REJECTIONS[status]] += 1

    def dropped(self, reason: str) -> None:
        """Count a connection that was closed without a reply."""
        self._rejected[reason] += 1

    def text(self, gauges: Mapping[str, int]) -> str:
        """All counters."""
        requests = sorted(self._requests.items())
        lines = _heading("requests_total", "counter", "Requests answered, by route and status.")
        lines += [
            f'mifuse_requests_total{{route="{route}",status="{status}"}} {count}' for (route, status), count in requests
        ]
        lines += _heading("request_seconds", "summary", "Seconds from the head of a request to its reply, by route.")
        for route, seconds in sorted(self._seconds.items()):
            count = sum(number for (of, _), number in requests if of == route)
            lines.append(f'mifuse_request_seconds_sum{{route="{route}"}} {seconds:.6f}')
            lines.append(f'mifuse_request_seconds_count{{route="{route}"}} {count}')
        lines += _heading("rejected_total", "counter", "Requests and connections refused unheard, by reason.")
        lines += [f'mifuse_rejected_total{{reason="{reason}"}} {count}' for reason, count in self._rejected.items()]
        for name, value in gauges.items():
            lines += [*_heading(name, "gauge", "Current number, of all routes."), f"mifuse_{name} {value}"]
        return "\n".join([*lines, ""])


def _heading(name: str, kind: str, about: str) -> list[str]:
    return [f"# HELP mifuse_{name} {about}", f"# TYPE mifuse_{name} {kind}"]


class HttpServer:
    """Serve routes within limits."""

    def __init__(self, address: tuple[str, int], routes: Mapping[str, Route], limits: Limits, key: str | None = None):
        self.routes = routes
        self.limits = limits
        self.metrics = Metrics()
        self.closing = False
        # Requests with a place, and bytes of bodies that are held.
        self.in_flight = self.body_bytes = 0
        # In the order in which they began to wait for their clients; `None` for those that are answered.
        self.connections: dict[_Connection, None] = {}
        self.max_connections = room_for_connections(limits.max_connections)
        if self.max_connections < limits.max_connections:
            logger.warning(
                "the limit of open files allows %d connections, not %d; raise it with `ulimit -n`",
                self.max_connections,
                limits.max_connections,
            )
        # Only a digest is kept: whatever is ever printed of this object, the key is not in it.
        self._key_digest = None if key is None else _digest(key)
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._socket = socket.create_server(address, family=family, backlog=BACKLOG)
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        host = f"[{address[0]}]" if ":" in address[0] else address[0].lower()
        self._own_names = {*_LOOPBACK_NAMES, host}
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="mifuse-serve", daemon=True)
        self._started: concurrent.futures.Future[None] = concurrent.futures.Future()

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()
        self._started.result()

    def close(self, grace: float = 0.0) -> None:
        """Take no more connections, let requests whose head has arrived be answered, end all connections."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._end(grace), self._loop).result()
            self._loop.call_soon_threadsafe(self._stopped.set)
            self._thread.join()
        self._socket.close()

    def metrics_text(self) -> str:
        """Report what `Metrics` counts, and the current requests and connections."""
        return self.metrics.text({"in_flight": self.in_flight, "connections": len(self.connections)})

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        # A request whose client has gone is dropped.
        manager = web.Server(self._respond, handler_cancellation=True)
        options = {
            "logger": logger,
            "access_log": None,
            "keepalive_timeout": self.limits.idle_timeout,
            "lingering_time": LINGER_SECONDS,
            # Compressed bodies stay so: a small one may unfold to any size.
            "auto_decompress": False,
        }
        self._listening = await self._loop.create_server(
            lambda: _Connection(self, manager, loop=self._loop, **options), sock=self._socket, backlog=BACKLOG
        )
        self._started.set_result(None)
        await self._stopped.wait()

    async def _end(self, grace: float) -> None:
        self.closing = True
        self._listening.close()
        for connection in list(self.connections):
            # A request that has begun is answered, and ends its connection itself.
            if not connection.in_request:
                connection.force_close()
        until = self._loop.time() + grace
        while self.connections and self._loop.time() < until:
            await asyncio.sleep(0.01)
        for connection in list(self.connections):
            connection.abort()

    def admit(self, connection: _Connection) -> None:
        """Count a new connection; where there are too many, end the one that keeps waiting longest."""
        if len(self.connections) >= self.max_connections:
            self.metrics.dropped(CROWDED)
            next((each for each in self.connections if not each.answering), connection).abort()
        self.connections[connection] = None

    async def _respond(self, request: web.BaseRequest) -> web.Response:
        connection, started = request.protocol, self._loop.time()
        connection.begin_request()
        route = self.routes.get(_path(request))
        try:
            with contextlib.ExitStack() as held:
                content = await self._answer(request, held)
            response = _reply(200, content, {"Content-Type": route.content_type})
        except RequestError as error:
            response = error.reply()
        except Exception:
            logger.exception("the recogniser failed")
            response = RequestError("the recogniser failed; see the server's log", 500).reply()
        if self.closing or not request.content.is_eof():
            response.force_close()
        # No path of unknown content and no header: they may hold a key.
        logger.debug("answered with status %d", response.status)
        name = "other" if route is None else _path(request)
        self.metrics.answered(name, response.status, self._loop.time() - started)
        connection.in_request = connection.answering = False
        # Now the last of those that wait for their clients.
        if self.connections.pop(connection, self) is None:
            self.connections[connection] = None
        return response

    async def _answer(self, request: web.BaseRequest, held: contextlib.ExitStack) -> bytes:
        """Body of the reply; `held` gives back what the request takes up."""
        if request.version not in {(1, 0), (1, 1)}:
            raise RequestError("only HTTP/1.0 and HTTP/1.1 are spoken here", 505)
        self._require_own_host(request)
        self._require_own_site(request)
        route = self._route(request)
        body = bytearray()
        if route.method == "POST":
            body = await self._body(request, held)
            if self.in_flight >= self.limits.max_concurrent:
                raise overloaded(f"{self.limits.max_concurrent} requests are being answered")
            self._take(1, 0)
            held.callback(self._take, -1, 0)
            request.protocol.answering = True
        return await route.answer(body)

    def _take(self, places: int, count: int) -> None:
        self.in_flight += places
        self.body_bytes += count

    def _require_own_host(self, request: web.BaseRequest) -> None:
        hosts = request.headers.getall("Host", [])
        if len(hosts) != 1 or not _HOST.fullmatch(hosts[0].lower()):
            raise RequestError("Host: every request must have exactly one, as 127.0.0.1:8000")
        if self._key_digest is not None:
            return
        # Browsers put a name there when a name led them here, never the address that it stands for.
        local = str(request.get_extra_info("sockname", ("",))[0])
        names = self._own_names | {f"[{local}]" if ":" in local else local}
        port = self.address[1]
        if hosts[0].lower() not in {f"{name}:{port}" for name in names} | (names if port == 80 else set()):
            raise RequestError(
                f"Host: without a key this server answers only to its own address, as localhost:{port}. To reach it by "
                "another name, set MIFUSE_SERVE_KEY where it is started",
                421,
                "wrong_host",
            )

    def _require_own_site(self, request: web.BaseRequest) -> None:
        """Refuse what a browser sends for a page of another site."""
        host = request.headers["Host"].lower()
        for origin in request.headers.getall("Origin", []):
            if self._key_digest is None:
                allowed = _LOOPBACK_ORIGIN.fullmatch(origin)
            else:
                allowed = origin.lower() in {f"http://{host}", f"https://{host}"}
            if not allowed:
                raise RequestError("Origin: pages of other sites may not ask this server", 403, "wrong_origin")
        if "cross-site" in request.headers.getall("Sec-Fetch-Site", []):
            raise RequestError("Sec-Fetch-Site: pages of other sites may not ask this server", 403, "wrong_origin")

    def _route(self, request: web.BaseRequest) -> Route:
        path, method = _path(request), request.method
        route = self.routes.get(path)
        if route is None:
            raise RequestError(f"no such route: {method} {path[:200]}", 404, "not_found")
        if method != route.method and (method, route.method) != ("HEAD", "GET"):
            message = f"{path} takes {route.method}, not {method}"
            raise RequestError(message, 405, "method_not_allowed", {"Allow": route.method})
        if not route.public and not self._admits(request):
            asked = {"WWW-Authenticate": "Bearer"}
            raise RequestError("the API key is missing or wrong", 401, "invalid_api_key", asked)
        return route

    def _admits(self, request: web.BaseRequest) -> bool:
        """Whether a request has the key, if one is needed; takes the same time for all wrong ones."""
        if self._key_digest is None:
            return True
        given = request.headers.getall("Authorization", [])
        scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        return hmac.compare_digest(_digest(key.strip()), self._key_digest) and scheme.lower() == "bearer"

    async def _body(self, request: web.BaseRequest, held: contextlib.ExitStack) -> bytearray:
        # A page can send other types to another site without asking first.
        if request.content_type != JSON_TYPE:
            raise RequestError(f"Content-Type: must be {JSON_TYPE}", 415)
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise RequestError("Content-Encoding: compressed bodies are not read", 415)
        if request.headers.get("Transfer-Encoding", "chunked").lower() != "chunked":
            raise RequestError("Transfer-Encoding: only 'chunked' is understood", 501)
        limit = self.limits.max_body_bytes
        length = request.headers.get("Content-Length", "0").lstrip("0") or "0"
        # Python refuses to read numbers of thousands of digits.
        if len(length) > 18 or int(length) > limit:
            raise _too_large(limit)
        if request.headers.get("Expect", "").lower() == "100-continue" and request.version >= (1, 1):
            request.protocol.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        until = self._loop.time() + self.limits.read_timeout
        body = bytearray()
        held.callback(lambda: self._take(0, -len(body)))
        while block := await self._block(request, until):
            until += len(block) / MIN_BYTES_PER_SECOND
            if len(body) + len(block) > limit:
                raise _too_large(limit)
            if self.body_bytes + len(block) > MAX_LARGE_BODIES * limit:
                raise overloaded("requests of too many bytes are being read")
            self._take(0, len(block))
            body += block
        return body

    async def _block(self, request: web.BaseRequest, until: float) -> bytes:
        try:
            return await asyncio.wait_for(request.content.readany(), until - self._loop.time())
        except asyncio.TimeoutError:
            raise RequestError("the request did not arrive in time", 408) from None
        except (web.RequestPayloadError, http_exceptions.HttpProcessingError, ConnectionError):
            raise RequestError("the body of the request is malformed or incomplete") from None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _path(request: web.BaseRequest) -> str:
    """Give the target as it was sent, without its query."""
    return request.raw_path.partition("?")[0]


def _too_large(limit: int) -> RequestError:
    return RequestError(f"the request is larger than {limit} bytes", 413, "request_too_large")


def _reply(status: int, content: bytes, headers: Mapping[str, str]) -> web.Response:
    always = {"Content-Type": JSON_TYPE, "Server": "speechbrain-mifuse"}
    return web.Response(status=status, body=content, headers={**always, **headers})


class _Connection(web.RequestHandler):
    """aiohttp's side of a connection, which the server counts and may end."""

    def __init__(self, server: HttpServer, *args, **options):
        super().__init__(*args, **options)
        self._server = server
        # Whether the head of a request has arrived, and whether all of it has.
        self.in_request = self.answering = False

    def connection_made(self, transport):
        super().connection_made(transport)
        self._server.admit(self)
        # aiohttp bounds the time between two requests, and not in all versions that before the first one.
        self._first_head = self._loop.call_later(self._server.limits.read_timeout, self._give_up)

    def connection_lost(self, exc):
        self._first_head.cancel()
        self._server.connections.pop(self, None)
        super().connection_lost(exc)

    def begin_request(self) -> None:
        """Note that the head of a request has arrived."""
        self._first_head.cancel()
        self.in_request = True

    def _give_up(self) -> None:
        self._server.metrics.dropped(REJECTIONS[408])
        self.abort()

    def abort(self) -> None:
        """End the connection at once, with what it has not taken yet."""
        self._server.connections.pop(self, None)
        if self.transport is not None:
            self.transport.abort()

    def handle_error(self, request, status=500, exc=None, message=None):
        """Answer what aiohttp refuses before it becomes a request."""
        if isinstance(exc, http_exceptions.LineTooLong):
            error = RequestError("the head of the request is too long", 431)
        elif isinstance(exc, http_exceptions.HttpProcessingError):
            error = RequestError("the request is not valid HTTP/1.1")
        else:
            logger.error("a connection failed", exc_info=exc)
            error = RequestError("the server failed; see its log", 500)
        self._server.metrics.answered("other", error.status, 0.0)
        response = error.reply()
        response.force_close()
        return response
