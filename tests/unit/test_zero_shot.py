"""Zero-shot scores: what the model hears is what the audit says, nothing is random, and nothing is encoded twice."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_clap
import torch
import transformers
from toy_corpora import write_wav

from speechbrain_mifuse.corpora import emodb, msp_podcast, ravdess
from speechbrain_mifuse.corpora.manifest import LABELS
from speechbrain_mifuse.experiments import zero_shot_steps as zero_shot_pipeline
from speechbrain_mifuse.experiments.features import CorpusSettings, store_frames
from speechbrain_mifuse.experiments.registry import repository_root
from speechbrain_mifuse.experiments.teacher import AudioTextTeacher
from speechbrain_mifuse.features import pretrained
from speechbrain_mifuse.features.extract import FrameReader
from speechbrain_mifuse.features.store import StoreError
from speechbrain_mifuse.utils.audio import load_audio
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.files import atomic_write
from speechbrain_mifuse.zero_shot import audio_text
from speechbrain_mifuse.zero_shot.audio_text import ClapModel, GenericAudioTextModel, name_of, open_audio_text_model
from speechbrain_mifuse.zero_shot.own_dual_encoder import alm_name, open_alm
from speechbrain_mifuse.zero_shot.prompts import PromptSet, read_prompts, repeated
from speechbrain_mifuse.zero_shot.scorer import (
    amplification_grid,
    audit_texts,
    class_vectors,
    embed_manifests,
    normalise_scores,
    zero_shot_predictions,
    zero_shot_scores,
)
from speechbrain_mifuse.zero_shot.window import WINDOWS, audit_windows, build_window, heard_window

RATE = 4800
LENGTHS_S = (0.3, 0.7, 1.0, 1.5, 2.5, 3.3, 4.9, 5.0, 7.1, 9.99, 10.0, 10.01, 12.5, 20.0, 25.0)
PROMPTS = read_prompts(repository_root() / "hparams" / "prompts" / "english.yaml")
# Of these, each has other windows at N = 1 to 4 than the others.
CLIPS_S = (0.4, 1.5, 3.0, 4.2, 6.0, 11.0)


@pytest.fixture(scope="module")
def extractor():
    """CLAP's own feature extractor at a tenth of its rate."""
    return transformers.ClapFeatureExtractor(
        feature_size=16,
        sampling_rate=RATE,
        hop_length=48,
        fft_window_size=256,
        frequency_max=2400,
        truncation="rand_trunc",
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny CLAPs, without and with fusion."""
    root = tmp_path_factory.mktemp("clap")
    return {fusion: tiny_clap.build(root / f"tiny-clap{'-fused' * fusion}", fusion) for fusion in (False, True)}


@pytest.mark.parametrize(("padding", "policy"), [("repeatpad", "native"), ("repeat", "repeat"), ("pad", "pad")])
def test_the_native_window_is_the_one_of_the_models_own_extractor(padding, policy, folders, tmp_path):
    folder = shutil.copytree(folders[False], tmp_path / "clap")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "padding": padding}))
    assert ClapModel(folder).policy == policy
    path.write_text(json.dumps({**json.loads(path.read_text()), "padding": "mirror"}))
    with pytest.raises(UserError, match=r"--alm_window native: .*'mirror'"):
        ClapModel(folder)
    assert ClapModel(folder, window="pad").policy == "pad"


@pytest.fixture(scope="module")
def clap(folders):
    return open_audio_text_model(folders[False])


@pytest.fixture
def counted(clap, monkeypatch):
    """The tiny CLAP, with a list that grows with every pass through its audio encoder."""
    passes, encode = [], clap.model.get_audio_features
    monkeypatch.setattr(clap.model, "get_audio_features", lambda **inputs: passes.append(1) or encode(**inputs))
    return clap, passes


def clip(seconds, rate=48000, seed=0):
    """A noisy tone; another for each seed."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(size=len(time))
    return 0.2 * np.sin(2 * np.pi * (150 + 170 * seed) * time) + 0.02 * noise


def corpus(folder, lengths_s=CLIPS_S, prefix="u"):
    """Write recordings and their manifest, which is returned."""
    rows = {}
    for number, seconds in enumerate(lengths_s):
        write_wav(folder / f"{number}.wav", clip(seconds, 16000, number))
        rows[f"{prefix}{number}"] = {"wav": f"{{data_root}}/{number}.wav", "speaker": "1"}
    atomic_write(folder / "corpus.json", json.dumps({"data_root": str(folder)}))
    atomic_write(folder / "all_unlabelled.json", json.dumps(rows))
    return folder / "all_unlabelled.json"


def scores_of(model, manifest, folder, repeats=1, keys=None, **options):
    store = embed_manifests(model, [manifest], repeats, folder, "toy")
    classes = class_vectors(model, PROMPTS, LABELS, 1)
    return zero_shot_scores(model, store, keys or list(store.rows), classes, **options)


# The window.


@pytest.mark.parametrize("seconds", LENGTHS_S)
@pytest.mark.parametrize("repeats", [1, 2, 3, 4, 5, 8])
def test_the_native_window_is_what_clap_makes_of_the_repeated_clip(extractor, monkeypatch, seconds, repeats):
    wave = torch.tensor(clip(seconds, RATE), dtype=torch.float32)
    heard = heard_window(len(wave), repeats, extractor.nb_max_samples, RATE)
    # Anything longer than the window is cut at random: here, from the start.
    monkeypatch.setattr(np.random, "randint", lambda low, high: low)
    received = []
    spectrum = extractor._np_extract_fbank_features
    monkeypatch.setattr(extractor, "_np_extract_fbank_features", lambda w, f: received.append(w) or spectrum(w, f))
    theirs = extractor(wave.repeat(repeats).numpy(), sampling_rate=RATE)["input_features"]
    ours = extractor(build_window(wave, heard).numpy(), sampling_rate=RATE)["input_features"]
    assert np.array_equal(*received) and len(received[0]) == 10 * RATE
    assert np.array_equal(theirs, ours)


@pytest.mark.parametrize("policy", WINDOWS)
@pytest.mark.parametrize("repeats", [1, 2, 3, 4, 8])
def test_the_audit_counts_what_is_in_the_window(policy, repeats):
    for seconds in LENGTHS_S:
        samples = round(seconds * RATE)
        heard = heard_window(samples, repeats, 10 * RATE, RATE, policy)
        window = build_window(torch.arange(1.0, samples + 1), heard)
        assert len(window) == 10 * RATE
        assert heard.copies == int((window == samples).sum())
        assert heard.silence_s == int((window == 0).sum()) / RATE
        assert round(heard.part_s * RATE) == len(window) - int((window == 0).sum()) - heard.copies * samples
        assert round(heard.cropped_s * RATE) == max(samples * repeats - 10 * RATE, 0)
        whole = window[: heard.copies * samples].view(heard.copies, samples)
        assert bool((whole == torch.arange(1.0, samples + 1)).all())


@pytest.mark.parametrize("policy", WINDOWS)
def test_windows_have_equal_keys_just_when_their_samples_are_equal(policy):
    for seconds in LENGTHS_S:
        wave = torch.arange(1.0, round(seconds * 480) + 1)
        heard = [heard_window(len(wave), times, 4800, 480, policy) for times in range(1, 9)]
        windows = [build_window(wave, each) for each in heard]
        for one, first in zip(heard, windows, strict=True):
            for other, second in zip(heard, windows, strict=True):
                assert (one.key == other.key) == first.equal(second)


def test_repeating_a_clip_of_one_and_a_half_seconds_for_clap():
    rows = {row["repeats"]: row for row in audit_windows([1.5], [1, 2, 3, 4, 8])}
    assert {times: row["same_as"] for times, row in rows.items()} == {1: None, 2: 1, 3: 1, 4: None, 8: None}
    assert (rows[1]["silence_s"], rows[4]["silence_s"], rows[8]["silence_s"], rows[8]["cropped_s"]) == (1, 4, 0, 2)


def test_repetition_leaves_no_silence_and_padding_nothing_else_than_n_copies():
    for row in audit_windows(LENGTHS_S, [1, 2, 3], policy="repeat"):
        assert row["silence_s"] == 0 and row["same_as"] == (None if row["repeats"] == 1 else 1)
    short = audit_windows([0.3, 1.5, 3.3], [1, 2, 3], policy="pad")
    assert [(row["copies"], row["same_as"]) for row in short] == [(times, None) for times in (1, 2, 3)] * 3


def test_a_model_without_a_window_hears_just_the_copies():
    heard = heard_window(7, 3, size=None)
    assert (heard.copies, heard.silence_s, heard.cropped_s, heard.size) == (3, 0, 0, 21)


@pytest.mark.parametrize("repeats", [0, -1, 1.5, True, "2"])
def test_a_number_of_repeats_that_is_none_is_one_error_naming_the_flag(repeats):
    with pytest.raises(UserError, match=r"--audio_repeats: .* must be a whole number"):
        heard_window(10, repeats)
    with pytest.raises(UserError, match=r"--text_repeats: .* must be a whole number"):
        repeated("sad", repeats)


def test_frames_of_a_repeated_recording_are_those_of_its_repeated_waveform():
    class Encoder:
        sample_rate, longest_input = 16000, 1200

        def __call__(self, wave):
            return wave[: len(wave) // 16 * 16].view(-1, 1, 16)

        def fingerprint(self):
            return {"layers": [1], "dim": 16}

    loud = 0.3 * torch.randn(800, generator=torch.Generator().manual_seed(0))
    wave = torch.cat([torch.zeros(1600), loud, torch.zeros(1600)])
    once, twice = FrameReader(Encoder()), FrameReader(Encoder(), repeats=2)
    assert once.encode(wave).flatten().equal(loud)
    # Trimmed before it is repeated, and cut at the encoder's longest input.
    assert twice.encode(wave).flatten().equal(loud.repeat(2)[:1200])
    assert "repeats" not in once.fingerprint()
    assert twice.fingerprint() == {**once.fingerprint(), "repeats": 2}


# The model.


@pytest.mark.parametrize("fusion", [False, True])
def test_scores_depend_on_no_neighbour_no_order_and_no_global_seed(folders, tmp_path, fusion):
    model = open_audio_text_model(folders[fusion])
    manifest = corpus(tmp_path)
    np.random.seed(1)
    scores = scores_of(model, manifest, tmp_path / "first")
    np.random.seed(2)
    rows = json.loads(manifest.read_text())
    atomic_write(manifest, json.dumps(dict(reversed(rows.items()))))
    keys = list(rows)
    again = scores_of(model, manifest, tmp_path / "second", keys=keys)
    assert scores.equal(again)
    assert scores.std(0).min() > 1e-3
    for batch_size in (1, 4):
        torch.testing.assert_close(
            scores_of(model, manifest, tmp_path / "second", keys=keys[::-1], batch_size=batch_size).flip(0),
            scores,
            atol=1e-6,
            rtol=0,
        )


def test_the_extractor_alone_would_depend_on_the_global_seed(folders):
    features = transformers.AutoFeatureExtractor.from_pretrained(folders[False])
    found = []
    for seed in (1, 2):
        np.random.seed(seed)
        found.append(features(clip(11.0), sampling_rate=48000)["input_features"])
    assert not np.array_equal(*found)


@pytest.mark.parametrize("fusion", [False, True])
def test_an_embedding_is_that_of_the_network_on_the_window(folders, fusion):
    model, wave = open_audio_text_model(folders[fusion]), torch.tensor(clip(4.2), dtype=torch.float32)
    features = model.extractor(build_window(wave, model.window(wave, 2)).numpy(), sampling_rate=48000)
    mels = torch.tensor(np.stack(features["input_features"]))
    assert mels.shape[1] == (4 if fusion else 1)
    with torch.no_grad():
        expected = model.model.get_audio_features(input_features=mels, is_longer=torch.tensor([[False]]))
    torch.testing.assert_close(model.embed(wave, 2), audio_text.embedding_of(expected)[0])


def test_what_is_not_cut_sounds_as_clap_makes_it_sound(clap):
    wave = torch.tensor(clip(1.5), dtype=torch.float32)
    inputs = clap.extractor(wave.repeat(4).numpy(), sampling_rate=48000, return_tensors="pt")
    with torch.no_grad():
        expected = audio_text.embedding_of(clap.model.get_audio_features(**inputs))[0]
    torch.testing.assert_close(clap.embed(wave, 4), expected)
    assert not torch.allclose(clap.embed(wave, 1), expected, atol=1e-3)


class OtherForm:
    """A model whose features come in the form of the other version of transformers."""

    def __init__(self, model):
        self.model, self.config, self.device = model, model.config, model.device

    def swap(self, output):
        return SimpleNamespace(pooler_output=output) if isinstance(output, torch.Tensor) else output.pooler_output

    def get_audio_features(self, **inputs):
        return self.swap(self.model.get_audio_features(**inputs))

    def get_text_features(self, **inputs):
        return self.swap(self.model.get_text_features(**inputs))


def test_both_forms_of_features_give_the_same_vectors(clap, monkeypatch):
    wave = torch.tensor(clip(1.0), dtype=torch.float32)
    before = clap.embed(wave, 1), clap.text_vectors(["sad", "happy one"])
    monkeypatch.setattr(clap, "model", OtherForm(clap.model))
    assert clap.embed(wave, 1).equal(before[0]) and clap.text_vectors(["sad", "happy one"]).equal(before[1])


def test_a_model_of_another_type_is_taken_in_its_general_form(clap, folders):
    general = GenericAudioTextModel(folders[False])
    wave = torch.tensor(clip(1.0), dtype=torch.float32)
    assert isinstance(clap, ClapModel) and not isinstance(general, ClapModel)
    assert general.embed(wave, 1).equal(clap.embed(wave, 1))
    assert (general.longest_text, clap.longest_text) == (512, 77)


def test_weights_are_frozen_and_in_evaluation_mode(clap):
    assert not any(module.training for module in clap.model.modules())
    assert not any(parameter.requires_grad for parameter in clap.model.parameters())


def test_a_model_that_is_sent_to_a_device_is_fed_there_and_answers_on_the_cpu(folders, monkeypatch):
    model, fed = open_alm(str(folders[False]), device="meta"), []

    def network(**inputs):
        fed.extend(value.device.type for value in inputs.values())
        return torch.ones(1, 16)

    assert {tensor.device.type for tensor in model.model.state_dict().values()} == {"meta"}
    monkeypatch.setattr(model.model, "get_audio_features", network)
    monkeypatch.setattr(model.model, "get_text_features", network)
    vectors = model.embed(torch.ones(48000), 1), model.text_vectors(["sad"])
    assert len(fed) >= 4 and set(fed) == {"meta"} and {vector.device.type for vector in vectors} == {"cpu"}


def test_the_recipe_opens_a_given_model_on_its_device(monkeypatch):
    def opened(*given, **options):
        raise UserError(f"{given} {options}")

    monkeypatch.setattr(zero_shot_pipeline, "open_alm", opened)
    prompts = repository_root() / "hparams" / "prompts" / "english.yaml"
    settings = SimpleNamespace(alm="clap", alm_window="pad", alm_trust_remote_code=False, prompts=prompts)
    with pytest.raises(UserError, match=r"^\('clap', 'pad', False\) {'device': 'cuda:1'}$"):
        zero_shot_pipeline.score_tables(settings, ["zero_shot"], 1, {"device": "cuda:1"})


def test_a_model_is_named_after_its_folder_before_it_is_loaded(folders, clap, monkeypatch):
    assert alm_name(str(folders[False])) == clap.name == "tiny-clap"
    monkeypatch.chdir(folders[True])
    assert name_of(".") == alm_name("./") == "tiny-clap-fused"


def test_vectors_have_unit_norm_and_can_be_trained_on(clap, tmp_path):
    scores = scores_of(clap, corpus(tmp_path, [1.0]), tmp_path)
    assert clap.text_vectors(["a", "bb"]).norm(dim=-1).sub(1).abs().max() < 1e-6
    assert scores.abs().max() <= 1 + 1e-6
    layer = torch.nn.Linear(len(LABELS), 1)
    layer(scores).sum().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_trimming_comes_before_repeating(folders):
    model = ClapModel(folders[False], window="pad", trim_db=40.0)
    loud = torch.tensor(clip(1.0), dtype=torch.float32)
    wave = torch.cat([torch.zeros(48000), loud, torch.zeros(48000)])
    assert model.window(wave, 2).filled == 2 * 48000
    torch.testing.assert_close(model.embed(wave, 2), ClapModel(folders[False], window="pad").embed(loud, 2))


def test_the_fingerprint_tells_settings_apart_and_not_the_folder(folders, clap, tmp_path):
    same = ClapModel(tiny_clap.build(tmp_path / "elsewhere"))
    other = ClapModel(tiny_clap.build(tmp_path / "other", seed=1))
    assert same.fingerprint() == clap.fingerprint() and other.fingerprint() != clap.fingerprint()
    filled = ClapModel(folders[False], window="repeat")
    prints = [clap.fingerprint(), filled.fingerprint(), ClapModel(folders[False], trim_db=30.0).fingerprint()]
    prints += [clap.reader(2).fingerprint(), clap.reader(1).fingerprint()]
    assert len({json.dumps(each) for each in prints}) == 5
    assert "repeats" not in clap.reader(1).fingerprint() and clap.reader(2).fingerprint()["repeats"] == 2


# Texts.


def test_a_class_is_the_mean_of_its_normalised_prompts(clap):
    prompts = PromptSet("mine", ("{e}.", "I am {e}!"), {"sad": ("sad", "gloomy")})
    texts = ["sad. sad.", "gloomy. gloomy.", "I am sad! I am sad!", "I am gloomy! I am gloomy!"]
    # Each by itself: no neighbour, no padding.
    mean = torch.cat([clap.text_vectors([text]) for text in texts]).mean(0)
    torch.testing.assert_close(class_vectors(clap, prompts, ["sad"], 2)[0], mean / mean.norm(), atol=1e-6, rtol=0)


def test_every_number_of_text_repeats_gives_other_vectors(clap):
    prompts = PromptSet("mine", ("{e}",), {label: (label,) for label in LABELS})
    vectors = [class_vectors(clap, prompts, LABELS, times) for times in (1, 2, 3, 4)]
    assert min((a - b).abs().max() for i, a in enumerate(vectors) for b in vectors[:i]) > 1e-4


def test_a_text_that_is_too_long_is_refused_and_never_cut(clap):
    rows = audit_texts(clap, PROMPTS, LABELS, [1, 2, 3])
    # Tokens are bytes, between two that begin and end a text.
    assert [row["longest"] for row in rows] == [2 + 31, 2 + 63, 2 + 95]
    assert [(row["fits"], row["limit"]) for row in rows] == [(True, 77), (True, 77), (False, 77)]
    class_vectors(clap, PROMPTS, LABELS, 2)
    with pytest.raises(UserError, match=r"--text_repeats: a text of \d+ tokens .* longer than the 77 that tiny-clap"):
        class_vectors(clap, PROMPTS, LABELS, 3)


def test_a_label_that_the_model_was_not_trained_on_is_refused(clap, monkeypatch):
    monkeypatch.setattr(clap, "classes_known", ("angry", "sad"))
    class_vectors(clap, PROMPTS, ["sad"], 1)
    with pytest.raises(UserError, match="--alm: tiny-clap was trained on angry, sad, not happy"):
        class_vectors(clap, PROMPTS, ["sad", "happy"], 1)


# The scorer.


def test_windows_that_are_the_same_are_encoded_once(counted, tmp_path):
    model, passes = counted
    manifest = corpus(tmp_path)
    grid = list(amplification_grid(model, PROMPTS, LABELS, [manifest], [1, 2, 3, 4], [1, 2], tmp_path / "a", "toy"))
    rows = audit_windows(CLIPS_S, [1, 2, 3, 4])
    distinct = sum(row["same_as"] is None for row in rows)
    assert len(passes) == distinct < len(rows)
    assert [(each.audio_repeats, each.text_repeats) for each in grid] == [(n, m) for n in (1, 2, 3, 4) for m in (1, 2)]
    for each in grid:
        alone = embed_manifests(model, [manifest], each.audio_repeats, tmp_path / "b", "toy")
        classes = class_vectors(model, PROMPTS, LABELS, each.text_repeats)
        torch.testing.assert_close(
            zero_shot_scores(model, alone, each.keys, classes), each.scores, atol=1e-6, rtol=0, msg=str(each[:2])
        )
    assert len(passes) == distinct + len(rows)


def test_no_pass_at_all_where_the_window_is_filled_anyway(folders, monkeypatch, tmp_path):
    model, passes = ClapModel(folders[False], window="repeat"), []
    encode = model.model.get_audio_features
    monkeypatch.setattr(model.model, "get_audio_features", lambda **inputs: passes.append(1) or encode(**inputs))
    grid = list(amplification_grid(model, PROMPTS, LABELS, [corpus(tmp_path)], [2, 5, 1], [1], tmp_path, "toy"))
    assert len(passes) == len(CLIPS_S)
    assert all(each.scores.equal(grid[0].scores) for each in grid)


def test_a_grid_that_was_done_is_not_encoded_again_and_another_n_only_where_it_differs(counted, tmp_path):
    model, passes = counted
    manifest = corpus(tmp_path)
    asked = (model, PROMPTS, LABELS, [manifest])
    list(amplification_grid(*asked, [1, 2], [1], tmp_path / "a", "toy"))
    passes.clear()
    list(amplification_grid(*asked, [1, 2, 4], [1], tmp_path / "a", "toy"))
    assert len(passes) == sum(
        row["same_as"] is None for row in audit_windows(CLIPS_S, [1, 2, 4]) if row["repeats"] == 4
    )


def test_a_recording_that_was_replaced_is_not_mistaken_for_what_another_store_holds(counted, tmp_path):
    model, passes = counted
    manifest = corpus(tmp_path, [1.5])
    first = embed_manifests(model, [manifest], 1, tmp_path / "a", "toy")
    write_wav(tmp_path / "0.wav", clip(1.6, 16000, seed=5))
    passes.clear()
    second = embed_manifests(model, [manifest], 2, tmp_path / "a", "toy", {1: first})
    assert len(passes) == 1
    expected = model.embed(load_audio(tmp_path / "0.wav", 48000), 2)
    torch.testing.assert_close(torch.tensor(second.frames("u0", 0)[0]).float(), expected, atol=1e-3, rtol=0)


def test_a_model_that_says_nothing_of_its_input_shares_no_pass(tmp_path):
    class Loud(audio_text.AudioTextModel):
        name = "loud"

        def __init__(self):
            self.passes = 0

        def fingerprint(self):
            return {"loud": 1}

        def reader(self, repeats):
            def encode(wave):
                self.passes += 1
                return wave.abs().mean().view(1, 1, 1)

            about = {"layers": [3], "dim": 1, "repeats": repeats}
            return SimpleNamespace(encoder=SimpleNamespace(sample_rate=16000), encode=encode, fingerprint=lambda: about)

        def audio_vectors(self, frames, lengths):
            return torch.nn.functional.normalize(frames[:, 0], dim=-1)

        def text_vectors(self, texts):
            return torch.ones(len(texts), 1)

    model = Loud()
    grid = list(amplification_grid(model, PROMPTS, ["sad"], [corpus(tmp_path)], [1, 2], [1], tmp_path, "toy"))
    assert model.passes == 2 * len(CLIPS_S) and grid[0].scores.equal(torch.ones(len(CLIPS_S), 1))


def test_a_model_of_frames_finds_those_that_a_recipe_has_stored(tmp_path):
    passes = []

    class Encoder:
        sample_rate = 16000

        def __call__(self, wave):
            passes.append(1)
            return wave[: len(wave) // 160 * 160].view(-1, 1, 160)

        def fingerprint(self):
            return {"layers": [1], "dim": 160}

    manifest, folder = corpus(tmp_path, [0.4, 0.5]), tmp_path / "features"
    stored = store_frames(CorpusSettings("toy", tmp_path, None, folder), FrameReader(Encoder()))
    model = SimpleNamespace(reader=lambda repeats: FrameReader(Encoder(), repeats=repeats))
    assert embed_manifests(model, [manifest], 1, folder, "toy").folder == stored.folder and len(passes) == 2
    assert embed_manifests(model, [manifest], 2, folder, "toy").folder != stored.folder and len(passes) == 4


def test_an_unreadable_recording_is_left_out_of_the_scores(clap, tmp_path):
    manifest = corpus(tmp_path, [0.4, 0.5, 0.6])
    (tmp_path / "1.wav").write_text("no audio")
    (one,) = amplification_grid(clap, PROMPTS, LABELS, [manifest], [1], [1], tmp_path / "a", "toy")
    assert one.keys == ("u0", "u2") and one.scores.shape == (2, 4)


def test_a_text_that_is_too_long_is_refused_before_audio_is_encoded(counted, tmp_path):
    model, passes = counted
    with pytest.raises(UserError, match="--text_repeats"):
        next(amplification_grid(model, PROMPTS, LABELS, [corpus(tmp_path)], [1], [1, 9], tmp_path, "toy"))
    assert not passes


def test_a_store_of_several_layers_is_refused_where_the_model_names_none(filled_store):
    model = SimpleNamespace(name="mine", layer=None)
    with pytest.raises(StoreError, match=r"layers \[1, 2\], and mine does not say which"):
        zero_shot_scores(model, filled_store({"a": 0}), ["a"], torch.eye(6))


def test_normalised_scores_have_the_reference_set_s_mean_and_deviation_taken_off():
    scores = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 1, 3]) + 0.4
    normal = normalise_scores(scores, scores)
    torch.testing.assert_close(normal.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(normal.std(0, correction=0), torch.ones(3))
    assert normalise_scores(scores[:1], scores).equal(normal[:1])
    flat = torch.full((3, 2), 0.2)
    assert normalise_scores(flat, flat).abs().max() < 1e-6
    assert zero_shot_predictions(torch.tensor([[0.9, 0.8], [0.9, 0.5]])).tolist() == [0, 0]
    with pytest.raises(UserError, match="1 utterances have no deviation"):
        normalise_scores(flat, flat[:1])


# What does not fit.


@pytest.mark.parametrize("language", ["english", "german", "polish"])
def test_the_prompts_of_every_language_cover_the_labels_of_every_corpus(language):
    prompts = read_prompts(repository_root() / "hparams" / "prompts" / f"{language}.yaml")
    maps = (ravdess.EIGHT_CLASSES, emodb.SEVEN_CLASSES, msp_podcast.EIGHT_CLASSES)
    labels = {label for each in maps for label in each.values() if label}
    texts = [text for label in sorted(labels) for text in prompts.texts(label)]
    assert len(labels) == 10 and len(set(texts)) == 30 and not any("{" in text for text in texts)


def test_the_english_forms_are_the_published_ones():
    assert PROMPTS.texts("sad") == ["A speaker in a sad tone.", "this person is feeling sad.", "Emotion is sad."]


BAD_PROMPTS = {
    "forms: [": "cannot be read as YAML",
    "": "must hold the keys forms and words",
    "forms: ['{e}']": "must hold the keys forms and words",
    "forms: ['{e}']\nwords: {sad: [sad]}\nmore: 1": "and no others",
    "forms: []\nwords: {sad: [sad]}": r"forms: \[\] must be a list of different texts",
    "forms: ['{e}', sad]\nwords: {sad: [sad]}": "forms: 'sad' has no {e}",
    "forms: ['{e}']\nwords: [sad]": "words: must be lists of texts by name",
    "forms: ['{e}']\nwords: {sad: sad}": "words: sad: 'sad' must be a list",
    "forms: ['{e}']\nwords: {sad: []}": r"words: sad: \[\] must be a list",
    "forms: ['{e}']\nwords: {sad: [no]}": r"words: sad: \[False\] must be a list of different texts",
    "forms: ['{e}']\nwords: {sad: [sad, sad]}": "words: sad: .* different texts",
}


@pytest.mark.parametrize("text", BAD_PROMPTS)
def test_a_file_of_prompts_that_does_not_fit_is_one_error_naming_file_and_key(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"mine\.yaml: .*{BAD_PROMPTS[text]}"):
        read_prompts(tmp_path / "mine.yaml")


def test_a_missing_file_or_label_of_prompts_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read"):
        read_prompts(tmp_path / "none.yaml")
    with pytest.raises(UserError, match=r"english\.yaml: words: nothing for the label 'bland'"):
        PROMPTS.texts("bland")


def spoil(folder, **changes):
    """Change keys of a folder's configuration."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def without_weights(folder):
    weights = folder / "model.safetensors"
    kept = dict(list(transformers.ClapModel.from_pretrained(folder).state_dict().items())[:-2])
    weights.unlink()
    torch.save(kept, folder / "pytorch_model.bin")
    return folder


def without(name):
    def change(folder):
        (folder / name).unlink()
        return folder

    return change


def with_code(folder):
    return spoil(folder, model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModel": "mine.Model"})


def another_kind(folder):
    transformers.HubertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(folder)
    return folder


SPOILT = {
    "weights": (without_weights, "lacks weights"),
    "network": (without("model.safetensors"), "could not be loaded"),
    "extractor": (without("preprocessor_config.json"), "could not be loaded"),
    "code": (with_code, "--alm_trust_remote_code"),
    "channels": (lambda folder: tiny_clap_extractor(folder, truncation="fusion"), "could not be loaded"),
    "kind": (another_kind, "has no get_audio_features and no get_text_features"),
}


def tiny_clap_extractor(folder, **changes):
    features = transformers.ClapFeatureExtractor(feature_size=16, hop_length=4800, **changes)
    features.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("part", SPOILT)
def test_a_folder_that_is_no_audio_text_model_is_one_error_naming_the_flag(tmp_path, part):
    change, message = SPOILT[part]
    with pytest.raises(UserError, match=f"^--alm: '.*spoilt' could not be loaded: .*{message}|{message}"):
        open_audio_text_model(change(tiny_clap.build(tmp_path / "spoilt")))


def test_the_flag_that_an_error_advises_is_that_of_whoever_asked(tmp_path):
    folder = str(with_code(tiny_clap.build(tmp_path / "spoilt")))
    with pytest.raises(UserError, match=r"^--teacher_alm: .* allow it with --teacher_alm_trust_remote_code True\.$"):
        AudioTextTeacher(["sad"], 1, teacher_alm=folder).load("toy")


def test_a_hub_id_that_cannot_be_reached_is_one_error_naming_the_flag(monkeypatch):
    def unreachable(*args, **options):
        raise ConnectionError("no route to the hub\nand much more")

    monkeypatch.setattr(pretrained, "snapshot_download", unreachable)
    with pytest.raises(UserError, match=r"^--alm: 'laion/clap' could not be loaded: no route to the hub\. Pass"):
        open_audio_text_model("laion/clap")


def test_an_extractor_that_draws_random_numbers_is_refused(folders, monkeypatch):
    heard = audio_text.GenericAudioTextModel.audio_inputs

    def noisy(self, samples):
        return heard(self, samples + torch.tensor(np.random.normal(size=len(samples)), dtype=torch.float32))

    monkeypatch.setattr(audio_text.GenericAudioTextModel, "audio_inputs", noisy)
    np.random.seed(3)
    expected = np.random.RandomState(3).rand()
    with pytest.raises(UserError, match="one clip twice gives two embeddings"):
        ClapModel(folders[False])
    assert np.random.rand() == expected
