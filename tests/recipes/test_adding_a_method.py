"""The page on adding a method is applied as it stands, and what it adds runs."""

import doctest
import importlib.util
import json
import os
import re
import shutil
from pathlib import Path

import processes
import pytest

from speechbrain_mifuse import adaptation

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "adding_a_method.md").read_text(encoding="utf-8")
QUICK = "{number_of_epochs: 8, batch_size: 12, learning_rate: 0.01}"
STEPS = {"number_of_steps": 16, "batch_size": 12, "learning_rate": 0.003, "passes": 4, "lalm_samples": 2}
ENCODER = {"encoder_layers": "[0, 1]", "layer": 0, "teacher_layer": 1}


def run_overlay(overlay, *arguments):
    """As `run_script`, with the overlay's methods beside the package's."""
    adaptation.__path__.append(f"{overlay}/speechbrain_mifuse/adaptation")
    processes.run_script(*arguments)


@pytest.fixture
def overlay(tmp_path):
    """The repository's recipes with the page's class and YAML entry added, and nothing else."""
    folder = tmp_path / "overlay"
    path, code = re.search(r"^`(\S+\.py)`\n\n```python\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE).groups()
    name, entry = re.search(r"in `(\S+\.yaml)`\n\n```yaml\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE).groups()
    (folder / path).parent.mkdir(parents=True)
    (folder / path).write_text(code, encoding="utf-8")
    (folder / name).parent.mkdir(parents=True)
    text = (ROOT / name).read_text(encoding="utf-8")
    assert text.count("\nmethods:\n") == 1
    (folder / name).write_text(text.replace("\nmethods:\n", f"\nmethods:\n{entry}"), encoding="utf-8")
    (folder / "hparams" / "base" / "classifier.yaml").symlink_to(ROOT / "hparams" / "base" / "classifier.yaml")
    (folder / "hparams" / "lalm").symlink_to(ROOT / "hparams" / "lalm")
    shutil.copy(ROOT / "hparams" / "nemo2rav.yaml", folder / "hparams")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    return folder


def test_the_method_of_the_page_runs_through_the_recipe(overlay, toy_folder, toy_encoder, tmp_path):
    settings = {"data_folder": toy_folder, "output_folder": tmp_path / "out", "method": "margin_fusion"}
    settings |= {"encoder": toy_encoder, "source_classifier": QUICK, "teacher_classifier": QUICK, **ENCODER, **STEPS}
    flags = [text for flag, value in settings.items() for text in (f"--{flag}", str(value))]
    environment = {**os.environ, **processes.ONE_THREAD, "MIFUSE_CACHE": str(tmp_path / "cache")}
    arguments = ("recipes/RAVDESS/mifuse/train.py", ["hparams/nemo2rav.yaml", *flags], str(overlay), environment)
    process = processes.start(run_overlay, str(overlay), *arguments, str(tmp_path / "log"))
    process.join(300)
    assert process.exitcode == 0, (tmp_path / "log.out").read_text() + (tmp_path / "log.err").read_text()
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["method"] == "margin_fusion" and found["n_train"] == 36 and found["UA"] > 0.3


def test_the_examples_in_the_class_of_the_page_are_true(overlay):
    (path,) = (overlay / "speechbrain_mifuse" / "adaptation").glob("*.py")
    spec = importlib.util.spec_from_file_location("margin_fusion", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert doctest.testmod(module) == (0, 4)
