"""Ten thousand calls to an API of 200 ms latency, 64 at a time: what the client adds to the time that this must take.

The API is simulated (`latency_server.py`, a process of its own that sleeps and answers always the same); no figure says
anything about answers. 2,000 recordings of two seconds, each asked about five times in calls of one answer, as most
providers force one to. Every answer goes to a label store on disk before it counts. The collecting process is forked
from one that holds nothing but the imports.

- `ideal_ratio`: wall time over calls x latency / concurrency.
- `cpu_ms_per_call`: processor time of the collecting process for a call, kernel included, without reading and encoding
  each recording once, which is measured apart (`encode_ms_per_recording`).
- `resident_growth_mb`: greatest resident memory in the second half of the calls less that in the first.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import soundfile
import torch
from measure import Figure, take_turns

from speechbrain_mifuse.lalm.client import LalmClient
from speechbrain_mifuse.lalm.collect import SAMPLE_RATE, collect, encode_wav
from speechbrain_mifuse.lalm.profile import Profile
from speechbrain_mifuse.lalm.prompt import Clip, Prompt
from speechbrain_mifuse.lalm.store import LabelStore, Query
from speechbrain_mifuse.utils.audio import content_hash, load_audio
from speechbrain_mifuse.utils.progress import quiet

LABELS = ("angry", "happy", "neutral", "sad")
SECONDS, LATENCY, ANSWERS, CONCURRENCY = 2.0, 0.2, 5, 64
MB = 1e6


def run(quick: bool) -> tuple[str, dict[str, Figure]]:
    """Collect from the simulated API."""
    recordings, turns = (40, 1) if quick else (2000, 3)
    calls = recordings * ANSWERS
    with tempfile.TemporaryDirectory() as scratch:
        wavs = noises(Path(scratch), recordings)
        side = functools.partial(in_own_process, Path(scratch), wavs)
        measured = take_turns({"collect": side}, turns, "collect", warm_up=0)["collect"]
    ideal = calls * LATENCY / CONCURRENCY
    figures = {
        "ideal_ratio": Figure("times", [turn["wall"] / ideal for turn in measured]),
        "cpu_ms_per_call": Figure("ms", [1000 * (turn["cpu"] - turn["encoding"]) / calls for turn in measured]),
        "resident_growth_mb": Figure("MB", [turn["growth"] / MB for turn in measured]),
        "encode_ms_per_recording": Figure("ms", [1000 * turn["encoding"] / recordings for turn in measured]),
        "wall_s": Figure("s", [turn["wall"] for turn in measured]),
    }
    about = f"{calls} calls to a simulated API of {1000 * LATENCY:.0f} ms latency, {CONCURRENCY} at a time (ideal "
    return f"{about}{ideal:.2f} s), {recordings} recordings of {SECONDS:g} s of noise", figures


def noises(folder: Path, count: int) -> list[tuple[str, Path]]:
    """Write different recordings."""
    rng, wavs = np.random.default_rng(0), []
    for number in range(count):
        wav = folder / f"{number}.wav"
        soundfile.write(wav, 0.1 * rng.standard_normal(int(SECONDS * SAMPLE_RATE)).clip(-3, 3), SAMPLE_RATE)
        wavs.append((f"noise-{number}", wav))
    return wavs


@contextlib.contextmanager
def simulated_api() -> Iterator[str]:
    """Start the server; its base URL."""
    command = [sys.executable, str(Path(__file__).with_name("latency_server.py")), str(LATENCY)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield server.stdout.readline().strip()
        finally:
            server.stdin.close()


def in_own_process(scratch: Path, wavs: list[tuple[str, Path]]) -> dict[str, float]:
    """Measure one collection."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    with simulated_api() as url, tempfile.TemporaryDirectory(dir=scratch) as folder:
        process = context.Process(target=lambda: sender.send(measured_run(Path(folder), url, wavs)))
        process.start()
        sender.close()
        found = receiver.recv()
        process.join()
    return found


def measured_run(folder: Path, url: str, wavs: list[tuple[str, Path]]) -> dict[str, float]:
    """Collect; seconds of wall and processor time, and growth of the resident memory in bytes."""
    torch.set_num_threads(1)  # a forked process must not use its parent's threads
    start = time.process_time()
    for _, wav in wavs:
        encode(wav)
    encoding = time.process_time() - start
    prompt, client = Prompt(LABELS), LalmClient(url, "simulated", profile=Profile(honours_n=False))
    query = Query.of(prompt, "simulated", url, {"temperature": 1.0, "seed": 0})
    with LabelStore(folder / "labels.sqlite") as store, quiet("httpx", "httpx2"), Memory() as memory:
        wall, cpu = time.perf_counter(), time.process_time()
        report = collect(wavs, prompt, client, store, query, ANSWERS, CONCURRENCY)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        if report.stored != len(wavs) * ANSWERS or len(store.have(query)) != report.stored:
            raise AssertionError(report.summary())
    return {"wall": wall, "cpu": cpu, "encoding": encoding, "growth": memory.growth()}


def encode(wav: Path) -> Clip:
    """Do with a recording what must be done once."""
    waveform = load_audio(wav, SAMPLE_RATE)
    content_hash(waveform)
    return Clip.of(encode_wav(waveform))


class Memory:
    """Resident memory of this process, looked at ten times a second."""

    def __init__(self):
        self.seen, self.stop = [], threading.Event()
        self.thread = threading.Thread(target=self.look)

    def __enter__(self) -> Memory:
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()

    def look(self):
        process = psutil.Process()
        while not self.stop.wait(0.1):
            self.seen.append(process.memory_info().rss)

    def growth(self) -> float:
        """Greatest of the second half less that of the first."""
        half = len(self.seen) // 2
        return max(self.seen[half:], default=0) - max(self.seen[:half], default=0)
