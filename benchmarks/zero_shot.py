"""Scoring 10,000 recordings against 8 classes of 3 prompts, from stored frames, against doing it one at a time.

- Scored: `class_vectors` once, then `zero_shot_scores` over the store, 256 recordings at a time.
- One at a time: the text encoder's vectors are made once too, but every recording is scored alone.
- Texts every time: each recording is scored alone, with its prompts embedded anew, as a call of a model with audio and
  texts does. Measured on a hundredth of the recordings, and told per recording.

`score_s` is the whole time of the first, without loading the text encoder. Frames: seeded noise of the size of
Whisper tiny.en's, 44 of 80 ms for each recording; dual encoder with random weights, text encoder MiniLM (`[demo]`
extra) or, with `--quick`, random vectors.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measure import Figure, ratio, take_turns
from torch.nn import functional as F

from speechbrain_mifuse.features.store import FeatureStore
from speechbrain_mifuse.features.text_encoder import FrozenTextEncoder
from speechbrain_mifuse.nnet.dual_encoder import DualEncoder
from speechbrain_mifuse.zero_shot.own_dual_encoder import DualEncoderModel, toy_about
from speechbrain_mifuse.zero_shot.prompts import read_prompts
from speechbrain_mifuse.zero_shot.scorer import class_vectors, zero_shot_scores

PROMPTS = Path(__file__).resolve().parent.parent / "hparams" / "prompts" / "english.yaml"
LABELS = ["angry", "calm", "disgust", "fearful", "happy", "neutral", "sad", "surprised"]
FRAMES, DIM, TEXT_DIM = 44, 384, 384
# Of how many recordings one is scored with its texts embedded anew.
SHARE = 100


def run(quick: bool) -> tuple[str, dict[str, Figure]]:
    """Compare the three."""
    count, turns = (200, 1) if quick else (10_000, 5)
    with tempfile.TemporaryDirectory() as scratch:
        store = filled(Path(scratch), count)
        model, prompts, keys = make_model(quick), read_prompts(PROMPTS), list(store.rows)

        def scored() -> float:
            return timed(lambda: zero_shot_scores(model, store, keys, class_vectors(model, prompts, LABELS, 1)))

        def one_at_a_time() -> float:
            classes = class_vectors(model, prompts, LABELS, 1)
            return timed(lambda: [zero_shot_scores(model, store, [key], classes) for key in keys])

        def texts_every_time() -> float:
            few = keys[::SHARE]
            took = timed(
                lambda: [zero_shot_scores(model, store, [key], class_vectors(model, prompts, LABELS, 1)) for key in few]
            )
            return took * len(keys) / len(few)

        passes = {"scored": scored, "one": one_at_a_time, "texts": texts_every_time}
        times = take_turns(passes, turns, "zero_shot", warm_up=1)
    figures = {
        "score_s": Figure("s", times["scored"]),
        "one_at_a_time_ratio": ratio(times["one"], times["scored"]),
        "texts_every_time_ratio": ratio(times["texts"], times["scored"]),
    }
    return f"{count} recordings of {FRAMES} synthetic frames of {DIM} values, {len(LABELS)} classes", figures


def filled(folder: Path, count: int) -> FeatureStore:
    """Write a store of noise with the layer that the toy dual encoder reads."""
    rng = np.random.default_rng(0)
    store = FeatureStore(folder, {"layers": [2], "dim": DIM})
    block = rng.standard_normal((1, FRAMES, DIM), dtype=np.float32)
    with store.writer(flush_every=1000) as add:
        for number in range(count):
            add(f"noise-{number}", block + number % 7, audio="", file=(0, 0))
    return store


class RandomTexts:
    """Random vectors in the place of a text encoder, for `--quick`."""

    def __call__(self, texts):
        return F.normalize(torch.randn(len(texts), TEXT_DIM), dim=-1)


def make_model(quick: bool) -> DualEncoderModel:
    """Build a dual encoder with random projections."""
    about = toy_about()
    about["text_encoder"] = {**about["text_encoder"], "max_tokens": 256}
    about["classes_known"] = LABELS
    texts = RandomTexts() if quick else FrozenTextEncoder("demo")
    return DualEncoderModel(DualEncoder(DIM, TEXT_DIM), about, texts)


def timed(work) -> float:
    """Seconds that something takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
