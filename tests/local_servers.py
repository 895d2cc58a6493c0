"""Servers of other people that can run on this machine: each is started for real, where its program is installed.

None of them knows emotions: they show what a server takes and how it fails, never how well a model judges.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple


class Served(NamedTuple):
    """Where a server is reached."""

    base_url: str
    model: str


class Program(NamedTuple):
    """A program on the PATH, how it is installed, what it is, and its profile."""

    executable: str
    install: str
    about: str
    profile: dict
    start: Callable[..., contextlib.AbstractContextManager[Served]]

    @property
    def installed(self) -> bool:
        return shutil.which(self.executable) is not None


@contextlib.contextmanager
def running(command: Sequence[str], port: int, folder: Path, patience: float = 120) -> Iterator[str]:
    """Run a program until its port answers, and end it afterwards; the address of its API."""
    with (folder / "log.txt").open("w") as log:
        offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env={**os.environ, **offline})
    try:
        until = time.monotonic() + patience
        while not answers(port):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{command[0]} did not start:\n{(folder / 'log.txt').read_text()[-2000:]}")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answers(port: int) -> bool:
    """Whether an HTTP server is there; what it answers is another matter."""
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def free_port() -> int:
    """A port that nothing listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def mifuse_serve(recogniser: Path) -> Iterator[Served]:
    """Our own server, with a recogniser that a recipe has trained."""
    port = free_port()
    main = "from speechbrain_mifuse.cli.main import main; main()"
    command = [sys.executable, "-c", main, "serve", str(Path(recogniser).resolve()), "--port", str(port)]
    with tempfile.TemporaryDirectory() as folder, running(command, port, Path(folder)) as url:
        yield Served(url, "served-classifier")


@contextlib.contextmanager
def transformers_serve() -> Iterator[Served]:
    """`transformers serve` with a Qwen2-Audio of random weights."""
    from tiny_qwen2_audio import build

    port, name = free_port(), "tiny-random-qwen2-audio"
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder) / name)
        command = ["transformers", "serve", name, "--host", "127.0.0.1", "--port", str(port)]
        with running(command, port, Path(folder)) as url:
            yield Served(url, name)


@contextlib.contextmanager
def fakellm() -> Iterator[Served]:
    """`fakellm` with its own example of rules."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["fakellm", "init"], cwd=folder, check=True, capture_output=True)
        with running(["fakellm", "serve", "--port", str(port)], port, Path(folder)) as url:
            yield Served(url, "gpt-audio")


@contextlib.contextmanager
def xpyd_sim() -> Iterator[Served]:
    """`xpyd-sim` without delays."""
    port = free_port()
    delays = ["--prefill-delay-ms", "0", "--kv-transfer-delay-ms", "0", "--decode-delay-per-token-ms", "0"]
    command = ["xpyd-sim", "serve", "--host", "127.0.0.1", "--port", str(port), "--model", "sim", *delays]
    with tempfile.TemporaryDirectory() as folder, running(command, port, Path(folder)) as url:
        yield Served(url, "sim")


@contextlib.contextmanager
def aimock(*chaos: str) -> Iterator[Served]:
    """`aimock`, which answers all questions alike; `chaos` are its switches, such as ``--chaos-ratelimit 0.2``."""
    port, answer = free_port(), {"angry": 0.7, "happy": 0.1, "neutral": 0.1, "sad": 0.1}
    with tempfile.TemporaryDirectory() as folder:
        rules = {"fixtures": [{"match": {}, "response": {"content": json.dumps(answer)}}]}
        (Path(folder) / "rules.json").write_text(json.dumps(rules))
        command = ["llmock", "--port", str(port), "--fixtures", "rules.json", *chaos]
        with running(command, port, Path(folder)) as url:
            yield Served(url, "gpt-audio")


PROGRAMS = {
    "transformers serve": Program(
        "transformers",
        'pip install "transformers[serving]" librosa',
        "with a Qwen2-Audio of random weights (`tests/tiny_qwen2_audio.py`): real audio in, gibberish out. "
        "A seed holds for the whole process: it repeats an answer only where calls come one at a time, as here",
        {"sampling": {"max_tokens": 60}, "concurrency": 1, "honours_n": False, "longest_audio": 30},
        transformers_serve,
    ),
    "fakellm": Program("fakellm", "pip install fakellm", "a simulator", {}, fakellm),
    "xpyd-sim": Program("xpyd-sim", "pip install xpyd-sim", "a simulator", {"sampling": {"max_tokens": 60}}, xpyd_sim),
    "aimock": Program(
        "llmock",
        "npm install @copilotkit/aimock",
        "a simulator that answers by rules, here always the same",
        {},
        aimock,
    ),
}
