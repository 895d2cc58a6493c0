"""A simulated server of files and batches, on loopback: what the Batch API does, and what can go wrong with it.

It knows nothing of emotions: answers come from the test. Batches move on when they are looked at.
"""

from __future__ import annotations

import contextlib
import dataclasses
import email.parser
import email.policy
import http.server
import json
import random
import time
import urllib.parse
from collections.abc import Callable

from serving import serving

EXPIRED = {"code": "batch_expired", "message": "not executed before the completion window expired"}


@dataclasses.dataclass
class Simulated:
    """State and behaviour of the server.

    `answer` takes the body of one request and gives (status, body of the reply), or `None` for one that expires.
    """

    answer: Callable[[dict], tuple[int, dict] | None]
    looks: int = 1  # polls until a batch has ended
    reject: Callable[[list[dict]], str | None] = lambda lines: None  # message with which a file is found invalid
    room: int = 1000  # batches at a time, more fail as OpenAI's do
    create: Callable[[], str] = lambda: "ok"  # "ok", "lost" (started, but the reply is lost), or an HTTP status
    extra: list[str] = dataclasses.field(default_factory=list)  # lines added to the first output file
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    names: list[str] = dataclasses.field(default_factory=list)
    batches: dict[str, dict] = dataclasses.field(default_factory=dict)
    executed: list[dict] = dataclasses.field(default_factory=list)
    keys: set[str] = dataclasses.field(default_factory=set)
    url: str = ""

    def upload(self, name: str, content: bytes) -> dict:
        self.names.append(name)
        return self.describe(self.keep(content), name)

    def keep(self, content: bytes) -> str:
        file_id = f"file-{len(self.files) + 1}"
        self.files[file_id] = content
        return file_id

    def describe(self, file_id: str, name: str) -> dict:
        size = len(self.files[file_id])
        fields = {"id": file_id, "bytes": size, "created_at": 1, "filename": name, "purpose": "batch"}
        return {**fields, "object": "file", "status": "processed"}

    def start(self, asked: dict) -> dict:
        batch_id = f"batch-{len(self.batches) + 1}"
        lines = [json.loads(line) for line in self.files[asked["input_file_id"]].splitlines()]
        running = sum(batch["status"] == "in_progress" for batch in self.batches.values())
        problem, code = self.reject(lines), "invalid_json_line"
        if running >= self.room:
            problem, code = "too many tokens enqueued", "token_limit_exceeded"
        self.batches[batch_id] = {
            **asked,
            "id": batch_id,
            "object": "batch",
            "created_at": int(time.time()),
            "status": "failed" if problem else "in_progress",
            "errors": {"object": "list", "data": [{"code": code, "message": problem, "line": 1}]} if problem else None,
            "request_counts": {"total": len(lines), "completed": 0, "failed": 0},
            "looks": self.looks,
        }
        return self.batches[batch_id]

    def look(self, batch: dict) -> dict:
        batch["looks"] -= 1
        if batch["status"] == "in_progress" and batch["looks"] <= 0:
            self.finish(batch)
        return batch

    def finish(self, batch: dict) -> None:
        good, bad, expired = [], [], False
        for line in map(json.loads, self.files[batch["input_file_id"]].splitlines()):
            assert line["method"] == "POST" and line["url"] == batch["endpoint"] == "/v1/chat/completions"
            self.executed.append(line)
            found = self.answer(line["body"])
            said = {"id": "r", "custom_id": line["custom_id"], "response": None, "error": None}
            if found is None:
                expired = True
                bad.append({**said, "error": EXPIRED})
            else:
                status, body = found
                said["response"] = {"status_code": status, "request_id": "q", "body": body}
                (good if status == 200 else bad).append(said)
        random.Random(0).shuffle(good)  # no order is promised
        lines = [json.dumps(line) for line in good] + self.extra
        self.extra = []
        batch["status"] = "expired" if expired else "completed"
        batch["output_file_id"] = self.keep("\n".join(lines).encode()) if lines else None
        batch["error_file_id"] = self.keep("\n".join(map(json.dumps, bad)).encode()) if bad else None
        batch["request_counts"] |= {"completed": len(good), "failed": len(bad)}


@contextlib.contextmanager
def simulated_batch_server(answer: Callable[[dict], tuple[int, dict] | None], **behaviour):
    """Serve; yields the `Simulated` with its `url`."""
    state = Simulated(answer, **behaviour)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self):
            state.keys.add(self.headers.get("Authorization", ""))
            url = urllib.parse.urlsplit(self.path)
            _, _, kind, *rest = url.path.split("/")
            if kind == "files":
                self.reply(200, state.files[rest[0]])
            elif kind == "batches" and rest:
                self.reply(200, state.look(state.batches[rest[0]]))
            elif kind == "batches":
                self.reply(200, self.page(urllib.parse.parse_qs(url.query)))
            else:
                self.reply(200, {"object": "list", "data": []})

        def page(self, query):
            """Newest first, two at a time."""
            newest = list(state.batches.values())[::-1]
            ids = [batch["id"] for batch in newest]
            begin = ids.index(query["after"][0]) + 1 if "after" in query else 0
            part = newest[begin : begin + 2]
            return {"object": "list", "data": part, "has_more": begin + 2 < len(newest)}

        def do_POST(self):
            content = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path.endswith("/files"):
                self.reply(200, state.upload(*self.attachment(content)))
                return
            outcome = state.create()
            if outcome.isdecimal():
                self.reply(int(outcome), {"error": {"message": "refused", "code": None}})
                return
            batch = state.start(json.loads(content))
            if outcome == "lost":
                self.close_connection = True
            else:
                self.reply(200, batch)

        def attachment(self, content):
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + content)
            parts = {part.get_param("name", header="content-disposition"): part for part in message.iter_parts()}
            assert parts["purpose"].get_content().strip() == "batch"
            return parts["file"].get_filename(), parts["file"].get_payload(decode=True)

        def reply(self, status, body):
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("retry-after-ms", "1")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *args):
            pass

    with serving(Server(("127.0.0.1", 0), Handler)) as state.url:
        yield state
