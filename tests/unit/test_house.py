"""What keeps the house in order: imports, recipes and README."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "speechbrain_mifuse"
# Each room may import from those before it.
ROOMS = ("utils", "corpora", "adaptation", "demo", "lalm", "features", "nnet", "evaluation", "inference", "zero_shot")
ROOMS += ("report", "brains", "experiments", "recogniser_files", "mifuse_recipe", "adapt", "cli", "__main__")
PAIRS = sorted(path.name for path in (ROOT / "hparams").glob("*2*.yaml"))
PAPER = [name for name in PAIRS if set(name.removesuffix(".yaml").split("2")) < {"iem", "imp", "msp"}]
OPEN = [name for name in PAIRS if name not in PAPER]
# What a pair of the paper may set otherwise than the open ones.
PUBLISHED = {"encoder", "encoder_layers", "layer", "lalm_profile", "teacher_layer"}


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


def tail_of(name: str) -> str:
    """What follows the corpora in a pair's YAML."""
    return text_of(name).split("\n# Encoder:")[1]


def keyed_lines(text: str) -> dict[str, str]:
    """Lines that set a key, by the key."""
    lines = [line for line in text.splitlines() if line[:1].isalpha() or line.startswith("__")]
    return {line.split(":")[0]: line for line in lines}


def test_pairs_differ_in_their_corpora_alone():
    assert (len(PAPER), len(OPEN)) == (6, 8)
    assert len({tail_of(name) for name in PAPER}) == len({tail_of(name) for name in [*OPEN, "demo.yaml"]}) == 1


def test_pairs_of_the_paper_have_other_defaults_of_encoder_and_teacher_alone():
    tails = [[line for line in tail_of(pairs[0]).splitlines()[3:] if line[:1] != "#"] for pairs in (PAPER, OPEN)]
    differing = {line.split(":")[0] for line in set(tails[0]).symmetric_difference(tails[1])}
    assert differing == PUBLISHED


def test_every_pair_and_the_demo_have_the_same_keys():
    keys = {name: sorted(keyed_lines(text_of(name))) for name in [*PAIRS, "demo.yaml"]}
    assert not [name for name in keys if keys[name] != keys["nemo2rav.yaml"]]


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
