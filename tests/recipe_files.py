"""Recipes as modules: their functions can be called without running them."""

import importlib.util
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]


@cache
def load(name):
    """Load `recipes/NAME` as a module."""
    spec = importlib.util.spec_from_file_location(Path(name).parent.name + "_recipe", ROOT / "recipes" / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
