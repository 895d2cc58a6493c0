"""The dual encoder's recipe on small trees: trained on other corpora than the target, resumed, as the registry says."""

import csv
import json
import os
import shlex
from pathlib import Path

import processes
import pytest
from safetensors.torch import load_file
from tiny_text_encoder import write_text_encoder
from toy_corpora import write_hubert, write_paper_corpora

from speechbrain_mifuse.zero_shot.own_dual_encoder import load_dual_encoder

ROOT = Path(__file__).parents[2]
SAVED = ("speechbrain.utils.checkpoints", "Checkpointer.save_checkpoint")
TRAINED_ON = {
    "RAVDESS": {"nemo", "emodb"},
    "nEMO": {"ravdess", "emodb"},
    "EmoDB": {"ravdess", "nemo"},
    "IEMOCAP": {"msp_podcast", "msp_improv"},
    "MSP-Podcast": {"iemocap", "msp_improv"},
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dual_encoder")
    write_text_encoder(folder / "text")
    write_hubert(folder / "hubert")
    write_paper_corpora(folder / "paper")
    table = next((folder / "paper").glob("MSP-PODCAST*")) / "Labels" / "labels_consensus.csv"
    # Its recordings of further classes share one name, which is no matter where they take no part.
    rows = table.read_text().splitlines()
    table.write_text("\n".join(row.replace("_9000_", f"_9{number:03d}_") for number, row in enumerate(rows)) + "\n")
    return folder


def row_of(corpus):
    with (ROOT / "tests" / "recipes" / f"{corpus}.csv").open(newline="", encoding="utf-8") as file:
        return next(row for row in csv.DictReader(file) if "dual_encoder" in row["Script_file"])


def run(tree, corpus, output, flags, killed_at=None):
    """Run the recipe in a process that has everything imported already; give its status and what it said."""
    row, kept = row_of(corpus), {key: value for key, value in os.environ.items() if not key.startswith("MIFUSE_")}
    environment = {**kept, **processes.ONE_THREAD, "MIFUSE_CACHE": str(tree / "cache"), "HF_HUB_OFFLINE": "1"}
    given = {"output_folder": output, "text_encoder": tree / "text", **flags}
    words = [row["Hparam_file"], *(text for key, value in given.items() for text in (f"--{key}", str(value)))]
    arguments = (row["Script_file"], words, str(ROOT), environment, f"{output}.log", killed_at)
    process = processes.start(processes.run_script, *arguments)
    process.join(300)
    return process.exitcode, "".join(Path(f"{output}.log.{end}").read_text() for end in ("out", "err"))


def debug_flags(row):
    return dict(word.removeprefix("--").split("=", 1) for word in shlex.split(row["test_debug_flags"]))


def weights(output):
    return load_file(output / "model" / "dual_encoder.safetensors")


@pytest.fixture(scope="module")
def open_flags(toy_folder, toy_encoder):
    return {"data_folder": toy_folder, "encoder": toy_encoder, "encoder_layers": "[0, 1]", "layer": 1}


@pytest.mark.parametrize(
    "corpus", [pytest.param(name, marks=pytest.mark.long if name in ("nEMO", "EmoDB") else []) for name in TRAINED_ON]
)
def test_it_runs_as_its_registry_row_says_and_trains_on_other_corpora_than_the_target(
    corpus, tree, open_flags, tmp_path
):
    flags = open_flags
    if corpus in ("IEMOCAP", "MSP-Podcast"):
        flags = {"data_folder": tree / "paper", "encoder": tree / "hubert", "encoder_layers": "[2]", "layer": 2}
    row, output = row_of(corpus), tmp_path / "out"
    status, said = run(tree, corpus, output, {**debug_flags(row), **flags})
    assert status == 0, said
    wanted = row["test_debug_checks"].removeprefix("file_exists=[").removesuffix("]").split(",")
    assert wanted and not [name for name in wanted if not (output / name).exists()]
    about = json.loads((output / "model" / "about.json").read_text())
    assert set(about["trained_on"]) == TRAINED_ON[corpus] == set(about["validation"])
    assert str(output / "model") in said.splitlines()
    assert about["target"] not in about["trained_on"]
    assert set(load_dual_encoder(output / "model").classes_known) >= {"angry", "happy", "neutral", "sad"}


def test_a_killed_run_goes_on_to_the_same_weights(tree, open_flags, tmp_path):
    flags = {**open_flags, "number_of_epochs": 6, "batch_size": 12, "dual_encoder": "{log_interval: 2}"}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(tree, "RAVDESS", whole, flags)[0] == 0
    assert run(tree, "RAVDESS", cut, flags, killed_at=(*SAVED, 2))[0] == -9
    assert not (cut / "model").exists()
    status, said = run(tree, "RAVDESS", cut, flags)
    assert status == 0 and "going on after epoch 2 of 6" in said
    first, second = weights(whole), weights(cut)
    assert all((first[name] == second[name]).all() for name in first)
    status, said = run(tree, "RAVDESS", cut, flags)
    assert status == 0 and "training skipped" in said


def test_a_source_that_is_the_target_is_one_line_of_error(tree, open_flags, tmp_path):
    status, said = run(tree, "RAVDESS", tmp_path / "out", {**open_flags, "target": "nemo"})
    assert status == 2 and "error: sources: 'nemo' is the target" in said and "Traceback" not in said


def test_the_recipe_is_one_script_for_all_corpora():
    scripts = {(ROOT / row_of(corpus)["Script_file"]).resolve() for corpus in TRAINED_ON}
    assert scripts == {ROOT / "recipes" / "RAVDESS" / "dual_encoder" / "train.py"}
    assert len(next(iter(scripts)).read_text().splitlines()) <= 180
