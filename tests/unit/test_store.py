"""The feature store: what goes in comes out, damage is found, and nothing foreign is read or written."""

import json
import os
import pickle

import numpy as np
import pytest

from speechbrain_mifuse.features.store import FeatureStore, StoreError, difference

FINGERPRINT = {"encoder": "toy", "layers": [2, 5], "dim": 3}


def frames(seed, count=4):
    return np.random.default_rng(seed).normal(size=(2, count, 3)).astype(np.float32)


def fill(store, *keys, flush_every=64):
    with store.writer(flush_every) as add:
        for key in keys:
            number = int(key[1:])
            add(key, frames(number, 3 + number), audio=f"{number:064x}", file=(100 + number, number))
    return store


@pytest.fixture
def store(tmp_path):
    return fill(FeatureStore(tmp_path / "s", FINGERPRINT), "u0", "u1", "u2")


def again(store, **changes):
    return FeatureStore(store.folder, {**FINGERPRINT, **changes})


def test_frames_come_back_as_the_fp16_that_went_in(store):
    for number in range(3):
        found = again(store).frames(f"u{number}")
        assert found.dtype == np.float16
        assert np.array_equal(found, frames(number, 3 + number).astype(np.float16))


def test_one_layer_can_be_read_alone(store):
    for place, layer in enumerate([2, 5]):
        assert np.array_equal(store.frames("u1", layer), store.frames("u1")[place])
        assert store.frames("u1", layer).shape == (4, 3)


def test_rows_remember_audio_and_file(store):
    row = again(store).rows["u2"]
    assert (row.audio, row.file, row.frames) == (f"{2:064x}", (102, 2), 5)
    assert "u2" in again(store) and "u9" not in again(store)


def test_frames_read_at_any_offset_of_a_memory_page_are_right(tmp_path):
    fingerprint = {"layers": [1], "dim": 7}
    store = FeatureStore(tmp_path, fingerprint)
    blocks = {f"u{n}": np.full((1, 101 + n, 7), n, np.float16) for n in range(40)}
    with store.writer() as add:
        for key, block in blocks.items():
            add(key, block, "ab", (1, 1))
    assert store._frames_path.stat().st_size > 10 * 4096
    assert all(np.array_equal(store.frames(key), block) for key, block in blocks.items())


def test_changing_what_was_read_does_not_change_the_store(store):
    found = store.frames("u0")
    found[:] = 0
    assert again(store).frames("u0").any() and again(store).verify() == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"encoder": "other"}, "encoder: found toy, wanted other"),
        ({"layers": [2]}, r"layers: found \[2, 5\], wanted \[2\]"),
        ({"dim": 4}, "dim: found 3, wanted 4"),
        ({"trim_db": 30.0}, r"trim_db: found None, wanted 30.0"),
    ],
)
def test_features_of_another_kind_are_refused_naming_what_differs(store, changes, says):
    with pytest.raises(StoreError, match=says + r"\. Pass another --feature_folder"):
        again(store, **changes)


def test_difference_names_every_entry_once():
    assert difference({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 3}) == "b: found 2, wanted 3; c: found 3, wanted None"


def test_an_utterance_that_is_not_stored_is_an_error_naming_it(store):
    with pytest.raises(StoreError, match="no frames of 'u9'"):
        store.frames("u9")


def test_a_layer_that_is_not_stored_is_an_error_naming_the_flag(store):
    with pytest.raises(StoreError, match=r"holds layers \[2, 5\], not 3. Pass --encoder_layers"):
        store.frames("u0", 3)


def test_a_later_row_replaces_an_earlier_one(store):
    with store.writer() as add:
        add("u0", frames(9, 2), audio="cd", file=(7, 7))
    assert np.array_equal(again(store).frames("u0"), frames(9, 2).astype(np.float16))
    assert again(store).rows["u0"].file == (7, 7) and again(store).verify() == []


def test_a_torn_index_line_costs_its_utterance_only(store):
    index = store.folder / "index.jsonl"
    lines = index.read_bytes().splitlines(keepends=True)
    index.write_bytes(b"".join(lines[:2]) + lines[2][:25])
    torn = again(store)
    assert list(torn.rows) == ["u0", "u1"]
    fill(torn, "u2", "u3")
    assert [json.loads(line)["id"] for line in index.read_text().splitlines()] == ["u0", "u1", "u2", "u3"]
    assert again(store).verify() == []
    assert np.array_equal(again(store).frames("u3"), frames(3, 6).astype(np.float16))


def test_frames_without_a_row_are_cut_off(store):
    path = store.folder / "frames.f16"
    whole = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"\x01" * 101)
    fill(again(store), "u3")
    assert path.stat().st_size == whole + 2 * 6 * 3 * 2
    assert again(store).verify() == []
    assert np.array_equal(again(store).frames("u3"), frames(3, 6).astype(np.float16))


def test_frames_are_on_disk_before_the_rows_that_point_to_them(tmp_path):
    store = FeatureStore(tmp_path, FINGERPRINT)
    with store.writer(flush_every=2) as add:
        for number in range(5):
            add(f"u{number}", frames(number), "ab", (1, 1))
            on_disk = again(store)
            assert len(on_disk.rows) == (number + 1) // 2 * 2
            assert on_disk.verify() == []


def test_a_flipped_bit_is_found(store):
    path = store.folder / "frames.f16"
    content = bytearray(path.read_bytes())
    content[again(store).rows["u1"].offset * 2 + 5] ^= 1
    path.write_bytes(content)
    assert again(store).verify() == ["u1"]


def test_a_truncated_frames_file_is_an_error_that_says_what_to_do(store):
    path = store.folder / "frames.f16"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(StoreError, match=r"frames.f16 is shorter than its index says. Delete"):
        again(store)


def test_a_missing_frames_file_is_an_error_that_says_what_to_do(store):
    (store.folder / "frames.f16").unlink()
    with pytest.raises(StoreError, match=r"frames.f16 is shorter than its index says. Delete"):
        again(store)


@pytest.mark.parametrize("damage", ["{", "[1, 2]", '{"id": "u0"}'])
def test_a_damaged_index_line_is_an_error_naming_it(store, damage):
    index = store.folder / "index.jsonl"
    lines = index.read_text().splitlines()
    index.write_text("\n".join([lines[0], damage, lines[2]]) + "\n")
    with pytest.raises(StoreError, match=r"index.jsonl: line 2 is damaged"):
        again(store)


def test_a_damaged_store_json_is_an_error_naming_it(store):
    for damage in ("{", "[]", "[" * 100_000):
        (store.folder / "store.json").write_text(damage)
        with pytest.raises(StoreError, match=r"store.json: damaged"):
            again(store)


@pytest.mark.parametrize(
    "changes",
    [
        {"offset": 0.5},
        {"offset": float("nan")},
        {"frames": True},
        {"frames": 1.5},
        {"id": [1]},
        {"id": 5},
        {"audio": 5},
    ],
    ids=str,
)
def test_a_row_of_a_store_from_elsewhere_that_is_none_is_an_error_naming_its_line(store, changes):
    index = store.folder / "index.jsonl"
    row = {"id": "u0", **vars(store.rows["u0"]), **changes}
    index.write_text(json.dumps(row) + "\n")
    with pytest.raises(StoreError, match=r"index.jsonl: line 1 is damaged"):
        again(store)
    index.write_text("[" * 100_000 + "\n")
    with pytest.raises(StoreError, match=r"index.jsonl: line 1 is damaged"):
        again(store)


@pytest.mark.parametrize("name", ["store.json", "index.jsonl", "index.npz", "frames.f16", "lock"])
def test_a_link_or_a_pipe_in_the_place_of_a_file_is_refused_and_no_other_file_is_cut(store, tmp_path, name):
    victim, path = tmp_path / "victim.txt", store.folder / name
    victim.write_text("precious")
    for replace in (lambda: path.symlink_to(victim), lambda: os.mkfifo(path), path.mkdir):
        path.unlink(missing_ok=True)
        replace()
        with pytest.raises(StoreError, match=f"{name}: is a link or no regular file"):
            again(store)
    assert victim.read_text() == "precious"


def test_a_linked_folder_of_a_store_is_read(store, tmp_path):
    (tmp_path / "link").symlink_to(store.folder)
    assert FeatureStore(tmp_path / "link", FINGERPRINT).verify() == []


@pytest.mark.parametrize("value", [70000.0, -1e6, np.nan, np.inf])
def test_a_value_beyond_fp16_is_an_error_and_what_came_before_is_kept(tmp_path, value):
    store = FeatureStore(tmp_path, FINGERPRINT)
    bad = frames(1)
    bad[1, 2, 0] = value
    with pytest.raises(StoreError, match="u1: the encoder gave values that do not fit fp16"), store.writer() as add:
        add("u0", frames(0), "ab", (1, 1))
        add("u1", bad, "ab", (1, 1))
    assert list(again(store).rows) == ["u0"] and again(store).verify() == []


def test_the_largest_fp16_value_fits(tmp_path):
    store = FeatureStore(tmp_path, FINGERPRINT)
    with store.writer() as add:
        add("u0", np.full((2, 1, 3), 65504.0), "ab", (1, 1))
    assert again(store).frames("u0").max() == 65504


@pytest.mark.parametrize("shape", [(1, 4, 3), (2, 4, 2), (4, 3)])
def test_frames_of_another_shape_are_an_error_naming_the_utterance(tmp_path, shape):
    store = FeatureStore(tmp_path, FINGERPRINT)
    with pytest.raises(StoreError, match="u0: frames of shape"), store.writer() as add:
        add("u0", np.zeros(shape), "ab", (1, 1))


def test_a_store_crosses_to_a_loader_process_and_still_reads(store):
    store.frames("u0")
    other = pickle.loads(pickle.dumps(store))
    assert np.array_equal(other.frames("u2"), store.frames("u2"))
