"""What the threat page says of strangers' files, tried out; and that what it points to is there."""

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from speechbrain.inference.interfaces import foreign_class
from speechbrain.utils.checkpoints import Checkpointer

from speechbrain_mifuse.adaptation.method import AdaptationMethod
from speechbrain_mifuse.brains.adaptation import MethodState
from speechbrain_mifuse.experiments.adapt import adapt, source_settings
from speechbrain_mifuse.experiments.settings import load_hparams
from speechbrain_mifuse.features.encoder import FrozenEncoder
from speechbrain_mifuse.inference import EmotionRecognizer
from speechbrain_mifuse.inference.recognizer_folder import (
    RECOGNIZER,
    RecogniserError,
    load_classifier,
    read_about,
    settings_text,
)
from speechbrain_mifuse.nnet.classifier import EmotionClassifier
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.schemas import TAGS

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "security.md"
LABELS = ("angry", "happy", "neutral", "sad")
SIZES = {"input_size": 16, "n_classes": 4, "hidden_size": 8, "dropout": 0.0, "n_layers": 1, "attention_size": 4}
# Tags of YAML that make Python objects of what they name.
TAG = re.compile(r"!(?:new|name|apply|module|include)\b:?[\w.]*")


class Evil:
    """What pickle makes a file of when it is told to."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path):
    """A file that is there once a stranger's code has run."""
    return tmp_path / "code_has_run"


@pytest.fixture
def folder(toy_encoder, tmp_path):
    """A recogniser as the recipes export it."""
    text = settings_text(LABELS, str(toy_encoder), [0], {**SIZES, "adapter": None}, 40.0)
    about = {"labels": list(LABELS), "features": {"encoder": "e"}, "classifier": SIZES}
    RECOGNIZER.write(tmp_path / "recogniser", EmotionClassifier(**SIZES).state_dict(), text, about)
    return tmp_path / "recogniser"


def test_the_evil_file_of_these_tests_is_one(mark):
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.exists()


def test_code_in_the_state_of_an_adaptation_is_refused(mark, tmp_path):
    torch.save({"seen": Evil(mark)}, tmp_path / "method.ckpt")
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        MethodState(AdaptationMethod(), "cpu").load(tmp_path / "method.ckpt", end_of_epoch=True)
    assert not mark.exists()


def test_code_in_a_checkpoint_of_speechbrain_is_refused(mark, tmp_path):
    network = torch.nn.Linear(1, 1)
    checkpoints = Checkpointer(tmp_path / "save", {"network": network})
    saved = checkpoints.save_checkpoint()
    torch.save({"weight": Evil(mark)}, saved.paramfiles["network"])
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        checkpoints.recover_if_possible()
    assert not mark.exists()


def test_code_in_the_weights_of_an_encoder_is_refused(mark, tmp_path, toy_encoder):
    encoder = shutil.copytree(toy_encoder, tmp_path / "encoder")
    (encoder / "model.safetensors").unlink()
    torch.save({"weight": Evil(mark)}, encoder / "pytorch_model.bin")
    with pytest.raises((pickle.UnpicklingError, OSError, ValueError, RuntimeError)):
        FrozenEncoder(encoder)
    assert not mark.exists()


def test_python_that_comes_with_an_encoder_is_not_run(mark, tmp_path, toy_encoder, monkeypatch):
    # transformers asks at the terminal, unless it is told not to.
    monkeypatch.setattr("builtins.input", lambda _: "y")
    encoder = shutil.copytree(toy_encoder, tmp_path / "encoder")
    config = json.loads((encoder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}}
    (encoder / "config.json").write_text(json.dumps(config))
    # A class of its own: transformers marks the one that it is given, for the rest of the process.
    code = f"import pathlib; pathlib.Path({str(mark)!r}).touch()\nimport transformers\n"
    code += "class Config(transformers.PretrainedConfig):\n    pass\n"
    (encoder / "mine.py").write_text(code)
    with pytest.raises(ValueError, match="trust_remote_code"):
        FrozenEncoder(encoder)
    assert not mark.exists()
    # The same file runs where it is allowed, so that this test can fail.
    transformers.AutoConfig.from_pretrained(encoder, trust_remote_code=True)
    assert mark.exists()


def test_weights_of_a_recogniser_that_are_a_pickle_are_refused(mark, folder):
    torch.save({"weight": Evil(mark)}, folder / "classifier.safetensors")
    with pytest.raises(RecogniserError, match="cannot be loaded"):
        EmotionRecognizer.from_hparams(folder)
    with pytest.raises(RecogniserError, match="cannot be loaded"):
        load_classifier(folder, LABELS, {"encoder": "e"})
    assert not mark.exists()


CODE = {
    "a call": "extra: !apply:os.mkdir [{mark}]",
    "a call deep inside": "extra: {{a: [1, {{b: !apply:os.mkdir [{mark}]}}]}}",
    "a call as a key": "? !apply:os.mkdir [{mark}]\n: 1",
    "an object": "extra: !new:pathlib.Path [{mark}]",
    "another file": "extra: !include:{mark}",
    "a tag written out": "extra: !<!apply:os.mkdir> [{mark}]",
    "python's own tag": "extra: !!python/object/apply:os.mkdir [{mark}]",
    "a part of ours that is not a recogniser's": "extra: !name:speechbrain_mifuse.utils.files.atomic_write",
    "in a list that holds itself": "extra: &x [*x, !apply:os.mkdir [{mark}]]",
    "round brackets": "extra: (!!python/object/apply:os.mkdir [{mark}])",
    "round brackets in quotes": "extra: \"(!!python/object/apply:os.mkdir ['{mark}'])\"",
    "round brackets in a list": "extra: [1, '(!!python/object/apply:os.mkdir [{mark}])']",
    "round brackets as a key": "? '(!!python/object/apply:os.mkdir [{mark}])'\n: 1",
    "round brackets put together": "extra: (!!python/object/apply\nmore: !ref '<extra>:os.mkdir [{mark}])'",
    "an attribute": "extra: !ref <classifier.__class__>",
    "arithmetic without an end": "extra: !ref <sample_rate> ** <sample_rate> ** <sample_rate> ** <sample_rate>",
}
# The same in place of a value that is known: the key tells nothing.
IN_PLACE = {
    "the encoder": ("source: .*", "source: (!!python/object/apply:os.mkdir [{mark}])"),
    "the labels": ("labels: .*", "labels: ['(!!python/object/apply:os.mkdir [{mark}])', b, c, d]"),
    "a number": ("temperature: .*", "temperature: (!!python/object/apply:os.mkdir [{mark}])"),
    "the wiring": ("encoder: !ref .*", "encoder: (!!python/object/apply:os.mkdir [{mark}])"),
}


@pytest.mark.parametrize("what", CODE)
def test_a_recogniser_whose_yaml_names_other_code_is_refused_unless_it_is_trusted(what, mark, folder):
    path = folder / "hyperparams.yaml"
    path.write_text(path.read_text() + CODE[what].format(mark=mark) + "\n")
    with pytest.raises(RecogniserError, match="trust_code=True"):
        EmotionRecognizer.from_hparams(folder)
    assert not mark.exists()


@pytest.mark.parametrize("what", IN_PLACE)
def test_code_in_place_of_a_value_of_a_recogniser_is_refused(what, mark, folder):
    path = folder / "hyperparams.yaml"
    pattern, code = IN_PLACE[what]
    path.write_text(re.sub(pattern, code.format(mark=mark), path.read_text()))
    for load in (EmotionRecognizer.from_hparams, lambda source: source_settings(source, read_about(source))):
        with pytest.raises(RecogniserError, match=f"{path}: "):
            load(folder)
    assert not mark.exists()


def test_round_brackets_run_in_a_trusted_recogniser_so_that_these_tests_can_fail(mark, folder):
    path = folder / "hyperparams.yaml"
    path.write_text(path.read_text() + CODE["round brackets"].format(mark=mark) + "\n")
    EmotionRecognizer.from_hparams(folder, trust_code=True)
    assert mark.exists()


@pytest.mark.parametrize("code", ["!apply:os.mkdir [{mark}]", "(!!python/object/apply:os.mkdir [{mark}])"])
@pytest.mark.parametrize("key", ["corpus", "labels"])
def test_code_in_about_json_does_not_reach_the_yaml_of_an_adaptation(code, key, mark, folder):
    about, code = json.loads((folder / "about.json").read_text()), code.format(mark=mark)
    about[key] = [code, *LABELS[1:]] if key == "labels" else code
    (folder / "about.json").write_text(json.dumps(about))
    with pytest.raises(RecogniserError, match=rf"about.json: {key}"):
        adapt(folder, folder, teacher="http://127.0.0.1:9/v1", output_folder=folder / "out")
    assert not mark.exists()


def test_the_yaml_of_a_trusted_recogniser_runs_whatever_it_names(mark, folder):
    path = folder / "hyperparams.yaml"
    path.write_text(path.read_text() + f"extra: !apply:os.mkdir [{mark}]\n")
    EmotionRecognizer.from_hparams(folder, trust_code=True)
    assert mark.exists()


def test_the_yaml_of_a_recipe_and_a_flag_run_whatever_they_name(mark, tmp_path):
    (tmp_path / "mine.yaml").write_text("depth: 1\n")
    load_hparams(tmp_path / "mine.yaml", ["--depth", f"!apply:os.mkdir [{mark}]"])
    assert mark.exists()


def test_custom_py_of_a_recogniser_is_run_by_foreign_class_and_by_nothing_else(mark, folder):
    (folder / "custom.py").write_text(f"import pathlib; pathlib.Path({str(mark)!r}).touch()\n")
    EmotionRecognizer.from_hparams(folder)
    assert not mark.exists()
    with pytest.raises(AttributeError):
        foreign_class(source=str(folder), pymodule_file="custom.py", classname="CustomInterface")
    assert mark.exists()


def test_a_classifier_is_loaded_without_its_yaml_or_its_python(mark, folder):
    (folder / "hyperparams.yaml").write_text(f"extra: !apply:os.mkdir [{mark}]\n")
    (folder / "custom.py").write_text(f"import pathlib; pathlib.Path({str(mark)!r}).touch()\n")
    classifier = load_classifier(folder, LABELS, {"encoder": "e"})
    assert isinstance(classifier, EmotionClassifier) and not mark.exists()


def test_a_recogniser_of_ours_holds_the_tags_that_the_page_lists_and_no_other(folder):
    listed = set(re.findall(r"`(!(?:new|name):speechbrain_mifuse[\w.]+)`", PAGE.read_text(encoding="utf-8")))
    text = (folder / "hyperparams.yaml").read_text()
    assert set(TAG.findall(text)) == listed and len(listed) == 4
    older = {"!ref", "!new:speechbrain.utils.parameter_transfer.Pretrainer"}
    older |= {"!new:speechbrain_mifuse.recogniser_files.FolderPretrainer"}
    assert TAGS - listed == older | {"!name:speechbrain_mifuse.recogniser_files.load_weights"}


def test_overrides_of_the_python_call_cannot_be_read_from_the_folder(folder):
    with pytest.raises((KeyError, UserError)):
        EmotionRecognizer.from_hparams(folder, overrides={"no_such_key": 1})


@pytest.mark.parametrize("name", ["security.md", "reliability.md"])
def test_everything_that_the_page_points_to_is_there(name):
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    named = re.findall(r"\b(test_\w+)::(test_\w+)", text)
    assert len(named) > 15
    paths = [path for folder in ("unit", "recipes") for path in (ROOT / "tests" / folder).glob("test_*.py")]
    files = {path.stem: path.read_text(encoding="utf-8") for path in paths}
    assert not [name for file, name in named if not re.search(rf"^(async )?def {name}\(", files[file], re.MULTILINE)]
    for module, thing in re.findall(r"`(\w+(?:/\w+)*\.py):(\w+)`", text):
        code = (ROOT / "speechbrain_mifuse" / module).read_text(encoding="utf-8")
        assert re.search(rf"\b(def|class) {thing}\b|^{thing}\b.*=", code, re.MULTILINE), (module, thing)


def test_each_claim_of_the_page_on_reliability_names_the_test_that_holds_it():
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    claims, limits = text.split("\n## Not protected from\n")
    entries = re.findall(r"(?m)^- .*(?:\n  .*)*", claims)
    assert len(entries) > 25 and not [entry for entry in entries if not re.search(r"\[test_\w+::test_\w+", entry)]
    assert "no test holds them" in limits
