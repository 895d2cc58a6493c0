"""One epoch of the source classifier on stored frames, against the same encoder run, frozen, in every epoch.

Compared are clips per second of whole training epochs: loading, forward and backward pass, optimiser, and all that
SpeechBrain's Brain does around them. Both sides have the same Brain (`ClassifierBrain`), classifier, optimiser, batch
size and recordings, trimmed alike.

- Stored: `StoredFrames` on a store that is filled already (so: every epoch but the first), with the recipes' four
  frames averaged to one, and as a second figure (`unaveraged`) with every frame. A checkpoint every five epochs, as in
  the recipes, is part of it. What the first epoch pays, `extraction_clips_per_second` tells: the encoder alone, at true
  length, on all cores. `extraction_ratio` takes that, in place of the frozen side, for what is saved in later epochs.
- Frozen: a recording is read in the loader's pipeline, clips are padded to a batch, the encoder runs without gradients
  in every step, pooling and classifier follow. No checkpoint is written.
  `hubert_base`: SpeechBrain's own wrapper with `freeze=True` among the Brain's modules, on the padded batch, as in its
  recipes; the model has HuBERT-base's size and random weights. Batches of 32; the stored side goes through 128 clips,
  the frozen one, as it is slow, through the first 32 of them.
  `whisper_tiny`: the demo encoder at each clip's true length and no deeper than the layer that is used. This is kinder
  than SpeechBrain's wrapper, which pads every clip to 30 s: its speed on four clips, without any training, is
  `whisper_tiny_wrapper_clips_per_second`. Batches of 64; both sides go through 256 clips.

Data: a random sample of nEMO if `MIFUSE_CORPORA` is set, else noise of 1 to 3 s.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from clips import LABELS, write_manifests
from measure import Figure, ratio, take_turns
from speechbrain.utils.data_utils import batch_pad_right
from speechbrain.utils.epoch_loop import EpochCounter
from speechbrain.utils.train_logger import FileTrainLogger

from speechbrain_mifuse.brains.training import EVERY_EPOCH
from speechbrain_mifuse.corpora.manifest import read_manifest
from speechbrain_mifuse.experiments.features import EncoderSettings, open_reader
from speechbrain_mifuse.experiments.recipes import load_recipe
from speechbrain_mifuse.features.dataset import frame_batches, pad_frames
from speechbrain_mifuse.features.encoder import load_wrapper
from speechbrain_mifuse.features.extract import average_frames, extract
from speechbrain_mifuse.features.front import StoredFrames
from speechbrain_mifuse.features.store import FeatureStore
from speechbrain_mifuse.nnet.classifier import EmotionClassifier
from speechbrain_mifuse.utils.audio import load_audio, trim_silence
from speechbrain_mifuse.utils.progress import quiet

TRIM_DB, FRAME_AVERAGE, CHECKPOINT_EVERY = 40.0, 4, 5  # the recipes' defaults
NEVER = 10**9  # epochs
# SpeechBrain's loggers that tell of each epoch, checkpoint and loaded model, and ours of each fit.
CHATTER = (*EVERY_EPOCH, "speechbrain.integrations", "speechbrain_mifuse.brains")


def run(quick: bool) -> tuple[str, dict[str, Figure]]:
    """Compare for both encoders."""
    settings, seconds = (QUICK, (0.2, 0.4)) if quick else (FULL, (1.0, 3.0))
    figures = {}
    with tempfile.TemporaryDirectory() as scratch:
        counts = {count for setting in settings.values() for count in (setting.stored_clips, setting.frozen_clips)}
        kind, manifests = write_manifests(Path(scratch), counts, seconds)
        for name, setting in settings.items():
            folder = Path(scratch) / name
            folder.mkdir()
            torch.manual_seed(0)
            source = setting.source(folder / "encoder")
            figures |= compared(name, setting, source, manifests, folder)
        figures |= wrapper_speed(name, source, manifests[setting.stored_clips])
    return f"{max(counts)} clips of {kind}", figures


class Setting(NamedTuple):
    """An encoder, how it runs when frozen, and how much is measured with it."""

    source: Callable[[Path], str]  # saves it into a folder, or names it
    layer: int
    frozen: type[EveryEpoch]
    stored_clips: int
    frozen_clips: int  # the first of the stored ones
    batch: int
    epochs: int  # of the stored side in a turn; the frozen side has one
    turns: int


def compared(name: str, setting: Setting, source: str, manifests: dict, folder: Path) -> dict[str, Figure]:
    """Fill the stores, let the sides take turns, and name the figures."""
    everything = manifests[setting.stored_clips]
    preprocessing = {"trim_db": TRIM_DB, "frame_average": 1}
    reader = open_reader(EncoderSettings(source, [setting.layer], **preprocessing))
    start = time.perf_counter()
    every_frame = extract([everything], reader, folder / "every_frame")
    extraction = len(every_frame.rows) / (time.perf_counter() - start)
    averaged = average_store(every_frame, reader, folder / "averaged")

    layer, often = every_frame.layers[0], {"epochs": setting.epochs, "checkpoint_every": CHECKPOINT_EVERY}
    frozen = setting.frozen(reader.encoder, source)
    once = {"epochs": 1, "checkpoint_every": NEVER}
    train = functools.partial(Training, batch=setting.batch)
    sides = {
        "stored": train(folder / "1", StoredFrames(averaged, layer), everything, **often),
        "frozen": train(folder / "2", frozen, manifests[setting.frozen_clips], **once),
        "unaveraged": train(folder / "3", StoredFrames(every_frame, layer), everything, **often),
    }
    speeds = take_turns(sides, setting.turns, name)
    return {
        f"{name}_ratio": ratio(speeds["stored"], speeds["frozen"]),
        f"{name}_unaveraged_ratio": ratio(speeds["unaveraged"], speeds["frozen"]),
        f"{name}_extraction_ratio": ratio(speeds["stored"], [extraction] * setting.turns),
        **{f"{name}_{side}_clips_per_second": Figure("clips/s", values) for side, values in speeds.items()},
        f"{name}_extraction_clips_per_second": Figure("clips/s", [extraction]),
    }


def average_store(store, reader, folder: Path):
    """Copy a store with its frames averaged, as extraction would have stored them."""
    reader.frame_average = FRAME_AVERAGE
    averaged = FeatureStore(folder, reader.fingerprint())
    with averaged.writer() as add:
        for key, row in store.rows.items():
            frames = average_frames(torch.from_numpy(store.frames(key)).float(), FRAME_AVERAGE)
            add(key, frames.numpy(), row.audio, row.file)
    return averaged


class Training:
    """A classifier on some clips; each call trains on for some epochs and gives clips per second."""

    def __init__(self, folder: Path, front, manifest: Path, batch: int, epochs: int, checkpoint_every: int):
        torch.manual_seed(0)
        folder.mkdir()
        self.epochs, self.counter, self.seconds = epochs, EpochCounter(NEVER), 0.0
        hparams = {
            "seed": 0,
            "labels": LABELS,
            "train_manifest": manifest,
            "valid_manifest": manifest,
            "output_folder": folder,
            "class_balanced": True,
            "opt_class": functools.partial(torch.optim.AdamW, lr=0.0005, weight_decay=0.01),
            "epoch_counter": self.counter,
            "log_interval": checkpoint_every,
            "train_logger": FileTrainLogger(folder / "train_log.txt"),
        }
        recipe = load_recipe("recipes/RAVDESS/classifier/train.py")
        self.dataset = recipe.dataio_prepare(hparams, front)["train"]
        self.brain = recipe.make_brain(hparams, front, EmotionClassifier(front.dim, len(LABELS)), self.dataset)
        self.loader = frame_batches(batch_size=batch, shuffle=True, drop_last=True)
        self.clips = len(self.dataset) // batch * batch

    def __call__(self) -> float:
        self.seconds = 0.0
        with quiet(*CHATTER):
            self.brain.fit(self.timed(), self.dataset, train_loader_kwargs=self.loader)
        return self.epochs * self.clips / self.seconds

    def timed(self) -> Iterator[int]:
        """Number the epochs, and time each from when it begins until the next is asked for."""
        for epoch in itertools.islice(self.counter, self.epochs):
            start = time.perf_counter()
            yield epoch
            self.seconds += time.perf_counter() - start


class EveryEpoch(torch.nn.Module):
    """In place of `StoredFrames`: clips are read in the loader's pipeline and encoded in every step."""

    n_layers = 1
    store = None

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.dim = encoder, encoder.dim

    def read(self, utt_id: str, wav: str) -> torch.Tensor:
        return trimmed(wav)


class FrozenWrapper(EveryEpoch):
    """SpeechBrain's wrapper, on the padded batch."""

    def __init__(self, encoder, source: str):
        super().__init__(encoder)
        self.wrapper = load_wrapper(source, freeze=True)

    def forward(self, batch: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.wrapper(batch, lengths), lengths


class FrozenTrueLength(EveryEpoch):
    """The project's encoder, on each clip alone."""

    def __init__(self, encoder, source: str):
        super().__init__(encoder)

    def forward(self, batch: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        samples = (lengths * batch.shape[1]).round().long().tolist()
        waves = [wave[:count] for wave, count in zip(batch, samples, strict=True)]
        return pad_frames(self.encoder.encode_batch(waves))


def trimmed(wav: str) -> torch.Tensor:
    """Read a recording as it was read for the store."""
    return trim_silence(load_audio(wav), TRIM_DB)


@torch.no_grad()
def wrapper_speed(name: str, source: str, manifest: Path, clips: int = 4) -> dict[str, Figure]:
    """Time SpeechBrain's wrapper on a few clips."""
    wrapper = load_wrapper(source, freeze=True).eval()
    rows = list(read_manifest(manifest).values())[:clips]
    batch, lengths = batch_pad_right([trimmed(row["wav"]) for row in rows])

    def speed() -> float:
        start = time.perf_counter()
        wrapper(batch, lengths)
        return clips / (time.perf_counter() - start)

    speeds = take_turns({"wrapper": speed}, 2, f"{name}, padded to 30 s")
    return {f"{name}_wrapper_clips_per_second": Figure("clips/s", speeds["wrapper"])}


def random_hubert(folder: Path, **sizes) -> str:
    """Save a HuBERT of random weights, by default of HuBERT-base's size."""
    transformers.HubertModel(transformers.HubertConfig(**sizes)).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(folder)
    return str(folder)


def random_whisper(folder: Path, **sizes) -> str:
    """Save a Whisper of random weights with next to no decoder."""
    ends = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)
    ends |= {"suppress_tokens": [], "begin_suppress_tokens": []}
    decoder = {"decoder_layers": 0, "vocab_size": 8, "max_target_positions": 1, **ends}
    transformers.WhisperModel(transformers.WhisperConfig(**decoder, **sizes)).save_pretrained(folder)
    transformers.WhisperFeatureExtractor().save_pretrained(folder)
    return str(folder)


def demo(folder: Path) -> str:
    """Name the demo encoder, which is saved already."""
    return "demo"


TINY = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
TINY |= {"conv_dim": (8,) * 7, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
TINY_WHISPER = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
FULL = {
    "hubert_base": Setting(random_hubert, -1, FrozenWrapper, 128, 32, 32, epochs=10, turns=3),
    "whisper_tiny": Setting(demo, 2, FrozenTrueLength, 256, 256, 64, epochs=10, turns=5),
}
QUICK = {
    "hubert_base": Setting(functools.partial(random_hubert, **TINY), -1, FrozenWrapper, 8, 4, 4, epochs=2, turns=1),
    "whisper_tiny": Setting(
        functools.partial(random_whisper, **TINY_WHISPER), 2, FrozenTrueLength, 8, 8, 4, epochs=2, turns=1
    ),
}
