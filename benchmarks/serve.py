"""The server under load: clips answered side by side, against the same server with one clip at a time.

Both sides are an `EmotionServer` in this process and answer distinct clips, each once, with one stochastic answer. The
callers are a process of their own (`callers.py`); each sends its next clip when the last one is answered.

- Side by side: the recognizer as it is; clips that come together are encoded on one core each.
- One at a time: the same recognizer without `predict_each`; every clip is encoded on all cores, one after the other.

`callers_N_ratio` is clips per second of the first over those of the second with N callers; for one caller it is the
ratio of the latencies turned over: 1 is as fast. `rss_growth_mb` and `descriptor_growth` are how much more resident
memory and how many more open files the process has after 2,000 further distinct clips (`--quick`: 8) from 8 callers.
Encoder: Whisper tiny.en's to layer 2 (the `[demo]` extra). Data: noise of 1 to 4 s as 16-bit WAV.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import soundfile
from epoch import TINY_WHISPER, random_whisper
from measure import Figure, take_turns
from recognise import exported

from speechbrain_mifuse.inference import EmotionRecognizer
from speechbrain_mifuse.inference.server import EmotionServer

CALLERS = (1, 8, 32)
RATE = 16000
MB = 1e6


class OneAtATime:
    """What the server needs of a recognizer, and no more."""

    def __init__(self, recogniser: EmotionRecognizer):
        self.labels, self.sample_rate = recogniser.labels, recogniser.sample_rate
        self.predict_proba = recogniser.predict_proba


def run(quick: bool) -> tuple[str, dict[str, Figure]]:
    """Compare the two."""
    count, turns, seconds, further = (4, 2, (0.2, 0.4), 8) if quick else (64, 7, (1.0, 4.0), 2000)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as servers:
        encoder = random_whisper(Path(scratch) / "encoder", **TINY_WHISPER) if quick else "demo"
        recogniser = EmotionRecognizer.from_hparams(exported(Path(scratch) / "recogniser", encoder))
        models = {"side_by_side": recogniser, "one_at_a_time": OneAtATime(recogniser)}
        addresses = {name: servers.enter_context(EmotionServer(model)).base_url for name, model in models.items()}
        sides = {
            f"{name}_{callers}": lambda address=address, callers=callers: rate(
                address, callers, [body(rng, seconds) for _ in range(count)]
            )
            for callers in CALLERS
            for name, address in addresses.items()
        }
        rates = take_turns(sides, turns, "serve")
        memory, files = grown(addresses["side_by_side"], rng, seconds, further)
    figures = {
        f"callers_{callers}_ratio": Figure(
            "times", [a / b for a, b in zip(*(rates[f"{name}_{callers}"] for name in models), strict=True)]
        )
        for callers in CALLERS
    }
    figures |= {f"{side}_clips_per_second": Figure("1/s", values) for side, values in rates.items()}
    figures |= {"rss_growth_mb": Figure("MB", [memory]), "descriptor_growth": Figure("files", [files])}
    return f"{count} clips of noise a turn, then {further}", figures


def body(rng: np.random.Generator, seconds: tuple[float, float]) -> bytes:
    """Write a request with a recording that no other has."""
    file = io.BytesIO()
    noise = 0.1 * rng.standard_normal(int(RATE * rng.uniform(*seconds)))
    soundfile.write(file, noise.clip(-1, 1), RATE, format="WAV", subtype="PCM_16")
    audio = {"data": base64.b64encode(file.getvalue()).decode(), "format": "wav"}
    parts = [{"type": "input_audio", "input_audio": audio}, {"type": "text", "text": "Answer in JSON."}]
    return json.dumps({"model": "mifuse", "messages": [{"role": "user", "content": parts}], "seed": 1}).encode()


def rate(address: str, callers: int, bodies: Sequence[bytes]) -> float:
    """Clips per second."""
    command = [sys.executable, str(Path(__file__).with_name("callers.py")), address, str(callers)]
    return float(subprocess.run(command, input=b"\n".join(bodies), stdout=subprocess.PIPE, check=True).stdout)


def grown(address: str, rng: np.random.Generator, seconds: tuple[float, float], count: int) -> tuple[float, float]:
    """Growth in memory and open files over many clips, made as they are sent."""
    before = used()
    for _ in range(count // 8):
        rate(address, 8, [body(rng, seconds) for _ in range(8)])
    after = used()
    return (after[0] - before[0]) / MB, after[1] - before[1]


def used() -> tuple[float, int]:
    """Resident memory in bytes, and open files."""
    process = psutil.Process(os.getpid())
    return process.memory_info().rss, process.num_fds()
