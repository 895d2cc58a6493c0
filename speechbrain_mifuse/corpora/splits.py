"""Splits by speaker that balance the classes, for corpora without an official partition."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from speechbrain_mifuse import __version__
from speechbrain_mifuse.corpora.manifest import CorpusError, Utterance
from speechbrain_mifuse.utils.texts import shown

logger = logging.getLogger(__name__)

# Distance between the share of a class that a split gets and the share that was asked for, from which on it is said.
UNEVEN = 0.15
# Groups up to which pairs of them are exchanged: the time grows with the square.
MAX_EXCHANGED = 150


def balanced_groups(
    counts: Mapping[str, Mapping[str, int]], splits: Mapping[str, float], kind: str = "speaker"
) -> dict[str, list[str]]:
    """Assign whole groups to splits so that each split gets its share of every class and of the groups."""
    # The number of groups is balanced as if it were a class.
    vectors = {name: {**counts[name], None: 1} for name in sorted(counts)}
    total = sum((Counter(vector) for vector in vectors.values()), Counter())
    wanted = {split: {key: share * count for key, count in total.items()} for split, share in splits.items()}
    held = {split: Counter() for split in splits}
    where = {}
    for name in sorted(vectors, key=lambda name: (-sum(vectors[name].values()), name)):
        left = len(vectors) - len(where)
        empty = [split for split in splits if split not in where.values()] if left <= len(splits) else []
        choices = empty if len(empty) >= left else list(splits)
        where[name] = min(choices, key=lambda split: _change(vectors[name], held[split], wanted[split], total))
        held[where[name]].update(vectors[name])
    while _improve(vectors, where, held, wanted, total):
        pass
    _report_uneven(vectors, where, splits, total, kind)
    return {split: sorted(name for name in where if where[name] == split) for split in splits}


def _change(vector: Mapping, held: Mapping, wanted: Mapping, total: Mapping, sign: int = 1) -> float:
    """Change of a split's squared distance from its shares by adding (or taking away) a group."""
    return sum(
        ((held[key] + sign * count - wanted[key]) ** 2 - (held[key] - wanted[key]) ** 2) / total[key] ** 2
        for key, count in vector.items()
        if count
    )


def _improve(vectors: Mapping, where: dict, held: Mapping, wanted: Mapping, total: Mapping) -> bool:
    """Make the first move of one group, or exchange of two, that comes closer to the shares."""
    if len(vectors) > MAX_EXCHANGED:
        return False
    sizes = Counter(where.values())
    for name, vector in vectors.items():
        origin = where[name]
        for split in held:
            gain = _change(vector, held[origin], wanted[origin], total, -1)
            gain += _change(vector, held[split], wanted[split], total)
            if split != origin and sizes[origin] > 1 and gain < -1e-9:
                _move(vector, name, split, where, held)
                return True
        for other, second in vectors.items():
            split = where[other]
            if other <= name or split == origin:
                continue
            difference = {key: second.get(key, 0) - vector.get(key, 0) for key in {**vector, **second}}
            gain = _change(difference, held[origin], wanted[origin], total)
            gain += _change(difference, held[split], wanted[split], total, -1)
            if gain < -1e-9:
                _move(vector, name, split, where, held)
                _move(second, other, origin, where, held)
                return True
    return False


def _move(vector: Mapping, name: str, split: str, where: dict, held: Mapping) -> None:
    """Move a group into another split."""
    held[where[name]].subtract(vector)
    held[split].update(vector)
    where[name] = split


def _report_uneven(vectors: Mapping, where: Mapping, splits: Mapping, total: Mapping, kind: str) -> None:
    """Say which class could not be divided as asked, and between how many groups it was to be divided."""
    for label in sorted(key for key in total if key):
        holders = [name for name in vectors if vectors[name].get(label)]
        for split, share in splits.items():
            count = sum(vectors[name][label] for name in holders if where[name] == split)
            if not count or abs(count / total[label] - share) > UNEVEN:
                logger.warning(
                    "split '%s' has %d of %d recordings of '%s', %.0f %% were asked for: %d %s have this class (%s).",
                    *(split, count, total[label], label, 100 * share),
                    *(len(holders), f"{kind}s" if len(holders) > 1 else kind, shown(", ".join(holders[:3]))),
                )


# Of each split, either a share of the speakers or sessions, or a list of the corpus's official partitions; where it has
# none, of its speakers or sessions.
Splits = Mapping[str, float] | Mapping[str, Sequence[str]]


def split_groups(groups: Sequence[str], splits: Mapping[str, float], kind: str = "speaker") -> dict[str, list[str]]:
    """Assign speakers or sessions to splits in the corpus's fixed order, whatever the seed and the disk's order."""
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


# How the sentences of the first split may relate to those of the last: all others, or the same ones.
SENTENCES = ("apart", "same")


def by_sentence(
    placed: Mapping[str, Sequence[Utterance]], sentences: str | None, sentence_of: Callable[[Utterance], str] | None
) -> dict[str, Sequence[Utterance]]:
    """Leave every second sentence to the last split, and the others, or the same ones, to the first."""
    if sentences is None:
        return dict(placed)
    if sentences not in SENTENCES or sentence_of is None:
        what = "this corpus's file names do not name any" if sentence_of is None else f"'{sentences}'"
        raise CorpusError(f"sentences: {what}; it must be null, or {' or '.join(SENTENCES)} for an acted corpus.")
    if len(placed) < 2:
        raise CorpusError("sentences: there must be two splits at least, one to adapt and one to test.")
    first, *_, last = placed
    known = sorted({sentence_of(utterance) for chosen in placed.values() for utterance in chosen})
    tested = set(known[1::2])
    if not tested:
        raise CorpusError("sentences: all recordings say one sentence, so none is left to test on.")

    def wanted(split: str, utterance: Utterance) -> bool:
        in_test = sentence_of(utterance) in tested
        return in_test if split == last else in_test == (sentences == "same") if split == first else True

    return {split: [u for u in chosen if wanted(split, u)] for split, chosen in placed.items()}


def settings_of(
    corpus: str,
    utterances: Iterable[Utterance],
    data_folder: str | Path,
    splits: Splits,
    keep: Mapping[str, float] | None,
    sentences: str | None = None,
) -> dict:
    """Everything that decides what the manifests hold, but for the recordings' own bytes."""
    root = Path(data_folder)
    rows = sorted(((u.utt_id, u.row(root, 0)) for u in utterances), key=lambda row: (row[0], row[1]["wav"]))
    return {
        "corpus": corpus,
        "data_root": str(root.resolve()),
        "splits": {split: part if isinstance(part, int | float) else list(part) for split, part in splits.items()},
        "keep": dict(keep) if keep else None,
        **({"sentences": sentences} if sentences else {}),
        "listing": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        "code_version": __version__,
    }
