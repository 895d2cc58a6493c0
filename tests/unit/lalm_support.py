"""A recogniser that really listens, and an HTTP server that misbehaves on purpose."""

import contextlib
import http.server
import json

import numpy as np
import soundfile
import torch
from serving import serving

LABELS = ("angry", "happy", "neutral", "sad")


class EnergyRecogniser:
    """Probabilities from loudness and zero crossings, with noise when stochastic."""

    labels = LABELS
    sample_rate = 16000

    def __init__(self):
        self.calls = 0

    def predict_proba(self, waveform, n=1, stochastic=False, seed=None):
        self.calls += 1
        loudness = waveform.square().mean().clamp_min(1e-9).log10()
        crossings = (waveform[1:] * waveform[:-1] < 0).float().mean()
        logits = torch.stack([loudness + 3, 8 * crossings, torch.tensor(0.2), -loudness - 3]).repeat(n, 1)
        if stochastic:
            logits = logits + torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))
        return logits.softmax(dim=1)


def tone(index, seconds=0.3):
    """Make a tone whose loudness and pitch depend on `index`."""
    time = torch.arange(int(16000 * seconds)) / 16000
    return (0.05 + 0.04 * (index % 20)) * torch.sin(2 * np.pi * (110 + 97 * index) * time)


def write_tones(folder, count):
    """Write `count` different recordings and return the utterance list."""
    utterances = []
    for index in range(count):
        path = folder / f"tone{index}.wav"
        soundfile.write(path, tone(index).numpy(), 16000)
        utterances.append((f"u{index}", path))
    return utterances


def completion(*texts, finish_reason="stop", refusal=None, model="m"):
    """Body of a chat completion with one choice per text."""
    choices = [
        {
            "index": i,
            "finish_reason": finish_reason,
            "message": {"role": "assistant", "content": text, "refusal": refusal},
        }
        for i, text in enumerate(texts)
    ]
    usage = {"prompt_tokens": 10, "completion_tokens": 1, "total_tokens": 11}
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 1,
        "model": model,
        "choices": choices,
        "usage": usage,
    }


@contextlib.contextmanager
def scripted_server(script, models=("m",)):
    """Serve `script(body, headers) -> (status, body[, headers])`; yields (base_url, list of request bodies)."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self):
            self.reply(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in models]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(body)
            self.reply(*script(body, self.headers))

        def reply(self, status, body, headers=(("retry-after-ms", "1"),)):
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            for name, value in headers:
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, *args):
            pass

    with serving(Server(("127.0.0.1", 0), Handler)) as url:
        yield url, requests
