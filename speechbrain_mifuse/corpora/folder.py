"""Any folder of recordings: what a user brings along, with labels or without.

Labels come from the first of these that is there, and the log says from which:

- `labels.csv` (or `labels.tsv`, in any case) in the folder, or in one folder below it: columns `file,emo` and, if
  known, `speaker`, or other names of `COLUMNS`; see `tables.py`. `file` is the path from the table's folder on. `emo`
  is filled in every row or in none. Recordings that it does not name take no part.
- File names of a corpus that `layouts.py` knows, if nearly all recordings have them.
- The folders on the way to a recording. One level of them gives the emotions if every folder of that level is named by
  an emotion (`emotion_words.py`) and at least two emotions occur. Where some folders look like emotions and others do
  not, nothing is guessed: it is an error that asks for `labels.csv`.

Emotions outside the four classes are left out and counted. Without a table, it is an error if more than half of the
recordings would take no part because nothing is known of them.

Speakers come from the same place: the `speaker` column, the file names, or the one level of folders that remains
(`anna/angry/1.wav` and `angry/anna/1.wav` are of speaker `anna`). With labels, two such levels are an error that asks
for `labels.csv`; folders such as `part1` or `2024-05-01` are no speakers. A recording whose speaker is not known counts
as a speaker of its own; `corpus.json` counts these under `recordings_without_speaker`, and results say so.

Split policy: with labels, by speaker, so that each split gets its share of every class (`splits.py`). Without any label
each split holds every recording whatever its share: the folder is what is adapted to and what is predicted.
"""

from __future__ import annotations

import hashlib
import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PureWindowsPath

from speechbrain_mifuse.corpora.corpus import Corpus
from speechbrain_mifuse.corpora.emotion_words import emotion_of, plain
from speechbrain_mifuse.corpora.folder_names import read_folder_names
from speechbrain_mifuse.corpora.layouts import Listing, read_file_names
from speechbrain_mifuse.corpora.manifest import LABELS, CorpusError, Utterance
from speechbrain_mifuse.corpora.recordings import TABLES, recordings_below
from speechbrain_mifuse.corpora.splits import Splits
from speechbrain_mifuse.corpora.tables import read_table
from speechbrain_mifuse.utils.texts import counted, shown

logger = logging.getLogger(__name__)

# Columns of the table, and other names that they may have.
COLUMNS = {
    "file": ("filename", "file_name", "path", "wav"),
    "emo": ("emotion", "label", "class"),
    "speaker": ("speaker_id", "spk", "spk_id"),
}


def list_folder(data_folder: str | Path) -> list[Utterance]:
    """List the recordings of a folder, and log what was understood of it.

    Example
    -------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("angry/anna/1.wav", "sad/ben/1.wav"):
    ...     (folder / name).parent.mkdir(parents=True)
    ...     (folder / name).touch()
    >>> [(utterance.emo, utterance.speaker) for utterance in list_folder(folder)]
    [('angry', 'anna'), ('sad', 'ben')]
    """
    root = Path(data_folder)
    found = [path.relative_to(root) for path in recordings_below(root)]
    table = find_table(root)
    if table is not None:
        listing = read_labels(root, table, found)
    else:
        listing = read_file_names(found) or read_folder_names(root, found)
        if 2 * len(listing.left_out) > len(found):
            raise CorpusError(
                f"{root}: labels from {listing.labels_from} would leave out {len(listing.left_out)} of {len(found)} "
                f"recordings (first: {shown(listing.left_out[0])}). Write a {TABLES[0]} that names all that shall take "
                "part: the line file,emo,speaker and one line for each."
            )
    speakers = one_spelling(who for _, _, who in listing.rows if who)
    _report(root, listing, len(found), speakers)
    prefix = f"folder-{root.resolve().name}"
    return [
        Utterance(
            *(f"{prefix}/{path.as_posix()}", root / path, emo, speakers.get(who) or stand_in(path)),
            speaker_known=bool(who),
        )
        for path, emo, who in listing.rows
    ]


def _report(root: Path, listing: Listing, found: int, speakers: Mapping[str, str]) -> None:
    """Log what was understood: labels, speakers, and what takes no part."""
    labels = Counter(emo for _, emo, _ in listing.rows if emo)
    text = f"{found} recordings, labels from {listing.labels_from}: {counted(labels) or 'none'}"
    text += f"; speakers from {listing.speakers_from}: {len(set(speakers.values())) or 'not known'}"
    if listing.outside:
        text += f"; left out: {listing.outside.total()} of other emotions ({counted(listing.outside)})"
    logger.info("%s: %s", root.resolve().name, text)
    if len(set(speakers.values())) < len(speakers):
        twice = sorted(name for name, kept in speakers.items() if name != kept)
        logger.warning("%s: speakers that differ in spelling alone are one: %s.", root, shown(", ".join(twice)))
    if listing.left_out:
        first = shown(listing.left_out[0].as_posix())
        logger.warning(
            "%s: %d recordings have no label and take no part (first: %s).", root, len(listing.left_out), first
        )


def one_spelling(names: Iterable[str]) -> dict[str, str]:
    """Join names that differ in case, Unicode form or spaces alone, so that one speaker is never in two splits."""
    kept = {}
    return {name: kept.setdefault(plain(name), unicodedata.normalize("NFC", name)) for name in sorted(set(names))}


def stand_in(path: Path) -> str:
    """Name a recording without a known speaker: fixed, and in an order that has nothing to do with its folders."""
    # A name on disk may hold bytes that are no text.
    return f"unknown-{hashlib.sha256(os.fsencode(path.as_posix())).hexdigest()[:12]}"


def find_table(root: Path) -> Path | None:
    """Find the table of labels: in the folder itself, else in one folder below it."""
    tables = sorted(path for path in root.rglob("[lL]*") if path.name.lower() in TABLES and path.is_file())
    tables = [path for path in tables if not any(part[:1] == "." for part in path.relative_to(root).parts)]
    own = [path for path in tables if path.parent == root] or tables
    if len(own) > 1:
        names = ", ".join(shown(path.relative_to(root)) for path in own)
        raise CorpusError(f"{root}: holds {len(own)} tables of labels ({names}). Join them into one {TABLES[0]} there.")
    return own[0] if own else None


def read_labels(root: Path, table: Path, found: Sequence[Path]) -> Listing:
    r"""Read a table of labels."""
    rows = read_table(table, COLUMNS, optional=["speaker"])
    # Names from another system may be in another Unicode form; of two files that differ in it alone, each is found.
    lookup = {unicodedata.normalize("NFC", path.as_posix()): path for path in found}
    lookup |= {path.as_posix(): path for path in found}
    where, seen, missing = table.parent.relative_to(root), {}, []
    for line, row in rows:
        path = _named_file(f"{table}, line {line}", row["file"], where, lookup)
        if path.as_posix() not in lookup and not os.path.exists(root / path):
            missing.append(path)
        first, before = seen.setdefault(path, (line, row))
        if any(plain(before[column]) != plain(row[column]) for column in ("emo", "speaker")):
            raise CorpusError(
                f"{table}, line {line}: '{shown(row['file'])}' has other values than in line {first}. Keep one line."
            )
    _require_most_files(table, rows, missing, found)
    unlabelled = [(line, row) for line, row in seen.values() if not row["emo"]]
    if 0 < len(unlabelled) < len(seen):
        raise CorpusError(
            f"{table}, line {unlabelled[0][0]}: {len(unlabelled)} of {len(seen)} rows have no emo. "
            "Fill it in every row or in none, or take these rows away."
        )
    listing = Listing(shown(table.relative_to(root)), table.name)
    if unlabelled:
        listing.rows = [(path, None, row["speaker"]) for path, (_, row) in seen.items()]
    else:
        _add_labelled(listing, table, seen)
    listing.left_out = sorted(set(found).difference(seen))
    return listing


def _named_file(where: str, name: str, folder: Path, lookup: Mapping[str, Path]) -> Path:
    """Path below the data folder of the file that a row names: as written, or with / for a backslash."""
    slashed = unicodedata.normalize("NFC", name.replace("\\", "/"))
    if not name or "\0" in name or PureWindowsPath(name).drive or name[0] in "/\\" or ".." in slashed.split("/"):
        raise CorpusError(f"{where}: '{shown(name)}' is empty or lies outside the folder. Write the path below it.")
    for written in (name, unicodedata.normalize("NFC", name), slashed):
        for base in (folder, Path()):
            path = (base / written).as_posix()
            if path in lookup:
                return lookup[path]
    return folder / slashed


def _require_most_files(table: Path, rows: Sequence, missing: Sequence[Path], found: Sequence[Path]) -> None:
    """Refuse a table that is not of this folder."""
    if missing and 2 * len(missing) > len(rows):
        same = next((path for path in found if path.name == missing[0].name), None)
        hint = f" There is {shown(same.as_posix())}: is it that one?" if same else ""
        raise CorpusError(
            f"{table}: {len(missing)} of the {len(rows)} files that it names are not there (first: "
            f"{shown(missing[0].as_posix())}).{hint} Write paths from the folder of the table on, with their endings."
        )


def _add_labelled(listing: Listing, table: Path, rows: Mapping[Path, tuple[int, Mapping[str, str]]]) -> None:
    """Add the rows of known emotions; a few of unknown ones are left out by name, most are an error."""
    unknown = {}
    for path, (line, row) in rows.items():
        emotion = emotion_of(row["emo"])
        if emotion is None:
            unknown.setdefault(row["emo"], []).append(line)
        else:
            listing.add(path, emotion, row["speaker"])
    for word, lines in unknown.items():
        if 2 * sum(map(len, unknown.values())) > len(rows):
            raise CorpusError(
                f"{table}, line {lines[0]}: unknown class '{shown(word)}'. Known classes: {', '.join(LABELS)}. "
                "Translate the names, or take the rows away."
            )
        logger.warning(
            "%s, line %d: unknown class '%s'; %d rows of it take no part. Known classes: %s.",
            *(table, lines[0], shown(word), len(lines), ", ".join(LABELS)),
        )


def facts(data_folder: Path, utterances: list[Utterance]) -> Mapping:
    """Count the recordings whose speaker is not known."""
    return {"recordings_without_speaker": sum(not utterance.speaker_known for utterance in utterances)}


def prepare_folder(
    data_folder: str | Path | None, save_folder: str | Path, splits: Splits, keep: Mapping[str, float] | None = None
) -> None:
    """Write manifests of a folder of recordings, unless they are there already.

    Parameters
    ----------
    data_folder : str or pathlib.Path
        Folder of recordings, with labels or without (see `list_folder`).
    save_folder : str or pathlib.Path
        Where the manifests go: for each split `<split>.json`, and `<split>_unlabelled.json` without labels.
    splits : mapping
        For each split its share of the speakers, or its list of speakers. Without labels each split holds every
        recording.
    keep : mapping of str to float, optional
        Simulated class skew: share of a class's recordings that stays in the first split.

    Raises
    ------
    CorpusError
        If there is no such folder, its labels are not clear, or no recording of a split can be read.

    Example
    -------
    >>> import tempfile, json, numpy, soundfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for number, name in enumerate(("angry/anna/1.wav", "sad/anna/1.wav", "angry/ben/1.wav", "sad/ben/1.wav")):
    ...     (folder / name).parent.mkdir(parents=True)
    ...     soundfile.write(folder / name, 0.1 * numpy.sin(numpy.arange(8000) * (number + 1)), 16000)
    >>> prepare_folder(folder, folder / "manifests", {"train": 0.5, "test": 0.5})
    >>> about = json.loads((folder / "manifests" / "corpus.json").read_text())
    >>> about["counts"]["test"]
    {'angry': 1, 'sad': 1}
    """
    if data_folder is None or not Path(data_folder).is_dir():
        raise CorpusError(f"{data_folder} is no folder. Pass --data_folder with the folder of your recordings.")
    FOLDER.prepare_in(Path(data_folder), save_folder, splits, keep)


# Neither a usual name nor a marker: the folder is the one that the user names.
FOLDER = Corpus("folder", "", "", (), list_folder, facts=facts, balanced=True)
