"""A server that answers with whatever bytes a test wants, on a bare socket."""

import contextlib
import socketserver
import time

from serving import serving


def reply(body, headers=(), status="200 OK"):
    """Give the bytes of a reply of HTTP/1.1 with its length."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Content-Type: application/json", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@contextlib.contextmanager
def raw_server(script):
    """Send the pieces that `script(path, head, body)` gives; yields (base_url, list of (path, head, body))."""
    seen = []

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            with contextlib.suppress(OSError):
                while line := self.rfile.readline():
                    head = [line.decode()]
                    while (line := self.rfile.readline()) not in (b"\r\n", b""):
                        head.append(line.decode())
                    names = {name.lower(): value.strip() for name, _, value in (text.partition(":") for text in head)}
                    body = self.rfile.read(int(names.get("content-length", 0)))
                    path = head[0].split()[1]
                    seen.append((path, "".join(head), body))
                    for piece in script(path, "".join(head), body):
                        self.wfile.write(piece)
                    if names.get("connection", "").lower() == "close":
                        return

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        allow_reuse_address = True
        request_queue_size = 64

    with serving(Server(("127.0.0.1", 0), Handler)) as url:
        yield url, seen


def forever(piece, pause=0.0):
    """Repeat a piece until the other side has gone."""
    while True:
        yield piece
        time.sleep(pause)
