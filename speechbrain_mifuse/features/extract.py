"""Fill a feature store from manifests: what is there stays, what is missing or changed is encoded."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from filelock import FileLock

from speechbrain_mifuse.corpora.manifest import read_manifest
from speechbrain_mifuse.features.encode_files import Recording, in_batches, side_by_side
from speechbrain_mifuse.features.shards import Shard, take_over_shards
from speechbrain_mifuse.features.store import FeatureStore
from speechbrain_mifuse.utils.audio import trim_silence
from speechbrain_mifuse.utils.audio_warnings import summarized
from speechbrain_mifuse.utils.files import cache_folder, file_stamp
from speechbrain_mifuse.utils.progress import progress

logger = logging.getLogger(__name__)

PREPROCESSING_VERSION = 1


def usable_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# One for each core that this process may use, and no more than eight.
ENCODING_THREADS = min(max(usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1), 8)


class FrameReader:
    """From a recording to encoder frames: read, resample, trim, encode at true length.

    Parameters
    ----------
    encoder : FrozenEncoder
        The encoder.
    trim_db : float or None
        Silence threshold of `trim_silence`.
    frame_average : int
        Neighbouring frames that are averaged to one before they are stored; 1 stores every frame.
    repeats : int
        How often the encoder hears the recording, trimmed, one copy after the other; if the encoder has an attribute
        `longest_input` (samples), what goes beyond is cut off.

    Example
    -------
    >>> class Encoder:
    ...     sample_rate, layers = 16000, [1]
    ...     def __call__(self, wave):
    ...         return wave[: len(wave) // 320 * 320].view(-1, 1, 320)
    ...     def fingerprint(self):
    ...         return {"layers": [1], "dim": 320}
    >>> reader = FrameReader(Encoder(), trim_db=None)
    >>> reader.encode(torch.zeros(6400)).shape
    torch.Size([1, 20, 320])
    """

    def __init__(self, encoder, trim_db: float | None = 40.0, frame_average: int = 1, repeats: int = 1):
        self.encoder, self.trim_db, self.frame_average, self.repeats = encoder, trim_db, frame_average, repeats

    def fingerprint(self) -> dict:
        """Describe what decides the frames: the encoder and the preprocessing."""
        about = {"trim_db": self.trim_db, "frame_average": self.frame_average}
        about["preprocessing_version"] = PREPROCESSING_VERSION
        # Not named when there is one copy, or in float32: stores of before either was known stay valid.
        about |= {} if self.repeats == 1 else {"repeats": self.repeats}
        dtype = getattr(self.encoder, "compute_dtype", torch.float32)
        about |= {} if dtype == torch.float32 else {"compute_dtype": str(dtype).removeprefix("torch.")}
        return {**self.encoder.fingerprint(), **about}

    @property
    def batches(self) -> bool:
        """Whether recordings are encoded in padded batches: on a GPU, by an encoder that can."""
        device = getattr(self.encoder, "device", torch.device("cpu"))
        return device.type == "cuda" and hasattr(self.encoder, "encode_padded")

    def prepare(self, wave: torch.Tensor) -> torch.Tensor:
        """Give what the encoder hears of a waveform."""
        wave = trim_silence(wave, self.trim_db)
        if self.repeats > 1:
            wave = wave.repeat(self.repeats)[: getattr(self.encoder, "longest_input", None)]
        return wave

    def encode(self, wave: torch.Tensor) -> torch.Tensor:
        """Encode a waveform `[samples]` to `[layers, frames, dim]`, float32, on the CPU."""
        return self.encode_each([wave])[0]

    def encode_each(self, waves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Encode waveforms one by one, but each step around the encoder for all: the cores' caches keep it."""
        encoded = [self.encoder(wave) for wave in [self.prepare(wave) for wave in waves]]
        return [self._stored_form(frames) for frames in encoded]

    def encode_together(self, waves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Encode prepared waveforms in one padded batch; each result is that of `encode`, up to rounding."""
        return [self._stored_form(frames) for frames in self.encoder.encode_padded(waves)]

    def _stored_form(self, frames: torch.Tensor) -> torch.Tensor:
        frames = frames.unsqueeze(1) if frames.dim() == 2 else frames
        return average_frames(frames.transpose(0, 1), self.frame_average).cpu()


def average_frames(frames: torch.Tensor, count: int) -> torch.Tensor:
    """Average groups of neighbouring frames; what is left at the end makes a group of its own.

    Example
    -------
    >>> average_frames(torch.arange(5.0).view(1, 5, 1), 2).flatten().tolist()
    [0.5, 2.5, 4.0]
    """
    if count == 1:
        return frames
    whole = frames.shape[1] // count * count
    groups = frames[:, :whole].unflatten(1, (-1, count)).mean(2)
    rest = frames[:, whole:]
    return torch.cat([groups, rest.mean(1, keepdim=True)], dim=1) if rest.shape[1] else groups


def fill_store(
    corpus: str,
    manifests: Iterable[str | Path],
    reader: FrameReader,
    base: str | Path | None = None,
    shard: Shard | None = None,
) -> FeatureStore:
    """Fill the store of a corpus's frames by one reader, in a folder that both name.

    What is stored stays; missing recordings and those whose sound has changed are encoded. A killed call loses nothing
    that it had stored. A recording that cannot be read is left out, and the log says why.

    Parameters
    ----------
    corpus : str
        First part of the folder's name; the second is a digest of the reader's fingerprint, so that other settings
        never meet these frames.
    manifests : iterable of str or pathlib.Path
        Manifests whose utterances are wanted.
    reader : FrameReader
        From recordings to frames.
    base : str or pathlib.Path, optional
        Folder of all stores; by default `features` in the cache (`MIFUSE_CACHE`).
    shard : Shard, optional
        Encode this part of the utterances alone, into a store of its own that a later call without a shard takes over.

    Returns
    -------
    FeatureStore
        The store that was filled.

    Example
    -------
    >>> import tempfile, numpy, soundfile
    >>> from speechbrain_mifuse.utils.files import atomic_write
    >>> class Encoder:
    ...     sample_rate, layers = 16000, [1]
    ...     def __call__(self, wave):
    ...         return wave[: len(wave) // 320 * 320].view(-1, 320)
    ...     def fingerprint(self):
    ...         return {"layers": [1], "dim": 320}
    >>> folder = Path(tempfile.mkdtemp())
    >>> soundfile.write(folder / "a.wav", numpy.sin(numpy.arange(3200) / 9), 16000)
    >>> atomic_write(folder / "train.json", '{"toy-a": {"wav": "{data_root}/a.wav"}}')
    >>> atomic_write(folder / "corpus.json", json.dumps({"data_root": str(folder)}))
    >>> store = fill_store("toy", [folder / "train.json"], FrameReader(Encoder(), trim_db=None), folder)
    >>> store.folder.name[:4], store.frames("toy-a").shape
    ('toy-', (1, 10, 320))
    """
    # The name tells settings apart, so that trying another encoder or layer does not run into the first one's store.
    digest = hashlib.sha256(json.dumps(reader.fingerprint(), sort_keys=True).encode()).hexdigest()[:8]
    folder = Path(base or cache_folder() / "features") / f"{corpus}-{digest}"
    return extract(manifests, reader, folder, shard)


def extract(
    manifests: Iterable[str | Path], reader: FrameReader, folder: str | Path, shard: Shard | None = None
) -> FeatureStore:
    """Encode every utterance of some manifests that the store lacks or whose recording has changed."""
    wanted = {key: row["wav"] for manifest in manifests for key, row in read_manifest(manifest).items()}
    folder = Path(folder)
    if shard is None:
        return _fill(folder, wanted, reader)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        store = FeatureStore(folder, reader.fingerprint())
    part = {utt_id: wav for utt_id, wav in wanted.items() if shard.holds(utt_id) and utt_id not in store}
    return _fill(shard.folder(folder), part, reader) if part else store


def _fill(folder: Path, wanted: Mapping[str, str], reader: FrameReader) -> FeatureStore:
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        store = FeatureStore(folder, reader.fingerprint())
        take_over_shards(store)
        todo = outdated(store, wanted)
        logger.info("%s: %d utterances stored, %d to look at.", folder, len(wanted) - len(todo), len(todo))
        skipped = encode_into(store, todo, reader)
    for reason in skipped.values():
        logger.warning("left out: %s", reason)
    return store


def outdated(store: FeatureStore, wanted: Mapping[str, str]) -> dict[str, Recording]:
    """Find the recordings that a store lacks or whose file is another one than when they were encoded."""
    found = {}
    for utt_id, wav in wanted.items():
        stamp = file_stamp(wav) or (0, 0)
        if store.rows.stamp(utt_id) != stamp:
            found[utt_id] = Recording(wav, stamp, store.rows[utt_id].audio if utt_id in store else None)
    return found


def encode_into(store: FeatureStore, todo: Mapping[str, Recording], reader: FrameReader) -> dict[str, str]:
    """Encode recordings into an open store."""
    skipped, recognised = {}, 0
    if not todo:
        return skipped
    writer, way = store.writer(), in_batches if getattr(reader, "batches", False) else side_by_side
    bar = progress(total=len(todo), desc=f"encode {store.folder.name}", unit="clip")
    threads = ThreadPoolExecutor(ENCODING_THREADS)
    with writer as add, bar, summarized(), threads as pool, one_thread_per_operation():
        for utt_id, recording, audio, frames, problem in way(todo, reader, pool):
            if problem is not None:
                skipped[utt_id] = str(problem)
                store.rows.pop(utt_id, None)
            elif frames is None:
                writer.restamp(utt_id, recording.stamp)
                recognised += 1
            else:
                add(utt_id, frames, audio, recording.stamp)
            bar.update()
    if recognised:
        logger.info("%s: %d files have changed but not their sound: not encoded again.", store.folder, recognised)
    return skipped


@contextlib.contextmanager
def one_thread_per_operation():
    """Let each tensor operation use one core inside the block: whole clips side by side use the cores better."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def batched(items: Iterable, size: int) -> Iterator[list]:
    """Cut an iterable into lists (`itertools.batched` of Python 3.12)."""
    rest = iter(items)
    while part := list(itertools.islice(rest, size)):
        yield part
