"""Processes that start with everything imported, and that can be killed at a chosen moment."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import runpy
import signal
import sys
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

PRELOADED = [
    "speechbrain",
    "speechbrain_mifuse.experiments.teacher",
    "speechbrain_mifuse.experiments.run_report",
    "speechbrain_mifuse.brains.adaptation",
    "transformers",
]
# What recipes import when they need it, and nearly all do.
PRELOADED += [
    "speechbrain_mifuse.experiments.preflight",
    "speechbrain_mifuse.experiments.comparison",
    "matplotlib.backends.backend_agg",
]
PRELOADED += ["transformers.models.whisper.modeling_whisper", "torch.utils.tensorboard"]
# A parent with several threads must not be forked while they run, and two cores are soon taken.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def start(target, *args):
    """Start `target(*args)` in a process forked from one that has imported the package; importing takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ, ONE_THREAD):
        forkserver.ensure_running()
        process = context.Process(target=target, args=args)
        process.start()
    return process


def run_script(script: str, arguments: list[str], cwd: str, environment: dict, log: str, killed_at=None):
    """Do what `python SCRIPT ARGUMENTS...` does, with the output in `LOG.out` and `LOG.err`.

    `killed_at`, if given, is what `kill_at` takes.
    """
    for stream, ending in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{ending}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644), stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [script, *arguments]
    # What was imported before the fork is no garbage, and a look through all of it takes half a second.
    gc.freeze()
    # SpeechBrain asks pip for all packages when a run begins, which takes as long as training on a toy corpus.
    importlib.import_module("speechbrain.utils.logger").get_environment_description = str
    if killed_at is not None:
        kill_at(*killed_at)
    path = Path(cwd) / script
    sys.path.insert(0, str(path.resolve().parent))
    runpy.run_path(str(path), run_name="__main__")


def kill_at(module: str, name: str, call: int):
    """Let this process end with SIGKILL when the function or method `name` is called for the `call`-th time."""
    *owners, last = name.split(".")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    original, calls = getattr(owner, last), []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, last, counted)
