"""Extraction: only what is missing is encoded, also after a kill, and one bad recording stops nothing."""

import json
import os
import time

import numpy as np
import processes
import pytest
import torch
from toy_corpora import write_wav

from speechbrain_mifuse.features.extract import FrameReader, average_frames, extract
from speechbrain_mifuse.features.store import FeatureStore, StoreError
from speechbrain_mifuse.nnet.statistical_attentive_pooling import StatisticalAttentivePooling
from speechbrain_mifuse.utils.audio import content_hash, load_audio, trim_silence
from speechbrain_mifuse.utils.files import atomic_write, file_stamp


class Encoder:
    """Two 'layers': the samples in frames of 16, and their squares. Counts what it encodes."""

    sample_rate, layers, scale = 16000, [1, 2], 1.0

    def __init__(self):
        self.encoded = 0

    def __call__(self, wave):
        self.encoded += 1
        frames = wave[: len(wave) // 16 * 16].view(-1, 16)
        return self.scale * torch.stack([frames, frames.square()], dim=1)

    def fingerprint(self):
        return {"encoder": "squares", "layers": self.layers, "dim": 16}


def reader(**options):
    return FrameReader(Encoder(), **{"trim_db": None, **options})


def corpus(folder, count):
    """Write recordings and their manifest, which is returned."""
    rows = {}
    for number in range(count):
        wave = 0.3 * np.random.default_rng(number).normal(size=320 + 16 * (number % 5))
        write_wav(folder / f"{number}.wav", wave)
        rows[f"u{number}"] = {"wav": f"{{data_root}}/{number}.wav", "speaker": "1"}
    atomic_write(folder / "corpus.json", json.dumps({"data_root": str(folder)}))
    atomic_write(folder / "all_unlabelled.json", json.dumps(rows))
    return folder / "all_unlabelled.json"


def expected(folder, number, **options):
    return reader(**options).encode(load_audio(folder / f"{number}.wav")).numpy().astype(np.float16)


def is_whole(store, folder, count):
    assert set(store.rows) == {f"u{number}" for number in range(count)}
    assert store.verify() == []
    assert all(np.array_equal(store.frames(f"u{n}"), expected(folder, n)) for n in range(count))


def test_every_recording_of_overlapping_manifests_is_encoded_once(tmp_path):
    manifest, mine = corpus(tmp_path, 5), reader()
    store = extract([manifest, manifest], mine, tmp_path / "store")
    assert mine.encoder.encoded == 5
    is_whole(FeatureStore(store.folder, mine.fingerprint()), tmp_path, 5)


def test_a_row_holds_the_content_hash_that_answers_are_stored_under(tmp_path):
    store = extract([corpus(tmp_path, 1)], reader(), tmp_path / "store")
    assert store.rows["u0"].audio == content_hash(load_audio(tmp_path / "0.wav"))


def test_what_is_stored_is_not_encoded_again(tmp_path):
    manifest = corpus(tmp_path, 5)
    extract([manifest], reader(), tmp_path / "store")
    second = reader()
    extract([manifest], second, tmp_path / "store")
    assert second.encoder.encoded == 0


def test_a_changed_recording_is_encoded_again(tmp_path):
    manifest = corpus(tmp_path, 5)
    extract([manifest], reader(), tmp_path / "store")
    write_wav(tmp_path / "3.wav", 0.1 * np.random.default_rng(99).normal(size=480))
    second = reader()
    store = extract([manifest], second, tmp_path / "store")
    assert second.encoder.encoded == 1
    is_whole(store, tmp_path, 5)


def test_a_recording_changed_within_its_size_is_encoded_again(tmp_path):
    manifest = corpus(tmp_path, 2)
    extract([manifest], reader(), tmp_path / "store")
    size = (tmp_path / "1.wav").stat().st_size
    write_wav(tmp_path / "1.wav", 0.1 * np.random.default_rng(99).normal(size=336))
    os.utime(tmp_path / "1.wav", ns=(1, 1))
    assert (tmp_path / "1.wav").stat().st_size == size
    is_whole(extract([manifest], reader(), tmp_path / "store"), tmp_path, 2)


def test_an_unreadable_recording_is_left_out_and_the_rest_goes_on(tmp_path, caplog):
    manifest = corpus(tmp_path, 5)
    (tmp_path / "1.wav").write_text("no audio")
    (tmp_path / "3.wav").unlink()
    store = extract([manifest], reader(), tmp_path / "store")
    assert list(store.rows) == ["u0", "u2", "u4"] and store.verify() == []
    assert "1.wav: cannot be read" in caplog.text and "3.wav: cannot be read" in caplog.text


def test_a_mended_recording_is_taken_in_by_the_next_run(tmp_path):
    manifest = corpus(tmp_path, 3)
    whole = (tmp_path / "1.wav").read_bytes()
    (tmp_path / "1.wav").write_bytes(b"")
    extract([manifest], reader(), tmp_path / "store")
    (tmp_path / "1.wav").write_bytes(whole)
    is_whole(extract([manifest], reader(), tmp_path / "store"), tmp_path, 3)


def test_frames_of_a_recording_that_became_unreadable_are_forgotten(tmp_path):
    manifest = corpus(tmp_path, 3)
    extract([manifest], reader(), tmp_path / "store")
    (tmp_path / "1.wav").write_text("no audio")
    assert list(extract([manifest], reader(), tmp_path / "store").rows) == ["u0", "u2"]


def test_other_preprocessing_into_the_same_folder_is_refused(tmp_path):
    manifest = corpus(tmp_path, 1)
    extract([manifest], reader(), tmp_path / "store")
    with pytest.raises(StoreError, match="frame_average: found 1, wanted 2"):
        extract([manifest], reader(frame_average=2), tmp_path / "store")


def test_values_beyond_fp16_are_one_error_naming_the_utterance(tmp_path):
    manifest, loud = corpus(tmp_path, 3), reader()
    loud.encoder.scale = 1e6
    with pytest.raises(StoreError, match=r"u0: the encoder gave values that do not fit fp16"):
        extract([manifest], loud, tmp_path / "store")


def test_the_number_of_torch_threads_is_given_back(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        extract([corpus(tmp_path, 2)], reader(), tmp_path / "store")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_silence_is_trimmed_before_encoding(tmp_path):
    wave = np.concatenate([np.zeros(4000), 0.3 * np.random.default_rng(0).normal(size=1600), np.zeros(4000)])
    trimmed = reader(trim_db=40.0).encode(torch.tensor(wave, dtype=torch.float32))
    plain = reader().encode(trim_silence(torch.tensor(wave, dtype=torch.float32)))
    assert trimmed.equal(plain) and trimmed.shape[1] == 100


@pytest.mark.parametrize(("frames", "count"), [(8, 4), (9, 4), (3, 4), (1, 2)])
def test_averaged_frames_are_means_of_groups_and_of_the_rest(frames, count):
    values = torch.randn(2, frames, 3, generator=torch.Generator().manual_seed(0))
    groups = [values[:, start : start + count].mean(1) for start in range(0, frames, count)]
    torch.testing.assert_close(average_frames(values, count), torch.stack(groups, dim=1))


def test_averaging_frames_keeps_the_mean_of_whole_groups():
    values = torch.randn(1, 40, 6, generator=torch.Generator().manual_seed(0))
    pool = StatisticalAttentivePooling(6)
    torch.testing.assert_close(pool(average_frames(values, 4))[:, :6], pool(values)[:, :6])


def extract_slowly(manifest, folder):
    """Run an extraction in another process that takes its time."""

    class Slow(Encoder):
        def __call__(self, wave):
            time.sleep(0.004)
            return super().__call__(wave)

    extract([manifest], FrameReader(Slow(), trim_db=None), folder)


def test_an_extraction_killed_in_the_middle_goes_on_where_it_was(tmp_path):
    manifest, folder = corpus(tmp_path, 400), tmp_path / "store"
    process = processes.start(extract_slowly, manifest, folder)
    deadline = time.monotonic() + 60
    while not ((folder / "index.jsonl").exists() and (folder / "index.jsonl").stat().st_size):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -9
    kept = len(FeatureStore(folder, reader().fingerprint()).rows)
    assert 0 < kept < 400
    rest = reader()
    is_whole(extract([manifest], rest, folder), tmp_path, 400)
    assert rest.encoder.encoded == 400 - kept


def test_two_extractions_of_one_folder_at_a_time_do_the_work_once(tmp_path):
    manifest, folder = corpus(tmp_path, 100), tmp_path / "store"
    both = [processes.start(extract_slowly, manifest, folder) for _ in range(2)]
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert len((folder / "index.jsonl").read_text().splitlines()) == 100
    is_whole(FeatureStore(folder, reader().fingerprint()), tmp_path, 100)


def test_the_stamp_of_a_file_is_its_size_and_time(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    os.utime(path, ns=(5, 7))
    assert file_stamp(str(path)) == (3, 7)
