"""Any folder of recordings: what a user brings along, with labels or without.

Recordings: see `recordings_below`.
Labels are optional and come from one of two places:

- `labels.csv` in the folder, columns `file,emo` and, if known, `speaker`; `file` is the path below the folder. `emo` is
  filled in every row or in none. Recordings that it does not name take no part, and the log says how many.
- Without it: the folders on the way to a recording. One named like a label (`LABEL_MAP`, in any case) gives its
  emotion. As soon as one recording has a label, those without take no part, and the log says how many.

Speakers come from the `speaker` column, else from the remaining folders on the way (`anna/angry/1.wav` and
`angry/anna/1.wav` are of speaker `anna`). A recording for which neither names one counts as a speaker of its own, so
the splits are speaker-independent only as far as speakers are named; `corpus.json` counts the others under
`recordings_without_speaker`, and results say so wherever they speak of speakers.

Split policy: with labels, by speaker, sorted by name, recordings without one evenly among them by a hash of their path:
sorted by the path itself, folders named like labels would give each split classes of its own. Without any label nothing
can be scored or trained with labels, so each split holds every recording whatever its share: the folder is what is
adapted to and what is predicted.
Ids start with the folder's name and end with the path below it; they stay while that name and path do.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from speechbrain_mifuse.audio import shown
from speechbrain_mifuse.corpora.manifest import Corpus, CorpusError, Splits, Utterance, map_label, table_rows
from speechbrain_mifuse.corpora.recordings import recordings_below

logger = logging.getLogger(__name__)

LABEL_MAP = {
    **dict.fromkeys(("angry", "anger", "ang"), "angry"),
    **dict.fromkeys(("happy", "happiness", "hap"), "happy"),
    **dict.fromkeys(("neutral", "neu"), "neutral"),
    **dict.fromkeys(("sad", "sadness"), "sad"),
}
TABLE = "labels.csv"


def list_folder(data_folder: str | Path) -> list[Utterance]:
    """List the recordings of a folder.

    Parameters
    ----------
    data_folder : str or pathlib.Path
        The folder.

    Returns
    -------
    list of Utterance
        With a label each, or all without.

    Raises
    ------
    CorpusError
        If `labels.csv` cannot be read, lacks a column, names an unknown emotion or a file outside the folder, or gives
        labels to some rows alone.

    Example
    -------
    >>> import tempfile
    >>> root = Path(tempfile.mkdtemp()) / "mine"
    >>> (root / "anna" / "angry").mkdir(parents=True)
    >>> (root / "anna" / "angry" / "1.ogg").touch()
    >>> [(u.utt_id, u.emo, u.speaker) for u in list_folder(root)]
    [('folder-mine/anna/angry/1.ogg', 'angry', 'anna')]
    """
    root = Path(data_folder)
    found = [path.relative_to(root) for path in recordings_below(root)]
    if (root / TABLE).is_file():
        listed = listed_in_table(root / TABLE)
    else:
        listed = [(path, *labelled_by_folders(path)) for path in found]
        if any(emo for _, emo, _ in listed):
            listed = [row for row in listed if row[1]]
    passed_over = len(set(found).difference(path for path, *_ in listed))
    if passed_over:
        logger.warning("%s: %d recordings have no label and take no part.", root, passed_over)
    prefix = f"folder-{root.resolve().name}"
    return [
        Utterance(f"{prefix}/{path.as_posix()}", root / path, emo, who or stand_in(path), speaker_known=bool(who))
        for path, emo, who in listed
    ]


def stand_in(path: Path) -> str:
    """Name a recording without a known speaker: fixed, and in an order that has nothing to do with its folders.

    Parameters
    ----------
    path : pathlib.Path
        Below the corpus's folder.

    Returns
    -------
    str
        The same wherever the folder lies.

    Example
    -------
    >>> stand_in(Path("happiness/1.wav"))
    'unknown-84b9837f757c'
    """
    # A name on disk may hold bytes that are no text.
    return f"unknown-{hashlib.sha256(os.fsencode(path.as_posix())).hexdigest()[:12]}"


def labelled_by_folders(path: Path) -> tuple[str | None, str]:
    """Tell emotion and speaker from the folders on the way to a recording.

    Parameters
    ----------
    path : pathlib.Path
        Below the corpus's folder.

    Returns
    -------
    emo : str or None
        Of the innermost folder that is named like a label.
    speaker : str
        The other folders; empty when there is none.

    Example
    -------
    >>> labelled_by_folders(Path("anna/monday/Anger/1.wav"))
    ('angry', 'anna/monday')
    """
    labels = [LABEL_MAP[part.lower()] for part in path.parts[:-1] if part.lower() in LABEL_MAP]
    return (labels[-1] if labels else None), "/".join(p for p in path.parts[:-1] if p.lower() not in LABEL_MAP)


def listed_in_table(table: Path) -> list[tuple[Path, str | None, str]]:
    r"""Read a table of recordings.

    Parameters
    ----------
    table : pathlib.Path
        `labels.csv`.

    Returns
    -------
    list of tuple
        Path below the folder, emotion or `None`, speaker or an empty string.

    Raises
    ------
    CorpusError
        As `list_folder`.

    Example
    -------
    >>> import tempfile
    >>> table = Path(tempfile.mkdtemp()) / "labels.csv"
    >>> _ = table.write_text("file,emo,speaker\n1.wav,anger,anna\n")
    >>> [(path.name, emo, speaker) for path, emo, speaker in listed_in_table(table)]
    [('1.wav', 'angry', 'anna')]
    """
    listed = []
    for row in table_rows(table):
        name, code = ((row.get(column) or "").strip() for column in ("file", "emo"))
        if not name or row.get("emo") is None or Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise CorpusError(f"{table}: lacks file or emo, or the file lies outside the folder, in row {row}.")
        emo = map_label(LABEL_MAP, code.lower(), f"{table}, {shown(name)}") if code else None
        listed.append((Path(name), emo, (row.get("speaker") or "").strip()))
    without = [path for path, emo, _ in listed if emo is None]
    if 0 < len(without) < len(listed):
        raise CorpusError(
            f"{table}: {len(without)} of {len(listed)} rows have no emo (first: {without[0]}). "
            "Fill it in every row or in none, or take these rows away."
        )
    return listed


def facts(data_folder: Path, utterances: list[Utterance]) -> Mapping:
    """Count the recordings whose speaker is not known.

    Parameters
    ----------
    data_folder : pathlib.Path
        The folder.
    utterances : list of Utterance
        What `list_folder` found there.

    Returns
    -------
    mapping
        For `corpus.json`.

    Example
    -------
    >>> facts(Path("/mine"), [Utterance("folder-mine/1.wav", Path("/mine/1.wav"), None, "1.wav", speaker_known=False)])
    {'recordings_without_speaker': 1}
    """
    return {"recordings_without_speaker": sum(not utterance.speaker_known for utterance in utterances)}


def prepare_folder(
    data_folder: str | Path | None, save_folder: str | Path, splits: Splits, keep: Mapping[str, float] | None = None
) -> None:
    """Write manifests of a folder of recordings, unless they are there already.

    Parameters
    ----------
    data_folder : str or pathlib.Path
        The folder itself; it is looked for nowhere else.
    save_folder : str or pathlib.Path
        Where the manifests go.
    splits : mapping of str to float
        Share of the speakers for each split; without labels each split holds everything.
    keep : mapping of str to float, optional
        As for `Corpus.prepare`.

    Raises
    ------
    CorpusError
        If there is no such folder, no recording in it, or its labels do not fit.

    Example
    -------
    >>> prepare_folder(None, "/nowhere", {"adapt": 0.6, "test": 0.4})
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.corpora.manifest.CorpusError: None is no folder. Pass --data_folder with the folder ...
    """
    if data_folder is None or not Path(data_folder).is_dir():
        raise CorpusError(f"{data_folder} is no folder. Pass --data_folder with the folder of your recordings.")
    FOLDER.prepare_in(Path(data_folder), save_folder, splits, keep)


# Neither a usual name nor a marker: the folder is the one that the user names.
FOLDER = Corpus("folder", "", "", (), list_folder, facts=facts)
