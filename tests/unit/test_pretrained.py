"""Folders of text encoders, speech encoders and audio-text models that do not fit: each is one error."""

import json
import os
import shutil

import pytest
import tiny_clap
import toy_corpora
from safetensors.torch import load_file, save_file
from tiny_text_encoder import write_text_encoder

from speechbrain_mifuse.features import pretrained
from speechbrain_mifuse.features.encoder import FrozenEncoder
from speechbrain_mifuse.features.text_encoder import FrozenTextEncoder
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.zero_shot.audio_text import open_audio_text_model

LOAD = {"speech": FrozenEncoder, "text": FrozenTextEncoder, "audio-text": open_audio_text_model}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of each kind."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "speech": toy_corpora.write_encoder(folder / "speech", 16),
        "text": write_text_encoder(folder / "text"),
        "audio-text": tiny_clap.build(folder / "audio-text"),
    }


@pytest.fixture
def copied(models, tmp_path):
    def copy(kind):
        return shutil.copytree(models[kind], tmp_path / "copy")

    return copy


def changed(path, **changes):
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))


def refused(kind, folder, match):
    with pytest.raises(ValueError, match=match) as caught:
        LOAD[kind](str(folder))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 2000


@pytest.mark.parametrize("kind", LOAD)
def test_a_model_that_lacks_a_weight_is_refused_and_not_filled_with_random_ones(kind, copied):
    path = copied(kind) / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("bias") and not name.startswith("decoder"))
    save_file({key: value for key, value in weights.items() if key != name}, path, {"format": "pt"})
    refused(kind, path.parent, r"lacks weights \(.*bias\)")


@pytest.mark.parametrize("kind", LOAD)
def test_weights_of_no_name_that_a_model_knows_are_refused(kind, copied):
    path = copied(kind) / "model.safetensors"
    save_file({f"other.{name}": value for name, value in load_file(path).items()}, path, {"format": "pt"})
    refused(kind, path.parent, "lacks weights")


def test_a_text_encoder_may_lack_the_pooling_that_is_not_used(copied):
    path = copied("text") / "model.safetensors"
    weights = {name: value for name, value in load_file(path).items() if not name.startswith("pooler")}
    save_file(weights, path, {"format": "pt"})
    first, again = (FrozenTextEncoder(path.parent) for _ in range(2))
    assert first.fingerprint() == again.fingerprint()


def test_a_speech_encoder_may_lack_the_decoder(copied):
    path = copied("speech") / "model.safetensors"
    before = FrozenEncoder(path.parent).fingerprint()
    weights = {name: value for name, value in load_file(path).items() if "decoder" not in name}
    assert len(weights) < len(load_file(path))
    save_file(weights, path, {"format": "pt"})
    assert FrozenEncoder(path.parent).fingerprint() == before


@pytest.mark.parametrize("kind", LOAD)
def test_an_adapter_of_peft_is_refused_and_not_followed(kind, copied):
    folder = copied(kind)
    changed(folder / "adapter_config.json", peft_type="LORA", base_model_name_or_path="/elsewhere")
    refused(kind, folder, "adapter_config.json: adapters of PEFT are not supported")


CONFIGURATIONS = {
    "a size beyond all memory": ({"hidden_size": 10**12}, "config.json: hidden_size"),
    "more weights than the files hold": ({"vocab_size": 10**7}, "describes .* weights"),
    "layers without an end": ({"num_hidden_layers": 10**7}, "config.json: num_hidden_layers"),
    "labels without an end": ({"num_labels": 10**7}, "config.json: num_labels"),
    "kernels from elsewhere": ({"attn_implementation": "someone/kernels"}, "config.json: attn_implementation"),
    "weights in another form": ({"quantization_config": {"quant_method": "a"}}, "config.json: quantization_config"),
    "another configuration": ({"configuration_files": ["config.4.0.0.json"]}, "configuration_files"),
}


@pytest.mark.parametrize("what", CONFIGURATIONS)
@pytest.mark.parametrize("kind", ["text", "audio-text"])
def test_a_configuration_that_does_not_fit_is_one_error_naming_the_key(kind, what, copied):
    changes, match = CONFIGURATIONS[what]
    folder = copied(kind)
    if kind == "audio-text" and not what.startswith("another"):
        config = json.loads((folder / "config.json").read_text())
        changes = {"text_config": {**config["text_config"], **changes}}
    changed(folder / "config.json", **changes)
    refused(kind, folder, match)


@pytest.mark.parametrize(
    ("key", "value"), [("fft_window_size", 10**7), ("feature_size", 10**7), ("max_length_s", 10**7)]
)
def test_a_feature_extractor_beyond_all_memory_is_one_error_naming_the_key(key, value, copied):
    folder = copied("audio-text")
    changed(folder / "preprocessor_config.json", **{key: value})
    refused("audio-text", folder, f"preprocessor_config.json: {key}")


DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
TWICE = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 40}
TOKENIZERS = {
    "doubling a letter": ({"normalizer": {"type": "Sequence", "normalizers": [DOUBLE] * 36}}, "more than 10 steps"),
    "a long text for a letter": (
        {"normalizer": {"type": "Sequence", "normalizers": [{**DOUBLE, "content": "a" * 90}] * 3}},
        "1000 times as long",
    ),
    "a text many times": ({"post_processor": {"type": "Sequence", "processors": [TWICE] * 3}}, "1000 times as long"),
    "a table that is not there": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}},
        "precompiled_charsmap",
    ),
    "a table that makes the tokenizer panic": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAAAAAAAAAA"}},
        "its tokenizer fails",
    ),
    "no step": ({"normalizer": {"type": "Sequence", "normalizers": [5, None]}}, "cannot be loaded|could not be loaded"),
}


@pytest.mark.parametrize("what", TOKENIZERS)
@pytest.mark.parametrize("kind", ["text", "audio-text"])
def test_a_tokenizer_that_makes_much_of_a_text_or_fails_is_one_error(kind, what, copied):
    changes, match = TOKENIZERS[what]
    folder = copied(kind)
    changed(folder / "tokenizer.json", **changes)
    refused(kind, folder, match)


def test_a_token_that_the_model_does_not_know_is_one_error(copied):
    folder = copied("text")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    changed(folder / "tokenizer.json", model={**model, "vocab": {**model["vocab"], "sad": 10**6}})
    with pytest.raises(UserError, match=r"its tokenizer gives the token 1000000, and the model knows \d+"):
        FrozenTextEncoder(folder)(["sad"])


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "sentence_bert_config.json", "vocab.txt"])
def test_a_file_of_any_size_is_not_read(name, copied):
    folder = copied("text")
    with open(folder / name, "ab") as file:
        file.truncate(2**40)
    refused("text", folder, f"{name}: (more than|most of)|most of its")


@pytest.mark.parametrize("name", ["sentence_bert_config.json", "vocab.txt", "tokenizer.json"])
def test_a_named_pipe_or_a_device_in_the_place_of_a_file_is_refused(name, copied):
    folder = copied("text")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    refused("text", folder, f"{name}: not a regular file")
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    refused("text", folder, f"{name}: not a regular file")


@pytest.mark.parametrize("text", ['{"max_seq_length": NaN}', '{"max_seq_length": -5}', '{"max_seq_length": "x"}', "[]"])
def test_a_limit_of_tokens_that_is_no_number_is_one_error(text, copied):
    folder = copied("text")
    (folder / "sentence_bert_config.json").write_text(text)
    refused("text", folder, "cannot be loaded")


@pytest.mark.parametrize("kind", ["text", "audio-text"])
def test_weights_that_are_not_finite_are_one_error(kind, copied):
    path = copied(kind) / "model.safetensors"
    weights = load_file(path)
    for value in weights.values():
        if value.is_floating_point():
            value.fill_(float("nan"))
    save_file(weights, path, {"format": "pt"})
    refused(kind, path.parent, "not finite")


def test_a_repository_of_the_hub_is_checked_like_a_folder(copied, monkeypatch):
    folder = copied("text")
    changed(folder / "config.json", hidden_size=10**12)
    monkeypatch.setattr(pretrained, "snapshot_download", lambda *_, **__: str(folder))
    refused("text", "someone/encoder", "config.json: hidden_size")
