"""The rows of a store's index as arrays, and a copy of them on disk that opens at once.

A million rows of Python objects take seconds to read and a gigabyte to hold; as arrays they take neither. The index
itself, `index.jsonl`, stays what counts: the copy, `index.npz`, only holds the rows of its first so many bytes, and is
passed over where these are not the same any more.
"""

from __future__ import annotations

import contextlib
import io
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from speechbrain_mifuse.utils.files import atomic_write

COPY = "index.npz"
# Rows that are read faster than a copy of them is worth.
FEW = 10_000
PIECE = 2**24  # bytes
MAX_POSITION = 2**44  # values: beyond any disk, and small enough to be multiplied by the size of a frame


class Rows(MutableMapping):
    """Rows by utterance id. Those read from a copy are arrays, and become objects when asked for."""

    def __init__(self, make: Callable, columns: dict[str, np.ndarray] | None = None):
        self._make, self._columns, self._changed = make, columns or {}, {}
        ids = columns["ids"].tobytes().decode().split("\n") if columns else []
        self._place = dict(zip(ids, range(len(self._columns.get("crc", ()))), strict=True))

    def __getitem__(self, utt_id: str):
        if utt_id in self._changed:
            return self._changed[utt_id]
        place, columns = self._place[utt_id], self._columns
        crcs = tuple(columns["layer_crcs"][place].tolist()) if columns["has_layer_crcs"][place] else ()
        offset, frames, crc = (columns[name].item(place) for name in ("offset", "frames", "crc"))
        return self._make(
            offset, frames, columns["audio"].item(place).decode(errors="replace"), self.stamp(utt_id), crc, crcs
        )

    def stamp(self, utt_id: str) -> tuple[int, int] | None:
        """Give size and modification time of a recording's file when it was encoded, without making a row."""
        if utt_id in self._changed:
            return self._changed[utt_id].file
        place = self._place.get(utt_id)
        return None if place is None else (self._columns["size"].item(place), self._columns["time"].item(place))

    def end(self, size: int) -> int:
        """Find where the last frames end, counted in values."""
        ends = self._columns["offset"] + self._columns["frames"] * size if self._columns else np.zeros(1, np.int64)
        return max([int(ends.max()), *(row.offset + row.frames * size for row in self._changed.values())])

    def __setitem__(self, utt_id: str, row) -> None:
        self._changed[utt_id] = row
        self._place.setdefault(utt_id, -1)

    def __delitem__(self, utt_id: str) -> None:
        del self._place[utt_id]
        self._changed.pop(utt_id, None)

    def __contains__(self, utt_id) -> bool:
        return utt_id in self._place

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)


def read_copy(folder: Path, index: BinaryIO, make: Callable) -> tuple[Rows, int]:
    """Read the rows of which there is a copy, and leave an index where those begin of which there is none."""
    try:
        with np.load(folder / COPY, allow_pickle=False) as copy:
            # A few compressed bytes can unpack to any number.
            columns = {} if any(part.compress_type for part in copy.zip.infolist()) else dict(copy)
        length, checksum, lines = columns.pop("covers").tolist()
        if _are_sound(columns) and _checksum(index, length) == checksum:
            return Rows(make, columns), lines
    except (OSError, ValueError, KeyError, TypeError, EOFError, MemoryError, zipfile.BadZipFile):
        pass
    index.seek(0)
    return Rows(make), 0


def _are_sound(columns: dict[str, np.ndarray]) -> bool:
    """Whether columns are of the types and lengths that `_columns` makes."""
    rows, wanted = len(columns["crc"]), _columns({})
    fit = all(columns[name].dtype.kind == wanted[name].dtype.kind for name in wanted)
    fit = fit and all(len(columns[name]) == rows for name in wanted if name != "ids")
    fit = fit and all(columns[name].ndim == 1 + (name == "layer_crcs") for name in wanted)
    return fit and all(((columns[name] >= 0) & (columns[name] < MAX_POSITION)).all() for name in ("offset", "frames"))


def write_copy(folder: Path, index: BinaryIO, rows: Rows, length: int, lines: int) -> None:
    """Write a copy of the rows of an index; where nothing can be written, do without."""
    columns = _columns(rows)
    columns["covers"] = np.array([length, _checksum(index, length), lines], np.int64)
    content = io.BytesIO()
    np.savez(content, **columns)
    with contextlib.suppress(OSError):
        atomic_write(folder / COPY, content.getbuffer())


def _columns(rows: Mapping) -> dict[str, np.ndarray]:
    found = list(rows.values())
    crcs = [row.layer_crcs for row in found]
    layers = max(map(len, crcs), default=0)
    return {
        "ids": np.frombuffer("\n".join(rows).encode(), np.uint8),
        "audio": np.array([row.audio.encode() for row in found], np.bytes_),
        "offset": np.array([row.offset for row in found], np.int64),
        "frames": np.array([row.frames for row in found], np.int64),
        "size": np.array([row.file[0] for row in found], np.int64),
        "time": np.array([row.file[1] for row in found], np.int64),
        "crc": np.array([row.crc for row in found], np.uint32),
        "layer_crcs": np.array([row or (0,) * layers for row in crcs], np.uint32).reshape(len(found), layers),
        "has_layer_crcs": np.array([bool(row) for row in crcs], np.bool_),
    }


def _checksum(index: BinaryIO, length: int) -> int:
    """CRC-32 of the first bytes of a file, which is left behind them."""
    index.seek(0)
    found, rest = 0, length
    while rest and (piece := index.read(min(rest, PIECE))):
        found, rest = zlib.crc32(piece, found), rest - len(piece)
    return found if not rest else -1
