"""The registry names every recipe of the tree, and lists them from anywhere in it without loading torch."""

import re
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
IDS = [f"{recipe.row['Dataset']}-{recipe.name}" for recipe in RECIPES]
COMMAND = re.compile(r"python (recipes/\S+/train\.py) (hparams/\S+\.yaml)")


@pytest.fixture
def tree(tmp_path):
    """A repository with one recipe."""
    files = {
        "tests/recipes/Toy.csv": ",".join(registry.COLUMNS) + "\nTask,Toy,recipes/T/train.py,hparams/a2t.yaml,,,,,,,\n",
        "recipes/T/train.py": "",
        "hparams/base/more.yaml": "seed: 0\nmethods:\n    one: !new:no.such.A\n    two: !new:no.such.B {a: 1}\n",
        "hparams/a2t.yaml": "key: !PLACEHOLDER\nname: b\nsource: !ref <name>\ntarget: t\nteacher: c\nencoder: toy\n"
        "layer: 2\nprepare: !name:no.such.function\n    x: !ref <key>/y\n__apply: !apply:os.abort []\n"
        "adaptation: !include:base/more.yaml\n    seed: 5\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_every_recipe_of_the_tree_is_registered_and_every_registered_one_is_there():
    registered = {(recipe.row["Script_file"], recipe.row["Hparam_file"]) for recipe in RECIPES}
    files = sorted((ROOT / "hparams").glob("*.yaml"))
    told = {pair for path in files for pair in COMMAND.findall(path.read_text(encoding="utf-8"))}
    assert told == registered
    assert {hparams for _, hparams in registered} == {f"hparams/{path.name}" for path in files}
    scripts = {path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").glob("*/*/train.py")}
    assert {script for script, _ in registered} == scripts


def test_no_recipe_is_registered_twice():
    rows = [(recipe.row["Script_file"], recipe.row["Hparam_file"]) for recipe in RECIPES]
    assert len(rows) == len(set(rows))


@pytest.mark.parametrize("recipe", RECIPES, ids=IDS)
def test_a_row_stands_in_its_corpus_file_and_names_files_that_exist(recipe):
    assert recipe.row["Dataset"] == Path(recipe.row["Script_file"]).parts[1]
    with (ROOT / "tests" / "recipes" / f"{recipe.row['Dataset']}.csv").open(encoding="utf-8") as file:
        assert any(recipe.row["Hparam_file"] in line for line in file)
    named = [recipe.row[column] for column in ("Data_prep_file", "Readme_file")]
    results = [recipe.row[column] for column in ("Result_url", "performance") if recipe.row[column]]
    assert all((ROOT / name).is_file() for name in named + results)
    assert all(name.startswith("docs/results/") for name in results)


@pytest.mark.parametrize("recipe", RECIPES, ids=IDS)
def test_debug_flags_are_keys_of_the_yaml_and_name_methods_that_it_registers(recipe):
    flags = dict(word.removeprefix("--").split("=", 1) for word in recipe.row["test_debug_flags"].split())
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
        "    python recipes/T/train.py hparams/a2t.yaml --key KEY",
    ]


def test_match_looks_at_every_part_of_a_line_in_any_case():
    for text in ("nemo2rav", "NEMO -> RAVDESS", "recipes/RAVDESS/mifuse/train.py hparams/nemo2rav"):
        assert "nemo2rav: " in listing(ROOT, text) and "rav2nemo: " not in listing(ROOT, text)
    with pytest.raises(RegistryError, match=r"--match: none of the \d+ registered recipes contains 'no such thing'"):
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
        with pytest.raises(RegistryError, match=f"{name}: no registered recipe .* Known: .*nemo2rav"):
            adaptation_recipe(ROOT, name)
    assert adaptation_recipe(ROOT, "hparams/nemo2rav.yaml").name == "nemo2rav"


def test_a_registry_with_other_columns_or_with_a_file_that_is_not_there_is_an_error_naming_it(tree):
    table = tree / "tests" / "recipes" / "Toy.csv"
    (tree / "recipes" / "T" / "train.py").unlink()
    with pytest.raises(RegistryError, match=r"recipes/T/train\.py is registered and does not exist"):
        registered_recipes(tree)
    table.write_text("Task,Dataset\n")
    with pytest.raises(RegistryError, match=r"Toy\.csv: its columns must be Task,Dataset,Script_file"):
        registered_recipes(tree)


def test_the_command_lists_recipes_without_loading_torch():
    code = "import sys; from speechbrain_mifuse.cli.main import main\nmain(['recipes', '--match', 'nemo2rav'])\n"
    check = [sys.executable, "-c", code + "assert 'torch' not in sys.modules"]
    shown = subprocess.run(check, check=True, capture_output=True, text=True, cwd=ROOT / "hparams").stdout
    assert "python recipes/RAVDESS/mifuse/train.py hparams/nemo2rav.yaml\n" in shown
