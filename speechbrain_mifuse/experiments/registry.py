"""Which recipes there are: each YAML file of `hparams/` whose header holds the command that runs it.

Nothing is constructed and torch is not imported, so a listing is instant.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

from speechbrain_mifuse.utils.errors import UserError

# The command in a header: the script of a recipe, then the YAML file itself.
COMMAND = re.compile(r"^#.*\bpython (recipes/\S+/train\.py) hparams/", re.MULTILINE)
REFERENCE = re.compile(r"<(\w+)>")
# A value that is one key of an included file.
PICKED = re.compile(r"<(\w+)\[(\w+)\]>")


class RegistryError(UserError):
    """No repository, no such recipe, or a YAML file that does not fit."""


class Placeholder(str):
    """Value of a key that the command line must fill."""


class PlainLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """Reads SpeechBrain's YAML without constructing anything: a tagged value is what stands behind the tag."""

    def __init__(self, stream, folder: Path):
        super().__init__(stream)
        self.folder = folder

    def tagged(self, suffix: str, node: yaml.Node):
        """Value of a node with the tag `!suffix`."""
        if suffix == "PLACEHOLDER":
            return Placeholder()
        value = self.untagged(node)
        if suffix.startswith("include:"):
            return {**plain_values(self.folder / suffix.removeprefix("include:")), **(value or {})}
        return value

    def untagged(self, node: yaml.Node):
        """Value of a node as if it bore no tag."""
        if isinstance(node, yaml.MappingNode):
            return self.construct_mapping(node, deep=True)
        if isinstance(node, yaml.SequenceNode):
            return self.construct_sequence(node, deep=True)
        return self.construct_scalar(node)


PlainLoader.add_multi_constructor("!", PlainLoader.tagged)


def plain_values(path: str | Path) -> dict:
    r"""Read a SpeechBrain YAML file without constructing what its tags name."""
    try:
        with open(path, encoding="utf-8") as file:
            values = PlainLoader(file, Path(path).parent).get_single_data()
    except (OSError, yaml.YAMLError) as error:
        raise RegistryError(f"{path}: cannot be read as YAML ({error}).") from None
    if not isinstance(values, Mapping):
        raise RegistryError(f"{path}: holds no keys.")
    return {key: _picked(value, values) for key, value in values.items()}


def _picked(value, values: Mapping):
    """Look up a value that refers to one key of a mapping."""
    found = PICKED.fullmatch(value) if isinstance(value, str) else None
    inner = values.get(found[1]) if found else None
    return inner[found[2]] if isinstance(inner, Mapping) and found[2] in inner else value


@dataclass(frozen=True)
class Recipe:
    """A script with a YAML file."""

    root: Path
    script: Path
    hparams: Path

    @property
    def name(self) -> str:
        """Name of the YAML file without its ending."""
        return self.hparams.stem

    @cached_property
    def values(self) -> dict:
        """The YAML file's values, nothing constructed."""
        return plain_values(self.hparams)

    @property
    def methods(self) -> list[str]:
        """Adaptation methods that the YAML registers; none for a recipe that does not adapt."""
        adaptation = self.values.get("adaptation")
        return list(adaptation.get("methods") or ()) if isinstance(adaptation, Mapping) else []

    @property
    def renamed(self) -> dict[str, str]:
        """Earlier names of methods."""
        adaptation = self.values.get("adaptation")
        return dict(adaptation.get("renamed") or {}) if isinstance(adaptation, Mapping) else {}

    @property
    def table(self) -> list[str]:
        """Methods that a table shows when none is named; the others are ablations."""
        adaptation = self.values.get("adaptation")
        return list(adaptation.get("table") or self.methods) if isinstance(adaptation, Mapping) else []

    @property
    def command(self) -> str:
        """The command to run in the repository's root; what must be filled in stands in capitals."""
        needed = [f"--{key} {key.upper()}" for key, value in self.values.items() if isinstance(value, Placeholder)]
        files = [path.relative_to(self.root).as_posix() for path in (self.script, self.hparams)]
        return " ".join(["python", *files, *needed])

    @property
    def data(self) -> str:
        """Source, target and teacher, or what is trained on."""
        if "sources" in self.values:
            return f"captions of {' and '.join(self.values['sources'])}, for {self.value('target')} as target"
        if "target" not in self.values:
            scores = f", scores of {self.value('alm')}" if "alm" in self.values else ""
            return f"{self.value('source')}, with labels{scores}"
        teacher = self.value("teacher" if self.values.get("lalm_base_url") is None else "lalm_model")
        return f"{self.value('source')} -> {self.value('target')}, teacher {teacher}"

    def value(self, key: str) -> str:
        """Give a value of the YAML file as text, with references to other keys filled in; `?` when it has none."""
        value = self.values.get(key)
        if isinstance(value, Placeholder):
            return key.upper()
        if value is None:
            return "?"
        return REFERENCE.sub(lambda found: self.value(found[1]), str(value))


def current_names(names: Iterable[str], renamed: Mapping[str, str], flag: str) -> list[str]:
    """Replace earlier names of methods by the current ones, with a hint."""
    for name in names:
        if name in renamed:
            print(f"{flag}: '{name}' is now called '{renamed[name]}'.", file=sys.stderr)
    return list(dict.fromkeys(renamed.get(name, name) for name in names))


def repository_root(start: str | Path | None = None) -> Path:
    """Find the repository: upwards from a folder, else where an editable install has it."""
    start = Path(start or Path.cwd()).resolve()
    for folder in (start, *start.parents, Path(__file__).resolve().parents[2]):
        if (folder / "hparams").is_dir() and (folder / "recipes").is_dir():
            return folder
    raise RegistryError(
        f"No recipes above {start}: run this in a checkout of the repository, which holds recipes/ and hparams/."
    )


def registered_recipes(root: str | Path) -> list[Recipe]:
    """List the recipes of a repository, by script and YAML file."""
    root = Path(root)
    recipes = []
    for path in sorted((root / "hparams").glob("*.yaml")):
        # A YAML file without a command is for an `!include` or a user's own.
        if command := COMMAND.search(path.read_text(encoding="utf-8")):
            if not (root / command[1]).is_file():
                raise RegistryError(f"{path}: its header names {command[1]}, which does not exist.")
            recipes.append(Recipe(root, root / command[1], path))
    return sorted(recipes, key=lambda recipe: recipe.script)


def adaptation_recipe(root: str | Path, pair: str) -> Recipe:
    """Find the recipe of a pair of corpora."""
    known = [recipe for recipe in registered_recipes(root) if recipe.methods]
    for recipe in known:
        if recipe.name == Path(pair).stem:
            return recipe
    names = ", ".join(recipe.name for recipe in known)
    raise RegistryError(f"{pair}: no recipe with adaptation methods has this name. Known: {names}.")


def listing(root: str | Path, match: str = "") -> str:
    """List the recipes: command, data, encoder."""
    entries = [
        f"{recipe.name}: {recipe.data}; encoder {recipe.value('encoder')}, layer {recipe.value('layer')}\n"
        f"    {recipe.command}"
        for recipe in registered_recipes(root)
    ]
    shown = [entry for entry in entries if match.lower() in entry.lower()]
    if not shown:
        raise RegistryError(f"--match: none of the {len(entries)} recipes contains '{match}'.")
    return "\n".join([f"# Run these in {root}", *shown])
