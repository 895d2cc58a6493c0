"""Bad recordings: each gives a finite result of the right length or is left out by name, and no other notices."""

import csv
import faulthandler
import json
import logging
import math
import os
import tracemalloc

import bad_audio
import numpy as np
import pytest
import soundfile
import torch
from bad_audio import MADE
from chaos_server import LABELS, MODEL, ChaosServer, right_label
from torchaudio.functional import resample

from speechbrain_mifuse.cli.recognizer import as_csv, printed
from speechbrain_mifuse.corpora.folder import list_folder, prepare_folder
from speechbrain_mifuse.corpora.manifest import CorpusError, read_manifest
from speechbrain_mifuse.corpora.tables import read_table
from speechbrain_mifuse.features.encoder import FrozenEncoder
from speechbrain_mifuse.features.extract import FrameReader, extract
from speechbrain_mifuse.inference import EmotionRecognizer, Recognition
from speechbrain_mifuse.inference.recognizer_folder import RECOGNIZER, settings_text
from speechbrain_mifuse.lalm.client import LalmClient
from speechbrain_mifuse.lalm.collect import collect, read_recording
from speechbrain_mifuse.lalm.profile import Profile
from speechbrain_mifuse.lalm.prompt import Prompt
from speechbrain_mifuse.lalm.store import LabelStore, Query
from speechbrain_mifuse.nnet.classifier import EmotionClassifier
from speechbrain_mifuse.utils import audio
from speechbrain_mifuse.utils.audio import BadAudio, content_hash, duration, load_audio, resampled, shown
from speechbrain_mifuse.utils.files import atomic_write

GOOD = ("good_a.wav", "good_b.wav", "z/good_c.flac")
RATE = 16000
# Well above what all of this file takes on a slow machine: a hang ends here, with the place where it hangs.
HANG = 900


@pytest.fixture(autouse=True, scope="module")
def no_ffmpeg():
    """Hides one that may be installed: what it can read would depend on its version."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")
        yield


@pytest.fixture(autouse=True, scope="module")
def nothing_hangs():
    faulthandler.dump_traceback_later(HANG, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def write_good(folder):
    for name in GOOD:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        bad_audio.whole(folder / name, format="FLAC" if name.endswith("flac") else "WAV")


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """Folder of good recordings alone."""
    folder = tmp_path_factory.mktemp("clean") / "mine"
    write_good(folder)
    return folder


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Folder of the same beside all bad ones, and what these are by name."""
    folder = tmp_path_factory.mktemp("hostile") / "mine"
    samples = bad_audio.write(folder)
    write_good(folder)
    return folder, samples


@pytest.fixture(scope="module")
def reader(toy_encoder):
    return FrameReader(FrozenEncoder(toy_encoder, [1]))


@pytest.fixture(scope="module")
def recogniser(toy_encoder, tmp_path_factory):
    """Untrained, which is enough to tell one answer from another."""
    torch.manual_seed(0)
    sizes = {"input_size": 16, "n_classes": 4, "hidden_size": 8, "dropout": 0.0, "n_layers": 1, "attention_size": 4}
    text = settings_text(LABELS, str(toy_encoder), [0], {**sizes, "adapter": None}, 40.0)
    about = {"labels": list(LABELS), "features": {"encoder": str(toy_encoder)}, "classifier": sizes}
    folder = tmp_path_factory.mktemp("recogniser")
    RECOGNIZER.write(folder, EmotionClassifier(**sizes).state_dict(), text, about)
    return EmotionRecognizer.from_hparams(folder)


def readable(samples):
    return {name for name, sample in samples.items() if sample.seconds is not None}


# (a) Reading.


@pytest.mark.parametrize("name", MADE)
def test_a_file_is_read_to_its_true_length_or_refused_by_name(tmp_path, name):
    sample = bad_audio.write_one(tmp_path, name)
    if sample.seconds is None:
        with pytest.raises(BadAudio) as refused:
            load_audio(sample.path)
        told = str(refused.value)
        assert told.startswith(f"{shown(sample.path)}: ") and told.isprintable() and told.encode()
        return
    wave = load_audio(sample.path)
    assert wave.dtype == torch.float32 and wave.dim() == 1 and torch.isfinite(wave).all()
    assert len(wave) == math.ceil(round(sample.seconds * RATE, 3))
    assert duration(sample.path) == pytest.approx(sample.seconds, abs=1e-4)


@pytest.mark.parametrize(
    "name", ["8_bit.wav", "24_bit.wav", "float64.wav", "flac_called.wav", "wav_called.flac", "a_law.wav"]
)
def test_other_forms_and_endings_give_the_same_sound(tmp_path, name):
    wave = load_audio(bad_audio.write_one(tmp_path, name).path)
    tolerance = {"8_bit.wav": 0.01, "a_law.wav": 0.03}.get(name, 1e-4)
    np.testing.assert_allclose(wave.numpy(), bad_audio.sound(name), atol=tolerance)


def test_a_name_of_many_lines_is_told_in_one(tmp_path):
    (tmp_path / "a\nb\x1b[31m.wav").write_text("no audio")
    with pytest.raises(BadAudio) as refused:
        load_audio(tmp_path / "a\nb\x1b[31m.wav")
    assert "a\\nb\\x1b[31m.wav: cannot be read" in str(refused.value)


@pytest.mark.parametrize("path", ["a\0.wav", "a.raw", "", "/dev/zero", "\ud800.wav"])
def test_a_path_that_names_no_recording_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_bytes(b"RIFF")
    (tmp_path / "a.raw").write_bytes(b"\0" * 100)
    for read in (load_audio, duration):
        with pytest.raises(BadAudio, match=r"cannot be read as audio|is no text"):
            read(path)


def test_a_recording_read_in_parts_is_the_one_read_at_once(tmp_path, monkeypatch):
    for name in ("eight_channels.wav", "flac_called.wav", "quiet.wav"):
        path = bad_audio.write_one(tmp_path, name).path
        whole = load_audio(path)
        monkeypatch.setattr(audio, "BLOCK", 1000)
        assert load_audio(path).equal(whole)
        assert load_audio(path, start=0.05, stop=0.2).equal(whole[800:3200])
        monkeypatch.undo()


@pytest.mark.parametrize(("rate", "new_rate"), [(47952, 16000), (16000, 47952), (11112, 16000)])
def test_an_odd_rate_is_resampled_as_by_torchaudio(rate, new_rate):
    wave = 0.1 * torch.randn(5000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(resampled(wave, rate, new_rate), resample(wave, rate, new_rate), atol=2**-14, rtol=0)


@pytest.mark.parametrize("rate", [1021, 11127, 44056, 44101, 191_999, 655_349, 999_999])
def test_a_rate_without_a_common_divisor_keeps_the_tone_and_needs_no_large_table_of_filters(rate, monkeypatch):
    monkeypatch.setattr(audio, "resample", lambda *_: pytest.fail("a table for each pair of rates"))
    computed = []
    sinc = torch.sinc
    monkeypatch.setattr(torch, "sinc", lambda time: computed.append(time.numel()) or sinc(time))
    time = torch.arange(rate // 2, dtype=torch.float64) / rate
    wave = resampled(torch.sin(2 * math.pi * 300 * time).float(), rate, RATE)
    expected = torch.sin(2 * math.pi * 300 * torch.arange(len(wave), dtype=torch.float64) / RATE).float()
    assert len(wave) == math.ceil(rate // 2 * RATE / rate)
    torch.testing.assert_close(wave[500:-500], expected[500:-500], atol=0.01, rtol=0)
    assert sum(computed) <= audio.MAX_FILTER_ENTRIES  # whatever the length and the rate


def test_a_header_of_any_length_sets_no_memory_aside(tmp_path):
    path = tmp_path / "a.flac"
    # 23 hours, which may be: 5 GB of samples that are not there.
    bad_audio.flac_frames(23 * 3600 * RATE)(path)
    tracemalloc.start()
    with pytest.raises(BadAudio, match=r"a.flac: cannot be read as audio"):
        load_audio(path)
    assert tracemalloc.get_traced_memory()[1] < 2**30
    tracemalloc.stop()


def test_a_high_rate_holds_no_more_samples_in_memory_than_a_day_of_usual_sound(tmp_path):
    path = tmp_path / "a.flac"
    soundfile.write(path, bad_audio.sound("a", 192_000), 192_000)
    content = bytearray(path.read_bytes())
    content[21] = (content[21] & 0xF0) | (7 * 3600 * 192_000 >> 32)
    content[22:26] = (7 * 3600 * 192_000 & 0xFFFFFFFF).to_bytes(4, "big")
    path.write_bytes(content)
    with pytest.raises(BadAudio, match=r"a.flac: 7 hours at 192000 Hz, and at most 6 are read"):
        load_audio(path)


# (b) Extraction.


def manifest_of(folder, samples, path):
    rows = {f"g-{name}": {"wav": f"{{data_root}}/{name}"} for name in GOOD}
    # A name that is no text cannot stand in a manifest; the others can.
    rows |= {f"b-{name}": {"wav": f"{{data_root}}/{name}"} for name in samples if "\udcff" not in name}
    atomic_write(path / "corpus.json", json.dumps({"data_root": str(folder)}))
    atomic_write(path / "all.json", json.dumps(rows))
    return path / "all.json"


def test_extraction_stores_finite_frames_of_what_is_sound_and_names_the_rest(hostile, clean, reader, tmp_path, caplog):
    folder, samples = hostile
    store = extract([manifest_of(folder, samples, tmp_path / "m")], reader, tmp_path / "store")
    assert {key[2:] for key in store.rows if key.startswith("b-")} == readable(samples)
    for key in store.rows:
        frames = store.frames(key)
        assert frames.shape[1] >= 1 and np.isfinite(frames).all()
    seconds = samples["ten_minutes.wav"].seconds
    assert store.rows["b-ten_minutes.wav"].frames == pytest.approx(50 * seconds, abs=2)
    unread = [sample.path for sample in samples.values() if sample.seconds is None and "\udcff" not in sample.path.name]
    assert not [path for path in unread if f"left out: {shown(path)}: " not in caplog.text]
    alone = extract([manifest_of(clean, {}, tmp_path / "n")], reader, tmp_path / "alone")
    assert list(alone.rows) == [f"g-{name}" for name in GOOD]
    assert all(np.array_equal(alone.frames(key), store.frames(key)) for key in alone.rows)


# (c) The folder corpus.


def rows_of(folder, save_folder):
    prepare_folder(folder, save_folder, {"adapt": 0.6, "test": 0.4})
    return read_manifest(save_folder / "test.json"), json.loads((save_folder / "skipped.json").read_text())


def test_a_folder_is_prepared_without_its_bad_recordings_which_are_listed_with_a_reason(hostile, clean, tmp_path):
    folder, samples = hostile
    rows, skipped = rows_of(folder, tmp_path / "hostile")
    names = {os.path.relpath(row["wav"], folder): row for row in rows.values()}
    assert {*names} | {key.removeprefix("folder-mine/") for key in skipped} == {*samples, *GOOD}
    assert not readable(samples) - {*names}
    for name, row in names.items():
        assert 0 < row["length"] < 1e5 or name == "one_sample.wav"
        expected = samples[name].seconds if name in samples else bad_audio.SECONDS
        assert expected is None or row["length"] == pytest.approx(expected, abs=1e-4)
    assert all(
        reason.isprintable() and any(word in reason for word in ("Remove", "again", "Rename"))
        for reason in skipped.values()
    )
    alone, nothing = rows_of(clean, tmp_path / "clean")
    there = {key: {**row, "wav": row["wav"].replace(str(folder), str(clean))} for key, row in rows.items()}
    assert not nothing and alone == {key: there[key] for key in alone}


class Samples:
    """An encoder whose frames are 16 samples each."""

    sample_rate, layers = RATE, [1]

    def __call__(self, wave):
        return torch.nn.functional.pad(wave, (0, -len(wave) % 16)).view(-1, 16).clamp(-1, 1)

    def fingerprint(self):
        return {"encoder": "samples", "layers": [1], "dim": 16}


def test_a_folder_whose_preparation_let_a_bad_header_pass_is_encoded_without_it(hostile, tmp_path):
    folder, samples = hostile
    rows_of(folder, tmp_path / "m")
    store = extract([tmp_path / "m" / "test.json"], FrameReader(Samples(), trim_db=None), tmp_path / "store")
    kept = {key.removeprefix("folder-mine/") for key in store.rows}
    assert kept == readable(samples) | {*GOOD}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"file,emo\n\xff\xfe.wav,sad\n", "cannot be read"),
        (b"file,emo\n" + b'"' + b"x" * 200_000 + b'",sad\n', "cannot be read"),
        (b"file,emo\n /etc/passwd,sad\n", "outside the folder"),
        (b"file,emo\n ../../a.wav,sad\n", "outside the folder"),
        (b"file,emo\na/../../b.wav,sad\n", "outside the folder"),
        (b"file,emo\na\0b.wav,sad\n", "outside the folder|cannot be read"),
        (b"file\na.wav\n", "lacks one of the columns file, emo"),
        (b"name;label\na.wav;sad\n", "lacks one of the columns file, emo"),
        (b"file,emo," + b"x" * 200_000 + b"\na.wav,sad\n", "line 1: cannot be read"),
        (b"file\r,emo\na.wav,sad\n", "line 1: cannot be read"),
        (b"file,emo\n" + b"a" * 5000 + b",sad\n", "are not there"),
        (b"file,emo\na.wav,furious\n", "unknown class 'furious'"),
        (b"file,emo\na.wav,sad\nb.wav,\n", "1 of 2 rows have no emo"),
    ],
)
def test_a_table_that_does_not_fit_is_one_error_that_names_it(tmp_path, content, says):
    (tmp_path / "labels.csv").write_bytes(content)
    (tmp_path / "a.wav").touch()
    with pytest.raises(CorpusError, match=rf"labels.csv.*({says})"):
        list_folder(tmp_path)


@pytest.mark.parametrize("what", ["a named pipe", "a device", "a file of holes"])
def test_a_table_without_an_end_is_one_error_that_names_it(tmp_path, what):
    table = tmp_path / "labels.csv"
    if what == "a named pipe":
        os.mkfifo(table)
    elif what == "a device":
        table.symlink_to("/dev/zero")
    else:
        table.touch()
        os.truncate(table, 2**42)
    with pytest.raises(CorpusError, match=r"labels\.csv: cannot be read \((not a regular file|most of its)"):
        read_table(table, {"file": (), "emo": ()})


# (d) Recognising.


def test_a_folder_is_recognised_around_its_bad_recordings(hostile, clean, recogniser, caplog):
    folder, samples = hostile
    found = {os.path.relpath(one.path, folder): one for one in recogniser.classify_folder(folder, show_progress=False)}
    assert {*found} == readable(samples) | {*GOOD}
    too_little = [name for name, one in found.items() if one.seconds < 0.1]
    assert too_little
    for name in ("silence.wav", *too_little):
        unheard = found.pop(name)
        assert unheard.label is None and not unheard.probs.any()
    for one in found.values():
        assert one.label in LABELS and torch.isfinite(one.probs).all()
        assert float(one.probs.sum()) == pytest.approx(1, abs=1e-5)
    unread = [sample.path for sample in samples.values() if sample.seconds is None]
    assert not [path for path in unread if f"left out: {shown(path)}: " not in caplog.text]
    alone = {os.path.relpath(one.path, clean): one for one in recogniser.classify_folder(clean, show_progress=False)}
    assert all(found[name].label == alone[name].label for name in GOOD)
    for name in GOOD:
        torch.testing.assert_close(found[name].probs, alone[name].probs, atol=1e-6, rtol=0)


def test_over_time_nothing_is_heard_in_silence_and_one_sample_is_a_stretch(hostile, recogniser):
    _, samples = hostile
    assert recogniser.classify_long(samples["silence.wav"].path).label is None
    (only,) = recogniser.classify_long(samples["one_sample.wav"].path).segments
    assert torch.isfinite(only.probs).all() and only.end == pytest.approx(1 / RATE)


def test_a_recording_in_which_nothing_varies_has_no_emotion_however_it_is_loaded(recogniser, tmp_path):
    rng = np.random.default_rng(0)
    makers = {
        "offset": np.full(3 * RATE, 0.3),
        "noise": rng.integers(-1, 2, 3 * RATE) / 2**15,
        "a_law": rng.choice([-8, 8], 3 * RATE) / 2**15,
    }
    for name, wave in makers.items():
        bad_audio.whole(tmp_path / f"{name}.wav", wave)
    found = [*recogniser.classify_folder(tmp_path, show_progress=False)]
    found += recogniser.classify_folder(tmp_path, window_s=1.0, show_progress=False)
    assert len(found) == 6
    waves = [torch.tensor(wave, dtype=torch.float32) for wave in makers.values()]
    *_, labels = recogniser.classify_batch(torch.stack(waves))
    labels += [one.label for one in found]
    labels += [recogniser.classify_long(wave, window_s=1.0).label for wave in waves]
    labels += [part.label for wave in waves for part in recogniser.stream(wave.split(RATE), RATE)]
    assert set(labels) == {None}
    assert not any(one.probs.any() for one in found)


def test_quiet_speech_has_an_emotion(recogniser, real_corpora, tmp_path):
    wave = 0.002 * load_audio(sorted((real_corpora / "ravdess").rglob("03-01-05-02-*.*"))[0])
    bad_audio.whole(tmp_path / "a.wav", wave.numpy())
    (one,) = recogniser.classify_files([tmp_path / "a.wav"], show_progress=False)
    assert one.label in LABELS


def test_a_recogniser_uses_the_channel_that_is_chosen(recogniser, tmp_path, monkeypatch):
    path = tmp_path / "a.wav"
    left, right = bad_audio.sound("left"), 0.5 * bad_audio.sound("right").cumsum() / 10
    bad_audio.whole(path, np.stack([left, right], axis=1), subtype="FLOAT")
    bad_audio.whole(tmp_path / "mono.wav", right, subtype="FLOAT")
    monkeypatch.setattr(recogniser, "channel", 2)
    chosen, alone = recogniser.classify_files([path, tmp_path / "mono.wav"], show_progress=False)
    assert "mono.wav: has no channel 2" in alone.error
    monkeypatch.setattr(recogniser, "channel", None)
    averaged, alone = recogniser.classify_files([path, tmp_path / "mono.wav"], show_progress=False)
    torch.testing.assert_close(chosen.probs, alone.probs)
    assert not torch.allclose(averaged.probs, alone.probs)


def test_the_channels_of_many_recordings_are_reported_in_one_line(recogniser, tmp_path, caplog):
    for n in range(4):
        bad_audio.whole(tmp_path / f"{n}.wav", np.stack([bad_audio.sound(f"{n}")] * 2, axis=1))
    list(recogniser.classify_folder(tmp_path, show_progress=False))
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1 and told[0].startswith("4 recordings (") and "2 channels, averaged" in told[0]


def test_predict_prints_one_line_for_each_file_whatever_its_name(hostile, capsys):
    folder, samples = hostile
    paths = [samples[name].path for name in ("line\nbreak\t.wav", "no_text_\udcff.wav", "--help.wav")]
    probs = torch.tensor([0.25, 0.75])
    list(printed(Recognition(path, "sad", probs, 1.0) for path in paths))
    lines = capsys.readouterr().out.splitlines()
    assert [line.count("\t") for line in lines] == [2, 2, 2] and all(line.encode() for line in lines)
    assert lines[0].startswith(f"{folder}/line\\nbreak\\t.wav\tsad")
    table = as_csv(["angry", "sad"], [Recognition(path, "sad", probs, 1.0) for path in paths])
    atomic_write(folder.parent / "table.csv", table)
    with open(folder.parent / "table.csv", encoding="utf-8", newline="") as file:
        assert [len(row) for row in csv.reader(file)] == [7, 7, 7, 7]


# (e) Label collection.


@pytest.fixture
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def test_the_same_sound_is_encoded_hashed_and_sent(tmp_path, no_key):
    """Of floating point at the scale of integers, most was clipped in what was sent."""
    wave = bad_audio.sound("scaled")
    bad_audio.whole(tmp_path / "scaled.wav", wave * 32768, subtype="FLOAT")
    bad_audio.whole(tmp_path / "right.wav", wave, subtype="FLOAT")
    scaled, right = (read_recording(tmp_path / f"{name}.wav") for name in ("scaled", "right"))
    assert scaled.known == right.known and scaled.clip == right.clip


def collected(paths, store_path):
    """Ask a server that knows the right label about files: what failed, and the label of each that was answered."""
    with ChaosServer() as server, LabelStore(store_path) as store:
        prompt = Prompt(LABELS)
        client = LalmClient(server.base_url, MODEL, profile=Profile(longest_audio=5.0))
        query = Query.of(prompt, MODEL, server.base_url, {"temperature": 1.0, "seed": 0}, "local:chaos")
        report = collect(list(paths.items()), prompt, client, store, query, k=1, show_progress=False)
        audios = {
            name: content_hash(load_audio(path)) for name, path in paths.items() if name not in dict(report.failed)
        }
        samples = store.load(query, list(audios.values()), 1)
        assert samples.mask.all() and torch.isfinite(samples.probs).all()
        return dict(report.failed), dict(zip(audios, samples.probs[:, 0].argmax(-1).tolist(), strict=True)), audios


def test_labels_are_collected_around_bad_recordings_and_none_is_wrong(hostile, clean, tmp_path, no_key):
    folder, samples = hostile
    paths = {name: folder / name for name in [*samples, *GOOD]}
    failed, labels, audios = collected(paths, tmp_path / "hostile.sqlite")
    assert {*failed} == {*samples} - readable(samples)
    assert all(failed[name].startswith(f"{shown(samples[name].path)}: ") for name in failed)
    # Of ten minutes the beginning was sent, so that the server heard another recording.
    assert {name for name in labels if labels[name] != right_label(audios[name])} <= {"ten_minutes.wav"}
    nothing, alone, _ = collected({name: clean / name for name in GOOD}, tmp_path / "clean.sqlite")
    assert not nothing and alone == {name: labels[name] for name in GOOD}


def test_the_log_of_a_folder_holds_a_line_for_each_problem(hostile, tmp_path, caplog):
    folder, _ = hostile
    with caplog.at_level(logging.WARNING):
        prepare_folder(folder, tmp_path, {"adapt": 0.5, "test": 0.5})
    assert all(record.getMessage().isprintable() for record in caplog.records)
