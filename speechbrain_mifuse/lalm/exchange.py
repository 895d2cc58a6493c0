"""Answers on the move: export without audio, import, merge. What was paid for on one machine trains on another.

An export is JSON lines, gzip-compressed if its name ends in ``.gz``:

- a header, ``{"format", "version", "written_by", "queries": {id: {labels, model, endpoint, prompt, sampling, ...}}}``,
- one line per answer, whatever its kind: the query's id, the content hash of the recording, the sample index, the
  distribution, and where it came from (served model, time, tokens, seed, the reply itself),
- a last line, ``{"answers": N}``, without which the file counts as cut off.

Probabilities are written so that the same float32 values come back: an import trains bit for bit as its origin does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from speechbrain_mifuse import __version__
from speechbrain_mifuse.lalm.answer import KINDS, SAMPLE_KINDS
from speechbrain_mifuse.lalm.profile import is_number
from speechbrain_mifuse.lalm.redaction import redactor
from speechbrain_mifuse.lalm.store import (
    MAX_SAMPLES,
    MAX_TIME,
    SUM_TOLERANCE,
    Entry,
    LabelStore,
    Query,
    StoreError,
    is_text,
)
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.files import replacing, strict_object
from speechbrain_mifuse.utils.progress import progress
from speechbrain_mifuse.utils.texts import first_of

FORMAT = "speechbrain-mifuse labels"
VERSION = 1

# Bytes of a line: an answer has a few thousand, and its reply up to 2**18 characters.
MAX_LINE_BYTES = 32 * 2**20
# Of attempts, whose sum over a store must not leave 64 bits.
MAX_COUNT = 2**31
# So many digits of a query's digest tell the queries of a file apart.
ID_DIGITS = 16


@dataclasses.dataclass
class Taken:
    """What an import or a merge did: answers that are new, that were there, and that another sample stands against."""

    new: int = 0
    same: int = 0
    conflicts: list[str] = dataclasses.field(default_factory=list)

    def count(self, outcome: str, entry: str) -> None:
        """Count what `LabelStore.copying` says of an answer."""
        self.new += outcome == "new"
        self.same += outcome == "same"
        self.conflicts += [f"{entry}: the store has another sample there"] * (outcome == "conflict")

    def summary(self) -> str:
        """Say it in a few lines."""
        line = f"{self.new} answers stored, {self.same} were there already"
        if self.conflicts:
            line += f", {len(self.conflicts)} in conflict with a stored sample (which was kept)"
        return "\n".join([line, *first_of(self.conflicts)])


def export(
    store: LabelStore, path: str | Path, queries: Sequence[Query] | None = None, with_ids=True, show_progress=True
) -> int:
    """Write answers to a file without any audio and without any key.

    Parameters
    ----------
    store : LabelStore
        What is exported.
    path : str or pathlib.Path
        File to write; compressed if its name ends in ``.gz``.
    queries : sequence of Query, optional
        Which answers; all by default.
    with_ids : bool
        Whether identifiers of utterances go with them; training does not need them.
    show_progress : bool
        On standard error.

    Returns
    -------
    int
        Number of answers written.

    Raises
    ------
    StoreError
        If the store cannot be read, or a query holds what looks like a key.

    Example
    -------
    >>> import tempfile
    >>> from speechbrain_mifuse.lalm.answer import Answer, Response
    >>> from speechbrain_mifuse.lalm.store import Record
    >>> folder = Path(tempfile.mkdtemp())
    >>> query = Query("0" * 64, ("angry", "sad"), "m", "http://127.0.0.1/v1", {"temperature": 1})
    >>> with LabelStore(folder / "a.sqlite") as mine, LabelStore(folder / "b.sqlite") as yours:
    ...     mine.put_many(query, [Record("ab" * 32, 0, "u1", Response(Answer("label", (1.0, 0.0)), "{}"))])
    ...     written = export(mine, folder / "labels.jsonl", show_progress=False)
    ...     taken = import_file(folder / "labels.jsonl", yours, show_progress=False)
    >>> written, taken.new, merge([folder / "a.sqlite"], folder / "b.sqlite", show_progress=False).same
    (1, 1, 1)
    """
    known = {summary.query: sum(summary.counts.values()) for summary in store.queries()}
    chosen = list(known if queries is None else queries)
    clean, written = redactor(), 0
    total = sum(known.get(query, 0) for query in chosen)
    header = _header(chosen)
    if clean(header) != header:
        raise StoreError(
            f"{store.path}: the model, endpoint, prompt or a sampling parameter of a query holds what looks like a "
            "key. Nothing was exported: such a query cannot be given away."
        )
    bar = progress(total=total, unit="answer", desc="export", disable=not show_progress)
    with _writing_lines(Path(path)) as write, bar:
        write(header)
        for query in chosen:
            name = _id(query)
            for entry in _entries(store, query, known.get(query, 0)):
                write(clean(_line(name, entry, with_ids)))
                written += 1
                bar.update()
        write(_dumps({"answers": written}))
    return written


def import_file(path: str | Path, store: LabelStore, show_progress: bool = True) -> Taken:
    """Take over an export: all of it, or nothing if a line of it is wrong. A second time changes nothing.

    Parameters
    ----------
    path : str or pathlib.Path
        A file that `export` wrote; its example shows this function too.
    store : LabelStore
        Where the answers go; a stored sample is never replaced.
    show_progress : bool
        On standard error.

    Returns
    -------
    Taken
        Numbers of answers, and the conflicts by line.

    Raises
    ------
    StoreError
        If the file is cut off, was changed or is no export; the message names the line.
    """
    taken = Taken()
    with store.copying() as copy, progress(unit="answer", desc="import", disable=not show_progress) as bar:
        for number, query, entry in _read(Path(path)):
            taken.count(copy(query, entry), f"{path}:{number}: {_named(entry)}")
            bar.update()
    return taken


def merge(shards: Sequence[str | Path], into: str | Path, show_progress: bool = True) -> Taken:
    """Bring stores together that were collected apart, as on several machines.

    Parameters
    ----------
    shards : sequence of str or pathlib.Path
        Label stores to read; they stay as they are.
    into : str or pathlib.Path
        Label store to write, made if missing; it changes as a whole or not at all.
    show_progress : bool
        On standard error.

    Returns
    -------
    Taken
        Numbers of answers, and the conflicts; see the example of `export`.

    Raises
    ------
    StoreError
        If a store cannot be read or holds what no answer can be, or `into` is among the shards.
    """
    into, taken = Path(into), Taken()
    if into.exists() and any(Path(shard).exists() and into.samefile(shard) for shard in shards):
        raise StoreError(f"{into}: cannot be merged into itself. Leave it out of the stores to read.")
    with contextlib.ExitStack() as open_files:
        stores = [open_files.enter_context(LabelStore.existing(shard, read_only=True)) for shard in shards]
        parts = [(store, part.query, sum(part.counts.values())) for store in stores for part in store.queries()]
        total = sum(count for _, _, count in parts)
        copy = open_files.enter_context(open_files.enter_context(LabelStore(into)).copying())
        bar = open_files.enter_context(progress(total=total, unit="answer", desc="merge", disable=not show_progress))
        for store, query, count in parts:
            for entry in _entries(store, query, count):
                taken.count(copy(query, entry), f"{store.path}: {_named(entry)}")
                bar.update()
    return taken


def _entries(store: LabelStore, query: Query, count: int) -> Iterator[Entry]:
    """Read the answers to a query, of which there are so many at least, each checked as one of an export."""
    read = 0
    for entry in store.entries(query):
        fields = {name: value for name, value in entry._asdict().items() if value is not None or name not in _LEFT_OUT}
        try:
            checked = _checked_entry(fields, len(query.labels))
        except ValueError as error:
            raise StoreError(f"label store {store.path}: {_named(entry)}: {error}. Leave this store out.") from None
        yield checked
        read += 1
    if read < count:
        raise StoreError(
            f"label store {store.path}: only {read} of {count} answers to a query can be read. "
            "`speechbrain-mifuse labels check` names what is damaged."
        )


def _header(queries: Iterable[Query]) -> str:
    about = {
        _id(query): {
            **{"prompt_hash": query.prompt_hash, "labels": query.labels, "model": query.model},
            **{"endpoint": query.endpoint, "base_url": query.base_url},
            **{"sampling": query.sampling, "prompt": query.prompt},
        }
        for query in queries
    }
    return _dumps({"format": FORMAT, "version": VERSION, "written_by": __version__, "queries": about})


def _line(query: str, entry: Entry, with_ids: bool) -> str:
    fields = {"query": query, **entry._asdict()}
    if not with_ids:
        del fields["utt_id"]
    return _dumps({name: value for name, value in fields.items() if value is not None and value != ""})


def _id(query: Query) -> str:
    return query.digest[:ID_DIGITS]


def _named(entry: Entry) -> str:
    return f"recording {entry.audio}, sample {entry.k}"


def _dumps(fields: Mapping) -> str:
    return json.dumps(fields, ensure_ascii=False, allow_nan=False)


@contextlib.contextmanager
def _writing_lines(path: Path) -> Iterator[Callable[[str], object]]:
    """Write lines to a file that appears under its name when the block ends, whole or not at all."""
    with replacing(path) as file, contextlib.ExitStack() as closed:
        if path.suffix == ".gz":
            # Neither name nor time go into the compressed file: equal answers make equal bytes.
            file = closed.enter_context(gzip.GzipFile("", "wb", 6, file, mtime=0))
        yield lambda line: file.write(line.encode() + b"\n")


def _read(path: Path) -> Iterator[tuple[int, Query, Entry]]:
    """Line number, query and entry of every answer of an export."""
    queries: dict[str, Query] = {}
    answers, ended = 0, False
    for number, fields in _lines(path):
        try:
            if number == 1:
                queries = _queries(fields)
            elif ended:
                raise ValueError("follows the last line of the export; were files joined? Import each on its own")
            elif ended := set(fields) == {"answers"}:
                if fields["answers"] != answers:
                    what = f"{answers} answers before this line, which says {fields['answers']}"
                    raise ValueError(f"{what}: lines are missing or added")
            else:
                answers += 1
                yield number, *_checked(fields, queries)
        except ValueError as error:
            raise StoreError(f"{path}:{number}: {error}") from None
        except RecursionError:
            raise StoreError(f"{path}:{number}: nested too deeply.") from None
    if not ended:
        raise StoreError(f"{path}: cut off after {answers} answers: its last line is missing. Export or copy it again.")


def _lines(path: Path) -> Iterator[tuple[int, dict]]:
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise StoreError(f"{path}:{number}: a line of more than {MAX_LINE_BYTES} bytes.")
                yield number, strict_object(line)
    except (OSError, EOFError, zlib.error) as error:
        raise StoreError(f"{path}: cannot be read ({error}).") from None
    except ValueError as error:  # also text that is not UTF-8, and numbers of thousands of digits
        raise StoreError(f"{path}:{number}: not a line of JSON ({error}).") from None


def _queries(header: Mapping) -> dict[str, Query]:
    if header.get("format") != FORMAT:
        raise ValueError(f"no export of answers (its first line does not say {FORMAT!r})")
    if header.get("version") != VERSION:
        raise ValueError(
            f"an export of version {header.get('version')}, and this is speechbrain_mifuse {__version__}, which reads "
            f"version {VERSION}"
        )
    if not isinstance(header.get("queries"), dict):
        raise ValueError("the header has no queries")
    queries: dict[str, Query] = {}
    for name, about in header["queries"].items():
        try:
            queries[name] = Query(**about)
        except (UserError, TypeError) as error:
            raise ValueError(f"query {name}: {error}") from None
        if _id(queries[name]) != name:
            raise ValueError(f"query {name} was changed: its fields have the id {_id(queries[name])}")
    return queries


def _count(least: int, below: int) -> Callable[[object], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value < below


def _reply(value: object) -> bool:
    try:
        found = json.loads(value if isinstance(value, str) else "")
    except ValueError:
        return False
    return found is None or isinstance(found, dict)


def _usage(value: object) -> bool:
    """Whether it is the usage of an answer, with those of answers that it replaced inside it."""
    while isinstance(value, dict) and "replaced" in value:
        value = value["replaced"]
    return isinstance(value, dict) and is_text(_dumps(value))


# What a field must be, and what stands for one that is left out (nothing does where there is none).
_FIELDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "audio": (lambda v: is_text(v) and re.fullmatch("[0-9a-f]{64}", v) is not None, "64 hexadecimal digits"),
    "k": (_count(0, MAX_SAMPLES), f"a whole number from 0 to {MAX_SAMPLES - 1}"),
    "utt_id": (is_text, "text"),
    "kind": (lambda v: v in KINDS, f"one of {', '.join(KINDS)}"),
    "probs": (lambda v: isinstance(v, (list, tuple)) and all(map(is_number, v)), "a list of numbers"),
    "label_mass": (lambda v: is_number(v) and 0 <= v <= 1, "a number from 0 to 1"),
    "attempts": (_count(1, MAX_COUNT), f"a whole number from 1 to {MAX_COUNT - 1}"),
    "reason": (is_text, "text"),
    "seed": (_count(-(2**63), 2**63), "a whole number of 64 bits"),
    "created": (lambda v: is_number(v) and 0 <= v < MAX_TIME, "seconds since 1970, before the year 9999"),
    "served_model": (is_text, "text"),
    "system_fingerprint": (is_text, "text"),
    "usage": (_usage, "an object"),
    "raw": (lambda v: is_text(v) and _reply(v), "an object in JSON as text"),
}
_LEFT_OUT = {name: None for name in ("probs", "label_mass", "seed", "served_model", "system_fingerprint", "usage")}
_LEFT_OUT |= {"utt_id": "", "reason": ""}


def _checked(fields: dict, queries: Mapping[str, Query]) -> tuple[Query, Entry]:
    name = fields.pop("query", None)
    if not isinstance(name, str) or name not in queries:
        raise ValueError(f"query {name!r} is not in the header")
    missing = _FIELDS.keys() - fields.keys() - _LEFT_OUT.keys()
    if missing:
        raise ValueError(f"{', '.join(sorted(missing))} missing")
    return queries[name], _checked_entry(fields, len(queries[name].labels))


def _checked_entry(fields: Mapping, classes: int) -> Entry:
    for field, value in fields.items():
        if field not in _FIELDS:
            raise ValueError(f"unknown field {field!r}")
        fits, what = _FIELDS[field]
        if not fits(value):
            raise ValueError(f"{field} must be {what}, not {ascii(value)[:200]}")
    entry = Entry(**{**_LEFT_OUT, **fields})
    if (entry.kind in SAMPLE_KINDS) != (entry.probs is not None):
        beside = "without" if entry.probs is None else "with"
        raise ValueError(f"an answer of kind {entry.kind!r} {beside} probabilities")
    if entry.probs is not None and len(entry.probs) != classes:
        raise ValueError(f"{len(entry.probs)} probabilities for {classes} labels")
    if entry.probs is not None and (min(entry.probs) < 0 or abs(sum(entry.probs) - 1) > SUM_TOLERANCE):
        raise ValueError(f"probabilities {entry.probs} are negative or do not sum to 1")
    return entry
