"""One table of several corpora's comparisons of arms, from the folders that the recipes wrote.

    python benchmarks/arm_table.py adapter results/adapter_ravdess results/adapter_nemo results/adapter_emodb
    python benchmarks/arm_table.py zsfuse results/zsfuse_ravdess results/zsfuse_nemo results/zsfuse_emodb

Writes `NAME.csv` and `NAME.md`, by default to docs/results; for zsfuse also the grids of repeats
(`zsfuse_amplification.md`, and a heat map for each corpus).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from speechbrain_mifuse.evaluation.aggregate import write_csv
from speechbrain_mifuse.experiments.sweep import parse_seeds
from speechbrain_mifuse.report.variant_report import COLUMNS, arm_protocol, arm_table
from speechbrain_mifuse.utils.errors import UserError, one_clear_error
from speechbrain_mifuse.utils.files import atomic_write
from speechbrain_mifuse.utils.texts import markdown

ROOT = Path(__file__).resolve().parent.parent
RECORDS = "fold_*/seed_*/labels_*/*/results.json"
# What arms are compared with, where they were run.
BASELINES = ("mean_linear", "scratch", "scratch_fast", "fm_only", "zs_fuse_permuted", "source_classifier_fused")
# What the openly mirrored copies are, which the documentation's tables are of.
COPIES = {
    "emodb": "EmoDB, 2 s: a copy in which every clip is 2 s long, not to be compared with published figures. ",
    "nemo": "Five of nEMO's nine speakers and four of its six emotions. ",
}
# The order of rows, as the recipes' YAML files have it.
ARMS = {
    "adapter": ["mean_linear", "sap_linear", "scratch", "scratch_fast", "pretrained", "corpus_centred"],
    "zsfuse": [
        "fm_only",
        "scores_only",
        "zs_fuse",
        "zs_fuse_random_start",
        "zs_fuse_paper",
        "logit_average",
        "zs_fuse_permuted",
        "source_classifier_fused",
    ],
}


def main(arguments: list[str] | None = None) -> None:
    """Collect the records and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=ARMS)
    parser.add_argument("folders", nargs="+", type=Path, help="output folders of the recipes, one for each corpus")
    parser.add_argument("--seeds", help="as 1-3; all that were run by default")
    parser.add_argument("--table", type=Path, default=ROOT / "docs" / "results", help="folder of the table")
    chosen = parser.parse_args(arguments)
    with one_clear_error():
        seeds = parse_seeds(chosen.seeds) if chosen.seeds else None
        print(write_table(chosen.name, chosen.folders, seeds, chosen.table))


def write_table(name: str, folders: Sequence[Path], seeds: Sequence[int] | None, target: Path) -> str:
    """Write CSV and Markdown; give the latter."""
    records, told = [], []
    for folder in folders:
        found = [json.loads(path.read_text()) for path in sorted(folder.glob(RECORDS))]
        found = [record for record in found if record["arm"] in ARMS[name]]
        found = [record for record in found if seeds is None or record["seed"] in seeds]
        if not found:
            raise UserError(f"{folder}: no results{f' of seeds {list(seeds)}' if seeds else ''}. Run the recipe first.")
        found.sort(key=lambda record: (amount(record), record["fold"], record["seed"], ARMS[name].index(record["arm"])))
        records += found
        told.append(f"{found[0]['corpus']}: {COPIES.get(found[0]['corpus'], '')}{arm_protocol(found)}")
    arms = [arm for arm in ARMS[name] if any(record["arm"] == arm for record in records)]
    table = arm_table(records, arms, [arm for arm in BASELINES if arm in arms])
    text = "\n".join([table.markdown(), *(f"{markdown(line)}\n" for line in told)])
    write_csv(target / f"{name}.csv", records, COLUMNS)
    atomic_write(target / f"{name}.md", text)
    collect_grids(name, folders, target)
    return text


def collect_grids(name: str, folders: Sequence[Path], target: Path) -> None:
    """Bring the corpora's grids of repeats together, where the recipe wrote any."""
    grids = {folder.name.removeprefix(f"{name}_"): folder / "amplification.md" for folder in folders}
    found = {corpus: path for corpus, path in grids.items() if path.exists()}
    for corpus, path in found.items():
        atomic_write(target / f"{name}_amplification_{corpus}.png", path.with_suffix(".png").read_bytes())
    if found:
        parts = [
            f"## {corpus}\n\n{path.read_text().strip()}\n\n![Zero-shot UA by N and M, {corpus}]"
            f"({name}_amplification_{corpus}.png)\n"
            for corpus, path in found.items()
        ]
        atomic_write(target / f"{name}_amplification.md", "\n".join(parts))


def amount(record: dict) -> float:
    """Labels per class as a number to sort by."""
    return float("inf") if record["labels_per_class"] == "all" else record["labels_per_class"]


if __name__ == "__main__":
    main()
