"""Content hashes of recordings that were read before, so that a second run need not decode them again."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from speechbrain_mifuse.utils.files import file_stamp
from speechbrain_mifuse.utils.texts import shown

logger = logging.getLogger(__name__)

# A file written a moment ago may be written again within the resolution of its time stamp.
SETTLED = 2.0
# The end of a rollback journal of SQLite that names a journal of several files.
_JOURNAL_MAGIC = bytes.fromhex("d9d505f920a163d7")
_TABLE = "files (path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, sha256 TEXT, seconds REAL) WITHOUT ROWID"


class Known(NamedTuple):
    """What is known of a recording."""

    audio: str
    seconds: float


class HashCache(contextlib.AbstractContextManager):
    """Remembers content hashes by path, size and time of the last change; a file that changed is unknown."""

    def __init__(self, path: str | Path):
        self.path, self._lock = Path(path), threading.Lock()
        try:
            self._db = self._opened()
        except sqlite3.DatabaseError as error:
            # Full, read-only or locked: what is there may be sound.
            sound = isinstance(error, sqlite3.OperationalError) and "no such" not in str(error)
            self._db = self._in_memory() if sound else self._anew()

    @classmethod
    def beside(cls, label_store: str | Path) -> HashCache:
        """Open the cache that belongs to a label store: the file of that name with `.hashes` behind it."""
        return cls(f"{label_store}.hashes")

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Close the file."""
        self._db.close()

    def get(self, wav: str | Path) -> Known | None:
        """Look up a recording; a function that makes one is unknown."""
        stamp = file_stamp(wav)
        if stamp is None:
            return None
        statement = "SELECT sha256, seconds FROM files WHERE path = ? AND size = ? AND mtime_ns = ?"
        with self._lock, contextlib.suppress(sqlite3.OperationalError):
            row = self._db.execute(statement, (os.path.abspath(wav), *stamp)).fetchone()
            return Known(*row) if row else None
        return None

    def put(self, wav: str | Path, before: tuple[int, int] | None, known: Known):
        """Remember a recording, unless it changed while it was read."""
        if before is None or before != file_stamp(wav) or time.time() - before[1] / 1e9 < SETTLED:
            return
        # The next run reads the file again, that is all.
        with self._lock, contextlib.suppress(sqlite3.OperationalError):
            row = (os.path.abspath(wav), *before, *known)
            self._db.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)", row)

    def _opened(self) -> sqlite3.Connection:
        if foreign_journal(self.path) is not None:
            raise sqlite3.DatabaseError("its journal names another file")
        db = sqlite3.connect(self.path, timeout=10, isolation_level=None, check_same_thread=False)
        try:
            # Losing entries to a power cut is harmless; waiting for the disk on each is not.
            db.execute("PRAGMA synchronous = OFF")
            db.execute("PRAGMA journal_mode = WAL")
            db.execute(f"CREATE TABLE IF NOT EXISTS {_TABLE}")
            other = other_schema(db, [f"CREATE TABLE {_TABLE}"])
            if other is not None:
                raise sqlite3.DatabaseError(other)
            db.execute("SELECT path, size, mtime_ns, sha256, seconds FROM files LIMIT 1")
        except BaseException:
            db.close()
            raise
        return db

    def _anew(self) -> sqlite3.Connection:
        logger.warning("%s: no cache of content hashes, made anew.", self.path)
        for ending in ("", "-journal", "-wal", "-shm"):
            with contextlib.suppress(OSError):
                os.unlink(f"{self.path}{ending}")
        try:
            return self._opened()
        except sqlite3.Error:
            return self._in_memory()

    def _in_memory(self) -> sqlite3.Connection:
        logger.warning("%s: cannot be written, recordings will be read again by the next run.", self.path)
        db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        db.execute(f"CREATE TABLE {_TABLE}")
        return db


def foreign_journal(path: str | Path) -> Path | None:
    """Find a rollback journal of a transaction over several files: SQLite would delete the file that it names."""
    database = Path(path).resolve()
    journal = database.with_name(f"{database.name}-journal")
    if not journal.is_file():
        return None
    with open(journal, "rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - len(_JOURNAL_MAGIC), 0))
        return journal if file.read() == _JOURNAL_MAGIC else None


def other_schema(database: sqlite3.Connection, wanted: Collection[str]) -> str | None:
    """Find what a database holds beside some tables, such as a trigger or a view, which would run when it is used."""
    wanted = {_words(statement) for statement in wanted}
    # The indices that SQLite makes by itself have no statement.
    rows = database.execute("SELECT CAST(sql AS TEXT) FROM sqlite_master WHERE sql IS NOT NULL")
    found = [_words(sql) for (sql,) in rows]
    other = next((sql for sql in found if sql not in wanted), None)
    if other is not None:
        return f"has {shown(other[:80])!r}"
    return None if len(found) == len(wanted) else "lacks a table"


def _words(sql: str) -> str:
    return " ".join(sql.split())
