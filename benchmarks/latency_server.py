"""A simulated API for load tests: every chat completion is answered with the same label after a fixed latency.

It listens to nothing: the body is counted and dropped, so that the server costs far less than the client it is to
measure. Run as a process of its own, `python latency_server.py SECONDS`, it prints its base URL and serves until its
standard input is closed.
"""

from __future__ import annotations

import asyncio
import json
import sys

COMPLETION = {
    "id": "chatcmpl-simulated",
    "object": "chat.completion",
    "created": 1,
    "model": "simulated",
    "system_fingerprint": "simulated",
    "choices": [
        {
            "index": 0,
            "finish_reason": "stop",
            "logprobs": None,
            "message": {
                "role": "assistant",
                "content": '{"angry": 0.5, "happy": 0.25, "neutral": 0.25, "sad": 0.0}',
                "refusal": None,
            },
        }
    ],
    "usage": {
        "prompt_tokens": 140,
        "completion_tokens": 30,
        "total_tokens": 170,
        "prompt_tokens_details": {"audio_tokens": 75},
    },
}
MODELS = {"object": "list", "data": [{"id": "simulated", "object": "model", "created": 1, "owned_by": "simulated"}]}


def response(body: dict) -> bytes:
    """Whole HTTP response."""
    data = json.dumps(body).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


class Connection(asyncio.Protocol):
    """One kept-alive connection; requests on it come one after the other."""

    completion, models = response(COMPLETION), response(MODELS)

    def __init__(self, seconds: float):
        self.seconds, self.head, self.missing = seconds, b"", 0

    def connection_made(self, transport):
        self.transport, self.loop = transport, asyncio.get_running_loop()

    def data_received(self, data: bytes):
        if self.missing:
            self.missing -= len(data)
        else:
            self.head += data
            end = self.head.find(b"\r\n\r\n")
            if end < 0:
                return
            head, rest = self.head[:end].lower(), len(self.head) - end - 4
            self.head = b""
            if head.startswith(b"get"):
                self.transport.write(self.models)
                return
            self.missing = int(head.split(b"content-length:")[1].split(b"\r\n")[0]) - rest
        if self.missing <= 0:
            self.missing = 0
            self.loop.call_later(self.seconds, self.answer)

    def answer(self):
        if not self.transport.is_closing():
            self.transport.write(self.completion)


async def serve(seconds: float) -> None:
    """Serve until standard input ends."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(seconds), "127.0.0.1", 0, backlog=1024)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(serve(float(sys.argv[1])))
