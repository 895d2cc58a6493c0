"""Sections of the report about one transfer: scores, verdict, confusions, flips, training, weights, calibration, ...

Each is a function of a `Case` (all runs of one transfer) and gives `None` where the folder has no data for it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from speechbrain_mifuse.evaluation.aggregate import LOWER, unweighted_accuracy
from speechbrain_mifuse.nnet.calibration import tempered
from speechbrain_mifuse.report.cases import TEACHER, Case, Outcome, Run
from speechbrain_mifuse.report.parts import (
    Html,
    Line,
    Shaded,
    bar,
    curves,
    ends,
    figure,
    grid,
    heat,
    histogram,
    joined,
    legend,
    reliability_figure,
    scatter,
    table,
    tag,
    two_bars,
)
from speechbrain_mifuse.report.teacher_report import Reliability, reliability

# More columns than these are no longer a table to read; quantiles over the speakers stand in their place.
MOST_SPEAKERS = 24
QUANTILES = {"lowest": 0, "lower quarter": 25, "middle": 50, "upper quarter": 75, "highest": 100}
WEIGHT_BINS = 20


class Section(NamedTuple):
    """One part of the page."""

    title: str
    sentence: str
    content: Html


def many(number: int, noun: str) -> str:
    """Count things."""
    return f"{number} {noun}" + "s" * (number != 1)


def percent(value: float | None) -> str:
    """Write a fraction in percent."""
    return "" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def sections_of(case: Case, intervals: Mapping[str, Sequence[float]] | None = None) -> list[Section]:
    """Make the sections about one transfer; those without data are left out."""
    made = [functools.partial(methods_section, intervals=intervals or {}), *SECTIONS[1:]]
    return [section for make in made if (section := make(case)) is not None]


def methods_section(case: Case, intervals: Mapping[str, Sequence[float]]) -> Section:
    """Show the scores of each method."""
    if not case.scored:
        return _predicted_section(case)
    if len(case.runs) == 1:
        intervals = {r["method"]: [100 * bound for bound in r["ci95"]] for r in case.records if r.get("ci95")}
    bounds = [bound for interval in intervals.values() for bound in interval]
    scale = (min(bounds), max(bounds)) if bounds else (0.0, 100.0)
    drawn = joined([f"{scale[0]:.0f} to {scale[1]:.0f}"])
    rows = []
    for name in case.methods:
        ua, wa, f1 = (_mean_and_spread(case.scores(name, score)) for score in ("UA", "WA", "macro_F1"))
        interval = intervals.get(name)
        told = "" if interval is None else f"{interval[0]:.1f} to {interval[1]:.1f}"
        mean = 100 * float(np.mean(case.scores(name, "UA")))
        found = calibration(case, name)
        unanswered = sum(outcome.record.get("unanswered", 0) for outcome in case.outcomes(name))
        cells = [ua, told, "" if interval is None else bar(mean, interval, scale), wa, f1]
        rows.append([name, *cells, "" if found is None else percent(found.error), str(unanswered)])
    if len(case.runs) > 1:
        rows = [[row[0], str(len(case.seeds(row[0]))), *row[1:]] for row in rows]
    head = ["UA %", "95 % interval", drawn, "WA %", "macro-F1 %", "calibration error %", "unanswered"]
    head = ["method", *(["seeds"] if len(case.runs) > 1 else []), *head]
    told = (
        "Unweighted accuracy (UA, mean recall of the classes) with its 95 % interval over test speakers, weighted "
        "accuracy (WA), macro-F1 and calibration error of each method, from the worst to the best between the bounds."
    )
    return Section("Methods", told, table(f"Scores on {case.record['n_test']} test utterances", head, rows))


def _mean_and_spread(values: Sequence[float]) -> str:
    spread = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{spread}"


def _predicted_section(case: Case) -> Section:
    rows = []
    for name in case.methods:
        chosen = np.concatenate([run.chosen(name) for run in case.runs_of(name)])
        shares = [np.mean(chosen == place) for place in (*range(len(case.labels)), -1)]
        rows.append([name, *(percent(float(share)) for share in shares)])
    told = "How often each method predicted each class; the test set has no labels, so nothing is scored."
    found = table("Share of the predictions in percent", ["method", *case.labels, "no answer"], rows)
    return Section("Predictions", told, found)


def verdict_section(case: Case) -> Section | None:
    """Say what the verdict without labels was."""
    judged = [run for run in case.runs if run.verdict is not None]
    if not judged:
        return None
    return Section("Signs without labels", judged[0].verdict["caveat"], joined(map(_verdict, judged)))


def _verdict(run: Run) -> Html:
    figures, found = run.verdict["figures"], run.verdict["warnings"]
    answered, changed = (f"{100 * figures[name]:.0f} %" for name in ("answered_by_teacher", "changed"))
    told = (
        f"Seed {run.record['seed']}: {figures['recordings']} recordings; the teacher answered {answered}; {changed} of "
        "the source's answers changed."
    )
    if not found:
        return joined([tag("p", told), tag("p", "No warning sign. That is no proof that it helped.")])
    signs = tag("ul", *(tag("li", line) for line in found))
    return joined([tag("p", told), tag("p", "Signs that something went wrong:"), tag("div", signs, class_="note")])


def by_speaker(case: Case, method: str) -> np.ndarray:
    """Confusion counts of each test speaker, summed over the runs."""
    return np.sum([list(outcome.record["by_speaker"].values()) for outcome in case.outcomes(method)], axis=0)


def confusion_section(case: Case) -> Section | None:
    """Show the confusion matrix of each method."""
    if not case.scored:
        return None
    made = []
    for name in case.figured:
        counts = by_speaker(case, name).sum(0)
        caption = f"{name}, UA {percent(float(np.mean(case.scores(name, 'UA'))))} %"
        made.append(confusion_table(counts, case.labels, caption))
    seeds = ", summed over the seeds" if len(case.runs) > 1 else ""
    told = (
        f"Each row is a true class, each column what was predicted: utterances{seeds}, and their share of the row, "
        "which also shades the cell."
    )
    return Section("Confusion matrices", told, grid(made))


def confusion_table(counts: np.ndarray, labels: Sequence[str], caption: str) -> Html:
    """Show one confusion matrix."""
    columns = [*labels, "no answer"][: len(labels) + int(counts[:, -1].sum() > 0)]
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    rows = []
    for place, label in enumerate(labels):
        cells = [
            Shaded(joined([count, tag("small", f"{100 * share:.0f} %")]), f"--share:{share:.2f}")
            for count, share in zip(counts[place, : len(columns)], shares[place], strict=False)
        ]
        rows.append([label, *cells])
    return table(caption, ["true", *columns], rows, "confusion", sort=False)


def speakers_section(case: Case) -> Section | None:
    """Show UA of each test speaker."""
    if not case.scored:
        return None
    accuracy = {}
    for name in case.methods:
        accuracy[name] = 100 * unweighted_accuracy(by_speaker(case, name))
    speakers = list(case.record["by_speaker"])
    if len(speakers) <= MOST_SPEAKERS:
        head, values = speakers, accuracy
        told = "UA in percent of each test speaker by colour: whether a method is good for all or for some."
    else:
        head = list(QUANTILES)
        values = {name: np.percentile(found, list(QUANTILES.values())) for name, found in accuracy.items()}
        told = f"How UA in percent is spread over the {len(speakers)} test speakers."
    scale = min(map(np.min, values.values())), max(map(np.max, values.values()))
    rows = [
        [name, *(Shaded(f"{value:.0f}", heat(value, *scale)) for value in found.tolist())]
        for name, found in values.items()
    ]
    return Section("Speakers", told, table("UA % by test speaker", ["method", *head], rows))


def training_section(case: Case) -> Section | None:
    """Draw what happened during the training of each method."""
    accuracy = {name: [_accuracy_line(outcome) for outcome in case.outcomes(name)] for name in case.methods}
    loss = {name: [_column_line(outcome, "loss") for outcome in case.outcomes(name)] for name in case.methods}
    lines = [line for found in accuracy.values() for line in found if line is not None]
    box = ends(value for line in lines for value in line.y)
    made = []
    for name in case.figured:
        parts = [
            _chart(accuracy[name], f"UA of {name} over the steps", "step", "UA %", box),
            _chart(loss[name], f"Training loss of {name} over the epochs", "epoch", "loss"),
        ]
        if any(parts):
            made.append(figure(name, *(part for part in parts if part)))
    if not made:
        return None
    told = "Training loss of each method" + (
        ", and UA on the test set at the moments of the log, scored afterwards and seen by no method." if lines else "."
    )
    if len(case.runs) > 1:
        told += " Thin lines are single seeds, the thick one their mean."
    return Section("Training", told, grid(made))


def _accuracy_line(outcome: Outcome) -> Line | None:
    found = [s for s in outcome.record.get("snapshots", ()) if s.get("UA") is not None]
    return Line([s["step"] for s in found], [100 * s["UA"] for s in found]) if found else None


def _column_line(outcome: Outcome, column: str) -> Line | None:
    log = outcome.log
    known = column in log and any(map(math.isfinite, log[column]))
    return Line(log["epoch"], log[column]) if known else None


def _chart(
    found: Sequence[Line | None], told: str, x: str, y: str, box: tuple[float, float] | None = None
) -> Html | None:
    lines = [line for line in found if line is not None]
    if not lines:
        return None
    if len(lines) > 1:
        lines = [line._replace(thin=True) for line in lines]
        same = [line for line in lines if list(line.x) == list(lines[0].x)]
        lines.append(Line(lines[0].x, np.mean([line.y for line in same], axis=0).tolist()))
    return curves(told, lines, x, y, box)


def weighing_section(case: Case) -> Section | None:
    """Show what the methods that weigh two teachers give to each."""
    rows, made = [], []
    lines = {name: [_column_line(outcome, "lalm_weight") for outcome in case.outcomes(name)] for name in case.methods}
    box = ends((value for found in lines.values() for line in found if line for value in line.y), least=0.1)
    for name in case.figured:
        known = [outcome.weighing for outcome in case.outcomes(name) if outcome.weighing]
        over_time = _chart(lines[name], f"Mean weight of the API teacher in {name}", "epoch", "mean weight", box)
        parts = [over_time] if over_time else []
        if known:
            rows.append([name, *_weighing_cells(known)])
            parts = [*_weighing_figures(name, known), *parts]
        if parts:
            made.append(figure(name, *parts))
    if not made:
        return None
    told = (
        "What the fused labels owe to the API teacher and what to the classifier: a histogram of the API teacher's "
        "weight over the utterances to adapt on and of how unsure either teacher is (0 is sure), at the end of the "
        "run, and the mean weight during training."
        if rows
        else "Mean weight of the API teacher in the fused labels during training; the rest is the classifier's."
    )
    head = ["method", "mean weight of the API teacher", "utterances in which it weighs more, %",
            "its mean uncertainty", "the classifier's mean uncertainty", "utterances without its answer"]  # fmt: skip
    found = [table("Weights at the end of the run", head, rows)] if rows else []
    return Section("Weights of the teachers", told, joined([*found, grid(made)]))


def _weighing_cells(known: Sequence[Mapping]) -> list[str]:
    weights = np.concatenate([found["lalm_weight"] for found in known])
    silent = [value is None for found in known for value in found["lalm"]]
    unsure = [value for found in known for value in found["lalm"] if value is not None]
    classifier = np.concatenate([found["classifier"] for found in known])
    return [
        f"{weights.mean():.3f}",
        percent(float((weights > 0.5).mean())),
        f"{np.mean(unsure):.3f}" if unsure else "",
        f"{classifier.mean():.3f}",
        str(sum(silent)),
    ]


MEASURES = {"mi": "mutual information", "entropy": "entropy of the mean"}


def _weighing_figures(name: str, known: Sequence[Mapping]) -> list[Html]:
    weights = [value for found in known for value in found["lalm_weight"]]
    groups = [[v for found in known for v in found[who] if v is not None] for who in ("lalm", "classifier")]
    most = max((value for group in groups for value in group), default=1.0)
    measure = MEASURES.get(known[0]["measure"], known[0]["measure"])
    return [
        histogram(f"Weight of the API teacher in {name}", [weights], (0, 1), "weight of the API teacher", WEIGHT_BINS),
        histogram(f"Uncertainty of both teachers of {name}", groups, (0, max(most, 0.01)), measure, WEIGHT_BINS),
        legend(["API teacher", "classifier"]),
    ]


def agreement_section(case: Case) -> Section | None:
    """Compare each method's answers with those of the source and of the API teacher."""
    tables = [found for make in (_flips, _sides) if (found := make(case)) is not None]
    if not tables:
        return None
    told = (
        "What adaptation changed: how often a method answers as the source classifier and as the API teacher do, which "
        "of the source's answers it corrected or spoiled, and whom it follows where the two differ."
    )
    return Section("Agreement and flips", told, joined(tables))


def answers(case: Case, *methods: str) -> tuple[list[np.ndarray], np.ndarray | None]:
    """Put the answers of some methods beside each other, over all runs that hold them all."""
    runs = [run for run in case.runs_of(*methods) if all(run.outcomes[method].predictions for method in methods)]
    if not runs:
        return [np.array([], int) for _ in methods], None
    chosen = [np.concatenate([run.chosen(method) for run in runs]) for method in methods]
    known = [run.reference for run in runs]
    return chosen, None if any(found is None for found in known) else np.concatenate(known)


def _share(which: np.ndarray) -> str:
    return percent(float(which.mean())) if len(which) else ""


def _flips(case: Case) -> Html | None:
    bases = [name for name in (LOWER, TEACHER) if name in case.methods]
    rows, gains = [], {}
    for name in case.methods:
        same = []
        for base in bases:
            (own, other), _ = answers(case, name, base)
            same.append(_share((own == other) & (own >= 0)) if name != base else "")
        cells = []
        if LOWER in bases:
            (own, before), reference = answers(case, name, LOWER)
            if reference is not None and name != LOWER:
                right, was = own == reference, before == reference
                gains[name] = float((was & ~right).mean()), float((right & ~was).mean())
                astray = (own != before) & ~right & ~was
                cells = [_share(right & ~was), _share(was & ~right), _share(astray)]
        rows.append([name, *same, *(cells or [""] * 3)])
    if not rows or not bases or not any(any(row[1:]) for row in rows):
        return None
    head = ["method", *(f"as {base} %" for base in bases)]
    if not gains:
        return table("Agreement, share of the test utterances", head, [row[: len(head)] for row in rows])
    most = max(max(pair) for pair in gains.values())
    drawn = [[*row, two_bars(*gains[row[0]], most) if row[0] in gains else ""] for row in rows]
    head += ["corrected %", "spoiled %", "other mistake %", joined(["spoiled | corrected"])]
    return table("Agreement, and changes of the source's answers, share of the test utterances", head, drawn)


def _sides(case: Case) -> Html | None:
    if not {LOWER, TEACHER} <= set(case.methods):
        return None
    rows, differing = [], ""
    for name in case.methods:
        if name in (LOWER, TEACHER):
            continue
        (own, source, teacher), reference = answers(case, name, LOWER, TEACHER)
        both = (source >= 0) & (teacher >= 0)
        apart, together = both & (source != teacher), both & (source == teacher)
        if not len(own):
            continue
        differing = _share(apart)
        chosen = [_share((own == source)[together]), *(_share((own == who)[apart]) for who in (source, teacher))]
        chosen.append(_share(((own != source) & (own != teacher))[apart]))
        if reference is not None:
            chosen += [_share((who == reference)[apart]) for who in (source, teacher, own)]
        rows.append([name, *chosen])
    if not rows:
        return None
    head = ["method", "both agree: follows %", "they differ: with the source %", "with the API teacher %",
            "with neither %", "right there: source %", "API teacher %", "method %"]  # fmt: skip
    caption = f"Source and API teacher differ in {differing} % of the test utterances"
    return table(caption, head[: len(rows[0])], rows)


def calibration(case: Case, method: str) -> Reliability | None:
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


def _temperature_told(case: Case, method: str) -> str:
    found = sorted({f"{outcome.temperature:g}" for outcome in case.outcomes(method)}, key=float)
    return "" if found == ["1"] else f", temperature {' to '.join(dict.fromkeys([found[0], found[-1]]))}"


def calibration_section(case: Case) -> Section | None:
    """Draw a reliability diagram of each method."""
    made = []
    for name in case.figured:
        found = calibration(case, name)
        if found is not None and found.count:
            caption = f"{name}, error {percent(found.error)} %{_temperature_told(case, name)}"
            told = f"Reliability of {caption}"
            made.append(figure(caption, reliability_figure(told, found.stated, found.frequency, found.count)))
    if not made:
        return None
    told = (
        "How often an answer is right against how sure it was, in ten bins; on the dashed line both are equal, below "
        "it the method is too sure. The calibration error is their mean distance. A student is as sure as the "
        "recogniser that was exported, at its temperature; source and API teacher are as sure as adaptation had them. "
        "Hollow: fewer than ten answers."
    )
    return Section("Calibration", told, grid(made))


def embedding_section(case: Case) -> Section | None:
    """Draw where the test utterances lie in the classifier before and after adaptation."""
    run = case.runs[0]
    made = []
    for name in case.figured:
        found = run.outcomes[name].embeddings if name in run.outcomes else None
        if found:
            made.append(_embedding_figure(name, found, run))
    if not made:
        return None
    shown_class = "predicted" if run.reference is None else "true"
    told = (
        "Hidden units of the classifier for each test utterance, in the source and in the adapted student, on the two "
        f"directions in which both together vary most; colour and mark are the {shown_class} class (seed "
        f"{run.record['seed']}). The share of the variance that lies between the classes grows as they come apart."
    )
    return Section("Before and after", told, joined([legend(case.labels, marks=True), grid(made)]))


def _embedding_figure(name: str, found: Mapping, run: Run) -> Html:
    known = run.reference if run.reference is not None else run.chosen(name)
    places = {key: place for place, key in enumerate(run.ids)}
    kept = [place for place, key in enumerate(found["ids"]) if key in places]
    classes = np.array([known[places[found["ids"][place]]] for place in kept])
    moments = [np.array(found[moment])[kept] for moment in ("before", "after")]
    box = tuple(ends(np.concatenate(moments)[:, axis].tolist()) for axis in (0, 1))
    drawn = []
    for when, points in zip(("before", "after"), moments, strict=True):
        told = f"{when}: {percent(between_classes(points, classes))} % between the classes"
        drawn += [tag("p", told), scatter(f"{name} {told}", points, classes, box)]
    return figure(name, *drawn)


def between_classes(points: np.ndarray, classes: np.ndarray) -> float:
    """Share of the variance of points that the means of their classes explain."""
    points = points - points.mean(0)
    own = [points[classes == label] for label in set(classes.tolist())]
    total = float((points**2).sum())
    return sum(len(part) * float((part.mean(0) ** 2).sum()) for part in own) / total if total else math.nan


SECTIONS: tuple[Callable, ...] = (
    methods_section,
    verdict_section,
    confusion_section,
    agreement_section,
    training_section,
    weighing_section,
    calibration_section,
    speakers_section,
    embedding_section,
)
