"""The adapter's recipes on small trees: IEMOCAP in its true form with a tiny HuBERT, and two processes at once."""

import csv
import json
import os
import shlex
from pathlib import Path

import processes
import pytest
from toy_corpora import write_hubert, write_iemocap

from speechbrain_mifuse.nnet.adapter_files import load_adapter

ROOT = Path(__file__).parents[2]
FOLDS = "[['Ses01', 'Ses02'], ['Ses03', 'Ses04', 'Ses05']]"
SMALL = "n_layers: 2, codes: 16, frames_per_batch: 100, mask_width: 2, learning_rate: 0.003"


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    write_iemocap(folder / "IEMOCAP_full_release")
    write_hubert(folder / "hubert")
    return folder


def environment(tree, **more):
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("OPENAI_", "MIFUSE_"))}
    return {**kept, **processes.ONE_THREAD, "MIFUSE_CACHE": str(tree / "cache"), **more}


def begin(script, tree, output, log=None, more=None, **flags):
    """Start a recipe in a process that has everything imported already."""
    given = {"data_folder": tree, "encoder": tree / "hubert", "encoder_layers": "[2]", "layer": 2, "frame_average": 1}
    given |= {"d_model": 16, "n_heads": 2, "folds": FOLDS, "output_folder": output, **flags}
    words = [
        "hparams/adapter_iemocap.yaml",
        *(text for key, value in given.items() for text in (f"--{key}", str(value))),
    ]
    arguments = (f"recipes/IEMOCAP/adapter/{script}.py", words, str(ROOT), environment(tree, **(more or {})))
    return processes.start(processes.run_script, *arguments, str(log or f"{output}.log"))


def finish(process, output, log=None):
    """Wait for it; give what it said."""
    process.join(300)
    said = "".join(Path(f"{log or f'{output}.log'}.{end}").read_text() for end in ("out", "err"))
    assert process.exitcode == 0, said
    return said


@pytest.fixture(scope="module")
def trained(tree):
    """Two folds, one seed, four arms."""
    output = tree / "out"
    flags = {"adapter": f"{{finetuning_learning_rate: 0.01, {SMALL}}}", "number_of_steps": 8, "finetuning_steps": 20}
    flags |= {"arm": "[mean_linear, sap_linear, scratch, pretrained]", "seeds": "[1]"}
    said = finish(begin("train", tree, output, **flags), output)
    return output, said


def test_one_command_runs_folds_arms_and_label_amounts_to_a_table(trained):
    output, said = trained
    records = json.loads((output / "results.json").read_text())
    with (output / "adapter.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["corpus", "fold", "seed", "labels_per_class", "arm", "UA", "WA", "macro_F1"]
    assert len(records) == len(rows) == 2 * 4 and {row["corpus"] for row in rows} == {"iemocap"}
    for record in records:
        assert 0 <= record["UA"] <= 1 and sum(map(sum, record["confusion"])) == record["n_test"]
        assert len(record["by_speaker"]) == record["test_speakers"] == {1: 4, 2: 6}[record["fold"]]
        assert record["n_train"] == {1: 48, 2: 32}[record["fold"]]
        assert record["pretraining_audio"] == "the training folds' audio"
    assert max(record["UA"] for record in records) > 0.5
    assert "| iemocap | all | pretrained |" in said and "bootstrap over test speakers and seeds" in said
    assert (output / "results.md").read_text().strip() in said


def test_adapters_are_pretrained_on_the_speakers_of_the_other_folds(trained):
    output, _ = trained
    for fold, utterances in ((1, 48), (2, 32)):
        folder = output / f"fold_{fold}" / "seed_1" / "pretraining_paper"
        about = json.loads((folder / "adapter" / "about.json").read_text())
        assert about["utterances"] == utterances
        assert load_adapter(folder / "adapter").output_size == 16
    arm = output / "fold_1" / "seed_1" / "labels_all" / "pretrained"
    assert {"attention.png", "confusion.png", "predictions.json"} <= {path.name for path in arm.iterdir()}


def test_audio_of_the_test_fold_is_pretrained_on_when_asked_and_called_a_leak(tree, trained):
    output = tree / "leak"
    flags = {"adapter": f"{{{SMALL}}}", "number_of_steps": 2, "finetuning_steps": 2}
    flags |= {"arm": "pretrained", "seeds": "[1]", "fold": 1, "pretrain_on": "[train, test]", "labels_per_class": "[3]"}
    said = finish(begin("train", tree, output, **flags), output)
    assert "LEAK: the audio of all folds, the test fold's included" in said
    about = json.loads((output / "fold_1" / "seed_1" / "pretraining_paper" / "adapter" / "about.json").read_text())
    assert about["utterances"] == 80
    (record,) = json.loads((output / "results.json").read_text())
    assert (record["labels_per_class"], record["n_train"]) == (3, 12)


@pytest.mark.parametrize(
    "corpus", ["RAVDESS", *(pytest.param(name, marks=pytest.mark.long) for name in ("nEMO", "EmoDB"))]
)
def test_an_open_corpus_runs_as_its_registry_row_says(corpus, toy_folder, toy_encoder, tmp_path):
    with (ROOT / "tests" / "recipes" / f"{corpus}.csv").open(newline="", encoding="utf-8") as file:
        row = next(row for row in csv.DictReader(file) if "adapter" in row["Script_file"])
    flags = [word for pair in shlex.split(row["test_debug_flags"]) for word in pair.split("=", 1)]
    speakers = {"RAVDESS": "[['01', '03', '05'], ['02', '04']]", "nEMO": "[['SM0', 'IC0', 'KD0'], ['TP0', 'MK0']]"}
    flags += ["--data_folder", str(toy_folder), "--output_folder", str(tmp_path / "out"), "--encoder", str(toy_encoder)]
    flags += ["--folds", speakers.get(corpus, "[['03', '08', '10'], ['09', '11']]")]
    flags += ["--encoder_layers", "[0, 1]", "--layer", "1", "--labels", "[angry, happy, neutral, sad]"]
    arguments = (row["Script_file"], [row["Hparam_file"], *flags], str(ROOT), environment(tmp_path))
    finish(processes.start(processes.run_script, *arguments, str(tmp_path / "out.log")), tmp_path / "out")
    wanted = row["test_debug_checks"].removeprefix("file_exists=[").removesuffix("]").split(",")
    assert wanted and not [name for name in wanted if not (tmp_path / "out" / name).exists()]


def test_pretraining_is_one_script_for_all_corpora():
    scripts = [folder / "adapter" / "pretrain.py" for folder in (ROOT / "recipes").iterdir()]
    found = [script.resolve() for script in scripts if script.parent.exists()]
    assert len(found) == 4 and len(set(found)) == 1
