"""Store of encoder frames on disk: fp16, memory-mapped, fingerprinted, resumable.

A store is a folder of three files. `store.json` says what the frames are (encoder weights, layers, preprocessing,
dtype, code version). `frames.f16` holds the frames of one utterance after another, each `[layers, frames, dim]`.
`index.jsonl` has one row per utterance, appended only after its frames are on disk: a killed extraction leaves at most
some frames that no row points to, and the next one cuts them off. Frames and rows carry checksums, so what a disk has
changed since is never read as if it were right.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from filelock import FileLock

from speechbrain_mifuse.features.rows import COPY, FEW, Rows, read_copy, write_copy
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.files import atomic_write, json_object

STORE_VERSION = 1
ITEM = np.dtype("<f2").itemsize
# Ends a line of the index: CRC-32 of what stands before it. Lines of before it was known lack it.
SEAL = b', "line": '
# Ids that an error names.
SHOWN = 5
FILES = ("store.json", "index.jsonl", COPY, "frames.f16", "lock")
MAX_FINGERPRINT_BYTES = 2**20


class StoreError(UserError):
    """A feature store that does not fit what is asked of it, or is damaged."""


@dataclass(frozen=True)
class Row:
    """Where the frames of one utterance lie, and of which audio they are."""

    offset: int
    frames: int
    audio: str
    file: tuple[int, int]
    crc: int
    layer_crcs: tuple[int, ...] = ()


# What stands in the index for frames that were found damaged: the next extraction takes the recording for changed.
DAMAGED = Row(0, 0, "", (-1, -1), 0)


def index_line(utt_id: str, row: Row) -> bytes:
    """Write a row as a line of the index."""
    text = json.dumps({"id": utt_id, **vars(row)}).encode()
    return text[:-1] + SEAL + b"%d}\n" % zlib.crc32(text)


def read_line(line: bytes) -> tuple[str, Row]:
    """Read a line of the index."""
    raw = json.loads(line)
    row = Row(
        raw["offset"], raw["frames"], raw["audio"], tuple(raw["file"]), raw["crc"], tuple(raw.get("layer_crcs", ()))
    )
    if not (type(row.offset) is type(row.frames) is int and row.offset >= 0 and row.frames >= 0):
        raise ValueError("a position before the file's start, or none")
    if not (type(raw["id"]) is type(row.audio) is str):
        raise ValueError("an id that is none")
    text, sealed, _ = line.rpartition(SEAL)
    if sealed and zlib.crc32(text + b"}") != raw["line"]:
        raise ValueError("checksum differs")
    return raw["id"], row


def refuse_link(path: Path) -> None:
    """Refuse a file of a store that is a link, through which another file would be cut, or no file."""
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
        raise StoreError(f"{path}: is a link or no regular file. Remove it; only the folder of a store may be a link.")


def difference(found: Mapping, wanted: Mapping) -> str:
    """Name the entries in which two fingerprints differ."""
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
        self.rows = Rows(Row)
        self._file = None
        # Places whose bytes were compared with their checksum: once in a process is enough.
        self._sound: set[tuple[int, int | None]] = set()
        for name in FILES:
            refuse_link(self.folder / name)
        self._check_fingerprint()
        self._read_index()

    def _check_fingerprint(self) -> None:
        path = self.folder / "store.json"
        if not path.exists():
            try:
                atomic_write(path, json.dumps(self.fingerprint, indent=1))
            except OSError as error:
                raise cannot_write(self.folder, error) from None
            return
        try:
            found = json_object(path, MAX_FINGERPRINT_BYTES)
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
        with path.open("rb") as index:
            self.rows, known = read_copy(self.folder, index, Row)
            # What follows the last line end was torn by a kill, and its frames are not counted as stored.
            *lines, torn = index.read().split(b"\n")
            self._read_lines(lines, known)
            if self._end() * ITEM > size:
                raise StoreError(f"{self._frames_path} is shorter than its index says. Delete {self.folder}.")
            if len(lines) > FEW:
                write_copy(self.folder, index, self.rows, index.tell() - len(torn), known + len(lines))

    def _read_lines(self, lines: list[bytes], known: int) -> None:
        for number, line in enumerate(lines, start=known + 1):
            try:
                utt_id, row = read_line(line)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                path, remedy = (
                    self.folder / "index.jsonl",
                    "Delete this line and run again: its recording is encoded anew.",
                )
                raise StoreError(f"{path}: line {number} is damaged. {remedy}") from None
            if row == DAMAGED:
                self.rows.pop(utt_id, None)
            else:
                self.rows[utt_id] = row

    @property
    def _frames_path(self) -> Path:
        return self.folder / "frames.f16"

    def _end(self) -> int:
        return self.rows.end(len(self.layers) * self.dim)

    def __contains__(self, utt_id: str) -> bool:
        return utt_id in self.rows

    def __getstate__(self):
        # A loader's worker process opens the file by itself.
        return {**self.__dict__, "_file": None}

    def frames(self, utt_id: str, layer: int | None = None) -> np.ndarray:
        """Read the frames of one utterance.

        Parameters
        ----------
        utt_id : str
            Utterance.
        layer : int, optional
            One of `layers`; all of them by default.

        Returns
        -------
        numpy.ndarray
            Float16, `[frames, dim]` of one layer, else `[layers, frames, dim]`.

        Raises
        ------
        StoreError
            If the utterance or the layer is not stored, or the frames are damaged: a later extraction then encodes the
            damaged recordings again.
        """
        if utt_id not in self.rows:
            raise StoreError(f"{self.folder} has no frames of '{utt_id}'. Run the extraction again.")
        row, place = self.rows[utt_id], None if layer is None else self.position(layer)
        block = self._block(row, place)
        if (row.offset, place) not in self._sound:
            if not self._is_sound(row, place, block):
                raise self._damage()
            self._sound.add((row.offset, place))
        return block

    def _block(self, row: Row, place: int | None) -> np.ndarray:
        if place is None:
            return self._map(row.offset, (len(self.layers), row.frames, self.dim))
        return self._map(row.offset + place * row.frames * self.dim, (row.frames, self.dim))

    def _is_sound(self, row: Row, place: int | None, block: np.ndarray) -> bool:
        if place is None:
            return zlib.crc32(block) == row.crc
        if len(row.layer_crcs) == len(self.layers):
            return zlib.crc32(block) == row.layer_crcs[place]
        return zlib.crc32(self._block(row, None)) == row.crc

    def _damage(self) -> StoreError:
        """Look for everything that is damaged, mark it for the next extraction, and tell of it."""
        damaged = self.verify()
        told = ", ".join(damaged[:SHOWN]) + (f" and {len(damaged) - SHOWN} more" if len(damaged) > SHOWN else "")
        marked = self._mark(damaged)
        remedy = (
            "Run again: they are encoded anew." if marked else f"Delete {self.folder}; extraction will fill it again."
        )
        return StoreError(f"{self._frames_path}: frames are damaged, their checksum differs: {told}. {remedy}")

    def _mark(self, damaged: list[str]) -> bool:
        try:
            with FileLock(self.folder / "lock", timeout=0), (self.folder / "index.jsonl").open("r+b") as index:
                index.seek(cut_torn_line(index))
                index.write(b"".join(index_line(utt_id, DAMAGED) for utt_id in damaged))
        except OSError:  # read-only, full, or an extraction is at it
            return False
        return True

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
        """Position of a layer among those stored."""
        if layer not in self.layers:
            raise StoreError(f"{self.folder} holds layers {self.layers}, not {layer}. Pass --encoder_layers with it.")
        return self.layers.index(layer)

    def verify(self) -> list[str]:
        """List the utterances whose bytes differ from the checksum taken when they were written."""
        return [key for key, row in self.rows.items() if not self._is_sound(row, None, self._block(row, None))]

    def writer(self, flush_every: int = 64) -> StoreWriter:
        """Open the store for appending; a context manager that gives the function `StoreWriter.add`."""
        return StoreWriter(self, flush_every)


class StoreWriter:
    """Appends utterances to a store; frames reach the disk before the rows that point to them."""

    def __init__(self, store: FeatureStore, flush_every: int):
        self.store, self.flush_every, self.pending = store, flush_every, []

    def __enter__(self):
        self.end = self.store._end()
        try:
            self.data = open(self.store._frames_path, "ab")
            self.data.truncate(self.end * ITEM)
            self.index = open(self.store.folder / "index.jsonl", "a+b")
            cut_torn_line(self.index)
        except OSError as error:
            raise cannot_write(self.store.folder, error) from None
        return self.add

    def add(self, utt_id: str, frames: np.ndarray, audio: str, file: tuple[int, int]) -> None:
        """Append one utterance; a later row of the same id replaces an earlier one."""
        with np.errstate(over="ignore"):
            block = np.ascontiguousarray(frames, dtype="<f2")
        if block.ndim != 3 or (block.shape[0], block.shape[2]) != (len(self.store.layers), self.store.dim):
            raise StoreError(f"{utt_id}: frames of shape {block.shape} do not fit {self.store.folder}.")
        if not np.isfinite(block).all():
            raise StoreError(f"{utt_id}: the encoder gave values that do not fit fp16 (NaN, infinite, or above 65504).")
        layer_crcs = tuple(zlib.crc32(layer) for layer in block)
        row = Row(self.end, block.shape[1], audio, tuple(file), zlib.crc32(block), layer_crcs)
        try:
            self.data.write(block)
        except OSError as error:
            raise self._full(error) from None
        self.pending.append((utt_id, row))
        self.end += block.size
        if len(self.pending) >= self.flush_every:
            self.flush()

    def restamp(self, utt_id: str, file: tuple[int, int]) -> None:
        """Note that an utterance's recording is the same in another file; its frames stay where they are."""
        self.pending.append((utt_id, replace(self.store.rows[utt_id], file=tuple(file))))
        if len(self.pending) >= self.flush_every:
            self.flush()

    def flush(self) -> None:
        """Bring frames, then rows, to the disk."""
        try:
            self.data.flush()
            os.fsync(self.data.fileno())
            self.index.write(b"".join(index_line(utt_id, row) for utt_id, row in self.pending))
            self.index.flush()
            os.fsync(self.index.fileno())
        except OSError as error:
            raise self._full(error) from None
        self.store.rows.update(self.pending)
        self.pending = []

    def _full(self, error: OSError) -> StoreError:
        self.pending = []  # whose frames may not be there: the next writer cuts them off
        return cannot_write(self.store.folder, error)

    def __exit__(self, *exception):
        try:
            if self.pending:
                self.flush()
        finally:
            for file in (self.data, self.index):
                with contextlib.suppress(OSError):  # of what a full disk has refused already
                    file.close()


def cut_torn_line(index) -> int:
    r"""Cut off what follows the last line end of an index: a kill tore it."""
    index.seek(0)
    return index.truncate(index.read().rfind(b"\n") + 1)


def cannot_write(folder: Path, error: OSError) -> StoreError:
    """Say that a store cannot be written."""
    remedy = "Free some space or pass another --feature_folder, and run again: what is stored is kept."
    return StoreError(f"{folder}: cannot be written ({error.strerror or error}). {remedy}")
