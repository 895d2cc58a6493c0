"""What each setting does to the methods: the open six transfers, one setting changed at a time.

    python benchmarks/sensitivity.py --seeds 1-2

Each value is a sweep of its own below `--output`; what is done is not run again. Writes `sensitivity.md` and `.csv`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from speechbrain_mifuse.evaluation.aggregate import COLUMNS, Comparison, Table, protocol, read_records, write_csv
from speechbrain_mifuse.experiments.sweep import Plan, make_plan, parse_seeds, run_plan, usable_cores
from speechbrain_mifuse.utils.errors import one_clear_error
from speechbrain_mifuse.utils.files import atomic_write
from speechbrain_mifuse.utils.texts import markdown

ROOT = Path(__file__).resolve().parent.parent
PAIRS = ("emodb2rav", "nemo2rav", "rav2nemo", "emodb2nemo", "rav2emodb", "nemo2emodb")
METHODS = ("source_only", "lalm_sfuda", "mean_fusion", "mi_fuse_permuted", "mi_fuse", "mi_fuse_plus")

# What differs from the defaults, in words, and the flags that make it so.
SETTINGS = {
    "defaults": (),
    "10 answers of the API teacher": ("--lalm_samples=10",),
    "one word as answer": ("--lalm_answer_form=label",),
    "one word as answer, tau 1": ("--lalm_answer_form=label", "--temperature=1.0"),
    "4 dropout passes": ("--passes=4",),
    "EMA window 1.0": ("--ema_window=1.0",),
    "lambda 0": ("--diversity_weight=0.0",),
    "encoder layer 4": ("--encoder_layers=[3, 4]", "--layer=4"),
}


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="1-2", help="as 1-2")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "sensitivity", help="folder of the runs")
    parser.add_argument("--table", type=Path, default=ROOT / "docs" / "results", help="folder of the table")
    chosen = parser.parse_args(arguments)
    with one_clear_error():
        print(sensitivity(chosen.output, parse_seeds(chosen.seeds), chosen.table))


def sensitivity(output: Path, seeds: list[int], folder: Path) -> str:
    """Give the table of all settings, after their runs."""
    plans = {
        name: make_plan(ROOT, PAIRS, output / f"{place:02d}", seeds, METHODS, flags)
        for place, (name, flags) in enumerate(SETTINGS.items())
    }
    for name, plan in plans.items():
        print(name, flush=True)
        run_plan(plan, jobs=usable_cores())
    records = {name: read(plan) for name, plan in plans.items()}
    comparisons = {name: Comparison(found, list(METHODS)) for name, found in records.items()}
    rows = [{"setting": name, **record} for name, found in records.items() for record in found]
    write_csv(folder / "sensitivity.csv", rows, ["setting", *COLUMNS])
    about = protocol(comparisons["defaults"], plans["defaults"].teacher())
    text = table(comparisons).markdown() + "\n" + markdown(about) + "\n"
    atomic_write(folder / "sensitivity.md", text)
    return text


def read(plan: Plan) -> list[dict]:
    """Results of a plan's runs."""
    return read_records(path for run in plan.runs() for path in run.results)


def table(comparisons: dict[str, Comparison]) -> Table:
    """One row for each setting: the mean UA of every method, and MI weights against the same weights permuted."""
    rows = []
    for name, comparison in comparisons.items():
        means = [f"{comparison.means[comparison.methods.index(method)]:.1f}" for method in METHODS]
        gain, low, high = comparison.difference("mi_fuse", "mi_fuse_permuted")
        rows.append([name, *means, f"{gain:+.1f} ({low:+.1f} to {high:+.1f})"])
    return Table(["mean UA %", *METHODS, "mi_fuse above permuted"], rows)


if __name__ == "__main__":
    main()
