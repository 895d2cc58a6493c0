"""Emotions and speakers from the names of the folders on the way to a recording: facts about a whole level, or none."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from speechbrain_mifuse.corpora.emotion_words import all_emotions, plain, resembling
from speechbrain_mifuse.corpora.layouts import Listing
from speechbrain_mifuse.corpora.manifest import LABELS, CorpusError
from speechbrain_mifuse.utils.texts import counted, shown

# A level whose folders are all named so holds no speakers: containers, parts of the material, dates.
NOT_SPEAKERS = re.compile(
    r"(wavs?|audios?|data|recordings?|samples?|sounds?|clips?|part|session|take|dis[ck]|cd|block|set|fold|day|"
    r"train|training|test|valid|validation|val|dev|development|eval|evaluation) ?\d{0,2}|"
    r"(19|20)\d\d ?[01]\d ?[0-3]\d"
)
# Names of one level that a message shows.
MAX_NAMES = 4


def read_folder_names(root: Path, found: Sequence[Path]) -> Listing:
    """Read emotions and speakers from the folders on the way to the recordings."""
    levels = _levels(found)
    emotions = {at: all_emotions(names) or {} for at, names in enumerate(levels)}
    emotions = {at: words for at, words in emotions.items() if set(words.values()) & set(LABELS)}
    if len(emotions) > 1:
        raise _unclear(root, found, f"{_described(levels, emotions)} could both be emotions")
    if not emotions:
        _require_no_resemblance(root, found, levels)
        return _unlabelled(found, levels)
    (at,) = emotions
    speakers = _speaker_levels(levels, at)
    if len(speakers) > 1:
        raise _unclear(root, found, f"{_described(levels, speakers)} could both be speakers")
    listing = Listing("folders", "folders")
    for path in found:
        emotion = _name(path, at)
        if emotion is None:
            listing.left_out.append(path)
        else:
            listing.add(path, emotions[at][emotion], _speaker(path, speakers))
    other = next((path for path in listing.left_out if resembling(path.parts[:-1])), None)
    if other:
        what = f"{_described(levels, [at])} gives emotions, but {shown(other.as_posix())} has one at another level"
        raise _unclear(root, found, what)
    return listing


def _levels(found: Sequence[Path]) -> list[list[str]]:
    """Distinct names of the folders at each depth."""
    deepest = max((len(path.parts) - 1 for path in found), default=0)
    return [sorted({name for path in found if (name := _name(path, at)) is not None}) for at in range(deepest)]


def _name(path: Path, at: int) -> str | None:
    """Name of the folder at a depth, if the recording lies that deep."""
    return path.parts[at] if at < len(path.parts) - 1 else None


def _speaker_levels(levels: Sequence[Sequence[str]], emotion: int | None) -> list[int]:
    """Depths whose folders may be speakers."""
    return [
        at
        for at, names in enumerate(levels)
        if at != emotion and not all(NOT_SPEAKERS.fullmatch(plain(name)) for name in names)
    ]


def _speaker(path: Path, speakers: Sequence[int]) -> str:
    """Speaker of a recording; empty if no level, or more than one, could name one."""
    return (_name(path, speakers[0]) or "") if len(speakers) == 1 else ""


def _unlabelled(found: Sequence[Path], levels: Sequence[Sequence[str]]) -> Listing:
    """All recordings, without emotions; with speakers where one level could name them."""
    speakers = _speaker_levels(levels, None)
    evidence = f"folders ({_described(levels, speakers)} could be speakers)" if len(speakers) > 1 else "folders"
    return Listing("folders", evidence, [(path, None, _speaker(path, speakers)) for path in found])


def _require_no_resemblance(root: Path, found: Sequence[Path], levels: Sequence[Sequence[str]]) -> None:
    """Stop where some folders are named like emotions and the others are not: either reading could be wrong."""
    for at, names in enumerate(levels):
        alike = resembling(names)
        if alike:
            counts = Counter(alike.get(_name(path, at), "not understood") for path in found)
            others = [name for name in names if name not in alike]
            if others:
                what = (
                    f"some folders look like emotions ({_listed(sorted(alike))}) and others do not ({_listed(others)})"
                )
            else:
                what = f"{_listed(sorted(alike))} may be emotions, but they are not two plain names in one language"
            raise _unclear(root, found, f"{what}; recordings: {counted(counts)}")


def _unclear(root: Path, found: Sequence[Path], what: str) -> CorpusError:
    """Error that says what was understood and how to say what is meant."""
    return CorpusError(
        f"{root}: the names of its folders do not say for certain who speaks with which emotion: {what}. "
        f"Put a labels.csv into the folder: the line file,emo,speaker and one line for each recording, such as "
        f"{shown(found[0].as_posix())},sad,anna. Leave emo empty in all lines if there are no labels."
    )


def _described(levels: Sequence[Sequence[str]], which: Sequence[int]) -> str:
    """Folder levels with some of their names."""
    return " and ".join(f"folder level {at + 1} ({_listed(levels[at])})" for at in which)


def _listed(names: Sequence[str]) -> str:
    """Join some of the names."""
    more = f", ... {len(names)} in all" if len(names) > MAX_NAMES else ""
    return shown(", ".join(names[:MAX_NAMES]) + more)
