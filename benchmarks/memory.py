"""Resident memory while all batches of a store go through the loader, and of a store eight times its size.

The frames of the small store take 50 MB on disk, those of the large one 400 MB; both hold utterances of 25 frames of
384 values. A pass opens the store, makes the dataset, and reads every batch of 64 in random order; each is a process of
its own, forked from one that holds nothing but the imports, so none inherits what another left. Measured, right after a
garbage collection, is the greatest resident memory of the process.

`growth_mb` is how much more the large store's pass needs, of 350 MB more on disk (the index of utterances grows with
the store; its frames need not); `rss_ratio` is the larger pass over the smaller. Data: seeded noise.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
import tempfile
from pathlib import Path

import numpy as np
import psutil
import torch
from measure import Figure, ratio, take_turns
from speechbrain.dataio.dataloader import make_dataloader
from speechbrain.dataio.dataset import DynamicItemDataset

from speechbrain_mifuse.features.dataset import frame_batches
from speechbrain_mifuse.features.front import StoredFrames
from speechbrain_mifuse.features.store import ITEM, FeatureStore

FRAMES, DIM, LARGER = 25, 384, 8
ABOUT = {"layers": [1], "dim": DIM}
MB = 1e6


def run(quick: bool) -> tuple[str, dict[str, Figure]]:
    """Compare the two passes."""
    small, turns = (1 * MB, 1) if quick else (50 * MB, 3)
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / name for name in ("small", "large")}
        for folder, size in zip(folders.values(), (small, LARGER * small), strict=True):
            fill(folder, int(size / (FRAMES * DIM * ITEM)))
        passes = {name: functools.partial(in_own_process, folder) for name, folder in folders.items()}
        peaks = take_turns(passes, turns, "memory", warm_up=0)
    growth = [large - least for large, least in zip(peaks["large"], peaks["small"], strict=True)]
    figures = {
        "growth_mb": Figure("MB", growth),
        "rss_ratio": ratio(peaks["large"], peaks["small"]),
        **{f"{name}_rss_mb": Figure("MB", values) for name, values in peaks.items()},
    }
    return f"synthetic frames, {small / MB:.0f} and {LARGER * small / MB:.0f} MB", figures


def fill(folder: Path, utterances: int) -> None:
    """Write a store of noise."""
    rng, store = np.random.default_rng(0), FeatureStore(folder, ABOUT)
    block = rng.standard_normal((1, FRAMES, DIM), dtype=np.float32)
    with store.writer(flush_every=1000) as add:
        for number in range(utterances):
            add(f"noise-{number}", block + number % 7, audio="", file=(0, 0))


def in_own_process(folder: Path) -> float:
    """Give the peak of one pass, in MB."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(peak_of_pass(folder)))
    process.start()
    sender.close()
    peak = receiver.recv()
    process.join()
    return peak


def peak_of_pass(folder: Path) -> float:
    """Go through a store; the greatest resident memory, in MB."""
    torch.set_num_threads(1)  # as in a loader's worker: a forked process must not use its parent's threads
    front = StoredFrames(FeatureStore(folder, ABOUT), layer=1)
    dataset = DynamicItemDataset({key: {"wav": ""} for key in front.store.rows})
    dataset.add_dynamic_item(front.read, takes=["id", "wav"], provides="feats")
    dataset.set_output_keys(["id", "feats"])
    loader = make_dataloader(dataset, **frame_batches(batch_size=64, shuffle=True))
    process, peak = psutil.Process(), 0
    for number, _batch in enumerate(loader):
        if number % 8 == 0:
            gc.collect()
            peak = max(peak, process.memory_info().rss)
    return peak / MB
