"""An encoder that is trained along: what it hears of a recording does not depend on the rest of the batch."""

import pytest
import torch
from toy_corpora import write_encoder, write_hubert, write_wav

from speechbrain_mifuse.audio import load_audio
from speechbrain_mifuse.features.dataset import pad_frames
from speechbrain_mifuse.features.encoder import FrozenEncoder
from speechbrain_mifuse.features.front import FinetunedEncoder


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
