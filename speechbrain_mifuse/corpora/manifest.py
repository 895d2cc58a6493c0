"""Manifests: one JSON file per split, in the form `DynamicItemDataset.from_json` reads.

Every entry is `{"wav": "{data_root}/...", "length": seconds, "emo": ..., "speaker": ...}`; an unlabelled manifest is
the same file without `emo`. Ids are unique across corpora because each corpus puts its own prefix before them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from speechbrain_mifuse import __version__
from speechbrain_mifuse.audio import BadAudio, duration
from speechbrain_mifuse.errors import UserError

logger = logging.getLogger(__name__)

LABELS = ("angry", "happy", "neutral", "sad")
ABOUT = "corpus.json"


class CorpusError(UserError):
    """A corpus folder, label or split that does not fit; the message says which one and what to do."""


@dataclass(frozen=True)
class Utterance:
    """One labelled recording of a corpus.

    Parameters
    ----------
    utt_id : str
        Unique over all corpora: starts with the corpus's prefix, as `rav-`.
    wav : pathlib.Path
        The recording.
    emo : str
        Emotion, one of the corpus's label names.
    speaker : str
        Speaker, as the corpus names it.

    Example
    -------
    >>> Utterance("rav-1", Path("a.wav"), "angry", "01").speaker
    '01'
    """

    utt_id: str
    wav: Path
    emo: str
    speaker: str


def atomic_write(path: str | Path, data: str | bytes) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part.

    Parameters
    ----------
    path : str or pathlib.Path
        Target; its folder is made when missing.
    data : str or bytes
        Whole content.

    Example
    -------
    >>> path = Path(tempfile.mkdtemp()) / "a" / "b.txt"
    >>> atomic_write(path, "text")
    >>> path.read_text()
    'text'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def find_corpus(folder_name: str, marker: str, *candidates: str | Path | None) -> Path:
    """Find a corpus's own folder among the places a user may have named.

    Each candidate may be the corpus's folder, or one that holds it under `folder_name`. After the candidates and their
    parents (a second corpus often lies beside the first) comes the folder in the environment variable `MIFUSE_CORPORA`.

    Parameters
    ----------
    folder_name : str
        Usual name of the corpus's folder, as `ravdess`.
    marker : str
        Glob pattern that exists in every copy of the corpus, as `Actor_*`.
    *candidates : str or pathlib.Path or None
        Places to look at, first match wins; `None` is passed over.

    Returns
    -------
    pathlib.Path
        The corpus's folder.

    Raises
    ------
    CorpusError
        If it is in none of the places; the message lists them and names `--data_folder`.

    Example
    -------
    >>> root = Path(tempfile.mkdtemp())
    >>> (root / "ravdess" / "Actor_01").mkdir(parents=True)
    >>> find_corpus("ravdess", "Actor_*", root).name
    'ravdess'
    """
    given = [Path(c) for c in candidates if c]
    # A mistyped folder must not end in another corpus that the environment happens to name.
    for folder in given:
        if not folder.is_dir():
            raise CorpusError(
                f"Corpus '{folder_name}' not found: {folder} is no folder. "
                "Pass --data_folder with the corpus's folder or the folder above it."
            )
    places = [*given, *(p.resolve().parent for p in given)]
    if os.environ.get("MIFUSE_CORPORA"):
        places.append(Path(os.environ["MIFUSE_CORPORA"]))
    for place in places:
        for folder in (place, place / folder_name):
            if folder.is_dir() and next(folder.glob(marker), None) is not None:
                return folder
    looked = ", ".join(str(p) for p in places) or "nowhere, no folder was given"
    raise CorpusError(
        f"Corpus '{folder_name}' not found (a folder that holds '{marker}'; looked in: {looked}). "
        "Pass --data_folder with the corpus's folder or the folder above it, or set MIFUSE_CORPORA."
    )


def split_speakers(speakers: Sequence[str], splits: Mapping[str, float]) -> dict[str, list[str]]:
    """Deal speakers to splits in the corpus's fixed order, each split getting its share of the speakers.

    The outcome depends on the arguments alone: no seed, no directory order.

    Parameters
    ----------
    speakers : sequence of str
        All speakers, in the fixed order of the corpus's file.
    splits : mapping of str to float
        Share of the speakers for each split; the shares add up to 1.

    Returns
    -------
    dict of str to list of str
        Disjoint, each with at least one speaker.

    Raises
    ------
    CorpusError
        If the shares do not add up to 1 or there are fewer speakers than splits.

    Example
    -------
    >>> split_speakers(["a", "b", "c", "d", "e"], {"train": 0.6, "test": 0.4})
    {'train': ['a', 'b', 'c'], 'test': ['d', 'e']}
    """
    if abs(sum(splits.values()) - 1.0) > 1e-6 or len(speakers) < len(splits):
        raise CorpusError(f"Cannot deal {len(speakers)} speakers to {dict(splits)}: shares must add up to 1.")
    dealt, start, share = {}, 0, 0.0
    for place, (name, part) in enumerate(splits.items(), start=1):
        share += part
        later = len(splits) - place
        stop = min(max(round(share * len(speakers)), start + 1), len(speakers) - later)
        dealt[name] = list(speakers[start:stop])
        start = stop
    return dealt


def check_utterances(corpus: str, utterances: Sequence[Utterance]) -> None:
    """Refuse a corpus listing that is empty or repeats an id.

    Parameters
    ----------
    corpus : str
        Name for messages.
    utterances : sequence of Utterance
        What the corpus's file found.

    Raises
    ------
    CorpusError
        Naming the first utterance at fault.

    Example
    -------
    >>> check_utterances("toy", [])
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.corpora.manifest.CorpusError: toy: no utterance found. Is --data_folder the right one?
    """
    if not utterances:
        raise CorpusError(f"{corpus}: no utterance found. Is --data_folder the right one?")
    seen = {}
    for utterance in utterances:
        first = seen.setdefault(utterance.utt_id, utterance)
        if first is not utterance:
            raise CorpusError(f"{corpus}: {first.wav} and {utterance.wav} share the id '{utterance.utt_id}'.")


def map_label(label_map: Mapping[str, str | None], code: str, where: str | Path) -> str | None:
    """Translate a corpus's own label, `None` meaning that the class is left out.

    Parameters
    ----------
    label_map : mapping
        From the corpus's codes to our label names or `None`.
    code : str
        The corpus's code.
    where : str or pathlib.Path
        File or line for the message.

    Returns
    -------
    str or None
        Our label.

    Raises
    ------
    CorpusError
        If the code is not in the map.

    Example
    -------
    >>> map_label({"W": "angry", "L": None}, "W", "03a01Wa.wav")
    'angry'
    """
    if code not in label_map:
        raise CorpusError(f"{where}: unknown label '{code}'; known are {', '.join(sorted(label_map))}.")
    return label_map[code]


def find_unusable(utterances: Iterable[Utterance]) -> tuple[dict[str, float], dict[str, str]]:
    """Look at every recording's header, and at the bytes of those that might be doubled.

    Parameters
    ----------
    utterances : iterable of Utterance
        In a fixed order: of two identical files the first one stays.

    Returns
    -------
    lengths : dict of str to float
        Seconds, by utterance id, of the recordings that can be used.
    skipped : dict of str to str
        Reason, by utterance id, of those that cannot: missing, unreadable, empty, or a copy of another.

    Example
    -------
    >>> lengths, skipped = find_unusable([Utterance("t-a", Path("missing.wav"), "sad", "1")])
    >>> lengths, list(skipped)
    ({}, ['t-a'])
    """
    lengths, skipped, by_size, by_content = {}, {}, {}, {}
    for utterance in utterances:
        try:
            lengths[utterance.utt_id] = duration(utterance.wav)
            by_size.setdefault(utterance.wav.stat().st_size, []).append(utterance)
        except BadAudio as error:
            skipped[utterance.utt_id] = str(error)
    # Only files of equal size can be copies, so most corpora are never read whole here.
    for utterance in (u for same in by_size.values() if len(same) > 1 for u in same):
        digest = hashlib.sha256(utterance.wav.read_bytes()).digest()
        first = by_content.setdefault(digest, utterance)
        if first is not utterance:
            skipped[utterance.utt_id] = f"{utterance.wav}: is a copy of {first.wav}. Remove one of them."
            del lengths[utterance.utt_id]
    return lengths, skipped


def write_splits(
    corpus: str,
    utterances: Iterable[Utterance],
    data_folder: str | Path,
    save_folder: str | Path,
    splits: Mapping[str, float],
    speaker_order: Sequence[str],
) -> dict[str, Path]:
    """Validate a corpus and write one manifest per split, with a twin that has no labels.

    Recordings whose header cannot be read, or that are empty, are left out and listed in `skipped.json`.

    Parameters
    ----------
    corpus : str
        Name for messages and for `skipped.json`.
    utterances : iterable of Utterance
        All labelled recordings that take part.
    data_folder : str or pathlib.Path
        The corpus's folder, replaced by `{data_root}` in the manifest.
    save_folder : str or pathlib.Path
        Where `<split>.json`, `<split>_unlabelled.json` and `skipped.json` go.
    splits : mapping of str to float
        Share of the speakers for each split.
    speaker_order : sequence of str
        The corpus's speakers in the fixed order in which they are dealt; others follow, sorted by name.

    Returns
    -------
    dict of str to pathlib.Path
        Manifest of each split.

    Raises
    ------
    CorpusError
        If nothing is found, an id is doubled, or a split ends up empty.

    Example
    -------
    >>> import soundfile, numpy
    >>> root = Path(tempfile.mkdtemp())
    >>> soundfile.write(root / "a.wav", numpy.zeros(1600), 16000)
    >>> soundfile.write(root / "b.wav", numpy.ones(1600), 16000)
    >>> listed = [Utterance("t-a", root / "a.wav", "sad", "1"), Utterance("t-b", root / "b.wav", "sad", "2")]
    >>> paths = write_splits("toy", listed, root, root / "m", {"train": 0.5, "test": 0.5}, ["1", "2"])
    >>> json.loads(paths["train"].read_text())
    {'t-a': {'wav': '{data_root}/a.wav', 'length': 0.1, 'emo': 'sad', 'speaker': '1'}}
    """
    utterances = sorted(utterances, key=lambda utterance: utterance.utt_id)
    check_utterances(corpus, utterances)
    present = {utterance.speaker for utterance in utterances}
    order = [s for s in speaker_order if s in present]
    dealt = split_speakers([*order, *sorted(present.difference(order))], splits)
    where = {speaker: split for split, speakers in dealt.items() for speaker in speakers}
    lengths, skipped = find_unusable(utterances)
    # First, because a kill between two splits must not leave manifests of two dealings that count as whole.
    (Path(save_folder) / ABOUT).unlink(missing_ok=True)
    report_skipped(corpus, skipped, save_folder)
    entries = {split: {} for split in splits}
    for utterance in utterances:
        if utterance.utt_id in lengths:
            wav = "{data_root}/" + utterance.wav.relative_to(data_folder).as_posix()
            row = {"wav": wav, "length": round(lengths[utterance.utt_id], 4)}
            row |= {"emo": utterance.emo, "speaker": utterance.speaker}
            entries[where[utterance.speaker]][utterance.utt_id] = row
    paths = {
        split: write_manifest(corpus, rows, Path(save_folder) / f"{split}.json") for split, rows in entries.items()
    }
    about = {"corpus": corpus, "data_root": str(Path(data_folder).resolve()), "splits": dict(splits)}
    about |= {"speakers": dealt, "code_version": __version__}
    # Last, because its presence tells that everything before it is whole.
    atomic_write(Path(save_folder) / ABOUT, json.dumps(about, indent=1))
    return paths


def write_manifest(corpus: str, rows: Mapping[str, Mapping], path: Path) -> Path:
    """Write one split, and beside it the twin without labels.

    Parameters
    ----------
    corpus : str
        Name for the message.
    rows : mapping of str to mapping
        Entries by utterance id.
    path : pathlib.Path
        `<split>.json`; the twin is `<split>_unlabelled.json`.

    Returns
    -------
    pathlib.Path
        The path.

    Raises
    ------
    CorpusError
        If there is no row.

    Example
    -------
    >>> path = Path(tempfile.mkdtemp()) / "train.json"
    >>> path = write_manifest("toy", {"t-a": {"wav": "a.wav", "emo": "sad"}}, path)
    >>> json.loads(unlabelled(path).read_text())
    {'t-a': {'wav': 'a.wav'}}
    """
    if not rows:
        raise CorpusError(f"{corpus}: split '{path.stem}' holds no readable recording (see skipped.json).")
    atomic_write(path, json.dumps(rows, indent=1))
    bare = {key: {k: v for k, v in row.items() if k != "emo"} for key, row in rows.items()}
    atomic_write(unlabelled(path), json.dumps(bare, indent=1))
    return path


def unlabelled(path: str | Path) -> Path:
    """Path of a manifest's twin without labels.

    Parameters
    ----------
    path : str or pathlib.Path
        A labelled manifest.

    Returns
    -------
    pathlib.Path
        Its twin.

    Example
    -------
    >>> unlabelled("save/train.json").name
    'train_unlabelled.json'
    """
    path = Path(path)
    return path.with_name(f"{path.stem}_unlabelled.json")


def report_skipped(corpus: str, skipped: Mapping[str, str], save_folder: str | Path) -> None:
    """Log what was left out and keep the list beside the manifests.

    Parameters
    ----------
    corpus : str
        Name for the message.
    skipped : mapping of str to str
        Reason by utterance id.
    save_folder : str or pathlib.Path
        Folder of `skipped.json`, which is written even when empty.

    Example
    -------
    >>> folder = Path(tempfile.mkdtemp())
    >>> report_skipped("toy", {}, folder)
    >>> (folder / "skipped.json").read_text()
    '{}'
    """
    for reason in skipped.values():
        logger.warning("%s: left out: %s", corpus, reason)
    atomic_write(Path(save_folder) / "skipped.json", json.dumps(dict(skipped), indent=1))


def read_manifest(path: str | Path) -> dict[str, dict]:
    """Read a manifest with `{data_root}` filled in from the `corpus.json` beside it.

    Parameters
    ----------
    path : str or pathlib.Path
        A file that `write_splits` wrote.

    Returns
    -------
    dict of str to dict
        Entry by utterance id.

    Raises
    ------
    CorpusError
        If a file is missing or is not a manifest.

    Example
    -------
    >>> folder = Path(tempfile.mkdtemp())
    >>> atomic_write(folder / "train.json", '{"t-a": {"wav": "{data_root}/a.wav", "speaker": "1"}}')
    >>> atomic_write(folder / "corpus.json", '{"data_root": "/toy"}')
    >>> read_manifest(folder / "train.json")["t-a"]["wav"]
    '/toy/a.wav'
    """
    try:
        root = json.loads((Path(path).parent / ABOUT).read_text())["data_root"]
        rows = json.loads(Path(path).read_text())
        return {key: {**row, "wav": row["wav"].replace("{data_root}", root)} for key, row in rows.items()}
    except FileNotFoundError as error:
        raise CorpusError(f"{error.filename}: not found. Run the recipe's preparation first.") from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CorpusError(f"{path}: not a manifest ({error!r}). Delete it and prepare again.") from None


def is_prepared(save_folder: str | Path, data_folder: str | Path, splits: Mapping[str, float]) -> bool:
    """Whether the manifests of just these arguments are there, whole.

    Parameters
    ----------
    save_folder : str or pathlib.Path
        Folder of the manifests.
    data_folder : str or pathlib.Path
        The corpus's folder.
    splits : mapping of str to float
        Share of the speakers for each split.

    Returns
    -------
    bool
        True if preparation can be skipped.

    Example
    -------
    >>> is_prepared("/nowhere", "/toy", {"train": 1.0})
    False
    """
    try:
        about = json.loads((Path(save_folder) / ABOUT).read_text())
    except (OSError, ValueError):
        return False
    if not isinstance(about, dict):
        return False
    wanted = (str(Path(data_folder).resolve()), dict(splits), __version__)
    return wanted == tuple(about.get(key) for key in ("data_root", "splits", "code_version"))


@dataclass(frozen=True)
class Corpus:
    """What sets one corpus apart: where it lies, who speaks, how its recordings are listed.

    Parameters
    ----------
    name : str
        Name in messages, tables and results.
    folder_name : str
        Usual name of its folder.
    marker : str
        Glob pattern that exists in every copy of it.
    speakers : tuple of str
        Speakers in the fixed order in which they are dealt to splits; others follow, sorted by name.
    list_utterances : callable
        From the corpus's folder to its labelled recordings.

    Example
    -------
    >>> toy = Corpus("toy", "toy", "*.wav", ("1", "2"), lambda folder: [])
    >>> toy.prepare("/nowhere", "/nowhere", {"train": 1.0})
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.corpora.manifest.CorpusError: Corpus 'toy' not found: /nowhere is no folder. ...
    """

    name: str
    folder_name: str
    marker: str
    speakers: tuple[str, ...]
    list_utterances: Callable[[Path], list[Utterance]]

    def prepare(self, data_folder, save_folder, splits) -> None:
        """Write speaker-independent manifests, unless they are there already.

        Parameters
        ----------
        data_folder : str or pathlib.Path or None
            The corpus's folder, the folder above it, or `None` to look in `MIFUSE_CORPORA`.
        save_folder : str or pathlib.Path
            Where the manifests go.
        splits : mapping of str to float
            Share of the speakers for each split.

        Raises
        ------
        CorpusError
            If the corpus is not found or a recording does not fit.
        """
        folder = find_corpus(self.folder_name, self.marker, data_folder)
        if is_prepared(save_folder, folder, splits):
            logger.info("%s: manifests in %s are up to date, preparation skipped.", self.name, save_folder)
            return
        write_splits(self.name, self.list_utterances(folder), folder, save_folder, splits, self.speakers)
