"""Public corpora that the folder corpus knows by their file names: TESS, SAVEE, CREMA-D, ESD. One row each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from speechbrain_mifuse.corpora.manifest import LABELS

# Share of a folder's recordings that must be named as a layout says.
NEARLY_ALL = 0.95


@dataclass
class Listing:
    """What is understood of a folder: who speaks with which emotion, by what evidence, and what takes no part."""

    labels_from: str
    speakers_from: str
    rows: list[tuple[Path, str | None, str]] = field(default_factory=list)
    outside: Counter = field(default_factory=Counter)
    left_out: list[Path] = field(default_factory=list)

    def add(self, path: Path, emotion: str, speaker: str) -> None:
        """Take a recording of a known emotion, or count it if it is not among the four classes."""
        if emotion in LABELS:
            self.rows.append((path, emotion, speaker))
        else:
            self.outside[emotion] += 1


@dataclass(frozen=True)
class Layout:
    """How a corpus names its recordings."""

    name: str
    pattern: str
    codes: Mapping[str, str]
    speakers: Mapping[str, str] = field(default_factory=dict)


LAYOUTS = (
    Layout(
        "TESS",
        r"(?P<speaker>OAF?|YAF)_[a-z]+_(?P<code>angry|disgust|fear|happy|neutral|ps|sad)",
        {
            **{word: word for word in ("angry", "happy", "neutral", "sad", "disgust")},
            "fear": "fearful",
            "ps": "surprised",
        },
        # One file of the release is misspelled: OA_bite_neutral.wav.
        {"OA": "OAF"},
    ),
    Layout(
        "SAVEE",
        r"(?P<speaker>DC|JE|JK|KL)[_/](?P<code>a|d|f|h|n|sa|su)\d\d",
        {
            **{"a": "angry", "h": "happy", "n": "neutral", "sa": "sad"},
            **{"d": "disgust", "f": "fearful", "su": "surprised"},
        },
    ),
    Layout(
        "CREMA-D",
        r"(?P<speaker>1\d{3})_[A-Z]{3}_(?P<code>ANG|DIS|FEA|HAP|NEU|SAD)_[A-Z]{1,2}",
        {**{"ang": "angry", "hap": "happy", "neu": "neutral", "sad": "sad"}, **{"dis": "disgust", "fea": "fearful"}},
    ),
    Layout(
        "ESD",
        r"(?P<speaker>00[012]\d)/(?P<code>Angry|Happy|Neutral|Sad|Surprise)/"
        r"(?:(?:train|test|evaluation)/)?(?P=speaker)_\d{6}",
        {**{word: word for word in ("angry", "happy", "neutral", "sad")}, "surprise": "surprised"},
    ),
)


def read_file_names(found: Sequence[Path]) -> Listing | None:
    """Read emotions and speakers from file names, where nearly all of them are those of one known corpus."""
    names = {path: path.with_suffix("").as_posix() for path in found}
    for layout in LAYOUTS:
        pattern = re.compile(rf"(?:^|/)(?:{layout.pattern})$")
        matches = {path: match for path, name in names.items() if (match := pattern.search(name))}
        if found and len(matches) >= NEARLY_ALL * len(found):
            return _listed(layout, matches, found)
    return None


def _listed(layout: Layout, matches: Mapping[Path, re.Match], found: Sequence[Path]) -> Listing:
    """List the utterances of a known corpus, each once."""
    distinct = {}
    for path in sorted(matches, key=lambda path: (len(path.parts), path)):
        distinct.setdefault(matches[path].group().lstrip("/"), path)
    listing = Listing(f"{layout.name} file names", f"{layout.name} file names")
    for path in sorted(distinct.values()):
        match = matches[path]
        speaker = layout.speakers.get(match["speaker"], match["speaker"])
        listing.add(path, layout.codes[match["code"].lower()], speaker)
    doubled = len(matches) - len(distinct)
    if doubled:
        listing.labels_from += f" (each utterance once: {doubled} are there a second time)"
    listing.left_out = sorted(set(found).difference(matches))
    return listing
