"""`speechbrain_mifuse.adapt` and `speechbrain-mifuse adapt`: from recordings without labels to a recogniser."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from adaptation_support import LABELS, make_world
from hyperpyyaml import load_hyperpyyaml
from safetensors.torch import load_file
from toy_corpora import utterance, write_wav

from speechbrain_mifuse.brains import adaptation as brains
from speechbrain_mifuse.cli.main import main
from speechbrain_mifuse.evaluation.verdict import judge
from speechbrain_mifuse.experiments import adapt as adapt_module
from speechbrain_mifuse.experiments import adaptation as ends
from speechbrain_mifuse.experiments.adapt import adapt, judged
from speechbrain_mifuse.experiments.recipes import load_recipe
from speechbrain_mifuse.features.encoder import FrozenEncoder
from speechbrain_mifuse.features.extract import FrameReader, extract
from speechbrain_mifuse.features.front import StoredFrames
from speechbrain_mifuse.inference.recognizer import EmotionRecognizer
from speechbrain_mifuse.inference.recognizer_folder import load_classifier, recogniser_digest
from speechbrain_mifuse.inference.server import EmotionServer
from speechbrain_mifuse.nnet.calibration import mean_nll
from speechbrain_mifuse.utils.audio import load_audio
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.files import atomic_write

ROOT = Path(__file__).parents[2]
CLASSIFIER = load_recipe("recipes/RAVDESS/classifier/train.py")
QUICK = {"number_of_steps": 20, "batch_size": 12, "learning_rate": 0.003, "lalm_samples": 3}


def trained(root, encoder, layer, shift):
    """Recogniser trained on a toy corpus that lies `shift` octaves away."""
    for split, speakers in (("train", (0, 2, 4)), ("valid", (1, 3))):
        rows = {}
        for emo, speaker, take in ((e, s, t) for e in LABELS for s in speakers for t in range(3)):
            name = f"{emo}{speaker}{take}"
            write_wav(root / f"{name}.wav", utterance(emo, speaker, take, shift))
            rows[f"t-{name}"] = {"wav": f"{{data_root}}/{name}.wav", "emo": emo, "speaker": str(speaker)}
        atomic_write(root / f"{split}.json", json.dumps(rows))
    atomic_write(root / "corpus.json", json.dumps({"data_root": str(root)}))
    reader = FrameReader(FrozenEncoder(encoder, [0, 1]), trim_db=40.0, frame_average=2)
    store = extract([root / "train.json", root / "valid.json"], reader, root / "store")
    filled = {"name": root.name, "seed": 1, "labels": list(LABELS), "output_folder": str(root / "out")}
    filled |= {f"{split}_manifest": str(root / f"{split}.json") for split in ("train", "valid")}
    filled |= {"encoder": str(encoder), "layer": layer, "trim_db": 40.0, "number_of_epochs": 30, "batch_size": 8}
    with (ROOT / "hparams" / "base" / "classifier.yaml").open() as file:
        return CLASSIFIER.train_classifier(load_hyperpyyaml(file, filled), StoredFrames(store, layer))


@pytest.fixture(scope="module")
def source(toy_encoder, tmp_path_factory):
    return trained(tmp_path_factory.mktemp("source"), toy_encoder, 0, 0.1)


@pytest.fixture(scope="module")
def teacher(toy_encoder, tmp_path_factory):
    return trained(tmp_path_factory.mktemp("teacher"), toy_encoder, 1, -0.1)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Unlabelled recordings in a folder whose name YAML and SpeechBrain's flags could stumble over."""
    root = tmp_path_factory.mktemp("mine") / "lang=pl: #1"
    for emo in LABELS:
        for take in range(3):
            write_wav(root / f"{take}" / f"{LABELS.index(emo)}.wav", utterance(emo, 1, take))
    (root / "broken.wav").write_text("no audio")
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIFUSE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def adapted(source, teacher, recordings, cache, tmp_path_factory):
    """What the call gives."""
    return adapt(source, recordings, teacher=teacher, output_folder=tmp_path_factory.mktemp("run") / "out", **QUICK)


def folder_of(found):
    return found.recogniser.parent.parent


# The call.


def test_a_folder_without_labels_ends_in_a_recogniser_that_answers_as_the_run_predicted(adapted, recordings, source):
    recogniser = EmotionRecognizer.from_hparams(adapted.recogniser)
    predicted = json.loads((adapted.recogniser.parent / "predictions.json").read_text())
    assert len(predicted) == 12 and adapted.results["UA"] is None and adapted.results["n_train"] == 12
    for path in (recordings / "0").glob("*.wav"):
        key = f"folder-{recordings.name}/0/{path.name}"
        raw = recogniser.predict_proba(load_audio(path))[0]
        torch.testing.assert_close(raw, torch.tensor(predicted[key]), atol=0.02, rtol=0)
    weights = [load_file(folder / "classifier.safetensors")["hidden.weight"] for folder in (source, adapted.recogniser)]
    assert not weights[0].equal(weights[1])


def test_the_student_is_exported_with_its_sources_front_and_a_card_that_claims_no_score(adapted, source):
    text, before = ((folder / "hyperparams.yaml").read_text() for folder in (adapted.recogniser, source))

    def rest(yaml):
        return [line for line in yaml.splitlines() if not line.startswith("temperature")]

    assert rest(text) == rest(before)
    about = json.loads((adapted.recogniser / "about.json").read_text())
    assert about["adapted_from"] == recogniser_digest(source) and about["method"] == "mi_fuse_plus"
    card = (adapted.recogniser / "README.md").read_text()
    assert "Not scored" in card and "without their labels" in card and "no calibration in the strict sense" in card
    assert "UA " not in card


def test_the_verdict_is_written_beside_the_results(adapted):
    folder = folder_of(adapted)
    assert json.loads((folder / "verdict.json").read_text()) == adapted.verdict
    figures = adapted.verdict["figures"]
    assert figures["recordings"] == 12 and figures["answered_by_teacher"] == 1.0
    assert any(line.startswith("Only 12 recordings") for line in adapted.verdict["warnings"])
    assert "weak signs" in (folder / "verdict.md").read_text()
    assert (folder / "hyperparams.yaml").exists() and (folder / "labels.sqlite").exists()


def test_the_verdicts_warnings_are_on_the_page_and_on_the_card(adapted):
    (warning,) = [line for line in adapted.verdict["warnings"] if line.startswith("Only 12 recordings")]
    page = (folder_of(adapted) / "report.html").read_text()
    assert "Signs without labels" in page and f"<li>{warning}</li>" in page
    assert f"- {warning}" in (adapted.recogniser / "README.md").read_text()


def test_the_same_call_again_skips_everything_and_gives_the_same(
    adapted, source, teacher, recordings, cache, monkeypatch
):
    monkeypatch.setattr(brains.AdaptationBrain, "fit", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(EmotionServer, "start", lambda *_: pytest.fail("asked again"))
    digest, hook = recogniser_digest(adapted.recogniser), sys.excepthook
    again = adapt(source, recordings, teacher=teacher, output_folder=folder_of(adapted), **QUICK)
    assert again == adapted and recogniser_digest(again.recogniser) == digest and sys.excepthook is hook


def test_a_served_teacher_by_its_url_gives_the_same_student_from_the_command_line(
    adapted, source, teacher, recordings, cache, tmp_path, capsys
):
    with EmotionServer(EmotionRecognizer.from_hparams(teacher), "some-model") as server:
        flags = [f"--{key}={value}" for key, value in {**QUICK, "lalm_model": "some-model"}.items()]
        command = ["adapt", "--source", str(source), "--teacher", server.base_url, str(recordings)]
        main([*command, "--output_folder", str(tmp_path / "out"), *flags])
    shown = capsys.readouterr().out
    assert "Signs without labels" in shown and f"--source {tmp_path}/out/mi_fuse_plus/recogniser" in shown
    student = (tmp_path / "out" / "mi_fuse_plus" / "student.safetensors").read_bytes()
    assert student == (adapted.recogniser.parent / "student.safetensors").read_bytes()
    assert json.loads((tmp_path / "out" / "results.json").read_text())[-1]["teacher"] == "some-model"


def test_recordings_with_labels_are_scored_and_the_card_says_how_well(source, teacher, cache, tmp_path):
    for speaker in range(3):
        for emo in LABELS:
            write_wav(tmp_path / "mine" / f"s{speaker}" / emo / "1.wav", utterance(emo, speaker, 0))
    out = tmp_path / "out"
    found = adapt(source, tmp_path / "mine", teacher=teacher, output_folder=out, method="mi_fuse", **QUICK)
    assert 0 <= found.results["UA"] <= 1 and found.recogniser == out / "mi_fuse" / "recogniser"
    assert f"UA {100 * found.results['UA']:.1f} %" in (found.recogniser / "README.md").read_text()


def test_a_student_can_be_the_source_of_another_adaptation(adapted, teacher, recordings, cache, tmp_path):
    again = adapt(adapted.recogniser, recordings, teacher=teacher, output_folder=tmp_path / "again", **QUICK)
    about = json.loads((again.recogniser / "about.json").read_text())
    assert about["adapted_from"] == recogniser_digest(adapted.recogniser)


def test_the_page_about_use_runs_as_it_stands(source, teacher, recordings, cache, tmp_path, monkeypatch, capsys):
    for name, folder in (("source", source), ("teacher", teacher)):
        shutil.copytree(folder, tmp_path / "results" / "demo" / "1" / name / "recogniser")
    shutil.copytree(recordings, tmp_path / "recordings")
    shutil.copy(recordings / "0" / "0.wav", tmp_path / "recordings" / "a.wav")
    monkeypatch.chdir(tmp_path)
    page, found = (ROOT / "docs" / "use.md").read_text(), {}
    quick = "".join(f", {key}={value}" for key, value in QUICK.items())
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block.replace('teacher/recogniser")', f'teacher/recogniser"{quick})'), found)
    assert found["student"].labels == LABELS and "all of it: " in capsys.readouterr().out
    assert found["found"].recogniser == Path("results/adapted/recordings/mi_fuse_plus/recogniser")


# What does not fit.


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"source_checkpoint": "nowhere"}, "nowhere: no whole recogniser there"),
        ({"teacher": "nowhere"}, "--teacher: nowhere is neither a base URL"),
        ({"wav_folder": "nowhere"}, "nowhere: no such folder of recordings"),
        ({"data_folder": "nowhere"}, "--data_folder: the recordings are named once"),
        ({"number_of_steps": 0}, "--number_of_steps 0: must be a whole number of at least 1"),
        ({"number_of_steps": "abc"}, "--number_of_steps abc: must be a whole number of at least 1"),
        ({"batch_size": 1}, "--batch_size 1: must be a whole number of at least 2"),
        ({"lalm_samples": 0}, "--lalm_samples 0: must be"),
        ({"run_opts": {"device": "cuda:99"}}, "--device: cuda:99 cannot be used here"),
        ({"method": "source_only"}, "--method: name one method that trains a student"),
        ({"method": ["mi_fuse", "shot"]}, "--method: name one method"),
        ({"method": "mi_fuze"}, "--method: mi_fuze is none of"),
        ({"no_such_key": 1}, "--no_such_key: .* has no such key"),
        ({"batch_sise": 8}, "Did you mean --batch_size"),
    ],
)
def test_what_cannot_be_used_is_one_error_that_names_it(source, teacher, recordings, cache, tmp_path, changed, named):
    given = {"source_checkpoint": source, "wav_folder": recordings, "teacher": teacher, **QUICK, **changed}
    with pytest.raises(UserError, match=named):
        adapt(**given, output_folder=tmp_path / "out")


def test_an_output_folder_that_cannot_be_made_is_one_error(source, teacher, recordings, cache, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output_folder: .* cannot be written"):
        adapt(source, recordings, teacher=teacher, output_folder=tmp_path / "file" / "out", **QUICK)


def lone(folder, copies=1):
    """One recording, under several names."""
    for number in range(copies):
        write_wav(folder / f"{number}.wav", utterance("sad", 1, 0))
    return folder


@pytest.mark.parametrize("copies", [1, 3])
def test_one_recording_or_copies_of_one_are_refused_before_anybody_is_asked(
    copies, source, teacher, cache, tmp_path, monkeypatch
):
    monkeypatch.setattr(EmotionServer, "start", lambda *_: pytest.fail("asked"))
    with pytest.raises(UserError, match="1 usable recording, and training needs two different ones"):
        adapt(source, lone(tmp_path / "mine", copies), teacher=teacher, output_folder=tmp_path / "out", **QUICK)


def test_recordings_that_cannot_be_read_do_not_count(source, teacher, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(EmotionServer, "start", lambda *_: pytest.fail("asked"))
    (lone(tmp_path / "mine") / "broken.wav").write_text("no audio")
    with pytest.raises(UserError, match="1 usable recording, and training needs two different ones"):
        adapt(source, tmp_path / "mine", teacher=teacher, output_folder=tmp_path / "out", **QUICK)


def test_two_recordings_are_enough(source, teacher, cache, tmp_path):
    write_wav(lone(tmp_path / "mine") / "other.wav", utterance("angry", 2, 0))
    found = adapt(source, tmp_path / "mine", teacher=teacher, output_folder=tmp_path / "out", **QUICK)
    assert found.results["n_train"] == 2


def test_other_settings_in_an_output_folder_are_named_before_anything_in_it_changes(
    adapted, source, teacher, recordings, cache
):
    folder = folder_of(adapted)

    def times():
        # This process still logs to the first run's file.
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "log.txt"}

    before = times()
    for changed, said in (
        ({"number_of_steps": 30}, "number_of_steps: 20 -> 30"),
        ({"seed": 2}, "seed: 1 -> 2"),
        ({"lalm_samples": 4}, "lalm_samples: 3 -> 4"),
        ({"prepare_target": {"keep": {"sad": 0.5}}}, r"prepare_target: keep: null -> \{\"sad\": 0.5\}"),
    ):
        with pytest.raises(UserError, match=said):
            adapt(source, recordings, teacher=teacher, output_folder=folder, **{**QUICK, **changed})
    assert times() == before


def test_a_damaged_source_or_teacher_is_refused_before_anything_is_written(
    source, teacher, recordings, cache, tmp_path
):
    for role, good in (("source_checkpoint", source), ("teacher", teacher)):
        bad = shutil.copytree(good, tmp_path / role)
        (bad / "classifier.safetensors").write_bytes(b"torn")
        folders = {"source_checkpoint": source, "teacher": teacher, role: bad}
        with pytest.raises(UserError, match=f"--(source_recogniser|teacher): {re.escape(str(bad))}"):
            adapt(**folders, wav_folder=recordings, output_folder=tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()


def test_an_api_that_cannot_be_reached_or_lacks_a_key_is_refused_before_anything_is_encoded(
    source, recordings, cache, tmp_path, monkeypatch
):
    monkeypatch.setattr("speechbrain_mifuse.experiments.features.open_reader", lambda *_: pytest.fail("encoded"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    more = {"output_folder": tmp_path / "out", "lalm_model": "m", **QUICK}
    with pytest.raises(UserError, match=r"--lalm_base_url http://127.0.0.1:9/v1: cannot be reached"):
        adapt(source, recordings, teacher="http://127.0.0.1:9/v1", **more)
    with pytest.raises(UserError, match=r"--lalm_base_url https://some.host/v1: set .* OPENAI_API_KEY"):
        adapt(source, recordings, teacher="https://some.host/v1", **more)


def test_a_nearly_full_disk_is_said_at_the_beginning(source, teacher, recordings, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10 * 2**20))
    with pytest.raises(UserError, match="--output_folder: only 10 MiB are free"):
        adapt(source, recordings, teacher=teacher, output_folder=tmp_path / "out", **QUICK)


def test_where_labels_say_that_the_source_is_better_the_verdict_warns_of_it(tmp_path):
    for name, accuracy in (("mi_fuse", 0.4), ("source_only", 0.6), ("lalm_zero_shot", 0.3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "predictions.json").write_text('{"folder-a": [0.9, 0.1], "folder-b": [0.2, 0.8]}')
        (tmp_path / name / "results.json").write_text(json.dumps({"UA": accuracy}))
    verdict = judged(tmp_path, "mi_fuse", ["angry", "sad"])
    assert verdict["warnings"][0].endswith("student has UA 40.0 %, the source 60.0 %: keep the source.")
    assert not any("asking the teacher" in line for line in verdict["warnings"])
    assert "label some of the recordings" not in verdict["caveat"]
    assert "keep the source" in (tmp_path / "verdict.md").read_text()


def test_an_api_elsewhere_is_not_asked_for_a_model_without_a_name(source, recordings, cache, tmp_path):
    with pytest.raises(UserError, match=r"--lalm_model: name the model that https://some\.host/v1 is"):
        adapt(source, recordings, teacher="https://some.host/v1", output_folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_source_itself_or_other_classes_make_no_teacher(source, teacher, recordings, cache, tmp_path):
    with pytest.raises(UserError, match=r"--teacher: .* is the source itself"):
        adapt(source, recordings, teacher=source, output_folder=tmp_path / "out")
    other = shutil.copytree(teacher, tmp_path / "other")
    about = json.loads((other / "about.json").read_text())
    sizes = {**about["classifier"], "n_classes": 2}
    (other / "about.json").write_text(json.dumps({**about, "labels": ["calm", "tense"], "classifier": sizes}))
    with pytest.raises(UserError, match="knows calm, tense, and the source angry"):
        adapt(source, recordings, teacher=other, output_folder=tmp_path / "out")


def test_settings_and_steps_are_those_of_the_repository():
    assert adapt_module.SETTINGS == ROOT / "hparams" / "rav2folder.yaml"
    recipe = load_recipe("recipes/RAVDESS/mifuse/train.py")
    assert Path(recipe.__file__) == ROOT / "recipes" / "RAVDESS" / "mifuse" / "train.py"


def test_importing_the_module_loads_no_torch():
    code = "import sys, speechbrain_mifuse.experiments.adapt; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_page_on_an_own_recipe_adapts_a_recogniser(source, recordings, tmp_path, monkeypatch, capsys):
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "own_recipe.md").read_text(), re.DOTALL)[1]
    (tmp_path / "recordings").symlink_to(recordings)
    (tmp_path / "SOURCE").symlink_to(source)
    truth = {str(path.relative_to(recordings)): int(path.stem) for path in recordings.glob("*/*.wav")}
    answers = {name: [[0.8 if c == true else 0.2 / 3 for c in range(4)]] * 3 for name, true in truth.items()}
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "own_recipe.md", "exec"), names)
    said = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert said.keys() == truth.keys() and set(said.values()) <= set(LABELS)
    assert (
        not names["student"]
        .state_dict()["hidden.weight"]
        .equal(load_file(source / "classifier.safetensors")["hidden.weight"])
    )


# Students of any recipe are exported.


@pytest.fixture
def world(filled_store, tmp_path):
    return make_world(filled_store, tmp_path)


def test_every_trained_student_is_exported_and_nothing_that_trains_nothing(world):
    world.adapt("mi_fuse")
    world.adapt("source_only")
    folder = world.folder / "out" / "mi_fuse" / "recogniser"
    found = load_classifier(folder, LABELS, world.front.fingerprint)
    student = load_file(world.folder / "out" / "mi_fuse" / "student.safetensors")
    assert all(value.equal(student[name]) for name, value in found.state_dict().items())
    assert not (world.folder / "out" / "source_only" / "recogniser").exists()


def test_a_run_that_ended_before_students_were_exported_exports_it_when_run_again(world):
    predicted = world.adapt()
    folder = world.folder / "out" / "mi_fuse"
    student = (folder / "student.safetensors").read_bytes()
    digest = recogniser_digest(folder / "recogniser")
    shutil.rmtree(folder / "recogniser")
    assert world.adapt() == predicted and (folder / "student.safetensors").read_bytes() == student
    assert recogniser_digest(folder / "recogniser") == digest


def test_a_students_temperature_brings_it_near_both_teachers_without_a_label(world, monkeypatch):
    seen = []
    plain = ends.fit_temperature
    monkeypatch.setattr(ends, "fit_temperature", lambda *args: seen.append(args) or plain(*args))
    world.adapt("mi_fuse_plus", number_of_steps=40)
    ((probs, teachers),) = seen
    about = json.loads((world.folder / "out" / "mi_fuse_plus" / "recogniser" / "about.json").read_text())
    assert about["temperature"] == plain(probs, teachers) != 1.0
    assert mean_nll(probs, teachers, about["temperature"]) < mean_nll(probs, teachers)
    torch.testing.assert_close(teachers.sum(1), torch.ones(len(teachers)))


def test_a_student_that_asked_no_teacher_is_not_called_calibrated(world):
    world.adapt("shot")
    assert json.loads((world.folder / "out" / "shot" / "recogniser" / "about.json").read_text())["temperature"] == 1.0


# The verdict.


def said(classes, sureness=0.7):
    return torch.nn.functional.one_hot(torch.tensor(classes), 4) * sureness + (1 - sureness) / 4


FINE = [0, 1, 2, 3] * 25


def test_a_student_between_two_agreeing_teachers_gives_no_warning():
    teacher = [*FINE[:80], *FINE[1:21]]
    student = [*FINE[:80], *FINE[1:11], *FINE[90:]]
    assert judge(said(student), said(FINE), said(teacher), LABELS)["warnings"] == []


@pytest.mark.parametrize(
    ("student", "teacher", "told"),
    [
        ([0] * 100, FINE, "may have collapsed to one class"),
        ([0, 1, 2, 2] * 25, FINE, "never says 'sad', which a teacher gives to 25 %"),
        ([1, 2, 3, 0] * 25, FINE, "agrees with the source .* less than its two teachers"),
        ([1, 2, 3, 0] * 25, FINE, "100 % of the answers changed, and nothing here tells"),
        (FINE, FINE, "0 % of the answers changed"),
        (FINE, [1, 2, 3, 0] * 25, "hardly agree more than by chance"),
    ],
)
def test_a_sign_that_something_went_wrong_is_a_warning(student, teacher, told):
    found = judge(said(student), said(FINE), said(teacher), LABELS)["warnings"]
    assert re.search(told, "\n".join(found))


def test_a_silent_teacher_and_an_undecided_student_are_warned_of():
    teacher = said(FINE)
    teacher[30:] = 0
    found = judge(said(FINE, 0.01), said(FINE), teacher, LABELS)
    assert found["figures"]["answered_by_teacher"] == pytest.approx(0.3)
    assert any("answered 30 %" in line for line in found["warnings"])
    assert any("undecided" in line for line in found["warnings"])
