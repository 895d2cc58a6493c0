"""Training a classifier, exporting it, and recognising with what was exported."""

import json
import re
import shutil
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.inference.interfaces import foreign_class
from torchaudio.functional import resample
from toy_corpora import LABELS, utterance, write_wav

from speechbrain_mifuse.brains import classifier as brains
from speechbrain_mifuse.cli.main import main
from speechbrain_mifuse.corpora.manifest import CorpusError
from speechbrain_mifuse.experiments.recipes import load_recipe
from speechbrain_mifuse.experiments.same_settings import SettingsError
from speechbrain_mifuse.features.encoder import FrozenEncoder
from speechbrain_mifuse.features.extract import FrameReader, extract
from speechbrain_mifuse.features.front import StoredFrames
from speechbrain_mifuse.inference import recognizer as inference
from speechbrain_mifuse.inference.model_card import encoder_told, licence_told, scores_told, trained_card
from speechbrain_mifuse.inference.recognizer import EmotionRecognizer
from speechbrain_mifuse.inference.recognizer_folder import RecogniserError, load_classifier, recogniser_digest
from speechbrain_mifuse.inference.server import EmotionServer
from speechbrain_mifuse.inference.windows import Windowing, heard_windows, smoothed, stretches
from speechbrain_mifuse.nnet.calibration import fit_temperature, mean_nll, tempered
from speechbrain_mifuse.utils.audio import BadAudio, load_audio
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.files import atomic_write

RECIPE = load_recipe("recipes/RAVDESS/classifier/train.py")
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
        return RECIPE.train_classifier(hparams, StoredFrames(self.store, hparams["layer"]))


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
    monkeypatch.setattr(RECIPE, "make_brain", lambda *_: pytest.fail("trained again"))
    with caplog.at_level("INFO"):
        assert corpus.train(tmp_path) == first
    assert recogniser_digest(first) == before and "training skipped" in caplog.text


def test_the_same_seed_gives_the_same_classifier_and_another_seed_another(corpus, tmp_path):
    digests = [recogniser_digest(corpus.train(tmp_path / n, seed=seed)) for n, seed in (("a", 1), ("b", 1), ("c", 2))]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("changed", [{"seed": 5}, {"dropout": 0.1}, {"learning_rate": 0.5}, {"number_of_epochs": 2}])
def test_other_settings_in_the_same_folder_are_an_error_naming_them(corpus, tmp_path, changed):
    corpus.train(tmp_path, number_of_epochs=1)
    with pytest.raises(SettingsError, match=f"{next(iter(changed))}: .* -> "):
        corpus.train(tmp_path, **{"number_of_epochs": 1, **changed})


def test_another_training_set_in_the_same_folder_is_an_error(corpus, tmp_path):
    corpus.train(tmp_path, number_of_epochs=1)
    with pytest.raises(SettingsError, match="the recordings to train on changed"):
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
    dataset = RECIPE.dataio_prepare(corpus.hparams("unused"), StoredFrames(corpus.store, 0))["train"]
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
        label, probs = recogniser.predict_file(corpus.folder / f"{emo}00.wav")
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
    recogniser, calls, plain = EmotionRecognizer.from_hparams(folder), [], FrameReader.encode_each
    monkeypatch.setattr(FrameReader, "encode_each", lambda *args: calls.append(1) or plain(*args))
    for _ in range(5):
        recogniser.predict_proba(sound(), n=3, stochastic=True)
    assert len(calls) == 1
    recogniser.predict_proba(sound(seed=1))
    assert len(calls) == 2


def test_many_answers_to_one_recording_hash_it_once_unless_it_changes(folder, monkeypatch):
    recogniser, calls, plain = EmotionRecognizer.from_hparams(folder), [], inference.content_hash
    monkeypatch.setattr(inference, "content_hash", lambda wave: calls.append(1) or plain(wave))
    samples = sound().numpy()
    wave = torch.from_numpy(samples)
    first = [recogniser.predict_proba(wave) for _ in range(4)]
    assert len(calls) == 1 and first[3].equal(first[0])
    samples[:] = sound(seed=1).numpy()  # which torch does not see
    changed = recogniser.predict_proba(wave)
    assert len(calls) == 2 and not changed.equal(first[0])
    wave.copy_(sound())
    assert recogniser.predict_proba(wave).equal(first[0]) and len(calls) == 3


def test_memory_of_recordings_is_bounded(folder, monkeypatch):
    monkeypatch.setattr(inference, "REMEMBERED", 3)
    recogniser = EmotionRecognizer.from_hparams(folder)
    for seed in range(6):
        recogniser.predict_proba(sound(seed=seed))
    assert len(recogniser._vectors) == 3


def test_seeds_leave_nothing_behind_in_memory(recogniser):
    wave = sound()
    recogniser.predict_proba(wave, stochastic=True, seed=0)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for seed in range(50):
        recogniser.predict_proba(wave, stochastic=True, seed=seed)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 20_000


def test_a_file_of_any_rate_and_channel_count_is_recognised_alike(recogniser, corpus, tmp_path):
    wave = load_audio(corpus.folder / "angry00.wav").numpy()
    soundfile.write(tmp_path / "a.flac", np.stack([wave, wave], axis=1), 16000, subtype="PCM_16")
    expected = recogniser.predict_file(corpus.folder / "angry00.wav")
    found = recogniser.predict_file(tmp_path / "a.flac")
    assert found[0] == expected[0]
    torch.testing.assert_close(found[1], expected[1], atol=1e-3, rtol=0)


def test_an_unreadable_file_is_an_error_naming_it(recogniser, tmp_path):
    with pytest.raises(BadAudio, match=r"missing.wav: cannot be read"):
        recogniser.predict_file(tmp_path / "missing.wav")


def test_a_recogniser_may_be_moved(folder, tmp_path, recogniser):
    moved = EmotionRecognizer.from_hparams(shutil.copytree(folder, tmp_path / "elsewhere"))
    assert moved.predict_proba(sound()).equal(recogniser.predict_proba(sound()))


def test_the_digest_follows_weights_and_settings_not_the_place(copied, folder):
    assert recogniser_digest(copied) == recogniser_digest(folder)
    weights = bytearray((copied / "classifier.safetensors").read_bytes())
    weights[-1] ^= 1
    (copied / "classifier.safetensors").write_bytes(weights)
    assert recogniser_digest(copied) != recogniser_digest(folder)


# Batches and folders.


def test_a_padded_batch_gives_what_each_clip_gives_alone_in_speechbrains_convention(recogniser, corpus):
    clips = [load_audio(corpus.folder / f"{emo}0{take}.wav") for take, emo in enumerate(("angry", "sad", "happy"))]
    longest = max(map(len, clips))
    wavs = torch.full((3, longest), 0.7)  # what lies behind a clip must not be heard
    for row, clip in zip(wavs, clips, strict=True):
        row[: len(clip)] = clip
    lens = torch.tensor([len(clip) / longest for clip in clips])
    probs, score, index, labels = recogniser.classify_batch(wavs, lens)
    alone = torch.stack(
        [recogniser.predict_file(corpus.folder / f"{e}.wav")[1] for e in ("angry00", "sad01", "happy02")]
    )
    torch.testing.assert_close(probs, alone, atol=1e-5, rtol=0)
    assert score.equal(probs.max(1).values) and index.equal(probs.argmax(1))
    assert labels == [LABELS[place] for place in index]
    assert recogniser(wavs, lens)[0].equal(probs) and recogniser.classify_batch(wavs[:, :999])[0].shape == (3, 4)


def test_digital_silence_has_no_emotion_however_it_is_heard(recogniser, corpus, tmp_path, monkeypatch):
    silent, spoken = write_wav(tmp_path / "silent.wav", np.zeros(48000)), corpus.folder / "sad00.wav"
    expected = recogniser.predict_file(spoken)
    label, probs = recogniser.predict_file(silent)
    assert label is None and probs.equal(torch.zeros(4))
    for limits in ({}, {"LONG": 0.0}):
        for name, value in limits.items():
            monkeypatch.setattr(inference, name, value)
        for window_s in (None, 10.0):
            found = list(recogniser.classify_files([silent, spoken, silent], window_s, show_progress=False))
            assert [one.label for one in found] == [None, expected[0], None]
            assert not found[0].probs.any() and not found[2].probs.any()
            torch.testing.assert_close(found[1].probs, expected[1], atol=1e-5, rtol=0)
    clip = load_audio(spoken)
    probs, score, _, labels = recogniser.classify_batch(torch.stack([torch.zeros(len(clip)), clip]))
    assert labels == [None, expected[0]] and not probs[0].any() and score[0] == 0
    torch.testing.assert_close(probs[1], expected[1], atol=1e-5, rtol=0)
    assert float(recogniser.predict_proba(torch.zeros(16000)).sum()) == pytest.approx(1, abs=1e-5)


def test_what_is_too_short_to_be_speech_has_no_emotion(recogniser):
    loud = torch.rand(2, 3200) - 0.5
    assert recogniser.classify_batch(loud[:, :1599])[3] == [None, None]
    assert None not in recogniser.classify_batch(loud[:, :1600])[3]


@pytest.mark.parametrize("make", [str, Path])
def test_one_path_in_place_of_several_is_an_error(recogniser, make):
    with pytest.raises(UserError, match=r"'a.wav' is one path; pass a list"):
        next(recogniser.classify_files(make("a.wav")))


@pytest.mark.parametrize("name", ["hop_s", "smooth_s"])
def test_a_setting_of_windows_without_windows_is_an_error(recogniser, corpus, name):
    with pytest.raises(UserError, match=rf"{name}: 1.0 .*window_s"):
        next(recogniser.classify_files([], **{name: 1.0}))
    with pytest.raises(UserError, match=rf"{name}: 1.0 .*window_s"):
        next(recogniser.classify_folder(corpus.folder, **{name: 1.0}))


def test_batches_as_on_a_gpu_give_what_each_clip_gives_alone(recogniser, corpus, meeting, monkeypatch):
    paths = sorted(corpus.folder.glob("*.wav"))[:7]
    clips = [load_audio(path) for path in paths]
    frames = recogniser._frames_of(clips)
    files = [one.probs for one in recogniser.classify_files(paths, show_progress=False)]
    over_time = recogniser.classify_long(meeting, window_s=0.5).probs
    sizes, plain = [], FrameReader.encode_together
    monkeypatch.setattr(FrameReader, "batches", True)
    monkeypatch.setattr(inference, "BATCH_S", 1.0)
    monkeypatch.setattr(FrameReader, "encode_together", lambda reader, w: sizes.append(len(w)) or plain(reader, w))
    for one, other in zip(recogniser._frames_of(clips), frames, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    assert sum(sizes) == 7 and 1 < max(sizes) < 7
    found = torch.stack([one.probs for one in recogniser.classify_files(paths, show_progress=False)])
    torch.testing.assert_close(found, torch.stack(files), atol=1e-4, rtol=0)
    sizes.clear()
    torch.testing.assert_close(recogniser.classify_long(meeting, window_s=0.5).probs, over_time, atol=1e-4, rtol=0)
    wavs = torch.stack([clip[:4000] for clip in clips])
    assert max(sizes) > 1
    sizes.clear()
    batch = recogniser.classify_batch(wavs)[0]
    assert max(sizes) > 1
    monkeypatch.undo()
    torch.testing.assert_close(batch, recogniser.classify_batch(wavs)[0], atol=1e-4, rtol=0)


def test_an_encoder_that_cuts_long_recordings_itself_is_left_to_it(recogniser, meeting, monkeypatch):
    expected = recogniser._frames(meeting)
    monkeypatch.setattr(inference, "LONG", 0.5)
    monkeypatch.setattr(inference, "PIECE_S", 0.25)
    assert recogniser._frames(meeting).equal(expected)


def test_a_folder_is_gone_through_by_path_and_an_unreadable_file_is_logged_and_left_out(
    recogniser, corpus, tmp_path, caplog, capsys
):
    for name in ("b/sad00.wav", "a.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(corpus.folder / "sad00.wav", tmp_path / name)
    (tmp_path / "bad.wav").write_text("no audio")
    (tmp_path / ".hidden.wav").write_text("no audio")
    (tmp_path / "notes.txt").write_text("no audio")
    found = list(recogniser.classify_folder(tmp_path))
    assert [one.path for one in found] == [tmp_path / "a.wav", tmp_path / "b" / "sad00.wav"]
    assert caplog.text.count("left out") == 1 and "bad.wav: cannot be read" in caplog.text
    assert "recognise" in capsys.readouterr().err
    label, probs = recogniser.predict_file(corpus.folder / "sad00.wav")
    for one in found:
        assert one.label == label and one.timeline is None and one.error is None
        torch.testing.assert_close(one.probs, probs, atol=1e-5, rtol=0)


def test_going_through_a_folder_leaves_the_number_of_threads_as_it_is(recogniser, corpus):
    before = torch.get_num_threads()
    answers = recogniser.classify_folder(corpus.folder, show_progress=False)
    next(answers)
    assert torch.get_num_threads() == before
    answers.close()
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("make", [lambda folder: None, lambda folder: folder.mkdir()])
def test_a_folder_that_is_missing_or_empty_is_an_error_naming_it(recogniser, tmp_path, make):
    make(tmp_path / "none")
    with pytest.raises(UserError, match=r"none: (no such folder|holds no recording)"):
        next(recogniser.classify_folder(tmp_path / "none"))


def test_a_very_long_recording_heard_as_one_utterance_is_warned_of(recogniser, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(inference, "LONG", 0.5)
    write_wav(tmp_path / "long.wav", sound(1.0).numpy())
    assert len(list(recogniser.classify_folder(tmp_path))) == 1
    assert "1 recordings are longer" in caplog.text and "--window_s" in caplog.text


# Over time.


@pytest.fixture(scope="module")
def meeting(corpus):
    """Two seconds of one voice, a second of nothing, two seconds of another."""
    parts = [load_audio(corpus.folder / f"{emo}.wav")[:4480] for emo in ("angry00", "sad00")]
    return torch.cat([parts[0].repeat(7), torch.zeros(16000), parts[1].repeat(7)])


def test_a_long_recording_gives_stretches_without_gaps_whose_answers_are_those_of_their_windows(recogniser, meeting):
    found = recogniser.classify_long(meeting, window_s=0.5, hop_s=0.25, smooth_s=0)
    edges = [part.start for part in found.segments] + [found.segments[-1].end]
    assert edges[0] == 0 and edges[-1] == len(meeting) / 16000 and edges == sorted(edges)
    assert [part.start for part in found.segments[1:]] == [part.end for part in found.segments[:-1]]
    first = recogniser._answer_to(meeting[:8000])
    assert found.segments[0].label == LABELS[int(first.argmax())]
    silent = [part for part in found.segments if part.start < 2.4 < part.end]
    assert [part.label for part in silent] == [None] and not silent[0].probs.any()
    assert found.label in LABELS and float(found.probs.sum()) == pytest.approx(1, abs=1e-5)


def test_a_recording_no_longer_than_a_window_is_answered_as_a_file_is(recogniser, corpus):
    path = corpus.folder / "angry00.wav"
    label, probs = recogniser.predict_file(path)
    found = recogniser.classify_long(path, window_s=10)
    assert len(found.segments) == 1 and found.label == found.segments[0].label == label
    torch.testing.assert_close(found.probs, probs, atol=1e-5, rtol=0)
    in_folder = next(recogniser.classify_files([path], window_s=10))
    assert in_folder.timeline.segments[0].label == label and in_folder.probs.equal(probs)


def test_files_over_time_are_answered_as_long_recordings_are(recogniser, meeting, tmp_path):
    path = write_wav(tmp_path / "meeting.wav", meeting.numpy())
    one = next(recogniser.classify_files([path], window_s=0.5))
    alone = recogniser.classify_long(path, window_s=0.5)
    assert [part[:3] for part in one.timeline.segments] == [part[:3] for part in alone.segments]
    torch.testing.assert_close(one.probs, alone.probs, atol=1e-5, rtol=0)


def test_smoothing_takes_out_a_single_odd_window_and_never_mixes_speech_into_silence():
    probs = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.9, 0.1], [0.9, 0.1]])
    weights, centres = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.arange(4.0)
    assert smoothed(probs, weights, centres, 2.0).argmax(1).tolist()[:3] == [0, 0, 0]
    assert smoothed(probs, weights, centres, 0.0)[:3].equal(probs[:3])
    assert not smoothed(probs, weights, centres, 2.0)[3].any()


def test_a_stretch_has_the_mean_over_its_time_and_silence_is_a_stretch_of_its_own():
    probs = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.0, 0.0]])
    found = stretches(torch.tensor([1.0, 2.0, 3.0]), 4.0, ["a", "a", None], probs)
    assert [part[:3] for part in found] == [(0.0, 2.5, "a"), (2.5, 4.0, None)]
    assert found[0].probs.tolist() == pytest.approx([0.72, 0.28])


@pytest.mark.parametrize(
    "lengths",
    [(0, None, None), (1, 0, None), (1, 2, None), (1, None, -1), (float("nan"), 1, 1), (float("inf"), None, None)],
)
def test_lengths_that_do_not_fit_together_are_an_error_naming_one(recogniser, lengths):
    with pytest.raises(UserError, match=r"(window|hop|smooth)_s: "):
        Windowing.of(*lengths)
    with pytest.raises(UserError, match=r"(window|hop|smooth)_s: "):
        next(recogniser.classify_files([], *lengths))


# Live audio.


def test_live_audio_is_answered_alike_whatever_the_size_of_its_chunks(recogniser, meeting):
    sizes = {}
    for size in (160, 4000, len(meeting)):
        chunks = (meeting[start : start + size] for start in range(0, len(meeting), size))
        sizes[size] = list(recogniser.stream(chunks, 16000, window_s=0.5, hop_s=0.25))
    first, *others = sizes.values()
    assert [round(part.end, 3) for part in first[:3]] == [0.25, 0.5, 0.75]
    assert first[-1].end == len(meeting) / 16000 and all(part.end - part.start <= 0.5 for part in first)
    for other in others:
        assert [part[:3] for part in other] == [part[:3] for part in first]
        torch.testing.assert_close(other[-1].probs, first[-1].probs, atol=1e-5, rtol=0)


def test_live_audio_without_smoothing_says_of_a_window_what_the_window_alone_says(recogniser, meeting):
    found = list(recogniser.stream([meeting], 16000, window_s=0.5, hop_s=0.5, smooth_s=0))
    torch.testing.assert_close(found[1].probs, recogniser._answer_to(meeting[8000:16000]), atol=1e-5, rtol=0)
    silent = [part for part in found if part.start >= 2.0 and part.end <= 2.9]
    assert silent and all(part.label is None for part in silent)


def test_live_audio_of_another_rate_is_resampled(recogniser, meeting):
    double = resample(meeting, 16000, 32000)
    plain = list(recogniser.stream([meeting], 16000, window_s=0.5, hop_s=0.5))
    found = list(recogniser.stream([double.numpy()], 32000, window_s=0.5, hop_s=0.5))
    assert [part.end for part in found] == [part.end for part in plain]
    torch.testing.assert_close(found[1].probs, plain[1].probs, atol=0.05, rtol=0)


def test_live_audio_keeps_no_more_than_a_window():
    parts = [wave for _, wave in heard_windows((torch.ones(1000) for _ in range(50)), window=300, hop=700)]
    assert max(map(len, parts)) == 300 and len(parts) == 72


@pytest.mark.parametrize("chunk", [torch.zeros(2, 8), torch.zeros(8, dtype=torch.int64), torch.tensor([float("nan")])])
def test_a_chunk_that_is_no_waveform_is_an_error_that_numbers_it(recogniser, chunk):
    with pytest.raises(UserError, match="chunk 1: "):
        list(recogniser.stream([torch.zeros(8), chunk], 16000))


# Probabilities, thresholds, precision.


def test_temperature_is_found_where_labels_were_drawn_from_tempered_probabilities():
    rng = torch.Generator().manual_seed(0)
    truth = (2 * torch.randn(20000, 4, generator=rng)).softmax(-1)
    drawn = torch.nn.functional.one_hot(torch.multinomial(truth, 1, generator=rng)[:, 0], 4)
    assert fit_temperature(tempered(truth, 1 / 3), drawn) == pytest.approx(3.0, rel=0.03)
    assert fit_temperature(truth[:50], drawn[:50]) != 1.0
    assert fit_temperature(torch.eye(4), torch.eye(4)) == pytest.approx(0.1)


def test_files_are_answered_at_the_exported_temperature_and_teachers_without_it(folder, recogniser, corpus):
    about = json.loads((folder / "about.json").read_text())
    validation = about["validation"]
    assert recogniser.temperature == about["temperature"] == validation["temperature"] != 1.0
    assert validation["calibrated_nll"] < validation["nll"]
    raw = recogniser.predict_proba(load_audio(corpus.folder / "angry30.wav"))[0]
    label, probs = recogniser.predict_file(corpus.folder / "angry30.wav")
    torch.testing.assert_close(probs, tempered(raw, recogniser.temperature), atol=1e-5, rtol=0)
    assert label == LABELS[int(raw.argmax())] and (probs - raw).abs().max() > 1e-3


def test_the_exported_temperature_makes_held_out_labels_most_likely(recogniser, corpus):
    rows = json.loads((corpus.folder / "valid.json").read_text())
    raw = torch.cat([recogniser.predict_proba(load_audio(corpus.folder / f"{key[2:]}.wav")) for key in rows])
    said = torch.nn.functional.one_hot(torch.tensor([LABELS.index(row["emo"]) for row in rows.values()]), 4)
    best = mean_nll(raw, said, recogniser.temperature)
    assert best < mean_nll(raw, said, 0.7 * recogniser.temperature)
    assert best < mean_nll(raw, said, 1.4 * recogniser.temperature)


def test_an_answer_below_the_threshold_has_no_label_and_keeps_its_probabilities(folder, corpus):
    path = corpus.folder / "sad00.wav"
    sure = EmotionRecognizer.from_hparams(folder)
    unsure = EmotionRecognizer.from_hparams(folder, abstain_below=1.0)
    assert sure.predict_file(path)[0] in LABELS and unsure.predict_file(path)[0] is None
    assert unsure.predict_file(path)[1].equal(sure.predict_file(path)[1])
    wavs = load_audio(path)[None]
    assert unsure.classify_batch(wavs)[3] == [None] and sure.classify_batch(wavs)[3] != [None]
    assert unsure.classify_long(path).label is None
    sure.abstain_below = 1.0
    assert sure.predict_file(path)[0] is None


def test_the_encoder_computes_in_bfloat16_when_the_run_options_say_so(folder, recogniser):
    lower = EmotionRecognizer.from_hparams(folder, run_opts={"device": "cpu", "precision": "bf16"})
    exact, near = recogniser.predict_proba(sound())[0], lower.predict_proba(sound())[0]
    assert near.dtype == torch.float32 and not near.equal(exact)
    torch.testing.assert_close(near, exact, atol=0.1, rtol=0)


# Folders: SpeechBrain's own loader, older ones, the model card.


def test_speechbrains_foreign_class_loads_the_folder_from_anywhere(folder, recogniser, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = foreign_class(source=str(folder), pymodule_file="custom.py", classname="CustomInterface")
    assert loaded.predict_proba(sound()).equal(recogniser.predict_proba(sound()))
    assert loaded.temperature == recogniser.temperature


def test_a_folder_of_an_earlier_version_is_loaded_without_a_temperature(copied, recogniser, corpus):
    text = (copied / "hyperparams.yaml").read_text()
    text = re.sub("temperature: .*\n", "", text)
    text = text.replace(
        "speechbrain_mifuse.inference.FolderPretrainer", "speechbrain.utils.parameter_transfer.Pretrainer"
    )
    (copied / "hyperparams.yaml").write_text(text)
    for name in ("custom.py", "README.md"):
        (copied / name).unlink()
    older = EmotionRecognizer.from_hparams(copied)
    assert older.temperature == 1.0
    raw = recogniser.predict_proba(load_audio(corpus.folder / "sad00.wav"))[0]
    torch.testing.assert_close(older.predict_file(corpus.folder / "sad00.wav")[1], raw, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("n", "rarest", "calibrated"), [(4, 1, False), (49, 5, False), (50, 4, False), (50, 5, True), (500, 100, True)]
)
def test_a_card_speaks_of_a_calibration_only_where_there_are_enough_labels(n, rarest, calibrated):
    counts = {"angry": n - rarest, "sad": rarest}
    found = {"UA": 0.5, "WA": 0.5, "ci95": [0.4, 0.6], "test_speakers": 3, "n": n, "counts": counts}
    card = trained_card({"labels": list(counts), "temperature": 1.5, "validation": found, "code_version": "1"})
    assert ("probabilities are calibrated for speech like theirs" in card) == calibrated
    assert (f"fitted on only {n} recordings" in card and "cannot be told" in card) == (not calibrated)
    assert ("95 % interval over 3 speakers" in card) == (n >= 50)


def test_the_model_card_says_what_the_result_files_say(folder):
    card, found = (folder / "README.md").read_text(), json.loads((folder.parent / "validation.json").read_text())
    assert f"UA {100 * found['UA']:.1f} % (too few recordings for an interval)" in card
    assert "trained on toy" in card and "9 angry" in card and f"temperature {found['temperature']:g}" in card
    for heading in ("Training", "How well it does", "Limits", "Intended use", "Licence of the recordings"):
        assert f"\n## {heading}" in card


def test_a_card_names_one_speakers_interval_as_none_and_a_local_encoder_by_its_name():
    assert scores_told({"UA": 0.5, "WA": 0.6, "ci95": [0.5, 0.5], "test_speakers": 1}) == (
        "UA 50.0 % (one speaker: no interval), WA 60.0 %"
    )
    assert encoder_told("/home/someone/encoders/mine") == "mine"


def test_a_folder_that_is_not_there_is_one_error_without_a_word_of_repo_ids_first(tmp_path):
    with pytest.raises(RecogniserError, match=r"nowhere/at/all: no folder of a recogniser"):
        EmotionRecognizer.from_hparams(tmp_path / "nowhere" / "at" / "all")


@pytest.mark.parametrize("corpus_name", ["ravdess", "nemo", "emodb", "iemocap", "msp_improv", "crema_d", "synthetic_A"])
def test_the_model_card_knows_the_licence_note_of_every_corpus(corpus_name):
    assert "licence" in licence_told(corpus_name).lower() and licence_told(corpus_name).endswith(".")


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


def test_each_thread_that_encodes_uses_one_core_where_operations_use_several():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with inference.one_core_threads(2) as pool:
            assert {pool.submit(torch.get_num_threads).result() for _ in range(8)} == {1}
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_threads_that_start_others_at_once_leave_the_number_of_cores_as_it_is():
    before, interval = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(3)
    sys.setswitchinterval(1e-6)
    found = []

    def start_others():
        with inference.one_core_threads(2):
            pass

    def look():
        found.append(torch.get_num_threads())

    try:
        # A thread takes over the process's number when it first looks, so each round has new ones.
        for targets in [*[[start_others] * 4] * 60, [look]]:
            threads = [threading.Thread(target=target) for target in targets]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert found == [3]
    finally:
        sys.setswitchinterval(interval)
        torch.set_num_threads(before)


def test_a_recording_that_is_too_long_to_wait_for_others_gets_the_same_answer(recogniser, corpus, monkeypatch):
    paths = sorted(corpus.folder.glob("*.wav"))[:5]
    expected = list(recogniser.classify_files(paths, show_progress=False))
    monkeypatch.setattr(inference, "LONG", 0.0)
    found = list(recogniser.classify_files(paths, show_progress=False))
    for one, other in zip(found, expected, strict=True):
        assert (one.path, one.label) == (other.path, other.label)
        torch.testing.assert_close(one.probs, other.probs)


def test_an_encoder_that_takes_its_time_goes_clip_by_clip(recogniser, corpus, monkeypatch):
    sizes, plain = [], recogniser._answers
    monkeypatch.setattr(recogniser, "_answers", lambda frames: sizes.append(len(frames)) or plain(frames))
    paths = sorted(corpus.folder.glob("*.wav")) * 4
    monkeypatch.setattr(inference, "GROUP_S", 1e-6)
    list(recogniser.classify_files(paths, show_progress=False))
    assert set(sizes) == {1}
    monkeypatch.setattr(inference, "GROUP_S", 1e6)
    list(recogniser.classify_files(paths, show_progress=False))
    assert max(sizes) > 1
