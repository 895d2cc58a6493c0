"""Audio: every container, rate and channel count gives the same sound, and what is no sound is one clear error."""

import errno
import hashlib
import shutil
import struct
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import soundfile
import torch

from speechbrain_mifuse.utils import audio, audio_files
from speechbrain_mifuse.utils.audio import (
    BadAudio,
    content_hash,
    duration,
    load_audio,
    nothing_varies,
    pcm16,
    trim_silence,
)
from speechbrain_mifuse.utils.audio_warnings import summarized
from speechbrain_mifuse.utils.errors import WriteError


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


# Every format that libsndfile writes.


# Telephone codecs have a rate of their own, and the sampler's format names none.
RATES = {"GSM610": 8000, "G721_32": 8000, "G723_24": 8000, "G723_40": 8000, "VOX_ADPCM": 8000}
# libsndfile lists these, and cannot write them.
READ_ONLY = {("AIFF", "DWVW_12"), ("MP3", "MPEG_LAYER_I"), ("MP3", "MPEG_LAYER_II"), ("WAV", "MPEG_LAYER_III")}
WRITTEN = sorted(
    (name, subtype)
    for name in soundfile.available_formats()
    for subtype in soundfile.available_subtypes(name)
    if name != "RAW" and (name, subtype) not in READ_ONLY
)
# Frames at the end that complete a block.
BLOCK_OF_CODEC = 512


@pytest.mark.parametrize(("name", "subtype"), WRITTEN)
def test_every_format_of_libsndfile_is_read_whole_and_in_segments(tmp_path, name, subtype):
    rate = 8000 if name == "WVE" else RATES.get(subtype, 16000)
    path = tmp_path / "recording"
    soundfile.write(path, sine(rate), rate, format=name, subtype=subtype)
    with soundfile.SoundFile(path) as file:
        true_rate = file.samplerate
    wave = load_audio(path, true_rate)
    assert 0 <= len(wave) - rate // 2 <= BLOCK_OF_CODEC
    assert duration(path) == pytest.approx(len(wave) / true_rate)
    assert np.corrcoef(wave[: rate // 2].numpy(), sine(rate))[0, 1] > 0.95
    first, last = int(0.1 * true_rate), int(0.15 * true_rate)
    assert torch.allclose(load_audio(path, true_rate, start=0.1, stop=0.15), wave[first:last], atol=1e-6)


@pytest.mark.parametrize(("ending", "subtype"), [("gsm", "GSM610"), ("vox", "VOX_ADPCM")])
def test_telephone_recordings_without_a_header_are_read_by_their_ending(tmp_path, ending, subtype):
    path = tmp_path / f"a.{ending}"
    soundfile.write(str(path), sine(8000), 8000, format="RAW", subtype=subtype)
    assert duration(path) == pytest.approx(0.5, abs=0.02)
    assert np.corrcoef(load_audio(path, 8000)[:4000].numpy(), sine(8000))[0, 1] > 0.95


@pytest.mark.parametrize("ending", ["raw", "pcm", "ulaw", "au", "snd", "gsm"])
def test_samples_without_a_header_are_never_guessed_at(tmp_path, ending):
    (tmp_path / f"a.{ending}").write_bytes(pcm16(torch.tensor(sine(16000))).tobytes())
    with pytest.raises(BadAudio, match=rf"a.{ending}: cannot be read as audio \(it has no header.*Write it as WAV"):
        load_audio(tmp_path / f"a.{ending}")


def test_a_recording_is_read_whatever_its_name_says(tmp_path):
    for ending in ("raw", "m4a", "pcm", "txt"):
        soundfile.write(tmp_path / "a.wav", sine(16000), 16000)
        path = (tmp_path / "a.wav").rename(tmp_path / f"a.{ending}")
        assert load_audio(path).shape == (8000,)


def test_a_truncated_mp3_lasts_as_long_as_what_is_left_of_it(tmp_path):
    soundfile.write(tmp_path / "a.mp3", sine(16000, seconds=4), 16000)
    data = (tmp_path / "a.mp3").read_bytes()
    (tmp_path / "a.mp3").write_bytes(data[: len(data) // 2])
    assert duration(tmp_path / "a.mp3") == pytest.approx(len(load_audio(tmp_path / "a.mp3")) / 16000)
    assert duration(tmp_path / "a.mp3") < 3


@pytest.mark.parametrize(("bits", "subtype"), [(32, "FLOAT"), (64, "DOUBLE")])
def test_floating_point_in_an_extensible_w64_file_is_not_taken_for_integers(tmp_path, bits, subtype):
    soundfile.write(tmp_path / "a.w64", sine(16000), 16000, format="W64", subtype=subtype)
    data = (tmp_path / "a.w64").read_bytes()
    begin = data.index(b"data\xf3\xac")
    head = struct.pack("<HHIIHHHHI", 0xFFFE, 1, 16000, 2000 * bits, bits // 8, bits, 22, bits, 4)
    head += bytes.fromhex("0300000000001000800000aa00389b71")
    data = data[:56] + struct.pack("<Q", 24 + len(head)) + head + data[begin:]
    (tmp_path / "a.w64").write_bytes(data[:16] + struct.pack("<Q", len(data)) + data[24:])
    np.testing.assert_allclose(load_audio(tmp_path / "a.w64").numpy(), sine(16000), atol=1e-6)


# Values far outside [-1, 1].


@pytest.mark.parametrize("bits", [16, 24, 32])
@pytest.mark.parametrize("level", [0.1, 0.99])
def test_floating_point_at_the_scale_of_integers_is_the_same_sound_with_a_warning(tmp_path, bits, level, caplog):
    if bits > 16:
        level = max(level, 0.5)  # quieter ones could be of fewer bits
    wave = sine(16000, level=level)
    soundfile.write(tmp_path / "right.wav", wave, 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "scaled.wav", wave * 2 ** (bits - 1), 16000, subtype="FLOAT")
    scaled, right = load_audio(tmp_path / "scaled.wav"), load_audio(tmp_path / "right.wav")
    torch.testing.assert_close(scaled, right, atol=1e-6, rtol=0)
    assert content_hash(scaled) == content_hash(right)
    (warned,) = [record.getMessage() for record in caplog.records]
    assert "scaled.wav: floating-point" in warned and f"{bits}-bit" in warned


def test_the_scale_of_a_segment_is_that_of_its_recording(tmp_path):
    wave = np.concatenate([1e-4 * sine(16000), sine(16000)]) * 32768
    soundfile.write(tmp_path / "a.wav", wave, 16000, subtype="FLOAT")
    assert load_audio(tmp_path / "a.wav", stop=0.5).equal(load_audio(tmp_path / "a.wav")[:8000])


@pytest.mark.parametrize("peak", [1.5, 7.9])
def test_floating_point_a_little_above_full_scale_stays_as_it_is(tmp_path, peak, caplog):
    soundfile.write(tmp_path / "a.wav", sine(16000, level=peak), 16000, subtype="FLOAT")
    assert load_audio(tmp_path / "a.wav").max() == pytest.approx(peak, rel=1e-3)
    assert not caplog.records


# Nothing varies.


def toggling(rate, *values):
    return np.random.default_rng(0).choice(values, rate)


FLAT = {
    "offset": (lambda rate: np.full(rate, 0.3), {}),
    "offset in floating point": (lambda rate: np.full(rate, -0.7), {"subtype": "FLOAT"}),
    "offset and tiny noise": (lambda rate: 0.2 + 1e-5 * toggling(rate, -1, -0.3, 0.5, 1), {"subtype": "FLOAT"}),
    "one bit of 16": (lambda rate: toggling(rate, -1, 0, 1) / 2**15, {}),
    "one bit of 24": (lambda rate: toggling(rate, -1, 0, 1) / 2**23, {"subtype": "PCM_24"}),
    "one bit of 8": (lambda rate: toggling(rate, -1, 0, 1) / 2**7, {"subtype": "PCM_U8"}),
    "A-law": (lambda rate: np.zeros(rate), {"subtype": "ALAW"}),
    "A-law, toggling": (lambda rate: toggling(rate, -8, 8) / 2**15, {"subtype": "ALAW"}),
    "A-law as 16 bits": (lambda rate: toggling(rate, -8, 8) / 2**15, {}),
    "mu-law, toggling": (lambda rate: toggling(rate, -8, 0, 8) / 2**15, {"subtype": "ULAW"}),
    "stereo A-law": (lambda rate: toggling(2 * rate, -8, 8).reshape(rate, 2) / 2**15, {"subtype": "ALAW"}),
    # A whole number of blocks: libsndfile does not write the rest of one as silence.
    "GSM": (lambda rate: np.zeros(16000), {"subtype": "GSM610"}),
}


@pytest.mark.parametrize("kind", FLAT)
@pytest.mark.parametrize("rate", [8000, 16000])
def test_a_recording_in_which_nothing_varies_is_digital_silence_at_any_rate(tmp_path, kind, rate):
    make, options = FLAT[kind]
    soundfile.write(tmp_path / "a.wav", make(rate), rate, **options)
    wave = load_audio(tmp_path / "a.wav")
    assert not wave.any() and nothing_varies(wave)


@pytest.mark.parametrize("subtype", ["PCM_16", "ALAW", "PCM_24"])
def test_quiet_sound_is_no_silence(tmp_path, subtype):
    level = {"ALAW": 2e-3}.get(subtype, 2e-4)
    soundfile.write(tmp_path / "a.wav", sine(16000, level=level), 16000, subtype=subtype)
    assert load_audio(tmp_path / "a.wav").any()


# Channels.


def stereo(path, left, right):
    soundfile.write(path, np.stack([left, right], axis=1), 16000, subtype="FLOAT")
    return path


def test_a_channel_can_be_chosen_from_one_on_and_one_that_lacks_is_an_error(tmp_path):
    left, right = sine(16000, pitch=300), sine(16000, pitch=500)
    path = stereo(tmp_path / "a.wav", left, right)
    np.testing.assert_allclose(load_audio(path, channel=1).numpy(), left, atol=1e-6)
    np.testing.assert_allclose(load_audio(path, channel=2).numpy(), right, atol=1e-6)
    assert len({content_hash(load_audio(path, channel=channel)) for channel in (None, 1, 2)}) == 3
    for channel in (0, 3):
        with pytest.raises(BadAudio, match=rf"a.wav: has no channel {channel}. Its channels are 1 to 2"):
            load_audio(path, channel=channel)


def test_channels_that_cancel_are_warned_of_by_name_and_one_of_them_is_sound(tmp_path, caplog):
    path = stereo(tmp_path / "a.wav", sine(16000), -sine(16000))
    assert not load_audio(path).any()
    assert "a.wav: the channels cancel" in caplog.text
    caplog.clear()
    assert load_audio(path, channel=2).any() and not caplog.records


@pytest.mark.parametrize("right", [0.0, 1.0, 0.1])
def test_channels_that_do_not_cancel_are_reported_as_averaged(tmp_path, right, caplog):
    load_audio(stereo(tmp_path / "a.wav", sine(16000), right * sine(16000, pitch=220)))
    assert "2 channels, averaged" in caplog.text and "cancel" not in caplog.text


def test_many_recordings_are_warned_of_in_one_line_and_each_once(tmp_path, caplog):
    paths = [stereo(tmp_path / f"{n}.wav", sine(16000), sine(16000)) for n in range(5)]
    with summarized():
        for path in [*paths, *paths]:
            load_audio(path)
        assert not caplog.records
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("5 recordings (") and "0.wav" in line and "2 channels, averaged" in line
    load_audio(paths[0])
    assert len(caplog.records) == 1


# What only ffmpeg reads.


FAKE = """#!{python}
import sys
open({log!r}, "w").write(chr(10).join(sys.argv[1:]))
{action}
"""
DECODE = """
import numpy, soundfile
soundfile.write(sys.argv[-1].removeprefix("file:"), numpy.full((4000, 2), [0.5, -0.1]) * {wave}, 8000,
                format="WAV", subtype="FLOAT")
"""


@pytest.fixture
def fake_ffmpeg(tmp_path, monkeypatch):
    """Puts an ffmpeg on the path that does something else, and returns where it writes its arguments."""

    def install(action):
        folder, log = tmp_path / "bin", tmp_path / "arguments.txt"
        folder.mkdir()
        (folder / "ffmpeg").write_text(FAKE.format(python=sys.executable, log=str(log), action=action))
        (folder / "ffmpeg").chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        return log

    return install


def foreign(path):
    path.write_bytes(b"\0\0\0\x18ftypM4A " + bytes(100))
    return path


def test_without_ffmpeg_what_it_reads_is_an_error_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    for read in (load_audio, duration):
        with pytest.raises(BadAudio, match=r"a.m4a: cannot be read as audio .* Install ffmpeg"):
            read(foreign(tmp_path / "a.m4a"))


def test_ffmpeg_decodes_what_libsndfile_cannot_whatever_the_name(tmp_path, fake_ffmpeg):
    wave = "numpy.sin(numpy.arange(4000) / 5)[:, None]"
    log = fake_ffmpeg(DECODE.format(wave=wave))
    path = foreign(tmp_path / "-x.wav")
    assert duration(path) == 0.5
    expected = 0.2 * np.sin(np.arange(4000) / 5)
    np.testing.assert_allclose(load_audio(path, 8000).numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(load_audio(path, 8000, 0.1, 0.2).numpy(), expected[800:1600], atol=1e-6)
    np.testing.assert_allclose(load_audio(path, 8000, channel=1).numpy(), 2.5 * expected, atol=1e-6)
    given = log.read_text().splitlines()
    assert given[given.index("-i") + 1] == f"file:{path}"
    assert given[given.index("-protocol_whitelist") + 1] == "file,pipe" and "-nostdin" in given
    assert not {"hls", "concat", "image2", "tty"} & set(given[given.index("-format_whitelist") + 1].split(","))
    assert float(given[given.index("-t") + 1]) == audio.LONGEST + 1


@pytest.mark.parametrize(
    ("action", "says"),
    [
        ("sys.exit('x: moov atom not found')", r"Format not recognised; ffmpeg: x: moov atom not found\). Remove"),
        ("sys.exit('Stream map 0:a:0 matches no streams.')", r"it holds no audio\). Remove"),
        ("import time; time.sleep(60)", r"takes longer than 1 s"),
        ("", r"ffmpeg: 0"),
    ],
)
def test_what_ffmpeg_cannot_decode_is_an_error_that_says_why(tmp_path, fake_ffmpeg, monkeypatch, action, says):
    fake_ffmpeg(action)
    monkeypatch.setattr(audio_files, "_DECODING_S", 1.0 if "sleep" in action else 60.0)
    with pytest.raises(BadAudio, match=says):
        load_audio(foreign(tmp_path / "a.m4a"))


def test_what_unpacks_beyond_the_limit_is_refused(tmp_path, fake_ffmpeg, monkeypatch):
    fake_ffmpeg(DECODE.format(wave="1"))
    monkeypatch.setattr(audio_files, "_DECODED_BYTES", 1000)
    with pytest.raises(BadAudio, match=r"a.m4a: cannot be read as audio \(it unpacks to more than"):
        load_audio(foreign(tmp_path / "a.m4a"))


def test_a_full_disk_of_temporary_files_is_no_fault_of_the_recording(tmp_path, fake_ffmpeg, monkeypatch):
    fake_ffmpeg("sys.exit('file:decoded.wav: No space left on device')")
    (tmp_path / "a.m4a").write_bytes(b"no sound")
    with pytest.raises(WriteError, match=r"mifuse-.*: cannot be written \(No space left on device\)\. .* set TMPDIR"):
        load_audio(tmp_path / "a.m4a")
    monkeypatch.setattr(tempfile, "mkdtemp", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space")))
    with pytest.raises(WriteError, match=r"temporary files: cannot be written \(No space\)\. .* set TMPDIR"):
        load_audio(tmp_path / "a.m4a")


needs_ffmpeg = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg is not installed")


@needs_ffmpeg
@pytest.mark.parametrize(
    "name", ["a.m4a", "a.webm", "a.wma", "a.mp4", "a.mkv", "-a.m4a", "concat:a.m4a", "aac_called.wav"]
)
def test_the_real_ffmpeg_gives_the_same_sound(tmp_path, name):
    soundfile.write(tmp_path / "in.wav", sine(48000, seconds=2), 48000)
    ending = "aac" if name == "aac_called.wav" else name.split(".")[1]
    command = ["ffmpeg", "-nostdin", "-v", "error", "-i", str(tmp_path / "in.wav"), f"file:{tmp_path / 'x'}.{ending}"]
    if subprocess.run(command).returncode:
        pytest.skip(f"this ffmpeg writes no {ending}")
    path = (tmp_path / f"x.{ending}").rename(tmp_path / name)
    wave = load_audio(path)
    assert duration(path) == pytest.approx(2, abs=0.15)
    assert len(wave) == pytest.approx(16000 * duration(path), abs=1)
    assert wave[8000:24000].square().mean().sqrt() == pytest.approx(0.5 / 2**0.5, rel=0.02)


@needs_ffmpeg
@pytest.mark.parametrize(
    "content",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '{target}'\n",
        "file {target}\n",
        "just text\n",
    ],
)
@pytest.mark.parametrize("name", ["a.m4a", "a.m3u8", "a.ffconcat", "a.txt"])
def test_the_real_ffmpeg_opens_no_other_file(tmp_path, content, name):
    soundfile.write(tmp_path / "secret.wav", sine(16000), 16000)
    (tmp_path / name).write_text(content.format(target=tmp_path / "secret.wav"))
    with pytest.raises(BadAudio, match="cannot be read as audio"):
        load_audio(tmp_path / name)


@needs_ffmpeg
def test_a_video_without_sound_is_said_to_hold_no_audio(tmp_path):
    video = ["-f", "lavfi", "-i", "testsrc=duration=1:size=32x32:rate=5", "-c:v", "mpeg4", str(tmp_path / "a.mp4")]
    subprocess.run(["ffmpeg", "-nostdin", "-v", "error", *video], check=True)
    with pytest.raises(BadAudio, match=r"a.mp4: cannot be read as audio \(it holds no audio\)"):
        load_audio(tmp_path / "a.mp4")
