"""One page about a run or a sweep: `report.html`, which needs no other file, made from what lies in the folder.

A run is shown in its sections (`sections`); a sweep by its tables first, then each transfer likewise.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from speechbrain_mifuse.evaluation.aggregate import Comparison, distinct, many, protocol
from speechbrain_mifuse.report.cases import Case, cases_of, ranked, read_cases
from speechbrain_mifuse.report.sections import comparison_sections, sections_of
from speechbrain_mifuse.report.templating import FOLDER, environment
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.files import atomic_write

NAME = "report.html"


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
    shown = _run_page(cases[0]) if single else _sweep_page(cases, folder.resolve().name, teacher)
    text = _page(_records(cases), **shown)
    try:
        atomic_write(path, text)
    except OSError as error:
        raise UserError(f"--output: {path} cannot be written ({error.strerror}). Name another file.") from None
    return path


def _run_page(case: Case) -> dict:
    return {"title": f"{case.name}, seed {case.record['seed']}", "sections": sections_of(case)}


def _sweep_page(cases: Sequence[Case], name: str, teacher: str) -> dict:
    """Show tables over the transfers, then what a run's page holds for each of them."""
    title = f"{name}: {many(sum(len(case.runs) for case in cases), 'run')}"
    try:
        comparison = _complete_comparison(cases)
    except UserError as error:
        transfers = [_transfer(case, cases, {}) for case in cases]
        return {"title": title, "note": f"No table over the transfers: {error}", "transfers": transfers}
    missing = [name for name in ranked(_records(cases)) if name not in comparison.methods]
    note = f"Not in every run, so shown in the transfers alone: {', '.join(missing)}." if missing else ""
    transfers = [_transfer(case, cases, _intervals(case, comparison)) for case in cases]
    sections = comparison_sections(comparison)
    told = protocol(comparison, teacher)
    return {"title": title, "protocol": told, "note": note, "sections": sections, "transfers": transfers}


def _records(cases: Iterable[Case]) -> list[Mapping]:
    """Give the records of all methods of all runs."""
    return [record for case in cases for record in case.records]


def _complete_comparison(cases: Sequence[Case]) -> Comparison:
    """Compare the methods that every run holds."""
    if not all(case.scored for case in cases):
        raise UserError("no method has a score in every run.")
    common = set.intersection(*(set(run.outcomes) for case in cases for run in case.runs))
    records = [record for record in _records(cases) if record["method"] in common]
    if not records:
        raise UserError("no method has a score in every run.")
    comparison = Comparison(records, ranked(records))
    comparison.counts  # noqa: B018  reads everything, so that what does not fit is found here
    return comparison


def _intervals(case: Case, comparison: Comparison) -> dict[str, tuple[float, float]]:
    transfer = tuple(case.record[key] for key in ("source", "target", "teacher"))
    low, high = comparison.intervals[:, list(comparison.counts).index(transfer)]
    return dict(zip(comparison.methods, zip(low, high, strict=True), strict=True))


def _transfer(case: Case, cases: Sequence[Case], intervals: Mapping) -> dict:
    alone = sum(other.name == case.name for other in cases) == 1
    title = case.name if alone else f"{case.name}, teacher {case.record['teacher']}"
    return {"title": title, "conditions": _conditions(case.records), "sections": sections_of(case, intervals)}


def _page(records: Sequence[Mapping], **shown) -> str:
    """Fill the template. Its policy lets no script run but its own and loads nothing."""
    script = (FOLDER / "sort.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    blank = {"protocol": "", "note": "", "sections": [], "transfers": []}
    return (
        environment()
        .get_template("report.html")
        .render(
            **{**blank, **shown},
            conditions=_conditions(records),
            made_from=many(len(records), "method run"),
            script=script,
            script_hash=f"sha256-{digest}",
        )
    )


def _conditions(records: Sequence[Mapping]) -> dict[str, str]:
    """Say under what conditions results were got."""
    trained = [record for record in records if record.get("steps")] or records
    alone = len({record["target"] for record in records}) == 1

    def of(key: str, among: Sequence[Mapping] = records) -> str:
        return distinct((record[key] for record in among if key in record), ", ")

    return {
        "Protocol": of("protocol") if alone else "",
        "Source": of("source"),
        "Target": of("target"),
        "API teacher": of("teacher"),
        "Encoder": of("encoder"),
        "Speaker normalisation": of("speaker_norm"),
        "Seeds": of("seed", sorted(records, key=lambda record: record["seed"])),
        "Selection": of("selection", trained),
        "Steps": of("steps", [record for record in trained if record.get("steps")]),
        "Weight of the diversity term": of("diversity_weight"),
        "Temperature of the fusion": of("temperature"),
        "Adapted on": f"{max(record['n_train'] for record in records)} utterances" if alone else "",
        "Tested on": f"{of('n_test')} utterances" if alone else "",
        "Code version": of("code_version"),
    }
