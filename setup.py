"""Builds the package with the settings and recipes that it runs, which lie beside it here."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = [*Path("hparams").rglob("*.yaml"), *Path("recipes/RAVDESS").glob("*/*.py")]


class BuildWithRecipe(build_py):
    """Copies what a checkout has beside the package into the built one."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        for path in SHIPPED:
            target = Path(self.build_lib) / "speechbrain_mifuse" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


setup(cmdclass={"build_py": BuildWithRecipe})
