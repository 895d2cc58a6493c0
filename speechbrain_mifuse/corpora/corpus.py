"""A corpus as a recipe knows it: found, listed, dealt to splits, and prepared once."""

from __future__ import annotations

import fnmatch
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from speechbrain_mifuse.corpora.checks import check_utterances, find_unusable, warn_of_unusable, with_unusable
from speechbrain_mifuse.corpora.manifest import (
    ABOUT,
    LABELS,
    CorpusError,
    Utterance,
    read_about,
    report_skipped,
    write_manifest,
)
from speechbrain_mifuse.corpora.splits import Splits, by_sentence, deal, leave_out_shared, settings_of, thin_out
from speechbrain_mifuse.utils.audio_files import ENDINGS
from speechbrain_mifuse.utils.files import atomic_write
from speechbrain_mifuse.utils.texts import shown

logger = logging.getLogger(__name__)

FLAGS = "--data_folder (or --source_data_folder, --teacher_data_folder)"


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


def common_classes(emotions: Mapping[str, str | None]) -> dict[str, str | None]:
    """Give a map of labels in which all but the four common classes are left out."""
    return {code: emotion if emotion in LABELS else None for code, emotion in emotions.items()}


def map_label(label_map: Mapping[str, str | None], code: str, where: str | Path) -> str | None:
    """Translate a corpus's own label, `None` meaning that the class is left out."""
    if code not in label_map:
        raise CorpusError(f"{where}: unknown label '{code}'; known are {', '.join(sorted(label_map))}.")
    return label_map[code]


def own_recordings(
    corpus: str,
    paths: Iterable[Path],
    pattern: re.Pattern,
    label_map: Mapping[str, str | None],
    emotions: Mapping[str, str],
    other_parts: re.Pattern | None = None,
) -> list[tuple[Path, re.Match, str]]:
    """List the recordings of the wanted classes by their file names, and log what takes no part."""
    audio = sorted(path for path in paths if path.suffix.lower() in ENDINGS and path.name[0] != ".")
    own = [path for path in audio if _code(pattern, path) in emotions]
    rest = sorted(set(audio).difference(own))
    parts = [path for path in rest if other_parts and other_parts.fullmatch(path.stem)]
    _report_strange(corpus, sorted(set(rest).difference(parts)), len(audio))
    if parts:
        logger.info("%s: %d files of other parts of the release take no part.", corpus, len(parts))
    distinct = by_stem(own)
    if len(distinct) < len(own):
        doubled = next(path for path in own if distinct[path.stem] != path)
        logger.warning(
            "%s: %d recordings are there a second time (first: %s); each utterance counts once.",
            *(corpus, len(own) - len(distinct), shown(doubled)),
        )
    matches = [(path, pattern.fullmatch(stem)) for stem, path in distinct.items()]
    report_other_classes(corpus, (emotions[m["code"]] for _, m in matches if label_map[m["code"]] is None))
    return [(path, match, emo) for path, match in matches if (emo := label_map[match["code"]]) is not None]


def _code(pattern: re.Pattern, path: Path) -> str | None:
    """Emotion code in a recording's name, if it has the corpus's form."""
    match = pattern.fullmatch(path.stem)
    return match["code"] if match else None


def _report_strange(corpus: str, strange: list[Path], audio: int) -> None:
    """Count files that are not named as the corpus's are; if they are most, it is another corpus."""
    if not strange:
        return
    what = f"{corpus}: {len(strange)} of {audio} audio files are not named as this corpus's recordings"
    what += f" (first: {shown(strange[0])})"
    if 2 * len(strange) > audio:
        raise CorpusError(f"{what}. Is --data_folder the right one? Restore the release's own file names.")
    logger.warning("%s and take no part.", what)


def report_other_classes(corpus: str, emotions: Iterable[str]) -> None:
    """Log how many recordings are left out because of their class."""
    counts = Counter(emotions)
    if counts:
        listed = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
        logger.info("%s: %d recordings of other classes take no part: %s.", corpus, counts.total(), listed)


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
    sentences: str | None = None,
    sentence_of: Callable[[Utterance], str] | None = None,
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
    placed = by_sentence(placed, sentences, sentence_of)
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
    settings = settings_of(corpus, utterances, data_folder, splits, keep, sentences)
    # Last, because its presence tells that everything before it is whole.
    atomic_write(Path(save_folder) / ABOUT, json.dumps(settings | about, indent=1))
    return paths


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
    sentence_of : callable, optional
        From a recording to the sentence that is said in it, for an acted corpus.

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
    sentence_of: Callable[[Utterance], str] | None = None

    def prepare(self, data_folder, save_folder, splits, keep=None, sentences=None) -> None:
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
        sentences : str, optional
            Every second sentence alone is left in the last split; `apart` leaves the first split the other ones, so
            that nothing is tested that was adapted to in another voice, and `same` the same ones, for comparison.

        Raises
        ------
        CorpusError
            If the corpus is not found or a recording does not fit.
        """
        self.prepare_in(find_corpus(self.folder_name, self.marker, data_folder), save_folder, splits, keep, sentences)

    def prepare_in(self, folder: Path, save_folder, splits, keep=None, sentences=None) -> None:
        """Do what `prepare` does with the corpus's own folder."""
        utterances = self.list_utterances(folder)
        # Also when the rest is skipped: a copy that is not the published release, or not whole, is said at every run.
        facts = self.facts(folder, utterances) if self.facts else None
        if is_prepared(save_folder, settings_of(self.name, utterances, folder, splits, keep, sentences)):
            logger.info("%s: manifests in %s are up to date, preparation skipped.", self.name, save_folder)
            warn_of_unusable(self.name, read_about(Path(save_folder) / ABOUT), save_folder)
            return
        write_splits(
            *(self.name, utterances, folder, save_folder, splits, self.order, self.group, keep, facts, self.balanced),
            *(sentences, self.sentence_of),
        )
