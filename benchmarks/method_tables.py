"""The short tables of docs/method.md, from the long ones that `make table ablations skew norms` wrote."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from performance_table import by_seed, read

# Row of `ablations.md`, and what it changes.
INGREDIENTS = {
    "mi_fuse": "the paper's form",
    "mi_fuse_reciprocal": "another `f(MI)`",
    "mi_fuse_tau_1": "`f(MI) = exp(-MI)`",
    "mi_fuse_product": "product in place of the weighted sum",
    "mi_fuse_product_prior": "and prior correction",
    "mi_fuse_plus_once": "and G, fitted on the teachers alone",
    "mi_fuse_plus": "and G refitted on the fused labels",
    "mi_fuse_plus_no_prior": "`mi_fuse_plus` without prior correction",
    "mi_fuse_plus_equal_shares": "classes taken to be equally frequent",
    "mi_fuse_plus_random_folds": "folds of G dealt at random",
    "mi_fuse_plus_temperature_2": "a softer G",
}
SKEWS = {"happy, neutral cut": "skew_happy_neutral", "angry, sad cut": "skew_angry_sad"}
SKEWED = ("mi_fuse", "mi_fuse_product_prior", "mi_fuse_plus_equal_shares", "mi_fuse_plus")
NORMS = {"known": "speaker_norm_known", "clustered `frames`": "speaker_norm_clustered"}


def differences(path: Path) -> dict[str, dict[str, str]]:
    """A long table's second part: mean UA of each method, and how far it is above others."""
    rows = [line.strip("| \n").split(" | ") for line in path.read_text(encoding="utf-8").splitlines() if "|" in line]
    begin = next(number for number, row in enumerate(rows) if row[0] == "difference of mean UA")
    names = rows[begin][1:]
    # Cells of a method's difference to itself are empty, and the last of a row would be lost with its bars.
    return {row[0]: dict(zip(names, [*row[1:], ""], strict=False)) for row in rows[begin + 2 :]}


def ingredients_table(folder: Path) -> str:
    """What each part of mi_fuse_plus gives."""
    found = differences(folder / "ablations.md")
    lines = ["| row | what is changed | mean UA % | above `mi_fuse` |", "|---|---|---:|---|"]
    for name, what in INGREDIENTS.items():
        lines.append(f"| `{name}` | {what} | {found[name]['mean']} | {found[name]['above mi_fuse'].strip()} |")
    return "\n".join(lines) + "\n"


def skew_table(folder: Path) -> str:
    """What is left of it when two classes are rare."""
    tables = {what: differences(folder / f"{name}.md") for what, name in SKEWS.items()}
    names = " | ".join(f"{what} | above `mi_fuse`" for what in SKEWS)
    lines = [f"| mean UA % | {names} |", "|---|" + "---:|---|" * len(SKEWS)]
    for method in SKEWED:
        cells = [f"{table[method]['mean']} | {table[method]['above mi_fuse'].strip()}" for table in tables.values()]
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def norms_table(folder: Path) -> str:
    """What normalising by speaker gives: each beside the same seeds without it."""
    columns = []
    for what, name in NORMS.items():
        rows = read(folder / f"{name}.csv")
        seeds = {row["seed"] for row in rows}
        plain = (row for row in read(folder / "open_transfer.csv") if row["seed"] in seeds)
        columns += [("none", by_seed(plain, "method")), (what, by_seed(rows, "method"))]
    lines = ["| mean UA % | " + " | ".join(what for what, _ in columns) + " |", "|---|" + "---:|" * len(columns)]
    cells = {method: " | ".join(f"{mean(found[method]):.1f}" for _, found in columns) for method in columns[-1][1]}
    return "\n".join([*lines, *(f"| `{method}` | {told} |" for method, told in cells.items())]) + "\n"


METHOD_TABLES = {"ingredients.md": ingredients_table, "skew.md": skew_table, "speaker_norm.md": norms_table}
