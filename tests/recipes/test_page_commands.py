"""The commands of README and docs, run as they stand there: on toy corpora, with a server here as the API."""

import csv
import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import processes
import pytest
import soundfile
from batch_server import simulated_batch_server
from toy_corpora import LABELS, utterance, write_wav

from speechbrain_mifuse.inference import EmotionRecognizer
from speechbrain_mifuse.inference.server import EmotionServer

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODEL = "some-model"
FENCED = re.compile(r"^ *```\w*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^ {4}\S.*\n)+", re.MULTILINE)
GENERATED = re.compile(r"<!-- begin (.*?) -->.*?<!-- end \1 -->", re.DOTALL)
# Lines that no test runs as they stand: they set up an environment, are the tests themselves, need several processes or
# a cluster, or are long. Other tests run what the long ones call (recipes, sweeps, faults) on toy corpora.
NOT_RUN = "make|pip|python -m pytest|python3 -m venv|export|pre-commit|ruff|torchrun|tensorboard|sbatch"
# Commands that need a corpus in its own format and some time: the recipes' tests run every registry row.
TINY = ["--encoder", "ENCODER", "--encoder_layers", "[0, 1]", "--layer", "0", "--batch_size", "12"]
TINY += ["--number_of_steps", "20", "--learning_rate", "0.003"]
QUICK = "{number_of_epochs: 20, batch_size: 12, learning_rate: 0.005}"
PAIR = [*TINY, "--teacher_layer", "1", "--source_classifier", QUICK, "--teacher_classifier", QUICK]


def lines_of(path):
    """Lines of a page's blocks of code, continued ones joined."""
    text = GENERATED.sub("", path.read_text(encoding="utf-8")).replace("\\\n", " ")
    blocks = [*FENCED.findall(text), *INDENTED.findall(FENCED.sub("", text))]
    return [line.strip() for block in blocks for line in block.splitlines()]


COMMANDS = sorted({line for path in PAGES for line in lines_of(path) if line.startswith("speechbrain-mifuse ")})
RECIPES = sorted({line for path in PAGES for line in lines_of(path) if re.match(r"python recipes/", line)})


CONSOLE_SCRIPT = "from speechbrain_mifuse.cli.main import main\n\nmain()\n"


class World:
    """A folder that has what the pages speak of, and an API on this machine."""

    def __init__(self, folder, data_folder, encoder):
        self.folder, self.data_folder, self.encoder, self.count = folder, data_folder, encoder, 0
        self.base_url = self.batch_url = ""
        for name in ("recipes", "hparams", "benchmarks"):
            (folder / name).symlink_to(ROOT / name)
        (folder / "command.py").write_text(CONSOLE_SCRIPT)

    def __call__(self, script, words, may_say=(), stop_after=None):
        """Run a script in a process that has everything imported; it succeeds, or says what it may say.

        A server is told to end when it has said `stop_after`.
        """
        self.count += 1
        log = Path(self.folder / f"log{self.count}")
        environment = {**os.environ, "MIFUSE_CACHE": str(self.folder / "cache"), "OPENAI_API_KEY": "not-a-key"}
        process = processes.start(processes.run_script, script, words, str(self.folder), environment, str(log))
        if stop_after:
            out = log.with_suffix(".out")
            while process.is_alive() and not (out.exists() and stop_after in out.read_text()):
                process.join(0.2)
            process.terminate()
        process.join(200)
        told = log.with_suffix(".out").read_text() + log.with_suffix(".err").read_text()
        assert process.exitcode == 0 or any(text in told for text in may_say), told[-3000:]

    def forget_adapted(self):
        """An adaptation with another teacher is, rightly, refused where an earlier one stands."""
        shutil.rmtree(self.folder / "results" / "adapted" / "recordings", ignore_errors=True)

    def words(self, command):
        """Words of a command, with this world's places in the place of the page's."""
        found = shlex.split(command, comments=True)[1:]
        places = {"/path/to/corpora": str(self.data_folder), "https://HOST/v1": self.base_url, "NAME": MODEL}
        places |= {"8000": "0"}  # a port that is free here
        places |= {"$SLURM_ARRAY_TASK_ID/4": "2/4", "/shared/features": str(self.folder / "features")}
        places |= {"SOURCE": "results/nemo2rav/1/source/recogniser", "FOLDER": "results/nemo2rav/1/source/recogniser"}
        found = [places.get(word, word) for word in found]
        if any("lalm/" in word for word in found):  # A provider's profile: its address alone is another.
            found += [
                "--lalm_base_url",
                self.batch_url if found[0] == "batch" else self.base_url,
                "--lalm_model",
                MODEL,
            ]
        if any(word.startswith("hparams/nemo2rav") for word in found):
            found += [str(self.encoder) if word == "ENCODER" else word for word in PAIR]
        if found[0] == "collect" and "--dry_run" not in found:
            found += ["--lalm_samples", "2"]  # A profile's calls a minute are kept, whatever the server.
        if found[0] == "adapt":
            self.forget_adapted()
            found += ["--number_of_steps", "10", "--batch_size", "12"]
        return found


def answered(body):
    """What a provider's batch says of a recording."""
    said = {"role": "assistant", "content": '{"angry": 0.1, "happy": 0.2, "neutral": 0.3, "sad": 0.4}'}
    choices = [{"index": place, "finish_reason": "stop", "message": said} for place in range(body.get("n", 1))]
    return 200, {"id": "c", "object": "chat.completion", "created": 1, "model": MODEL, "choices": choices}


@pytest.fixture(scope="module")
def world(toy_folder, toy_encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    made = World(folder, toy_folder, toy_encoder)
    flags = [str(toy_encoder) if word == "ENCODER" else word for word in PAIR]
    words = ["hparams/nemo2rav.yaml", "--data_folder", str(toy_folder), "--method", "[source_only, mi_fuse]", *flags]
    made("recipes/RAVDESS/mifuse/train.py", words)
    results = folder / "results"
    (results / "demo").symlink_to(results / "nemo2rav")
    for name, part in (("classifier_nemo", "teacher"), ("adapted", "mi_fuse")):
        inner = {"classifier_nemo": "1/classifier", "adapted": "recordings/mi_fuse_plus"}[name]
        shutil.copytree(results / "nemo2rav" / "1" / part / "recogniser", results / name / inner / "recogniser")
    for name in ("recordings", "new_recordings", "some_recordings"):
        for place, emo in enumerate(LABELS):
            for take in range(4):
                write_wav(folder / name / f"{place}{take}.wav", utterance(emo, 1, take))
    write_wav(folder / "recordings" / "a.wav", utterance("sad", 2, 0))
    soundfile.write(folder / "call.mp3", utterance("happy", 2, 0), 16000)
    for name in ("some_speech.wav", "one_recording.wav"):
        write_wav(folder / name, np.tile(utterance("happy", 3, 1), 6))
    for name in ("labels", "shard1", "shard2"):
        shutil.copy(results / "nemo2rav" / "1" / "labels.sqlite", folder / f"{name}.sqlite")
    shutil.copy(results / "nemo2rav" / "1" / "manifests" / "target" / "adapt_unlabelled.json", folder)
    shutil.copy(results / "nemo2rav" / "1" / "manifests" / "target" / "corpus.json", folder)
    listener = EmotionRecognizer.from_hparams(results / "nemo2rav" / "1" / "teacher" / "recogniser")
    with EmotionServer(listener, MODEL) as server, simulated_batch_server(answered) as batches:
        made.base_url, made.batch_url = server.base_url, batches.url
        yield made


# Later commands use what earlier ones left.
ORDER = ("probe", "collect", "labels show", "labels check", "labels export", "labels", "predict", "adapt", "report")


def place(command):
    words = command.removeprefix("speechbrain-mifuse ")
    return next((number for number, start in enumerate(ORDER) if words.startswith(start)), len(ORDER))


@pytest.mark.parametrize("command", sorted(COMMANDS, key=lambda command: (place(command), len(command))))
def test_a_command_of_the_pages_runs_as_it_is_written(command, world):
    # A server that is not the profile's lacks what the profile promises; and the sweep's runs were not run here.
    may_say = {" probe ": ["lacks what the collection needs"], " --collect": ["330 of 330 results are missing"]}
    may_say = [text for part, texts in may_say.items() if part in command for text in texts]
    stop_after = "Ctrl-C stops it" if " serve " in command else None
    world("command.py", world.words(command), may_say, stop_after)


def test_the_pages_python_runs_as_it_is_written(world, monkeypatch):
    monkeypatch.chdir(world.folder)
    monkeypatch.setenv("MIFUSE_CACHE", str(world.folder / "cache"))
    world.forget_adapted()
    text = (ROOT / "docs" / "use.md").read_text(encoding="utf-8")
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        exec(block.replace('recogniser")\nstudent', 'recogniser", number_of_steps=10, batch_size=12)\nstudent'), names)
    assert names["student"].labels == LABELS


def test_a_recipe_of_the_pages_is_a_registered_one():
    rows = [row for path in (ROOT / "tests" / "recipes").glob("*.csv") for row in csv.DictReader(path.open())]
    registered = {(row["Script_file"], row["Hparam_file"]) for row in rows}
    shown = {tuple(shlex.split(line)[1:3]) for line in RECIPES}
    assert len(shown) > 5 and not shown - registered


def test_every_other_line_that_looks_like_a_command_is_of_a_known_kind():
    start = re.compile(r"(python3?|make|pip|torchrun|pre-commit|ruff|git|export|tensorboard|bash|sh|sbatch) [\w\"\-./]")
    lines = {line for path in PAGES for line in lines_of(path) if start.match(line)}
    rest = {line for line in lines if not re.match(rf"({NOT_RUN})\b", line) and line not in RECIPES}
    assert not {line for line in rest if not re.match(r"python benchmarks/\w+\.py", line)}
