"""A corpus of a million recordings: from the start of the process to the end of the first training step.

Measured in a process of its own, with everything prepared and every frame stored, as any run but the first finds it:
import the package, read the manifest, open the store, look at the recordings' files, make the dataset and the loader,
train one step. All rows of the manifest name one short recording, and all rows of the index the same frames: what is
measured is what the number of recordings costs, not their bytes. A disk that has a million files of its own to look at
adds its own time.

`first_step_s` and `rss_mb` (the greatest resident memory) are those of the whole process; `<part>_s` are its parts.
`growth_ratio` is the time per recording, imports left out, over that with a quarter of the recordings: 1 where each
costs the same, however many there are. `first_opening_s`: opening the store when nothing but its index is there, as
happens once after it was written by another process. Data: a synthetic manifest and index.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
from clips import LABELS, RATE
from measure import Figure, ratio

from speechbrain_mifuse.features.store import FeatureStore, index_line
from speechbrain_mifuse.utils.files import atomic_write, file_stamp

DIM, FRAMES, LAYER, TURNS = 64, 4, 1, 3
PARTS = ("imports", "stored", "dataset", "step")


def run(quick: bool) -> tuple[str, dict[str, Figure]]:
    """Measure with all recordings and with a quarter of them."""
    count, turns = (400, 0) if quick else (1_000_000, TURNS)
    with tempfile.TemporaryDirectory() as scratch:
        folders = {part: Path(scratch) / part for part in ("whole", "quarter")}
        for folder, size in zip(folders.values(), (count, count // 4), strict=True):
            write_corpus(folder, size)
        # The first of each opens a store that only has an index yet.
        found = {part: [measured(folder) for _ in range(1 + turns)] for part, folder in folders.items()}
    opening = found["whole"][0]["stored_s"]
    found = {part: told[1:] or told for part, told in found.items()}
    per_clip = {
        part: [(told["first_step_s"] - told["imports_s"]) / size for told in found[part]]
        for part, size in (("whole", count), ("quarter", count // 4))
    }
    units = {"first_step_s": "s", "rss_mb": "MB", **{f"{part}_s": "s" for part in PARTS}}
    figures = {name: Figure(unit, [told[name] for told in found["whole"]]) for name, unit in units.items()}
    figures["growth_ratio"] = ratio(per_clip["whole"], per_clip["quarter"])
    figures["first_opening_s"] = Figure("s", [opening])
    return f"{count} synthetic rows", figures


def write_corpus(folder: Path, count: int) -> None:
    """Write a recording, a manifest that names it `count` times, and a store with a row for each."""
    folder.mkdir()
    wav = folder / "clip.wav"
    soundfile.write(wav, np.zeros(RATE // 10), RATE)
    keys = [f"clip-{number:07d}" for number in range(count)]
    about = {"wav": "{data_root}/clip.wav", "length": 0.1}
    rows = {key: {**about, "emo": LABELS[n % 4], "speaker": f"s{n % 1000}"} for n, key in enumerate(keys)}
    atomic_write(folder / "corpus.json", json.dumps({"data_root": str(folder)}))
    for name in ("train", "train_unlabelled"):
        atomic_write(folder / f"{name}.json", json.dumps(rows, indent=1))
    store = FeatureStore(folder / "store", Reader().fingerprint())
    rng = np.random.default_rng(0)
    with store.writer() as add:
        add(keys[0], rng.standard_normal((1, FRAMES, DIM)), audio="", file=file_stamp(wav))
    row = store.rows[keys[0]]
    with (folder / "store" / "index.jsonl").open("ab") as index:
        index.writelines(index_line(key, row) for key in keys[1:])


class Reader:
    """Stands in the place of a `FrameReader`; nothing is left to encode."""

    def fingerprint(self) -> dict:
        return {"layers": [LAYER], "dim": DIM, "frame_average": 4}


def measured(folder: Path) -> dict[str, float]:
    """Run the first step in a process of its own; seconds of each part, and memory."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import million_step"
    start = ["-c", f"{code}; million_step.main({str(folder)!r}, {time.time()!r})"]
    told = subprocess.run([sys.executable, *start], check=True, capture_output=True, text=True).stdout
    return json.loads(told.splitlines()[-1])
