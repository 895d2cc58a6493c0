"""ZS-Fuse's recipes on small trees: with a tiny CLAP, and with our own dual encoder trained on other corpora."""

import csv
import json
import os
import shlex
from pathlib import Path

import processes
import pytest
import tiny_clap
from tiny_text_encoder import write_text_encoder
from toy_corpora import write_hubert, write_paper_corpora

ROOT = Path(__file__).parents[2]
ARMS = [
    "fm_only",
    "scores_only",
    "zs_fuse",
    "zs_fuse_random_start",
    "zs_fuse_paper",
    "zs_fuse_permuted",
    "source_classifier_fused",
]
SPEAKERS = {
    "RAVDESS": "[['01', '03', '05'], ['02', '04']]",
    "nEMO": "[['SM0', 'IC0', 'KD0'], ['TP0', 'MK0']]",
    "EmoDB": "[['03', '08', '10'], ['09', '11']]",
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zsfuse")
    write_text_encoder(folder / "text")
    write_hubert(folder / "hubert")
    tiny_clap.build(folder / "clap")
    write_paper_corpora(folder / "paper")
    table = next((folder / "paper").glob("MSP-PODCAST*")) / "Labels" / "labels_consensus.csv"
    # Its recordings of further classes have no audio, and share one name.
    table.write_text("\n".join(row for row in table.read_text().splitlines() if "_9000_" not in row) + "\n")
    return folder


def run(tree, corpus, output, flags):
    """Run the recipe with its registry row's flags and others; give its status and what it said."""
    with (ROOT / "tests" / "recipes" / f"{corpus}.csv").open(newline="", encoding="utf-8") as file:
        row = next(row for row in csv.DictReader(file) if "zsfuse" in row["Script_file"])
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MIFUSE_")}
    environment = {**kept, **processes.ONE_THREAD, "MIFUSE_CACHE": str(tree / "cache"), "HF_HUB_OFFLINE": "1"}
    given = dict(word.removeprefix("--").split("=", 1) for word in shlex.split(row["test_debug_flags"]))
    given |= {"output_folder": output, "frame_average": 1, **flags}
    words = [row["Hparam_file"], *(text for key, value in given.items() for text in (f"--{key}", str(value)))]
    arguments = (row["Script_file"], words, str(ROOT), environment, f"{output}.log")
    process = processes.start(processes.run_script, *arguments)
    process.join(300)
    wanted = row["test_debug_checks"].removeprefix("file_exists=[").removesuffix("]").split(",")
    said = "".join(Path(f"{output}.log.{end}").read_text() for end in ("out", "err"))
    return process.exitcode, said, [name for name in wanted if not (output / name).exists()]


def open_flags(tree, toy_folder, toy_encoder, corpus):
    """Flags of a corpus of the open ones, with the tiny encoders."""
    encoder = {"encoder": toy_encoder, "encoder_layers": "[0, 1]", "layer": 1}
    inner = {**encoder, "text_encoder": tree / "text", "frame_average": 1, "number_of_epochs": 2, "batch_size": 12}
    labels = "[angry, happy, neutral, sad]"
    own = {"data_folder": toy_folder, "folds": SPEAKERS[corpus], "labels": labels}
    return {**encoder, **own, "dual_encoder_flags": json.dumps([[key, str(value)] for key, value in inner.items()])}


@pytest.fixture(scope="module")
def compared(tree, toy_folder, toy_encoder):
    """Every arm on EmoDB, both folds, with few labels and all."""
    output = tree / "emodb"
    flags = {"arm": f"[{', '.join(ARMS)}]", "fold": "all", "labels_per_class": "[2, all]", "audio_repeats": "[1, 2]"}
    flags |= {"text_repeats": "[1, 2]", **open_flags(tree, toy_folder, toy_encoder, "EmoDB")}
    status, said, missing = run(tree, "EmoDB", output, flags)
    assert status == 0 and not missing, said
    return output, said


def test_one_command_trains_the_dual_encoder_scores_and_compares_all_arms(compared):
    output, said = compared
    records = json.loads((output / "results.json").read_text())
    assert len(records) == 2 * 2 * len(ARMS)
    with (output / "zsfuse.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["corpus", "fold", "seed", "labels_per_class", "arm", "UA", "WA", "macro_F1"]
    assert {row["arm"] for row in rows} == set(ARMS) and {row["labels_per_class"] for row in rows} == {"2", "all"}
    for record in records:
        assert record["n_train"] == (8 if record["labels_per_class"] == 2 else {1: 24, 2: 36}[record["fold"]])
        assert "trained on other corpora" in record["scores_from"]
    assert "bootstrap over test speakers and seeds" in said


def test_the_dual_encoder_never_sees_the_target(compared):
    about = json.loads((compared[0] / "dual_encoder_1" / "model" / "about.json").read_text())
    assert set(about["trained_on"]) == {"ravdess", "nemo"} and about["target"] == "emodb"


def test_a_dual_encoder_that_was_trained_on_the_target_is_refused(compared, tree, toy_folder, toy_encoder, tmp_path):
    given = compared[0] / "dual_encoder_1" / "model"
    flags = {**open_flags(tree, toy_folder, toy_encoder, "RAVDESS"), "alm": given}
    status, said, _ = run(tree, "RAVDESS", tmp_path / "given", flags)
    assert status == 2 and "--alm: this model was trained with the labels of ravdess" in said
    flags |= {"alm": "dual_encoder", "dual_encoder_recipe": "hparams/dual_encoder_emodb.yaml"}
    status, said, _ = run(tree, "RAVDESS", tmp_path / "trained", flags)
    assert status == 2 and "--dual_encoder_recipe: this model was trained with the labels of ravdess" in said


def test_the_report_says_what_is_heard_at_each_number_of_repeats(compared):
    text = (compared[0] / "amplification.md").read_text()
    assert "What dual_encoder hears of" in text and "Tokens of the prompts" in text and "no window" in text


def test_repeats_are_chosen_among_those_tried_and_the_whole_grid_is_reported(compared):
    output, said = compared
    grid = json.loads((output / "amplification.json").read_text())
    assert [(cell["audio_repeats"], cell["text_repeats"]) for cell in grid] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert all(0 <= cell["UA"] <= 1 for cell in grid) and "| 2 | 2 |" in said
    records = json.loads((output / "results.json").read_text())
    tried = {(cell["audio_repeats"], cell["text_repeats"]) for cell in grid}
    assert {(record["audio_repeats"], record["text_repeats"]) for record in records} <= tried
    plain = [record for record in records if record["arm"] == "source_classifier_fused"]
    assert {(record["audio_repeats"], record["text_repeats"]) for record in plain} == {(1, 1)}


def test_what_is_done_is_not_done_again(compared, tree, toy_folder, toy_encoder):
    output, _ = compared
    before = {path: path.stat().st_mtime_ns for path in output.glob("fold_*/**/predictions.json")}
    flags = {"arm": f"[{', '.join(ARMS)}]", "fold": "all", "labels_per_class": "[2, all]", "audio_repeats": "[1, 2]"}
    flags |= {"text_repeats": "[1, 2]", **open_flags(tree, toy_folder, toy_encoder, "EmoDB")}
    status, said, _ = run(tree, "EmoDB", output, flags)
    assert status == 0, said
    assert {path: path.stat().st_mtime_ns for path in output.glob("fold_*/**/predictions.json")} == before


@pytest.mark.parametrize("corpus", ["RAVDESS", pytest.param("nEMO", marks=pytest.mark.long)])
def test_an_open_corpus_runs_as_its_registry_row_says(corpus, tree, toy_folder, toy_encoder, tmp_path):
    flags = open_flags(tree, toy_folder, toy_encoder, corpus)
    status, said, missing = run(tree, corpus, tmp_path / "out", flags)
    assert status == 0 and not missing, said


@pytest.mark.parametrize("corpus", ["IEMOCAP", pytest.param("MSP-Podcast", marks=pytest.mark.long)])
def test_a_licensed_corpus_runs_with_a_clap_of_transformers(corpus, tree, tmp_path):
    flags = {"data_folder": tree / "paper", "encoder": tree / "hubert", "encoder_layers": "[2]", "layer": 2}
    status, said, missing = run(tree, corpus, tmp_path / "out", {**flags, "alm": tree / "clap"})
    assert status == 0 and not missing, said
    record = json.loads((tmp_path / "out" / "results.json").read_text())[0]
    assert record["corpus"] == corpus.lower().replace("-", "_") and str(tree / "clap") in record["scores_from"]


def test_the_plain_classifier_beside_a_foreign_model_is_one_clear_error(tree, tmp_path):
    flags = {"data_folder": tree / "paper", "encoder": tree / "hubert", "encoder_layers": "[2]", "layer": 2}
    flags |= {"alm": tree / "clap", "arm": "source_classifier_fused"}
    status, said, _ = run(tree, "IEMOCAP", tmp_path / "out", flags)
    assert status != 0 and "Leave the arm out" in said and "Traceback" not in said
