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
    """What is understood of a folder: who speaks with which emotion, by what evidence, and what takes no part.

    Parameters
    ----------
    labels_from, speakers_from : str
        The evidence, for the log.
    rows : list of tuple
        Path below the folder, emotion or `None`, speaker or an empty string.
    outside : collections.Counter
        Recordings of emotions outside the four classes, by emotion.
    left_out : list of pathlib.Path
        Recordings of which no emotion is known although others have one.

    Example
    -------
    >>> Listing("file names", "file names").rows
    []
    """

    labels_from: str
    speakers_from: str
    rows: list[tuple[Path, str | None, str]] = field(default_factory=list)
    outside: Counter = field(default_factory=Counter)
    left_out: list[Path] = field(default_factory=list)

    def add(self, path: Path, emotion: str, speaker: str) -> None:
        """Take a recording of a known emotion, or count it if it is not among the four classes.

        Parameters
        ----------
        path : pathlib.Path
            Below the folder.
        emotion : str
            Its emotion.
        speaker : str
            Empty if not known.
        """
        if emotion in LABELS:
            self.rows.append((path, emotion, speaker))
        else:
            self.outside[emotion] += 1


@dataclass(frozen=True)
class Layout:
    """How a corpus names its recordings.

    Parameters
    ----------
    name : str
        The corpus.
    pattern : str
        Regular expression of the end of a path, without the file's ending: groups `speaker` and `code`.
    codes : mapping of str to str
        Emotion by code, in lower case.
    speakers : mapping of str to str
        Speakers who are also written in another way.

    Example
    -------
    >>> match = LAYOUTS[0].match("OAF_Fear/OAF_back_fear")
    >>> match["speaker"], LAYOUTS[0].codes[match["code"]]
    ('OAF', 'fearful')
    """

    name: str
    pattern: str
    codes: Mapping[str, str]
    speakers: Mapping[str, str] = field(default_factory=dict)

    def match(self, path: str) -> re.Match | None:
        """Match a recording's path.

        Parameters
        ----------
        path : str
            Below the folder, without the file's ending.

        Returns
        -------
        re.Match or None
            `None` unless the whole name fits.
        """
        return re.search(rf"(?:^|/)(?:{self.pattern})$", path)


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
        {
            **{"ang": "angry", "hap": "happy", "neu": "neutral", "sad": "sad"},
            **{"dis": "disgust", "fea": "fearful"},
        },
    ),
    Layout(
        "ESD",
        r"(?P<speaker>00[012]\d)/(?P<code>Angry|Happy|Neutral|Sad|Surprise)/"
        r"(?:(?:train|test|evaluation)/)?(?P=speaker)_\d{6}",
        {**{word: word for word in ("angry", "happy", "neutral", "sad")}, "surprise": "surprised"},
    ),
)


def read_file_names(found: Sequence[Path]) -> Listing | None:
    """Read emotions and speakers from file names, where nearly all of them are those of one known corpus.

    Parameters
    ----------
    found : sequence of pathlib.Path
        Recordings, below the folder.

    Returns
    -------
    Listing or None
        With a recording that lies in two folders only once; `None` if the folder is none of `LAYOUTS`.

    Example
    -------
    >>> read_file_names([Path("DC_sa01.wav"), Path("JE_h02.wav"), Path("KL_f03.wav")]).rows
    [(PosixPath('DC_sa01.wav'), 'sad', 'DC'), (PosixPath('JE_h02.wav'), 'happy', 'JE')]
    """
    names = {path: path.with_suffix("").as_posix() for path in found}
    for layout in LAYOUTS:
        matches = {path: match for path, name in names.items() if (match := layout.match(name))}
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
