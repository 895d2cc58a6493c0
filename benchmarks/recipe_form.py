"""A whole training of the classifier on stored frames, against the usual forms of a SpeechBrain recipe.

All sides train the same Brain in the form of SpeechBrain's IEMOCAP recipe for wav2vec 2.0 (mean over time, one linear
layer) from the same weights, on the same encoder layer, recordings, batch size, epochs and shuffling, and score
held-out speakers after every epoch; no checkpoint is written. A side's total is everything from the first recording
that is read to the last epoch.

- `stored`: frames are extracted into a feature store, then read from it; four frames averaged to one, as in the
  recipes. `stored_unaveraged` keeps every frame.
- `recipe`: recordings are read in the loader's pipeline by SpeechBrain's `read_audio`, clips are padded to a batch, the
  frozen encoder runs in every step. It runs on each clip's true length and no deeper than the layer used, as ours does
  and as SpeechBrain's wrapper does not: that one pads every clip to 30 s, and its clips per second, without any
  training, are `wrapper_clips_per_second`.
- `hdf5`: SpeechBrain's `CachedHDF5DynamicItem` keeps each clip's frames, float32, from the first epoch on. It needs
  h5py (the `[bench]` extra); without that it is left out.

`recipe_total_ratio`, `hdf5_total_ratio`: total of that side over total of `stored`. `recipe_epoch_ratio`,
`hdf5_epoch_ratio`: the same for an epoch (the median of all but the first). `<side>_loss`, `<side>_accuracy`: of the
held-out speakers after the last epoch; `<side>_rss_mb`: greatest resident memory while the side runs, in the one
process in which all do. Encoder: Whisper tiny.en's to layer 2 (the `[demo]` extra). Data: EmoDB, 2 s, seven classes,
eight speakers to train on and two to score, if `MIFUSE_CORPORA` is set, else noise of 1 to 3 s.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import itertools
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
import speechbrain as sb
import torch
from clips import LABELS, noise
from epoch import TINY_WHISPER, TRIM_DB, demo, random_whisper, wrapper_speed
from measure import Figure, ratio, take_turns
from speechbrain.dataio.dataio import read_audio
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.nnet.pooling import StatisticsPooling
from speechbrain.utils.data_pipeline import DynamicItem

from speechbrain_mifuse.corpora.emodb import SEVEN_CLASSES, SPEAKERS, list_emodb
from speechbrain_mifuse.corpora.manifest import read_manifest, unlabelled
from speechbrain_mifuse.experiments.features import EncoderSettings, open_reader
from speechbrain_mifuse.features.dataset import frame_batches, pad_frames
from speechbrain_mifuse.features.extract import FrameReader, extract
from speechbrain_mifuse.features.front import StoredFrames
from speechbrain_mifuse.utils.audio import trim_silence
from speechbrain_mifuse.utils.files import atomic_write
from speechbrain_mifuse.utils.progress import quiet

LAYER, LEARNING_RATE, HELD_OUT = 2, 0.01, SPEAKERS[-2:]
EMOTIONS = tuple(sorted(filter(None, SEVEN_CLASSES.values())))
SPLITS = ("train", "valid")
CHATTER = ("speechbrain.utils", "speechbrain_mifuse.features", "speechbrain.integrations", "speechbrain.core")


class Setting(NamedTuple):
    """How much is measured."""

    encoder: Callable[[Path], str]
    epochs: int
    batch: int
    turns: int
    clips: int  # of noise


FULL = Setting(demo, 20, 32, 1, 400)
QUICK = Setting(functools.partial(random_whisper, **TINY_WHISPER), 2, 4, 1, 12)


def run(quick: bool) -> tuple[str, dict[str, Figure]]:
    """Train on every side and compare."""
    setting = QUICK if quick else FULL
    with tempfile.TemporaryDirectory() as scratch, quiet(*CHATTER):
        folder = Path(scratch)
        kind, classes = write_split(folder, setting.clips, (0.2, 0.4) if quick else (1.0, 3.0))
        encoder = setting.encoder(folder / "encoder")
        sides = {name: Side(name, make, encoder, classes, folder, setting) for name, make in known_sides().items()}
        take_turns(sides, setting.turns, "recipe_form", warm_up=0)
        wrapper = wrapper_speed("", encoder, folder / "train.json")
    found = {name: side.found for name, side in sides.items()}
    left_out = "" if "hdf5" in sides else "; without hdf5, which needs h5py"
    about = f"{setting.epochs} epochs of {kind}, batches of {setting.batch}{left_out}"
    return about, {**compared(found), **{name.lstrip("_"): figure for name, figure in wrapper.items()}}


def compared(found: dict[str, dict[str, list[float]]]) -> dict[str, Figure]:
    """Name the figures: ratios to the stored side, then what each side's turns gave."""
    others = [name for name in found if not name.startswith("stored")]
    ratios = {
        f"{name}_{part}_ratio": ratio(found[name][part], found["stored"][part])
        for name in others
        for part in ("total", "epoch")
    }
    told = {
        f"{name}_{key}": Figure(unit, side[part])
        for name, side in found.items()
        for part, key, unit in (
            ("total", "total_s", "s"),
            ("epoch", "epoch_s", "s"),
            ("loss", "loss", "nats"),
            ("accuracy", "accuracy", "share"),
            ("rss", "rss_mb", "MB"),
        )
    }
    return ratios | told


def known_sides() -> dict[str, Callable]:
    """Maker of the datasets and the front of each side, the light ones first."""
    sides = {"stored": stored, "stored_unaveraged": functools.partial(stored, frame_average=1)}
    if importlib.util.find_spec("h5py"):
        sides["hdf5"] = hdf5
    return sides | {"recipe": every_epoch}


class Side:
    """One way to train; each call trains anew from the recordings on, and what it found is added to `found`."""

    def __init__(self, name: str, make: Callable, encoder: str, classes: tuple, folder: Path, setting: Setting):
        self.name, self.make, self.classes, self.folder, self.setting = name, make, classes, folder, setting
        self.open_reader = functools.partial(open_reader, EncoderSettings(encoder, [LAYER], **READING))
        self.found: dict[str, list[float]] = {key: [] for key in ("total", "epoch", "loss", "accuracy", "rss")}

    def __call__(self) -> float:
        gc.collect()
        reader = self.open_reader()
        own = Path(tempfile.mkdtemp(dir=self.folder, prefix=self.name))
        torch.manual_seed(0)
        with GreatestMemory() as memory:
            start = time.perf_counter()
            datasets, front = self.make(self.folder, own, reader, self.classes)
            brain = EmotionBrain(front, reader.encoder.dim, len(self.classes))
            train, valid = (frame_batches(batch_size=self.setting.batch, shuffle=shuffle) for shuffle in (True, False))
            epochs = range(1, self.setting.epochs + 1)
            brain.fit(epochs, *datasets, train_loader_kwargs=train, valid_loader_kwargs=valid)
            total = time.perf_counter() - start
        later = [b - a for a, b in itertools.pairwise(brain.ends)]
        values = {"total": total, "epoch": statistics.median(later), "rss": memory.megabytes, **brain.scored}
        for key, value in values.items():
            self.found[key].append(value)
        return total


READING = {"trim_db": TRIM_DB, "frame_average": 4}


def stored(folder: Path, own: Path, reader: FrameReader, classes: tuple, frame_average: int = 4):
    """Extract first, then read from the store."""
    reader.frame_average = frame_average
    store = extract([unlabelled(folder / f"{split}.json") for split in SPLITS], reader, own)
    front = StoredFrames(store, LAYER)
    return datasets_of(folder, DynamicItem(["id", "wav"], front.read, ["feats"]), classes), front


def hdf5(folder: Path, own: Path, reader: FrameReader, classes: tuple):
    """Encode in the loader's pipeline, which keeps each clip's frames in an HDF5 file."""
    from speechbrain.integrations.hdf5.cached_item import CachedHDF5DynamicItem

    def frames(utt_id: str, wav: str):
        return reader.encoder(trimmed(wav)).numpy()

    item = DynamicItem(["id", "wav"], frames, ["feats"])
    cached = CachedHDF5DynamicItem.cache(own)(item)
    as_tensor = DynamicItem(["id", "wav"], lambda *given: torch.as_tensor(cached(*given)), ["feats"])
    return datasets_of(folder, as_tensor, classes), AsRead()


def every_epoch(folder: Path, own: Path, reader: FrameReader, classes: tuple):
    """Read waveforms in the loader's pipeline and encode them in every step."""
    item = DynamicItem(["id", "wav"], lambda utt_id, wav: trimmed(wav), ["feats"])
    return datasets_of(folder, item, classes), Encoded(reader.encoder)


def trimmed(wav: str) -> torch.Tensor:
    """Read a recording as a SpeechBrain recipe does, and cut its silence as ours does."""
    return trim_silence(read_audio(wav), TRIM_DB)


class AsRead(torch.nn.Module):
    """Hands a padded batch on."""

    def forward(self, batch: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return batch, lengths


class Encoded(torch.nn.Module):
    """The encoder, run on a padded batch of waveforms, each at its true length."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, batch: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        samples = (lengths * batch.shape[1]).round().long().tolist()
        return pad_frames(self.encoder.encode_batch([w[:n] for w, n in zip(batch, samples, strict=True)]))


def datasets_of(folder: Path, item: DynamicItem, classes: tuple) -> list[DynamicItemDataset]:
    """Make training and validation set of `feats` and `label`."""
    datasets = []
    for split in SPLITS:
        rows = read_manifest(folder / f"{split}.json")
        data = {key: {"wav": row["wav"], "label": classes.index(row["emo"])} for key, row in rows.items()}
        datasets.append(DynamicItemDataset(data, [item], ["id", "feats", "label"]))
    return datasets


class EmotionBrain(sb.Brain):
    """Mean over time and one linear layer behind a front."""

    def __init__(self, front: torch.nn.Module, dim: int, n_classes: int):
        modules = {
            "front": front,
            "pool": StatisticsPooling(return_std=False),
            "output": torch.nn.Linear(dim, n_classes),
        }
        super().__init__(
            modules, functools.partial(torch.optim.Adam, lr=LEARNING_RATE), run_opts={"noprogressbar": True}
        )
        self.ends, self.scored, self.right = [], {}, []

    def compute_forward(self, batch, stage):
        frames, lengths = self.modules.front(*batch.feats)
        return self.modules.output(self.modules.pool(frames, lengths).squeeze(1)).log_softmax(-1)

    def compute_objectives(self, predictions, batch, stage):
        if stage != sb.Stage.TRAIN:
            self.right += (predictions.argmax(-1) == batch.label).tolist()
        return torch.nn.functional.nll_loss(predictions, batch.label)

    def on_stage_start(self, stage, epoch=None):
        if stage == sb.Stage.TRAIN:
            torch.manual_seed(epoch)
        self.right = []

    def on_stage_end(self, stage, stage_loss, epoch=None):
        if stage == sb.Stage.VALID:
            self.ends.append(time.perf_counter())
            self.scored = {"loss": float(stage_loss), "accuracy": sum(self.right) / len(self.right)}


class GreatestMemory:
    """Greatest resident memory of this process while the block runs."""

    def __enter__(self):
        self.process, self.ended, self.megabytes = psutil.Process(), threading.Event(), 0.0
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.watcher.start()
        return self

    def _watch(self) -> None:
        while not self.ended.is_set():
            self.megabytes = max(self.megabytes, self.process.memory_info().rss / 1e6)
            self.ended.wait(0.05)

    def __exit__(self, *exception):
        self.ended.set()
        self.watcher.join()


def write_split(folder: Path, clips: int, seconds: tuple[float, float]) -> tuple[str, tuple[str, ...]]:
    """Write manifests for training and validation; what the clips are, and the classes."""
    corpora = os.environ.get("MIFUSE_CORPORA")
    if corpora:
        listed = list_emodb(Path(corpora) / "emodb_2s", SEVEN_CLASSES)
        rows = [(u.utt_id, {"wav": str(u.wav), "emo": u.emo}, u.speaker in HELD_OUT) for u in listed]
        kind, classes = "emodb_2s", EMOTIONS
    else:
        rows = [(key, row, number % 5 == 0) for number, (key, row) in enumerate(noise(folder, clips, seconds))]
        kind, classes = "synthetic", LABELS
    atomic_write(folder / "corpus.json", json.dumps({"data_root": str(folder)}))
    for split, held_out in zip(SPLITS, (False, True), strict=True):
        chosen = {key: row for key, row, is_held_out in rows if is_held_out == held_out}
        for path in (folder / f"{split}.json", unlabelled(folder / f"{split}.json")):
            atomic_write(path, json.dumps(chosen))
    return f"{len(rows)} clips of {kind}", classes
