"""How well criteria without labels would have chosen: rank correlation with UA, and what choosing by them gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import spearmanr

from speechbrain_mifuse.evaluation.aggregate import UPPER, Table


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation of the pairs that are finite; NaN where either side does not vary.

    Example
    -------
    >>> spearman([0.1, 0.2, 0.9, float("nan")], [1, 2, 3, 0])
    1.0
    """
    pairs = np.array([first, second], float)
    first, second = pairs[:, np.isfinite(pairs).all(0)]
    if len(set(first)) < 2 or len(set(second)) < 2:
        return float("nan")
    return float(spearmanr(first, second).statistic)


def selected(values: Sequence[float]) -> int:
    """Place of the highest value; of equal ones the last, of none that is finite the last of all."""
    values = np.where(np.isfinite(values), values, -np.inf)
    return len(values) - 1 - int(np.argmax(values[::-1]))


def selection_table(records: Sequence[Mapping]) -> str:
    """Report, for each criterion without labels, how it ranks snapshots and runs, and what selecting by it gives."""
    records = [record for record in records if record.get("snapshots") and record["method"] != UPPER]
    if not records:
        return ""
    runs = [sorted(record["snapshots"], key=lambda snapshot: snapshot["step"]) for record in records]
    transfers = [(record["source"], record["target"], record["teacher"]) for record in records]
    last, best = _mean_accuracy(runs, "step"), _mean_accuracy(runs, "UA")
    head = ["criterion", "rank correlation within a run", "between the runs of a transfer", "UA % of its choice"]
    rows = []
    for name in [key for key in runs[0][0] if key not in ("step", "UA")]:
        within = [spearman(_column(run, name), _column(run, "UA")) for run in runs]
        ends = [[run[-1] for run, found in zip(runs, transfers, strict=True) if found == t] for t in set(transfers)]
        between = [spearman(_column(end, name), _column(end, "UA")) for end in ends]
        chosen = _mean_accuracy(runs, name)
        gains = [f"{chosen - last:+.1f}", f"{chosen - best:+.1f}"]
        rows.append([name, _mean_correlation(within), _mean_correlation(between), f"{chosen:.1f}", *gains])
    rows.append(["last step", "", "", f"{last:.1f}", "", f"{last - best:+.1f}"])
    rows.append(["best snapshot (needs labels)", "", "", f"{best:.1f}", f"{best - last:+.1f}", ""])
    told = (
        f"\nSpearman's correlation with UA on the test set, mean over the runs or transfers counted in brackets; where "
        f"either is constant there is none. Higher is better for every criterion by convention. "
        f"Runs: {len(records)}; methods: {len({record['method'] for record in records})}; "
        f"snapshots of a run: {min(map(len, runs))} to {max(map(len, runs))}.\n"
    )
    return Table([*head, "above last step", "above best snapshot"], rows).markdown() + told


def _column(snapshots: Sequence[Mapping], name: str) -> list[float]:
    return [float("nan") if (value := snapshot.get(name)) is None else value for snapshot in snapshots]


def _mean_accuracy(runs: Sequence[Sequence[Mapping]], criterion: str) -> float:
    return 100 * float(np.mean([run[selected(_column(run, criterion))]["UA"] for run in runs]))


def _mean_correlation(found: Sequence[float]) -> str:
    known = [value for value in found if np.isfinite(value)]
    return f"{np.mean(known):+.2f} ({len(known)})" if known else "none"
