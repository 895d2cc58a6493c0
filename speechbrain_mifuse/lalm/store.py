"""A file that remembers every answer of the teacher: one SQLite database, safe to kill, resumed and topped up."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sqlite3
import threading
import time
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from speechbrain_mifuse.errors import UserError
from speechbrain_mifuse.lalm.answer import KINDS, SAMPLE_KINDS, Response
from speechbrain_mifuse.lalm.prompt import Prompt

SCHEMA_VERSION = 1

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

# A sample is never overwritten: what training has read once stays true. A rejected answer makes room for its retry.
_PUT = """
INSERT INTO answers VALUES (?, (SELECT audio_id FROM audio WHERE sha256 = ?), ?, ?, ?, ?, ?, 1, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT DO UPDATE SET
    kind = excluded.kind, probs = excluded.probs, label_mass = excluded.label_mass, status = excluded.status,
    attempts = answers.attempts + 1, reason = excluded.reason, seed = excluded.seed, created = excluded.created,
    served_model = excluded.served_model, system_fingerprint = excluded.system_fingerprint, usage = excluded.usage,
    utt_id = excluded.utt_id, raw = excluded.raw
WHERE answers.status = 'rejected'
"""

# CROSS JOIN fixes the order of the loops: few wanted recordings cost few look-ups, however large the store. SQLite
# itself joins the rows of a block into two strings, because a million Python tuples would take longer than the scan.
_CODE = " ".join(f"WHEN '{kind}' THEN {code}" for code, kind in enumerate(KINDS))
_LOAD = f"""
SELECT group_concat(w.position || ' ' || a.k || ' ' || CASE a.kind {_CODE} END, ' '), group_concat(hex(a.probs), '')
FROM temp.wanted w
CROSS JOIN audio u ON u.sha256 = w.sha256
CROSS JOIN answers a ON a.query_id = ? AND a.audio_id = u.audio_id AND a.k < ?
WHERE w.position BETWEEN ? AND ?
"""
_LOAD_BLOCK = 10000


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
    model : str
        Model name as sent to the server.
    base_url : str
        Address of the API, without credentials.
    sampling : mapping
        Sampling parameters sent with each request: "temperature", "seed" (of sample 0; sample k is asked with
        seed + k), and others of the API such as "top_p".
    endpoint : str, optional
        Identity of whatever answers, `base_url` by default. A server of one's own has a new port on every start: give
        it a name that follows its weights, e.g. "local:<sha256 of the checkpoint>".
    prompt : str
        The rendered question, kept for people; no part of the identity.

    Raises
    ------
    UserError
        If `base_url` carries credentials or a sampling parameter is no finite JSON value.

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


@dataclasses.dataclass(frozen=True)
class Record:
    """One answer on its way into the store.

    Attributes
    ----------
    audio : str
        `content_hash` of the recording at 16 kHz: 64 hexadecimal digits.
    k : int
        Index of the sample, from 0.
    utt_id : str
        Utterance that the recording was asked for, for provenance only.
    response : Response
        The parsed reply with its provenance.

    Example
    -------
    >>> from speechbrain_mifuse.lalm.answer import Answer
    >>> Record("0" * 64, 0, "iem-1", Response(Answer("invalid", reason="empty reply"), "{}")).k
    0
    """

    audio: str
    k: int
    utt_id: str
    response: Response


class Samples(NamedTuple):
    """What `LabelStore.load` returns.

    Attributes
    ----------
    probs : torch.Tensor
        `[N, K, C]` float32; zero wherever `mask` is false.
    mask : torch.Tensor
        `[N, K]` bool: this sample exists.
    kinds : torch.Tensor
        `[N, K]` int8: index into `KINDS`, -1 where nothing was asked yet.
    """

    probs: torch.Tensor
    mask: torch.Tensor
    kinds: torch.Tensor


class LabelStore:
    """Answers of audio language models, keyed by recording, query and sample index.

    The file is SQLite in write-ahead-log mode with full synchronisation: when `put_many` returns, its rows survive a
    killed process and a power cut. Several processes may use one file. Close it, or use it as a context manager.

    Parameters
    ----------
    path : str or pathlib.Path
        Created if missing; its folder must exist.

    Raises
    ------
    StoreError
        If the file is no label store, or one of another schema version, or cannot be opened.

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

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._lock = threading.Lock()
        try:
            self._db = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise self._error(error, "Check that its folder exists and is writable.") from None
        try:
            self._prepare()
        except BaseException:
            self._db.close()
            raise

    def __enter__(self) -> LabelStore:
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Close the file. Closing twice is harmless."""
        self._db.close()

    def put_many(self, query: Query, records: Iterable[Record]):
        """Write answers in one transaction; on disk when this returns.

        A sample that is already stored is kept. A refused or invalid answer is replaced and its attempts are counted.

        Parameters
        ----------
        query : Query
            What was asked.
        records : iterable of Record
            Answers to it.

        Raises
        ------
        StoreError
            If the disk is full, the file is read-only, or a record does not fit the label set.
        """
        records, now = list(records), time.time()
        with self._transaction():
            number = self._query_id(query, create=True)
            hashes = {bytes.fromhex(record.audio) for record in records}
            self._db.executemany(
                "INSERT INTO audio (sha256) VALUES (?) ON CONFLICT DO NOTHING", ((digest,) for digest in hashes)
            )
            self._db.executemany(_PUT, (_row(number, record, len(query.labels), now) for record in records))

    def have(self, query: Query) -> set[tuple[str, int]]:
        """Return the pairs (audio hash, sample index) of all stored samples; refused and invalid answers are none."""
        rows = self._answers(query, "sample")
        return {(digest.hex(), k) for digest, k, _ in rows}

    def rejected(self, query: Query) -> dict[tuple[str, int], int]:
        """Count the attempts of each (audio hash, sample index) that was only refused or answered unusably."""
        rows = self._answers(query, "rejected")
        return {(digest.hex(), k): attempts for digest, k, attempts in rows}

    def load(self, query: Query, audio_hashes: Sequence[str], k: int) -> Samples:
        """Read the first `k` samples of each recording.

        Parameters
        ----------
        query : Query
            What was asked.
        audio_hashes : sequence of str
            N audio hashes in the order wanted; repeats are allowed.
        k : int
            Number of samples per recording.

        Returns
        -------
        Samples
            `probs [N, k, C]`, `mask [N, k]`, `kinds [N, k]`. What was refused, invalid or never asked has a false mask.
        """
        shape = (len(audio_hashes), k)
        samples = Samples(
            torch.zeros(*shape, len(query.labels)),
            torch.zeros(shape, dtype=torch.bool),
            torch.full(shape, -1, dtype=torch.int8),
        )
        with self._reading():
            self._want(audio_hashes)
            number = self._query_id(query)
            for first in range(0, len(audio_hashes), _LOAD_BLOCK):
                block = (number, k, first, first + _LOAD_BLOCK - 1)
                _fill(samples, *self._db.execute(_LOAD, block).fetchone())
        return samples

    def counts(self, query: Query) -> dict[str, int]:
        """Count the stored answers of each kind in `KINDS`."""
        counts = dict.fromkeys(KINDS, 0)
        statement = "SELECT kind, COUNT(*) FROM answers WHERE query_id = ? GROUP BY kind"
        with self._reading():
            counts.update(self._db.execute(statement, (self._query_id(query),)))
        return counts

    def _prepare(self):
        try:
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            (tables,) = self._db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
            if version != SCHEMA_VERSION and (version or tables):
                raise StoreError(
                    f"{self.path}: not a label store of schema version {SCHEMA_VERSION} (found {version}). "
                    "Name another file, or open it with the version of speechbrain_mifuse that wrote it."
                )
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA temp_store = MEMORY")
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
        key = (query.prompt_hash, query.labels_json, query.model, query.endpoint, query.sampling_json)
        if create:
            self._db.execute(
                "INSERT INTO queries (prompt_hash, labels, model, endpoint, sampling, base_url, prompt, created) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (*key, query.base_url, query.prompt, time.time()),
            )
        found = self._db.execute(
            "SELECT query_id FROM queries WHERE (prompt_hash, labels, model, endpoint, sampling) = (?, ?, ?, ?, ?)", key
        ).fetchone()
        return found[0] if found else None

    def _answers(self, query: Query, status: str) -> list[tuple[bytes, int, int]]:
        with self._reading():
            return self._db.execute(
                "SELECT u.sha256, a.k, a.attempts FROM answers a JOIN audio u USING (audio_id) "
                "WHERE a.query_id = ? AND a.status = ?",
                (self._query_id(query), status),
            ).fetchall()

    def _want(self, audio_hashes: Sequence[str]):
        self._db.execute("CREATE TEMP TABLE IF NOT EXISTS wanted (position INTEGER PRIMARY KEY, sha256 BLOB)")
        self._db.execute("DELETE FROM temp.wanted")
        digests = (bytes.fromhex(digest) for digest in audio_hashes)
        self._db.executemany("INSERT INTO temp.wanted VALUES (?, ?)", enumerate(digests))

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        # One snapshot for all statements of a read, and one commit for the temporary table.
        with self._lock:
            try:
                self._db.execute("BEGIN")
                yield
            except sqlite3.Error as error:
                raise self._error(error, "Check the disk, or restore the file from a copy.") from None
            finally:
                if self._db.in_transaction:
                    self._db.execute("COMMIT")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                raise self._error(error, "Check free space and permissions of its folder.") from None
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    def _error(self, error: sqlite3.Error, remedy: str) -> StoreError:
        return StoreError(f"label store {self.path}: {error}. {remedy}")


def clean_base_url(base_url: str) -> str:
    """Check an API address and drop its trailing slash.

    Parameters
    ----------
    base_url : str
        For example "https://api.openai.com/v1".

    Returns
    -------
    str

    Raises
    ------
    UserError
        If it is no http(s) address, or carries a user name, password or query, where a secret could hide. The message
        does not repeat the address then.

    Example
    -------
    >>> clean_base_url("http://localhost:8000/v1/")
    'http://localhost:8000/v1'
    """
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


def _row(number: int, record: Record, classes: int, now: float) -> tuple:
    response, answer = record.response, record.response.answer
    if answer.is_sample and len(answer.probs or ()) != classes:
        raise StoreError(
            f"{record.utt_id}: an answer with {len(answer.probs or ())} probabilities for {classes} labels"
        )
    probs = np.asarray(answer.probs, dtype="<f4").tobytes() if answer.is_sample else None
    status = "sample" if answer.is_sample else "rejected"
    usage = json.dumps(response.usage) if response.usage else None
    return (
        *(number, bytes.fromhex(record.audio), record.k, answer.kind, probs, answer.label_mass, status, answer.reason),
        *(response.seed, now, response.served_model, response.system_fingerprint, usage, record.utt_id, response.raw),
    )


def _fill(samples: Samples, indices: str | None, probs_hex: str | None):
    """Scatter one block into the tensors: "position k kind" of all its rows, and the probabilities of its samples."""
    position, k, code = np.array((indices or "").split(), dtype=np.int64).reshape(-1, 3).T
    good = code < len(SAMPLE_KINDS)
    probs, mask, kinds = (tensor.numpy() for tensor in samples)
    kinds[position, k], mask[position, k] = code, good
    values = np.frombuffer(bytes.fromhex(probs_hex or ""), dtype="<f4")
    probs[position[good], k[good]] = values.reshape(-1, probs.shape[2])
