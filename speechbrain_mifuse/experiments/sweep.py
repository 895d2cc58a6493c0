"""Pairs x methods x seeds: recipe runs side by side, each in a process of its own, and the tables they end in.

A run computes on one thread, however many run side by side: sums of floats depend on the number of threads, and results
must not depend on the machine that was free.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from speechbrain_mifuse import __version__
from speechbrain_mifuse.evaluation.aggregate import (
    Comparison,
    difference_table,
    interval_table,
    protocol,
    read_records,
    seed_table,
    trait_table,
    transfer_table,
    write_csv,
)
from speechbrain_mifuse.experiments.registry import Recipe, adaptation_recipe, current_names
from speechbrain_mifuse.experiments.settings import check_flags
from speechbrain_mifuse.features.extract import usable_cores
from speechbrain_mifuse.report.figures import plot_heatmap, plot_transfers
from speechbrain_mifuse.report.page import write_report
from speechbrain_mifuse.report.selection_report import selection_table
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.files import atomic_write
from speechbrain_mifuse.utils.progress import progress
from speechbrain_mifuse.utils.texts import markdown
from speechbrain_mifuse.zero_shot import ZERO_SHOT

MARKER = "sweep.json"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# Where a run finds things by itself; a job of an array may start without the variables of this shell.
PLACES = ("MIFUSE_CORPORA", "MIFUSE_CACHE")
BASELINES = ("source_only", "lalm_zero_shot", "lalm_sfuda")
FIGURE_METHODS = ("source_only", "lalm_zero_shot", "lalm_sfuda", "mi_fuse", "mi_fuse_plus", "oracle")
# The sweep gives each run these flags.
OWN_FLAGS = {"seed": "--seeds", "output_folder": "--output", "method": "--methods"}
# Keys of the YAML that decide the classifier behind a local API: runs that agree in them share it.
TEACHER_KEYS = (
    *("teacher", "prepare_teacher", "labels", "encoder", "encoder_layers", "trim_db", "frame_average"),
    *("teacher_layer", "teacher_classifier"),
)
GRACE_S, POLL_S = 5.0, 0.05


@dataclass(frozen=True, eq=False)
class Run:
    """One recipe run: a pair with a seed, all methods."""

    pair: str
    seed: int
    folder: Path
    command: tuple[str, ...]
    environment: Mapping[str, str]
    results: tuple[Path, ...]
    code: str

    @property
    def log(self) -> Path:
        """Where its output goes."""
        return self.folder.parent / f"{self.seed}.log"

    @property
    def mark(self) -> dict:
        """What must be equal for its results to count as done."""
        return {"command": list(self.command), "environment": dict(self.environment), "code": self.code}

    def done(self) -> bool:
        """Tell whether all results are there and were got by this command and code."""
        try:
            found = json.loads((self.folder / MARKER).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return found == self.mark and all(path.is_file() for path in self.results)

    def line(self) -> str:
        """Give the run as one line for a shell."""
        assigned = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*assigned, shlex.join(self.command)])


@dataclass(frozen=True)
class Plan:
    """Pairs, methods, seeds and where everything goes."""

    recipes: list[Recipe]
    methods: list[str]
    seeds: list[int]
    output: Path
    flags: tuple[str, ...] = ()
    threads: int = 1

    def runs(self) -> list[Run]:
        """List the runs: the first seed of every pair, then the second of every pair, ..."""
        environment = dict.fromkeys(THREADS, str(self.threads))
        # Threads that wait for a busy core by sleeping: spinning makes a shared machine many times slower.
        environment["OMP_WAIT_POLICY"] = "passive"
        environment.update({name: os.environ[name] for name in PLACES if os.environ.get(name)})
        codes = {recipe.name: code_digest(recipe) for recipe in self.recipes}
        return [
            self._run(recipe, seed, environment, codes[recipe.name]) for seed in self.seeds for recipe in self.recipes
        ]

    def _run(self, recipe: Recipe, seed: int, environment: Mapping[str, str], code: str) -> Run:
        folder = self.output / recipe.name / str(seed)
        flags = {"seed": seed, "output_folder": folder, "method": f"[{', '.join(self.methods)}]"}
        # The API teacher is one and the same for all seeds: it is asked once, and its answers are shared.
        shared = {"teacher_folder": self.teacher_folder(recipe), "label_store": folder.parent / "labels.sqlite"}
        given = flag_values(self.flags)
        flags.update({key: path for key, path in shared.items() if key in recipe.values and key not in given})
        command = [sys.executable, str(recipe.script), str(recipe.hparams)]
        command += [*(f"--{key}={value}" for key, value in flags.items()), *self.flags]
        results = tuple(folder / method / "results.json" for method in self.methods)
        return Run(recipe.name, seed, folder, tuple(command), environment, results, code)

    def teacher_folder(self, recipe: Recipe) -> Path:
        """Folder of the classifier behind the local API, the same for all runs with an equal one."""
        given = flag_values(self.flags)
        decides = {key: given.get(key, recipe.values.get(key)) for key in TEACHER_KEYS}
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:8]
        return self.output / f"teacher_{recipe.value('teacher')}-{digest}"

    def teacher(self, records: Sequence[Mapping] = ()) -> str:
        """Say what the API teachers are, from YAML files and flags; results tell an audio-text model's weights."""
        models = [record["teacher_model"] for record in records if record.get("teacher_model")]
        weights = " and ".join(dict.fromkeys(model["weights"][:16] for model in models))
        told = {}
        for recipe in self.recipes:
            values = {**recipe.values, **flag_values(self.flags)}
            who = f"a classifier of that corpus on layer {values.get('teacher_layer')}, behind HTTP on this machine"
            form = values.get("lalm_answer_form")
            if values.get("lalm_base_url") not in (None, "null"):
                who = f"{values.get('lalm_model')} behind an API"
            if values.get("teacher") == ZERO_SHOT:
                who = f"an audio-text model on this machine{f' (weights {weights})' if weights else ''}"
                form = "prompts drawn at random"
            told[f"{who}, {values.get('lalm_samples')} stochastic answers each ({form})"] = 1
        return " or ".join(told)


def make_plan(
    root: str | Path,
    pairs: Sequence[str],
    output: str | Path,
    seeds: Sequence[int],
    methods: Sequence[str] = (),
    flags: Sequence[str] = (),
    threads: int = 1,
) -> Plan:
    """Plan a sweep of YAML files by name; methods are those of their tables by default."""
    recipes = [adaptation_recipe(root, pair) for pair in dict.fromkeys(Path(pair).stem for pair in pairs)]
    for key in flag_values(flags):
        if key in OWN_FLAGS:
            raise UserError(f"--{key}: the sweep gives this flag to each run; use {OWN_FLAGS[key]}.")
    methods = current_names(methods, {old: new for r in recipes for old, new in r.renamed.items()}, "--methods")
    for recipe in recipes:
        unknown = [name for name in methods if name not in recipe.methods]
        if unknown:
            known = ", ".join(recipe.methods)
            raise UserError(f"--methods: {', '.join(unknown)} is none of the methods of {recipe.name}: {known}.")
    registered = list(dict.fromkeys(name for recipe in recipes for name in recipe.methods))
    wanted = methods or [name for recipe in recipes for name in recipe.table]
    chosen = [name for name in registered if name in wanted]
    return Plan(recipes, chosen, list(seeds), Path(output).resolve(), tuple(flags), threads)


def require_methods(plan: Plan, flag: str, names: Sequence[str]) -> None:
    """Refuse names of methods that a sweep does not hold, before it spends hours on the others."""
    unknown = [name for name in names if name not in plan.methods]
    if unknown:
        raise UserError(f"{flag}: {', '.join(unknown)} is none of the methods {', '.join(plan.methods)}.")


def require_settings(plan: Plan) -> None:
    """Refuse flags that a recipe of a sweep does not take, before the first run begins."""
    for recipe in plan.recipes:
        check_flags(recipe.hparams, plan.flags)


def flag_values(flags: Sequence[str]) -> dict[str, str]:
    """Read flags of a command line: names without dashes, and their values as text."""
    found, key = {}, None
    for word in flags:
        if word.startswith("--"):
            key, _, found[word[2:].split("=")[0]] = word[2:].partition("=")
        elif key is not None:
            found[key] = word
    return found


def parse_seeds(text: str) -> list[int]:
    """Read a list of seeds."""
    ranges = [re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip()) for part in text.split(",")]
    if not all(ranges):
        raise UserError(f"--seeds: '{text}' is no list of seeds such as 1-5 or 1,2,3.")
    seeds = {seed for found in ranges for seed in range(int(found[1]), int(found[2] or found[1]) + 1)}
    if not seeds:
        raise UserError(f"--seeds: '{text}' holds no seed; a range counts upwards, as 1-5.")
    return sorted(seeds)


def code_digest(recipe: Recipe) -> str:
    """Version of the package with a hash of all that a run of a recipe executes and reads as settings."""
    digest = hashlib.sha256(json.dumps(recipe.values, sort_keys=True, default=str).encode())
    for path in (recipe.script, *sorted(Path(__file__).parents[1].rglob("*.py"))):
        digest.update(path.name.encode() + path.read_bytes())
    return f"{__version__} {digest.hexdigest()[:12]}"


def write_commands(path: str | Path, plan: Plan) -> str:
    """Write one shell command per line, for a job array, and say how to run them."""
    atomic_write(path, "".join(run.line() + "\n" for run in plan.runs()))
    first, total = len(plan.recipes), len(plan.recipes) * len(plan.seeds)
    place = shlex.quote(str(path))
    lines = [f'{path}: {total} commands; a job runs one by: bash -c "$(sed -n "${{SLURM_ARRAY_TASK_ID}}p" {place})"']
    if total > first:
        lines.append(f"Run lines 1-{first} before {first + 1}-{total}: they fill what the other seeds share.")
    lines.append("When all are done, the same sweep with --collect in place of --commands writes the tables.")
    return "\n".join(lines)


@dataclass
class Processes:
    """Runs as processes, at most `jobs` at a time."""

    runs: Sequence[Run]
    jobs: int
    leaderless: frozenset[str] = frozenset()
    stopped: bool = False
    running: dict[Run, subprocess.Popen] = field(default_factory=dict)

    def go(self) -> list[tuple[Run, int]]:
        """Run all; a failed one does not stop the others."""
        waiting, failed = collections.deque(self.runs), []
        led = set(self.leaderless)
        with self._listening(), progress(total=len(self.runs), desc="sweep", unit="run", smoothing=0) as bar:
            try:
                while (waiting or self.running) and not self.stopped:
                    self._start(waiting, led)
                    for run, status in self._ended():
                        led.add(run.pair)
                        if status:
                            failed.append((run, status))
                        bar.set_postfix(failed=len(failed), refresh=False)
                        bar.update()
                    time.sleep(POLL_S)
            finally:
                self._stop()
        if self.stopped:
            raise KeyboardInterrupt
        return failed

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        # A flag in place of an exception: nothing can come between the start of a process and the note of it.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # Under nohup a closed terminal stops nothing.
        heeded = [signal.SIGINT, signal.SIGTERM]
        heeded += [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN else []
        before = {number: signal.signal(number, self._note) for number in heeded}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        self.stopped = True

    def _start(self, waiting: collections.deque[Run], led: set[str]) -> None:
        led_now = {run.pair for run in self.running} - led
        for run in list(waiting):
            if len(self.running) >= self.jobs:
                return
            if run.pair in led_now:
                continue
            if run.pair not in led:
                led_now.add(run.pair)
            waiting.remove(run)
            self.running[run] = start(run)

    def _ended(self) -> list[tuple[Run, int]]:
        ended = [(run, status) for run, process in self.running.items() if (status := process.poll()) is not None]
        for run, status in ended:
            del self.running[run]
            if status == 0:
                atomic_write(run.folder / MARKER, json.dumps(run.mark, indent=1))
        return ended

    def _stop(self) -> None:
        for process in self.running.values():
            _signal(process, signal.SIGINT)
        deadline = time.monotonic() + GRACE_S
        for process in self.running.values():
            try:
                process.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                _signal(process, signal.SIGKILL)
                process.wait()
        self.running.clear()


def start(run: Run) -> subprocess.Popen:
    """Start a run, its output in its log."""
    run.folder.mkdir(parents=True, exist_ok=True)
    # What is begun anew is not done.
    (run.folder / MARKER).unlink(missing_ok=True)
    options = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "start_new_session": True}
    with run.log.open("wb") as log:
        return subprocess.Popen(run.command, env={**os.environ, **run.environment}, stdout=log, **options)


def _signal(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def run_plan(plan: Plan, jobs: int) -> None:
    """Run what is missing, at most `jobs` at a time; failed runs are an error after all were tried."""
    runs = plan.runs()
    missing = [run for run in runs if not run.done()]
    if not missing:
        return
    print(f"{len(runs) - len(missing)} of {len(runs)} runs are done already.", file=sys.stderr, flush=True)
    if jobs * plan.threads > usable_cores():
        print(f"warning: {jobs} runs of {plan.threads} threads on {usable_cores()} cores.", file=sys.stderr)
    leaderless = frozenset(run.pair for run in runs if run not in missing)
    begin = time.monotonic()
    try:
        failed = Processes(missing, jobs, leaderless).go()
    except KeyboardInterrupt:
        done = sum(run.done() for run in runs)
        print(f"stopped; {done} of {len(runs)} runs are done. The same command goes on from here.", file=sys.stderr)
        raise SystemExit(130) from None
    if failed:
        told = [
            f"  {run.pair}, seed {run.seed}: status {status}; {run.log}\n    {_last_line(run.log)}"
            for run, status in failed
        ]
        raise UserError(
            f"{len(failed)} of {len(runs)} runs failed, so no table is written. Mend the cause; the same command goes "
            "on from here.\n" + "\n".join(told)
        )
    took = (time.monotonic() - begin) / 60
    print(f"{len(missing)} runs in {took:.1f} minutes, {jobs} at a time.", file=sys.stderr, flush=True)


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "(its log is empty)"


def collect(
    plan: Plan, folder: str | Path, name: str, baselines: Sequence[str] = (), figure_methods: Sequence[str] = ()
) -> str:
    """Write the tables, figures and page of a sweep from its runs' results, whoever ran them."""
    paths = [path for run in plan.runs() for path in run.results]
    records = read_records(paths)
    if not records:
        raise UserError("no results to collect: name pairs, methods and seeds.")
    comparison = Comparison(records, plan.methods)
    baselines = list(baselines) or [method for method in BASELINES if method in plan.methods]
    drawn = list(figure_methods) or [method for method in FIGURE_METHODS if method in plan.methods]
    main, differences = transfer_table(comparison), difference_table(comparison, baselines)
    tables = [table for table in (main, differences, trait_table(comparison)) if table is not None]
    teacher = plan.teacher(records)
    about = markdown(protocol(comparison, teacher)) + "\n"
    text = "\n".join([*(table.markdown() for table in tables), about])
    folder = Path(folder)
    order = {method: place for place, method in enumerate(comparison.methods)}
    rows = sorted(records, key=lambda r: (r["target"], r["source"], r["teacher"], order[r["method"]], r["seed"]))
    write_csv(folder / f"{name}.csv", rows)
    atomic_write(folder / f"{name}.md", text)
    atomic_write(folder / f"{name}.tex", "\n".join(table.latex() for table in tables))
    seeds = [seed_table(comparison).markdown(), interval_table(comparison).markdown(), about]
    atomic_write(folder / f"{name}_seeds.md", "\n".join(seeds))
    plot_heatmap(folder / f"{name}.png", comparison)
    plot_transfers(folder / f"{name}_transfers.png", comparison, drawn)
    selection = folder / f"{name}_selection.md"
    if of_selection := selection_table(records):
        atomic_write(selection, of_selection)
    else:
        # Without snapshots no older one stays behind.
        selection.unlink(missing_ok=True)
    write_report(plan.output, plan.output / f"{name}.html", paths, teacher)
    return text
