"""The registry finds every recipe of the tree, and lists them from anywhere in it without loading torch."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from speechbrain_mifuse.experiments import registry
from speechbrain_mifuse.experiments.registry import (
    RegistryError,
    adaptation_recipe,
    listing,
    plain_values,
    registered_recipes,
)

ROOT = Path(__file__).resolve().parents[2]
RECIPES = registered_recipes(ROOT)
IDS = [recipe.name for recipe in RECIPES]
COLUMNS = (
    *("Task", "Dataset", "Script_file", "Hparam_file", "Data_prep_file", "Readme_file", "Result_url", "HF_repo"),
    *("test_debug_flags", "test_debug_checks", "performance"),
)


def rows_of_the_recipe_tests():
    """Rows of `tests/recipes/*.csv`, SpeechBrain's form of recipe tests, each with its file."""
    rows = []
    for path in sorted((ROOT / "tests" / "recipes").glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            table = csv.DictReader(file)
            assert tuple(table.fieldnames) == COLUMNS
            rows += [(path.stem, row) for row in table]
    return rows


ROWS = rows_of_the_recipe_tests()


@pytest.fixture
def tree(tmp_path):
    """A repository with one recipe."""
    files = {
        "recipes/T/m/train.py": "",
        "hparams/base/more.yaml": "seed: 0\nmethods:\n    one: !new:no.such.A\n    two: !new:no.such.B {a: 1}\n",
        "hparams/a2t.yaml": "# Toy.\n#\n#   python recipes/T/m/train.py hparams/a2t.yaml\n\n"
        "key: !PLACEHOLDER\nname: b\nsource: !ref <name>\ntarget: t\nteacher: c\nencoder: toy\n"
        "layer: 2\nprepare: !name:no.such.function\n    x: !ref <key>/y\n__apply: !apply:os.abort []\n"
        "adaptation: !include:base/more.yaml\n    seed: 5\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_every_script_and_every_yaml_file_of_the_tree_is_a_recipe():
    assert {recipe.hparams for recipe in RECIPES} == set((ROOT / "hparams").glob("*.yaml"))
    assert {recipe.script for recipe in RECIPES} == set((ROOT / "recipes").glob("*/*/train.py"))
    assert len({recipe.name for recipe in RECIPES}) == len(RECIPES)


def test_the_header_of_a_yaml_file_gives_its_own_name_and_the_script_that_every_command_of_it_runs():
    for recipe in RECIPES:
        assert recipe.command.split(" --")[0] in recipe.hparams.read_text(encoding="utf-8")


def test_the_recipe_tests_hold_every_recipe_once_in_the_file_of_its_corpus():
    tested = sorted(f"python {row['Script_file']} {row['Hparam_file']}" for _, row in ROWS)
    assert tested == sorted(recipe.command.split(" --")[0] for recipe in RECIPES)
    assert all(stem == row["Dataset"] == Path(row["Script_file"]).parts[1] for stem, row in ROWS)


@pytest.mark.parametrize("row", [row for _, row in ROWS], ids=[row["Hparam_file"] for _, row in ROWS])
def test_a_row_of_the_recipe_tests_names_files_that_exist_and_flags_and_methods_that_the_yaml_file_has(row):
    (recipe,) = (recipe for recipe in RECIPES if recipe.hparams == ROOT / row["Hparam_file"])
    results = [row[column] for column in ("Result_url", "performance") if row[column]]
    assert all((ROOT / name).is_file() for name in [row["Data_prep_file"], row["Readme_file"], *results])
    assert all(name.startswith("docs/results/") for name in results)
    page = (ROOT / row["Readme_file"]).read_text(encoding="utf-8")
    assert row["Result_url"] in page and row["HF_repo"] in page
    flags = dict(word.removeprefix("--").split("=", 1) for word in row["test_debug_flags"].split())
    assert set(flags) <= set(recipe.values)
    assert set(flags.get("method", "[]").strip("[]").split(",")) <= {*recipe.methods, ""}


def test_yaml_is_read_without_constructing_anything(tree):
    values = plain_values(tree / "hparams" / "a2t.yaml")
    assert values["prepare"] == {"x": "<key>/y"} and isinstance(values["key"], registry.Placeholder)
    assert values["adaptation"] == {"seed": 5, "methods": {"one": "", "two": {"a": 1}}}


def test_a_line_shows_data_encoder_and_what_the_command_needs(tree):
    assert listing(tree).splitlines() == [
        f"# Run these in {tree}",
        "a2t: b -> t, teacher c; encoder toy, layer 2",
        "    python recipes/T/m/train.py hparams/a2t.yaml --key KEY",
    ]


def test_match_looks_at_every_part_of_a_line_in_any_case():
    for text in ("nemo2rav", "NEMO -> RAVDESS", "recipes/RAVDESS/mifuse/train.py hparams/nemo2rav"):
        assert "nemo2rav: " in listing(ROOT, text) and "rav2nemo: " not in listing(ROOT, text)
    with pytest.raises(RegistryError, match=r"--match: none of the \d+ recipes contains 'no such thing'"):
        listing(ROOT, "no such thing")


def test_the_repository_is_found_from_a_folder_inside_it(tree, monkeypatch):
    monkeypatch.setattr(registry, "__file__", str(tree.parent / "elsewhere" / "registry.py"))
    assert registry.repository_root(tree / "hparams" / "base") == tree
    monkeypatch.chdir(tree / "recipes" / "T")
    assert registry.repository_root() == tree


def test_outside_a_repository_the_editable_install_is_taken_and_without_one_there_is_one_clear_error(
    tmp_path, monkeypatch
):
    assert registry.repository_root(tmp_path) == ROOT
    monkeypatch.setattr(registry, "__file__", str(tmp_path / "site-packages" / "speechbrain_mifuse" / "registry.py"))
    with pytest.raises(RegistryError, match="run this in a checkout of the repository"):
        registry.repository_root(tmp_path)


def test_an_unknown_pair_and_a_recipe_that_adapts_nothing_are_errors_that_list_the_pairs():
    for name in ("nemo2mars", "classifier_nemo"):
        with pytest.raises(RegistryError, match=f"{name}: no recipe .* Known: .*nemo2rav"):
            adaptation_recipe(ROOT, name)
    assert adaptation_recipe(ROOT, "hparams/nemo2rav.yaml").name == "nemo2rav"


def test_a_yaml_file_whose_header_names_a_script_that_is_not_there_is_an_error_and_one_without_a_command_no_recipe(
    tree,
):
    (tree / "hparams" / "own.yaml").write_text("# python recipes/ is where they are\nkey: 1\n")
    assert [recipe.name for recipe in registered_recipes(tree)] == ["a2t"]
    (tree / "recipes" / "T" / "m" / "train.py").unlink()
    with pytest.raises(RegistryError, match=r"a2t\.yaml: its header names recipes/T/m/train\.py, which does not exist"):
        registered_recipes(tree)


def test_the_command_lists_recipes_without_loading_torch():
    code = "import sys; from speechbrain_mifuse.cli.main import main\nmain(['recipes', '--match', 'nemo2rav'])\n"
    check = [sys.executable, "-c", code + "assert 'torch' not in sys.modules"]
    shown = subprocess.run(check, check=True, capture_output=True, text=True, cwd=ROOT / "hparams").stdout
    assert "python recipes/RAVDESS/mifuse/train.py hparams/nemo2rav.yaml\n" in shown


@pytest.mark.parametrize("recipe", RECIPES, ids=IDS)
def test_the_page_of_a_corpus_shows_each_of_its_recipes_with_its_command(recipe):
    page = (recipe.script.parents[1] / "README.md").read_text(encoding="utf-8")
    table = page.split("<!-- begin recipes -->")[1].split("<!-- end recipes -->")[0]
    assert f"hparams/{recipe.hparams.name}) |" in table and f"`{recipe.command.split(' --')[0]}" in table
