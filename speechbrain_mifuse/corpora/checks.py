"""What is checked of a corpus before its manifests are written."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from speechbrain_mifuse.corpora.manifest import ABOUT, CorpusError, Utterance
from speechbrain_mifuse.utils.audio import BadAudio, duration
from speechbrain_mifuse.utils.progress import progress

logger = logging.getLogger(__name__)

# From this many recordings on, looking at each of them shows progress.
MANY = 5000


def check_release(corpus: str, utterances: Iterable[Utterance], by: str, expected: Mapping[str, int]) -> dict:
    """Compare a copy of a corpus with the published counts, and say so where it differs.

    Example
    -------
    >>> copy = [Utterance("t-a", Path("a.wav"), "sad", "1"), Utterance("t-b", Path("b.wav"), "sad", "1")]
    >>> check_release("toy", copy, "emo", {"sad": 2})["matches"]
    True
    """
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
