"""A file that remembers every answer of the teacher: one SQLite database, safe to kill, resumed and topped up.

Written by hand on sqlite3: caches of objects neither keep a sample for ever nor count attempts and tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import ipaddress
import json
import logging
import math
import os
import sqlite3
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from speechbrain_mifuse.lalm.answer import KINDS, SAMPLE_KINDS, Response
from speechbrain_mifuse.lalm.hashes import foreign_journal, other_schema
from speechbrain_mifuse.lalm.limits import used_tokens
from speechbrain_mifuse.lalm.profile import NO_TOKENS, Tokens, is_number
from speechbrain_mifuse.lalm.prompt import Prompt
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.files import encodable

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1

# What a row of another program, or a damaged one, may raise.
UNREADABLE = (ValueError, TypeError, AttributeError, IndexError, OverflowError, RecursionError)

# Samples of one recording, of which `load` makes room for all; seconds since 1970, before the year 9999.
MAX_SAMPLES, MAX_TIME = 10_000, 253_000_000_000
# float32 probabilities of a few labels add up to 1 within this.
SUM_TOLERANCE = 1e-4

NOT_WRITTEN = "Check free space and permissions of its folder, then run again: what is stored is kept."
# Seconds that a lock of another process is waited for, and after how many the user is told.
LOCK_SECONDS, SILENT_SECONDS = 60.0, 3.0

# Audio hashes and queries are spelled out once and referred to by number, which keeps a row of `answers` narrow; the
# columns that `load` reads come first, so that long raw replies on overflow pages are never touched by it.
# `probs` holds C little-endian float32 values: exact, and a million of them decode in one call.
_SCHEMA = """
CREATE TABLE queries (
    query_id INTEGER PRIMARY KEY,
    prompt_hash TEXT NOT NULL,
    labels TEXT NOT NULL,
    model TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    sampling TEXT NOT NULL,
    base_url TEXT NOT NULL,
    prompt TEXT NOT NULL,
    created REAL NOT NULL,
    UNIQUE (prompt_hash, labels, model, endpoint, sampling)
);
CREATE TABLE audio (
    audio_id INTEGER PRIMARY KEY,
    sha256 BLOB NOT NULL UNIQUE
);
CREATE TABLE answers (
    query_id INTEGER NOT NULL REFERENCES queries,
    audio_id INTEGER NOT NULL REFERENCES audio,
    k INTEGER NOT NULL,
    kind TEXT NOT NULL,
    probs BLOB,
    label_mass REAL,
    status TEXT NOT NULL CHECK (status IN ('sample', 'rejected')),
    attempts INTEGER NOT NULL,
    reason TEXT NOT NULL,
    seed INTEGER,
    created REAL NOT NULL,
    served_model TEXT,
    system_fingerprint TEXT,
    usage TEXT,
    utt_id TEXT NOT NULL,
    raw TEXT NOT NULL,
    PRIMARY KEY (query_id, audio_id, k)
) WITHOUT ROWID;
"""

_VALUES = f"VALUES (?, (SELECT audio_id FROM audio WHERE sha256 = ?){14 * ', ?'})"
# A sample is never overwritten: what training has read once stays true. A rejected answer makes room for its retry,
# which keeps the tokens of the replaced attempt below its own: they were paid for.
_PUT = f"""
INSERT INTO answers {_VALUES}
ON CONFLICT DO UPDATE SET
    kind = excluded.kind, probs = excluded.probs, label_mass = excluded.label_mass, status = excluded.status,
    attempts = answers.attempts + 1, reason = excluded.reason, seed = excluded.seed, created = excluded.created,
    served_model = excluded.served_model, system_fingerprint = excluded.system_fingerprint,
    usage = CASE WHEN answers.usage IS NULL THEN excluded.usage
        ELSE json_set(coalesce(excluded.usage, '{{}}'), '$.replaced', json(answers.usage)) END,
    utt_id = excluded.utt_id, raw = excluded.raw
WHERE answers.status = 'rejected'
"""

# CROSS JOIN fixes the order of the loops: few wanted recordings cost few look-ups, however large the store. Going
# through them in the order in which the answers lie on disk reads each page once. SQLite itself joins the rows of a
# block into two strings, because a million Python tuples would take longer than the scan; place and kind of a row are
# one number.
_TEMPORARY = (
    "CREATE TEMP TABLE IF NOT EXISTS asked (position INTEGER PRIMARY KEY, sha256 BLOB)",
    "CREATE TEMP TABLE IF NOT EXISTS wanted (line INTEGER PRIMARY KEY, audio_id INTEGER, position INTEGER)",
    "DELETE FROM temp.asked",
    "DELETE FROM temp.wanted",
)
_WANT = """
INSERT INTO temp.wanted (audio_id, position) SELECT u.audio_id, w.position
FROM temp.asked w CROSS JOIN audio u ON u.sha256 = w.sha256 ORDER BY u.audio_id
"""
_CODE = " ".join(f"WHEN '{kind}' THEN {code}" for code, kind in enumerate(KINDS))
_LOAD = f"""
SELECT group_concat((w.position * :k + a.k) * {len(KINDS)} + CASE a.kind {_CODE} END, ' '),
    group_concat(hex(a.probs), '')
FROM temp.wanted w
CROSS JOIN answers a ON a.query_id = :query AND a.audio_id = w.audio_id AND a.k BETWEEN 0 AND :k - 1
WHERE w.line BETWEEN :first AND :last
"""
_LOAD_BLOCK = 10000

# Reading through a map of the file spares `load` a copy of every page; SQLite maps no more than the file holds.
_MAPPED_BYTES = 1 << 30

_ENTRY = """u.sha256, a.k, a.utt_id, a.kind, a.probs, a.label_mass, a.attempts, a.reason, a.seed, a.created,
a.served_model, a.system_fingerprint, a.usage, a.raw"""

# By content hash and not by row number: equal answers come in equal order from every store.
_ENTRIES = f"""
SELECT {_ENTRY} FROM audio u CROSS JOIN answers a ON a.query_id = ? AND a.audio_id = u.audio_id
WHERE (u.sha256, a.k) > (?, ?) ORDER BY u.sha256, a.k LIMIT ?
"""
_FIND = f"""
SELECT {_ENTRY} FROM audio u CROSS JOIN answers a ON a.query_id = ? AND a.audio_id = u.audio_id AND a.k = ?
WHERE u.sha256 = ?
"""
_COPY = f"INSERT OR REPLACE INTO answers {_VALUES}"
_QUERIES = """
SELECT q.query_id, q.prompt_hash, q.labels, q.model, q.base_url, q.sampling, q.endpoint, q.prompt,
    COUNT(DISTINCT a.audio_id), coalesce(MAX(a.k) + 1, 0), coalesce(SUM(a.attempts), 0), MIN(a.created), MAX(a.created)
FROM queries q LEFT JOIN answers a USING (query_id) GROUP BY q.query_id ORDER BY q.query_id
"""


class StoreError(UserError):
    """A label store that cannot be opened, read or written."""


@dataclasses.dataclass(frozen=True)
class Query:
    """Everything that decides what an answer means, except the recording and the index of the sample.

    Parameters
    ----------
    prompt_hash : str
        From `Prompt.prompt_hash`.
    labels : sequence of str
        The label set, in the order of the probabilities.
    model, base_url : str
        Model name as sent to the server, and address of the API without credentials.
    sampling : mapping
        Sampling parameters sent with each request: "temperature", "seed" (of sample 0; sample k is asked with
        seed + k), and others of the API such as "top_p".
    endpoint : str, optional
        Identity of whatever answers, `base_url` by default. A server of one's own has a new port on every start: give
        it a name that follows its weights, e.g. "local:<sha256 of the checkpoint>".
    prompt : str
        The rendered question, kept for people; no part of the identity.

    Example
    -------
    >>> query = Query("0" * 64, ("angry", "sad"), "m", "http://127.0.0.1:8000/v1/", {"temperature": 1.0, "seed": 0})
    >>> query.endpoint, query.sampling_json
    ('http://127.0.0.1:8000/v1', '{"seed": 0, "temperature": 1}')
    """

    prompt_hash: str
    labels: Sequence[str]
    model: str
    base_url: str = dataclasses.field(compare=False)
    sampling: Mapping[str, object] = dataclasses.field(hash=False)
    endpoint: str | None = None
    prompt: str = dataclasses.field(default="", compare=False)

    def __post_init__(self):
        fit = {
            "prompt_hash": is_text(self.prompt_hash),
            "model": is_text(self.model),
            "base_url": is_text(self.base_url),
            "endpoint": self.endpoint is None or is_text(self.endpoint),
            "prompt": is_text(self.prompt),
            "sampling": isinstance(self.sampling, Mapping),
            "labels": isinstance(self.labels, (list, tuple)) and self.labels and all(map(is_text, self.labels)),
        }
        for name in fit:
            if not fit[name]:
                raise UserError(f"{name}: of a type or with characters that no query has")
        base_url = clean_base_url(self.base_url)
        object.__setattr__(self, "labels", tuple(self.labels))
        object.__setattr__(self, "base_url", base_url)
        object.__setattr__(self, "endpoint", self.endpoint or base_url)
        object.__setattr__(self, "sampling", {k: _plain(k, self.sampling[k]) for k in sorted(self.sampling)})

    @classmethod
    def of(cls, prompt: Prompt, model: str, base_url: str, sampling: Mapping, endpoint: str | None = None) -> Query:
        """Make the query that asks `prompt`; the other parameters as in the class."""
        text = prompt.text()
        return cls(prompt.prompt_hash(), prompt.labels, model, base_url, sampling, endpoint, text)

    @property
    def sampling_json(self) -> str:
        """Canonical JSON of the sampling parameters: sorted, whole numbers without a fraction."""
        return json.dumps(self.sampling, sort_keys=True)

    @property
    def labels_json(self) -> str:
        """JSON list of the labels."""
        return json.dumps(self.labels, ensure_ascii=False)

    @property
    def identity(self) -> tuple[str, ...]:
        """What a query is found by."""
        return self.prompt_hash, self.labels_json, self.model, self.endpoint, self.sampling_json

    @property
    def digest(self) -> str:
        """SHA-256 over the identity, the same in every store: 64 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.identity).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Record:
    """One answer on its way into the store.

    Parameters
    ----------
    audio : str
        Content hash of the recording, 64 hexadecimal digits (`utils.audio.content_hash`).
    k : int
        Index of the sample, from 0.
    utt_id : str
        Identifier of the utterance, for people.
    response : Response
        What was answered.
    """

    audio: str
    k: int
    utt_id: str
    response: Response


class Entry(NamedTuple):
    """One stored answer, with all that is kept of it."""

    audio: str
    k: int
    utt_id: str
    kind: str
    probs: tuple[float, ...] | None
    label_mass: float | None
    attempts: int
    reason: str
    seed: int | None
    created: float
    served_model: str | None
    system_fingerprint: str | None
    usage: dict | None
    raw: str

    @property
    def is_sample(self) -> bool:
        """Whether it is a prediction of the teacher."""
        return self.kind in SAMPLE_KINDS


class QuerySummary(NamedTuple):
    """One query of a store and what is stored of it.

    `counts` of answers by kind, different `recordings`, `k` samples at most, `attempts` paid for, times of the `first`
    and the `last` answer (seconds since 1970), and the tokens that usual calls and the Batch API took.
    """

    number: int
    query: Query
    counts: dict[str, int]
    recordings: int
    k: int
    attempts: int
    first: float | None
    last: float | None
    tokens: Tokens
    batch_tokens: Tokens


class Samples(NamedTuple):
    """What `LabelStore.load` returns."""

    probs: torch.Tensor  # [N, K, C] float32; zero wherever `mask` is false
    mask: torch.Tensor  # [N, K] bool: this sample exists
    kinds: torch.Tensor  # [N, K] int8: index into `KINDS`, -1 where nothing was asked yet


class LabelStore(contextlib.AbstractContextManager):
    """Answers of audio language models, keyed by recording, query and sample index.

    The file is SQLite in write-ahead-log mode with full synchronisation: when `put_many` returns, its rows survive a
    killed process and a power cut. Several processes may use one file. Close it, or use it as a context manager.

    Parameters
    ----------
    path : str or pathlib.Path
        Created if missing; its folder must exist.
    read_only : bool
        Never write, so that neither the file nor its folder needs to be writable and no writer is waited for.

    Example
    -------
    >>> import tempfile
    >>> from speechbrain_mifuse.lalm.answer import Answer
    >>> query = Query("0" * 64, ("angry", "sad"), "m", "http://127.0.0.1/v1", {"temperature": 1})
    >>> with LabelStore(tempfile.mkdtemp() + "/labels.sqlite") as store:
    ...     store.put_many(query, [Record("ab" * 32, 0, "u1", Response(Answer("distribution", (0.75, 0.25)), "{}"))])
    ...     probs, mask, kinds = store.load(query, ["ab" * 32, "cd" * 32], 2)
    >>> probs[0, 0].tolist(), mask.tolist(), kinds[0].tolist()
    ([0.75, 0.25], [[True, False], [False, False]], [0, -1])
    """

    def __init__(self, path: str | Path, read_only: bool = False):
        self.path, self.read_only = Path(path), read_only
        self._lock = threading.Lock()
        journal = foreign_journal(path)
        if journal is not None:
            raise StoreError(
                f"{journal}: names another file for SQLite to delete, which no label store of ours does. Remove it, "
                "and check the store with `speechbrain-mifuse labels check`."
            )
        name = self._read_only_address() if read_only else self.path
        try:
            self._db = sqlite3.connect(
                name, timeout=SILENT_SECONDS, isolation_level=None, check_same_thread=False, uri=read_only
            )
        except sqlite3.Error as error:
            raise self._error(error, "Name a label store.") from None
        try:
            self._prepare()
        except BaseException:
            self._db.close()
            raise

    @classmethod
    def existing(cls, path: str | Path, read_only: bool = False) -> LabelStore:
        """Open a store that must exist."""
        if not Path(path).is_file():
            raise StoreError(f"label store {path}: no such file. Name one that a collection or an import has written.")
        return cls(path, read_only)

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Close the file. Closing twice is harmless."""
        self._db.close()

    def put_many(self, query: Query, records: Iterable[Record]):
        """Write answers in one transaction; on disk when this returns.

        A stored sample is never replaced. A rejected answer is, and counts as one more attempt.

        Parameters
        ----------
        query : Query
            What was asked.
        records : iterable of Record
            The answers.

        Raises
        ------
        StoreError
            If the file cannot be written, or a sample has not one probability for each label.
        """
        records, now = list(records), time.time()
        with self._transaction():
            number = self._query_id(query, create=True)
            hashes = {bytes.fromhex(record.audio) for record in records}
            self._db.executemany(
                "INSERT INTO audio (sha256) VALUES (?) ON CONFLICT DO NOTHING", ((digest,) for digest in hashes)
            )
            self._db.executemany(_PUT, (_row(number, len(query.labels), _entry_of(record, now)) for record in records))

    def have(self, query: Query) -> set[tuple[str, int]]:
        """Return the pairs (audio hash, sample index) of all stored samples; refused and invalid answers are none."""
        return {(digest.hex(), k) for digest, k, _ in self._answers(query, "sample")}

    def rejected(self, query: Query) -> dict[tuple[str, int], int]:
        """Count the attempts of each (audio hash, sample index) that was only refused or answered unusably."""
        return {(digest.hex(), k): attempts for digest, k, attempts in self._answers(query, "rejected")}

    def rejections(self, query: Query) -> list[tuple[str, str, int, str]]:
        """Count the reasons why answers are no samples, the commonest first."""
        return self._of_query(
            "SELECT kind, reason, COUNT(*), MIN(raw) FROM answers WHERE query_id = ? AND status = 'rejected' "
            "GROUP BY kind, reason ORDER BY COUNT(*) DESC, kind, reason",
            query,
        )

    def load(self, query: Query, audio_hashes: Sequence[str], k: int) -> Samples:
        """Read the first `k` samples of each of N recordings.

        Parameters
        ----------
        query : Query
            What was asked.
        audio_hashes : sequence of str
            `[N]`, content hashes; repeats are allowed.
        k : int
            K.

        Returns
        -------
        Samples
            `probs` `[N, K, C]`, `mask` `[N, K]` and `kinds` `[N, K]`; what is not stored is masked out.

        Raises
        ------
        StoreError
            If the file cannot be read.
        """
        shape = (len(audio_hashes), k)
        samples = Samples(
            torch.zeros(*shape, len(query.labels)),
            torch.zeros(shape, dtype=torch.bool),
            torch.full(shape, -1, dtype=torch.int8),
        )
        with self._reading():
            self._want(audio_hashes)
            wanted = {"query": self._query_id(query), "k": k}
            for first in range(1, len(audio_hashes) + 1, _LOAD_BLOCK):
                block = {**wanted, "first": first, "last": first + _LOAD_BLOCK - 1}
                try:
                    _fill(samples, *self._db.execute(_LOAD, block).fetchone())
                except UNREADABLE as error:
                    raise self._unreadable("an answer", error) from None
        return samples

    def counts(self, query: Query) -> dict[str, int]:
        """Count the stored answers of each kind in `KINDS`."""
        rows = self._of_query("SELECT kind, COUNT(*) FROM answers WHERE query_id = ? GROUP BY kind", query)
        return {**dict.fromkeys(KINDS, 0), **dict(rows)}

    def queries(self) -> list[QuerySummary]:
        """List what was asked, with counts, refusals and tokens."""
        counts: dict[int, dict[str, int]] = {}
        for number, kind, count in self.read("SELECT query_id, kind, COUNT(*) FROM answers GROUP BY query_id, kind"):
            counts.setdefault(number, dict.fromkeys(KINDS, 0))[kind] = count
        rows = self.read(_QUERIES)
        try:
            bills = self._bills()
            return [
                QuerySummary(
                    number,
                    Query(prompt_hash, json.loads(labels), model, base_url, json.loads(sampling), endpoint, prompt),
                    counts.get(number, dict.fromkeys(KINDS, 0)),
                    *_usual(*rest),
                    *(bills.get((number, batch), NO_TOKENS) for batch in (False, True)),
                )
                for number, prompt_hash, labels, model, base_url, sampling, endpoint, prompt, *rest in rows
            ]
        except StoreError:
            raise
        except (UserError, *UNREADABLE) as error:
            raise self._unreadable("a query", error) from None

    def recordings(self, query: Query) -> dict[str, str]:
        """Content hashes by utterance id, of all utterances that a query was asked for."""
        rows = self._of_query(
            "SELECT DISTINCT a.utt_id, lower(hex(u.sha256)) FROM answers a JOIN audio u USING (audio_id) "
            "WHERE a.query_id = ? AND a.utt_id <> ''",
            query,
        )
        return dict(rows)

    def entries(self, query: Query) -> Iterator[Entry]:
        """Read all answers of a query, whatever their kind, without holding them in memory."""
        last: tuple[bytes, int] = (b"", -1)
        while rows := self._of_query(_ENTRIES, query, *last, _LOAD_BLOCK):
            yield from map(self._decoded, rows)
            last = rows[-1][:2]

    def _decoded(self, row: tuple) -> Entry:
        digest, k, utt_id, kind, probs, *middle, usage, raw = row
        try:
            values = None if probs is None else tuple(np.frombuffer(probs, dtype="<f4").tolist())
            used = None if usage is None else json.loads(usage)
            return Entry(digest.hex(), k, utt_id, kind, values, *middle, used, raw)
        except UNREADABLE as error:
            raise self._unreadable("an answer", error) from None

    def _unreadable(self, what: str, error: Exception) -> StoreError:
        return StoreError(
            f"label store {self.path}: {what} cannot be read ({error}). Restore the file from a copy; "
            "`speechbrain-mifuse labels check` names what is damaged."
        )

    @contextlib.contextmanager
    def copying(self) -> Iterator[Callable[[Query, Entry], str]]:
        """Take over answers of another store: all of them when the block ends, none if it raises.

        The callable takes a query and an entry, and returns "new" (stored, where there was none or a rejected one),
        "same" (the store has it, or a sample where this one is rejected), or "conflict" (another sample, which stays).
        """
        numbers: dict[Query, int] = {}

        def copy(query: Query, entry: Entry) -> str:
            if query not in numbers:
                numbers[query] = self._query_id(query, create=True)
            return self._copy(numbers[query], len(query.labels), entry)

        with self._transaction():
            yield copy

    def read(self, statement: str, parameters: Sequence = ()) -> list[tuple]:
        """Run one reading SQL statement."""
        with self._reading():
            return self._db.execute(statement, parameters).fetchall()

    def _of_query(self, statement: str, query: Query, *parameters) -> list[tuple]:
        with self._reading():
            return self._db.execute(statement, (self._query_id(query), *parameters)).fetchall()

    def _copy(self, number: int, classes: int, entry: Entry) -> str:
        digest = bytes.fromhex(entry.audio)
        found = self._db.execute(_FIND, (number, entry.k, digest)).fetchone()
        if found is not None:
            stored = self._decoded(found)
            if stored.is_sample:
                return "conflict" if entry.is_sample and _said(entry) != _said(stored) else "same"
            if not entry.is_sample and _newness(entry) <= _newness(stored):
                return "same"
        self._db.execute("INSERT INTO audio (sha256) VALUES (?) ON CONFLICT DO NOTHING", (digest,))
        self._db.execute(_COPY, _row(number, classes, entry))
        return "new"

    def _bills(self) -> dict[tuple[int, bool], Tokens]:
        """Tokens by query number, and whether the Batch API brought them."""
        bills: dict[tuple[int, bool], Tokens] = {}
        for number, text in self.read("SELECT query_id, usage FROM answers WHERE usage IS NOT NULL"):
            usage = json.loads(text)
            while usage:
                key = (number, "batch" in usage)
                bills[key] = bills.get(key, NO_TOKENS).plus(used_tokens(usage) or NO_TOKENS)
                usage = usage.get("replaced")
        return bills

    def _prepare(self):
        try:
            (version,) = self._patiently("PRAGMA user_version").fetchone()
            (tables,) = self._db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
            if version != SCHEMA_VERSION and (version or tables):
                raise StoreError(
                    f"{self.path}: not a label store of schema version {SCHEMA_VERSION} (found {version}). "
                    "Name another file, or open it with the version of speechbrain_mifuse that wrote it."
                )
            other = other_schema(self._db, [*filter(str.strip, _SCHEMA.split(";"))]) if version else None
            if other is not None:
                raise StoreError(f"{self.path}: no label store ({other}). Name another file.")
            self._db.execute("PRAGMA temp_store = MEMORY")
            self._db.execute(f"PRAGMA mmap_size = {_MAPPED_BYTES}")
            if self.read_only and not version:
                raise StoreError(f"{self.path}: an empty file. Name a label store.")
            if not self.read_only:
                self._patiently("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA synchronous = FULL")
            if not version:
                self._create()
        except sqlite3.Error as error:
            raise self._error(error, "Name a new file or a label store.") from None

    def _create(self):
        with self._transaction():
            # Another process may have created the tables since the version was read.
            if self._db.execute("PRAGMA user_version").fetchone() == (0,):
                for statement in filter(str.strip, _SCHEMA.split(";")):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _query_id(self, query: Query, create: bool = False) -> int | None:
        columns = "prompt_hash, labels, model, endpoint, sampling"
        if create:
            self._db.execute(
                f"INSERT INTO queries ({columns}, base_url, prompt, created) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (*query.identity, query.base_url, query.prompt, time.time()),
            )
        found = f"SELECT query_id FROM queries WHERE ({columns}) = (?, ?, ?, ?, ?)"
        (number,) = self._db.execute(found, query.identity).fetchone() or (None,)
        return number

    def _answers(self, query: Query, status: str) -> list[tuple[bytes, int, int]]:
        return self._of_query(
            "SELECT u.sha256, a.k, a.attempts FROM answers a JOIN audio u USING (audio_id) "
            "WHERE a.query_id = ? AND a.status = ?",
            *(query, status),
        )

    def _want(self, audio_hashes: Sequence[str]):
        for statement in _TEMPORARY:
            self._db.execute(statement)
        digests = (bytes.fromhex(digest) for digest in audio_hashes)
        self._db.executemany("INSERT INTO temp.asked VALUES (?, ?)", enumerate(digests))
        self._db.execute(_WANT)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        # One snapshot for all statements of a read, and one commit for the temporary table.
        with self._lock:
            try:
                self._db.execute("BEGIN")
                self._patiently("SELECT COUNT(*) FROM sqlite_master")
                yield
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                raise self._error(error, "Check the disk, or restore the file from a copy.") from None
            finally:
                self._roll_back()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            try:
                self._patiently("BEGIN IMMEDIATE")
                yield
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                raise self._error(error, NOT_WRITTEN) from None
            finally:
                self._roll_back()

    def _roll_back(self):
        if self._db.in_transaction:
            with contextlib.suppress(sqlite3.Error):  # of a damaged file; what went wrong is on its way already
                self._db.execute("ROLLBACK")

    def _patiently(self, statement: str) -> sqlite3.Cursor:
        """Run a statement that a lock of another process may delay, and say so before waiting long."""
        start, told = time.monotonic(), False
        while True:
            try:
                return self._db.execute(statement)
            except sqlite3.OperationalError as error:
                if not _is_locked(error) or time.monotonic() - start >= LOCK_SECONDS:
                    raise
            if not told:
                logger.warning("label store %s: locked by another process, waiting up to %g s", self.path, LOCK_SECONDS)
            told = True

    def _read_only_address(self) -> str:
        """Address for SQLite by which it needs to create nothing, if it could not."""
        address = self.path.resolve().as_uri()
        if os.access(self.path.parent, os.W_OK):
            return f"{address}?mode=rw"  # closing it leaves no files behind, as mode=ro would
        log, index = (self.path.with_name(self.path.name + ending) for ending in ("-wal", "-shm"))
        if not (log.exists() and log.stat().st_size):
            return f"{address}?immutable=1"
        if not index.exists():
            raise StoreError(
                f"label store {self.path}: answers in {log.name} cannot be read in a folder that is read-only. "
                "Copy both files to another folder."
            )
        return f"{address}?mode=ro"

    def _error(self, error: sqlite3.Error, remedy: str) -> StoreError:
        if _is_locked(error):
            remedy = (
                f"Another process, such as a collection, an import or a merge, held its lock for {LOCK_SECONDS:g} s: "
                "wait until it has ended, or stop it."
            )
        elif any(words in str(error) for words in ("unable to open", "readonly")):
            remedy = "Check that its folder exists and that both are writable (permissions, a read-only mount)."
        return StoreError(f"label store {self.path}: {error}. {remedy}")


def _usual(recordings: int, k: int, attempts: int, first: float | None, last: float | None) -> tuple:
    """Check what a store says of a query: no program of ours leaves other numbers."""
    if not (isinstance(k, int) and 0 <= k <= MAX_SAMPLES):
        raise ValueError(f"a sample index that is not from 0 to {MAX_SAMPLES - 1}")
    if not isinstance(attempts, int):
        raise ValueError("a number of attempts that is none")
    if not all(time is None or (is_number(time) and 0 <= time < MAX_TIME) for time in (first, last)):
        raise ValueError("a time that is none")
    return recordings, k, attempts, first, last


def is_text(value: object) -> bool:
    """Whether a value is text that can be stored."""
    return isinstance(value, str) and encodable(value)


def _is_locked(error: sqlite3.Error) -> bool:
    return "locked" in str(error)


def clean_base_url(base_url: str) -> str:
    """Check an API address and drop its trailing slash."""
    try:
        parts = urllib.parse.urlsplit(base_url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or True)
    except ValueError:
        usable = False
    if not usable:
        raise UserError("--lalm_base_url must be an address such as http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError(
            "--lalm_base_url must not carry a user name, password or query string: put the key into the environment "
            "variable OPENAI_API_KEY"
        )
    return base_url.rstrip("/")


def is_loopback(base_url: str) -> bool:
    """Whether an address names this machine."""
    host = urllib.parse.urlsplit(base_url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _plain(name: str, value: object) -> object:
    """Return a sampling parameter as JSON gives it back, with 1.0 and 1 alike."""
    if isinstance(value, float):
        if not math.isfinite(value):
            raise UserError(f"sampling parameter {name} must be finite, not {value}")
        return int(value) if value.is_integer() else value
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        raise UserError(f"sampling parameter {name} must be a JSON value, not {value!r}") from None


def _entry_of(record: Record, now: float) -> Entry:
    response, answer = record.response, record.response.answer
    return Entry(
        *(record.audio, record.k, record.utt_id, answer.kind, answer.probs, answer.label_mass, 1, answer.reason),
        *(response.seed, now, response.served_model, response.system_fingerprint, response.usage, response.raw),
    )


def _row(number: int, classes: int, entry: Entry) -> tuple:
    if entry.is_sample and len(entry.probs or ()) != classes:
        raise StoreError(
            f"{entry.utt_id}: recording {entry.audio}, sample {entry.k}: an answer with {len(entry.probs or ())} "
            f"probabilities for {classes} labels"
        )
    probs = np.asarray(entry.probs, dtype="<f4").tobytes() if entry.is_sample else None
    status = "sample" if entry.is_sample else "rejected"
    usage = json.dumps(entry.usage) if entry.usage else None
    return (
        *(number, bytes.fromhex(entry.audio), entry.k, entry.kind, probs, entry.label_mass, status, entry.attempts),
        *(entry.reason, entry.seed, entry.created, entry.served_model, entry.system_fingerprint, usage),
        *(entry.utt_id, entry.raw),
    )


def _said(entry: Entry) -> tuple:
    """Give what training reads of a sample."""
    return entry.kind, np.asarray(entry.probs, dtype="<f4").tobytes()


def _newness(entry: Entry) -> tuple:
    """Of two rejected answers the greater one is kept, whichever comes first."""
    return entry.attempts, entry.created, entry.raw


def _fill(samples: Samples, places: str | None, probs_hex: str | None):
    """Scatter one block into the tensors: place and kind of all its rows, and the probabilities of its samples."""
    place, code = np.divmod(np.array((places or "").split(), dtype=np.int64), len(KINDS))
    good = code < len(SAMPLE_KINDS)
    probs, mask, kinds = (tensor.numpy() for tensor in samples)
    kinds.reshape(-1)[place], mask.reshape(-1)[place] = code, good
    values = np.frombuffer(bytes.fromhex(probs_hex or ""), dtype="<f4").reshape(-1, probs.shape[2])
    if no_distribution(values).any():
        raise ValueError("probabilities that are negative, not finite, or do not sum to 1")
    probs.reshape(-1, probs.shape[2])[place[good]] = values


def no_distribution(probs: np.ndarray) -> np.ndarray:
    """Which rows of `[N, C]` are no distribution."""
    with np.errstate(invalid="ignore", over="ignore"):
        return ~((probs >= 0).all(1) & (np.abs(probs.sum(1, dtype=np.float64) - 1) <= SUM_TOLERANCE))
