"""Recognising the emotion of a folder of recordings, against what the encoder alone takes for them.

Both sides use the same threads, one clip in each.

- Recognise: `EmotionRecognizer.classify_folder`: find the files, read, trim, encode, classify.
- Bare encoder: the same encoder on the same trimmed waveforms, which lie in memory already.

`bare_encoder_ratio` is the time of the first over that of the second; 1 is the least it can be. `real_time_ratio` is
seconds of audio recognised per second. Encoder: Whisper tiny.en's to layer 2 (the `[demo]` extra). Data: nEMO if
`MIFUSE_CORPORA` is set, else noise of 1 to 4 s; as 16-bit WAV files, since decoding FLAC is no part of this package.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
import types
from pathlib import Path

import soundfile
import torch
from clips import LABELS, write_manifests
from epoch import TINY_WHISPER, random_whisper
from measure import Figure, ratio, take_turns

from speechbrain_mifuse.corpora.manifest import read_manifest
from speechbrain_mifuse.features.encoder import FrozenEncoder
from speechbrain_mifuse.inference.recognizer import EmotionRecognizer, in_order
from speechbrain_mifuse.inference.recognizer_folder import export_recogniser
from speechbrain_mifuse.nnet.classifier import EmotionClassifier
from speechbrain_mifuse.utils.audio import load_audio, trim_silence

LAYER = 2


def run(quick: bool) -> tuple[str, dict[str, Figure]]:
    """Compare the two."""
    count, turns, seconds = (4, 2, (0.2, 0.4)) if quick else (256, 25, (1.0, 4.0))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        encoder = random_whisper(folder / "encoder", **TINY_WHISPER) if quick else "demo"
        recogniser = EmotionRecognizer.from_hparams(exported(folder / "recogniser", encoder))
        (folder / "clips").mkdir()
        kind, manifests = write_manifests(folder / "clips", {count}, seconds)
        recordings = gathered(manifests[count], folder / "recordings")
        waves = [load_audio(path) for path in recordings]
        heard = sum(map(len, waves)) / recogniser.sample_rate
        trimmed = [trim_silence(wave, recogniser.hparams.trim_db) for wave in waves]
        sides = {
            "recognise": timed(lambda: recogniser.classify_folder(folder / "recordings", show_progress=False)),
            "bare": timed(lambda: in_order(torch.inference_mode()(recogniser.mods.encoder), trimmed)),
        }
        times = take_turns(sides, turns, "recognise")
    figures = {
        "bare_encoder_ratio": ratio(times["recognise"], times["bare"]),
        "real_time_ratio": Figure("times", [heard / value for value in times["recognise"]]),
        "clips_per_second": Figure("1/s", [count / value for value in times["recognise"]]),
    }
    return f"{count} clips of {kind}, {heard:.0f} s", figures


def exported(folder: Path, encoder: str) -> Path:
    """Export a recogniser with random weights behind an encoder."""
    frozen = FrozenEncoder(encoder, [LAYER])
    front = types.SimpleNamespace(
        dim=frozen.dim, n_layers=1, layer=LAYER, frame_average=4, store=types.SimpleNamespace(layers=[LAYER])
    )
    hparams = {"labels": LABELS, "encoder": encoder, "trim_db": 40.0}
    torch.manual_seed(0)
    classifier = EmotionClassifier(frozen.dim, len(LABELS))
    export_recogniser(folder, classifier, front, hparams, {"labels": LABELS, "features": {}})
    return folder


def gathered(manifest: Path, folder: Path) -> list[Path]:
    """Write a manifest's recordings into a folder of their own."""
    folder.mkdir()
    paths = []
    for row in read_manifest(manifest).values():
        samples, rate = soundfile.read(row["wav"])
        paths.append(folder / f"{Path(row['wav']).stem}.wav")
        soundfile.write(paths[-1], samples, rate, subtype="PCM_16")
    return paths


def timed(start):
    """Go through what `start` gives to its end; the function gives seconds."""

    def side() -> float:
        begin = time.perf_counter()
        with contextlib.closing(start()) as results:
            for _ in results:
                pass
        return time.perf_counter() - begin

    return side
