"""An encoder that is trained along: what it hears of a recording does not depend on the rest of the batch."""

import shutil

import pytest
import torch
from toy_corpora import LABELS, write_encoder, write_hubert, write_wav

from speechbrain_mifuse.features.dataset import pad_frames
from speechbrain_mifuse.features.encoder import FrozenEncoder
from speechbrain_mifuse.features.front import FinetunedEncoder
from speechbrain_mifuse.inference import recognizer as inference
from speechbrain_mifuse.inference.recognizer import EmotionRecognizer
from speechbrain_mifuse.inference.recognizer_folder import RecogniserError, export_recogniser
from speechbrain_mifuse.nnet.classifier import EmotionClassifier
from speechbrain_mifuse.utils.audio import load_audio


@pytest.fixture(scope="module")
def hubert(tmp_path_factory):
    """Of the kind whose convolutions are normalised frame by frame."""
    still = dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"), 0.0)
    return write_hubert(tmp_path_factory.mktemp("hubert"), **still, layerdrop=0.0, apply_spec_augment=False)


@pytest.fixture(scope="module")
def waves(tmp_path_factory):
    """Recordings of several lengths, loud and quiet."""
    folder, draws = tmp_path_factory.mktemp("waves"), torch.Generator().manual_seed(0)
    paths = [folder / f"{count}.wav" for count in (16000, 9000, 12000, 7000, 15007)]
    for path, level in zip(paths, (0.3, 0.01, 0.1, 0.3, 0.05), strict=True):
        write_wav(path, (level * torch.randn(int(path.stem), generator=draws)).clamp(-1, 1).numpy())
    return paths


@pytest.fixture
def folder(hubert, tmp_path):
    """Of a recogniser whose encoder was trained along."""
    torch.manual_seed(0)
    front = FinetunedEncoder(str(hubert), trim_db=None)
    hparams = {"labels": LABELS, "encoder": str(hubert), "trim_db": None}
    classifier = EmotionClassifier(front.dim, len(LABELS))
    export_recogniser(tmp_path / "recogniser", classifier, front, hparams, {"labels": LABELS, "features": {}})
    return tmp_path / "recogniser"


def true_frames(front, items):
    frames, lengths = front(*pad_frames(items))
    return [one[: round(float(length) * len(one))] for one, length in zip(frames, lengths, strict=True)]


def test_frames_and_their_number_are_those_of_the_recording_alone(hubert, waves):
    front = FinetunedEncoder(str(hubert), trim_db=None)
    items = [front.read("t-a", str(path)) for path in waves]
    with torch.inference_mode():
        together, alone = true_frames(front, items), [true_frames(front, [item])[0] for item in items]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_it_hears_what_the_exported_encoder_will_hear(hubert, waves, tmp_path):
    front = FinetunedEncoder(str(hubert), trim_db=None)
    front.export(str(tmp_path / "exported"))
    frozen = FrozenEncoder(str(tmp_path / "exported"), [-1])
    items = [front.read("t-a", str(path)) for path in waves]
    with torch.inference_mode():
        for item, path, frames in zip(items, waves, true_frames(front, items), strict=True):
            torch.testing.assert_close(frames, frozen(load_audio(path)), atol=1e-4, rtol=0)
            assert item.std().item() == pytest.approx(1.0, abs=1e-3)


def test_whispers_padding_to_half_a_minute_counts_as_padding(tmp_path, waves):
    front = FinetunedEncoder(str(write_encoder(tmp_path)), trim_db=None)
    items = [front.read("t-a", str(path)) for path in waves]
    with torch.inference_mode():
        frames, lengths = front(*pad_frames(items))
    counts = (lengths * frames.shape[1]).round().int().tolist()
    assert counts == [-(-(len(item) // 160) // 2) for item in items]


# Recognisers that bring their encoder.


def test_a_recogniser_brings_its_encoder_wherever_it_is_moved(folder, waves, tmp_path):
    expected = EmotionRecognizer.from_hparams(folder).predict_file(waves[0])[1]
    moved = folder.rename(tmp_path / "elsewhere")
    torch.testing.assert_close(EmotionRecognizer.from_hparams(moved).predict_file(waves[0])[1], expected)


def test_a_copy_hears_with_its_own_encoder_and_not_with_that_of_the_original(folder, waves, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    expected = EmotionRecognizer.from_hparams(copy).predict_file(waves[0])[1]
    shutil.rmtree(folder / "encoder")
    shutil.copytree(write_encoder(tmp_path / "other"), folder / "encoder")
    torch.testing.assert_close(EmotionRecognizer.from_hparams(copy).predict_file(waves[0])[1], expected)


def test_another_encoder_can_be_named_in_place_of_the_folders_own(folder, waves, tmp_path):
    elsewhere = (folder / "encoder").rename(tmp_path / "weights")
    (folder / "encoder").mkdir()
    recogniser = EmotionRecognizer.from_hparams(folder, overrides={"encoder": {"source": str(elsewhere)}})
    assert recogniser.predict_file(waves[0])[0] in LABELS


def test_other_changes_to_the_encoder_leave_it_the_folders_own(folder, tmp_path):
    moved = folder.rename(tmp_path / "elsewhere")
    recogniser = EmotionRecognizer.from_hparams(moved, overrides={"encoder": {"layers": [1]}})
    assert recogniser.mods.encoder.layers == [1]


@pytest.mark.parametrize("lost", [".", "config.json", "model.safetensors"])
def test_an_encoder_that_is_not_whole_is_an_error_naming_the_folder(folder, tmp_path, lost):
    moved = folder.rename(tmp_path / "elsewhere")
    path = moved / "encoder" / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(RecogniserError, match=rf"^{moved}: cannot be loaded .* overrides="):
        EmotionRecognizer.from_hparams(moved)


def test_damaged_weights_of_an_encoder_are_an_error_naming_the_folder(folder):
    path = folder / "encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RecogniserError, match=rf"^{folder}: cannot be loaded"):
        EmotionRecognizer.from_hparams(folder)


def test_of_a_very_long_recording_an_encoder_hears_pieces_of_bounded_length(folder, waves, monkeypatch):
    recogniser = EmotionRecognizer.from_hparams(folder)
    wave, short = load_audio(waves[0]), load_audio(waves[3])
    monkeypatch.setattr(inference, "LONG", 0.6)
    monkeypatch.setattr(inference, "PIECE_S", 0.4)
    frames = recogniser._frames_of([wave, short])
    expected = torch.cat([recogniser.mods.encoder(piece) for piece in wave.tensor_split(3)])
    torch.testing.assert_close(frames[0], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(frames[1], recogniser.mods.encoder(short))
    assert recogniser.predict_file(waves[0])[1].equal(recogniser._answers(frames[:1])[0])


def test_a_very_long_recording_loses_no_pause_where_it_is_cut(folder, monkeypatch):
    recogniser = EmotionRecognizer.from_hparams(folder, overrides={"trim_db": 40.0})
    wave = torch.cat([torch.ones(8000), torch.zeros(8000), torch.ones(8000)])
    wave = 0.1 * wave * torch.randn(len(wave), generator=torch.Generator().manual_seed(0))
    whole = len(recogniser._frames(wave))
    monkeypatch.setattr(inference, "LONG", 0.6)
    monkeypatch.setattr(inference, "PIECE_S", 0.75)
    assert whole - 2 <= len(recogniser._frames(wave)) <= whole
