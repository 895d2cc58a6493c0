"""One training step of MI-Fuse, against a supervised step of the same classifier on the same batch.

Both sides are a Brain's `fit_batch` on one batch of 64 utterances with about 25 stored frames of 384 values.

- MI-Fuse: `AdaptationBrain` with its EMA teacher (K_S = 16 dropout passes), five stored answers of the language model
  per utterance, fusion, the student's forward and backward pass, the optimiser, the EMA update.
- Supervised: `ClassifierBrain`: forward and backward pass, the optimiser.

`step_ratio` is the time of the first over that of the second. Data: seeded noise; no corpus is needed.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import speechbrain as sb
import torch
from measure import Figure, ratio, take_turns
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.epoch_loop import EpochCounter
from speechbrain.utils.train_logger import FileTrainLogger

from speechbrain_mifuse.adaptation.fusion import exponential_weight
from speechbrain_mifuse.adaptation.mi_fuse import MIFuse
from speechbrain_mifuse.experiments.recipes import load_recipe
from speechbrain_mifuse.features.dataset import frame_batches
from speechbrain_mifuse.features.front import StoredFrames
from speechbrain_mifuse.features.store import FeatureStore
from speechbrain_mifuse.nnet.classifier import EmotionClassifier

LABELS = ("angry", "happy", "neutral", "sad")
UTTERANCES, LEAST_FRAMES, MOST_FRAMES, DIM = 64, 15, 35, 384
PASSES, ANSWERS = 16, 5


def run(quick: bool) -> tuple[str, dict[str, Figure]]:
    """Compare the two steps."""
    steps, turns = (2, 2) if quick else (20, 25)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        front = StoredFrames(noise_store(folder / "store"), layer=1)
        dataset = labelled_and_answered(front)
        loader = sb.dataio.dataloader.make_dataloader(dataset, **frame_batches(batch_size=UTTERANCES))
        batch = next(iter(loader))
        sides = {
            "mifuse": fitting(adaptation_brain(folder), batch, steps),
            "supervised": fitting(classifier_brain(folder, front, dataset), batch, steps),
        }
        times = take_turns(sides, turns, "mifuse_step")
    figures = {f"{side}_ms": Figure("ms", values) for side, values in times.items()}
    frames = batch.feats.data.shape[1]
    data = f"{UTTERANCES} utterances of {LEAST_FRAMES} to {frames} frames of {DIM} values, synthetic"
    return data, {"step_ratio": ratio(times["mifuse"], times["supervised"]), **figures}


def noise_store(folder: Path) -> FeatureStore:
    """Store frames of noise for each utterance."""
    rng, store = np.random.default_rng(0), FeatureStore(folder, {"layers": [1], "dim": DIM})
    with store.writer() as add:
        for number in range(UTTERANCES):
            shape = (1, int(rng.integers(LEAST_FRAMES, MOST_FRAMES, endpoint=True)), DIM)
            add(f"noise-{number}", rng.standard_normal(shape), audio="", file=(0, 0))
    return store


def labelled_and_answered(front: StoredFrames) -> DynamicItemDataset:
    """What both Brains read: labels for the one, answers for the other."""
    generator = torch.Generator().manual_seed(0)
    rows = {}
    for number, key in enumerate(front.store.rows):
        answers = (2 * torch.randn(ANSWERS, len(LABELS), generator=generator)).softmax(-1)
        answered = torch.ones(ANSWERS, dtype=torch.bool)
        rows[key] = {"wav": "", "label": number % len(LABELS), "lalm": answers, "lalm_mask": answered}
    dataset = DynamicItemDataset(rows)
    dataset.add_dynamic_item(front.read, takes=["id", "wav"], provides="feats")
    dataset.set_output_keys(["id", "feats", "label", "lalm", "lalm_mask"])
    return dataset


def settings(folder: Path) -> dict:
    """Give both Brains the recipes' defaults."""
    folder.mkdir()
    return {
        "seed": 0,
        "labels": LABELS,
        "output_folder": folder,
        "class_balanced": True,
        "opt_class": functools.partial(torch.optim.AdamW, lr=0.0005, weight_decay=0.01),
        "epoch_counter": EpochCounter(1),
        "log_interval": 1,
        "train_logger": FileTrainLogger(folder / "train_log.txt"),
        "batch_size": UTTERANCES,
        "number_of_steps": 300,
        "ema_window": 0.5,
        "passes": PASSES,
    }


def model() -> EmotionClassifier:
    """Build the classifier that both sides train."""
    torch.manual_seed(0)
    return EmotionClassifier(DIM, len(LABELS))


def adaptation_brain(folder: Path) -> sb.Brain:
    """Set MI-Fuse up as the recipes do."""
    method = MIFuse(weight=functools.partial(exponential_weight, temperature=0.2))
    own = folder / "mifuse"
    recipe = load_recipe("recipes/RAVDESS/mifuse/train.py")
    return recipe.make_brain(settings(own), method, model(), UTTERANCES, own)


def classifier_brain(folder: Path, front: StoredFrames, dataset: DynamicItemDataset) -> sb.Brain:
    """Set the source classifier's training up as the recipes do."""
    recipe = load_recipe("recipes/RAVDESS/classifier/train.py")
    return recipe.make_brain(settings(folder / "supervised"), front, model(), dataset)


def fitting(brain: sb.Brain, batch, steps: int) -> Callable[[], float]:
    """Ready a Brain for its first epoch; the function trains some steps and gives milliseconds per step."""
    brain.on_fit_start()
    brain.on_stage_start(sb.Stage.TRAIN, epoch=1)
    brain.modules.train()

    def fit() -> float:
        start = time.perf_counter()
        for _ in range(steps):
            brain.fit_batch(batch)
        return 1000 * (time.perf_counter() - start) / steps

    return fit
