"""Run one benchmark, print its figures as a table and, if asked, write them as JSON.

    python benchmarks/run.py --list
    python benchmarks/run.py epoch --json epoch.json

What a benchmark compares, its own file says. The sides of a comparison run in one process, taking turns, so that what
else the machine does meets them alike; a figure is the median over the turns, with the least and the greatest beside
it. JSON: `{"name", "machine", "data", "figures": {figure: median}, "spread": {figure: [least, greatest]}}`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
from pathlib import Path

BENCHMARKS = {
    "adapter": "adapter pretraining on stored frames, against the same step with the encoder run inside it",
    "closed_form": "the closed form of mi_fuse_plus on one adaptation set, against its student",
    "collect": "ten thousand calls to a simulated API, against the least time they can take",
    "collect_faults": "collection killed at random moments, and with half of all replies faulty",
    "faults": "recipes killed at random moments: what the same command then makes, against an unbroken run",
    "epoch": "an epoch on stored frames, against the frozen encoder run in every epoch",
    "extraction": "filling a feature store, against the encoder alone on the same clips",
    "label_store": "loading the targets of 100,000 utterances among 1,000,000 stored rows, against plain files",
    "million": "from the start of the process to the first training step of a corpus of a million recordings",
    "mifuse_step": "a training step of MI-Fuse, against a supervised one",
    "recognise": "recognising a folder of recordings, against the encoder alone on what it holds",
    "serve": "the server with 1, 8 and 32 callers: clips side by side, against one at a time; memory after 2,000 clips",
    "recipe_form": "a whole training, against the encoder run in every epoch and frames cached per item in HDF5",
    "zero_shot": "scoring 10,000 recordings from stored frames, against one at a time and with texts every time",
    "memory": "resident memory while going through a store, and through one eight times its size",
}


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("name", nargs="?", choices=sorted(BENCHMARKS), metavar="NAME", help="which; see --list")
    what.add_argument("--list", action="store_true", help="name the benchmarks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs; its figures mean nothing")
    chosen = parser.parse_args(arguments)
    if chosen.list:
        print("\n".join(f"{name:12} {about}" for name, about in BENCHMARKS.items()))
    else:
        run(chosen.name, chosen.quick, chosen.json)


def run(name: str, quick: bool, path: Path | None) -> None:
    """Run a benchmark and hand out its figures."""
    # Only now: importing torch takes seconds.
    from measure import as_json, as_table, machine

    from speechbrain_mifuse.utils.errors import one_clear_error
    from speechbrain_mifuse.utils.files import atomic_write

    about = machine()
    with one_clear_error():
        data, figures = importlib.import_module(name).run(quick)
    print(as_table(name, about, data, figures))
    if path is not None:
        atomic_write(path, json.dumps(as_json(name, about, data, figures), indent=1) + "\n")


if __name__ == "__main__":
    # Threads that wait by spinning for a core which another program holds would be measured in place of the work.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    main()
