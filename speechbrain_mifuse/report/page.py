"""One page about a run or a sweep: `report.html`, whole in itself, made from what lies in the folder.

A run is shown in sections of its own (`report_sections`); a sweep by its tables first, then each transfer likewise.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from speechbrain_mifuse.evaluation.aggregate import (
    LOWER,
    Comparison,
    Table,
    difference_table,
    interval_table,
    protocol,
    seed_table,
    transfer_table,
)
from speechbrain_mifuse.report.cases import TEACHER, Case, cases_of, ranked, read_cases
from speechbrain_mifuse.report.parts import Html, Shaded, bold, facts, heat, joined, table, tag
from speechbrain_mifuse.report.sections import Section, many, sections_of
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.files import atomic_write

NAME = "report.html"
BASELINES = (LOWER, TEACHER, "lalm_sfuda")


def write_report(
    folder: str | Path,
    output: str | Path | None = None,
    results: Iterable[str | Path] | None = None,
    teacher: str = "",
) -> Path:
    """Write the page of a run or a sweep.

    Parameters
    ----------
    folder : str or pathlib.Path
        Output folder of a run, of one pair of a sweep, or of a whole sweep.
    output : str or pathlib.Path, optional
        File to write; `report.html` in the folder by default. It appears whole or not at all.
    results : iterable of str or pathlib.Path, optional
        The `results.json` of the methods to show; all below the folder by default.
    teacher : str
        What is known of a sweep's API teacher beyond its name.

    Returns
    -------
    pathlib.Path
        The file.

    Raises
    ------
    UserError
        If there are no results, or one is damaged, or the page cannot be written; the message names it.

    Example
    -------
    >>> write_report("/nowhere")
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.utils.errors.UserError: /nowhere: no results of an adaptation below it. ...
    """
    folder = Path(folder)
    cases = read_cases(folder) if results is None else cases_of(results)
    path = folder / NAME if output is None else Path(output)
    single = len(cases) == 1 and len(cases[0].runs) == 1
    text = run_page(cases[0]) if single else sweep_page(cases, folder.resolve().name, teacher)
    try:
        atomic_write(path, text)
    except OSError as error:
        raise UserError(f"--output: {path} cannot be written ({error.strerror}). Name another file.") from None
    return path


def run_page(case: Case) -> str:
    """Make the page of one run."""
    sections = sections_of(case)
    head = [facts(facts_of(case.records)), contents([section.title for section in sections])]
    body = [tag("section", *_parts(section, 2, place)) for place, section in enumerate(sections)]
    return page(f"{case.name}, seed {case.record['seed']}", head, body, case.records)


def sweep_page(cases: Sequence[Case], name: str, teacher: str = "") -> str:
    """Make the page of several runs: tables over the transfers, then what a run's page holds for each of them."""
    records = [record for case in cases for record in case.records]
    try:
        comparison = complete_comparison(cases)
        sections, intervals = comparison_sections(comparison), _intervals(cases, comparison)
        told = [tag("p", protocol(comparison, teacher))]
        missing = [method for method in ranked(records) if method not in comparison.methods]
        note = f"Not in every run, so shown in the transfers alone: {', '.join(missing)}." if missing else ""
    except UserError as error:
        sections, intervals, told = [], [{} for _ in cases], []
        note = f"No table over the transfers: {error}"
    titles = [section.title for section in sections] + [_title(case, cases) for case in cases]
    head = [facts(facts_of(records)), *told, tag("p", note, class_="note") if note else "", contents(titles)]
    body = [tag("section", *_parts(section, 2, place)) for place, section in enumerate(sections)]
    for place, (case, known) in enumerate(zip(cases, intervals, strict=True), start=len(sections)):
        inner = [part for section in sections_of(case, known) for part in _parts(section, 3)]
        top = tag("summary", tag("h2", titles[place], id=f"s{place}"))
        body.append(tag("details", top, facts(facts_of(case.records)), *inner))
    return page(f"{name}: {many(sum(len(case.runs) for case in cases), 'run')}", head, body, records)


def _title(case: Case, cases: Sequence[Case]) -> str:
    alone = sum(other.name == case.name for other in cases) == 1
    return case.name if alone else f"{case.name}, teacher {case.record['teacher']}"


def _parts(section: Section, level: int, place: int | None = None) -> list[Html]:
    heading = tag(f"h{level}", section.title, id=None if place is None else f"s{place}")
    return [heading, tag("p", section.sentence), section.content]


def contents(titles: Sequence[str]) -> Html:
    """Link to the sections of the page."""
    items = [tag("li", tag("a", title, href=f"#s{place}")) for place, title in enumerate(titles)]
    return tag("nav", tag("ul", *items), aria_label="Contents")


def page(title: str, head: Sequence[Html], body: Sequence[Html], records: Sequence[Mapping]) -> str:
    """Fill the template. Its policy lets no script run but its own and loads nothing."""
    script = Path(__file__).with_name("report_sort.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    told = f"Made from the result files of {many(len(records), 'method run')} by speechbrain_mifuse; nothing is loaded."
    parts = {
        "title": joined([title]),
        "head": joined(head),
        "body": joined(body),
        "foot": joined([told]),
        "script": script,
        "script_hash": f"sha256-{digest}",
    }
    template = Path(__file__).with_name("report_template.html").read_text(encoding="utf-8")
    # All at once: what is filled in is not searched again.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def facts_of(records: Sequence[Mapping]) -> dict[str, str]:
    """Say under what conditions results were got."""
    trained = [record for record in records if record.get("steps")]
    targets = {record["target"] for record in records}
    adapted = max(record["n_train"] for record in records)
    return {
        "Protocol": distinct(records, "protocol") if len(targets) == 1 else "",
        "Source": distinct(records, "source"),
        "Target": distinct(records, "target"),
        "API teacher": distinct(records, "teacher"),
        "Encoder": distinct(records, "encoder"),
        "Speaker normalisation": distinct(records, "speaker_norm"),
        "Seeds": distinct(sorted(records, key=lambda record: record["seed"]), "seed"),
        "Selection": distinct(trained or records, "selection"),
        "Steps": distinct(trained, "steps"),
        "Weight of the diversity term": distinct(records, "diversity_weight"),
        "Temperature of the fusion": distinct(records, "temperature"),
        "Adapted on": f"{adapted} utterances" if len(targets) == 1 else "",
        "Tested on": f"{distinct(records, 'n_test')} utterances" if len(targets) == 1 else "",
        "Code version": distinct(records, "code_version"),
    }


def distinct(records: Iterable[Mapping], key: str) -> str:
    """List the different values of a key."""
    return ", ".join(dict.fromkeys(str(record[key]) for record in records if key in record))


# The whole table: transfers, heat map, differences.


def complete_comparison(cases: Sequence[Case]) -> Comparison:
    """Compare the methods that every run holds."""
    runs = [run for case in cases for run in case.runs if case.scored]
    common = set.intersection(*(set(run.outcomes) for run in runs)) if runs else set()
    if not common or not all(case.scored for case in cases):
        raise UserError("no method has a score in every run.")
    records = [
        outcome.record for run in runs for outcome in run.outcomes.values() if outcome.record["method"] in common
    ]
    comparison = Comparison(records, ranked(records))
    comparison.counts  # noqa: B018  reads everything, so that what does not fit is found here
    return comparison


def _intervals(cases: Sequence[Case], comparison: Comparison) -> list[dict[str, tuple[float, float]]]:
    places = {transfer: place for place, transfer in enumerate(comparison.counts)}
    found = []
    for case in cases:
        low, high = comparison.intervals[:, places[tuple(case.record[k] for k in ("source", "target", "teacher"))]]
        found.append({name: (low[place], high[place]) for place, name in enumerate(comparison.methods)})
    return found


def comparison_sections(comparison: Comparison) -> list[Section]:
    """Make the sections about all transfers."""
    seeds = many(len(comparison.seeds), "seed")
    told = f"UA in percent of each method on each transfer, mean ± standard deviation over {seeds}; bold is the best "
    sections = [
        Section("Transfers", told + "without labels.", shown(transfer_table(comparison), "UA % of each transfer")),
        Section("Heat map", f"The same means over {seeds} by colour: brighter is better.", heat_map(comparison)),
    ]
    baselines = [name for name in BASELINES if name in comparison.methods]
    differences = difference_table(comparison, baselines)
    if differences is not None:
        told = (
            "How far each method's mean UA lies above others, with the paired 95 % interval: blue where the whole "
            "interval is above zero, orange where it is below."
        )
        sections.append(Section("Paired differences", told, shown_differences(differences)))
    told = "95 % intervals of UA in percent from a bootstrap over test speakers and seeds."
    sections.append(Section("Intervals", told, shown(interval_table(comparison), "95 % interval of UA %")))
    told = "UA in percent of every single seed."
    found = tag("details", tag("summary", "Every seed"), shown(seed_table(comparison), "UA % by seed", sort=False))
    return [*sections, Section("Seeds", told, found)]


def shown(found: Table, caption: str, sort: bool = True) -> Html:
    """Show one of the tables of `aggregate`."""
    rows = [[first, *map(bold, rest)] for first, *rest in found.rows]
    return table(caption, ["method", *found.head[1:]], rows, sort=sort)


def shown_differences(found: Table) -> Html:
    """Show paired differences, coloured by the side of zero that their interval lies on."""
    rows = [[*cells[:2], *(Shaded(cell, kind=_side(cell)) for cell in cells[2:])] for cells in found.rows]
    return table("Differences of mean UA in percent points", ["method", "mean UA %", *found.head[2:]], rows)


def _side(cell: str) -> str | None:
    bounds = re.search(r"\(([+-][\d.]+) to ([+-][\d.]+)\)", cell)
    if bounds is None:
        return None
    low, high = map(float, bounds.groups())
    return "up" if low > 0 else "down" if high < 0 else None


def heat_map(comparison: Comparison) -> Html:
    """Colour the mean UA of each method on each transfer."""
    values = np.column_stack([comparison.accuracy.mean(2).T, comparison.means])
    scale = float(values.min()), float(values.max())
    rows = [
        [name, *(Shaded(f"{value:.1f}", heat(value, *scale)) for value in row)]
        for name, row in zip(comparison.methods, values.tolist(), strict=True)
    ]
    return table("UA % by colour", ["method", *comparison.transfers, "mean"], rows)
