"""`PERFORMANCE.md` and the tables of `recipes/*/README.md`: what each recipe reached, from `docs/results/*.csv`."""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from speechbrain_mifuse.experiments.registry import Recipe, registered_recipes

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


METHODS = {
    "mifuse": "adaptation without labels",
    "classifier": "classifier with labels",
    "adapter": "adapter on a frozen encoder",
    "dual_encoder": "dual encoder of speech and text",
    "zsfuse": "ZS-Fuse",
}
ABOUT = """UA: unweighted accuracy, the mean recall over classes, in percent: mean ± standard deviation over seeds, on
held-out speakers. Encoder: Whisper tiny.en's, frozen. The linked table has intervals and protocol.

"""
CORPUS_HEAD = "| settings | method | UA % | command | hardware |\n|---|---|---|---|---|\n"
NOT_RUN = "not run here"


def result_of(recipe: Recipe, root: Path) -> tuple[str, str]:
    """What a recipe reached, and the table that has it; both empty where no table has."""
    kind = recipe.script.parent.name
    found = KINDS[kind](recipe.values, root / "docs" / "results") if kind in KINDS else ""
    return found, f"docs/results/{TABLES[kind]}.md" if found else ""


def performance_table(root: Path) -> str:
    """Give the page, from a repository's recipes and results."""
    lines = []
    for recipe in registered_recipes(root):
        found, table = result_of(recipe, root)
        _, script, hparams, *_ = recipe.command.split()
        link = f"[{Path(table).stem}]({table})" if table else ""
        lines.append(f"| `{script}` | `{hparams}` | {found} | {link} |")
    return HEAD + "\n".join(lines) + "\n"


def header_command(recipe: Recipe) -> str:
    """Read the command in the header of a recipe's YAML file, without the comment behind it."""
    text = re.sub(r"\\\n# *", "", recipe.hparams.read_text(encoding="utf-8"))
    (command, *_) = re.findall(r"^# +(python recipes/\S+/train\.py hparams/.*?)(?: {3,}.*)?$", text, re.MULTILINE)
    return " ".join(command.split())


def corpus_tables(root: Path) -> dict[str, str]:
    """Give the table of each corpus's recipes, by the name of its folder in `recipes`."""
    tables: dict[str, list[str]] = {}
    results = {recipe: result_of(recipe, root) for recipe in registered_recipes(root)}
    at_hand = {recipe.script.parents[1].name for recipe, (found, _) in results.items() if found}
    for recipe, (found, table) in results.items():
        corpus, hardware = recipe.script.parents[1].name, "2 CPU cores"
        if found:
            found += f" ([table](../../{table}))"
        elif corpus == "Demo":
            found = "synthetic speech: [table](../../docs/results/demo.md)"
        elif corpus in at_hand:
            found = "no table; in the run's `train_log.txt`"
        else:
            found, hardware = NOT_RUN, "-"
        settings = f"[{recipe.hparams.name}](../../hparams/{recipe.hparams.name})"
        method = METHODS[recipe.script.parent.name]
        # Which other corpora, or which server, a newcomer needs.
        method += f": {recipe.data}" if recipe.script.parent.name in ("mifuse", "dual_encoder") else ""
        tables.setdefault(corpus, []).append(
            f"| {settings} | {method} | {found} | `{header_command(recipe)}` | {hardware} |"
        )
    return {
        corpus: ABOUT * (corpus in at_hand) + CORPUS_HEAD + "\n".join(lines) + "\n" for corpus, lines in tables.items()
    }
