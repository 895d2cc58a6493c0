"""Audio: every container, rate and channel count gives the same sound, and what is no sound is one clear error."""

import hashlib

import numpy as np
import pytest
import soundfile
import torch

from speechbrain_mifuse.audio import BadAudio, content_hash, duration, load_audio, pcm16, trim_silence


def sine(rate, seconds=0.5, pitch=440.0, level=0.5):
    return level * np.sin(2 * np.pi * pitch * np.arange(int(rate * seconds)) / rate)


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "aiff"])
def test_every_container_is_read_as_float32_mono(tmp_path, ending):
    soundfile.write(tmp_path / f"a.{ending}", sine(16000), 16000)
    wave = load_audio(tmp_path / f"a.{ending}")
    assert wave.dtype == torch.float32 and wave.shape == (8000,)
    assert np.abs(wave.numpy() - sine(16000)).max() < (0.05 if ending == "ogg" else 1e-4)


def test_channels_are_averaged(tmp_path):
    left, right = sine(16000, pitch=300), sine(16000, pitch=500)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), 16000, subtype="FLOAT")
    np.testing.assert_allclose(load_audio(tmp_path / "a.wav").numpy(), (left + right) / 2, atol=1e-6)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_every_rate_is_resampled_to_the_same_tone(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", sine(rate), rate, subtype="FLOAT")
    wave = load_audio(tmp_path / "a.wav").numpy()
    assert abs(len(wave) - 8000) <= 1
    inside = slice(500, 7500)
    np.testing.assert_allclose(wave[inside], sine(16000)[inside], atol=0.01)


def test_a_segment_is_that_part_of_the_file(tmp_path):
    soundfile.write(tmp_path / "a.wav", sine(16000), 16000, subtype="FLOAT")
    whole = load_audio(tmp_path / "a.wav")
    assert load_audio(tmp_path / "a.wav", start=0.1, stop=0.3).equal(whole[1600:4800])
    assert load_audio(tmp_path / "a.wav", start=0.4).equal(whole[6400:])


@pytest.mark.parametrize("segment", [{"start": 2.0}, {"start": 0.2, "stop": 0.1}])
def test_a_segment_outside_the_file_is_an_error_naming_it(tmp_path, segment):
    soundfile.write(tmp_path / "a.wav", sine(16000), 16000)
    with pytest.raises(BadAudio, match=r"a.wav: holds no samples"):
        load_audio(tmp_path / "a.wav", **segment)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_sound_is_an_error_naming_the_file(tmp_path, value):
    wave = sine(16000)
    wave[100] = value
    soundfile.write(tmp_path / "a.wav", wave, 16000, subtype="FLOAT")
    with pytest.raises(BadAudio, match=r"a.wav: holds NaN or infinite samples"):
        load_audio(tmp_path / "a.wav")


@pytest.mark.parametrize("read", [load_audio, duration])
@pytest.mark.parametrize("content", [None, b"", b"this is text\n" * 20, b"RIFF\x10\x00\x00\x00WAVEfmt "])
def test_what_is_no_recording_is_an_error_naming_the_file(tmp_path, read, content):
    if content is not None:
        (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(BadAudio, match=r"a.wav: (cannot be read as audio|holds no samples)"):
        read(tmp_path / "a.wav")


@pytest.mark.parametrize("read", [load_audio, duration])
def test_a_recording_without_samples_is_an_error_naming_the_file(tmp_path, read):
    soundfile.write(tmp_path / "a.wav", np.zeros(0), 16000)
    with pytest.raises(BadAudio, match=r"a.wav: holds no samples"):
        read(tmp_path / "a.wav")


@pytest.mark.parametrize(("rate", "channels"), [(16000, 1), (44100, 2)])
def test_the_duration_is_in_seconds_whatever_the_rate_and_channels(tmp_path, rate, channels):
    soundfile.write(tmp_path / "a.flac", np.zeros((rate // 2, channels)), rate)
    assert duration(tmp_path / "a.flac") == pytest.approx(0.5)


def test_only_silence_around_the_utterance_is_cut():
    loud, pause = torch.full((4000,), 0.5), torch.zeros(4000)
    wave = torch.cat([pause, loud, pause, loud, pause])
    assert trim_silence(wave).equal(wave[4000:16000])


@pytest.mark.parametrize("end", [0, 37, 399])
def test_a_loud_end_is_kept_to_its_last_sample(end):
    wave = torch.cat([torch.zeros(4000), torch.full((4000 + end,), 0.5)])
    assert trim_silence(wave).equal(wave[4000:])


@pytest.mark.parametrize(("level", "kept"), [(0.02, 8000), (0.002, 4000)])
def test_the_threshold_is_in_decibels_below_the_loudest_frame(level, kept):
    wave = torch.cat([torch.full((4000,), level), torch.full((4000,), 0.5)])
    assert len(trim_silence(wave, 40.0)) == kept


def test_trimming_does_not_depend_on_loudness():
    wave = torch.cat([torch.zeros(4000), torch.rand(4000, generator=torch.Generator().manual_seed(0)) * 0.5])
    assert trim_silence(1e-3 * wave).equal(1e-3 * trim_silence(wave))


@pytest.mark.parametrize("wave", [torch.zeros(4000), torch.zeros(1), torch.ones(799)])
def test_what_cannot_be_trimmed_stays_whole(wave):
    assert trim_silence(wave).equal(wave)


def test_no_threshold_cuts_nothing():
    wave = torch.cat([torch.zeros(4000), torch.ones(4000)])
    assert trim_silence(wave, None) is wave


def test_the_hash_is_of_the_sound_not_of_the_container(tmp_path):
    samples = (32768 * sine(16000)).astype(np.int16)
    for ending in ("wav", "flac"):
        soundfile.write(tmp_path / f"a.{ending}", samples, 16000, subtype="PCM_16")
    hashes = {content_hash(load_audio(tmp_path / f"a.{ending}")) for ending in ("wav", "flac")}
    assert len(hashes) == 1
    changed = load_audio(tmp_path / "a.wav")
    changed[7] += 1 / 32768
    assert content_hash(changed) not in hashes


def test_the_hash_is_sha_256_of_little_endian_pcm():
    wave = torch.tensor([0.0, 0.25, -1.0])
    assert content_hash(wave) == hashlib.sha256(b"\x00\x00\x00\x20\x00\x80").hexdigest()


def test_pcm_is_rounded_and_clipped_at_full_scale():
    assert pcm16(torch.tensor([1.0, 2.0, -2.0, 0.6 / 32768])).tolist() == [32767, 32767, -32768, 1]


def test_pcm_survives_a_round_trip_through_a_file(tmp_path):
    values = np.arange(-32768, 32768, 7, dtype=np.int16)
    soundfile.write(tmp_path / "a.wav", values, 16000)
    assert np.array_equal(pcm16(load_audio(tmp_path / "a.wav")), values)
