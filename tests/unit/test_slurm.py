"""The launcher of a job array, with a stand-in for Slurm's own command."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# A command that notes that it was started and that it was told to end.
WAITS = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: ((folder / "ended").touch(), sys.exit()))
(folder / "started").touch()
time.sleep(60)
"""
LAUNCHER = Path(__file__).resolve().parents[2] / "recipes" / "slurm_array.sh"


@pytest.fixture
def job(tmp_path):
    """Start the launcher as a job: (commands, number of the job, environment) -> process."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    scontrol = bin_folder / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/requeued\n')
    scontrol.chmod(0o755)

    def start(commands, task="1", **environment):
        (tmp_path / "commands.txt").write_text("".join(f"{line}\n" for line in commands))
        slurm = {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_JOB_ID": "77", "SLURM_CPUS_PER_TASK": "3", **environment}
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "OMP_"))}
        return subprocess.Popen(
            ["bash", str(LAUNCHER), str(tmp_path / "commands.txt")],
            env={**kept, **slurm, "PATH": f"{bin_folder}:{os.environ['PATH']}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def test_a_job_runs_the_line_of_its_number_with_its_quotes(job):
    process = job(["echo one", "printf '%s|' 'a b' \"c\"", "echo three"], task="2")
    assert process.communicate(timeout=30)[0] == "a b|c|" and process.returncode == 0


def test_a_jobs_status_is_that_of_its_command(job):
    process = job(["sh -c 'exit 3'"])
    process.communicate(timeout=30)
    assert process.returncode == 3


def test_threads_are_the_jobs_cores_unless_the_command_sets_its_own(job):
    assert job(["printenv OMP_NUM_THREADS"]).communicate(timeout=30)[0] == "3\n"
    assert job(["OMP_NUM_THREADS=1 printenv OMP_NUM_THREADS"]).communicate(timeout=30)[0] == "1\n"


def test_a_number_beyond_the_file_is_one_clear_error(job):
    process = job(["echo one", "echo two"], task="5")
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (2, "")
    assert "has no line 5. Give sbatch --array=1-2." in err


def test_a_job_that_is_told_to_end_ends_its_command_and_is_put_back(job, tmp_path):
    (tmp_path / "waits.py").write_text(WAITS)
    process = job([f"X=1 {sys.executable} {tmp_path}/waits.py {tmp_path}"])
    until = time.monotonic() + 30
    while not (tmp_path / "started").exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 0 and (tmp_path / "ended").exists()
    assert (tmp_path / "requeued").read_text() == "requeue 77_1\n"
