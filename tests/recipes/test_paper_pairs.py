"""The six transfers of the paper, CREMA-D and a user's folder, run on small trees of the releases' own form."""

import csv
import doctest
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import processes
import pytest
from toy_corpora import LABELS, utterance, write_crema_d, write_hubert, write_paper_corpora, write_wav

from speechbrain_mifuse import corpora
from speechbrain_mifuse.inference import EmotionRecognizer
from speechbrain_mifuse.inference.server import EmotionServer

ROOT = Path(__file__).parents[2]
LONG = pytest.mark.long
PAPER_PAIRS = ("imp2iem", "msp2iem", "iem2imp", "msp2imp", "iem2msp", "imp2msp")
MODEL = "Qwen/Qwen2-Audio-7B-Instruct"
METHODS = ["lalm_zero_shot", "mi_fuse"]
QUICK = "{number_of_epochs: 8, batch_size: 12, learning_rate: 0.01}"
STEPS = {"number_of_steps": 16, "batch_size": 12, "learning_rate": 0.003, "passes": 4, "lalm_samples": 2}
TRAINING = {"source_classifier": QUICK, "teacher_classifier": QUICK, **STEPS}
HUBERT = {"encoder_layers": "[2]", "layer": 2, "teacher_layer": 2}
# Known speakers to adapt to and to test on in the small trees.
SPEAKERS = {"iem": ("6", "4"), "imp": ("8", "4"), "msp": ("2", "2")}


def command_of(pair):
    """Script and arguments of the first command in a YAML file's header, up to the data folder."""
    lines = (ROOT / "hparams" / f"{pair}.yaml").read_text(encoding="utf-8").splitlines()
    words = next(line for line in lines if "python recipes/" in line).removeprefix("#").split()
    assert words[0] == "python" and words[3] == "--data_folder"
    return words[1:4]


class Runner:
    """Runs a pair on small corpora; what it wrote lies in a folder named after the pair."""

    def __init__(self, folder):
        self.folder, self.corpora, self.hubert = folder, folder / "corpora", folder / "hubert"
        write_paper_corpora(self.corpora)
        write_hubert(self.hubert)
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("OPENAI_", "MIFUSE_"))}
        self.environment = {**kept, **processes.ONE_THREAD, "MIFUSE_CACHE": str(folder / "cache")}

    def arguments(self, pair, data_folder, methods=METHODS, name=None, **flags):
        output = self.folder / (name or pair)
        flags = {"output_folder": output, "encoder": self.hubert, "method": f"[{', '.join(methods)}]", **flags}
        words = [*command_of(pair), str(data_folder)]
        return output, [*words, *(text for flag, value in flags.items() for text in (f"--{flag}", str(value)))]

    def __call__(self, pair, data_folder=None, **flags):
        """Run in a process that has everything imported already; gives the output folder and what was said."""
        output, (script, *rest) = self.arguments(pair, data_folder or self.corpora, **flags)
        log = f"{output}.log"
        process = processes.start(processes.run_script, script, rest, str(ROOT), self.environment, log)
        process.join(300)
        said = Path(f"{log}.out").read_text() + Path(f"{log}.err").read_text()
        assert process.exitcode == 0, said
        return output, said


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Runner(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def typed(run):
    """MSP-Podcast to IEMOCAP, as its header says: (folder, what was said)."""
    assert command_of("msp2iem")[:2] == ["recipes/IEMOCAP/mifuse/train.py", "hparams/msp2iem.yaml"]
    return run("msp2iem", lalm_base_url="null", **HUBERT, **TRAINING)


def results(folder, method):
    return json.loads((folder / method / "results.json").read_text())


def about(folder, role):
    return json.loads((folder / "manifests" / role / "corpus.json").read_text())


@pytest.mark.parametrize("pair", [pytest.param(pair, marks=[] if pair == "msp2iem" else LONG) for pair in PAPER_PAIRS])
def test_a_pair_of_the_paper_runs_from_its_header_to_results(pair, run, request):
    folder = (
        request.getfixturevalue("typed")[0]
        if pair == "msp2iem"
        else run(pair, lalm_base_url="null", **HUBERT, **TRAINING)[0]
    )
    names = {"iem": "iemocap", "imp": "msp_improv", "msp": "msp_podcast"}
    source, target = pair.split("2")
    third = (set(names) - {source, target}).pop()
    for method in METHODS:
        found = results(folder, method)
        assert (found["source"], found["target"], found["teacher"]) == (names[source], names[target], names[third])
        assert found["UA"] > 0.3 and sum(map(sum, found["confusion"])) == found["n_test"]
        assert found["encoder"] == f"{run.hubert.name}, layer 2, frozen"
    adapted, tested = SPEAKERS[target]
    assert f"{adapted} speakers to adapt, {tested} others to test" in results(folder, "mi_fuse")["protocol"]
    assert ("2 of 32 recordings without a known speaker" in results(folder, "mi_fuse")["protocol"]) == (target == "msp")
    assert "release_check" in about(folder, "target") or about(folder, "target")["release"] == "1.12"


def test_a_release_of_other_size_is_said_in_the_log_and_kept(typed):
    folder, said = typed
    check = about(folder, "target")["release_check"]
    assert "5531 utterances expected, 80 found" in said and "Ses05: expected 1241, found 16" in said
    assert (check["total_expected"], check["total_found"], check["matches"]) == (5531, 80, False)
    assert about(folder, "source")["release"] == "1.12"


def test_the_default_teacher_is_asked_by_its_name_and_no_corpus_but_the_target_is_needed(typed, run, tmp_path):
    folder, _ = typed
    (tmp_path / "IEMOCAP_full_release").symlink_to(run.corpora / "IEMOCAP_full_release")
    given = {"source_recogniser": folder / "source" / "recogniser", **HUBERT, **STEPS}
    with EmotionServer(EmotionRecognizer.from_hparams(folder / "teacher" / "recogniser"), MODEL) as server:
        found, _ = run("msp2iem", tmp_path, name="asked", lalm_base_url=server.base_url, **given)
    assert results(found, "mi_fuse")["teacher"] == MODEL
    assert results(found, "lalm_zero_shot")["UA"] == results(folder, "lalm_zero_shot")["UA"]
    assert not (found / "teacher").exists() and not (found / "source").exists()


@LONG
def test_corpora_may_lie_at_different_places(typed, run, tmp_path):
    names = ("IEMOCAP_full_release", "MSP-PODCAST-Publish-1.12", "MSP-IMPROV")
    places = [tmp_path / str(number) / name for number, name in enumerate(names)]
    for place in places:
        place.parent.mkdir()
        place.symlink_to(run.corpora / place.name)
    flags = {"source_data_folder": places[1], "teacher_data_folder": places[2], "lalm_base_url": "null"}
    apart, _ = run("msp2iem", places[0], methods=["lalm_zero_shot"], name="apart", **flags, **HUBERT, **TRAINING)
    assert results(apart, "lalm_zero_shot")["UA"] == results(typed[0], "lalm_zero_shot")["UA"]


def test_class_skew_is_a_flag_and_is_recorded(typed, run):
    source = {"source_recogniser": typed[0] / "source" / "recogniser", **HUBERT}
    skew = {"prepare_target": "{keep: {happy: 0.25}}"}
    folder, _ = run("msp2iem", methods=["source_only"], name="skewed", **source, **skew)
    assert about(folder, "target")["keep"] == {"happy": 0.25}
    assert about(folder, "target")["counts"]["adapt"] == {"angry": 12, "happy": 3, "neutral": 12, "sad": 12}
    assert about(folder, "target")["counts"]["test"] == dict.fromkeys(LABELS, 8)


def test_partitions_to_adapt_to_are_a_flag(run, typed):
    source = {"source_recogniser": typed[0] / "source" / "recogniser", **HUBERT}
    chosen = {"prepare_target": "{splits: {adapt: [Train, Development], test: [Test1]}}"}
    folder, _ = run("iem2msp", methods=["source_only"], name="partitions", **source, **chosen)
    assert about(folder, "target")["partitions"] == {"adapt": ["Train", "Development"], "test": ["Test1"]}
    assert sum(about(folder, "target")["counts"]["adapt"].values()) == 56


OPEN = {"encoder_layers": "[0, 1]", "layer": 0, "teacher_layer": 1, **TRAINING}


@LONG
def test_crema_d_is_adapted_to(run, toy_folder, toy_encoder, tmp_path):
    data = shutil.copytree(toy_folder, tmp_path / "data")
    write_crema_d(data / "CREMA-D")
    folder, _ = run("rav2crema", data, **{**OPEN, "encoder": toy_encoder})
    found = results(folder, "mi_fuse")
    assert (found["source"], found["target"], found["teacher"]) == ("ravdess", "crema_d", "nemo")
    assert found["n_train"] == 36 and found["n_test"] == 24 and found["UA"] > 0.3


def test_a_folder_of_labelled_recordings_is_adapted_to(run, toy_folder, toy_encoder, tmp_path):
    for speaker, emo in ((speaker, emo) for speaker in range(5) for emo in LABELS):
        write_wav(tmp_path / "mine" / f"person {speaker}" / emo / "1.flac", utterance(emo, speaker, 1))
    places = {"source_data_folder": toy_folder, "teacher_data_folder": toy_folder, "encoder": toy_encoder}
    folder, _ = run("rav2folder", tmp_path / "mine", **OPEN, **places)
    found = results(folder, "mi_fuse")
    assert (found["target"], found["n_train"], found["n_test"], found["test_speakers"]) == ("folder", 12, 8, 2)


def test_a_folder_of_unlabelled_recordings_is_adapted_to_and_predicted(run, toy_folder, toy_encoder, tmp_path):
    for number in range(12):
        write_wav(tmp_path / "mine" / f"{number}.wav", utterance(LABELS[number % 4], number, 1))
    places = {"source_data_folder": toy_folder, "teacher_data_folder": toy_folder, "encoder": toy_encoder}
    folder, _ = run("rav2folder", tmp_path / "mine", methods=["mi_fuse"], name="unlabelled", **OPEN, **places)
    predictions = json.loads((folder / "mi_fuse" / "predictions.json").read_text())
    assert sorted(predictions) == sorted(f"folder-mine/{number}.wav" for number in range(12))
    assert about(folder, "target")["labelled"] is False


def registered(path):
    """Rows of a registry file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    "corpus", ["IEMOCAP", *(pytest.param(name, marks=LONG) for name in ("MSP-IMPROV", "MSP-Podcast", "CREMA-D"))]
)
def test_a_classifier_is_trained_as_its_registry_row_says(corpus, run, tmp_path):
    rows = registered(ROOT / "tests" / "recipes" / f"{corpus}.csv")
    row = next(row for row in rows if "classifier" in row["Script_file"])
    data = run.corpora
    if corpus == "CREMA-D":
        data = write_crema_d(tmp_path / "CREMA-D")
    flags = [word for pair in shlex.split(row["test_debug_flags"]) for word in pair.split("=", 1)]
    flags += ["--data_folder", str(data), "--output_folder", str(tmp_path / "out"), "--encoder", str(run.hubert)]
    flags += ["--encoder_layers", "[2]", "--layer", "2"]
    log = str(tmp_path / "log")
    words = [row["Hparam_file"], *flags]
    process = processes.start(processes.run_script, row["Script_file"], words, str(ROOT), run.environment, log)
    process.join(300)
    assert process.exitcode == 0, Path(f"{log}.err").read_text()
    wanted = row["test_debug_checks"].removeprefix("file_exists=[").removesuffix("]").split(",")
    assert wanted and not [name for name in wanted if not (tmp_path / "out" / name).exists()]


# The page on adding a corpus is applied as it stands.

BLOCK = re.DOTALL | re.MULTILINE


def applied(page, overlay):
    """Write what the page's blocks say into an overlay of the repository, and make the pair's YAML file."""
    shutil.copytree(ROOT / "hparams" / "base", overlay / "hparams" / "base")
    ends = {"corpora": "\n# Anything of its family", "pairs": None}
    for path, within, text in re.findall(
        r"^`([^`\n]+)`(?:, at the end of `(\w+):`)?\n\n```\w+\n(.*?)^```$", page, BLOCK
    ):
        (overlay / path).parent.mkdir(parents=True, exist_ok=True)
        if within:
            table = (overlay / path).read_text(encoding="utf-8")
            end = table.index(ends[within]) if ends[within] else len(table)
            text = table[:end] + text + table[end:]
        (overlay / path).write_text(text, encoding="utf-8")
    subprocess.run([sys.executable, overlay / "hparams" / "base" / "pairs.py"], check=True)
    return ["speechbrain_mifuse/corpora/savee.py", "hparams/rav2savee.yaml", "tests/recipes/SAVEE.csv"]


def run_overlay(overlay, *arguments):
    """As `run_script`, with the overlay's corpora beside the package's."""
    corpora.__path__.append(f"{overlay}/speechbrain_mifuse/corpora")
    processes.run_script(*arguments)


def test_the_page_on_adding_a_corpus_adds_a_corpus_that_runs(run, toy_folder, toy_encoder, tmp_path):
    overlay = tmp_path / "overlay"
    paths = applied((ROOT / "docs" / "adding_a_corpus.md").read_text(encoding="utf-8"), overlay)
    (overlay / "hparams" / "lalm").symlink_to(ROOT / "hparams" / "lalm")
    (overlay / "recipes").symlink_to(ROOT / "recipes")
    (row,) = registered(overlay / paths[2])
    assert list(row) == list(registered(ROOT / "tests" / "recipes" / "CREMA-D.csv")[0])
    assert (row["Data_prep_file"], row["Hparam_file"]) == (paths[0], paths[1])

    data = shutil.copytree(toy_folder, tmp_path / "data")
    for letters, emo in (("a", "angry"), ("h", "happy"), ("n", "neutral"), ("sa", "sad"), ("su", "sad"), ("d", "sad")):
        for number, speaker in enumerate(("DC", "JE", "JK", "KL")):
            wav = data / "SAVEE" / "AudioData" / speaker / f"{letters}01.wav"
            write_wav(wav, utterance(emo, number, len(letters)))
    flags = {"data_folder": data, "output_folder": tmp_path / "out", "encoder": toy_encoder, **OPEN}
    words = [row["Hparam_file"], *shlex.split(row["test_debug_flags"].replace("=", " "))]
    words += [text for flag, value in flags.items() if f"--{flag}" not in words for text in (f"--{flag}", str(value))]
    log = str(tmp_path / "log")
    arguments = (row["Script_file"], words, str(overlay), run.environment, log)
    process = processes.start(run_overlay, str(overlay), *arguments)
    process.join(300)
    assert process.exitcode == 0, Path(f"{log}.out").read_text() + Path(f"{log}.err").read_text()
    found = results(tmp_path / "out", "mi_fuse")
    assert (found["target"], found["n_train"], found["n_test"]) == ("savee", 8, 8)
    wanted = row["test_debug_checks"].removeprefix("file_exists=[").removesuffix("]").split(",")
    assert not [name for name in wanted if not (tmp_path / "out" / name).exists()]


def test_the_example_in_the_new_corpus_file_of_that_page_is_true(tmp_path):
    (path, *_) = applied((ROOT / "docs" / "adding_a_corpus.md").read_text(encoding="utf-8"), tmp_path)
    spec = importlib.util.spec_from_file_location("savee", tmp_path / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert doctest.testmod(module) == (0, 5)
