"""Fuzzes HTTP on both sides: replies that the client gets, and requests that the server gets, as damaged bytes.

The client must give an answer or one LalmError in one line; the server must go on answering what is in order.

    python tests/http_fuzz.py --cases 20000
"""

import argparse
import asyncio
import base64
import contextlib
import http.client
import json
import os
import random
import socket
import urllib.parse
from collections import Counter

import torch
from hostile_http import raw_server, reply

from speechbrain_mifuse.inference.http_limits import Limits
from speechbrain_mifuse.inference.server import EmotionServer
from speechbrain_mifuse.lalm import client as client_module
from speechbrain_mifuse.lalm.client import LalmClient, LalmError
from speechbrain_mifuse.lalm.collect import encode_wav
from speechbrain_mifuse.lalm.prompt import Prompt

LABELS = ("angry", "happy", "neutral", "sad")
KEY = "a-key-of-nobody-0123456789"
PIECES = (b"\x00", b"\xff", b"\r\n", b"\n", b" ", b":", b"{", b"[", b'"', b"\\", b"9" * 5000, b"[" * 100_000)
PIECES += (b"x" * 10_000, b"X-More: 1\r\n" * 200, b"null", b"-1", b"1e999", b"\\ud800", b"Content-Encoding: gzip\r\n")
PIECES += (b"Transfer-Encoding: chunked\r\n", b"Content-Length: 3\r\n", b"HTTP/1.1 307 Moved\r\nLocation: /\r\n\r\n")
CALLERS = 16


def damaged(whole, rng):
    """Cut, double, drop or replace a few pieces of some bytes."""
    data = bytearray(whole)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice([0, 0, 1, 2, 8, 64]))
        piece = rng.choice([b"", rng.choice(PIECES), bytes([rng.randrange(256)]), bytes(data[start:end]) * 2])
        data[start:end] = piece
    return bytes(data[: rng.randrange(len(data) + 1)]) if rng.random() < 0.1 else bytes(data)


def good_reply():
    """Give a completion with all that it may hold."""
    top = [{"token": "sad", "logprob": -0.1}, {"token": "angry", "logprob": -2.5}]
    message = {"role": "assistant", "content": '{"angry": 0.1, "sad": 0.9}', "refusal": None}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    choice["logprobs"] = {"content": [{"token": "sad", "logprob": -0.1, "top_logprobs": top}]}
    usage = {"prompt_tokens": 30, "completion_tokens": 9, "prompt_tokens_details": {"audio_tokens": 20}}
    body = {"id": "x", "model": "m", "system_fingerprint": "f", "choices": [choice], "usage": usage}
    return reply(json.dumps(body).encode())


def fuzz_replies(cases, seed=0):
    """Ask a server that damages its replies; count the outcomes."""
    rng, good, wav = random.Random(seed), good_reply(), encode_wav(torch.randn(1600) / 10)
    found = Counter()

    def script(*_):
        yield damaged(good, rng)
        raise OSError("closed")

    async def work(client, places):
        for place in places:
            try:
                responses = await client.ask(Prompt(LABELS), wav)
                found[responses[0].answer.kind] += 1
                assert KEY not in responses[0].raw, place
            except LalmError as error:
                assert "\n" not in str(error) and KEY not in str(error) and len(str(error)) < 1500, (place, error)
                found["error"] += 1

    async def main(url):
        async with LalmClient(url, "m", timeout=2.0, max_retries=1) as client:
            places = iter(range(cases))
            await asyncio.gather(*(work(client, places) for _ in range(CALLERS)))

    with raw_server(script) as (url, _):
        asyncio.run(main(url))
    return found


class Listener:
    """Answers at once."""

    labels, sample_rate = LABELS, 16000

    def predict_each(self, waveform, seeds):
        """Give equal probabilities for each of the seeds."""
        return torch.full((len(seeds), len(LABELS)), 0.25)


def fuzz_requests(cases, seed=0):
    """Send damaged requests to the server and check that it lives; count the statuses."""
    rng, found = random.Random(seed), Counter()
    messages = Prompt(LABELS).messages(base64.b64encode(encode_wav(torch.randn(1600) / 10)).decode())
    body = json.dumps({"model": "m", "messages": messages, "n": 2}).encode()
    with EmotionServer(Listener(), "m", limits=Limits(read_timeout=0.1, idle_timeout=0.1)) as server:
        address = urllib.parse.urlsplit(server.base_url)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        head += "Connection: close\r\n"
        good = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        assert status_of(address, good) == 200
        for case in range(cases):
            found[status_of(address, damaged(good, rng))] += 1
            if case % 50 == 0:
                assert status_of(address, good) == 200, f"seed {seed}, case {case}: the server answers no more"
        assert status_of(address, good) == 200
    return found


def status_of(address, data):
    """Send bytes and give the status of the reply, if there is one."""
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(data)
        response = http.client.HTTPResponse(connection)
        try:
            response.begin()
            response.read()
        except (http.client.HTTPException, OSError):
            return "none"
    assert response.status != 500, data[:2000]
    return response.status


def fuzz(cases, seed=0):
    """Fuzz both sides."""
    os.environ.setdefault("OPENAI_API_KEY", KEY)
    client_module._FIRST_BACKOFF = 0.001
    return {"replies": dict(fuzz_replies(cases, seed)), "requests": dict(fuzz_requests(cases, seed))}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(fuzz(options.cases, options.seed))
