"""Extraction into a feature store, against what the encoder alone takes for the same clips.

- Extract: `extract` from the files to a store: read, trim, encode, hash, average frames, write, with all that makes it
  safe to kill.
- Bare encoder: the same encoder on the same trimmed waveforms, which lie in memory already, by as many threads, one
  clip in each; on a GPU, in the same padded batches.

`bare_encoder_ratio` is the speed of the first over that of the second; 1 is the most it can be. `touched_ratio`: how
much faster than extracting it is to recognise recordings whose files are newer but sound the same. Encoder: Whisper
tiny.en's to layer 2 (the `[demo]` extra), on a GPU if there is one. Data: nEMO if `MIFUSE_CORPORA` is set, else noise
of 1 to 4 s; as 16-bit WAV files, since decoding FLAC is no part of this package.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from clips import write_manifests
from epoch import TINY_WHISPER, TRIM_DB, random_whisper
from measure import Figure, ratio, take_turns
from recognise import gathered

from speechbrain_mifuse.experiments.features import EncoderSettings, open_reader
from speechbrain_mifuse.features.encode_files import BATCH_S, similar
from speechbrain_mifuse.features.extract import ENCODING_THREADS, FrameReader, extract, one_thread_per_operation
from speechbrain_mifuse.utils.audio import load_audio
from speechbrain_mifuse.utils.files import atomic_write
from speechbrain_mifuse.utils.progress import quiet

LAYER, CHATTER = 2, ("speechbrain.integrations", "speechbrain_mifuse.features")


def run(quick: bool) -> tuple[str, dict[str, Figure]]:
    """Compare the two, and recognise what has only been touched."""
    count, turns, seconds = (4, 2, (0.2, 0.4)) if quick else (256, 5, (1.0, 4.0))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as scratch, quiet(*CHATTER):
        folder = Path(scratch)
        encoder = random_whisper(folder / "encoder", **TINY_WHISPER) if quick else "demo"
        reader = open_reader(EncoderSettings(encoder, [LAYER], TRIM_DB, 4), {"device": device})
        (folder / "clips").mkdir()
        kind, manifests = write_manifests(folder / "clips", {count}, seconds)
        recordings = gathered(manifests[count], folder / "recordings")
        manifest = listed(recordings, folder)
        waves = [reader.prepare(load_audio(path)) for path in recordings]
        fresh = (folder / f"store{number}" for number in itertools.count())
        sides = {
            "extract": speed(count, lambda: extract([manifest], reader, next(fresh))),
            "bare": speed(count, functools.partial(bare, reader, waves)),
        }
        speeds = take_turns(sides, turns, "extraction")
        again = functools.partial(extract, [manifest], reader, folder / "store0")
        touched = [speed(count, again)() for _ in range(turns) if touch(recordings)]
    figures = {
        "bare_encoder_ratio": ratio(speeds["extract"], speeds["bare"]),
        "touched_ratio": ratio(touched, speeds["extract"]),
        **{f"{name}_clips_per_second": Figure("clips/s", values) for name, values in speeds.items()},
    }
    return f"{count} clips of {kind}, on {device}", figures


def listed(recordings: list[Path], folder: Path) -> Path:
    """Write a manifest of recordings."""
    rows = {path.stem: {"wav": str(path)} for path in recordings}
    atomic_write(folder / "corpus.json", json.dumps({"data_root": str(folder)}))
    atomic_write(folder / "all_unlabelled.json", json.dumps(rows))
    return folder / "all_unlabelled.json"


def speed(count: int, work):
    """Make a function that gives clips per second of some work."""

    def side() -> float:
        start = time.perf_counter()
        work()
        return count / (time.perf_counter() - start)

    return side


@torch.inference_mode()
def bare(reader: FrameReader, waves: list[torch.Tensor]) -> None:
    """Encode waveforms, as extraction would on the reader's device."""
    if reader.batches:
        for batch in similar([(None, wave) for wave in waves], int(BATCH_S * reader.encoder.sample_rate)):
            for frames in reader.encoder.encode_padded([wave for _, wave in batch]):
                frames.cpu()
        return
    with one_thread_per_operation(), ThreadPoolExecutor(ENCODING_THREADS) as pool:
        list(pool.map(torch.inference_mode()(reader.encoder), waves))


def touch(recordings: list[Path]) -> bool:
    """Give recordings another modification time, and nothing else."""
    for path in recordings:
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))
    return True
