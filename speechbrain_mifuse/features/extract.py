"""Fill a feature store from manifests: what is there stays, what is missing or changed is encoded."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from speechbrain.utils.distributed import run_on_main

from speechbrain_mifuse.audio import BadAudio, content_hash, load_audio, trim_silence
from speechbrain_mifuse.corpora.manifest import read_manifest
from speechbrain_mifuse.features import cache_folder
from speechbrain_mifuse.features.store import FeatureStore
from speechbrain_mifuse.progress import progress

logger = logging.getLogger(__name__)

PREPROCESSING_VERSION = 1
ENCODING_THREADS = min(os.cpu_count() or 1, 8)


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
        """Describe what decides the frames: the encoder and the preprocessing.

        Returns
        -------
        dict
            Of JSON's types.
        """
        about = {"trim_db": self.trim_db, "frame_average": self.frame_average}
        about["preprocessing_version"] = PREPROCESSING_VERSION
        # Not named when there is one copy: stores of before repetition was known stay valid.
        about |= {} if self.repeats == 1 else {"repeats": self.repeats}
        return {**self.encoder.fingerprint(), **about}

    def encode(self, wave: torch.Tensor) -> torch.Tensor:
        """Encode a waveform.

        Parameters
        ----------
        wave : torch.Tensor
            `[samples]` at the encoder's rate.

        Returns
        -------
        torch.Tensor
            `[layers, frames, dim]`, float32, on the CPU.
        """
        wave = trim_silence(wave, self.trim_db)
        if self.repeats > 1:
            wave = wave.repeat(self.repeats)[: getattr(self.encoder, "longest_input", None)]
        frames = self.encoder(wave)
        frames = frames.unsqueeze(1) if frames.dim() == 2 else frames
        return average_frames(frames.transpose(0, 1), self.frame_average).cpu()


def average_frames(frames: torch.Tensor, count: int) -> torch.Tensor:
    """Average groups of neighbouring frames; what is left at the end makes a group of its own.

    Statistics over a whole utterance hardly change with it, and everything behind it gets `count` times smaller.

    Parameters
    ----------
    frames : torch.Tensor
        `[layers, frames, dim]`.
    count : int
        Frames in a group.

    Returns
    -------
    torch.Tensor
        `[layers, ceil(frames / count), dim]`.

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


def open_store(folder: str | Path, reader: FrameReader) -> FeatureStore:
    """Open the store of a reader's frames.

    Parameters
    ----------
    folder : str or pathlib.Path
        The store's folder.
    reader : FrameReader
        Decides the fingerprint.

    Returns
    -------
    FeatureStore
        The store.

    Raises
    ------
    StoreError
        If the folder holds other frames.

    Example
    -------
    >>> import tempfile
    >>> class Reader:
    ...     def fingerprint(self):
    ...         return {"layers": [1], "dim": 4}
    >>> open_store(tempfile.mkdtemp(), Reader()).dim
    4
    """
    return FeatureStore(folder, reader.fingerprint())


def fill_store(
    corpus: str, manifests: Iterable[str | Path], reader: FrameReader, base: str | Path | None = None
) -> FeatureStore:
    """Fill the store of a corpus's frames by one reader, in a folder that both name.

    Parameters
    ----------
    corpus : str
        The corpus's name.
    manifests : iterable of str or pathlib.Path
        Whose utterances are wanted.
    reader : FrameReader
        Makes the frames.
    base : str or pathlib.Path, optional
        Folder of all stores, the recipes' `feature_folder`; `features` in the cache folder by default.

    Returns
    -------
    FeatureStore
        With every readable utterance.

    Raises
    ------
    StoreError
        If the folder holds frames of another kind.

    Example
    -------
    >>> import tempfile
    >>> class Reader:
    ...     def fingerprint(self):
    ...         return {"layers": [1], "dim": 4}
    >>> fill_store("toy", [], Reader(), tempfile.mkdtemp()).folder.name
    'toy-877b9c7f'
    """
    # The name tells settings apart, so that trying another encoder or layer does not run into the first one's store.
    digest = hashlib.sha256(json.dumps(reader.fingerprint(), sort_keys=True).encode()).hexdigest()[:8]
    folder = Path(base or cache_folder() / "features") / f"{corpus}-{digest}"
    run_on_main(extract, kwargs={"manifests": list(manifests), "reader": reader, "folder": folder})
    return open_store(folder, reader)


def file_stamp(path: str) -> tuple[int, int]:
    """Size and modification time of a file: equal stamps let a stored row stand without reading the audio.

    Parameters
    ----------
    path : str
        A file.

    Returns
    -------
    tuple of int
        Bytes and nanoseconds; zeros when the file is missing.

    Example
    -------
    >>> file_stamp("/nowhere.wav")
    (0, 0)
    """
    try:
        status = Path(path).stat()
    except OSError:
        return (0, 0)
    return (status.st_size, status.st_mtime_ns)


def extract(manifests: Iterable[str | Path], reader: FrameReader, folder: str | Path) -> FeatureStore:
    """Encode every utterance of some manifests that the store lacks or whose recording has changed.

    A recording that cannot be read is skipped and listed at the end. A killed extraction goes on where it was.

    Parameters
    ----------
    manifests : iterable of str or pathlib.Path
        Manifests whose utterances are wanted; they may overlap.
    reader : FrameReader
        Makes the frames.
    folder : str or pathlib.Path
        The store's folder.

    Returns
    -------
    FeatureStore
        The store, with every readable utterance in it.

    Raises
    ------
    StoreError
        If the folder holds frames of another kind.

    Example
    -------
    >>> import tempfile
    >>> class Reader:
    ...     def fingerprint(self):
    ...         return {"layers": [1], "dim": 4}
    >>> len(extract([], Reader(), tempfile.mkdtemp()).rows)
    0
    """
    wanted = {key: row["wav"] for manifest in manifests for key, row in read_manifest(manifest).items()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    with FileLock(Path(folder) / "lock"):
        store = open_store(folder, reader)
        todo = {k: wav for k, wav in wanted.items() if k not in store or store.rows[k].file != file_stamp(wav)}
        logger.info("%s: %d utterances stored, %d to encode.", folder, len(wanted) - len(todo), len(todo))
        skipped = encode_into(store, todo, reader) if todo else {}
    for reason in skipped.values():
        logger.warning("left out: %s", reason)
    return store


def encode_into(store: FeatureStore, todo: Mapping[str, str], reader: FrameReader) -> dict[str, str]:
    """Encode recordings into an open store.

    Parameters
    ----------
    store : FeatureStore
        Locked by the caller.
    todo : mapping of str to str
        Path by utterance id.
    reader : FrameReader
        Makes the frames.

    Returns
    -------
    dict of str to str
        Reason, by utterance id, of what was skipped. Frames of an older version of such a recording are forgotten.

    Example
    -------
    >>> encode_into(None, {}, None)
    {}
    """
    skipped = {}
    if not todo:
        return skipped
    with store.writer() as add, ThreadPoolExecutor(ENCODING_THREADS) as pool, one_thread_per_operation():
        bar = progress(total=len(todo), desc=f"encode {store.folder.name}", unit="clip")
        for part in batched(todo.items(), 64):
            jobs = [(utt_id, wav, pool.submit(encode_file, wav, reader)) for utt_id, wav in part]
            for utt_id, wav, job in jobs:
                try:
                    frames, audio = job.result()
                    add(utt_id, frames, audio, file_stamp(wav))
                except BadAudio as error:
                    skipped[utt_id] = str(error)
                    store.rows.pop(utt_id, None)
                bar.update()
        bar.close()
    return skipped


def encode_file(wav: str, reader: FrameReader) -> tuple[np.ndarray, str]:
    """Read and encode one recording.

    Parameters
    ----------
    wav : str
        The recording.
    reader : FrameReader
        Makes the frames.

    Returns
    -------
    frames : numpy.ndarray
        `[layers, frames, dim]`, float32.
    audio : str
        SHA-256 of the whole waveform, before trimming.

    Raises
    ------
    BadAudio
        If it cannot be read.

    Example
    -------
    >>> class Reader:
    ...     class encoder:
    ...         sample_rate = 16000
    >>> encode_file("missing.wav", Reader())
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.audio.BadAudio: missing.wav: cannot be read as audio ...
    """
    wave = load_audio(wav, reader.encoder.sample_rate)
    with torch.inference_mode():
        return reader.encode(wave).cpu().numpy(), content_hash(wave)


@contextlib.contextmanager
def one_thread_per_operation():
    """Let each tensor operation use one core inside the block: whole clips side by side use the cores better.

    Example
    -------
    >>> with one_thread_per_operation():
    ...     torch.get_num_threads()
    1
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def batched(items: Iterable, size: int) -> Iterator[list]:
    """Cut an iterable into lists (`itertools.batched` of Python 3.12).

    Parameters
    ----------
    items : iterable
        Anything.
    size : int
        Longest list.

    Yields
    ------
    list
        Up to `size` items.

    Example
    -------
    >>> list(batched("abc", 2))
    [['a', 'b'], ['c']]
    """
    rest = iter(items)
    while part := list(itertools.islice(rest, size)):
        yield part
