"""What each section of the page shows: rows of tables and figures. `templates/sections.html` puts them into words.

The sections about one transfer are functions of a `Case` (all runs of it) that give `None` where the folder has no
data for them. No method is computed here: a run has left its weights and predictions in files. The equations are in
`adaptation/` (the weight of a teacher: `fusion.py`).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from speechbrain_mifuse.evaluation.aggregate import (
    LOWER,
    Comparison,
    Table,
    difference_table,
    interval_table,
    many,
    seed_table,
    transfer_table,
)
from speechbrain_mifuse.evaluation.metrics import Reliability, reliability, unweighted_accuracy
from speechbrain_mifuse.nnet.calibration import tempered
from speechbrain_mifuse.report.cases import TEACHER, Case, Outcome, Run
from speechbrain_mifuse.report.figures import Line, curves, histogram, limits, reliability_figure, scatter
from speechbrain_mifuse.report.templating import percent

BASELINES = (LOWER, TEACHER, "lalm_sfuda")
# With more speakers than these, quantiles over the speakers replace the columns.
MAX_SPEAKERS = 24
QUANTILES = {"lowest": 0, "lower quarter": 25, "middle": 50, "upper quarter": 75, "highest": 100}
MEASURES = {"mi": "mutual information", "entropy": "entropy of the mean"}


class Section(NamedTuple):
    """One part of the page."""

    title: str
    data: Mapping


class Cell(NamedTuple):
    """A cell of a table that is more than its text."""

    text: str = ""
    share: float | None = None
    note: str = ""
    side: str = ""
    bar: Sequence[tuple] = ()


class Drawn(NamedTuple):
    """SVG figures of one method, each with a sentence or none."""

    caption: str
    parts: Sequence[tuple[str, str]]
    legend: Sequence[str] = ()


def sections_of(case: Case, intervals: Mapping[str, Sequence[float]] | None = None) -> list[Section]:
    """Make the sections about one transfer; those without data are left out."""
    first = _methods_section(case, intervals or {}) if case.scored else _predictions_section(case)
    return [first, *(section for make in SECTIONS if (section := make(case)) is not None)]


def _methods_section(case: Case, intervals: Mapping[str, Sequence[float]]) -> Section:
    if len(case.runs) == 1:
        intervals = {r["method"]: [100 * bound for bound in r["ci95"]] for r in case.records if r.get("ci95")}
    bounds = [bound for interval in intervals.values() for bound in interval]
    scale = (min(bounds), max(bounds)) if bounds else (0.0, 100.0)
    seeds, rows = ["seeds"] if len(case.runs) > 1 else [], []
    for name in case.methods:
        ua, wa, f1 = (_mean_and_spread(case.scores(name, score)) for score in ("UA", "WA", "macro_F1"))
        told, drawn = "", ""
        if name in intervals:
            low, high = intervals[name]
            told, drawn = f"{low:.1f} to {high:.1f}", _interval_bar(case.mean(name), low, high, scale)
        found = method_reliability(case, name)
        unanswered = sum(outcome.record.get("unanswered", 0) for outcome in case.outcomes(name))
        count = [str(len(case.outcomes(name)))] if seeds else []
        error = "" if found is None else percent(found.error)
        rows.append([name, *count, ua, told, drawn, wa, f1, error, str(unanswered)])
    told = f"{scale[0]:.0f} to {scale[1]:.0f}"
    return Section("Methods", {"n_test": case.record["n_test"], "seeds": seeds, "scale": told, "rows": rows})


def _mean_and_spread(values: Sequence[float]) -> str:
    spread = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{spread}"


def _interval_bar(mean: float, low: float, high: float, scale: tuple[float, float]) -> Cell:
    x, a, b = (round(4 + 112 * (v - scale[0]) / max(scale[1] - scale[0], 1e-9), 1) for v in (mean, low, high))
    return Cell(bar=[(a, 7, round(b - a, 1), 2, "c0"), (round(x - 3, 1), 5, 6, 6, "c0")])


def _predictions_section(case: Case) -> Section:
    rows = []
    for name in case.methods:
        chosen = np.concatenate([run.chosen(name) for run in case.runs_of(name)])
        shares = [np.mean(chosen == index) for index in (*range(len(case.labels)), -1)]
        rows.append([name, *(percent(float(share)) for share in shares)])
    return Section("Predictions", {"labels": case.labels, "rows": rows})


def _verdict_section(case: Case) -> Section | None:
    judged = [(run.record["seed"], run.verdict) for run in case.runs if run.verdict is not None]
    if not judged:
        return None
    verdicts = [(seed, verdict["figures"], verdict["warnings"]) for seed, verdict in judged]
    return Section("Signs without labels", {"caveat": judged[0][1]["caveat"], "verdicts": verdicts})


def _confusion_section(case: Case) -> Section | None:
    if not case.scored:
        return None
    matrices = []
    for name in case.figured:
        counts = case.by_speaker(name).sum(0)
        columns = [*case.labels, "no answer"][: len(case.labels) + int(counts[:, -1].sum() > 0)]
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        rows = [
            [label, *(Cell(str(n), s, f"{100 * s:.0f} %") for n, s in zip(*row, strict=True))]
            for label, *row in zip(
                case.labels, counts[:, : len(columns)].tolist(), shares[:, : len(columns)].tolist(), strict=True
            )
        ]
        matrices.append((f"{name}, UA {case.mean(name):.1f} %", columns, rows))
    seeds = ", summed over the seeds" if len(case.runs) > 1 else ""
    return Section("Confusion matrices", {"seeds": seeds, "matrices": matrices})


def _shaded(names: Sequence[str], values: Sequence[np.ndarray], digits: int) -> list[list]:
    """Rows of numbers, shaded from the lowest to the highest of all."""
    low, high = min(map(np.min, values)), max(map(np.max, values))
    span = max(high - low, 1e-9)
    return [
        [name, *(Cell(f"{value:.{digits}f}", (value - low) / span) for value in row.tolist())]
        for name, row in zip(names, values, strict=True)
    ]


def _speakers_section(case: Case) -> Section | None:
    if not case.scored:
        return None
    values = [100 * unweighted_accuracy(case.by_speaker(name)).numpy() for name in case.methods]
    head = list(case.record["by_speaker"])
    data = {"speakers": len(head), "quantiles": len(head) > MAX_SPEAKERS}
    if data["quantiles"]:
        head, values = list(QUANTILES), [np.percentile(found, list(QUANTILES.values())) for found in values]
    return Section("Speakers", {**data, "head": head, "rows": _shaded(case.methods, values, 0)})


def _training_section(case: Case) -> Section | None:
    accuracy = {name: [line for o in case.outcomes(name) if (line := _accuracy(o))] for name in case.methods}
    loss = {name: _column(case, name, "loss") for name in case.methods}
    ylim = limits(value for lines in accuracy.values() for line in lines for value in line.y)
    figures = []
    for name in case.figured:
        parts = _chart(f"UA of {name} over the steps", accuracy[name], "step", "UA %", ylim)
        parts += _chart(f"Training loss of {name} over the epochs", loss[name], "epoch", "loss")
        figures += [Drawn(name, parts)] if parts else []
    if not figures:
        return None
    return Section("Training", {"figures": figures, "scored": any(accuracy.values()), "several": len(case.runs) > 1})


def _accuracy(outcome: Outcome) -> Line | None:
    found = [s for s in outcome.record.get("snapshots", ()) if s.get("UA") is not None]
    return Line([s["step"] for s in found], [100 * s["UA"] for s in found]) if found else None


def _column(case: Case, method: str, name: str) -> list[Line]:
    """Give a column of the training log of each seed that has numbers in it."""
    logs = [outcome.log for outcome in case.outcomes(method)]
    return [Line(log["epoch"], log[name]) for log in logs if any(map(math.isfinite, log.get(name, ())))]


def _chart(told: str, lines: Sequence[Line], x: str, y: str, ylim=None) -> list[tuple[str, str]]:
    if not lines:
        return []
    if len(lines) > 1:
        same = [line.y for line in lines if list(line.x) == list(lines[0].x)]
        lines = [*(line._replace(thin=True) for line in lines), Line(lines[0].x, np.mean(same, axis=0).tolist())]
    return [("", curves(told, lines, x, y, ylim))]


def _weights_section(case: Case) -> Section | None:
    lines = {name: _column(case, name, "lalm_weight") for name in case.methods}
    ylim = limits((value for found in lines.values() for line in found for value in line.y), least=0.1)
    rows, figures = [], []
    for name in case.figured:
        known = [outcome.saved_weights for outcome in case.outcomes(name) if outcome.saved_weights]
        parts = _chart(f"Mean weight of the API teacher in {name}", lines[name], "epoch", "mean weight", ylim)
        if known:
            weights, classifier, lalm = (
                [value for found in known for value in found[key]] for key in ("lalm_weight", "classifier", "lalm")
            )
            unsure = [value for value in lalm if value is not None]
            more = percent(float(np.mean(np.array(weights) > 0.5)))
            mean = f"{np.mean(unsure):.3f}" if unsure else ""
            silent = str(len(lalm) - len(unsure))
            rows.append([name, f"{np.mean(weights):.3f}", more, mean, f"{np.mean(classifier):.3f}", silent])
            measure = MEASURES.get(known[0]["measure"], known[0]["measure"])
            told, most = f"Uncertainty of both teachers of {name}", max(0.01, *unsure, *classifier)
            of_teacher = histogram(f"Weight of the API teacher in {name}", [weights], 1, "weight of the API teacher")
            parts = [("", of_teacher), ("", histogram(told, [unsure, classifier], most, measure)), *parts]
        if parts:
            figures.append(Drawn(name, parts, ["API teacher", "classifier"] if known else ()))
    return Section("Weights of the teachers", {"rows": rows, "figures": figures}) if figures else None


def _answers(case: Case, *methods: str) -> tuple[list[np.ndarray], np.ndarray | None]:
    """Put the answers of some methods beside each other, over all runs that hold them all."""
    runs = [run for run in case.runs_of(*methods) if all(run.outcomes[method].predictions for method in methods)]
    if not runs:
        return [np.array([], int) for _ in methods], None
    chosen = [np.concatenate([run.chosen(method) for run in runs]) for method in methods]
    known = [run.reference for run in runs]
    return chosen, None if any(found is None for found in known) else np.concatenate(known)


def _share(which: np.ndarray) -> str:
    return percent(float(which.mean())) if len(which) else ""


def _agreement_section(case: Case) -> Section | None:
    bases = [name for name in (LOWER, TEACHER) if name in case.methods]
    agreement, changes = [], {}
    for name in case.methods:
        row = [name]
        for base in bases:
            (own, other), _ = _answers(case, name, base)
            row.append(_share((own == other) & (own >= 0)) if name != base else "")
        agreement.append(row)
        if LOWER in bases and name != LOWER:
            (own, before), reference = _answers(case, name, LOWER)
            if reference is not None:
                right, was = own == reference, before == reference
                changes[name] = right & ~was, was & ~right, (own != before) & ~right & ~was
    differing, sides = _sides(case)
    data = {"bases": [f"as {base} %" for base in bases], "differing": differing, "sides": sides}
    if any(any(row[1:]) for row in agreement):
        data["agreement"] = agreement
        most = max((float(which.mean()) for found in changes.values() for which in found[:2]), default=0)
        flips = {name: [*map(_share, found), _flip_bar(*found[:2], most)] for name, found in changes.items()}
        data["flips"] = [[*row, *flips.get(row[0], [""] * 4)] for row in agreement] if flips else []
    return Section("Agreement and flips", data) if sides or data.get("agreement") else None


def _flip_bar(corrected: np.ndarray, spoiled: np.ndarray, most: float) -> Cell:
    """Draw the loss to the left and the gain to the right of a line."""
    left, right = (round(58 * float(which.mean()) / max(most, 1e-9), 1) for which in (spoiled, corrected))
    return Cell(bar=[(60 - left, 2, left, 12, "c1"), (60, 2, right, 12, "c0")])


def _sides(case: Case) -> tuple[str, list[list[str]]]:
    rows, differing = [], ""
    for name in case.methods if {LOWER, TEACHER} <= set(case.methods) else ():
        (own, source, teacher), reference = _answers(case, name, LOWER, TEACHER)
        if name in (LOWER, TEACHER) or not len(own):
            continue
        both = (source >= 0) & (teacher >= 0)
        apart, together = both & (source != teacher), both & (source == teacher)
        differing = _share(apart)
        row = [name, _share((own == source)[together]), *(_share((own == who)[apart]) for who in (source, teacher))]
        row.append(_share(((own != source) & (own != teacher))[apart]))
        if reference is not None:
            row += [_share((who == reference)[apart]) for who in (source, teacher, own)]
        rows.append(row)
    return differing, rows


def method_reliability(case: Case, method: str) -> Reliability | None:
    """Compare how sure a method is with how often it was right, over all runs, as sure as what it exported is."""
    runs = [run for run in case.runs_of(method) if run.outcomes[method].predictions and run.reference is not None]
    if not runs:
        return None
    stated, right = [], []
    for run in runs:
        chosen = run.chosen(method)
        answered = chosen >= 0
        probs = torch.from_numpy(run.probs(method)[answered])
        stated.append(tempered(probs, run.outcomes[method].temperature).amax(1))
        right.append(torch.from_numpy((chosen == run.reference)[answered]))
    return reliability(torch.cat(stated), torch.cat(right))


def _calibration_section(case: Case) -> Section | None:
    figures = []
    for name in case.figured:
        found = method_reliability(case, name)
        if found is not None and found.count:
            used = sorted({outcome.temperature for outcome in case.outcomes(name)})
            told = " to ".join(dict.fromkeys(f"{value:g}" for value in (used[0], used[-1])))
            caption = f"{name}, error {percent(found.error)} %" + f", temperature {told}" * (told != "1")
            drawn = reliability_figure(f"Reliability of {caption}", found.stated, found.frequency, found.count)
            figures.append(Drawn(caption, [("", drawn)]))
    return Section("Calibration", {"figures": figures}) if figures else None


def _embeddings_section(case: Case) -> Section | None:
    run = case.runs[0]
    figures = [
        Drawn(name, _moments(name, found, run))
        for name in case.figured
        if name in run.outcomes and (found := run.outcomes[name].embeddings)
    ]
    if not figures:
        return None
    data = {"shown": "predicted" if run.reference is None else "true", "seed": run.record["seed"]}
    return Section("Before and after", {**data, "labels": case.labels, "figures": figures})


def _moments(name: str, found: Mapping, run: Run) -> list[tuple[str, str]]:
    known = run.chosen(name) if run.reference is None else run.reference
    classes_by_id = dict(zip(run.ids, known.tolist(), strict=True))
    kept = [index for index, key in enumerate(found["ids"]) if key in classes_by_id]
    classes = np.array([classes_by_id[found["ids"][index]] for index in kept])
    moments = {when: np.array(found[when])[kept] for when in ("before", "after")}
    box = [limits(axis.tolist()) for axis in np.concatenate(list(moments.values())).T]
    parts = []
    for when, points in moments.items():
        told = f"{when}: {percent(_between_classes(points, classes))} % between the classes"
        parts.append((told, scatter(f"{name} {told}", points, classes, *box)))
    return parts


def _between_classes(points: np.ndarray, classes: np.ndarray) -> float:
    """Share of the variance of points that the means of their classes explain."""
    points = points - points.mean(0)
    own = [points[classes == label] for label in set(classes.tolist())]
    total = float((points**2).sum())
    return sum(len(part) * float((part.mean(0) ** 2).sum()) for part in own) / total if total else math.nan


SECTIONS: tuple[Callable[[Case], Section | None], ...] = (
    _verdict_section,
    _confusion_section,
    _agreement_section,
    _training_section,
    _weights_section,
    _calibration_section,
    _speakers_section,
    _embeddings_section,
)


# All transfers.


def comparison_sections(comparison: Comparison) -> list[Section]:
    """Make the sections about all transfers."""
    seeds = {"seeds": many(len(comparison.seeds), "seed")}
    rows = _shaded(comparison.methods, list(comparison.grid), 1)
    differences = difference_table(comparison, [name for name in BASELINES if name in comparison.methods])
    sections = [
        Section("Transfers", {**seeds, **_rows(transfer_table(comparison))}),
        Section("Heat map", {**seeds, "head": ["method", *comparison.transfers, "mean"], "rows": rows}),
        Section("Paired differences", _differences(differences)) if differences is not None else None,
        Section("Intervals", _rows(interval_table(comparison))),
        Section("Seeds", _rows(seed_table(comparison))),
    ]
    return list(itertools.filterfalse(lambda section: section is None, sections))


def _rows(found: Table) -> dict:
    return {"head": ["method", *found.head[1:]], "rows": found.rows}


def _differences(found: Table) -> dict:
    rows = [[*cells[:2], *(Cell(cell, side=_side(cell)) for cell in cells[2:])] for cells in found.rows]
    return {"head": ["method", "mean UA %", *found.head[2:]], "rows": rows}


def _side(cell: str) -> str:
    bounds = re.search(r"\(([+-][\d.]+) to ([+-][\d.]+)\)", cell)
    low, high = map(float, bounds.groups()) if bounds else (0, 0)
    return "up" if low > 0 else "down" if high < 0 else ""
