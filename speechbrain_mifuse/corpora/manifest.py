"""Manifests: one JSON file per split, in the form `DynamicItemDataset.from_json` reads.

Every entry is `{"wav": "{data_root}/...", "length": seconds, "emo": ..., "speaker": ...}`, with `session` or
`partition` where the corpus has them, and `"speaker_known": false` where `speaker` is but a stand-in; an unlabelled
manifest is the same file without `emo`. Ids are unique across corpora because each corpus puts its own prefix before
them. `corpus.json` beside them says what they were made from.
"""

from __future__ import annotations

import contextlib
import fnmatch
import gc
import hashlib
import json
import logging
import math
import os
import stat
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from speechbrain_mifuse import __version__
from speechbrain_mifuse.audio import BadAudio, duration
from speechbrain_mifuse.audio_files import ENDINGS
from speechbrain_mifuse.corpora.splits import balanced_groups
from speechbrain_mifuse.errors import UserError, writing
from speechbrain_mifuse.progress import progress
from speechbrain_mifuse.texts import shown

logger = logging.getLogger(__name__)

LABELS = ("angry", "happy", "neutral", "sad")
ABOUT = "corpus.json"
TWIN = "_unlabelled"
# Stands for the corpus's folder at the beginning of a path.
ROOT = "{data_root}"
FLAGS = "--data_folder (or --source_data_folder, --teacher_data_folder)"

# Of each split, either a share of the speakers or sessions, or a list of the corpus's official partitions; where it has
# none, of its speakers or sessions.
Splits = Mapping[str, float] | Mapping[str, Sequence[str]]

# From this many recordings on, looking at each of them shows progress.
MANY = 5000
# Seconds that an entry may claim.
LONGEST_LENGTH = 1e9
# Bytes of a file from which on it must hold data; file systems that compress make holes of zeros.
MAX_SPARSE_BYTES = 100_000_000
# Digits of a whole number in a JSON file: reading thousands of them takes long, and no length or count has so many.
LONGEST_INT = 40
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
        """Give the utterance's entry in a manifest.

        Parameters
        ----------
        data_folder : str or pathlib.Path
            The corpus's folder, replaced by `{data_root}`.
        length : float
            Seconds.

        Returns
        -------
        dict
            Without what the corpus does not have.
        """
        wav = f"{ROOT}/" + self.wav.relative_to(data_folder).as_posix()
        row = {"wav": wav, "length": round(length, 4), "emo": self.emo, "speaker": self.speaker}
        row |= {"session": self.session, "partition": self.partition}
        row |= {} if self.speaker_known else {"speaker_known": False}
        return {key: value for key, value in row.items() if value is not None}


def atomic_write(path: str | Path, data: str | bytes) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part.

    Parameters
    ----------
    path : str or pathlib.Path
        Target; its folder is made when missing.
    data : str or bytes
        Whole content.

    Raises
    ------
    WriteError
        If the system does not let it be written; what was there stays.

    Example
    -------
    >>> path = Path(tempfile.mkdtemp()) / "a" / "b.txt"
    >>> atomic_write(path, "text")
    >>> path.read_text()
    'text'
    """
    with replacing(path) as file:
        # Names of files may hold bytes that are no text; they must not stop a table from being written.
        file.write(data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data)


@contextlib.contextmanager
def replacing(path: str | Path, advice: str = "") -> Iterator[IO[bytes]]:
    """Write a file piece by piece; it appears under its name when the block ends, whole or not at all."""
    path = Path(path)
    with writing(path, advice):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.")
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise


def file_digest(path: str | Path) -> str:
    """Identity of a file's content."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def find_corpus(folder_name: str, marker: str | Sequence[str], data_folder: str | Path | None = None) -> Path:
    """Find a corpus's own folder from the folder that a user named."""
    markers = [marker] if isinstance(marker, str) else list(marker)
    given = data_folder or os.environ.get("MIFUSE_CORPORA")
    remedy = f"Pass {FLAGS} with the corpus's folder or the folder above it"
    if not given:
        raise CorpusError(f"Corpus '{folder_name}' not found: no folder was given. {remedy}, or set MIFUSE_CORPORA.")
    place = Path(given)
    # A mistyped folder must not end in another corpus.
    if not place.is_dir():
        raise CorpusError(f"Corpus '{folder_name}' not found: {place} is no folder. {remedy}.")
    for folder in (place, place.resolve().parent) if data_folder else (place,):
        found = _corpora_in(folder, folder_name, markers)
        if len(found) > 1:
            copies = ", ".join(copy.name for copy in found)
            raise CorpusError(f"{folder} holds '{folder_name}' more than once ({copies}). Name one as --data_folder.")
        if found:
            if folder != place:
                logger.warning("'%s' is not in %s; the folder beside it is taken: %s.", folder_name, place, found[0])
            return found[0]
    raise CorpusError(
        f"Corpus '{folder_name}' not found (a folder that holds '{markers[0]}'): it is neither {place} nor in it"
        f"{' nor beside it' if data_folder else ', which MIFUSE_CORPORA names'}. {remedy}."
    )


def _corpora_in(place: Path, folder_name: str, markers: Sequence[str]) -> list[Path]:
    """Find a corpus at a place: the place itself, or else the folders in it that have its name in any case."""

    def is_corpus(folder: Path) -> bool:
        return folder.is_dir() and any(next(folder.glob(marker), None) is not None for marker in markers)

    if is_corpus(place):
        return [place]
    # Unlike iterdir, glob passes over what may not be read.
    named = (folder for folder in place.glob("*") if fnmatch.fnmatch(folder.name.lower(), folder_name.lower()))
    return sorted(folder for folder in named if is_corpus(folder))


def by_stem(paths: Iterable[Path]) -> dict[str, Path]:
    """Find recordings by their names without the ending: copies of a corpus convert the audio to other formats."""
    audio = [path for path in paths if path.suffix.lower() in ENDINGS and not path.name.startswith(".")]
    found = {}
    for path in sorted(audio, key=lambda path: (path.suffix.lower() != ".wav", len(path.parts), path)):
        found.setdefault(path.stem, path)
    return {stem: found[stem] for stem in sorted(found)}


def split_groups(groups: Sequence[str], splits: Mapping[str, float], kind: str = "speaker") -> dict[str, list[str]]:
    """Deal speakers or sessions to splits in the corpus's fixed order, each split getting its share of them.

    The outcome depends on the arguments alone: no seed, no directory order.

    Parameters
    ----------
    groups : sequence of str
        All speakers or sessions, in the fixed order of the corpus's file.
    splits : mapping of str to float
        Share of the groups for each split; the shares add up to 1.
    kind : str
        What a group is, for the message.

    Returns
    -------
    dict of str to list of str
        Disjoint, each with at least one group.

    Raises
    ------
    CorpusError
        If the shares do not add up to 1 or there are fewer groups than splits.

    Example
    -------
    >>> split_groups(["a", "b", "c", "d", "e"], {"train": 0.6, "test": 0.4})
    {'train': ['a', 'b', 'c'], 'test': ['d', 'e']}
    """
    _require_shares(splits, len(groups), kind)
    dealt, start, share = {}, 0, 0.0
    for place, (name, part) in enumerate(splits.items(), start=1):
        share += part
        later = len(splits) - place
        stop = min(max(round(share * len(groups)), start + 1), len(groups) - later)
        dealt[name] = list(groups[start:stop])
        start = stop
    return dealt


def _require_shares(splits: Mapping[str, float], groups: int, kind: str) -> None:
    """Refuse shares that cannot be given."""
    if abs(sum(splits.values()) - 1.0) > 1e-6 or groups < len(splits):
        raise CorpusError(
            f"Cannot deal {groups} {kind}s to {dict(splits)}: "
            f"shares must add up to 1, and every split needs a {kind} of its own."
        )


def choose_partitions(
    known: Iterable[str], splits: Mapping[str, Sequence[str]], kind: str = "partition"
) -> dict[str, list[str]]:
    """Give each split the official partitions, speakers or sessions that it asks for."""
    if not all(isinstance(part, Sequence) and not isinstance(part, str) for part in splits.values()):
        raise CorpusError(f"splits: {dict(splits)} must be shares that add up to 1, or lists of {kind}s.")
    wanted = Counter(partition for part in splits.values() for partition in part)
    wrong = sorted(partition for partition, times in wanted.items() if partition not in known or times > 1)
    if wrong:
        raise CorpusError(
            f"splits: {kind} {', '.join(map(str, wrong))} is unknown, holds no labelled recording, or is asked for "
            f"twice; there are {', '.join(sorted(known)) or 'none'}."
        )
    return {split: list(part) for split, part in splits.items()}


def deal(
    utterances: Sequence[Utterance],
    splits: Splits,
    order: Sequence[str] = (),
    group: str = "speaker",
    balanced: bool = False,
) -> tuple[str, dict[str, list[str]]]:
    """Decide which speakers, sessions or official partitions each split gets."""
    if any(not isinstance(part, int | float) for part in splits.values()):
        kind = "partition" if any(utterance.partition for utterance in utterances) else group
        return kind, choose_partitions({getattr(u, kind) for u in utterances} - {None}, splits, kind)
    present = {getattr(utterance, group) for utterance in utterances}
    if balanced:
        _require_shares(splits, len(present), group)
        counts = {name: Counter() for name in present}
        for utterance in utterances:
            counts[getattr(utterance, group)][utterance.emo] += 1
        return group, balanced_groups(counts, splits, group)
    stand_ins = present & {utterance.speaker for utterance in utterances if not utterance.speaker_known}
    ordered = [name for name in order if name in present - stand_ins]
    named = [*ordered, *sorted(present.difference(stand_ins, ordered))]
    return group, split_groups(evenly(named, sorted(stand_ins)), splits, group)


def evenly(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """Join two lists so that any stretch of the whole holds about the same share of both."""
    place = {name: (number + 0.5) / len(part) for part in (first, second) for number, name in enumerate(part)}
    return sorted(place, key=place.get)


def leave_out_shared(placed: Mapping[str, Sequence[Utterance]]) -> tuple[dict[str, list[Utterance]], dict[str, str]]:
    """Take out of a split the recordings of speakers who are in a later split as well."""
    kept, left_out, seen = {}, {}, {}
    for split in reversed(list(placed)):
        shared = [utterance for utterance in placed[split] if utterance.speaker in seen]
        kept[split] = [utterance for utterance in placed[split] if utterance.speaker not in seen]
        for u in shared:
            place = seen[u.speaker]
            left_out[u.utt_id] = (
                f"{u.wav}: its speaker {u.speaker} is also in split '{place}', so it takes no part in '{split}'."
            )
        seen |= dict.fromkeys({utterance.speaker for utterance in kept[split]}, split)
    return {split: kept[split] for split in placed}, left_out


def thin_out(utterances: Sequence[Utterance], keep: Mapping[str, float] | None) -> list[Utterance]:
    """Keep only a share of some classes: a simulated skew of the classes."""
    known = sorted({str(utterance.emo) for utterance in utterances if utterance.emo})
    dropped = set()
    for label, share in (keep or {}).items():
        if label not in known or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise CorpusError(
                f"keep: {{{label}: {share}}} must be a share between 0 and 1 of one of these labels: "
                f"{', '.join(known) or 'none, the recordings are unlabelled'}."
            )
        ids = [utterance.utt_id for utterance in utterances if utterance.emo == label]
        ids.sort(key=lambda utt_id: hashlib.sha256(utt_id.encode()).digest())
        dropped.update(ids[round(share * len(ids)) :])
    return [utterance for utterance in utterances if utterance.utt_id not in dropped]


def check_release(corpus: str, utterances: Iterable[Utterance], by: str, expected: Mapping[str, int]) -> dict:
    """Compare a copy of a corpus with the published counts, and say so where it differs."""
    found = Counter(getattr(utterance, by) for utterance in utterances)
    found = {name: found[name] for name in sorted({*expected, *found})}
    matches = found == dict(expected)
    if not matches:
        differing = ", ".join(
            f"{name}: expected {expected.get(name, 0)}, found {count}"
            for name, count in found.items()
            if count != expected.get(name, 0)
        )
        logger.warning(
            "%s: this copy is not the published release: %d utterances expected, %d found (by %s: %s). "
            "Its figures are not comparable with published ones.",
            *(corpus, sum(expected.values()), sum(found.values()), by, differing),
        )
    return {
        "counted_by": by,
        "expected": dict(expected),
        "found": found,
        "total_expected": sum(expected.values()),
        "total_found": sum(found.values()),
        "matches": matches,
    }


def with_unusable(facts: Mapping, unusable: int) -> dict:
    """Add how many recordings cannot be used, and bring it together with what `check_release` found in the labels."""
    told = {**facts, "unusable": unusable}
    if check := facts.get("release_check"):
        told["release_check"] = {**check, "matches": check["matches"] and not unusable, "unusable": unusable}
    return told


def warn_of_unusable(corpus: str, about: Mapping, save_folder: str | Path) -> None:
    """Say when recordings of a corpus cannot be used: at every run, also when nothing is prepared anew."""
    if about.get("unusable"):
        logger.warning(
            "%s: %d utterances cannot be used: their recordings are missing, unreadable or copies of others, see %s.%s "
            "Restore the recordings, delete %s and run again.",
            corpus,
            about["unusable"],
            Path(save_folder) / "skipped.json",
            " The figures are not comparable with published ones." if "release_check" in about else "",
            Path(save_folder) / ABOUT,
        )


def check_utterances(corpus: str, utterances: Sequence[Utterance]) -> None:
    """Refuse a corpus listing that is empty or repeats an id."""
    if not utterances:
        raise CorpusError(f"{corpus}: no utterance found. Is --data_folder the right one?")
    seen = {}
    for utterance in utterances:
        first = seen.setdefault(utterance.utt_id, utterance)
        if first is not utterance:
            raise CorpusError(f"{corpus}: {first.wav} and {utterance.wav} share the id '{utterance.utt_id}'.")


def map_label(label_map: Mapping[str, str | None], code: str, where: str | Path) -> str | None:
    """Translate a corpus's own label, `None` meaning that the class is left out."""
    if code not in label_map:
        raise CorpusError(f"{where}: unknown label '{code}'; known are {', '.join(sorted(label_map))}.")
    return label_map[code]


def find_unusable(utterances: Iterable[Utterance]) -> tuple[dict[str, float], dict[str, str]]:
    """Look at every recording's header, and at the bytes of those that might be doubled."""
    lengths, skipped, by_size, by_content = {}, {}, {}, {}
    utterances = list(utterances)
    for utterance in progress(utterances, desc="headers", unit="file", disable=len(utterances) < MANY):
        try:
            lengths[utterance.utt_id] = duration(utterance.wav)
            by_size.setdefault(utterance.wav.stat().st_size, []).append(utterance)
        except BadAudio as error:
            skipped[utterance.utt_id] = str(error)
    # Only files of equal size can be copies, so most corpora are never read whole here.
    alike = [utterance for same in by_size.values() if len(same) > 1 for utterance in same]
    for utterance in progress(alike, desc="copies", unit="file", disable=len(alike) < MANY):
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
    splits: Splits,
    order: Sequence[str] = (),
    group: str = "speaker",
    keep: Mapping[str, float] | None = None,
    facts: Mapping | None = None,
    balanced: bool = False,
) -> dict[str, Path]:
    """Validate a corpus and write one manifest per split, with a twin that has no labels."""
    utterances = sorted(utterances, key=lambda utterance: utterance.utt_id)
    check_utterances(corpus, utterances)
    if any(utterance.emo for utterance in utterances):
        kind, dealt = deal(utterances, splits, order, group, balanced)
        where = {name: split for split, names in dealt.items() for name in names}
        placed = {split: [u for u in utterances if where.get(getattr(u, kind)) == split] for split in splits}
        placed, shared = leave_out_shared(placed)
        about = {f"{kind}s": dealt}
    else:
        placed, shared, about = dict.fromkeys(splits, utterances), {}, {"labelled": False}
    chosen_ids = {u.utt_id for chosen in placed.values() for u in chosen}
    lengths, skipped = find_unusable(u for u in utterances if u.utt_id in chosen_ids)
    placed = {split: [u for u in chosen if u.utt_id in lengths] for split, chosen in placed.items()}
    first = next(iter(placed))
    placed[first] = thin_out(placed[first], keep)
    # First, because a kill between two splits must not leave manifests of two dealings that count as whole.
    (Path(save_folder) / ABOUT).unlink(missing_ok=True)
    report_skipped(corpus, skipped | shared, save_folder)
    paths = {}
    for split, chosen in placed.items():
        rows = {u.utt_id: u.row(data_folder, lengths[u.utt_id]) for u in chosen}
        paths[split] = write_manifest(corpus, rows, Path(save_folder) / f"{split}.json")
    about |= {
        "counts": {
            split: dict(sorted(Counter(u.emo or "unlabelled" for u in placed[split]).items())) for split in splits
        }
    }
    about |= {"shared_speakers_left_out": len(shared), **with_unusable(facts or {}, len(skipped))}
    warn_of_unusable(corpus, about, save_folder)
    settings = settings_of(corpus, utterances, data_folder, splits, keep)
    # Last, because its presence tells that everything before it is whole.
    atomic_write(Path(save_folder) / ABOUT, json.dumps(settings | about, indent=1))
    return paths


def settings_of(
    corpus: str,
    utterances: Iterable[Utterance],
    data_folder: str | Path,
    splits: Splits,
    keep: Mapping[str, float] | None,
) -> dict:
    """Everything that decides what the manifests hold, but for the recordings' own bytes."""
    root = Path(data_folder)
    rows = sorted(((u.utt_id, u.row(root, 0)) for u in utterances), key=lambda row: (row[0], row[1]["wav"]))
    return {
        "corpus": corpus,
        "data_root": str(root.resolve()),
        "splits": {split: part if isinstance(part, int | float) else list(part) for split, part in splits.items()},
        "keep": dict(keep) if keep else None,
        "listing": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        "code_version": __version__,
    }


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
        A file that `write_splits` wrote.

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


def bounded_bytes(path: str | Path, max_bytes: int | None = None) -> bytes:
    """Read a regular file of limited size: a named pipe or a device would never end."""
    refuse_unreadable(path)
    with open(path, "rb") as file:
        content = file.read(-1 if max_bytes is None else max_bytes + 1)
    if max_bytes is not None and len(content) > max_bytes:
        raise ValueError(f"more than {max_bytes} bytes")
    return content


def refuse_unreadable(path: str | Path) -> None:
    """Refuse what is no regular file, and a file made of holes, which takes memory and no disk."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if status.st_size > MAX_SPARSE_BYTES and held_bytes(path) < status.st_size // 2:
        raise ValueError(f"most of its {status.st_size} bytes are holes without data")


def held_bytes(path: str | Path) -> int:
    """Count the bytes that a file holds, without its holes: a sparse file can claim any size."""
    size = Path(path).stat().st_size
    if not hasattr(os, "SEEK_DATA"):
        return size
    held = end = 0
    with open(path, "rb", buffering=0) as file, contextlib.suppress(OSError):  # raised behind the last data
        while end < size:
            start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            held += end - start
    return held


def json_object(path: Path, max_bytes: int | None = None) -> dict:
    """Read a JSON object in which no key stands twice and every number is finite and of usual length."""
    try:
        return strict_object(bounded_bytes(path, max_bytes))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None


def strict_object(text: str | bytes) -> dict:
    """Decode a JSON object in which no key stands twice and every number is finite and of usual length."""
    try:
        found = json.loads(
            text,
            object_pairs_hook=_distinct,
            parse_constant=_no_number,
            parse_int=_short_int,
            parse_float=_finite_float,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found


def _distinct(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        # The last one would win, and with it perhaps another label.
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key '{shown(twice)}' stands twice in one object")
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _short_int(digits: str) -> int:
    if len(digits) > LONGEST_INT:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _finite_float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:40]} is no number")
    return number


def encodable(text: str) -> bool:
    r"""Whether a text can be written to a file: halves of surrogate pairs, which JSON can bring, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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


def is_prepared(save_folder: str | Path, settings: Mapping) -> bool:
    """Whether the manifests of just these settings were written to the end."""
    try:
        about = json.loads((Path(save_folder) / ABOUT).read_text())
    except (OSError, ValueError):
        return False
    # Compared as text, because the order of the splits decides who gets which speakers.
    return isinstance(about, dict) and json.dumps(settings) == json.dumps({key: about.get(key) for key in settings})


@dataclass(frozen=True)
class Corpus:
    """What sets one corpus apart: where it lies, who stays together, how its recordings are listed.

    Parameters
    ----------
    name : str
        Name in messages, tables and results.
    folder_name : str
        Usual name of its folder, or a glob pattern of it.
    marker : str or tuple of str
        Glob pattern that exists in every copy of it; one of them, if there are several.
    order : tuple of str
        Speakers, or sessions, in the fixed order in which they are dealt to splits; others follow, sorted by name.
    list_utterances : callable
        From the corpus's folder to its recordings.
    group : str
        What stays together in a split: `speaker`, or `session` where speakers talk to each other.
    facts : callable, optional
        From the corpus's folder and its recordings to what `corpus.json` shall say about this copy.
    balanced : bool
        Whether splits balance the classes, for a corpus without an official partition or order.

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
    marker: str | tuple[str, ...]
    order: tuple[str, ...]
    list_utterances: Callable[[Path], list[Utterance]]
    group: str = "speaker"
    facts: Callable[[Path, list[Utterance]], Mapping] | None = None
    balanced: bool = False

    def prepare(self, data_folder, save_folder, splits, keep=None) -> None:
        """Find the corpus and write speaker-independent manifests, unless they are there already.

        Parameters
        ----------
        data_folder : str or pathlib.Path or None
            The corpus's folder, the folder above it, or `None` to look in `MIFUSE_CORPORA`.
        save_folder : str or pathlib.Path
            Where the manifests go.
        splits : mapping
            For each split its share of the speakers or sessions, or its list of official partitions.
        keep : mapping of str to float, optional
            Simulated class skew: share of a class's recordings that stays in the first split.

        Raises
        ------
        CorpusError
            If the corpus is not found or a recording does not fit.
        """
        self.prepare_in(find_corpus(self.folder_name, self.marker, data_folder), save_folder, splits, keep)

    def prepare_in(self, folder: Path, save_folder, splits, keep=None) -> None:
        """Do what `prepare` does with the corpus's own folder.

        Parameters
        ----------
        folder : pathlib.Path
            The corpus's folder.
        save_folder, splits, keep
            As for `prepare`.

        Raises
        ------
        CorpusError
            If a recording does not fit.
        """
        utterances = self.list_utterances(folder)
        # Also when the rest is skipped: a copy that is not the published release, or not whole, is said at every run.
        facts = self.facts(folder, utterances) if self.facts else None
        if is_prepared(save_folder, settings_of(self.name, utterances, folder, splits, keep)):
            logger.info("%s: manifests in %s are up to date, preparation skipped.", self.name, save_folder)
            warn_of_unusable(self.name, read_about(Path(save_folder) / ABOUT), save_folder)
            return
        write_splits(
            *(self.name, utterances, folder, save_folder, splits, self.order, self.group, keep, facts, self.balanced)
        )
