"""The adaptation recipe as users run it: labels stay out, work is resumed, errors are one line."""

import dataclasses
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import processes
import pytest
import tiny_clap
from hyperpyyaml import load_hyperpyyaml
from safetensors.torch import load_file
from toy_corpora import LABELS

from speechbrain_mifuse import __version__
from speechbrain_mifuse.cli.main import main
from speechbrain_mifuse.inference import EmotionRecognizer
from speechbrain_mifuse.inference.server import EmotionServer

ROOT = Path(__file__).parents[2]
SCRIPT, HPARAMS = "recipes/RAVDESS/mifuse/train.py", "hparams/nemo2rav.yaml"
SECRET = "sk-planted-4b1d-never-to-be-written"
with (ROOT / "hparams" / "base" / "adaptation.yaml").open(encoding="utf-8") as file:
    BASE = load_hyperpyyaml(file, {"seed": 1, "labels": [], "output_folder": "", "layer": 0})
METHODS, KNOWN = BASE["table"], BASE["methods"]
# Whatever is trained and does not declare that it uses labels: a method added to the table is tested for leaks by that.
LABEL_FREE = [name for name in METHODS if KNOWN[name].trains and not KNOWN[name].uses_labels]
NUMBERS = itertools.count()
QUICK = "{number_of_epochs: 20, batch_size: 12, learning_rate: 0.005}"


@dataclasses.dataclass
class Outcome:
    """How a run ended."""

    status: int
    out: str
    err: str

    def single_error(self):
        """Its one line of error, after making sure that it is one and that there is no traceback."""
        assert self.status == 2, self.out + self.err
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and self.err.rstrip().endswith(lines[0])
        return lines[0]


@dataclasses.dataclass
class Recipe:
    """Runs the recipe on the toy corpora with the tiny encoder."""

    data_folder: Path
    encoder: Path
    logs: Path

    def flags(self, output_folder, methods, **changes):
        flags = {
            "data_folder": self.data_folder,
            "output_folder": output_folder,
            "method": methods if isinstance(methods, str) else f"[{', '.join(methods)}]",
            "encoder": self.encoder,
            "encoder_layers": "[0, 1]",
            "layer": 0,
            "teacher_layer": 1,
            "source_classifier": QUICK,
            "teacher_classifier": QUICK,
            "number_of_steps": 60,
            "batch_size": 12,
            "learning_rate": 0.003,
            **changes,
        }
        return [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]

    def environment(self, **changes):
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("OPENAI_", "MIFUSE_"))}
        return {**kept, **processes.ONE_THREAD, "MIFUSE_CACHE": str(self.logs / "cache"), **changes}

    def command(self, output_folder, methods):
        """Run it as the README says, in a new process."""
        command = [sys.executable, SCRIPT, HPARAMS, *self.flags(output_folder, methods)]
        environment = self.environment(OPENAI_API_KEY=SECRET)
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        return Outcome(done.returncode, done.stdout, done.stderr)

    def __call__(self, output_folder, methods="mi_fuse", killed_at=None, environment=(), inside=False, **changes):
        """Run it in a process that has everything imported already, from the root or `inside` its own folder."""
        cwd, script = (str((ROOT / SCRIPT).parent), "train.py") if inside else (str(ROOT), SCRIPT)
        log = str(self.logs / f"log{next(NUMBERS)}")
        flags = [HPARAMS, *self.flags(output_folder, methods, **changes)]
        arguments = (script, flags, cwd, self.environment(**dict(environment)), log, killed_at)
        process = processes.start(processes.run_script, *arguments)
        process.join(300)
        assert process.exitcode is not None, "the recipe hangs"
        return Outcome(process.exitcode, Path(f"{log}.out").read_text(), Path(f"{log}.err").read_text())


@pytest.fixture(scope="module")
def recipe(toy_folder, toy_encoder, tmp_path_factory):
    return Recipe(toy_folder, toy_encoder, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def first_run(recipe, tmp_path_factory):
    """Every method, run from the repository's root with a secret in the environment: (folder, outcome)."""
    folder = tmp_path_factory.mktemp("first") / "out"
    outcome = recipe.command(folder, METHODS)
    assert outcome.status == 0, outcome.out + outcome.err
    return folder, outcome


@pytest.fixture(scope="module")
def finished(first_run):
    return first_run[0]


def student(folder, method):
    return (folder / method / "student.safetensors").read_bytes()


def results(folder, method):
    return json.loads((folder / method / "results.json").read_text())


def copy_manifests(finished, folder):
    return shutil.copytree(finished / "manifests" / "target", folder / "manifests" / "target")


# Target labels cannot reach adaptation.


@pytest.fixture(scope="module")
def mislabelled(finished, recipe, tmp_path_factory):
    """Run it all anew on target manifests whose labels were drawn by lot."""
    folder = tmp_path_factory.mktemp("mislabelled")
    manifests, rng = copy_manifests(finished, folder), np.random.default_rng(0)
    for path in (manifests / "adapt.json", manifests / "test.json"):
        rows = json.loads(path.read_text())
        path.write_text(json.dumps({key: {**row, "emo": str(rng.choice(LABELS))} for key, row in rows.items()}))
    outcome = recipe(folder, [*LABEL_FREE, "oracle"])
    assert outcome.status == 0, outcome.out + outcome.err
    return folder


@pytest.mark.parametrize("method", LABEL_FREE)
def test_random_target_labels_leave_the_adapted_student_byte_identical(method, finished, mislabelled):
    assert student(mislabelled, method) == student(finished, method)
    assert (mislabelled / method / "predictions.json").read_bytes() == (
        finished / method / "predictions.json"
    ).read_bytes()


@pytest.mark.parametrize("method", LABEL_FREE)
def test_random_target_labels_change_the_reported_accuracy(method, finished, mislabelled):
    assert results(finished, method)["UA"] > 0.6 > 0.5 > results(mislabelled, method)["UA"]


def test_the_leak_test_knows_the_papers_method_and_all_its_baselines():
    papers = {"shot", "nrc", "dine", "prode_style", "lalm_sfuda", "entropy_fusion", "mean_fusion", "mi_fuse"}
    assert papers < set(LABEL_FREE)
    # The others train nothing, or declare that they use labels.
    assert {name for name in METHODS if KNOWN[name].uses_labels} == {"oracle_lda", "oracle_balanced", "oracle"}


@pytest.mark.parametrize("method", LABEL_FREE)
def test_random_target_labels_leave_what_selection_sees_byte_identical(method, finished, mislabelled):
    names = sorted(path.name for path in (finished / method / "snapshots").iterdir())
    assert len(names) == 6
    for name in names:
        found = [(folder / method / "snapshots" / name).read_bytes() for folder in (finished, mislabelled)]
        assert found[0] == found[1]


def test_random_target_labels_change_the_upper_bound_which_alone_may_see_them(finished, mislabelled):
    assert student(mislabelled, "oracle") != student(finished, "oracle")


def test_the_students_that_the_leak_test_compares_have_moved_and_differ(finished):
    start = load_file(finished / "source" / "recogniser" / "classifier.safetensors")
    moved = {method: load_file(finished / method / "student.safetensors")["hidden.weight"] for method in LABEL_FREE}
    assert all(not weight.equal(start["hidden.weight"]) for weight in moved.values())
    assert len({student(finished, method) for method in LABEL_FREE}) == len(LABEL_FREE)


def test_adaptation_works_without_any_labelled_target_manifest_and_only_scoring_complains(finished, recipe, tmp_path):
    manifests = copy_manifests(finished, tmp_path)
    for name in ("adapt.json", "test.json"):
        (manifests / name).unlink()
    error = recipe(tmp_path, "mi_fuse").single_error()
    assert str(manifests / "test.json") in error and "not found" in error
    assert student(tmp_path, "mi_fuse") == student(finished, "mi_fuse")


def test_the_upper_bound_does_not_start_without_the_labelled_adaptation_manifest(finished, recipe, tmp_path):
    (copy_manifests(finished, tmp_path) / "adapt.json").unlink()
    assert "adapt.json: not found" in recipe(tmp_path, "oracle").single_error()
    assert not (tmp_path / "oracle" / "student.safetensors").exists()


def linked(toy_folder, folder, *names):
    """Make a data folder that holds only some of the corpora."""
    folder.mkdir()
    for name in names:
        (folder / name).symlink_to(toy_folder / name)
    return folder


def test_adaptation_works_without_the_source_corpus(finished, recipe, tmp_path, toy_folder):
    data = linked(toy_folder, tmp_path / "data", "ravdess", "emodb_2s")
    without = {"data_folder": data, "source_recogniser": finished / "source" / "recogniser"}
    outcome = recipe(tmp_path / "out", **without)
    assert outcome.status == 0, outcome.out + outcome.err
    assert student(tmp_path / "out", "mi_fuse") == student(finished, "mi_fuse")


# Results.


def test_results_name_everything_that_a_number_depends_on(finished):
    for method in METHODS:
        found = results(finished, method)
        assert found["method"] == method
        assert (found["source"], found["target"], found["teacher"], found["seed"]) == ("nemo", "ravdess", "emodb", 1)
        assert found["code_version"] == __version__ and "no label" in found["selection"]
        assert "speaker-independent" in found["protocol"] and "layer 0" in found["encoder"]
        assert (found["n_train"], found["n_test"]) == (0 if method in ("source_only", "lalm_zero_shot") else 36, 24)
        low, high = found["ci95"]
        assert 0 <= low <= found["UA"] <= high <= 1 and 0 <= found["WA"] <= 1 and 0 <= found["macro_F1"] <= 1


@pytest.mark.parametrize("method", METHODS)
def test_every_snapshot_of_a_run_is_scored_and_the_last_is_the_result(method, finished):
    found, trained = results(finished, method), KNOWN[method].trains
    assert [snapshot["step"] for snapshot in found["snapshots"]] == ([12, 24, 36, 48, 60] if trained else [])
    assert found["steps"] == (60 if trained else 0) and found["selection"] == "last step, no label"
    for snapshot in found["snapshots"]:
        assert list(snapshot) == ["step", "UA", "snd", "information_maximisation", "entropy"]
    assert not trained or found["snapshots"][-1]["UA"] == found["UA"]


def test_a_rule_of_selection_on_the_command_line_keeps_the_snapshot_that_it_prefers(finished, recipe, tmp_path):
    ready = shutil.copytree(finished, tmp_path / "out", ignore=shutil.ignore_patterns("mi_fuse"))
    outcome = recipe(ready, adaptation="{selection: entropy}", number_of_steps=60)
    assert outcome.status == 0, outcome.out + outcome.err
    found = results(ready, "mi_fuse")
    assert found["snapshots"] == results(finished, "mi_fuse")["snapshots"]
    chosen = max(found["snapshots"], key=lambda snapshot: snapshot["entropy"])
    assert (found["steps"], found["UA"]) == (chosen["step"], chosen["UA"])
    assert "entropy" in found["selection"] and found["selection"] in (ready / "results.md").read_text()


def test_an_unknown_rule_of_selection_is_one_error_that_lists_the_known_ones(finished, recipe, tmp_path):
    ready = shutil.copytree(finished, tmp_path / "out", ignore=shutil.ignore_patterns("mi_fuse"))
    error = recipe(ready, adaptation="{selection: ua}").single_error()
    assert "selection: 'ua'" in error and "snd" in error


def test_a_target_without_labels_is_adapted_to_and_predicted_and_the_run_says_that_nothing_is_scored(
    finished, recipe, tmp_path
):
    ready = shutil.copytree(finished, tmp_path / "out", ignore=shutil.ignore_patterns("mi_fuse", "lalm_zero_shot"))
    for path in [ready / "manifests" / "target" / f"{split}.json" for split in ("adapt", "test")]:
        rows = json.loads(path.read_text())
        path.write_text(json.dumps({key: {k: v for k, v in row.items() if k != "emo"} for key, row in rows.items()}))
    outcome = recipe(ready, ["lalm_zero_shot", "mi_fuse"])
    assert outcome.status == 0, outcome.out + outcome.err
    assert "no labels, nothing is scored" in outcome.out + outcome.err
    assert student(ready, "mi_fuse") == student(finished, "mi_fuse")
    found = results(ready, "mi_fuse")
    assert found["UA"] is None and found["n_test"] == 24 and "confusion" not in found
    assert {snapshot["UA"] for snapshot in found["snapshots"]} == {None}
    assert "| mi_fuse | no labels, not scored |" in (ready / "results.md").read_text()
    assert len(json.loads((ready / "mi_fuse" / "predictions.json").read_text())) == 24


def test_several_methods_get_a_folder_each_and_one_table_of_all(first_run):
    folder, outcome = first_run
    records = json.loads((folder / "results.json").read_text())
    assert [record["method"] for record in records] == METHODS
    assert records == [results(folder, method) for method in METHODS]
    table = (folder / "results.md").read_text()
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert rows == ["method", *METHODS]
    assert table in outcome.out


def test_one_method_gives_one_record(finished, recipe, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    assert recipe(tmp_path / "out", "mi_fuse").status == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results(finished, "mi_fuse")


def test_adapting_helps_on_the_toy_corpora(finished):
    assert results(finished, "oracle")["UA"] > 0.9
    assert results(finished, "mi_fuse")["UA"] >= results(finished, "source_only")["UA"]


# The API teacher.


def test_an_audio_text_teacher_is_recorded_by_its_name_and_its_weights(recipe, tmp_path):
    flags = {"teacher": "dual_encoder", "teacher_alm": tiny_clap.build(tmp_path / "small clap")}
    outcome = recipe(tmp_path / "out", "lalm_zero_shot", **flags)
    assert outcome.status == 0, outcome.out + outcome.err
    found = results(tmp_path / "out", "lalm_zero_shot")
    assert found["teacher"] == "small-clap" and "teacher small-clap" in outcome.out
    assert found["teacher_model"]["audio_text_model"] == "clap" and len(found["teacher_model"]["weights"]) == 64


def test_the_teacher_may_be_any_server_and_then_no_corpus_but_the_target_is_needed(
    finished, recipe, tmp_path, toy_folder
):
    data = linked(toy_folder, tmp_path / "data", "ravdess")
    without = {"data_folder": data, "source_recogniser": finished / "source" / "recogniser"}
    listener = EmotionRecognizer.from_hparams(finished / "teacher" / "recogniser")
    with EmotionServer(listener, "some-model") as server:
        address = {"lalm_base_url": server.base_url, "lalm_model": "some-model"}
        outcome = recipe(tmp_path / "out", ["lalm_zero_shot", "mi_fuse"], **without, **address)
    assert outcome.status == 0, outcome.out + outcome.err
    assert student(tmp_path / "out", "mi_fuse") == student(finished, "mi_fuse")
    assert results(tmp_path / "out", "lalm_zero_shot")["UA"] == results(finished, "lalm_zero_shot")["UA"]
    assert results(tmp_path / "out", "mi_fuse")["teacher"] == "some-model"
    assert not (tmp_path / "out" / "teacher").exists()


def test_a_plan_after_the_run_finds_the_answers_of_the_local_teacher_stored(finished, recipe, capfd):
    main(["collect", str(ROOT / HPARAMS), *recipe.flags(finished, "mi_fuse"), "--dry_run"])
    assert "0 to ask for" in capfd.readouterr().out


def test_two_runs_side_by_side_do_not_pay_for_the_same_answers_twice(finished, recipe, tmp_path, toy_folder):
    asked, listener = [], EmotionRecognizer.from_hparams(finished / "teacher" / "recogniser")
    answer = listener.predict_each
    listener.predict_each = lambda waveform, seeds: asked.extend(seeds) or answer(waveform, seeds)
    outcomes = []
    with EmotionServer(listener, "some-model") as server:
        flags = {
            "data_folder": linked(toy_folder, tmp_path / "data", "ravdess"),
            "source_recogniser": finished / "source" / "recogniser",
            "lalm_base_url": server.base_url,
            "lalm_model": "some-model",
            "label_store": tmp_path / "shared" / "labels.sqlite",
        }
        (tmp_path / "shared").mkdir()
        folders = [shutil.copytree(finished / "manifests", tmp_path / name / "manifests").parent for name in ("a", "b")]
        runs = [
            threading.Thread(target=lambda folder=folder: outcomes.append(recipe(folder, "lalm_sfuda", **flags)))
            for folder in folders
        ]
        for run in runs:
            run.start()
        for run in runs:
            run.join()
    assert [outcome.status for outcome in outcomes] == [0, 0], [outcome.err for outcome in outcomes]
    assert len(asked) == 36 * 5
    assert student(folders[0], "lalm_sfuda") == student(folders[1], "lalm_sfuda")


def test_single_labels_as_answers_are_warned_of_and_still_adapt(finished, recipe, tmp_path):
    ready = shutil.copytree(finished, tmp_path / "out", ignore=shutil.ignore_patterns("mi_fuse"))
    outcome = recipe(ready, lalm_answer_form="label")
    assert outcome.status == 0, outcome.out + outcome.err
    assert "100 % of the teacher's samples are single labels" in outcome.out + outcome.err
    assert student(ready, "mi_fuse") != student(finished, "mi_fuse")


# Skipping and resuming.


def test_a_second_run_from_inside_the_recipes_folder_skips_everything_and_says_so(finished, recipe):
    before = {path: path.read_bytes() for path in finished.rglob("results.json")}
    outcome = recipe(finished, METHODS, inside=True)
    assert outcome.status == 0, outcome.out + outcome.err
    said = outcome.out + outcome.err
    assert said.count("preparation skipped") == 3
    assert said.count("training skipped") == 2
    assert said.count("stored, 0 to look at") == 3
    assert said.count("nothing is asked") == 1
    assert said.count("done already, skipped") == len(METHODS)
    assert {path: path.read_bytes() for path in finished.rglob("results.json")} == before


KILLS = [
    ("speechbrain_mifuse.corpora.manifest", "write_manifest", 2),
    ("speechbrain_mifuse.features.extract", "FrameReader.encode", 20),
    ("speechbrain_mifuse.features.store", "StoreWriter.flush", 2),
    ("speechbrain_mifuse.brains.classifier", "ClassifierBrain.compute_objectives", 45),
    ("speechbrain_mifuse.experiments.source", "export_recogniser", 1),
    ("speechbrain_mifuse.lalm.store", "LabelStore.put_many", 2),
    ("speechbrain_mifuse.brains.adaptation", "AdaptationBrain.on_fit_batch_end", 35),
    ("speechbrain_mifuse.brains.snapshots", "save", 1),
    ("speechbrain_mifuse.brains.snapshots", "atomic_write", 2),
    ("speechbrain_mifuse.evaluation.scoring", "atomic_write", 2),
]


@pytest.mark.parametrize("kills", [KILLS[::2], pytest.param(KILLS[1::2], marks=pytest.mark.long)])
def test_a_run_killed_at_every_stage_ends_as_an_unbroken_one(kills, finished, recipe, tmp_path):
    cache = {"MIFUSE_CACHE": str(tmp_path / "cache")}
    for killed_at in kills:
        assert recipe(tmp_path / "out", killed_at=killed_at, environment=cache).status == -9, killed_at
    outcome = recipe(tmp_path / "out", environment=cache)
    assert outcome.status == 0, outcome.out + outcome.err
    assert student(tmp_path / "out", "mi_fuse") == student(finished, "mi_fuse")
    assert results(tmp_path / "out", "mi_fuse") == results(finished, "mi_fuse")


@pytest.mark.parametrize("method", ["mi_fuse", pytest.param("nrc", marks=pytest.mark.long)])
def test_a_killed_adaptation_goes_on_from_its_checkpoint(method, finished, recipe, tmp_path):
    ready = shutil.copytree(finished, tmp_path / "out", ignore=shutil.ignore_patterns(method))
    killed = ("speechbrain_mifuse.brains.adaptation", "AdaptationBrain.on_fit_batch_end", 35)
    assert recipe(ready, method, killed_at=killed).status == -9
    assert not (ready / method / "student.safetensors").exists()
    assert recipe(ready, method).status == 0
    log = (ready / method / "train_log.txt").read_text()
    assert log == (finished / method / "train_log.txt").read_text()
    assert student(ready, method) == student(finished, method)
    assert results(ready, method) == results(finished, method)


def test_an_adaptation_killed_while_it_writes_a_checkpoint_goes_on_from_the_one_before(finished, recipe, tmp_path):
    ready = shutil.copytree(finished, tmp_path / "out", ignore=shutil.ignore_patterns("mi_fuse"))
    per_checkpoint = len(list((finished / "mi_fuse" / "save").glob("*/*.ckpt")))
    assert recipe(ready, killed_at=("torch", "save", per_checkpoint + 2)).status == -9
    outcome = recipe(ready)
    assert outcome.status == 0, outcome.out + outcome.err
    assert student(ready, "mi_fuse") == student(finished, "mi_fuse")


# Errors and secrets.


def test_an_unknown_method_is_one_error_that_lists_the_known_ones(recipe, tmp_path):
    error = recipe(tmp_path, "mi_fuze").single_error()
    assert "--method" in error and "mi_fuze" in error and all(method in error for method in METHODS)


def test_a_missing_data_folder_is_one_error_that_names_the_flag(recipe, tmp_path):
    error = recipe(tmp_path / "out", data_folder=tmp_path / "nowhere").single_error()
    assert "--data_folder" in error and "nowhere" in error


def test_no_data_folder_at_all_is_one_error_that_names_the_flag(recipe, tmp_path):
    assert "--data_folder" in recipe(tmp_path, data_folder="null").single_error()


def test_a_flag_that_is_none_is_one_error_that_names_it(recipe, tmp_path):
    error = recipe(tmp_path, data_fold="x").single_error()
    assert "--data_fold: " in error and "Did you mean --data_folder?" in error


def test_an_unknown_encoder_is_one_error_that_names_the_flag(recipe, tmp_path):
    assert "--encoder" in recipe(tmp_path, encoder=tmp_path / "nowhere").single_error()


def test_a_layer_that_is_not_stored_is_one_error_that_names_the_flag(recipe, tmp_path):
    assert "--encoder_layers" in recipe(tmp_path, layer=2).single_error()


def test_an_api_that_is_down_is_one_error_that_names_the_flag_and_not_the_key(recipe, tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
        outcome = recipe(tmp_path, environment={"OPENAI_API_KEY": SECRET}, lalm_base_url=url)
    error = outcome.single_error()
    assert "--lalm_base_url" in error and url in error
    assert SECRET not in outcome.out + outcome.err


def test_other_settings_in_the_same_folder_are_one_error_that_says_what_differs(finished, recipe, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "out")
    error = recipe(folder, temperature=0.5).single_error()
    assert "temperature: 0.2 -> 0.5" in error and "--output_folder" in error
    assert student(folder, "mi_fuse") == student(finished, "mi_fuse")


def test_the_api_key_is_in_no_file_of_the_run_and_in_no_line_of_its_output(first_run, recipe):
    folder, outcome = first_run
    files = [path for root in (folder, recipe.logs / "cache") for path in root.rglob("*") if path.is_file()]
    assert len(files) > 60
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert SECRET not in outcome.out + outcome.err
