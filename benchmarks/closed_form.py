"""The closed form of mi_fuse_plus, against the student, on one adaptation set.

Both sides are the recipe's `adapt`, from stored frames to the predictions of the test set: 400 utterances of 15 to 35
frames of 384 values to adapt, 64 to test, five stored answers of the language model for each.

- Closed form: target statistics, ten rounds of the geometry expert, one discriminant.
- Student: 300 steps of 64 utterances, with G fitted anew 30 times.

`student_ratio` is the time of the second over that of the first. Data: seeded noise; no corpus is needed.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from hyperpyyaml import load_hyperpyyaml
from measure import Figure, ratio, take_turns
from mifuse_step import ANSWERS, DIM, LABELS, LEAST_FRAMES, MOST_FRAMES
from speechbrain.dataio.dataset import DynamicItemDataset

from speechbrain_mifuse.experiments.recipes import load_recipe
from speechbrain_mifuse.features.front import StoredFrames
from speechbrain_mifuse.features.store import FeatureStore
from speechbrain_mifuse.inference.recognizer_folder import export_recogniser
from speechbrain_mifuse.nnet.classifier import EmotionClassifier

YAML = Path(__file__).resolve().parent.parent / "hparams" / "base" / "adaptation.yaml"
ADAPT, TEST = 400, 64


def run(quick: bool) -> tuple[str, dict[str, Figure]]:
    """Compare both."""
    adapt, steps, turns = (80, 2, 2) if quick else (ADAPT, 300, 5)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        front = StoredFrames(noise_store(folder / "store", adapt + TEST), layer=1)
        source = folder / "source"
        torch.manual_seed(0)
        about = {"labels": LABELS, "features": front.store.fingerprint}
        settings = {"labels": list(LABELS), "encoder": "noise", "trim_db": 40.0}
        export_recogniser(source, EmotionClassifier(DIM, len(LABELS)), front, settings, about)
        datasets = {"adapt": answered(front, 0, adapt), "test": answered(front, adapt, adapt + TEST)}
        names = {"closed_form": "g_closed_form", "student": "mi_fuse_plus"}
        sides = {side: adapting(name, folder / side, steps, datasets, front, source) for side, name in names.items()}
        times = take_turns(sides, turns, "closed_form")
    figures = {f"{side}_s": Figure("s", values) for side, values in times.items()}
    data = f"{adapt} utterances to adapt, {TEST} to test, frames of {DIM} values, synthetic"
    return data, {"student_ratio": ratio(times["student"], times["closed_form"]), **figures}


def noise_store(folder: Path, utterances: int) -> FeatureStore:
    """Store frames of noise for each utterance."""
    rng, store = np.random.default_rng(0), FeatureStore(folder, {"layers": [1], "dim": DIM})
    with store.writer() as add:
        for number in range(utterances):
            shape = (1, int(rng.integers(LEAST_FRAMES, MOST_FRAMES, endpoint=True)), DIM)
            add(f"noise-{number}", rng.standard_normal(shape), audio="", file=(0, 0))
    return store


def answered(front: StoredFrames, first: int, end: int) -> DynamicItemDataset:
    """Stored frames with answers of a language model."""
    generator = torch.Generator().manual_seed(first)
    rows = {}
    for number in range(first, end):
        answers = (2 * torch.randn(ANSWERS, len(LABELS), generator=generator)).softmax(-1)
        mask = torch.ones(ANSWERS, dtype=torch.bool)
        rows[f"noise-{number}"] = {"wav": "", "lalm": answers, "lalm_mask": mask}
    dataset = DynamicItemDataset(rows)
    dataset.add_dynamic_item(front.read, takes=["id", "wav"], provides="feats")
    dataset.set_output_keys(["id", "feats", "lalm", "lalm_mask"])
    return dataset


def adapting(name: str, folder: Path, steps: int, datasets: dict, front, source: Path) -> Callable[[], float]:
    """Ready a method; the function runs it in a fresh folder and gives seconds."""
    recipe, turns = load_recipe("recipes/RAVDESS/mifuse/train.py"), itertools.count()

    def adapt() -> float:
        known = {"seed": 1, "labels": list(LABELS), "output_folder": str(folder / str(next(turns))), "layer": 1}
        with YAML.open(encoding="utf-8") as file:
            settings = load_hyperpyyaml(file, {**known, "number_of_steps": steps})
        start = time.perf_counter()
        recipe.adapt(name, settings, datasets, front, source)
        return time.perf_counter() - start

    return adapt
