"""Training a classifier, exporting it, and recognising with what was exported."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hyperpyyaml import load_hyperpyyaml
from toy_corpora import LABELS, utterance, write_wav

from speechbrain_mifuse import inference
from speechbrain_mifuse.audio import BadAudio, load_audio
from speechbrain_mifuse.brains import classifier as brains
from speechbrain_mifuse.brains.training import SettingsError
from speechbrain_mifuse.cli import main
from speechbrain_mifuse.corpora.manifest import CorpusError, atomic_write
from speechbrain_mifuse.features.encoder import FrozenEncoder
from speechbrain_mifuse.features.extract import FrameReader, extract
from speechbrain_mifuse.features.front import StoredFrames
from speechbrain_mifuse.inference import EmotionRecognizer, RecogniserError, load_classifier, recogniser_digest
from speechbrain_mifuse.lalm.serve import EmotionServer

YAML = Path(__file__).parents[2] / "hparams" / "base" / "classifier.yaml"
QUICK = {"number_of_epochs": 30, "batch_size": 8, "learning_rate": 0.001}
# How far probabilities may lie apart because stored frames are fp16 and live ones float32.
FP16 = 0.01


class Corpus:
    """A few toy utterances with manifests and stored frames of two layers."""

    def __init__(self, folder, encoder):
        self.folder, self.encoder = folder, encoder
        self.reader = FrameReader(FrozenEncoder(encoder, [0, 1]), trim_db=40.0, frame_average=2)
        for split, speakers in (("train", (0, 2, 4)), ("valid", (1, 3))):
            rows = {}
            for emo, speaker, take in ((e, s, t) for e in LABELS for s in speakers for t in range(3)):
                name = f"{emo}{speaker}{take}"
                write_wav(folder / f"{name}.wav", utterance(emo, speaker, take))
                rows[f"t-{name}"] = {"wav": f"{{data_root}}/{name}.wav", "emo": emo, "speaker": str(speaker)}
            atomic_write(folder / f"{split}.json", json.dumps(rows))
        atomic_write(folder / "corpus.json", json.dumps({"data_root": str(folder)}))
        manifests = [folder / "train.json", folder / "valid.json"]
        self.store = extract(manifests, self.reader, folder / "store")

    def hparams(self, output_folder, **changes):
        filled = {
            "name": "toy",
            "seed": 1,
            "labels": list(LABELS),
            "output_folder": str(output_folder),
            "train_manifest": str(self.folder / "train.json"),
            "valid_manifest": str(self.folder / "valid.json"),
            "encoder": str(self.encoder),
            "layer": 0,
            "trim_db": 40.0,
        }
        with YAML.open() as file:
            return load_hyperpyyaml(file, {**filled, **QUICK, **changes})

    def train(self, output_folder, **changes):
        hparams = self.hparams(output_folder, **changes)
        return brains.train_classifier(hparams, StoredFrames(self.store, hparams["layer"]))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, toy_encoder):
    return Corpus(tmp_path_factory.mktemp("corpus"), toy_encoder)


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory):
    """Folder of a trained recogniser."""
    return corpus.train(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def recogniser(folder):
    return EmotionRecognizer.from_hparams(folder)


@pytest.fixture
def copied(folder, tmp_path):
    """Make a copy that may be damaged."""
    return shutil.copytree(folder, tmp_path / "copy")


def sound(seconds=0.3, seed=0):
    return 0.1 * torch.randn(int(16000 * seconds), generator=torch.Generator().manual_seed(seed))


# Training.


def test_training_learns_the_toy_classes_and_keeps_the_result_of_held_out_speakers(folder):
    found = json.loads((folder.parent / "validation.json").read_text())
    assert found["UA"] > 0.7 and found["n"] == 24
    assert json.loads((folder / "about.json").read_text())["validation"] == found


def test_a_trained_classifier_is_not_trained_again(corpus, tmp_path, monkeypatch, caplog):
    first = corpus.train(tmp_path)
    before = recogniser_digest(first)
    monkeypatch.setattr(brains, "make_brain", lambda *_: pytest.fail("trained again"))
    with caplog.at_level("INFO"):
        assert corpus.train(tmp_path) == first
    assert recogniser_digest(first) == before and "training skipped" in caplog.text


def test_the_same_seed_gives_the_same_classifier_and_another_seed_another(corpus, tmp_path):
    digests = [recogniser_digest(corpus.train(tmp_path / n, seed=seed)) for n, seed in (("a", 1), ("b", 1), ("c", 2))]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("changed", [{"seed": 5}, {"dropout": 0.1}, {"learning_rate": 0.5}, {"number_of_epochs": 2}])
def test_other_settings_in_the_same_folder_are_an_error_naming_them(corpus, tmp_path, changed):
    corpus.train(tmp_path, number_of_epochs=1)
    with pytest.raises(SettingsError, match=f"{next(iter(changed))}: found"):
        corpus.train(tmp_path, **{"number_of_epochs": 1, **changed})


def test_another_training_set_in_the_same_folder_is_an_error(corpus, tmp_path):
    corpus.train(tmp_path, number_of_epochs=1)
    with pytest.raises(SettingsError, match="train_manifest: found"):
        corpus.train(tmp_path, number_of_epochs=1, train_manifest=str(corpus.folder / "valid.json"))


def test_a_label_outside_the_order_is_an_error_naming_the_utterance(corpus, tmp_path):
    with pytest.raises(CorpusError, match="'t-happy00' has the label 'happy', which is none of angry, neutral, sad"):
        corpus.train(tmp_path, labels=["angry", "neutral", "sad"])


def test_class_weights_let_every_class_count_the_same():
    labels = torch.tensor([0] * 6 + [1] * 3 + [3])
    weights = brains.class_weights(labels, 4)
    counts = torch.bincount(labels, minlength=4)
    assert (weights * counts).tolist() == pytest.approx([2.5, 2.5, 0.0, 2.5])


def test_labels_follow_the_fixed_order_not_their_appearance(corpus):
    dataset = brains.labelled_dataset(corpus.folder / "train.json", StoredFrames(corpus.store, 0), LABELS)
    assert all(dataset.data[key]["label"] == LABELS.index(key[2:-2]) for key in dataset.data_ids)


# Loading and recognising.


def test_the_recogniser_gives_what_its_classifier_gives_on_stored_frames(recogniser, folder, corpus):
    model = load_classifier(folder, LABELS, corpus.store.fingerprint).eval()
    for key in ("t-angry30", "t-sad11"):
        stored = torch.from_numpy(corpus.store.frames(key, 0)).float()
        with torch.no_grad():
            expected = model(stored[None]).softmax(-1)[0]
        found = recogniser.predict_proba(load_audio(corpus.folder / f"{key[2:]}.wav"))
        torch.testing.assert_close(found[0], expected, atol=FP16, rtol=0)
        assert (found[0] - 0.25).abs().max() > 10 * FP16


def test_all_layers_can_be_weighted_by_the_recogniser_as_in_training(corpus, tmp_path):
    folder = corpus.train(tmp_path, layer=None)
    model = load_classifier(folder, LABELS, corpus.store.fingerprint).eval()
    assert model.layer_weighting.weight.shape == (2,)
    stored = torch.from_numpy(corpus.store.frames("t-angry30")).float().transpose(0, 1)
    with torch.no_grad():
        expected = model(stored[None]).softmax(-1)[0]
    found = EmotionRecognizer.from_hparams(folder).predict_proba(load_audio(corpus.folder / "angry30.wav"))
    torch.testing.assert_close(found[0], expected, atol=FP16, rtol=0)
    assert (found[0] - 0.25).abs().max() > 10 * FP16


def test_probabilities_are_distributions_in_the_fixed_label_order(recogniser, corpus):
    assert recogniser.labels == LABELS
    probs = recogniser.predict_proba(sound(), n=3)
    assert probs.shape == (3, 4)
    torch.testing.assert_close(probs.sum(1), torch.ones(3))
    hits = 0
    for emo in LABELS:
        label, probs = recogniser.classify_file(corpus.folder / f"{emo}00.wav")
        assert label == LABELS[int(probs.argmax())]
        hits += label == emo
    assert hits >= 3


def test_predictions_are_deterministic_unless_stochastic_ones_are_asked_for(recogniser):
    probs = recogniser.predict_proba(sound(), n=5)
    assert all(row.equal(probs[0]) for row in probs)
    drawn = recogniser.predict_proba(sound(), n=5, stochastic=True)
    assert len(drawn.unique(dim=0)) == 5


def test_the_same_seed_draws_the_same_predictions_and_disturbs_nobody(recogniser):
    torch.manual_seed(9)
    state = torch.get_rng_state()
    first, again = (recogniser.predict_proba(sound(), n=5, stochastic=True, seed=3) for _ in range(2))
    assert first.equal(again) and torch.get_rng_state().equal(state)
    assert not first.equal(recogniser.predict_proba(sound(), n=5, stochastic=True, seed=4))


def test_one_recording_is_encoded_once_however_often_it_is_asked_about(folder, monkeypatch):
    recogniser, calls, plain = EmotionRecognizer.from_hparams(folder), [], FrameReader.encode
    monkeypatch.setattr(FrameReader, "encode", lambda *args: calls.append(1) or plain(*args))
    for _ in range(5):
        recogniser.predict_proba(sound(), n=3, stochastic=True)
    assert len(calls) == 1
    recogniser.predict_proba(sound(seed=1))
    assert len(calls) == 2


def test_memory_of_recordings_is_bounded(folder, monkeypatch):
    monkeypatch.setattr(inference, "REMEMBERED", 3)
    recogniser = EmotionRecognizer.from_hparams(folder)
    for seed in range(6):
        recogniser.predict_proba(sound(seed=seed))
    assert len(recogniser._vectors) == 3


def test_a_file_of_any_rate_and_channel_count_is_recognised_alike(recogniser, corpus, tmp_path):
    wave = load_audio(corpus.folder / "angry00.wav").numpy()
    soundfile.write(tmp_path / "a.flac", np.stack([wave, wave], axis=1), 16000, subtype="PCM_16")
    expected = recogniser.classify_file(corpus.folder / "angry00.wav")
    found = recogniser.classify_file(tmp_path / "a.flac")
    assert found[0] == expected[0]
    torch.testing.assert_close(found[1], expected[1], atol=1e-3, rtol=0)


def test_an_unreadable_file_is_an_error_naming_it(recogniser, tmp_path):
    with pytest.raises(BadAudio, match=r"missing.wav: cannot be read"):
        recogniser.classify_file(tmp_path / "missing.wav")


def test_a_recogniser_may_be_moved(folder, tmp_path, recogniser):
    moved = EmotionRecognizer.from_hparams(shutil.copytree(folder, tmp_path / "elsewhere"))
    assert moved.predict_proba(sound()).equal(recogniser.predict_proba(sound()))


def test_the_digest_follows_weights_and_settings_not_the_place(copied, folder):
    assert recogniser_digest(copied) == recogniser_digest(folder)
    weights = bytearray((copied / "classifier.safetensors").read_bytes())
    weights[-1] ^= 1
    (copied / "classifier.safetensors").write_bytes(weights)
    assert recogniser_digest(copied) != recogniser_digest(folder)


# What does not fit is one clear error.


@pytest.mark.parametrize("name", ["about.json", "classifier.safetensors"])
def test_a_recogniser_that_is_not_whole_is_an_error_naming_its_folder(copied, corpus, name):
    (copied / name).unlink()
    with pytest.raises(RecogniserError, match=str(copied)):
        load_classifier(copied, LABELS, corpus.store.fingerprint)


def test_damaged_weights_are_an_error_naming_the_file(copied, corpus):
    path = copied / "classifier.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RecogniserError, match=r"classifier.safetensors: cannot be loaded"):
        load_classifier(copied, LABELS, corpus.store.fingerprint)
    with pytest.raises(RecogniserError, match=r"classifier.safetensors: cannot be loaded"):
        EmotionRecognizer.from_hparams(copied)


def test_other_labels_or_another_order_are_refused(folder, corpus):
    for labels in (LABELS[:3], LABELS[::-1]):
        with pytest.raises(RecogniserError, match="labels: found"):
            load_classifier(folder, labels, corpus.store.fingerprint)


@pytest.mark.parametrize("changed", [{"encoder": "other"}, {"trim_db": None}, {"frame_average": 4}, {"dim": 7}])
def test_frames_of_another_kind_are_refused_naming_what_differs(folder, corpus, changed):
    with pytest.raises(RecogniserError, match=rf"{next(iter(changed))}: found .*Pass the same --encoder"):
        load_classifier(folder, LABELS, {**corpus.store.fingerprint, **changed})


# The console script and the server use the same recogniser.


def test_predict_prints_a_line_for_every_file_also_for_one_that_cannot_be_read(folder, corpus, tmp_path, capsys):
    good, bad = corpus.folder / "sad00.wav", tmp_path / "bad.wav"
    bad.write_text("no audio")
    main(["predict", "--source", str(folder), str(good), str(bad)])
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines() if "\t" in line]
    assert [line[0] for line in lines] == [str(good), str(bad)]
    assert lines[0][1] in LABELS and 0.25 <= float(lines[0][2]) <= 1
    assert lines[1][1] == "none" and "cannot be read" in lines[1][2]


@pytest.mark.parametrize("command", [["predict", "--source", "FOLDER", "a.wav"], ["serve", "FOLDER"]])
def test_a_missing_recogniser_is_one_error_and_status_2(command, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path) if part == "FOLDER" else part for part in command])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: no whole recogniser there")


def test_the_recogniser_can_be_served(recogniser):
    with EmotionServer(recogniser, "toy") as server:
        assert server.base_url.startswith("http://127.0.0.1:")
