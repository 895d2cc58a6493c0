"""The process that `million.py` measures: no import stands above its clock."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path


def main(folder: str, start: float) -> None:
    """Train one step on the corpus in a folder and print seconds and memory, as JSON."""
    clock = {}

    def lap(part: str) -> None:
        clock[f"{part}_s"] = time.time() - start - sum(clock.values())

    from epoch import CHATTER, NEVER, Training
    from million import LAYER, Reader
    from speechbrain import Stage

    from speechbrain_mifuse.features.extract import extract
    from speechbrain_mifuse.features.front import StoredFrames
    from speechbrain_mifuse.utils.progress import quiet

    lap("imports")
    corpus = Path(folder)
    with quiet(*CHATTER):
        front = StoredFrames(extract([corpus / "train_unlabelled.json"], Reader(), corpus / "store"), LAYER)
        lap("stored")
        run = Training(corpus / f"run{start}", front, corpus / "train.json", 64, 1, NEVER)
        loader = run.brain.make_dataloader(run.dataset, Stage.TRAIN, **run.loader)
        lap("dataset")
        run.brain.on_fit_start()
        run.brain.on_stage_start(Stage.TRAIN, 1)
        run.brain.modules.train()
        run.brain.fit_batch(next(iter(loader)))
        lap("step")
    # Kilobytes, but bytes on a Mac.
    scale = 1e6 if sys.platform == "darwin" else 1e3
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
    print(json.dumps({**clock, "first_step_s": sum(clock.values()), "rss_mb": peak}))
