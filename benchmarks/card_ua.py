"""Whether exported recognisers do as well as their model cards state: the audio once more, from the files.

    python benchmarks/card_ua.py results/rav2emodb/1 results/emodb2rav/1

For each recogniser below the output folders of adaptation recipes, all test recordings are classified from their files,
as a user of the exported folder would, and the unweighted accuracy is put beside the one on the card. Writes
`card_ua.md`, by default to docs/results. Frames are stored in half precision and read back for the card; from the files
they are not rounded, so a recording on the border between two classes may fall to the other side.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch

from speechbrain_mifuse.corpora.manifest import read_manifest
from speechbrain_mifuse.evaluation.metrics import scores
from speechbrain_mifuse.inference import EmotionRecognizer
from speechbrain_mifuse.utils.errors import UserError, one_clear_error
from speechbrain_mifuse.utils.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent
STATED = re.compile(r"UA (\d+\.\d) %")


def stated_ua(recogniser: Path) -> float:
    """Read the unweighted accuracy from a card, percent."""
    found = STATED.search((recogniser / "README.md").read_text(encoding="utf-8"))
    if not found:
        raise UserError(f"{recogniser / 'README.md'} states no UA: it was not scored when it was exported.")
    return float(found[1])


def heard_ua(recogniser: Path, manifest: Path) -> tuple[float, int]:
    """Classify a labelled manifest's files; unweighted accuracy in percent, and how many they are."""
    listener = EmotionRecognizer.from_hparams(recogniser)
    rows = list(read_manifest(manifest).values())
    found = listener.classify_files([row["wav"] for row in rows], show_progress=False)
    predicted = torch.tensor([listener.labels.index(one.label) for one in found])
    reference = torch.tensor([listener.labels.index(row["emo"]) for row in rows])
    return 100 * scores(predicted, reference, len(listener.labels))["UA"], len(rows)


def lines_of(run: Path) -> list[str]:
    """Give one line for each student of a run."""
    recognisers = sorted(run.glob("*/recogniser/README.md"))
    students = [path.parent for path in recognisers if path.parents[1].name not in ("source", "teacher")]
    if not students:
        raise UserError(f"{run}: no exported student. Run an adaptation recipe first.")
    lines = []
    for student in students:
        ua, count = heard_ua(student, run / "manifests" / "target" / "test.json")
        name = "/".join((*run.parts[-2:], student.parent.name))
        lines.append(f"| {name} | {stated_ua(student):.1f} | {ua:.1f} | {count} |")
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Classify and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of adaptation recipes")
    parser.add_argument("--table", type=Path, default=ROOT / "docs" / "results", help="folder of the table")
    chosen = parser.parse_args(arguments)
    with one_clear_error():
        lines = ["| recogniser | UA % on its card | UA % from the files | recordings |", "|---|---|---|---|"]
        lines += [line for run in chosen.runs for line in lines_of(run)]
        atomic_write(chosen.table / "card_ua.md", "\n".join([*lines, ""]))
        print(*lines, sep="\n")


if __name__ == "__main__":
    main()
