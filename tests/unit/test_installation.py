"""What a fresh clone installs: declared imports, a lock within the bounds, a torch and torchaudio that fit."""

import ast
import importlib.metadata
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
PYTHONS = ("3.10", "3.11", "3.12")
# Modules of tests and benchmarks import each other by name.
OWN = {path.stem for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")}
OWN |= {"speechbrain_mifuse"}
# What the package imports only where a user has installed it.
OPTIONAL = {"tensorboard"}


def declared(*extras: str) -> list[Requirement]:
    """Requirements of the project and of some extras."""
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    return [Requirement(line) for line in lines]


def imported(folder: str) -> set[str]:
    """Top-level names that the Python files below a folder import, without those of Python and of the project."""
    names, files = set(), list((ROOT / folder).rglob("*.py"))
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - OWN - {path.stem for path in files}


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("speechbrain_mifuse", ["demo"]),
        ("recipes", []),
        ("tests", EXTRAS),
        ("benchmarks", EXTRAS),
        ("docs", EXTRAS),
    ],
)
def test_every_package_that_is_imported_is_declared(folder, extras):
    distributions = importlib.metadata.packages_distributions()
    known = {canonicalize_name(requirement.name) for requirement in declared(*extras)}
    undeclared = {
        name
        for name in imported(folder) - OPTIONAL
        if not known & {canonicalize_name(distribution) for distribution in distributions.get(name, [name])}
    }
    assert not undeclared


def test_every_dependency_is_bounded_and_has_a_line_in_the_documentation():
    page = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    for requirement in declared(*EXTRAS):
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators & {"<", "==", "<="}, requirement
        assert requirement.name in page, requirement


def locked(python: str) -> dict[str, str]:
    """Versions in the lock by name, for one Python on Linux."""
    environment = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0"}
    versions = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate(environment):
                (specifier,) = requirement.specifier
                assert specifier.operator == "==", line
                versions[canonicalize_name(requirement.name)] = specifier.version
    return versions


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_holds_one_version_of_every_dependency_within_its_bounds(python):
    versions = locked(python)
    environment = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0"}
    wanted = [one for one in declared(*EXTRAS) if one.marker is None or one.marker.evaluate(environment)]
    missing = [one.name for one in wanted if versions.get(canonicalize_name(one.name)) is None]
    assert not missing, f"constraints.txt lacks {missing} for Python {python}: run `make lock`"
    wrong = [one for one in wanted if not one.specifier.contains(versions[canonicalize_name(one.name)])]
    assert not wrong, f"constraints.txt is outside the bounds of {wrong} for Python {python}: run `make lock`"


def test_torch_and_torchaudio_fit_each_other():
    check = [sys.executable, "-c", "import torch, torchaudio"]
    result = subprocess.run(check, check=False, capture_output=True, text=True)
    assert result.returncode == 0, (
        f"torch and torchaudio do not fit each other: {result.stderr.strip().splitlines()[-1]}\n"
        "Install a pair that does: pip install --force-reinstall -c constraints.txt torch torchaudio"
    )


def test_loading_an_encoder_and_importing_a_brain_print_nothing(toy_encoder):
    code = (
        "import speechbrain_mifuse.brains.adaptation\n"
        "from speechbrain_mifuse.features.encoder import load_wrapper\n"
        f"load_wrapper({str(toy_encoder)!r})\n"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("", "")


@pytest.mark.long
def test_a_built_package_holds_the_settings_and_recipes_that_it_runs(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "speechbrain_mifuse", "hparams", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    build = [sys.executable, "setup.py", "-q", "build", "--build-base", "b", "bdist_wheel", "--dist-dir", "dist"]
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True)
    with zipfile.ZipFile(next((tmp_path / "dist").glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    assert {"speechbrain_mifuse/hparams/rav2folder.yaml", "speechbrain_mifuse/hparams/base/adaptation.yaml"} <= names
    called = ("mifuse", "classifier", "dual_encoder")
    assert {f"speechbrain_mifuse/recipes/RAVDESS/{name}/train.py" for name in called} <= names
