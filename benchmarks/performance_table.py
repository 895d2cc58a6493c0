"""`PERFORMANCE.md`: what each recipe reached where its corpus was at hand, from `docs/results/*.csv`."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from speechbrain_mifuse.experiments.registry import registered_recipes

HEAD = """# Performance of the recipes

Unweighted accuracy in percent, mean ± standard deviation over seeds, of speakers that were held out; the linked table
has intervals and protocol. Rows without a figure: classifiers and dual encoders leave theirs in their output folder,
the demo's table of synthetic speech is in [docs/results/demo.md](docs/results/demo.md), a folder of one's own has no
figure, and the licensed corpora and CREMA-D were not at hand. Written by `python benchmarks/update_readme.py`, never by
hand.

| recipe | settings | UA % | table |
|---|---|---|---|
"""
TOLD = {
    "mifuse": ("source_only", "lalm_sfuda", "mi_fuse", "mi_fuse_plus", "oracle"),
    "adapter": ("mean_linear", "scratch", "pretrained", "corpus_centred"),
    "zsfuse": ("fm_only", "scores_only", "zs_fuse"),
}


def told(values: Mapping[str, list[float]], names: Iterable[str]) -> str:
    """Tell the mean and deviation of each name's values."""
    cells = []
    for name in names:
        if name in values:
            spread = f" ± {statistics.stdev(values[name]):.1f}" if len(values[name]) > 1 else ""
            cells.append(f"{name} {statistics.mean(values[name]):.1f}{spread}")
    return ", ".join(cells)


def by_seed(rows: Iterable[Mapping[str, str]], name: str) -> dict[str, list[float]]:
    """Percent by the column `name`: each seed's mean over folds."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        found.setdefault((row[name], row["seed"]), []).append(100 * float(row["UA"]))
    means: dict[str, list[float]] = {}
    for (value, _), folds in found.items():
        means.setdefault(value, []).append(statistics.mean(folds))
    return means


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a table; none if it was not made."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def of_pair(settings: Mapping, tables: Path) -> str:
    """Results of an adaptation recipe's pair."""
    pair = (settings["source"], settings["target"])
    rows = [row for row in read(tables / "open_transfer.csv") if (row["source"], row["target"]) == pair]
    return told(by_seed(rows, "method"), TOLD["mifuse"])


def of_arms(kind: str) -> Callable[[Mapping, Path], str]:
    """Give the function that tells a comparison of arms, for each number of labels per class."""

    def tell(settings: Mapping, tables: Path) -> str:
        rows = [row for row in read(tables / f"{kind}.csv") if row["corpus"] == settings["source"]]
        amounts = list(dict.fromkeys(row["labels_per_class"] for row in rows))
        parts = []
        for amount in amounts:
            some = [row for row in rows if row["labels_per_class"] == amount]
            parts.append(f"{amount} labels per class: {told(by_seed(some, 'arm'), TOLD[kind])}")
        return "; ".join(parts)

    return tell


KINDS = {"mifuse": of_pair, "adapter": of_arms("adapter"), "zsfuse": of_arms("zsfuse")}
TABLES = {"mifuse": "open_transfer", "adapter": "adapter", "zsfuse": "zsfuse"}


def performance_table(root: Path) -> str:
    """Give the page, from a repository's recipes and results."""
    lines = []
    for recipe in registered_recipes(root):
        _, script, hparams, *_ = recipe.command.split()
        kind = recipe.script.parent.name
        found = KINDS[kind](recipe.values, root / "docs" / "results") if kind in KINDS else ""
        link = f"[{TABLES[kind]}](docs/results/{TABLES[kind]}.md)" if found else ""
        lines.append(f"| `{script}` | `{hparams}` | {found} | {link} |")
    return HEAD + "\n".join(lines) + "\n"
