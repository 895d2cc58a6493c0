"""Adapter pretraining on stored frames, against the same step with the encoder run inside it.

Compared are seconds of audio per second of whole training epochs: loading, masks, teacher, student, all four losses,
backward pass, optimiser, the teacher's update, and all that SpeechBrain's Brain does around them. Both sides have the
same `AdapterBrain`, the recipes' network (d 384, three layers), objectives, batches and recordings. Audio is counted as
the encoder got it, silence trimmed; `whole_recordings` counts the recordings as they are.

- Stored: frames of 80 ms, as IEMOCAP's recipe stores them.
- Inside: the demo encoder at each clip's true length and no deeper than its layer, run without gradients in every step.

`bf16` is the stored side with SpeechBrain's run option `--precision bf16`. `coarse` has frames of 320 ms, as the open
corpora's recipes store them.
Data: a random sample of nEMO if `MIFUSE_CORPORA` is set, else noise of 1 to 3 s.
"""

from __future__ import annotations

import functools
import itertools
import json
import runpy
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from clips import write_manifests
from epoch import demo, random_whisper
from hyperpyyaml import load_hyperpyyaml
from measure import Figure, ratio, take_turns
from speechbrain.core import Stage
from speechbrain.utils.epoch_loop import EpochCounter

from speechbrain_mifuse.brains.training import EVERY_EPOCH
from speechbrain_mifuse.corpora.manifest import read_manifest
from speechbrain_mifuse.experiments.features import EncoderSettings, open_reader
from speechbrain_mifuse.features.dataset import frame_batches
from speechbrain_mifuse.features.extract import extract
from speechbrain_mifuse.features.front import StoredFrames
from speechbrain_mifuse.utils.audio import load_audio, trim_silence
from speechbrain_mifuse.utils.files import atomic_write
from speechbrain_mifuse.utils.progress import quiet

ROOT = Path(__file__).resolve().parents[1]
HPARAMS = ROOT / "hparams" / "base" / "adapter.yaml"
RECIPE = runpy.run_path(str(ROOT / "recipes" / "RAVDESS" / "adapter" / "pretrain.py"))
LAYER, TRIM_DB = 2, 40.0
# Encoder frames averaged to one, and what the recipes set with it.
FINE, COARSE = 4, 16
WITH = {FINE: {"frames_per_batch": 2000, "mask_width": 10}, COARSE: {"frames_per_batch": 700, "mask_width": 3}}
NEVER = 10**9  # epochs


class Setting(NamedTuple):
    """Encoder, sizes, and how much is measured."""

    source: object  # saves the encoder into a folder, or names it
    sizes: dict
    clips: int
    epochs: int  # of the stored side in a turn
    turns: int


FULL = Setting(demo, {"d_model": 384, "n_heads": 6}, clips=384, epochs=2, turns=5)
TINY = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
QUICK = Setting(functools.partial(random_whisper, **TINY), {"d_model": 16, "n_heads": 2}, clips=8, epochs=1, turns=1)


def run(quick: bool) -> tuple[str, dict[str, Figure]]:
    """Let the sides take turns."""
    setting, seconds = (QUICK, (0.2, 0.4)) if quick else (FULL, (1.0, 3.0))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        kind, manifests = write_manifests(folder, {setting.clips}, seconds)
        manifest = unlabelled_copy(manifests[setting.clips])
        source = setting.source(folder / "encoder")
        readers = {n: open_reader(EncoderSettings(source, [LAYER], TRIM_DB, n)) for n in (FINE, COARSE)}
        fronts = {n: StoredFrames(extract([manifest], reader, folder / f"{n}"), LAYER) for n, reader in readers.items()}
        audio = audio_seconds(manifest)
        train = functools.partial(Training, setting, manifest, fronts[FINE], audio["trimmed"])
        sides = {"stored": train(folder / "1"), "inside": train(folder / "2", reader=readers[FINE])}
        sides["bf16"] = train(folder / "3", run_opts={"precision": "bf16"})
        sides["coarse"] = Training(setting, manifest, fronts[COARSE], audio["trimmed"], folder / "4")
        speeds = take_turns(sides, setting.turns, "adapter")
    share = audio["whole"] / audio["trimmed"]
    figures = {"encoder_inside_ratio": ratio(speeds["stored"], speeds["inside"])}
    figures |= {f"{name}_times_real_time": Figure("s/s", values) for name, values in speeds.items()}
    figures["stored_whole_recordings_times_real_time"] = Figure("s/s", [share * speed for speed in speeds["stored"]])
    return f"{setting.clips} clips of {kind}, {audio['trimmed']:.0f} s without silence, d {fronts[FINE].dim}", figures


def unlabelled_copy(manifest: Path) -> Path:
    """Write a manifest's twin without labels."""
    rows = json.loads(manifest.read_text())
    bare = {key: {"wav": row["wav"], "speaker": "1"} for key, row in rows.items()}
    path = manifest.with_name(f"{manifest.stem}_unlabelled.json")
    atomic_write(path, json.dumps(bare))
    return path


def audio_seconds(manifest: Path) -> dict[str, float]:
    """Length of all recordings, as they are and as the encoder gets them."""
    waves = [load_audio(row["wav"]) for row in read_manifest(manifest).values()]
    return {
        "whole": sum(map(len, waves)) / 16000,
        "trimmed": sum(len(trim_silence(wave, TRIM_DB)) for wave in waves) / 16000,
    }


class Training:
    """An adapter on some clips; each call trains on for some epochs and gives seconds of audio per second."""

    def __init__(self, setting: Setting, manifest: Path, front, audio: float, folder: Path, reader=None, run_opts=None):
        filled = dict(setting.sizes, labels=[], number_of_steps=NEVER, ema_start=0.99, ema_end=0.999)
        filled |= {"finetuning_steps": 1, "span": 8, "target_layers": [LAYER], **WITH[front.frame_average]}
        with HPARAMS.open(encoding="utf-8") as file:
            hparams = load_hyperpyyaml(file, filled)
        torch.manual_seed(0)
        self.epochs, self.audio, self.seconds = setting.epochs if reader is None else 1, audio, 0.0
        student, targets = RECIPE["make_student"]("paper", hparams, [manifest], front, dict)
        dataset = RECIPE["dataio_prepare"]([manifest], front, targets, [])
        lengths = [front.store.rows[key].frames for key in dataset.data_ids]
        self.brain = RECIPE["make_brain"](hparams, student, targets, lengths, folder, 1, run_opts)
        self.brain.hparams.log_interval = NEVER  # no checkpoint: a run writes ten in all
        if reader is not None:
            wavs = {key: row["wav"] for key, row in dataset.data.items()}
            dataset.add_dynamic_item(functools.partial(encoded, reader, wavs), takes="id", provides="live")
            dataset.set_output_keys({"id": "id", "feats": "live"})
        batches = frame_batches(batch_sampler=self.brain.hparams.batches)
        self.loader = self.brain.make_dataloader(dataset, Stage.TEST, ckpt_prefix=None, **batches)
        self.counter = EpochCounter(NEVER)

    def __call__(self) -> float:
        self.seconds = 0.0
        with quiet(*EVERY_EPOCH, "speechbrain.core"):
            self.brain.fit(self.timed(), self.loader)
        return self.epochs * self.audio / self.seconds

    def timed(self) -> Iterator[int]:
        """Number the epochs, and time each from when it begins until the next is asked for."""
        for epoch in itertools.islice(self.counter, self.epochs):
            start = time.perf_counter()
            yield epoch
            self.seconds += time.perf_counter() - start


@torch.inference_mode()
def encoded(reader, wavs: dict[str, str], utt_id: str) -> torch.Tensor:
    """Read and encode a recording."""
    return reader.encode(load_audio(wavs[utt_id]))[0].clone()
