"""What keeps the house in order: imports, recipes and README."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "speechbrain_mifuse"
# Each room may import from those before it.
ROOMS = ("errors", "progress", "audio", "corpora", "features", "nnet", "inference", "lalm", "adaptation")
ROOMS += ("evaluation", "brains", "pipeline", "cli")
PAIRS = sorted(path.name for path in (ROOT / "hparams").glob("*2*.yaml"))


def room_of(path: Path) -> str:
    """Room of a file of the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a file imports from."""
    names = [
        node.module.split(".")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module
    ]
    return {parts[1] for parts in names if parts[0] == "speechbrain_mifuse" and len(parts) > 1}


def test_every_room_imports_only_from_rooms_before_it():
    wrong = [
        f"{path.relative_to(ROOT)} imports {room}"
        for path in PACKAGE.rglob("*.py")
        if path.parent != PACKAGE or path.name != "__init__.py"
        for room in imported_rooms(path)
        if ROOMS.index(room) > ROOMS.index(room_of(path))
    ]
    assert not wrong


def test_torch_and_torchaudio_are_a_matching_pair():
    import torch
    import torchaudio

    assert torch.__version__.split(".")[:2] == torchaudio.__version__.split(".")[:2]


def test_pairs_differ_in_their_corpora_alone():
    assert len(PAIRS) == 6
    tails = {(ROOT / "hparams" / name).read_text(encoding="utf-8").split("\n# Encoder:")[1] for name in PAIRS}
    assert len(tails) == 1


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_names_a_third_corpus_as_teacher_and_a_recipe_that_exists(name):
    text = (ROOT / "hparams" / name).read_text(encoding="utf-8")
    values = dict(line.split(": ", 1) for line in text.splitlines() if line.split(":")[0] in ROLES)
    assert len({values[role] for role in ROLES}) == 3
    command = next(line for line in text.splitlines() if "python recipes/" in line).split()
    assert (ROOT / command[2]).exists() and command[3] == f"hparams/{name}"


ROLES = ("target", "source", "teacher")


def test_readme_shows_the_generated_tables():
    check = [sys.executable, str(ROOT / "benchmarks" / "update_readme.py"), "--check"]
    assert subprocess.run(check, check=False).returncode == 0


def test_files_that_the_readme_names_exist():
    words = (ROOT / "README.md").read_text(encoding="utf-8").replace("`", " ").replace("(", " ").replace(")", " ")
    named = {word.strip(".,") for word in words.split() if word.startswith(("recipes/", "hparams/", "docs/"))}
    assert named and not [name for name in named if not (ROOT / name).exists()]


def test_help_is_printed_without_loading_torch():
    code = "import sys; from speechbrain_mifuse.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    check = [sys.executable, "-c", code + "assert 'torch' not in sys.modules"]
    assert subprocess.run(check, check=False, stdout=subprocess.DEVNULL).returncode == 0
