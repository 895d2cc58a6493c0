"""Manifests: one JSON file per split, in the form `DynamicItemDataset.from_json` reads.

Every entry is `{"wav": "{data_root}/...", "length": seconds, "emo": ..., "speaker": ...}`, with `session` or
`partition` where the corpus has them, and `"speaker_known": false` where `speaker` is but a stand-in; an unlabelled
manifest is the same file without `emo`. Ids are unique across corpora because each corpus puts its own prefix before
them. `corpus.json` beside them says what they were made from.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.files import atomic_write, encodable, json_object
from speechbrain_mifuse.utils.texts import shown

logger = logging.getLogger(__name__)

LABELS = ("angry", "happy", "neutral", "sad")
ABOUT = "corpus.json"
TWIN = "_unlabelled"
# Stands for the corpus's folder at the beginning of a path.
ROOT = "{data_root}"


# Seconds that an entry may claim.
LONGEST_LENGTH = 1e9
# Reasons shown in the log; all are in skipped.json.
SHOWN = 20


class CorpusError(UserError):
    """A corpus folder, label or split that does not fit; the message says which one and what to do."""


@dataclass(frozen=True)
class Utterance:
    """One recording of a corpus.

    Parameters
    ----------
    utt_id : str
        Unique over all corpora: starts with the corpus's prefix, as `rav-`.
    wav : pathlib.Path
        The recording.
    emo : str or None
        Emotion, one of the corpus's label names; `None` in a corpus without labels.
    speaker : str
        Speaker, as the corpus names it; a name of the recording's own where it is not known.
    session : str, optional
        Recording session, where its speakers talk to each other.
    partition : str, optional
        Official partition.
    speaker_known : bool
        Whether the corpus tells who speaks. Recordings where it does not may share a speaker.

    Example
    -------
    >>> Utterance("rav-1", Path("a.wav"), "angry", "01").speaker
    '01'
    """

    utt_id: str
    wav: Path
    emo: str | None
    speaker: str
    session: str | None = None
    partition: str | None = None
    speaker_known: bool = True

    def row(self, data_folder: str | Path, length: float) -> dict:
        """Give the utterance's entry in a manifest."""
        wav = f"{ROOT}/" + self.wav.relative_to(data_folder).as_posix()
        row = {"wav": wav, "length": round(length, 4), "emo": self.emo, "speaker": self.speaker}
        row |= {"session": self.session, "partition": self.partition}
        row |= {} if self.speaker_known else {"speaker_known": False}
        return {key: value for key, value in row.items() if value is not None}


def write_manifest(corpus: str, rows: Mapping[str, Mapping], path: Path) -> Path:
    """Write one split, and beside it the twin without labels."""
    if not rows:
        raise CorpusError(f"{corpus}: split '{path.stem}' holds no readable recording (see skipped.json).")
    atomic_write(path, json.dumps(rows, indent=1))
    bare = {key: {k: v for k, v in row.items() if k != "emo"} for key, row in rows.items()}
    atomic_write(unlabelled(path), json.dumps(bare, indent=1))
    return path


def unlabelled(path: str | Path) -> Path:
    """Path of a manifest's twin without labels.

    Example
    -------
    >>> unlabelled("manifests/adapt.json").name
    'adapt_unlabelled.json'
    """
    path = Path(path)
    return path.with_name(f"{path.stem}{TWIN}.json")


def report_skipped(corpus: str, skipped: Mapping[str, str], save_folder: str | Path) -> None:
    """Log what was left out and keep the list beside the manifests."""
    for reason in list(skipped.values())[:SHOWN]:
        logger.warning("%s: left out: %s", corpus, reason)
    if len(skipped) > SHOWN:
        logger.warning("%s: %d left out in all, see %s/skipped.json", corpus, len(skipped), save_folder)
    atomic_write(Path(save_folder) / "skipped.json", json.dumps(dict(skipped), indent=1))


@contextlib.contextmanager
def no_collection():
    """Keep Python from looking for garbage inside the block: of a million new rows none is any yet."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@no_collection()
def read_manifest(path: str | Path) -> dict[str, dict]:
    """Read a manifest with `{data_root}` filled in from the `corpus.json` beside it.

    Parameters
    ----------
    path : str or pathlib.Path
        A manifest that a preparation wrote.

    Returns
    -------
    dict of str to dict
        Entry by utterance id.

    Raises
    ------
    CorpusError
        If a file is missing, or is not a manifest: the message names the file, the entry and the field. A key that
        stands twice is refused, since the last one would win.

    Example
    -------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> atomic_write(folder / "train.json", '{"t-a": {"wav": "{data_root}/a.wav", "speaker": "1"}}')
    >>> atomic_write(folder / "corpus.json", '{"data_root": "/toy"}')
    >>> read_manifest(folder / "train.json")["t-a"]["wav"]
    '/toy/a.wav'
    """
    path = Path(path)
    about = read_about(path.with_name(ABOUT))
    try:
        rows = json_object(path)
    except FileNotFoundError:
        splits = about.get("splits") or {}
        remedy = f"Delete {path.with_name(ABOUT)} and run the recipe again: it then prepares anew."
        if splits and path.stem.removesuffix(TWIN) not in splits:
            remedy = f"It was prepared for the splits {', '.join(splits)} alone; name this one in the YAML."
        raise CorpusError(f"{path}: not found. {remedy}") from None
    except ValueError as error:
        raise CorpusError(f"{path}: not a manifest ({error}). Delete it and prepare again.") from None
    for key, row in rows.items():
        wrong = row_fault(key, row)
        if wrong:
            raise CorpusError(f"{path}: not a manifest ('{shown(key)}': {wrong}). Delete it and prepare again.")
        # At the beginning alone: a file's own name may hold those letters too.
        if row["wav"].startswith(ROOT):
            row["wav"] = about["data_root"] + row["wav"].removeprefix(ROOT)
        # Few different names, each of which a million rows need to hold but once.
        for name in ("emo", "speaker"):
            if name in row:
                row[name] = sys.intern(row[name])
    return rows


def read_about(path: Path) -> dict:
    """Read the `corpus.json` beside manifests."""
    try:
        about = json_object(path)
        root = about.get("data_root")
        if not isinstance(root, str) or "\0" in root or not encodable(root):
            raise ValueError("data_root is no path")
        if not isinstance(about.get("splits") or {}, dict):
            raise ValueError("splits is no mapping")
    except FileNotFoundError:
        raise CorpusError(f"{path}: not found. Run the recipe's preparation first.") from None
    except ValueError as error:
        raise CorpusError(f"{path}: not what a preparation leaves ({error}). Delete it and prepare again.") from None
    return about


# Fields of an entry that have a fixed type; others may be added.
FIELDS = {**dict.fromkeys(("wav", "emo", "speaker", "session", "partition"), str), "speaker_known": bool}


def row_fault(key: str, row: object) -> str:
    """Say what is wrong with an entry of a manifest."""
    if not isinstance(row, dict):
        return "not an object"
    for name, value in row.items():
        kind = FIELDS.get(name)
        if kind is not None and (type(value) is not kind or value == ""):
            return f"{name} is {'neither true nor false' if kind is bool else 'no text'}"
        if kind is str and not value.isascii() and not encodable(value):
            return f"{name} holds characters that no file can hold"
    wav, length = row.get("wav", ""), row.get("length", 0)
    if not wav or "\0" in wav:
        return "wav holds a zero byte" if wav else "no wav"
    if ".." in wav and ".." in wav.split("/"):
        return "wav leaves the data root"
    if type(length) not in (int, float) or not 0 <= length < LONGEST_LENGTH:
        return "length is no number of seconds"
    return "" if key.isascii() or encodable(key) else "its id holds characters that no file can hold"


def known_speakers(rows: Mapping[str, Mapping]) -> set[str]:
    """Collect the speakers of a manifest that the corpus names."""
    return {row["speaker"] for row in rows.values() if row.get("speaker_known", True)}


def recordings_without_speaker(rows: Mapping[str, Mapping]) -> int:
    """Count the recordings of a manifest whose speaker is not known: two of them may be of one person."""
    return sum(not row.get("speaker_known", True) for row in rows.values())
