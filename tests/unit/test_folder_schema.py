"""Files of a model folder that do not fit: each is one error that names the file and the key."""

import json
import os
import re
import struct

import pytest
import torch
from folder_fuzz import write_recognizer
from hyperpyyaml import load_hyperpyyaml
from safetensors.torch import load, save
from speechbrain.inference.interfaces import foreign_class

from speechbrain_mifuse.corpora.manifest import CorpusError, read_manifest
from speechbrain_mifuse.inference import EmotionRecognizer
from speechbrain_mifuse.inference.recognizer_folder import (
    RecogniserError,
    load_classifier,
    read_about,
    recogniser_digest,
)
from speechbrain_mifuse.nnet.adapter_files import AdapterError, export_adapter, load_adapter
from speechbrain_mifuse.nnet.dual_encoder import DualEncoder
from speechbrain_mifuse.nnet.wap_transformer import WAPTransformer
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.zero_shot.own_dual_encoder import (
    DualEncoderError,
    export_dual_encoder,
    load_dual_encoder,
    toy_about,
)
from speechbrain_mifuse.zero_shot.prompts import read_prompts

LABELS = ("angry", "happy", "neutral", "sad")
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture
def folder(tmp_path):
    """A recognizer with its encoder."""
    return write_recognizer(tmp_path / "recognizer")


def replaced(path, pattern, value):
    """Replace a line of a text file."""
    text, count = re.subn(pattern, value, path.read_text(), count=1)
    assert count
    path.write_text(text)


def refused(folder, match):
    """Make sure that a recognizer is refused in one line."""
    with pytest.raises(RecogniserError, match=match) as caught:
        EmotionRecognizer.from_hparams(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 2000


SETTINGS = {
    "no temperature": ("temperature: .*", "temperature: 0", "temperature"),
    "a temperature that is not a number": ("temperature: .*", "temperature: .nan", "temperature"),
    "another rate": ("sample_rate: .*", "sample_rate: 0", "sample_rate"),
    "a negative level": ("trim_db: .*", "trim_db: -1.0", "trim_db"),
    "an average of nothing": ("frame_average: .*", "frame_average: 0", "frame_average"),
    "a size beyond all memory": ("hidden_size: .*", "hidden_size: 1000000000000", "classifier.hidden_size"),
    "a dropout of all": ("dropout: .*", "dropout: 1.0", "classifier.dropout"),
    "equal labels": ("labels: .*", "labels: [a, a, a, a]", "labels: must be different"),
    "labels in one string": ("labels: .*", "labels: angry happy", "labels"),
    "too few labels": ("labels: .*", "labels: [a, b, c]", "labels: 3 labels"),
    "a label that is not printable": ("labels: .*", 'labels: ["a\\\\n", b, c, d]', "labels.0"),
    "no encoder": ("source: .*", "source: ''", "encoder.source"),
    "equal layers": ("layers: .*", "layers: [1, 1]", "encoder.layers"),
    "another wiring": ("loadables:", "others:", "pretrainer"),
    "an unknown key": ("sample_rate: 16000", "sample_rate: 16000\ndevice: cuda", "device"),
    "a missing key": ("trim_db: .*", "", "trim_db: Field required"),
    "a number of thousands of digits": ("sample_rate: .*", f"sample_rate: {'9' * 5000}", "a number of 5000 characters"),
    "deep nesting": ("labels: .*", f"labels: {'[' * 5000}", "more than 30 levels"),
    "a key twice": ("sample_rate: .*", "sample_rate: 16000\nsample_rate: 16000", "duplicate key 'sample_rate'"),
    "a list": (r"(?s)^.*$", "- a", "content"),
    "nothing": (r"(?s)^.*$", "", "content"),
    "a file beyond all bounds": (r"^", "#" * 200_000 + "\n", "more than 100000 bytes"),
}


@pytest.mark.parametrize("what", SETTINGS)
def test_a_setting_that_does_not_fit_is_one_error_naming_file_and_key(what, folder):
    pattern, value, key = SETTINGS[what]
    replaced(folder / "hyperparams.yaml", pattern, value)
    refused(folder, rf"hyperparams.yaml: (line \d+: )?{key}")


ABOUT = {
    "a list": ("[1]", r"about.json: not a JSON object"),
    "deep nesting": (f'{{"labels": {DEEP}}}', "nested too deeply|more than 30 levels"),
    "a number of thousands of digits": (f'{{"labels": {"9" * 4000}}}', "a number of 4000 digits"),
    "not a number": ('{"temperature": NaN}', "NaN"),
    "infinity in digits": ('{"temperature": 1e999}', "1e999"),
    "a key twice": ('{"labels": [], "labels": []}', "twice"),
    "too much": (f'{{"labels": "{"x" * 2_000_000}"}}', "more than 1000000 bytes"),
}


@pytest.mark.parametrize("what", ABOUT)
def test_an_about_json_that_is_not_plain_is_one_error_naming_it(what, folder):
    text, match = ABOUT[what]
    (folder / "about.json").write_text(text)
    refused(folder, match)
    with pytest.raises(RecogniserError, match=match):
        load_classifier(folder, LABELS, {})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"labels": ["a", "b", "c", "d"]}, "differs from .*about.json .*labels: found"),
        ({"labels": ["a", "b"]}, "about.json: labels: 2 labels, but classifier.n_classes is 4"),
        ({"classifier": []}, "about.json: classifier"),
        ({"classifier": {"input_size": 10**12, "n_classes": 4}}, "about.json: classifier.input_size"),
        ({"classifier": {"input_size": 16, "n_classes": 4}}, "differs from .*about.json .*classifier: found"),
        ({"features": 1}, "about.json: features"),
    ],
)
def test_an_about_json_that_differs_is_one_error_naming_file_and_key(changes, match, folder):
    about = {**json.loads((folder / "about.json").read_text()), **changes}
    (folder / "about.json").write_text(json.dumps(about))
    refused(folder, match)


def test_weights_of_another_size_are_refused_before_memory_for_them_is_allocated(folder):
    for name in ("hyperparams.yaml", "about.json"):  # 100000 x 100000 weights take 40 GB
        replaced(folder / name, '(hidden_size"?): .*?(,?)\n', r"\1: 100000\2\n")
        replaced(folder / name, '(attention_size"?): .*?(,?)\n', r"\1: 100000\2\n")
    refused(folder, "classifier.safetensors: cannot be loaded .*has the shape .*100000")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_weights_that_are_not_usable_numbers_are_refused(value, folder):
    path = folder / "classifier.safetensors"
    weights = load(path.read_bytes())
    weights["output.bias"][0] = value
    path.write_bytes(save(weights))
    refused(folder, "classifier.safetensors: cannot be loaded .*output.bias")


def test_a_negative_variance_is_refused(folder):
    path = folder / "classifier.safetensors"
    weights = load(path.read_bytes())
    weights["norm.running_var"][0] = -1.0
    path.write_bytes(save(weights))
    refused(folder, "norm.running_var")


def test_a_header_that_claims_any_length_is_refused(folder):
    path = folder / "classifier.safetensors"
    path.write_bytes(struct.pack("<Q", 10**12) + path.read_bytes()[8:])
    refused(folder, "classifier.safetensors: cannot be loaded .*header")


def test_a_named_pipe_or_a_folder_in_the_place_of_a_file_is_refused(folder):
    (folder / "hyperparams.yaml").unlink()
    (folder / "hyperparams.yaml").mkdir()
    refused(folder, "hyperparams.yaml")
    with pytest.raises(RecogniserError):
        read_about("/dev")


@pytest.mark.parametrize("name", ["hyperparams.yaml", "classifier.safetensors"])
def test_the_identity_of_a_folder_is_not_taken_from_files_of_holes(name, folder):
    os.truncate(folder / name, 2**42)
    with pytest.raises(RecogniserError, match="no whole recogniser"):
        recogniser_digest(folder)


# The encoder.

ENCODER = {
    "a size beyond all memory": ("config.json", {"d_model": 10**12}, "config.json: d_model"),
    "layers without an end": ("config.json", {"encoder_layers": 10**9}, "config.json: encoder_layers"),
    "a vocabulary without an end": ("config.json", {"vocab_size": 10**12}, "vocab_size"),
    "more weights than the files hold": ("config.json", {"d_model": 20000}, "bytes"),
    "kernels from elsewhere": ("config.json", {"attn_implementation": "someone/kernels"}, "attn_implementation"),
    "no rate": ("preprocessor_config.json", {"sampling_rate": 0}, "preprocessor_config.json: sampling_rate"),
    "features without an end": ("preprocessor_config.json", {"feature_size": 10**12}, "feature_size"),
    "code of its own": ("preprocessor_config.json", {"auto_map": {"AutoFeatureExtractor": "a.B"}}, "auto_map"),
    "a window beyond all memory": ("preprocessor_config.json", {"n_fft": 100_000, "hop_length": 100}, "n_fft"),
    "frames without an end": ("preprocessor_config.json", {"hop_length": 1}, "hop_length"),
    "attention beyond all memory": ("config.json", {"encoder_attention_heads": 1000}, "encoder_attention_heads"),
    "a frame for every sample": ("config.json", {"conv_stride": [1]}, "conv_stride: fewer than 160"),
    "channels beyond all memory": ("config.json", {"conv_dim": [9000], "conv_stride": [2, 500]}, "conv_dim"),
    "an adapter that changes it": ("adapter_config.json", {"peft_type": "LORA"}, "adapter_config.json: .*PEFT"),
    "another feature extractor": (
        "processor_config.json",
        {"feature_extractor": {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 10**6}},
        "feature extractor: feature_size",
    ),
    "code of another feature extractor": (
        "processor_config.json",
        {"feature_extractor": {"feature_extractor_type": "A", "auto_map": {"AutoFeatureExtractor": "a.B"}}},
        "feature extractor: auto_map",
    ),
    "a part that never ends": (
        "model.safetensors.index.json",
        {"weight_map": {"a": "../../../../../../dev/zero"}},
        "model.safetensors.index.json: weight_map",
    ),
}


@pytest.mark.parametrize("what", ENCODER)
def test_an_encoder_whose_configuration_does_not_fit_is_one_error_naming_the_key(what, folder):
    name, changes, match = ENCODER[what]
    path = folder / "encoder" / name
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **changes}))
    refused(folder, match)


@pytest.mark.parametrize("size", [2**25, 2**40])
@pytest.mark.parametrize("name", ["processor_config.json", "model.safetensors.index.json"])
def test_a_file_beside_the_configuration_is_not_read_whatever_its_size(name, size, folder):
    with open(folder / "encoder" / name, "wb") as file:
        file.truncate(size)
    refused(folder, f"{name}: (more than 1000000 bytes|most of its)")


def test_a_named_pipe_among_the_weights_of_an_encoder_is_refused(folder):
    os.mkfifo(folder / "encoder" / "part.safetensors")
    refused(folder, "part.safetensors: not a regular file")


def test_a_file_of_holes_makes_no_room_for_weights_that_are_not_there(folder):
    path = folder / "encoder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "encoder_layers": 200, "d_model": 2**12}))
    with open(folder / "encoder" / "more.bin", "wb") as file:
        file.truncate(2**42)
    refused(folder, "config.json: describes .* bytes")


def test_weights_made_of_holes_are_refused_before_memory_for_them_is_allocated(folder):
    header = json.dumps({"weight": {"dtype": "F32", "shape": [2**28, 2**10], "data_offsets": [0, 2**40]}}).encode()
    path = folder / "classifier.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + 2**40)
    refused(folder, "classifier.safetensors: cannot be loaded .*holes")


@pytest.mark.parametrize(("pattern", "value", "match"), [(r"layers: \[1\]", "layers: [9]", r"layers=\[9\]")])
def test_layers_that_the_encoder_does_not_have_are_refused(pattern, value, match, folder):
    replaced(folder / "hyperparams.yaml", pattern, value)
    refused(folder, match)


def test_an_encoder_with_frames_of_another_size_is_refused(folder, tmp_path):
    other = write_recognizer(tmp_path / "other", dim=32)
    with pytest.raises(RecogniserError, match=r"does not fit the classifier .*input_size: found 32, wanted 16"):
        EmotionRecognizer.from_hparams(folder, overrides={"encoder": {"source": str(other / "encoder")}})


def test_weights_of_an_encoder_that_are_not_finite_are_refused(folder):
    path = folder / "encoder" / "model.safetensors"
    weights = load(path.read_bytes())
    weights["encoder.layers.0.fc1.bias"][0] = float("nan")
    path.write_bytes(save(weights, {"format": "pt"}))
    refused(folder, "encoder.layers.0.fc1.bias|layers.0.fc1.bias")


# Overrides are checked as well.


def test_overrides_are_checked_by_the_same_schema(folder):
    for overrides, key in (({"temperature": 0}, "temperature"), ({"colour": 1}, "colour")):
        with pytest.raises(RecogniserError, match=f"overrides: {key}: .*Settings of a recogniser: "):
            EmotionRecognizer.from_hparams(folder, overrides=overrides)
    changed = EmotionRecognizer.from_hparams(folder, overrides={"temperature": 2, "encoder": {"layers": (2,)}})
    assert changed.temperature == 2.0 and changed.mods.encoder.layers == [2]
    added = EmotionRecognizer.from_hparams(folder, overrides={"colour": 1}, overrides_must_match=False)
    assert added.hparams.colour == 1


def test_other_names_and_folders_of_files_still_work(folder, tmp_path):
    (folder / "hyperparams.yaml").rename(folder / "mine.yaml")
    options = {"hparams_file": "mine.yaml", "savedir": str(tmp_path / "cache")}
    assert EmotionRecognizer.from_hparams(folder, download_only=True, **options) is None
    assert (tmp_path / "cache" / "classifier.safetensors").exists()
    loaded = EmotionRecognizer.from_hparams(folder, run_opts={"device": "cpu"}, abstain_below=0.9, **options)
    assert loaded.abstain_below == 0.9


# Folders of version 0.1, which had no card beside an adapter or a dual encoder.

HOOKS_0_1 = {
    "inference.FolderPretrainer": "recogniser_files.FolderPretrainer",
    "inference.load_weights": "recogniser_files.load_weights",
}
PRETRAINER_0_1 = """pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
        {name}: !ref <{name}>
    paths:
        {name}: !ref <{name}_folder>/{name}.safetensors
    custom_hooks:
        {name}: !name:speechbrain_mifuse.{hook}
"""
ADAPTER_0_1 = """adapter_folder: .
adapter: !new:speechbrain_mifuse.nnet.wap_transformer.WAPTransformer
    input_size: 8
    d_model: 8
    n_layers: 3
    n_heads: 2
    d_ffn: 16
    dropout: 0.1
""" + PRETRAINER_0_1.format(name="adapter", hook="nnet.adapter_files.load_adapter_weights")
DUAL_ENCODER_0_1 = """dual_encoder_folder: .
dual_encoder: !new:speechbrain_mifuse.nnet.dual_encoder.DualEncoder
    audio_size: 8
    text_size: 6
    size: 128
    hidden_size: 256
    dropout: 0.3
""" + PRETRAINER_0_1.format(name="dual_encoder", hook="zero_shot.own_dual_encoder.load_dual_encoder_weights")


def test_a_recognizer_of_version_0_1_opens_also_in_foreign_class(folder):
    path = folder / "hyperparams.yaml"
    for name, older in HOOKS_0_1.items():
        replaced(path, f"speechbrain_mifuse.{name}", f"speechbrain_mifuse.{older}")
    loaded = foreign_class(source=str(folder), pymodule_file="custom.py", classname="CustomInterface")
    clip = torch.randn(8000)
    assert EmotionRecognizer.from_hparams(folder).predict_proba(clip).equal(loaded.predict_proba(clip))
    assert load_classifier(folder, LABELS, read_about(folder)["features"]).training


def opened_by_its_yaml(folder, text, name):
    """Build a model from its YAML, as a recipe that includes it does."""
    hparams = load_hyperpyyaml(text, {f"{name}_folder": str(folder)})
    hparams["pretrainer"].collect_files()
    hparams["pretrainer"].load_collected()
    return hparams[name]


def test_an_adapter_of_version_0_1_opens_by_our_loader_and_by_its_yaml(tmp_path):
    export_adapter(tmp_path, WAPTransformer(8, n_heads=2), {"dim": 8, "layer": 2}, {"seed": 1})
    (tmp_path / "README.md").unlink()
    assert ADAPTER_0_1 in (tmp_path / "hyperparams.yaml").read_text()
    loaded, built = load_adapter(tmp_path), opened_by_its_yaml(tmp_path, ADAPTER_0_1, "adapter")
    assert all(value.equal(built.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_a_dual_encoder_of_version_0_1_opens_by_our_loader_and_by_its_yaml(tmp_path):
    export_dual_encoder(tmp_path, DualEncoder(8, 6), toy_about())
    (tmp_path / "README.md").unlink()
    assert DUAL_ENCODER_0_1 in (tmp_path / "hyperparams.yaml").read_text()
    loaded = load_dual_encoder(tmp_path).network
    built = opened_by_its_yaml(tmp_path, DUAL_ENCODER_0_1, "dual_encoder")
    assert all(value.equal(built.state_dict()[name]) for name, value in loaded.state_dict().items())


# Other folders and files.


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("adapter", {"input_size": 10**12}, "about.json: adapter.input_size"),
        ("adapter", {"input_size": 8, "n_heads": 3}, "n_heads"),
        ("adapter", {"input_size": 99_999, "n_heads": 1}, "adapter.safetensors: cannot be loaded"),
        ("features", [], "about.json: features"),
    ],
)
def test_an_adapter_that_does_not_fit_is_one_error_naming_the_key(key, value, match, tmp_path):
    export_adapter(tmp_path, WAPTransformer(8, n_heads=2), {"dim": 8, "layer": 2}, {})
    about = json.loads((tmp_path / "about.json").read_text())
    (tmp_path / "about.json").write_text(json.dumps({**about, key: value}))
    with pytest.raises(AdapterError, match=match):
        load_adapter(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("dual_encoder", {"audio_size": 8, "text_size": 10**12}, "about.json: dual_encoder.text_size"),
        ("dual_encoder", {"audio_size": 99_999, "text_size": 99_999}, "dual_encoder.safetensors: cannot be loaded"),
        ("classes_known", "angry", "about.json: classes_known"),
        ("text_encoder", {"source": "demo"}, "about.json: text_encoder"),
        ("features", 1, "about.json: features"),
    ],
)
def test_a_dual_encoder_that_does_not_fit_is_one_error_naming_the_key(key, value, match, tmp_path):
    export_dual_encoder(tmp_path, DualEncoder(8, 6), toy_about())
    about = json.loads((tmp_path / "about.json").read_text())
    (tmp_path / "about.json").write_text(json.dumps({**about, key: value}))
    with pytest.raises(DualEncoderError, match=match):
        load_dual_encoder(tmp_path)


def test_the_yaml_of_an_adapter_or_a_dual_encoder_is_not_read_by_our_loaders(tmp_path):
    mark = tmp_path / "mark"
    for name in ("adapter", "dual_encoder"):
        (tmp_path / name).mkdir()
    export_adapter(tmp_path / "adapter", WAPTransformer(8, n_heads=2), {"dim": 8, "layer": 2}, {})
    export_dual_encoder(tmp_path / "dual_encoder", DualEncoder(8, 6), toy_about())
    for name in ("adapter", "dual_encoder"):
        (tmp_path / name / "hyperparams.yaml").write_text(f"extra: !apply:os.mkdir [{mark}]\n")
    load_adapter(tmp_path / "adapter")
    load_dual_encoder(tmp_path / "dual_encoder")
    assert not mark.exists()


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nforms: *b\nwords: *b\n"


@pytest.mark.parametrize("text", [BOMB, f"forms: {'[' * 50000}", "forms: !apply:os.getcwd []", "#" * 200_000])
def test_prompts_that_are_not_plain_yaml_are_one_error_naming_the_file(text, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=r"mine.yaml: cannot be read as YAML \((line|more than)"):
        read_prompts(tmp_path / "mine.yaml")


def test_half_a_character_in_prompts_is_one_error_naming_the_key(tmp_path):
    (tmp_path / "mine.yaml").write_text('forms: ["{e}"]\nwords: {sad: ["\\ud800"]}\n')
    with pytest.raises(UserError, match=r"mine.yaml: words: sad: .* must be a list of different texts"):
        read_prompts(tmp_path / "mine.yaml")


@pytest.mark.parametrize("text", [DEEP, f'{{"a": {DEEP}}}', f'{{"t-a": {{"length": {"9" * 4000}}}}}', '{"a": 1e999}'])
def test_a_manifest_of_any_depth_or_number_is_one_error_naming_it(text, tmp_path):
    (tmp_path / "corpus.json").write_text('{"data_root": "/toy"}')
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(CorpusError, match=r"train.json: not a manifest"):
        read_manifest(tmp_path / "train.json")
