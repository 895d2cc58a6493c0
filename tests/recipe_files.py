"""Recipes as modules: their functions can be called without running them."""

from speechbrain_mifuse.experiments.recipes import load_recipe


def load(name):
    """Load `recipes/NAME` as the package itself does."""
    return load_recipe(f"recipes/{name}")
