"""A recipe on a disk that is full again and again: each time one line, and in the end what an unbroken run leaves."""

import errno
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ONE_THREAD, run_script, start

from speechbrain_mifuse.utils import errors

ROOT = Path(__file__).resolve().parents[2]
PAGE = 4096


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Corpora, encoder and a run that nothing broke."""
    sys.path.append(str(ROOT / "benchmarks"))
    import faults

    scratch = tmp_path_factory.mktemp("full")
    found = faults.Bench(scratch, scratch / "kept" / "runs.jsonl")
    return faults, found, found.unbroken("mifuse")


class SmallDisk:
    """A file system that holds so many bytes."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        if not self._mount(f"size={PAGE}"):
            pytest.skip("no file system can be mounted here")

    def _mount(self, options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)]
        try:
            return subprocess.run(command, capture_output=True, check=False).returncode == 0
        except OSError:
            return False

    def grow(self, size):
        assert self._mount(f"remount,size={size}")

    def close(self):
        subprocess.run(["umount", str(self.folder)], check=True)


class SmallFiles:
    """A folder in which no file may have more than so many bytes."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()

    def grow(self, size):
        return size

    def close(self):
        pass


def limited_script(file_size, refused, *arguments):
    """Run a script with small files, or one whose `refused`-th file cannot be brought to the disk."""
    errors.MIN_FREE_BYTES = 0
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    if refused is not None:
        refuse(refused)
    run_script(*arguments)


def refuse(call):
    original, calls = os.fsync, []

    def fsync(handle):
        calls.append(1)
        if len(calls) >= call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(handle)

    os.fsync = fsync


def run(bench, folder, log, file_size=None, refused=None):
    """Run the recipe once; give its exit status and what it has said."""
    faults, runs, _ = bench
    recipe = faults.RECIPES["mifuse"]
    given = {"data_folder": runs.data, "encoder": runs.encoder, "output_folder": folder / "out", **recipe.flags}
    words = [recipe.hparams, *(text for key, value in given.items() for text in (f"--{key}", str(value)))]
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("OPENAI_", "MIFUSE_"))}
    environment = {**kept, **ONE_THREAD, "MIFUSE_CACHE": str(folder / "cache")}
    arguments = (recipe.script, words, str(ROOT), environment, str(log))
    process = start(limited_script, file_size, refused, *arguments)
    process.join()
    return process.exitcode, "".join(Path(f"{log}.{ending}").read_text() for ending in ("out", "err"))


def is_one_line(said, folder):
    """Whether a run has ended in one line that names something in its folder and says what to do."""
    last = said.strip().splitlines()[-1]
    return (
        last.startswith("error: ")
        and str(folder) in last
        and re.search(r"[Ff]ree (some )?space|Check free space|full or read-only", last)
        and re.search("again", last)
        and "Traceback" not in said
        and "Logging error" not in said
        and "Exception ignored" not in said
    )


def require_as_unbroken(bench, folder):
    faults, _, unbroken = bench
    left = faults.left_in(folder)
    assert sorted(key for key in {*left, *unbroken.left} if left.get(key) != unbroken.left.get(key)) == []


@pytest.mark.parametrize("kind", [pytest.param(SmallDisk, marks=pytest.mark.long), SmallFiles])
def test_on_a_disk_that_fills_up_again_and_again_each_run_ends_in_one_line_and_the_last_as_an_unbroken_one(
    kind, bench, tmp_path
):
    _, _, unbroken = bench
    step = sum(path.stat().st_size + PAGE for path in unbroken.folder.rglob("*") if path.is_file()) // 4
    disk, refused = kind(tmp_path / "disk"), 0
    try:
        for number in range(40):
            size = 4 * PAGE + number * step if kind is SmallDisk else 512 * 16**number
            status, said = run(bench, disk.folder, tmp_path / f"log{number}", file_size=disk.grow(size))
            if status == 0:
                break
            assert status == 2 and is_one_line(said, disk.folder), (size, status, said)
            refused += 1
        require_as_unbroken(bench, disk.folder)
        assert refused >= 2
    finally:
        disk.close()


@pytest.mark.long
def test_whichever_file_does_not_reach_the_disk_the_same_command_goes_on_to_the_same_results(bench, tmp_path):
    refused = 0
    folder = tmp_path / "run"
    folder.mkdir()
    for number in range(40):
        status, said = run(bench, folder, tmp_path / f"log{number}", refused=1 + 6 * number**2)
        if status == 0:
            break
        assert status == 2 and is_one_line(said, folder), (number, status, said)
        refused += 1
    require_as_unbroken(bench, folder)
    assert refused >= 3
