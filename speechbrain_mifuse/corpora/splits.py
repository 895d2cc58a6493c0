"""Splits by speaker that balance the classes, for corpora without an official partition."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping

from speechbrain_mifuse.texts import shown

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
