"""Where the recipes and their settings lie, and how the package calls a recipe's functions."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType


def shipped(name: str) -> Path:
    """Find a file of the repository: beside the package in a checkout, inside it once installed."""
    package = Path(__file__).parents[1]
    return next((path for path in (package / name, package.parent / name) if path.exists()), package / name)


@cache
def load_recipe(name: str) -> ModuleType:
    """Load a recipe's functions without running it."""
    spec = importlib.util.spec_from_file_location(f"{Path(name).parent.name}_recipe", shipped(name))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
