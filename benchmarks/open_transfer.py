"""The open six-transfer table: every ordered pair of RAVDESS, nEMO and EmoDB-2s, all methods, five seeds.

    MIFUSE_CORPORA=/path/to/corpora python benchmarks/open_transfer.py

Each run is a normal recipe run in its own process, two at a time on two cores; what is done is skipped, so a killed
table goes on where it was. Writes `docs/results/open_transfer.csv` and `docs/results/open_transfer.md`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from speechbrain_mifuse import __version__
from speechbrain_mifuse.corpora.manifest import atomic_write
from speechbrain_mifuse.errors import UserError, one_clear_error
from speechbrain_mifuse.evaluation.aggregate import read_records, transfer_table, write_csv

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"rav": "RAVDESS", "nemo": "nEMO", "emodb": "EmoDB"}
METHODS = (
    "source_only",
    "lalm_zero_shot",
    "lalm_sfuda",
    "mean_fusion",
    "mi_fuse_permuted",
    "mi_fuse",
    "oracle",
)
BASELINES = ("source_only", "lalm_zero_shot", "lalm_sfuda")


def run(pair: tuple[str, str], seed: int, output: Path) -> None:
    """Run the recipe of one transfer with all methods, in a process of its own."""
    source, target = pair
    third = next(name for name in FOLDERS if name not in pair)
    folder = output / f"{source}2{target}"
    command = [sys.executable, f"recipes/{FOLDERS[target]}/mifuse/train.py", f"hparams/{source}2{target}.yaml"]
    # The API teacher is one and the same for all seeds: it is asked once, and its answers are shared.
    command += [f"--seed={seed}", f"--output_folder={folder / str(seed)}", f"--method=[{', '.join(METHODS)}]"]
    command += [f"--teacher_folder={output / f'teacher_{third}'}", f"--label_store={folder / 'labels.sqlite'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = folder / f"{seed}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        raise UserError(f"{source}2{target}, seed {seed} failed; its log is {log}.")
    print(f"{source}2{target}, seed {seed}: done", flush=True)


def protocol(records: list[dict], seeds: int) -> str:
    """Say under what protocol the table was made, from the records themselves."""
    any_record = next(r for r in records if r["steps"])
    sizes = {r["target"]: (r["n_train"], r["n_test"], r["test_speakers"]) for r in records if r["n_train"]}
    told = "; ".join(f"{t}: {a} to adapt, {n} to test of {s} speakers" for t, (a, n, s) in sorted(sizes.items()))
    return (
        f"UA in percent, mean ± standard deviation over {seeds} seeds. Four classes, speaker-independent: {told}. "
        f"Teacher: classifier of the third corpus on another layer, one for all seeds, behind HTTP, 5 stochastic "
        f"distributions each. Encoder: {any_record['encoder']}. Selection: {any_record['selection']}. "
        f"{any_record['steps']} steps, lambda {any_record['diversity_weight']}, tau {any_record['temperature']}. "
        "Intervals: bootstrap over test speakers and seeds, transfers fixed; differences are paired. "
        f"Code {__version__}.\n"
    )


def main() -> None:
    """Run what is missing, two runs at a time, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default: 5)")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "open_transfer", help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: one per core)")
    parser.add_argument("--table", type=Path, default=ROOT / "docs" / "results", help="folder of the table")
    options = parser.parse_args()
    output = options.output.resolve()
    pairs = [(s, t) for t in FOLDERS for s in FOLDERS if s != t]
    with one_clear_error(), ThreadPoolExecutor(options.jobs) as pool:
        # The first seed of each pair fills what the others share: frames, the teacher, its answers.
        for seed in range(1, options.seeds + 1):
            list(pool.map(lambda pair, seed=seed: run(pair, seed, output), pairs))
        records = read_records(output, METHODS)
        write_csv(options.table / "open_transfer.csv", records)
        text = transfer_table(records, METHODS, BASELINES) + "\n" + protocol(records, options.seeds)
        atomic_write(options.table / "open_transfer.md", text)
        print(text)


if __name__ == "__main__":
    main()
