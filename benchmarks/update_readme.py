"""Put the generated tables of `docs/results/` into the README and the pages of `docs/`, between their marks.

`PERFORMANCE.md` is written as a whole; the block `recipes` of each `recipes/*/README.md` is the table of that corpus.
In `docs/results/`, `speed.md` and `speed_headlines.md` are made here from the JSON that `run.py NAME --json
docs/results/speed/NAME.json` writes, `reliability.md` from that of `run.py faults --json
docs/results/reliability.json`, and the short tables of `method_tables.py` from the long ones. With `--check` nothing is
written; the exit status tells whether all are up to date (1 when not).
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from method_tables import METHOD_TABLES
from performance_table import corpus_tables, performance_table

from speechbrain_mifuse.utils.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent
TABLES = ROOT / "docs" / "results"
# What a reader wants to know first: file, figure, what is measured, and how the figure is told.
HEADLINES = (
    (
        "recipe_form",
        "recipe_total_ratio",
        "20 epochs of training, extraction included",
        "{:.1f} x",
        "frozen encoder run in every epoch, as SpeechBrain's IEMOCAP recipe does",
    ),
    (
        "recipe_form",
        "hdf5_epoch_ratio",
        "an epoch on stored frames",
        "{:.1f} x",
        "frames cached per item in HDF5 (`CachedHDF5DynamicItem`)",
    ),
    (
        "extraction",
        "bare_encoder_ratio",
        "filling a feature store from files",
        "{:.0%}",
        "the bare encoder on clips in memory: 100 % is the most there can be",
    ),
    ("recognise", "real_time_ratio", "recognising a folder of recordings", "{:.0f} x", "real time"),
    (
        "recognise",
        "bare_encoder_ratio",
        "the same",
        "{:.2f} x the time",
        "the bare encoder on clips in memory: 1 is the least there can be",
    ),
    ("mifuse_step", "step_ratio", "a MI-Fuse step", "{:.2f} x the time", "a supervised step"),
    ("adapter", "stored_times_real_time", "adapter pretraining, d 384, frames of 80 ms", "{:.0f} x", "real time"),
    ("adapter", "encoder_inside_ratio", "the same", "{:.1f} x", "the encoder run inside the step"),
    (
        "zero_shot",
        "texts_every_time_ratio",
        "zero-shot scores of 10,000 recordings",
        "{:.0f} x",
        "texts embedded every time",
    ),
    (
        "collect",
        "ideal_ratio",
        "10,000 calls to an API of 200 ms, 64 at a time",
        "{:.2f} x the time",
        "the least that allows",
    ),
    (
        "label_store",
        "jsonl_ratio",
        "5 answers for each of 100,000 recordings, of a million rows",
        "{:.1f} x",
        "scanning JSONL",
    ),
    (
        "million",
        "first_step_s",
        "a million recordings: start of the process to the first training step",
        "{:.1f} s",
        "",
    ),
    ("million", "rss_mb", "the same, resident memory", "{:.0f} MB", ""),
)
BLOCK = re.compile(r"(<!-- begin (\S+) -->\n).*?(<!-- end \2 -->)", re.DOTALL)


def filled(page: str, tables: Path) -> str:
    """Give a page with every marked block replaced by the table it names."""
    return BLOCK.sub(lambda m: m[1] + "\n" + body(tables / m[2]) + "\n" + m[3], page)


def body(path: Path) -> str:
    """A table without the heading that it has as a file of its own."""
    lines = path.read_text(encoding="utf-8").strip().splitlines()
    return "\n".join(line for line in lines if not line.startswith("# ")).strip() + "\n"


def speed_table(folder: Path) -> str:
    """One table of all benchmarks' figures: median, least and greatest of their turns."""
    lines = ["| benchmark | figure | median | least | greatest |", "|---|---|---:|---:|---:|"]
    told = []
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        for name, value in found["figures"].items():
            low, high = found["spread"][name]
            lines.append(f"| {found['name']} | `{name}` | {value:.4g} | {low:.4g} | {high:.4g} |")
        told.append(f"- {found['name']}: {where(found)}")
    return "\n".join([*lines, "", *told]) + "\n"


def where(found: dict) -> str:
    """Data and machine of a benchmark."""
    return f"{found['data']}; {', '.join(f'{key} {value}' for key, value in found['machine'].items())}."


def headlines(folder: Path) -> str:
    """The figures that tell most, a line each."""
    lines = ["| what | measured | against |", "|---|---:|---|"]
    for name, figure, what, form, against in HEADLINES:
        value = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["figures"][figure]
        lines.append(f"| {what} | {form.format(value)} | {against} |")
    return "\n".join(lines) + "\n"


def reliability_table(path: Path) -> str:
    """What kills in each stage came to, and where that was measured."""
    found = json.loads(path.read_text(encoding="utf-8"))
    figures, spread = found["figures"], found["spread"]
    lines = [
        "| killed in | kills | ended as the unbroken run | done twice, median | at most |",
        "|---|---:|---:|---:|---:|",
    ]
    for stage in (name.removesuffix("_kills") for name in figures if name.endswith("_kills")):
        counts = f"{figures[f'{stage}_kills']:.0f} | {figures[f'{stage}_equal']:.0f}"
        redone, most = figures[f"{stage}_redone"], spread[f"{stage}_redone"][1]
        lines.append(f"| {stage} | {counts} | {100 * redone:.1f} % | {100 * most:.1f} % |")
    kills, equal = (sum(figures[name] for name in figures if name.endswith(end)) for end in ("_kills", "_equal"))
    lines.append(f"| **all** | **{kills:.0f}** | **{equal:.0f}** | | |")
    pairs = f"{figures['side_by_side_right']:.0f} of {figures['side_by_side']:.0f}"
    return "\n".join(
        [
            *lines,
            "",
            f"- Largest difference of any weight from the unbroken run's: {figures['largest_weight_difference']:g}.",
            f"- Two runs begun at once in one folder, right: {pairs}.",
            f"- {where(found)}",
        ]
    )


def corpus_pages() -> dict[Path, str]:
    """Pages of the corpora with the tables of their recipes."""
    pages = {ROOT / "recipes" / corpus / "README.md": table for corpus, table in corpus_tables(ROOT).items()}
    return {
        path: BLOCK.sub(lambda m, table=table: f"{m[1]}\n{table}\n{m[3]}", path.read_text(encoding="utf-8"))
        for path, table in pages.items()
    }


def pages() -> list[Path]:
    """Files that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def short_tables() -> dict[Path, str]:
    """Tables that are made of other result files."""
    return {
        TABLES / "speed.md": speed_table(TABLES / "speed"),
        TABLES / "speed_headlines.md": headlines(TABLES / "speed"),
        TABLES / "reliability.md": reliability_table(TABLES / "reliability.json") + "\n",
        **{TABLES / name: table(TABLES) for name, table in METHOD_TABLES.items()},
        ROOT / "PERFORMANCE.md": performance_table(ROOT),
    }


def update(wanted: dict[Path, str], check: bool) -> None:
    """Write the files that say something else, or, to check, end the program with an error if there is one."""
    old = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if old and check:
        sys.exit(f"{', '.join(str(path.relative_to(ROOT)) for path in old)}: old. Run benchmarks/update_readme.py.")
    for path in old:
        atomic_write(path, wanted[path])


if __name__ == "__main__":
    check = "--check" in sys.argv[1:]
    # The pages hold the tables, so these come first.
    update(short_tables() | corpus_pages(), check)
    update({path: filled(path.read_text(encoding="utf-8"), TABLES) for path in pages()}, check)
