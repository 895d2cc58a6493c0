"""Store of encoder frames on disk: fp16, memory-mapped, fingerprinted, resumable.

A store is a folder of three files. `store.json` says what the frames are (encoder weights, layers, preprocessing,
dtype, code version). `frames.f16` holds the frames of one utterance after another, each `[layers, frames, dim]`.
`index.jsonl` has one row per utterance, appended only after its frames are on disk: a killed extraction leaves at most
some frames that no row points to, and the next one cuts them off.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from speechbrain_mifuse.corpora.manifest import atomic_write
from speechbrain_mifuse.errors import UserError

STORE_VERSION = 1
ITEM = np.dtype("<f2").itemsize


class StoreError(UserError):
    """A feature store that does not fit what is asked of it, or is damaged."""


@dataclass(frozen=True)
class Row:
    """Where the frames of one utterance lie, and of which audio they are.

    Parameters
    ----------
    offset : int
        First value, counted in fp16 values from the start of the file.
    frames : int
        Frames per layer.
    audio : str
        SHA-256 of the waveform the frames were computed from.
    file : tuple of int
        Size in bytes and modification time in ns of the recording then.
    crc : int
        CRC-32 of the stored bytes.

    Example
    -------
    >>> Row(0, 10, "ab", (100, 1), 7).frames
    10
    """

    offset: int
    frames: int
    audio: str
    file: tuple[int, int]
    crc: int


def difference(found: Mapping, wanted: Mapping) -> str:
    """Name the entries in which two fingerprints differ.

    Parameters
    ----------
    found, wanted : mapping
        Fingerprints: what a store holds and what is asked for.

    Returns
    -------
    str
        `key: found ... wanted ...`, one after another; empty when equal.

    Example
    -------
    >>> difference({"layers": [2], "dim": 4}, {"layers": [3], "dim": 4})
    'layers: found [2], wanted [3]'
    """
    keys = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
    return "; ".join(f"{key}: found {found.get(key)}, wanted {wanted.get(key)}" for key in keys)


class FeatureStore:
    """Frames by utterance id.

    Parameters
    ----------
    folder : str or pathlib.Path
        The store's folder, made when missing.
    fingerprint : mapping
        What the frames are; must hold `layers` (list) and `dim` (int) and be of JSON's types.

    Raises
    ------
    StoreError
        If the folder holds frames of another fingerprint (the message says what differs) or is damaged.

    Example
    -------
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> store = FeatureStore(folder, {"encoder": "toy", "layers": [1, 2], "dim": 3})
    >>> with store.writer() as add:
    ...     add("t-a", np.ones((2, 5, 3)), audio="ab", file=(100, 1))
    >>> store.frames("t-a", layer=2).shape
    (5, 3)
    >>> FeatureStore(folder, {"encoder": "other", "layers": [1, 2], "dim": 3})
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.features.store.StoreError: ...: encoder: found toy, wanted other. ...
    """

    def __init__(self, folder: str | Path, fingerprint: Mapping):
        self.folder = Path(folder)
        self.fingerprint = {**fingerprint, "dtype": "float16", "store_version": STORE_VERSION}
        self.layers, self.dim = list(fingerprint["layers"]), int(fingerprint["dim"])
        self.rows: dict[str, Row] = {}
        self._file = None
        self._check_fingerprint()
        self._read_index()

    def _check_fingerprint(self) -> None:
        path = self.folder / "store.json"
        if not path.exists():
            atomic_write(path, json.dumps(self.fingerprint, indent=1))
            return
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise StoreError(f"{path}: damaged ({error}). Delete the folder; extraction will fill it again.") from None
        differs = difference(found, json.loads(json.dumps(self.fingerprint)))
        if differs:
            raise StoreError(
                f"{self.folder} holds features of another kind: {differs}. "
                "Pass another --feature_folder, or delete this one."
            )

    def _read_index(self) -> None:
        path = self.folder / "index.jsonl"
        if not path.exists():
            return
        size = self._frames_path.stat().st_size if self._frames_path.exists() else 0
        # What follows the last line end was torn by a kill, and its frames are not counted as stored.
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
            try:
                raw = json.loads(line)
                row = Row(raw["offset"], raw["frames"], raw["audio"], tuple(raw["file"]), raw["crc"])
                self.rows[raw["id"]] = row
            except (ValueError, KeyError, TypeError):
                raise StoreError(f"{path}: line {number} is damaged. Delete the folder {self.folder}.") from None
            if self._end(row) * ITEM > size:
                raise StoreError(f"{self._frames_path} is shorter than its index says. Delete {self.folder}.")

    @property
    def _frames_path(self) -> Path:
        return self.folder / "frames.f16"

    def _end(self, row: Row) -> int:
        return row.offset + len(self.layers) * row.frames * self.dim

    def __contains__(self, utt_id: str) -> bool:
        return utt_id in self.rows

    def __getstate__(self):
        # A loader's worker process opens the file by itself.
        return {**self.__dict__, "_file": None}

    def frames(self, utt_id: str, layer: int | None = None) -> np.ndarray:
        """Frames of one utterance, as a view of the mapped file.

        Parameters
        ----------
        utt_id : str
            Utterance id.
        layer : int, optional
            One of the store's layers; all of them by default.

        Returns
        -------
        numpy.ndarray
            float16, `[frames, dim]` for one layer, else `[layers, frames, dim]`. Copy it before you change it.

        Raises
        ------
        StoreError
            If the utterance or the layer is not in the store.
        """
        if utt_id not in self.rows:
            raise StoreError(f"{self.folder} has no frames of '{utt_id}'. Run the extraction again.")
        row = self.rows[utt_id]
        if layer is None:
            return self._map(row.offset, (len(self.layers), row.frames, self.dim))
        return self._map(row.offset + self.position(layer) * row.frames * self.dim, (row.frames, self.dim))

    def _map(self, offset: int, shape: tuple[int, ...]) -> np.ndarray:
        # One short-lived map per read: unlike one map of the whole file, its pages leave the process with the batch,
        # so resident memory does not grow with the corpus. It is private (copy on write): the file cannot be changed.
        if self._file is None:
            self._file = self._frames_path.open("rb")
        count, first = math.prod(shape), offset * ITEM
        start = first - first % mmap.ALLOCATIONGRANULARITY
        stop = first + count * ITEM
        block = mmap.mmap(self._file.fileno(), stop - start, access=mmap.ACCESS_COPY, offset=start)
        return np.frombuffer(block, "<f2", count, first - start).reshape(shape)

    def position(self, layer: int) -> int:
        """Place of a layer among those stored.

        Parameters
        ----------
        layer : int
            Layer number, as the encoder counts.

        Returns
        -------
        int
            Index into the first axis of `frames(utt_id)`.

        Raises
        ------
        StoreError
            If the layer is not stored.
        """
        if layer not in self.layers:
            raise StoreError(f"{self.folder} holds layers {self.layers}, not {layer}. Pass --encoder_layers with it.")
        return self.layers.index(layer)

    def verify(self) -> list[str]:
        """Compare every utterance's bytes with the checksum taken when they were written.

        Returns
        -------
        list of str
            Ids of damaged utterances.
        """
        return [key for key, row in self.rows.items() if zlib.crc32(self.frames(key).tobytes()) != row.crc]

    def writer(self, flush_every: int = 64) -> StoreWriter:
        """Open the store for appending; use it as a context manager that gives the function `add`.

        Parameters
        ----------
        flush_every : int
            Utterances between two moments at which everything is certain to be on disk.

        Returns
        -------
        StoreWriter
            The context manager.
        """
        return StoreWriter(self, flush_every)


class StoreWriter:
    """Appends utterances to a store; frames reach the disk before the rows that point to them.

    Parameters
    ----------
    store : FeatureStore
        The store. One writer at a time: callers hold a lock.
    flush_every : int
        Utterances between two flushes.

    Example
    -------
    >>> import tempfile
    >>> store = FeatureStore(tempfile.mkdtemp(), {"layers": [1], "dim": 2})
    >>> with store.writer() as add:
    ...     add("t-a", np.zeros((1, 3, 2)), audio="ab", file=(100, 1))
    >>> "t-a" in store
    True
    """

    def __init__(self, store: FeatureStore, flush_every: int):
        self.store, self.flush_every, self.pending = store, flush_every, []

    def __enter__(self):
        end = max((self.store._end(row) for row in self.store.rows.values()), default=0)
        self.data = open(self.store._frames_path, "ab")
        self.data.truncate(end * ITEM)
        self.index = open(self.store.folder / "index.jsonl", "ab")
        self._cut_torn_row()
        self.end = end
        return self.add

    def _cut_torn_row(self) -> None:
        content = (self.store.folder / "index.jsonl").read_bytes()
        self.index.truncate(content.rfind(b"\n") + 1)

    def add(self, utt_id: str, frames: np.ndarray, audio: str, file: tuple[int, int]) -> None:
        """Append one utterance; a later row of the same id replaces an earlier one.

        Parameters
        ----------
        utt_id : str
            Utterance id.
        frames : numpy.ndarray
            `[layers, frames, dim]`, any float type.
        audio : str
            SHA-256 of the waveform.
        file : tuple of int
            Size and modification time (ns) of the recording.

        Raises
        ------
        StoreError
            If the shape does not fit the store or a value does not fit fp16.
        """
        with np.errstate(over="ignore"):
            block = np.ascontiguousarray(frames, dtype="<f2")
        if block.ndim != 3 or (block.shape[0], block.shape[2]) != (len(self.store.layers), self.store.dim):
            raise StoreError(f"{utt_id}: frames of shape {block.shape} do not fit {self.store.folder}.")
        if not np.isfinite(block).all():
            raise StoreError(f"{utt_id}: the encoder gave values that do not fit fp16 (NaN, infinite, or above 65504).")
        raw = block.tobytes()
        self.data.write(raw)
        self.pending.append((utt_id, Row(self.end, block.shape[1], audio, tuple(file), zlib.crc32(raw))))
        self.end += block.size
        if len(self.pending) >= self.flush_every:
            self.flush()

    def flush(self) -> None:
        """Bring frames, then rows, to the disk."""
        self.data.flush()
        os.fsync(self.data.fileno())
        lines = "".join(json.dumps({"id": key, **vars(row)}) + "\n" for key, row in self.pending)
        self.index.write(lines.encode())
        self.index.flush()
        os.fsync(self.index.fileno())
        self.store.rows.update(self.pending)
        self.pending = []

    def __exit__(self, *exception):
        self.flush()
        self.data.close()
        self.index.close()
