"""A chat-completions server on this machine whose right answers are known and whose faults are drawn from a seed.

The right answer is a function of the recording and of the seed asked with, so that a wrong label can be told from a
right one afterwards. What goes wrong with a request is drawn from the server's seed, the recording, the request's seed
and how often the two were asked about before: neither the order of the requests nor threads have a part in it.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import dataclasses
import functools
import hashlib
import http.server
import io
import json
import random
import socket
import threading
import time
import wave
from collections.abc import Callable, Sequence

LABELS = ("angry", "happy", "neutral", "sad")
MODEL = "chaos"


def right_label(audio: str) -> int:
    """Index of the one right label of a recording, from its content hash."""
    return int(audio[:8], 16) % len(LABELS)


def right_scores(audio: str, seed: int) -> dict[str, float]:
    """Distribution that is the one right answer to a recording asked about with a seed; no two seeds give the same."""
    share = 0.55 + 0.35 * random.Random(f"{audio}:{seed}").random()
    rest = (1 - share) / (len(LABELS) - 1)
    return {label: round(share if i == right_label(audio) else rest, 6) for i, label in enumerate(LABELS)}


@dataclasses.dataclass
class Asked:
    """One request: the recording's content hash, seed, number of choices; when it was answered, by `time.monotonic`."""

    audio: str
    seed: int
    n: int
    answered: float | None = None

    @property
    def samples(self) -> list[tuple[str, int]]:
        """Every (content hash, seed) that was asked for."""
        return [(self.audio, self.seed + j) for j in range(self.n)]


@dataclasses.dataclass
class Exchange:
    """A request and what is needed to answer it, rightly or not."""

    http: http.server.BaseHTTPRequestHandler
    server: ChaosServer
    audio: str
    seed: int
    n: int

    def right(self) -> dict:
        """Body of the right answer."""
        return self.body([json.dumps(right_scores(self.audio, self.seed + j)) for j in range(self.n)])

    def body(self, texts: Sequence[str], finish_reason: str = "stop", refusal: str | None = None) -> dict:
        """Body of a completion with one choice per text."""
        message = {"role": "assistant", "refusal": refusal}
        choices = [
            {"index": i, "finish_reason": finish_reason, "message": {**message, "content": text}}
            for i, text in enumerate(texts)
        ]
        usage = {"prompt_tokens": 50, "completion_tokens": 20 * len(texts), "total_tokens": 50 + 20 * len(texts)}
        return {
            "id": "chaos",
            "object": "chat.completion",
            "created": 1,
            "model": MODEL,
            "choices": choices,
            "usage": usage,
        }

    def send(self, status: int, body: dict | bytes, **headers: str):
        """Send a whole reply; underscores in the names of headers stand for hyphens."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.http.send_response(status)
        self.http.send_header("Content-Type", "application/json")
        self.http.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.http.send_header(name.replace("_", "-"), value)
        self.http.end_headers()
        self.http.wfile.write(data)

    def hang_up(self):
        """End the connection without a further word."""
        self.http.close_connection = True
        with contextlib.suppress(OSError):
            self.http.connection.shutdown(socket.SHUT_RDWR)


def answer_right(exchange: Exchange):
    """Answer as asked."""
    exchange.send(200, exchange.right())


def rate_limit(exchange: Exchange):
    """429 that names no time to wait."""
    exchange.send(429, {"error": {"message": "slow down", "type": "requests", "code": "rate_limit_exceeded"}})


def rate_limit_and_say_how_long(exchange: Exchange):
    """429 with Retry-After."""
    exchange.send(429, {"error": {"message": "slow down"}}, Retry_After=f"{exchange.server.retry_after:g}")


def fail(exchange: Exchange):
    """500."""
    exchange.send(500, {"error": {"message": "internal error", "type": "server_error"}})


def gateway_page(exchange: Exchange):
    """502 with a page for people, as proxies send."""
    exchange.send(502, b"<html><h1>Bad gateway</h1></html>")


def drop(exchange: Exchange):
    """Hang up before the reply."""
    exchange.hang_up()


def drop_midway(exchange: Exchange):
    """Hang up in the middle of the reply."""
    data = json.dumps(exchange.right()).encode()
    exchange.http.send_response(200)
    exchange.http.send_header("Content-Type", "application/json")
    exchange.http.send_header("Content-Length", str(len(data)))
    exchange.http.end_headers()
    exchange.http.wfile.write(data[: len(data) // 2])
    exchange.http.wfile.flush()
    exchange.hang_up()


def truncate(exchange: Exchange):
    """Half a JSON body, sent as if it were whole."""
    data = json.dumps(exchange.right()).encode()
    exchange.send(200, data[: len(data) // 2])


def malform(exchange: Exchange):
    """Something else in the place of JSON."""
    exchange.send(200, b"data: [DONE]\n\n")


def be_slow(exchange: Exchange):
    """Answer right, but late."""
    exchange.server.closing.wait(exchange.server.slow_seconds)
    answer_right(exchange)


def hang(exchange: Exchange):
    """Never answer."""
    exchange.server.closing.wait()
    exchange.hang_up()


def choose_nothing(exchange: Exchange):
    """Give a completion without choices."""
    exchange.send(200, exchange.body([]))


def cut_off(exchange: Exchange):
    """Stop at the token limit, in an object whose first half names the wrong label."""
    wrong = LABELS[(right_label(exchange.audio) + 1) % len(LABELS)]
    exchange.send(200, exchange.body([f'{{"{wrong}": 0.9, "'] * exchange.n, finish_reason="length"))


def refuse(exchange: Exchange):
    """Refuse in the message's own field, beside content that would be a wrong answer."""
    exchange.send(200, exchange.body([wrong_scores(exchange.audio)] * exchange.n, refusal="I cannot judge voices."))


def refuse_in_words(exchange: Exchange):
    """Refuse in a sentence that names a label."""
    exchange.send(200, exchange.body(["I'm sorry, I can't tell whether this person is angry."] * exchange.n))


def filter_content(exchange: Exchange):
    """Be stopped by a content filter, after content that would be a wrong answer."""
    exchange.send(200, exchange.body([wrong_scores(exchange.audio)] * exchange.n, finish_reason="content_filter"))


def contradict(exchange: Exchange):
    """Give two objects that contradict each other."""
    wrong = wrong_scores(exchange.audio)
    right = json.dumps(right_scores(exchange.audio, exchange.seed))
    exchange.send(200, exchange.body([f"{wrong} or rather {right}"] * exchange.n))


def say_something_else(exchange: Exchange):
    """Give numbers that are no probabilities."""
    exchange.send(200, exchange.body(['{"angry": -1, "happy": 2, "neutral": 0, "sad": 0}'] * exchange.n))


def say_nothing(exchange: Exchange):
    """Give a choice without content."""
    exchange.send(200, exchange.body([None] * exchange.n))


def answer_once(exchange: Exchange):
    """Answer right, but give one choice whatever n is."""
    exchange.send(200, exchange.body([json.dumps(right_scores(exchange.audio, exchange.seed))]))


def wrong_scores(audio: str) -> str:
    """A well-formed answer that names a wrong label."""
    return json.dumps({LABELS[(right_label(audio) + 1) % len(LABELS)]: 1.0})


Fault = Callable[[Exchange], None]

FAULTS: dict[str, Fault] = {
    "rate_limit": rate_limit,
    "rate_limit_and_say_how_long": rate_limit_and_say_how_long,
    "fail": fail,
    "gateway_page": gateway_page,
    "drop": drop,
    "drop_midway": drop_midway,
    "truncate": truncate,
    "malform": malform,
    "be_slow": be_slow,
    "hang": hang,
    "choose_nothing": choose_nothing,
    "cut_off": cut_off,
    "refuse": refuse,
    "refuse_in_words": refuse_in_words,
    "filter_content": filter_content,
    "contradict": contradict,
    "say_something_else": say_something_else,
    "say_nothing": say_nothing,
    "answer_once": answer_once,
}

# Faults of a reply that end by themselves, in the order of the classes that a collection must survive.
PASSING = tuple(name for name in FAULTS if name != "hang")


class ChaosServer:
    """Serve right answers and faults from background threads until closed; a context manager.

    Parameters
    ----------
    faults : sequence of str
        Keys of `FAULTS`, drawn from with equal chances.
    rate : float
        Share of the replies that are faulty.
    seed : int
        Of the draws.
    latency : float
        Seconds before any reply.
    retry_after, slow_seconds : float
        What `rate_limit_and_say_how_long` says, and what `be_slow` takes.
    """

    def __init__(
        self,
        faults: Sequence[str] = (),
        rate: float = 0.0,
        seed: int = 0,
        latency: float = 0.0,
        retry_after: float = 0.02,
        slow_seconds: float = 0.05,
    ):
        self.faults = [FAULTS[name] for name in faults]
        self.rate, self.seed, self.latency = rate, seed, latency
        self.retry_after, self.slow_seconds = retry_after, slow_seconds
        self.closing = threading.Event()
        self.asked: list[Asked] = []
        self.drawn: collections.Counter[str] = collections.Counter()
        self.keys_seen: set[str] = set()
        self._times: collections.Counter[tuple[str, int]] = collections.Counter()
        self._lock = threading.Lock()
        self._http = _Server(("127.0.0.1", 0), _Handler)
        self._http.chaos = self
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> ChaosServer:
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.close()

    @property
    def base_url(self) -> str:
        """Address to give to a client."""
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def close(self):
        """Stop; whoever hangs is released, every connection ends, and nothing listens any more."""
        if not self.closing.is_set():
            self.closing.set()
            self._http.shutdown()
            self._http.server_close()
            self._http.end_connections()

    def times_asked(self, since: int = 0) -> collections.Counter[tuple[str, int]]:
        """Count how often each (content hash, seed) was asked for, from entry `since` of `asked` on."""
        with self._lock:
            return collections.Counter(sample for entry in self.asked[since:] for sample in entry.samples)

    def answer(self, handler: http.server.BaseHTTPRequestHandler, request: dict):
        """Note what is asked, draw what goes wrong, and reply."""
        exchange = Exchange(handler, self, heard(request), request.get("seed") or 0, request.get("n") or 1)
        if not exchange.audio:
            exchange.send(400, {"error": {"message": "no audio"}})
            return
        noted = Asked(exchange.audio, exchange.seed, exchange.n)
        with self._lock:
            self.asked.append(noted)
            fault = self._draw(exchange)
            self.drawn[fault.__name__] += 1
        self.closing.wait(self.latency)
        fault(exchange)
        noted.answered = time.monotonic()

    def _draw(self, exchange: Exchange) -> Fault:
        about = (exchange.audio, exchange.seed)
        self._times[about] += 1
        draw = random.Random(f"{self.seed}:{about}:{self._times[about]}")
        return draw.choice(self.faults) if self.faults and draw.random() < self.rate else answer_right


def heard(request: dict) -> str:
    """Content hash of the recording of a request, in whichever of the two forms it was sent; empty if there is none."""
    parts = [part for message in request["messages"] for part in message["content"] if isinstance(part, dict)]
    found = [AUDIO_OF[part["type"]](part) for part in parts if part["type"] in AUDIO_OF]
    if not found:
        return ""
    with wave.open(io.BytesIO(base64.b64decode(found[0]))) as file:
        return hashlib.sha256(file.readframes(file.getnframes())).hexdigest()


AUDIO_OF = {
    "input_audio": lambda part: part["input_audio"]["data"],
    "audio_url": lambda part: part["audio_url"]["url"].partition("base64,")[2],
}


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    chaos: ChaosServer

    def __init__(self, *args):
        self._open: set = set()
        super().__init__(*args)

    def process_request(self, request, client_address):
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self._open.discard(request)
        super().shutdown_request(request)

    def end_connections(self):
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, *_):
        """Say nothing of clients that were killed."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self):
        models = {"object": "list", "data": [{"id": MODEL, "object": "model"}]}
        Exchange(self, self.server.chaos, "", 0, 1).send(200, models)

    def do_POST(self):
        self.server.chaos.keys_seen.add(self.headers.get("Authorization", ""))
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.chaos.answer(self, json.loads(body))

    def log_message(self, *_):
        """Say nothing."""


def noises(count: int, samples: int = 1600) -> list[tuple[str, Callable]]:
    """Utterances as `collect` takes them: ids, and functions that return different short waveforms at 16 kHz."""
    return [(f"u{index}", functools.partial(noise, index, samples)) for index in range(count)]


def noise(index: int, samples: int = 1600):
    """One of them."""
    import torch

    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(index))
