"""Recipes killed by SIGKILL at random moments: the same command again must end as a run that nothing broke.

Two recipes run on small corpora with a tiny encoder: source-free adaptation, which prepares, extracts, trains two
classifiers, collects the answers of one, adapts, exports and scores; and the pretraining of an adapter. Each is run
once unbroken. Then it is begun again and again in a fresh folder, killed at a seeded moment, and repeated with the same
command; every eighth time it is killed three times in a row. A moment is counted in the process's own CPU time, so that
the load of the machine does not move it. Every second one is drawn from the whole run, from its start to the unbroken
one's end; the others from one stage after the other, for some are over in a moment. Where a kill has hit, the files say
that the run had written by then.

- `<stage>_kills`, `<stage>_equal`: kills in a stage, and how many of these runs ended like the unbroken one: the same
  bytes in every weight, manifest, result, prediction and table, the same frames, the same answers in the label store,
- `<stage>_redone`: share of all encoded recordings, training steps and answers that were done a second time,
- `largest_weight_difference`: between any weight and that of the unbroken run,
- `encoded_again`, `steps_again`, `answers_again`: the same in numbers, over all killed runs,
- `side_by_side`, `side_by_side_right`: two runs begun at once in one folder, and how often both were right, or one
  was and the other was refused in one line.

Runs that are done are kept in the cache folder, so a benchmark that is stopped goes on, as long as no line of the code
has changed.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import psutil
from measure import Figure
from safetensors.torch import load_file
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

import toy_corpora
from processes import ONE_THREAD, run_script, start

from speechbrain_mifuse.utils.files import cache_folder
from speechbrain_mifuse.utils.progress import progress

ROOT = Path(__file__).resolve().parents[1]
# What is counted, by the function that does it.
WORK = {
    "encoded": ("speechbrain_mifuse.features.extract", "FrameReader.encode"),
    "steps": ("speechbrain.core", "Brain.fit_batch"),
    "answers": ("speechbrain_mifuse.inference.recognizer", "EmotionRecognizer.predict_proba"),
}
COMPARED = {".safetensors", ".json", ".md", ".csv"}
LOOK_EVERY_S = 0.01


class Recipe(NamedTuple):
    """A recipe, and by which files one can tell how far it has come.

    Parameters
    ----------
    script, hparams : str
        Files of the repository.
    flags : mapping of str to str
        Beside folders and encoder.
    marks : sequence of pair of str
        Stage, and a pattern of what is written when it begins, in the order of the run.
    """

    script: str
    hparams: str
    flags: Mapping[str, str]
    marks: tuple[tuple[str, str], ...]


CLASSIFIER = "{number_of_epochs: 10, batch_size: 8, learning_rate: 0.005}"
ENCODED = {"encoder_layers": "[0, 1]", "frame_average": "1"}
MIFUSE = {"method": "mi_fuse", "layer": "0", "teacher_layer": "1", "number_of_steps": "30", "batch_size": "8"}
MIFUSE |= {"learning_rate": "0.003", "source_classifier": CLASSIFIER, "teacher_classifier": CLASSIFIER, **ENCODED}
ADAPTER = {"layer": "1", "seeds": "[1]", "fold": "1", "folds": "[['01', '03', '05'], ['02', '04']]", **ENCODED}
ADAPTER |= {"labels": "[angry, happy, neutral, sad]", "d_model": "16", "n_heads": "2", "number_of_steps": "40"}
ADAPTER |= {"adapter": "{n_layers: 1, codes: 16, frames_per_batch: 60, mask_width: 2}"}
PRETRAINING = "out/fold_1/seed_1/pretraining_paper"
RECIPES = {
    "mifuse": Recipe(
        "recipes/RAVDESS/mifuse/train.py",
        "hparams/nemo2rav.yaml",
        MIFUSE,
        (
            ("preparation", "out/hyperparams.yaml"),
            ("extraction", "cache/features/ravdess-*/store.json"),
            ("preparation", "out/source/lock"),
            ("extraction", "cache/features/nemo-*/store.json"),
            ("classifier", "out/source/settings.json"),
            ("export", "out/source/validation.json"),
            ("preparation", "out/labels.sqlite"),
            ("extraction", "cache/features/emodb-*/store.json"),
            ("classifier", "out/teacher/settings.json"),
            ("export", "out/teacher/validation.json"),
            ("collection", "out/teacher/recogniser/about.json"),
            ("adaptation", "out/mi_fuse/settings.json"),
            ("export", "out/mi_fuse/student.safetensors"),
            ("results", "out/mi_fuse/predictions.json"),
        ),
    ),
    "adapter": Recipe(
        "recipes/RAVDESS/adapter/pretrain.py",
        "hparams/adapter_ravdess.yaml",
        ADAPTER,
        (
            ("preparation", "out/hyperparams.yaml"),
            ("extraction", "cache/features/ravdess-*/store.json"),
            ("pretraining", f"{PRETRAINING}/settings.json"),
            ("export", f"{PRETRAINING}/codebook.png"),
        ),
    ),
}


class Unbroken(NamedTuple):
    """A run that nothing broke: when its stages began and it ended, in CPU seconds, what it did and what it left."""

    begins: list[float]
    end: float
    work: Counter
    left: dict[str, bytes]
    folder: Path


def run(quick: bool) -> tuple[str, dict[str, Figure]]:
    """Kill, repeat, compare."""
    kills, pairs = ({"mifuse": 3, "adapter": 1}, 1) if quick else ({"mifuse": 50, "adapter": 12}, 3)
    with tempfile.TemporaryDirectory() as scratch:
        kept = Path(scratch) / "runs.jsonl" if quick else cache_folder() / "faults" / f"{code_digest()}.jsonl"
        bench = Bench(Path(scratch), kept)
        for name, count in kills.items():
            bench.kill_and_repeat(name, count)
        bench.side_by_side("mifuse", pairs)
    return told(bench.records), figures(bench.records)


def told(records: list[dict]) -> str:
    """What was run, in a line."""
    broken = [record for record in records if "kills" in record]
    count = sum(len(record["kills"]) for record in broken)
    seconds = {record["recipe"]: record["unbroken_seconds"] for record in broken}
    taken = " and ".join(f"{seconds[name]:.0f} s ({name})" for name in seconds)
    return (
        f"{count} kills of {len(broken)} runs on toy corpora of 40 recordings, which take {taken} of one core unbroken"
    )


def figures(records: list[dict]) -> dict[str, Figure]:
    """Figures of all records."""
    broken = [record for record in records if "kills" in record]
    pairs = [record for record in records if "statuses" in record]
    found = {}
    for stage in dict.fromkeys(stage for record in broken for stage in record["kills"]):
        hit = [record for record in broken for stage_hit in record["kills"] if stage_hit == stage]
        found[f"{stage}_kills"] = Figure("kills", [len(hit)])
        found[f"{stage}_equal"] = Figure("kills", [sum(map(is_equal, hit))])
        found[f"{stage}_redone"] = Figure("of 1", [record["share_again"] for record in hit])
    found["largest_weight_difference"] = Figure("", [max(record["weight_difference"] for record in broken)])
    for kind in WORK:
        found[f"{kind}_again"] = Figure("per killed run", [record["again"][kind] for record in broken])
    found["side_by_side"] = Figure("pairs", [len(pairs)])
    found["side_by_side_right"] = Figure("pairs", [sum(record["right"] for record in pairs)])
    return found


def is_equal(record: dict) -> bool:
    """Whether a repeated run ended well and left what the unbroken one has left."""
    return record["status"] == 0 and not record["differing"]


class Bench:
    """Toy corpora, a tiny encoder, and the records of what was run on them, each on disk as soon as it is made.

    Parameters
    ----------
    scratch : pathlib.Path
        An empty folder.
    kept : pathlib.Path
        File of the records; those of a stopped benchmark are read.
    """

    def __init__(self, scratch: Path, kept: Path):
        self.scratch, self.kept = scratch, kept
        self.data = scratch / "corpora"
        toy_corpora.write_ravdess(self.data / "ravdess", takes=2)
        toy_corpora.write_nemo(self.data / "nemo", takes=2)
        toy_corpora.write_emodb(self.data / "emodb_2s", takes=2)
        self.encoder = toy_corpora.write_encoder(scratch / "encoder")
        kept.parent.mkdir(parents=True, exist_ok=True)
        # A line that a kill has torn is of a run that is done again.
        lines = kept.read_text(encoding="utf-8").split("\n")[:-1] if kept.exists() else []
        self.records = [json.loads(line) for line in lines]
        self.known: dict[str, Unbroken] = {}

    def keep(self, record: dict) -> None:
        """Add a record."""
        self.records.append(record)
        with self.kept.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def begin(self, name: str, folder: Path, log: str = "log"):
        """Start a recipe, in a process that can be killed; everything that it writes goes below the folder."""
        recipe, work = RECIPES[name], str(folder / "work")
        folder.mkdir(exist_ok=True)
        given = {"data_folder": self.data, "encoder": self.encoder, "output_folder": folder / "out", **recipe.flags}
        words = [recipe.hparams, *(text for key, value in given.items() for text in (f"--{key}", str(value)))]
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("OPENAI_", "MIFUSE_"))}
        environment = {**kept, **ONE_THREAD, "MIFUSE_CACHE": str(folder / "cache")}
        return start(counted_script, work, recipe.script, words, str(ROOT), environment, str(folder / log))

    def unbroken(self, name: str) -> Unbroken:
        """Run a recipe from its start to its end, looking on; once."""
        if name not in self.known:
            self.known[name] = self.watched_run(name)
        return self.known[name]

    def watched_run(self, name: str) -> Unbroken:
        """Run a recipe from its start to its end, and note when which file of its marks appears."""
        folder = self.scratch / f"{name}-unbroken"
        process = self.begin(name, folder)
        begins, used = {}, 0.0
        while process.is_alive():
            used = max(used, cpu_seconds(process.pid))
            begins.update({mark: used for mark in begun(name, folder) if mark not in begins})
            time.sleep(LOOK_EVERY_S)
        process.join()
        require(process.exitcode == 0, f"the unbroken run of {name} failed: {last_line(folder / 'log.err')}")
        return Unbroken(sorted(begins.values()), used, work_done(folder), left_in(folder), folder)

    def kill_and_repeat(self, name: str, kills: int) -> None:
        """Kill runs of a recipe and repeat them, until there are so many kills."""
        done = [record for record in self.records if record["recipe"] == name and "kills" in record]
        count, number = sum(len(record["kills"]) for record in done), len(done)
        with progress(total=kills, initial=count, desc=f"kill -9 {name}", unit="kill") as bar:
            while count < kills:
                record = self.killed_run(name, number)
                self.keep(record)
                bar.update(len(record["kills"]))
                count, number = count + len(record["kills"]), number + 1

    def killed_run(self, name: str, number: int) -> dict:
        """Kill one run, once or three times, and repeat it until it ends."""
        unbroken, folder = self.unbroken(name), self.scratch / f"{name}-{number}"
        killed = [stage for moment in moments(name, number, unbroken) if (stage := self.kill(name, folder, moment))]
        process = self.begin(name, folder)
        process.join()
        record = {"recipe": name, "number": number, "kills": killed, "status": process.exitcode}
        return self.compared(record, unbroken, folder)

    def kill(self, name: str, folder: Path, moment: float) -> str | None:
        """Kill a run that has used so much CPU time; in which stage, or `None` if it has ended before."""
        process = self.begin(name, folder)
        while process.is_alive() and cpu_seconds(process.pid) < moment:
            time.sleep(LOOK_EVERY_S)
        process.kill()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            return None
        marks = begun(name, folder)
        return RECIPES[name].marks[max(marks)][0] if marks else "start"

    def compared(self, record: dict, unbroken: Unbroken, folder: Path) -> dict:
        """Complete a record by what is different from the unbroken run, and by what was done twice."""
        left = left_in(folder)
        names = sorted(key for key in {*left, *unbroken.left} if left.get(key) != unbroken.left.get(key))
        again = work_done(folder) - unbroken.work
        record |= {
            "differing": names,
            "error": last_line(folder / "log.err") if record.get("status") else "",
            "weight_difference": max((weight_difference(folder, unbroken.folder, key) for key in names), default=0.0),
            "again": {kind: again[kind] for kind in WORK},
            "share_again": again.total() / unbroken.work.total(),
            "unbroken_seconds": unbroken.end,
        }
        shutil.rmtree(folder)
        return record

    def side_by_side(self, name: str, pairs: int) -> None:
        """Begin a recipe twice at once in one folder, as often as asked for."""
        done = [record for record in self.records if "statuses" in record]
        for number in progress(range(len(done), pairs), desc="side by side", unit="pair"):
            unbroken, folder = self.unbroken(name), self.scratch / f"{name}-pair-{number}"
            processes = [self.begin(name, folder, f"log{place}") for place in (0, 1)]
            for process in processes:
                process.join()
            statuses = [process.exitcode for process in processes]
            errors = [last_line(folder / f"log{place}.err") for place, status in enumerate(statuses) if status]
            record = {"recipe": name, "statuses": statuses, "errors": errors}
            record = self.compared(record, unbroken, folder)
            clear = all(error.startswith("error: ") for error in errors)
            self.keep({**record, "right": 0 in statuses and clear and not record["differing"]})


def moments(name: str, number: int, unbroken: Unbroken) -> list[float]:
    """CPU seconds at which a run and its repetitions are killed."""
    chance, edges = random.Random(f"{name} {number}"), [0.0, *unbroken.begins, unbroken.end]
    stage = number // 2 % (len(edges) - 1)
    first = chance.uniform(*edges[stage : stage + 2]) if number % 2 else chance.uniform(0, unbroken.end)
    return [first, *(chance.uniform(0, unbroken.end) for _ in range(2 if number % 8 == 7 else 0))]


def begun(name: str, folder: Path) -> list[int]:
    """Places, among a recipe's marks, of those that are there."""
    return [place for place, (_, mark) in enumerate(RECIPES[name].marks) if any(folder.glob(mark))]


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used; none if it has ended."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return times.user + times.system


def counted_script(work: str, *arguments) -> None:
    """Run a script as `run_script` does, with a line in a file for each piece of work."""
    tqdm.set_lock(threading.RLock())  # a semaphore that a killed process leaves behind is warned of
    for kind, (module, name) in WORK.items():
        count_calls(module, name, work, kind)
    run_script(*arguments)


def count_calls(module: str, name: str, work: str, kind: str) -> None:
    """Let each call of a method append its kind to a file."""
    owner = getattr(importlib.import_module(module), name.split(".")[0])
    original, handle = getattr(owner, name.split(".")[1]), os.open(work, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)

    @functools.wraps(original)
    def counted(*args, **kwargs):
        os.write(handle, f"{kind}\n".encode())
        return original(*args, **kwargs)

    setattr(owner, name.split(".")[1], counted)


def work_done(folder: Path) -> Counter:
    """Pieces of work of all processes that ran in a folder."""
    return Counter((folder / "work").read_text().split())


def left_in(folder: Path) -> dict[str, bytes]:
    """What a run has left that must not depend on kills, by name, without the folder's own path."""
    files = [path for path in (folder / "out").rglob("*") if path.suffix in COMPARED and "save" not in path.parts]
    found = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    found = {key: content.replace(str(folder).encode(), b"RUN") for key, content in found.items()}
    for path in (folder / "cache" / "features").glob("*/index.jsonl"):
        found[f"frames of {path.parent.name}"] = frames_in(path)
    for path in (folder / "out").glob("*.sqlite"):
        found[path.name] = answers_in(path)
    return found


def frames_in(index: Path) -> bytes:
    """Checksum of the frames of each utterance of a store; they lie in the order in which they were made."""
    rows = [json.loads(line) for line in index.read_text().splitlines()]
    return json.dumps(sorted({row["id"]: (row["frames"], row["audio"], row["crc"]) for row in rows}.items())).encode()


def answers_in(path: Path) -> bytes:
    """Answers in a label store, without the times at which they came."""
    database = sqlite3.connect(path)
    try:
        rows = database.execute(
            "SELECT hex(sha256), k, kind, hex(probs) FROM answers JOIN audio USING (audio_id) ORDER BY sha256, k"
        ).fetchall()
    finally:
        database.close()
    return json.dumps(rows).encode()


def weight_difference(one: Path, other: Path, name: str) -> float:
    """Greatest difference between two files of weights; infinite if one is missing or of another form."""
    if not name.endswith(".safetensors"):
        return 0.0
    if not ((one / name).exists() and (other / name).exists()):
        return float("inf")
    found, wanted = load_file(one / name), load_file(other / name)
    if found.keys() != wanted.keys():
        return float("inf")
    return max((found[key].float() - wanted[key].float()).abs().max().item() for key in wanted)


def last_line(path: Path) -> str:
    """Last line that a run has said."""
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1] if lines else ""


def code_digest() -> str:
    """Identity of everything that a run depends on."""
    digest = hashlib.sha256()
    for folder, ending in (("speechbrain_mifuse", "py"), ("recipes", "py"), ("hparams", "yaml"), ("benchmarks", "py")):
        for path in sorted((ROOT / folder).rglob(f"*.{ending}")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def require(kept: bool, otherwise: str) -> None:
    """Stop where there is nothing to compare with."""
    if not kept:
        raise RuntimeError(f"faults: {otherwise}")
