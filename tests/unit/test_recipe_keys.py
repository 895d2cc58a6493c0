"""Keys of each recipe's YAML against the code that the recipe runs: none is unused, and none is read that is missing.

The code is followed from the script through every function, class and method that it names, without running it.
Settings are the variables called `hparams` (the recipe's YAML), `settings`, `classifier` and `options` (a file of
`hparams/base` that the YAML includes).
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from speechbrain.utils.run_opts import RunOptions

from speechbrain_mifuse.experiments.registry import plain_values, registered_recipes

ROOT = Path(__file__).resolve().parents[2]
RECIPES = registered_recipes(ROOT)
PACKAGE = ROOT / "speechbrain_mifuse"
SCRIPTS = sorted((ROOT / "recipes" / "RAVDESS").glob("*/*.py"))
METHODS = [path for path in SCRIPTS if path.name == "train.py"]
CODE = [
    *SCRIPTS,
    *(path for room in ("experiments", "brains", "cli") for path in sorted((PACKAGE / room).glob("*.py"))),
]
# What holds the keys of an included file.
INCLUDED = ("settings", "classifier", "options")
# Where settings are read; all other code is given what it needs, and there these names mean other things.
ROOMS = {"recipes", "experiments", "brains", "recognizer_folder.py"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


# Following the code.


@cache
def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def file_of(module):
    """File of a module of the package; none for other packages'."""
    path = ROOT.joinpath(*module.split("."))
    found = [each for each in (path.with_suffix(".py"), path / "__init__.py") if each.is_file()]
    return found[0] if found and module.startswith("speechbrain_mifuse") else None


@cache
def names_in(path):
    """What each name at the top of a file stands for: a node of a file, or a whole file."""
    names = {}
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                module, parent = file_of(f"{node.module}.{alias.name}"), file_of(node.module)
                if module or parent:
                    names[alias.asname or alias.name] = (module, None) if module else (parent, alias.name)
                elif (path.parent / f"{node.module}.py").is_file():  # a script beside this one
                    names[alias.asname or alias.name] = (path.parent / f"{node.module}.py", alias.name)
    for node in tree_of(path).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for name in [getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)]:
            if name:
                names[name] = (path, name)
    return names


@cache
def definitions(path, name):
    """Nodes that define a name at the top of a file, wherever it comes from."""
    where = names_in(path).get(name)
    if where is None or where[1] is None:
        return ()
    if where != (path, name):
        return definitions(*where)
    nodes = tree_of(path).body
    assigned = [node for node in nodes if isinstance(node, ast.Assign | ast.AugAssign)]
    found = [node for node in assigned if name in {each.id for each in ast.walk(node) if is_stored(each)}]
    return tuple((path, node) for node in [*found, *(node for node in nodes if getattr(node, "name", None) == name)])


def is_stored(node):
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def named_by(path, node):
    """Definitions that a node names: `f`, or `module.f`."""
    if isinstance(node, ast.Name):
        return definitions(path, node.id)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        module = names_in(path).get(node.value.id, (None, ""))
        return definitions(module[0], node.attr) if module[0] and module[1] is None else ()
    return ()


def loaded_by(node):
    """Functions of a recipe that a node names by its path."""
    name = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
    if not name.startswith("recipes/") or not (ROOT / name).is_file():
        return []
    return [(ROOT / name, each) for each in tree_of(ROOT / name).body if isinstance(each, FUNCTIONS)]


def holds(test, keys):
    """Whether a condition `"key" in hparams` can be true for these keys; other conditions can."""
    asked = isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.In) and is_settings(test.comparators[0])
    return not asked or not isinstance(test.left, ast.Constant) or test.left.value in keys


def is_settings(node):
    return isinstance(node, ast.Name) and node.id == "hparams"


def inside(node, keys):
    """A node with all below it that these keys reach, but for the methods of a class."""
    yield node
    for child in ast.iter_child_nodes(node):
        method = isinstance(node, ast.ClassDef) and isinstance(child, FUNCTIONS)
        skipped = isinstance(node, ast.If | ast.IfExp) and child is not node.test and not holds(node.test, keys)
        if not skipped and not (method and not child.name.startswith("__")):
            yield from inside(child, keys)


@cache
def reached(start, keys):
    """Nodes that a script reaches with a YAML of these keys, each with its file.

    A method is reached when its class is and anything that is reached has an attribute of its name; likewise a function
    of a recipe that is loaded by its path.
    """
    left = [(start, node) for node in tree_of(start).body]
    seen, nodes, attributes, waiting = set(), [], set(), []
    while left:
        path, top = left.pop()
        if top in seen:
            continue
        seen.add(top)
        if isinstance(top, ast.ClassDef):
            waiting += [(path, node) for node in top.body if isinstance(node, FUNCTIONS)]
        for node in inside(top, keys):
            nodes.append((path, node))
            left += [found for found in named_by(path, node) if ROOMS.intersection(found[0].relative_to(ROOT).parts)]
            waiting += loaded_by(node)
            attributes |= {node.attr} if isinstance(node, ast.Attribute) else set()
        left += [method for method in waiting if method[1].name in attributes]
        waiting = [method for method in waiting if method[1].name not in attributes]
    return nodes


# Keys.


def constants(nodes):
    """Strings among nodes."""
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def references_in(path):
    """Keys that a YAML file refers to."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    return {name for line in lines for name in re.findall(r"<(\w+)(?:\[\w+\])?>", line)}


def listed(path, node):
    """Strings of a tuple or list that is written out, here or under a name; starred parts too."""
    if isinstance(node, ast.Starred):
        return listed(path, node.value)
    if isinstance(node, ast.Tuple | ast.List):
        return constants(node.elts).union(*(listed(path, part) for part in node.elts))
    if isinstance(node, ast.Assign | ast.AugAssign):
        return listed(path, node.value)
    return set().union(*(listed(*found) for found in named_by(path, node)))


def loops(nodes):
    """Variables of loops, each with the keys that it takes."""
    taken = {}
    for path, node in nodes:
        if isinstance(node, ast.For | ast.comprehension) and isinstance(node.target, ast.Name):
            taken.setdefault((path, node.target.id), set()).update(listed(path, node.iter))
    return taken


def keys_read(start, keys, names):
    """Keys that a script reads of variables of some names: those that it needs, and those that it can do without."""
    needed, optional = set(), set()
    nodes = reached(start, keys)
    taken = loops(nodes)
    for path, node in nodes:
        if isinstance(node, ast.Subscript) and getattr(node.value, "id", "") in names:
            needed |= constants([node.slice])
            optional |= taken.get((path, getattr(node.slice, "id", "")), set())
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "get":
            optional |= constants(node.args[:1]) if getattr(node.func.value, "id", "") in names else set()
        elif isinstance(node, ast.Compare) and getattr(node.comparators[0], "id", "") in names:
            optional |= constants([node.left])
    return needed, optional


def subscripts(nodes, names):
    """Keys written out in subscripts of variables of some names."""
    found = [node for node in nodes if isinstance(node, ast.Subscript) and getattr(node.value, "id", "") in names]
    return constants(node.slice for node in found)


def is_made(node):
    """Whether a node reads settings by a key that is put together: `hparams[f"..."]`, `getattr(hparams, ...)`."""
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
        return "hparams" in (getattr(node.args[0], "id", ""), getattr(node.args[0], "attr", ""))
    if isinstance(node, ast.Call):
        node, key = getattr(node.func, "value", None), node.args[0] if node.args else None
    else:
        node, key = node.value, node.slice
    return getattr(node, "id", "") in ("hparams", *INCLUDED) and isinstance(key, ast.JoinedStr | ast.BinOp)


def included_files(recipe):
    """Files of `hparams/base` that a recipe's YAML includes."""
    text = recipe.hparams.read_text(encoding="utf-8")
    return [path for path in sorted((ROOT / "hparams" / "base").glob("*.yaml")) if f"!include:base/{path.name}" in text]


def scripts_of(recipe):
    """Scripts that take a recipe's YAML."""
    return sorted(recipe.script.resolve().parent.glob("*.py"))


RECIPE = pytest.mark.parametrize("recipe", RECIPES, ids=[recipe.name for recipe in RECIPES])
RUN_OPTIONS = set(RunOptions().as_dict())


@RECIPE
def test_every_key_of_a_recipes_yaml_is_used_by_its_script_or_by_another_key(recipe):
    keys = frozenset(recipe.values)
    used = references_in(recipe.hparams)
    for script in scripts_of(recipe):
        used |= set().union(*keys_read(script, keys, ["hparams"]))
    assert sorted(keys - used - {"__set_seed"}) == []


@RECIPE
def test_every_key_that_a_recipe_reads_is_in_its_yaml(recipe):
    keys = frozenset(recipe.values)
    for script in scripts_of(recipe):
        needed, _ = keys_read(script, keys, ["hparams"])
        assert needed and sorted(needed - keys) == []


@pytest.mark.parametrize("script", METHODS, ids=lambda path: path.parent.name)
def test_every_key_of_an_included_file_is_used_by_the_script_or_by_another_key(script):
    (recipe, *_) = (recipe for recipe in RECIPES if recipe.script == script)
    # A sweep reads `table`; the registry does that.
    used, present = {"table"}, set()
    for path in scripts_of(recipe):
        used |= set().union(*keys_read(path, frozenset(recipe.values), INCLUDED))
    for path in included_files(recipe):
        present |= set(plain_values(path))
        used |= references_in(path)
    assert present and sorted(present - used) == []


def included_by(path):
    """Files that code may read settings of: those that the YAML of its recipe includes, or any in the package."""
    recipes = [recipe for recipe in RECIPES if recipe.script.resolve().parent == path.parent] or RECIPES
    return {file for recipe in recipes for file in included_files(recipe)}


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_function_reads_of_an_included_file_is_all_in_one_of_them(path):
    known = [set(plain_values(file)) for file in included_by(path)]
    for function in (node for node in ast.walk(tree_of(path)) if isinstance(node, FUNCTIONS)):
        read = subscripts(ast.walk(function), INCLUDED)
        assert any(read <= keys for keys in known), (function.name, sorted(read))


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_keys_are_written_out_where_they_are_read(path):
    made = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Subscript | ast.Call) and is_made(node)]
    assert not [f"line {node.lineno}: {ast.unparse(node)}" for node in made]


@RECIPE
def test_no_key_of_a_recipe_is_an_option_of_speechbrain(recipe):
    assert not RUN_OPTIONS & set(recipe.values)


# What a Brain is given.


def brains():
    """Each place where a Brain is made: its file, the Brain's name, and the dictionary that becomes its `hparams`."""
    for path in CODE:
        for function in (node for node in tree_of(path).body if isinstance(node, FUNCTIONS)):
            for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
                if getattr(call.func, "id", "").endswith("Brain"):
                    (given,) = (keyword.value for keyword in call.keywords if keyword.arg == "hparams")
                    yield path, call.func.id, dictionary(path, function, given)


def dictionary(path, function, node):
    """Follow a name, and a function that is called, to the dictionary that is written out."""
    if isinstance(node, ast.Name):
        assigned = [
            each for each in ast.walk(function) if isinstance(each, ast.Assign) and each.targets[0].id == node.id
        ]
        return dictionary(path, function, assigned[0].value)
    if isinstance(node, ast.Call):
        ((path, function),) = named_by(path, node.func)
        return next(each.value for each in ast.walk(function) if isinstance(each, ast.Return))
    return node


def attributes_of_hparams(nodes):
    """Names in `<anything>.hparams.<name>`."""
    found = [node for node in nodes if isinstance(node, ast.Attribute)]
    return {node.attr for node in found if getattr(node.value, "attr", "") == "hparams"}


def read_by(path, name):
    """Names that a Brain and those that it derives from read of their `hparams`."""
    ((path, node),) = definitions(path, name)
    bases = [read_by(path, base.id) for base in node.bases if isinstance(base, ast.Name) and definitions(path, base.id)]
    return attributes_of_hparams(ast.walk(node)).union(*bases)


@pytest.mark.parametrize(("path", "name", "given"), [pytest.param(*found, id=found[1]) for found in brains()])
def test_a_brain_is_given_what_it_reads_and_nothing_else(path, name, given):
    keys, needed = constants(given.keys), read_by(path, name)
    # Functions that finish a run look at the Brain as well.
    outside = attributes_of_hparams(node for each in CODE for node in ast.walk(tree_of(each)))
    assert needed and (sorted(needed - keys), sorted(keys - needed - outside)) == ([], [])
