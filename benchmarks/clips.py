"""Labelled recordings for the benchmarks: real speech where there is some, else noise of a few seconds."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import soundfile

from speechbrain_mifuse.corpora.nemo import list_nemo
from speechbrain_mifuse.utils.files import atomic_write

LABELS = ("angry", "happy", "neutral", "sad")
RATE = 16000


def write_manifests(folder: Path, counts: set[int], seconds: tuple[float, float]) -> tuple[str, dict[int, Path]]:
    """What the clips are, and for each count a manifest of so many; a shorter one is the start of a longer one.

    nEMO below `MIFUSE_CORPORA` if that is set, in random order; else seeded noise of lengths uniform in `seconds`.
    """
    corpora, most = os.environ.get("MIFUSE_CORPORA"), max(counts)
    kind, rows = ("nemo", speech(Path(corpora), most)) if corpora else ("synthetic", noise(folder, most, seconds))
    atomic_write(folder / "corpus.json", json.dumps({"data_root": str(folder)}))
    paths = {count: folder / f"{count}.json" for count in counts}
    for count, path in paths.items():
        atomic_write(path, json.dumps(dict(rows[:count])))
    return kind, paths


def speech(corpora: Path, count: int) -> list[tuple[str, dict]]:
    """Take a seeded sample of nEMO."""
    chosen = random.Random(0).sample(list_nemo(corpora / "nemo"), count)
    return [(clip.utt_id, {"wav": str(clip.wav), "emo": clip.emo}) for clip in chosen]


def noise(folder: Path, count: int, seconds: tuple[float, float]) -> list[tuple[str, dict]]:
    """Write clips of white noise, the labels in turn."""
    rng, rows = np.random.default_rng(0), []
    for number in range(count):
        wav = folder / f"{number}.wav"
        soundfile.write(wav, 0.1 * rng.standard_normal(int(RATE * rng.uniform(*seconds))).clip(-3, 3), RATE)
        rows.append((f"noise-{number}", {"wav": str(wav), "emo": LABELS[number % len(LABELS)]}))
    return rows
