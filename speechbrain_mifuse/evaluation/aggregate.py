"""From the `results.json` of many runs to tables: every transfer, mean, deviation, intervals, paired differences."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from speechbrain_mifuse.evaluation.intervals import deviations, influences, margin
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.files import atomic_write
from speechbrain_mifuse.utils.texts import csv_text, markdown_cell, shown

COLUMNS = ("source", "target", "teacher", "method", "seed", "UA", "WA", "macro_F1", "n_test")
# Rows that no method without labels is measured against as a rival: where all start, and what labels would give. Names
# that begin with `oracle` are upper bounds, too.
LOWER, UPPER = "source_only", "oracle"
# Lower bounds that the way to the upper one is measured from: the second has the target's statistics, for nothing.
FLOORS = (LOWER, "source_adabn")
# How names of forms of MI-Fuse, and of what our own form is made of, begin.
OURS = ("mi_fuse", "g_")
# What a table of methods shows, by the key of `AdaptationMethod.traits`.
TRAITS = {
    "training": "trains a student",
    "asked": "asks the language model",
    "statistics": "statistics of",
    "prior_correction": "prior correction of",
    "transductive": "transductive",
}
# What every result of one transfer must agree in, or its numbers do not belong beside each other.
SHARED = ("encoder", "speaker_norm", "protocol", "target_copy", "labels", "n_test", "diversity_weight", "temperature")

Transfer = tuple[str, str, str]


def read_records(paths: Iterable[str | Path]) -> list[dict]:
    """Read the results of runs."""
    paths = [Path(path) for path in paths]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"{len(missing)} of {len(paths)} results are missing; the first is {missing[0]}. Run them.")
    return [_record(path) for path in paths]


def _record(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        scored = found["UA"] is not None and found["by_speaker"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path}: no whole result of one method ({error!r}). Delete it and run again.") from None
    if not scored:
        raise UserError(f"{path}: its test set has no labels, so there is no score to put into a table.")
    return found


def write_csv(path: str | Path, records: Sequence[Mapping], columns: Sequence[str] = COLUMNS) -> None:
    """Write one row per record, fractions in [0, 1]."""
    rows = ([f"{v:.4f}" if isinstance(v := record[name], float) else v for name in columns] for record in records)
    atomic_write(path, csv_text([columns, *rows]))


def transfer_counts(records: Sequence[Mapping], methods: Sequence[str]) -> dict[Transfer, np.ndarray]:
    """Arrange the confusion counts of each transfer."""
    found: dict[Transfer, dict[tuple[str, int], Mapping]] = {}
    for record in records:
        transfer = (record["source"], record["target"], record["teacher"])
        place = found.setdefault(transfer, {})
        if (record["method"], record["seed"]) in place:
            raise UserError(f"{_name(transfer)}: two results of {record['method']} with seed {record['seed']}.")
        place[record["method"], record["seed"]] = record
    seeds = sorted({seed for place in found.values() for _, seed in place})
    arrays = {}
    for transfer in sorted(found, key=lambda t: (t[1], t[0], t[2])):
        place = found[transfer]
        missing = [f"{m}, seed {s}" for m in methods for s in seeds if (m, s) not in place]
        if missing:
            raise UserError(f"{_name(transfer)}: no result of {'; '.join(missing)}. Run what is missing.")
        _agree(transfer, list(place.values()))
        counts = [[list(place[m, s]["by_speaker"].values()) for s in seeds] for m in methods]
        arrays[transfer] = np.array(counts)
    return arrays


def _name(transfer: Transfer) -> str:
    return f"{transfer[0]} to {transfer[1]}"


def _agree(transfer: Transfer, records: Sequence[Mapping]) -> None:
    first = records[0]
    trained = next((record for record in records if record.get("steps")), first)
    for record in records:
        differs = [field for field in SHARED if record.get(field) != first.get(field)]
        if record.get("steps") not in (None, 0, trained.get("steps")):
            differs.append("steps")
        if list(record["by_speaker"]) != list(first["by_speaker"]):
            differs.append("test speakers")
        if differs:
            raise UserError(
                f"{_name(transfer)}: results of {first['method']}, seed {first['seed']} and {record['method']}, seed "
                f"{record['seed']} were got under other settings ({', '.join(differs)}). Run one of them again."
            )


def recalls_to_accuracy(hits: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Mean recall over the classes that occur."""
    recalls = np.where(total > 0, hits / np.maximum(total, 1), 0.0)
    with np.errstate(invalid="ignore"):
        return recalls.sum(-1) / (total > 0).sum(-1)


def unweighted_accuracy(counts: np.ndarray) -> np.ndarray:
    """Mean recall over the classes that occur, of confusion counts."""
    return recalls_to_accuracy(np.diagonal(counts[..., :-1], axis1=-2, axis2=-1), counts.sum(-1))


def bootstrap(counts: np.ndarray, generator: np.random.Generator, draws: int = 2000) -> np.ndarray:
    """Draw test speakers and seeds of one transfer with replacement; the mean UA over the seeds of each draw."""
    seeds, speakers = counts.shape[1:3]
    seed_weight = _weights(generator, seeds, draws)
    return _reweighted(counts, seed_weight, _weights(generator, speakers, draws))


def _weights(generator: np.random.Generator, count: int, draws: int) -> np.ndarray:
    """How often each of some things is drawn when as many are drawn with replacement, `[draws, count]`."""
    return generator.multinomial(count, np.full(count, 1 / count), draws)


def _reweighted(counts: np.ndarray, seed_weight: np.ndarray, speaker_weight: np.ndarray) -> np.ndarray:
    hits = np.diagonal(counts[..., :-1], axis1=-2, axis2=-1)  # [methods, seeds, speakers, C]
    drawn = [np.tensordot(speaker_weight, part, axes=(1, 2)) for part in (hits, counts.sum(-1))]
    accuracy = recalls_to_accuracy(*drawn)  # [draws, methods, seeds]
    return np.einsum("dms,ds->dm", accuracy, seed_weight) / counts.shape[1]


@dataclass(frozen=True)
class Comparison:
    """Methods on the same transfers with the same seeds."""

    records: Sequence[Mapping]
    order: Sequence[str]

    @cached_property
    def methods(self) -> list[str]:
        """Rows of the tables."""
        return sorted(self.order, key=lambda name: (name == UPPER) - (name == LOWER))

    @cached_property
    def counts(self) -> dict[Transfer, np.ndarray]:
        """See `transfer_counts`."""
        return transfer_counts(self.records, self.methods)

    @cached_property
    def transfers(self) -> list[str]:
        """Names of the transfers; the teacher is named where two differ in it alone."""
        names = [_name(transfer) for transfer in self.counts]
        return [
            f"{name} (teacher {transfer[2]})" if names.count(name) > 1 else name
            for name, transfer in zip(names, self.counts, strict=True)
        ]

    @cached_property
    def seeds(self) -> list[int]:
        """Seeds, ascending."""
        return sorted({record["seed"] for record in self.records})

    @cached_property
    def accuracy(self) -> np.ndarray:
        """UA in percent, `[transfers, methods, seeds]`."""
        return np.stack([100 * unweighted_accuracy(counts.sum(2)) for counts in self.counts.values()])

    @cached_property
    def means(self) -> np.ndarray:
        """UA in percent over transfers and seeds, `[methods]`."""
        return self.accuracy.mean((0, 2))

    @property
    def grid(self) -> np.ndarray:
        """UA in percent, `[methods, transfers + 1]`: mean over the seeds, then over the transfers too."""
        return np.column_stack([self.accuracy.mean(2).T, self.means])

    @cached_property
    def moved(self) -> list[np.ndarray]:
        """How far each test speaker moves the mean UA in percent, `[methods, speakers]` for each group of people.

        Transfers to one corpus are tested on the same people.
        """
        people: dict[tuple[str, int], np.ndarray] = {}
        for (_, target, _), counts in self.counts.items():
            part = 100 * influences(counts).mean(1) / len(self.counts)
            people[target, part.shape[1]] = people.get((target, part.shape[1]), 0) + part
        return list(people.values())

    def _margin(self, speakers: Sequence[np.ndarray], seeds: np.ndarray) -> np.ndarray:
        """Half-width over speakers, and over seeds where there are several; `seeds` is `[..., seeds]`."""
        return margin([*speakers, *([deviations(seeds)] if seeds.shape[-1] > 1 else [])])

    @cached_property
    def mean_intervals(self) -> np.ndarray:
        """95 % interval of the mean UA over other speakers and seeds, the transfers fixed, `[2, methods]`."""
        half = self._margin(self.moved, self.accuracy.mean(0))
        return np.clip([self.means - half, self.means + half], 0, 100)

    @cached_property
    def intervals(self) -> np.ndarray:
        """95 % interval of each transfer's UA, `[2, transfers, methods]`."""
        half = [
            self._margin([100 * influences(counts).mean(1)], scores)
            for counts, scores in zip(self.counts.values(), self.accuracy, strict=True)
        ]
        middle = self.accuracy.mean(2)
        return np.clip([middle - half, middle + half], 0, 100)

    @property
    def clusters(self) -> str:
        """What intervals are over, in words."""
        speakers = sum(group.shape[1] for group in self.moved)
        return f"{many(speakers, 'speaker')}, {many(len(self.seeds), 'seed')}"

    @property
    def best_baseline(self) -> str | None:
        """Method with the highest mean of those that are no bound and no form of MI-Fuse; `None` without any."""
        rivals = [name for name in self.methods if name != LOWER and not name.startswith((UPPER, *OURS))]
        return max(rivals, key=lambda name: self.means[self.methods.index(name)], default=None)

    def gap_closed(self, method: str, floor: str = LOWER) -> float | None:
        """Percent of the way from a lower to the upper bound on the mean; `None` without both bounds."""
        if not {floor, UPPER} <= set(self.methods):
            return None
        low, value, high = (self.means[self.methods.index(name)] for name in (floor, method, UPPER))
        return 100 * (value - low) / (high - low) if high > low else None

    def difference(self, method: str, other: str) -> tuple[float, float, float]:
        """Mean of `method` above that of `other`, with its paired 95 % interval over speakers and seeds, in points."""
        row, column = self.methods.index(method), self.methods.index(other)
        gains = self.accuracy[:, row] - self.accuracy[:, column]  # [transfers, seeds]
        half = float(self._margin([group[row] - group[column] for group in self.moved], gains.mean(0)))
        return gains.mean(), gains.mean() - half, gains.mean() + half

    def difference_over_transfers(self, method: str, other: str) -> tuple[float, float, float]:
        """Give the same with an interval over other transfers: what a pair of corpora not tried might show."""
        row, column = self.methods.index(method), self.methods.index(other)
        gains = (self.accuracy[:, row] - self.accuracy[:, column]).mean(1)
        half = float(margin([deviations(gains)]))
        return gains.mean(), gains.mean() - half, gains.mean() + half


@dataclass(frozen=True)
class Table:
    """Cells of text, written as Markdown or LaTeX; a number in `**...**` is bold in both, all else is plain text."""

    head: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Text in Markdown."""
        lines = ["| " + " | ".join(map(_markdown_cell, cells)) + " |" for cells in (self.head, *self.rows)]
        return "\n".join([lines[0], "|---" * len(self.head) + "|", *lines[1:]]) + "\n"

    def latex(self) -> str:
        """Text in LaTeX, for the package booktabs."""
        lines = [" & ".join(map(_latex_cell, cells)) + r" \\" for cells in (self.head, *self.rows)]
        body = [r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
        return "\n".join([rf"\begin{{tabular}}{{l{'c' * (len(self.head) - 1)}}}", *body, r"\end{tabular}"]) + "\n"


_BOLD = re.compile(r"\*\*([-+]?[\d.]+)\*\*")
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {character: f"\\{character}" for character in "_%&#{}$"}


def _markdown_cell(cell: str) -> str:
    pieces = _BOLD.split(str(cell))
    return "".join(f"**{piece}**" if place % 2 else markdown_cell(piece) for place, piece in enumerate(pieces))


def _latex_cell(cell: str) -> str:
    cell = shown(cell).translate(str.maketrans(_LATEX))
    cell = re.sub(r"(?<!\w)([+-])(?=\d)", r"$\1$", cell).replace(" ± ", r" $\pm$ ")
    return _BOLD.sub(r"\\textbf{\1}", cell)


def transfer_table(comparison: Comparison) -> Table:
    """UA of each transfer: mean ± standard deviation over seeds, then mean, its interval, share of the way to labels.

    Bold is the highest of the methods that use no labels.
    """
    methods = comparison.methods
    ways = {floor: [comparison.gap_closed(name, floor) for name in methods] for floor in FLOORS}
    ways = {floor: gaps for floor, gaps in ways.items() if None not in gaps}
    head = ["UA %", *comparison.transfers, "mean", f"95 % interval ({comparison.clusters})"]
    head += [f"of the way to {UPPER}" if floor == LOWER else f"from {floor}" for floor in ways]
    columns = comparison.grid.T  # [transfers + 1, methods]
    blind, rounded = np.array([not name.startswith(UPPER) for name in methods]), np.round(columns, 1)
    bold = blind & (rounded == rounded[:, blind].max(1, keepdims=True, initial=-np.inf))
    bounds = comparison.mean_intervals
    ddof = min(1, len(comparison.seeds) - 1)
    rows = []
    for place, name in enumerate(methods):
        shown = [f"**{v:.1f}**" if b else f"{v:.1f}" for v, b in zip(columns[:, place], bold[:, place], strict=True)]
        spread = comparison.accuracy[:, place].std(1, ddof=ddof)
        cells = [f"{text} ± {sd:.1f}" for text, sd in zip(shown[:-1], spread, strict=True)]
        gaps = [f"{gaps[place]:.0f} %" for gaps in ways.values()]
        rows.append([name, *cells, shown[-1], f"{bounds[0, place]:.1f} to {bounds[1, place]:.1f}", *gaps])
    return Table(head, rows)


def difference_table(comparison: Comparison, baselines: Sequence[str]) -> Table | None:
    """Paired differences of the mean UA to named methods and to the best baseline, with 95 % intervals.

    Each with two: over speakers and seeds on these transfers, and over transfers.
    """
    unknown = [name for name in baselines if name not in comparison.methods]
    if unknown:
        raise UserError(f"--baselines: {', '.join(unknown)} is none of the methods {', '.join(comparison.methods)}.")
    best = comparison.best_baseline
    others = list(baselines) + ([best] if best is not None and best not in baselines else [])
    if not others:
        return None
    several = len(comparison.counts) > 1
    head = ["difference of mean UA", "mean"]
    for name in others:
        head += [f"above {name}" + ", best baseline" * (name == best), *["over transfers"] * several]
    rows = []
    for name, mean in zip(comparison.methods, comparison.means, strict=True):
        cells = []
        for other in others:
            cells.append("" if name == other else signed(*comparison.difference(name, other)))
            if several:
                cells.append("" if name == other else ranged(*comparison.difference_over_transfers(name, other)[1:]))
        rows.append([name, f"{mean:.1f}", *cells])
    return Table(head, rows)


def signed(value: float, low: float, high: float) -> str:
    """Tell a difference with its interval."""
    return f"{value:+.1f} ({ranged(low, high)})"


def ranged(low: float, high: float) -> str:
    """Tell an interval of a difference."""
    return f"{low:+.1f} to {high:+.1f}" if np.isfinite([low, high]).all() else "interval unknown"


def trait_table(comparison: Comparison) -> Table | None:
    """Say what each method trains, asks and was given: the options that rows differ in."""
    traits = {record["method"]: record.get("traits") for record in comparison.records}
    if not all(traits.values()):
        return None
    head = ["method", *TRAITS.values()]
    return Table(head, [[name, *(traits[name][key] for key in TRAITS)] for name in comparison.methods])


def seed_table(comparison: Comparison) -> Table:
    """UA of each seed on each transfer with the average, then mean and standard deviation over the seeds."""
    rows, ddof = [], min(1, len(comparison.seeds) - 1)
    for place, name in enumerate(comparison.methods):
        values = comparison.accuracy[:, place]  # [transfers, seeds]
        values = np.vstack([values, values.mean(0)])
        for column, seed in enumerate(comparison.seeds):
            rows.append([name if column == 0 else "", str(seed), *(f"{v:.1f}" for v in values[:, column])])
        rows.append(["", "mean ± sd", *(f"**{v.mean():.1f}** ± {v.std(ddof=ddof):.1f}" for v in values)])
    return Table(["UA %", "seed", *comparison.transfers, "average"], rows)


def interval_table(comparison: Comparison) -> Table:
    """95 % interval of each transfer's UA."""
    by_method = zip(comparison.methods, comparison.intervals.transpose(2, 1, 0), strict=True)
    rows = [[name, *(f"{low:.1f} to {high:.1f}" for low, high in bounds)] for name, bounds in by_method]
    speakers = [many(counts.shape[2], "speaker") for counts in comparison.counts.values()]
    names = [f"{name} ({count})" for name, count in zip(comparison.transfers, speakers, strict=True)]
    return Table(["95 % interval of UA %", *names], rows)


def protocol(comparison: Comparison, teacher: str = "") -> str:
    """Say under what protocol the tables were made, from the records themselves."""
    records = comparison.records
    trained = [record for record in records if record["steps"]]
    adapted = {r["target"]: max(x["n_train"] for x in records if x["target"] == r["target"]) for r in records}
    unknown = {r["target"]: r.get("test_recordings_without_speaker", 0) for r in records}
    sizes = {r["target"]: (adapted[r["target"]], r["n_test"], r["test_speakers"]) for r in records}
    told = "; ".join(
        f"{t}: {a} to adapt, {n} to test of {many(s, 'speaker')}"
        + f" and {many(unknown[t], 'recording')} without a known speaker" * (unknown[t] > 0)
        for t, (a, n, s) in sorted(sizes.items())
    )
    copies = sorted({f"{r['target']}: {r['target_copy']}" for r in records if r.get("target_copy")})
    people = ", ".join(f"{target} {size[2]}" for target, size in sorted(sizes.items()))
    norms = distinct(r.get("speaker_norm", "none") for r in records)
    teachers = "; ".join(f"{name}: {t[2]}" for name, t in zip(comparison.transfers, comparison.counts, strict=True))
    best = comparison.best_baseline
    parts = [
        f"UA in percent, mean ± standard deviation over {many(len(comparison.seeds), 'seed')}.",
        f"{distinct(len(r['labels']) for r in records)} classes, speaker-independent"
        f"{' as far as speakers are known' if any(unknown.values()) else ''}: {told}.",
        f"{'; '.join(copies)}." if copies else "",
        f"API teacher, one for all seeds ({teachers}){': ' + teacher if teacher else ''}.",
        f"Encoder: {distinct(r['encoder'] for r in records)}.",
        f"Selection: {distinct(r['selection'] for r in trained or records)}.",
        f"{distinct(r['steps'] for r in trained)} steps," if trained else "",
        f"lambda {distinct(r['diversity_weight'] for r in records)}, "
        f"tau {distinct(r['temperature'] for r in records)}.",
        f"Speaker normalisation: {norms}." if norms != "none" else "",
        f"Intervals: Student's t over test speakers ({people}) and {many(len(comparison.seeds), 'seed')}, transfers "
        "fixed: for other speakers of these corpora; transfers to one corpus share its speakers; differences are "
        "paired. "
        + (
            f"Over transfers: Student's t over {len(comparison.counts)} transfers, for other pairs of corpora; they "
            f"share {many(len(sizes), 'target')}, so even this is rather too narrow."
            if len(comparison.counts) > 1
            else ""
        ),
        "A recording without a known speaker counts as a speaker: too narrow where two share one."
        if any(unknown.values())
        else "",
        f"Best baseline: {best}, of all that is neither MI-Fuse nor a bound, by its mean on these test sets."
        if best
        else "",
        f"Code {distinct(r['code_version'] for r in records)}.",
    ]
    return " ".join(part for part in parts if part)


def distinct(values: Iterable, between: str = " or ") -> str:
    """List the different values."""
    return between.join(dict.fromkeys(map(str, values)))


def many(number: int, noun: str) -> str:
    """Count things."""
    return f"{number} {noun}" + "s" * (number != 1)
