"""Does a label store hold what it should: SQLite's own check, and what this package promises about every row."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

import numpy as np

from speechbrain_mifuse.lalm.answer import KINDS, SAMPLE_KINDS
from speechbrain_mifuse.lalm.store import (
    MAX_SAMPLES,
    MAX_TIME,
    UNREADABLE,
    LabelStore,
    Query,
    StoreError,
    no_distribution,
)
from speechbrain_mifuse.utils.errors import UserError

_SAMPLES = ", ".join(f"'{kind}'" for kind in SAMPLE_KINDS)
_ALL = ", ".join(f"'{kind}'" for kind in KINDS)

# What must not be found, as a condition on a row of `answers`.
_WRONG_ROWS = {
    f"is of no known kind ({', '.join(KINDS)})": f"kind NOT IN ({_ALL})",
    "is a sample by its status and none by its kind, or the reverse": f"(status = 'sample') <> (kind IN ({_SAMPLES}))",
    "is a sample without probabilities": "status = 'sample' AND probs IS NULL",
    "is rejected and has probabilities": "status = 'rejected' AND probs IS NOT NULL",
    f"has a sample index that is not from 0 to {MAX_SAMPLES - 1}": (
        f"typeof(k) <> 'integer' OR k NOT BETWEEN 0 AND {MAX_SAMPLES - 1}"
    ),
    "was stored without an attempt": "typeof(attempts) <> 'integer' OR attempts < 1",
    "has a time that is none": f"typeof(created) NOT IN ('real', 'integer') OR created NOT BETWEEN 0 AND {MAX_TIME}",
    "holds other things than text where text belongs": (
        "typeof(utt_id) <> 'text' OR typeof(reason) <> 'text' OR typeof(raw) <> 'text'"
    ),
    "has a label mass outside of 0 to 1": "label_mass NOT BETWEEN 0 AND 1",
    "has a reply or usage that is no JSON": "NOT json_valid(raw) OR NOT json_valid(coalesce(usage, '{}'))",
    "belongs to a query that does not exist": "query_id NOT IN (SELECT query_id FROM queries)",
    "belongs to a recording that does not exist": "audio_id NOT IN (SELECT audio_id FROM audio)",
    "belongs to a recording whose content hash is no SHA-256": (
        "audio_id IN (SELECT audio_id FROM audio WHERE typeof(sha256) <> 'blob' OR length(sha256) <> 32)"
    ),
}
_GAPS = """
SELECT query_id, COUNT(*), SUM(missing) FROM (
    SELECT query_id, MAX(k) + 1 - COUNT(*) AS missing FROM answers GROUP BY query_id, audio_id HAVING missing > 0
) GROUP BY query_id
"""
_BLOCK = 100000


@dataclasses.dataclass
class Findings:
    """What `check` found: `problems`, and `notes` on what is unusual and sound."""

    problems: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def summary(self) -> str:
        """All of it, one finding a line."""
        verdict = [f"problem: {problem}" for problem in self.problems] or ["sound"]
        return "\n".join(verdict + [f"note: {note}" for note in self.notes])


def check(store: LabelStore) -> Findings:
    """Check a store: SQLite's own check of its pages, then what every row must be.

    Parameters
    ----------
    store : LabelStore
        May be open for reading only; nothing is changed.

    Returns
    -------
    Findings
        With one line for each kind of problem; a store that cannot be read is one, too.

    Example
    -------
    >>> import tempfile
    >>> with LabelStore(tempfile.mkdtemp() + "/labels.sqlite") as store:
    ...     check(store).summary()
    'sound'
    """
    try:
        pages = [row[0] for row in store.read("PRAGMA integrity_check") if row[0] != "ok"]
        if pages:  # the rows of a damaged file say nothing
            return Findings([f"SQLite: {message}" for message in pages])
        notes = [
            f"query {number}: {recordings} recordings lack {missing} samples below their greatest index"
            for number, recordings, missing in store.read(_GAPS)
        ]
        return Findings([*_wrong_queries(store), *_wrong_rows(store), *_wrong_probabilities(store)], notes)
    except StoreError as error:
        return Findings([str(error)])


def _wrong_queries(store: LabelStore) -> Iterator[str]:
    rows = store.read("SELECT query_id, prompt_hash, labels, model, base_url, sampling, endpoint FROM queries")
    for number, prompt_hash, labels, model, base_url, sampling, endpoint in rows:
        try:
            query = Query(prompt_hash, json.loads(labels), model, base_url, json.loads(sampling), endpoint)
            found = (query.labels_json, query.sampling_json)
        except (UserError, *UNREADABLE) as error:
            yield f"query {number}: cannot be read ({error})"
            continue
        if found != (labels, sampling):
            yield f"query {number}: labels or sampling are not in their canonical form, so it is never found again"


def _wrong_rows(store: LabelStore) -> Iterator[str]:
    for what, condition in _WRONG_ROWS.items():
        wrong = f"FROM answers WHERE {condition}"
        ((count,),) = store.read(f"SELECT COUNT(*) {wrong}")
        if count:
            first = store.read(f"SELECT query_id, audio_id, k {wrong} ORDER BY query_id, audio_id, k LIMIT 1")[0]
            yield _place(store, *first) + what + _others(count)


def _wrong_probabilities(store: LabelStore) -> Iterator[str]:
    labels = store.read("SELECT query_id, json_array_length(labels) FROM queries WHERE json_valid(labels)")
    for number, classes in labels:
        wrong = f"FROM answers WHERE query_id = {number} AND probs IS NOT NULL AND length(probs) <> {4 * classes}"
        for count, audio_id, k in store.read(f"SELECT COUNT(*), audio_id, k {wrong} HAVING COUNT(*)"):
            yield f"{_place(store, number, audio_id, k)}has not {classes} probabilities{_others(count)}"
        bad = [key for rows, probs in _blocks(store, number, classes) for key in rows[no_distribution(probs)].tolist()]
        if bad:
            place = _place(store, number, *bad[0])
            yield f"{place}has probabilities that are negative, not finite, or do not sum to 1{_others(len(bad))}"


def _blocks(store: LabelStore, number: int, classes: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Read recording and index `[N, 2]`, and probabilities `[N, C]`, of rows that have as many as they should."""
    last: tuple[int, int] = (-1, -1)
    while rows := store.read(
        "SELECT audio_id, k, probs FROM answers WHERE query_id = ? AND (audio_id, k) > (?, ?) AND length(probs) = ? "
        "ORDER BY audio_id, k LIMIT ?",
        (number, *last, 4 * classes, _BLOCK),
    ):
        last = rows[-1][:2]
        values = np.frombuffer(b"".join(row[2] for row in rows), dtype="<f4")
        yield np.array([row[:2] for row in rows]), values.reshape(-1, classes)


def _place(store: LabelStore, number: int, audio_id: int, k: int) -> str:
    found = store.read("SELECT hex(sha256) FROM audio WHERE audio_id = ?", (audio_id,))
    audio = found[0][0].lower() if found else f"number {audio_id}"
    return f"query {number}, recording {audio}, sample {k}: "


def _others(count: int) -> str:
    return f" (and {count - 1} more)" if count > 1 else ""
