"""Extraction in parts, of touched files, and in batches: the store ends up as one process would have left it."""

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from test_extract import Encoder, corpus, is_whole, reader
from toy_corpora import LABELS, write_wav

from speechbrain_mifuse.cli.main import main
from speechbrain_mifuse.features import store as store_module
from speechbrain_mifuse.features.encode_files import similar
from speechbrain_mifuse.features.encoder import FrozenEncoder
from speechbrain_mifuse.features.extract import FrameReader, extract
from speechbrain_mifuse.features.shards import Shard
from speechbrain_mifuse.features.store import FeatureStore, Row, StoreError
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.files import atomic_write

ABOUT = {"layers": [1, 2], "dim": 4}
CLASSIFIER = str(Path(__file__).resolve().parents[2] / "hparams" / "classifier_ravdess.yaml")


def contents(store):
    """Everything that a store says of its utterances, but for where the frames lie."""
    return {
        key: (store.frames(key).tobytes(), row.audio, row.file, row.crc, row.layer_crcs)
        for key, row in store.rows.items()
    }


# Shards ---------------------------------------------------------------------------------------------------------------


def test_every_utterance_belongs_to_one_shard_and_shards_are_of_about_one_size():
    ids = [f"utt-{number}" for number in range(4000)]
    parts = [[utt_id for utt_id in ids if Shard(number, 4).holds(utt_id)] for number in range(1, 5)]
    assert sorted(utt_id for part in parts for utt_id in part) == sorted(ids)
    assert all(900 < len(part) < 1100 for part in parts)


@pytest.mark.parametrize("text", ["0/4", "5/4", "4", "a/b", "1/0", "-1/4", ""])
def test_what_is_no_shard_is_refused(text):
    with pytest.raises(UserError, match=r"--shard: .* is no shard"):
        Shard.parse(text)


def test_shards_brought_together_are_bit_for_bit_what_one_process_stores(tmp_path):
    manifest = corpus(tmp_path, 30)
    readers = [reader() for _ in range(3)]
    for number, one in enumerate(readers, start=1):
        extract([manifest], one, tmp_path / "store", Shard(number, 3))
    last = reader()
    store = extract([manifest], last, tmp_path / "store")
    encoded = [one.encoder.encoded for one in readers]
    assert sum(encoded) == 30 and all(encoded) and last.encoder.encoded == 0
    joined = FeatureStore(store.folder, last.fingerprint())
    assert contents(joined) == contents(extract([manifest], reader(), tmp_path / "alone"))
    assert not list(store.folder.glob("shards/*/[!l]*"))


def test_a_shard_encodes_nothing_that_the_store_has(tmp_path):
    manifest = corpus(tmp_path, 10)
    extract([manifest], reader(), tmp_path / "store")
    again = reader()
    assert len(extract([manifest], again, tmp_path / "store", Shard(1, 2)).rows) == 10
    assert again.encoder.encoded == 0 and not (tmp_path / "store" / "shards").exists()


def test_what_a_killed_shard_has_stored_is_not_encoded_again_by_any_number_of_shards(tmp_path):
    manifest = corpus(tmp_path, 30)
    half = json.loads(manifest.read_text())
    atomic_write(tmp_path / "half.json", json.dumps(dict(list(half.items())[:15])))
    killed = reader()
    extract([tmp_path / "half.json"], killed, tmp_path / "store", Shard(1, 2))
    rest = reader()
    is_whole(extract([manifest], rest, tmp_path / "store"), tmp_path, 30)
    assert killed.encoder.encoded and rest.encoder.encoded == 30 - killed.encoder.encoded


def test_a_copy_of_a_shard_killed_in_the_middle_goes_on(tmp_path, monkeypatch):
    manifest, read, calls = corpus(tmp_path, 20), FeatureStore.frames, []
    extract([manifest], reader(), tmp_path / "store", Shard(1, 1))

    def killed(self, utt_id, layer=None):
        calls.append(utt_id)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return read(self, utt_id, layer)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureStore, "frames", killed)
        with pytest.raises(KeyboardInterrupt):
            extract([manifest], reader(), tmp_path / "store")
    assert len(FeatureStore(tmp_path / "store", reader().fingerprint()).rows) == 9
    rest = reader()
    is_whole(extract([manifest], rest, tmp_path / "store"), tmp_path, 20)
    assert rest.encoder.encoded == 0


def test_a_shard_that_is_a_link_to_another_store_is_refused_and_that_store_is_not_emptied(tmp_path):
    manifest = corpus(tmp_path, 5)
    extract([manifest], reader(), tmp_path / "mine")
    (tmp_path / "stranger" / "shards").mkdir(parents=True)
    (tmp_path / "stranger" / "shards" / "1-of-1").symlink_to(tmp_path / "mine")
    with pytest.raises(StoreError, match="1-of-1: is a link"):
        extract([manifest], reader(), tmp_path / "stranger")
    assert len(FeatureStore(tmp_path / "mine", reader().fingerprint()).rows) == 5


def test_a_recording_that_changed_after_its_shard_was_encoded_is_encoded_again(tmp_path):
    manifest = corpus(tmp_path, 5)
    extract([manifest], reader(), tmp_path / "store", Shard(1, 1))
    write_wav(tmp_path / "3.wav", 0.1 * np.random.default_rng(99).normal(size=480))
    last = reader()
    is_whole(extract([manifest], last, tmp_path / "store"), tmp_path, 5)
    assert last.encoder.encoded == 1


def test_a_shard_of_other_frames_is_refused(tmp_path):
    manifest = corpus(tmp_path, 5)
    FeatureStore(Shard(1, 2).folder(tmp_path / "store"), {"layers": [9], "dim": 16})
    with pytest.raises(StoreError, match=r"1-of-2 holds features of another kind: .*layers: found \[9\]"):
        extract([manifest], reader(), tmp_path / "store")


def test_machines_share_a_recipes_extraction_by_the_command_line(toy_folder, toy_encoder, tmp_path, capsys):
    command = ["extract", CLASSIFIER, "--data_folder", str(toy_folder), "--device", "cpu"]
    command += ["--encoder", str(toy_encoder), "--encoder_layers", "[0, 1]", "--layer", "1"]
    command += ["--output_folder", str(tmp_path / "out"), "--feature_folder", str(tmp_path / "features")]
    for flags in (["--shard", "1/2"], ["--shard", "2/2"], []):
        main([*command, *flags])
    counts = [int(line.split()[1]) for line in capsys.readouterr().out.splitlines() if line.startswith("ravdess: ")]
    assert len(counts) == 3 and min(counts) > 0 and counts[0] + counts[1] == counts[2] == 5 * len(LABELS) * 3


def test_a_recipe_that_stores_no_frames_has_nothing_to_extract(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["extract", CLASSIFIER, "--features", "finetune", "--output_folder", str(tmp_path)])
    assert "this recipe stores no frames" in capsys.readouterr().err


# Touched files --------------------------------------------------------------------------------------------------------


def test_files_that_are_newer_but_sound_the_same_are_recognised_and_only_once(tmp_path, caplog):
    manifest = corpus(tmp_path, 6)
    extract([manifest], reader(), tmp_path / "store")
    before = contents(FeatureStore(tmp_path / "store", reader().fingerprint()))
    for number in range(4):
        os.utime(tmp_path / f"{number}.wav", ns=(7, 7))
    again = reader()
    with caplog.at_level(logging.INFO, "speechbrain_mifuse"):
        store = extract([manifest], again, tmp_path / "store")
        extract([manifest], again, tmp_path / "store")
    assert again.encoder.encoded == 0 and caplog.text.count("4 files have changed but not their sound") == 1
    after = contents(FeatureStore(tmp_path / "store", reader().fingerprint()))
    assert {key: found[:2] for key, found in after.items()} == {key: found[:2] for key, found in before.items()}
    assert [key for key in after if after[key][2] != before[key][2]] == ["u0", "u1", "u2", "u3"]
    is_whole(store, tmp_path, 6)


def test_a_recording_in_another_container_is_recognised(tmp_path):
    manifest = corpus(tmp_path, 2)
    extract([manifest], reader(), tmp_path / "store")
    samples, rate = soundfile.read(tmp_path / "1.wav", dtype="int16")
    soundfile.write(tmp_path / "1.wav", samples, rate, format="FLAC", subtype="PCM_16")
    again = reader()
    is_whole(extract([manifest], again, tmp_path / "store"), tmp_path, 2)
    assert again.encoder.encoded == 0


# Batches --------------------------------------------------------------------------------------------------------------


class Padding(Encoder):
    """Encodes padded batches as a GPU's encoder would, and notes their sizes."""

    device = torch.device("cuda")

    def __init__(self):
        super().__init__()
        self.batches = []

    def encode_padded(self, waves):
        self.batches.append(len(waves))
        return [self(wave) for wave in waves]


def test_recordings_are_put_into_batches_on_a_gpu_and_end_up_under_their_own_names(tmp_path, monkeypatch):
    monkeypatch.setattr("speechbrain_mifuse.features.encode_files.SORTED", 8)
    manifest, encoder = corpus(tmp_path, 20), Padding()
    (tmp_path / "5.wav").write_text("no audio")
    store = extract([manifest], FrameReader(encoder, trim_db=None), tmp_path / "store")
    assert encoder.batches == [7, 8, 4]
    plain = extract([manifest], reader(), tmp_path / "plain")
    assert contents(store) == contents(plain) and len(store.rows) == 19


def test_touched_recordings_reach_no_batch(tmp_path):
    manifest, encoder = corpus(tmp_path, 5), Padding()
    extract([manifest], FrameReader(Padding(), trim_db=None), tmp_path / "store")
    for number in range(5):
        os.utime(tmp_path / f"{number}.wav", ns=(7, 7))
    is_whole(extract([manifest], FrameReader(encoder, trim_db=None), tmp_path / "store"), tmp_path, 5)
    assert encoder.batches == []


def test_a_batch_never_has_more_samples_than_there_is_room_for_but_for_one_long_recording():
    waves = [(number, torch.zeros(count)) for number, count in enumerate([50, 7, 3, 9, 200, 8, 8, 1])]
    batches = list(similar(waves, 30))
    assert sorted(number for batch in batches for number, _ in batch) == list(range(8))
    sizes = [[len(wave) for _, wave in batch] for batch in batches]
    assert sizes[:2] == [[200], [50]] and all(max(size) * len(size) <= 30 for size in sizes[2:])


def test_frames_of_another_precision_are_of_another_kind(toy_encoder, tmp_path):
    encoder = FrozenEncoder(toy_encoder, [1])
    exact = FrameReader(encoder).fingerprint()
    encoder.compute_dtype = torch.bfloat16
    assert {**exact, "compute_dtype": "bfloat16"} == FrameReader(encoder).fingerprint()


# A large index --------------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A store of six utterances whose rows are copied to arrays when it is opened."""
    monkeypatch.setattr(store_module, "FEW", 3)
    store = FeatureStore(tmp_path / "store", ABOUT)
    with store.writer() as add:
        for number in range(6):
            frames = np.random.default_rng(number).normal(size=(2, 3 + number, 4))
            add(f"u{number}", frames, audio=f"{number:064x}", file=(100 + number, 10**18 + number))
    FeatureStore(store.folder, ABOUT)
    assert (store.folder / "index.npz").exists()
    return store


def test_rows_read_from_arrays_are_those_of_the_index(copied, monkeypatch):
    monkeypatch.setattr(store_module, "read_line", None)  # no line is read
    found = FeatureStore(copied.folder, ABOUT)
    assert list(found.rows.items()) == list(copied.rows.items()) and contents(found) == contents(copied)
    assert found.rows.stamp("u2") == (102, 10**18 + 2) and found.rows.stamp("u9") is None


def test_rows_written_after_the_copy_count_and_replace_those_in_it(copied):
    with FeatureStore(copied.folder, ABOUT).writer() as add:
        add("u1", np.ones((2, 9, 4)), audio="new", file=(1, 1))
        add("u6", np.ones((2, 2, 4)), audio="", file=(2, 2))
    found = FeatureStore(copied.folder, ABOUT)
    assert list(found.rows) == [f"u{number}" for number in range(7)] and found.verify() == []
    assert (found.rows["u1"].audio, found.rows["u1"].frames, found.rows.stamp("u6")) == ("new", 9, (2, 2))


def test_a_copy_of_another_index_is_passed_over(copied):
    index = copied.folder / "index.jsonl"
    index.write_bytes(index.read_bytes().split(b"\n", 1)[1])
    assert list(FeatureStore(copied.folder, ABOUT).rows) == [f"u{number}" for number in range(1, 6)]


@pytest.mark.parametrize("damage", [b"", b"no arrays", None])
def test_a_damaged_copy_is_passed_over(damage, copied):
    path = copied.folder / "index.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content if damage is None else damage)
    assert contents(FeatureStore(copied.folder, ABOUT)) == contents(copied)


@pytest.mark.parametrize(
    "changes",
    [
        {"offset": np.array([-1] * 6)},
        {"frames": np.array([2**62] * 6)},
        {"offset": np.array([0.5] * 6)},
        {"offset": np.zeros(2, np.int64)},
        {"audio": np.arange(6)},
        {"layer_crcs": np.zeros(6, np.uint32)},
        {"size": np.array(3)},
        {"ids": np.frombuffer(b"\xff", np.uint8)},
        {"crc": None},
    ],
    ids=str,
)
def test_a_copy_from_elsewhere_that_does_not_fit_is_passed_over(changes, copied):
    with np.load(copied.folder / "index.npz") as copy:
        columns = {name: value for name, value in {**copy, **changes}.items() if value is not None}
    np.savez(copied.folder / "index.npz", **columns)
    assert contents(FeatureStore(copied.folder, ABOUT)) == contents(copied)


def test_a_copy_that_unpacks_to_much_is_passed_over(copied, monkeypatch):
    with np.load(copied.folder / "index.npz") as copy:
        np.savez_compressed(copied.folder / "index.npz", **copy, more=np.zeros(2**25, np.uint8))
    unpacked = []
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda *_: unpacked.append(1))
    assert contents(FeatureStore(copied.folder, ABOUT)) == contents(copied) and not unpacked


def test_frames_cut_off_after_the_copy_was_made_are_noticed(copied):
    frames = copied.folder / "frames.f16"
    frames.write_bytes(frames.read_bytes()[:-2])
    with pytest.raises(StoreError, match="shorter than its index says"):
        FeatureStore(copied.folder, ABOUT)


def test_a_deleted_row_is_gone_and_a_new_one_of_its_name_is_there(copied):
    rows = FeatureStore(copied.folder, ABOUT).rows
    del rows["u3"]
    assert "u3" not in rows and rows.get("u3") is None and len(rows) == 5
    rows["u3"] = Row(0, 1, "", (0, 0), 0)
    assert rows["u3"].frames == 1 and len(rows) == 6
