"""What keeps the house in order: imports, recipes and README."""

import ast
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from hyperpyyaml import load_hyperpyyaml

from speechbrain_mifuse.experiments.registry import plain_values

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "speechbrain_mifuse"
# Each room may import from those before it.
ROOMS = ("utils", "corpora", "adaptation", "demo", "lalm", "features", "nnet", "evaluation", "inference", "zero_shot")
ROOMS += ("report", "brains", "experiments", "recogniser_files", "mifuse_recipe", "adapt", "cli", "__main__")
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


def text_of(name: str) -> str:
    """A YAML file of `hparams`."""
    return (ROOT / "hparams" / name).read_text(encoding="utf-8")


def keyed_lines(text: str) -> dict[str, str]:
    """Lines that set a key, by the key."""
    lines = [line for line in text.splitlines() if line[:1].isalpha() or line.startswith("__")]
    return {line.split(":")[0]: line for line in lines}


def test_the_yaml_of_every_pair_is_what_its_header_says_that_it_is_generated_from():
    written = runpy.run_path(str(ROOT / "hparams" / "base" / "pairs.py"))["pair_files"]()
    assert {*PAIRS, "demo.yaml"} <= {f"{name}.yaml" for name in written}
    # Out of date? python hparams/base/pairs.py
    assert not [name for name, text in written.items() if text_of(f"{name}.yaml") != text]
    assert not [name for name, text in written.items() if "`python hparams/base/pairs.py`" not in text]


@pytest.mark.parametrize("name", ["nemo2rav", "msp2iem"])
def test_speechbrains_own_loader_takes_every_key_of_a_pair_as_an_override(name, monkeypatch):
    monkeypatch.chdir(ROOT / "recipes" / "IEMOCAP" / "mifuse")
    plain = plain_values(f"hparams/{name}.yaml")
    changed = {key: value + 1 for key, value in plain.items() if type(value) in (int, float)}
    named = {key: f"other_{key}" for key, value in plain.items() if isinstance(value, str) and not key.startswith("_")}
    with open(f"hparams/{name}.yaml", encoding="utf-8") as file:
        hparams = load_hyperpyyaml(file, {**changed, **named})
    assert {key: hparams[key] for key in [*changed, *named]} == {**changed, **named}
    assert (
        hparams["adaptation"]["number_of_steps"] == 301 and hparams["source_classifier"]["layer"] == plain["layer"] + 1
    )


def test_every_role_is_prepared_from_a_data_folder_of_its_own():
    for name in [*PAIRS, "demo.yaml"]:
        for role, flag in (("target", "data"), ("source", "source_data"), ("teacher", "teacher_data")):
            prepared = text_of(name).split(f"prepare_{role}: ")[1].split("\n    splits:")[0]
            assert f"data_folder: !ref <{flag}_folder>" in prepared, (name, role)
            # A folder of one's own recordings holds no corpus.
            otherwise = "null" if name == "rav2folder.yaml" else "!ref <data_folder>"
            assert role == "target" or keyed_lines(text_of(name))[f"{flag}_folder"].endswith(otherwise)


def test_scripts_of_a_method_are_one_file_and_the_yaml_files_one_folder():
    for folder in (path.parent for path in (ROOT / "recipes").glob("*/*/train.py")):
        assert (folder / "hparams").resolve() == ROOT / "hparams", folder
        assert (folder / "train.py").resolve() == ROOT / "recipes" / "RAVDESS" / folder.name / "train.py", folder


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
    named = {
        word.split("#")[0].strip(".,") for word in words.split() if word.startswith(("recipes/", "hparams/", "docs/"))
    }
    assert named and not [name for name in named if not (ROOT / name).exists()]


def test_help_is_printed_without_loading_torch():
    code = "import sys; from speechbrain_mifuse.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    check = [sys.executable, "-c", code + "assert 'torch' not in sys.modules"]
    assert subprocess.run(check, check=False, stdout=subprocess.DEVNULL).returncode == 0


def test_recipes_and_reports_load_neither_openai_nor_aiohttp_before_a_client_is_made():
    code = """
import sys
import speechbrain_mifuse.experiments.teacher, speechbrain_mifuse.report, speechbrain_mifuse.report.teacher_report
assert not {"openai", "aiohttp"} & sys.modules.keys()
import speechbrain_mifuse.lalm.client
assert "openai" in sys.modules
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
