"""What disks, clocks and second runs can do: each file is cut and has its bits flipped, and no result gets wrong."""

import asyncio
import contextlib
import errno
import hashlib
import json
import os
import random
import re
import resource
import signal
import sqlite3
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from filelock import FileLock
from speechbrain.utils.epoch_loop import EpochCounter

from speechbrain_mifuse.brains.train_log import TrainLog
from speechbrain_mifuse.brains.training import WHOLE, AtomicCheckpointer, CheckpointError, training_lock
from speechbrain_mifuse.corpora.corpus import Corpus
from speechbrain_mifuse.corpora.manifest import CorpusError, Utterance, read_manifest
from speechbrain_mifuse.evaluation.aggregate import write_csv
from speechbrain_mifuse.experiments.same_settings import same_settings
from speechbrain_mifuse.features.extract import extract
from speechbrain_mifuse.features.store import FeatureStore, StoreError
from speechbrain_mifuse.inference.recognizer_folder import RECOGNIZER, RecogniserError, load_classifier
from speechbrain_mifuse.lalm.answer import Answer, Response
from speechbrain_mifuse.lalm.hashes import HashCache, Known, file_stamp
from speechbrain_mifuse.lalm.integrity import check
from speechbrain_mifuse.lalm.limits import Pace, retry_after
from speechbrain_mifuse.lalm.store import LabelStore, Query, Record
from speechbrain_mifuse.lalm.store import StoreError as LabelStoreError
from speechbrain_mifuse.nnet.adapter_files import AdapterError, export_adapter, load_adapter
from speechbrain_mifuse.nnet.classifier import EmotionClassifier
from speechbrain_mifuse.nnet.wap_transformer import WAPTransformer
from speechbrain_mifuse.report.figures import plot_confusion
from speechbrain_mifuse.utils.errors import WriteError, one_clear_error, stopped_by_ctrl_c
from speechbrain_mifuse.utils.files import atomic_write

LABELS = ("angry", "sad")
FINGERPRINT = {"encoder": "toy", "layers": [2, 5], "dim": 16}
# A user is told to do one of these.
REMEDIES = ("Delete", "again", "Restore", "restore", "Name", "Pass", "Prepare")


def cuts(content):
    """Ways to cut a file: empty, in the middle, and short of a byte."""
    return {f"cut to {size} bytes": content[:size] for size in {0, 1, len(content) // 2, len(content) - 1}}


def flips(content, count=40):
    """Ways to flip one bit of a file, spread over all of it."""
    chance, step, found = random.Random(len(content)), len(content) / count, {}
    for number in range(count):
        place, bit = int((number + chance.random()) * step), chance.randrange(8)
        found[f"bit {bit} of byte {place}"] = (
            content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]
        )
    return found


def silently_wrong(path, damages, read, problem, restore=()):
    """Damage a file in each way; which ways are neither told in one clear error nor without effect.

    `restore` names further files that reading may change.
    """
    kept = {each: each.read_bytes() for each in (path, *restore)}
    wanted, found = read(), []
    for how, content in damages.items():
        path.write_bytes(content)
        try:
            if read() != wanted:
                found.append(how)
        except problem as error:
            assert str(path.parent) in str(error) and any(word in str(error) for word in REMEDIES), (how, error)
        for each, before in kept.items():
            each.write_bytes(before)
    return found


def both(path, count=40):
    return cuts(path.read_bytes()) | flips(path.read_bytes(), count)


# The feature store.


def frames(number):
    return np.random.default_rng(number).normal(size=(2, 4 + number, 16)).astype(np.float16)


def fill(folder, keys=range(5)):
    with FeatureStore(folder, FINGERPRINT).writer() as add:
        for number in keys:
            add(f"u{number}", frames(number), audio=f"{number:064x}", file=(100, number))


def rows_of(folder, layer=None):
    """All that training reads of a store; what a store lacks is encoded again, and no damage."""
    store = FeatureStore(folder, FINGERPRINT)
    found = {key: (store.rows[key].audio, store.frames(key, layer).tobytes()) for key in store.rows}
    return Found(found)


class Found(dict):
    """Rows by utterance that may lack some: the next run makes them anew."""

    def __ne__(self, other):
        return not self.items() <= other.items()


@pytest.fixture
def stored(tmp_path):
    fill(tmp_path / "s")
    return tmp_path / "s"


def unsealed(folder):
    """Make a store look as if it were written before lines and layers had checksums of their own."""
    lines = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    old = [{key: value for key, value in line.items() if key not in ("line", "layer_crcs")} for line in lines]
    (folder / "index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))


@pytest.mark.parametrize("layer", [None, 2, 5])
@pytest.mark.parametrize("old", [False, True])
def test_stored_frames_that_changed_on_the_disk_are_never_read(stored, layer, old):
    if old:
        unsealed(stored)
    path = stored / "frames.f16"
    read = lambda: rows_of(stored, layer)  # noqa: E731
    assert silently_wrong(path, both(path), read, StoreError, [stored / "index.jsonl"]) == []


@pytest.mark.parametrize("name", ["index.jsonl", "store.json"])
def test_a_damaged_index_or_fingerprint_of_a_store_is_named_or_costs_an_utterance(stored, name):
    path = stored / name
    assert silently_wrong(path, both(path, 200), lambda: rows_of(stored), StoreError, [stored / "index.jsonl"]) == []


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_all_damaged_frames_are_named_at_once_and_the_next_extraction_encodes_just_them(stored):
    store = FeatureStore(stored, FINGERPRINT)
    for key in ("u1", "u3"):
        flip(stored / "frames.f16", 2 * store.rows[key].offset + 7)
    with pytest.raises(StoreError, match=r"frames.f16: .*checksum differs: u1, u3\. Run again") as caught:
        store.frames("u3", 2)
    assert "Delete" not in str(caught.value)
    again = FeatureStore(stored, FINGERPRINT)
    assert sorted(again.rows) == ["u0", "u2", "u4"]
    fill(stored, (1, 3))
    whole = FeatureStore(stored, FINGERPRINT)
    assert whole.verify() == []
    assert all(np.array_equal(whole.frames(f"u{number}"), frames(number)) for number in range(5))


def test_a_flip_in_one_layer_does_not_stop_who_reads_another(stored):
    row = FeatureStore(stored, FINGERPRINT).rows["u4"]
    flip(stored / "frames.f16", 2 * row.offset + row.frames * 16 * 2 + 3)
    store = FeatureStore(stored, FINGERPRINT)
    assert np.array_equal(store.frames("u4", 2), frames(4)[0])
    with pytest.raises(StoreError, match="u4"):
        store.frames("u4", 5)


def test_while_another_process_fills_a_damaged_store_it_is_not_written_to(stored):
    flip(stored / "frames.f16", 0)
    index = (stored / "index.jsonl").read_bytes()
    with FileLock(stored / "lock"), pytest.raises(StoreError, match=r"u0.*Delete"):
        FeatureStore(stored, FINGERPRINT).frames("u0")
    assert (stored / "index.jsonl").read_bytes() == index


# The label store.

QUERY = Query("0" * 64, LABELS, "m", "http://127.0.0.1/v1", {"temperature": 1})
AUDIO = [hashlib.sha256(bytes([number])).hexdigest() for number in range(12)]


def answer(number, k):
    sad = (1 + number + k) / 32
    return Response(Answer("distribution", (1 - sad, sad)), json.dumps({"text": f"sad {sad}"}))


@pytest.fixture
def answered(tmp_path):
    path = tmp_path / "labels.sqlite"
    with LabelStore(path) as store:
        records = [Record(audio, k, f"u{n}", answer(n, k)) for n, audio in enumerate(AUDIO) for k in range(3)]
        store.put_many(QUERY, records)
    return path


def answers_of(path):
    """What a recipe reads of a label store; missing answers are asked for again."""
    for ending in ("-wal", "-shm"):
        path.with_name(path.name + ending).unlink(missing_ok=True)
    with LabelStore(path) as store:
        probs, mask, _ = store.load(QUERY, AUDIO, 3)
    return Found({(n, k): tuple(probs[n, k].tolist()) for n, k in mask.nonzero().tolist()})


def test_a_label_store_that_is_cut_is_named_or_lacks_answers(answered):
    assert silently_wrong(answered, cuts(answered.read_bytes()), lambda: answers_of(answered), LabelStoreError) == []


# Checkpoints.


def training(folder, value=0.0):
    """Make a checkpointer of a network, an optimiser and an epoch counter, as a Brain has them."""
    torch.manual_seed(3)
    network = torch.nn.Linear(6, 5)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    network(torch.full((1, 6), 1.0 + value)).sum().backward()
    optimizer.step()
    counter = EpochCounter(9)
    counter.current = int(value)
    return AtomicCheckpointer(folder, {"network": network, "optimizer": optimizer, "counter": counter})


def state_of(folder):
    """All that a resumed run starts from."""
    checkpointer = training(folder)
    checkpointer.recover_if_possible()
    parts = checkpointer.recoverables
    moments = parts["optimizer"].state_dict()["state"][0]
    return parts["counter"].current, *(value.tolist() for value in (parts["network"].weight, *moments.values()))


@pytest.fixture
def saved(tmp_path):
    training(tmp_path, 4.0).save_and_keep_only(meta={"epoch": 4})
    (folder,) = tmp_path.glob("CKPT*")
    return folder


def test_a_later_checkpoint_costs_no_more_looks_at_the_folder_than_the_first(tmp_path, monkeypatch):
    looks, checkpointer, listed = [], training(tmp_path), AtomicCheckpointer.list_checkpoints
    monkeypatch.setattr(AtomicCheckpointer, "list_checkpoints", lambda self: looks.append(1) or listed(self))
    counts = []
    for epoch in range(4):
        looks.clear()
        checkpointer.save_and_keep_only(meta={"epoch": epoch})
        counts.append(len(looks))
    assert len(set(counts)) == 1, counts
    (kept,) = checkpointer.list_checkpoints()
    assert kept.meta["epoch"] == 3


@pytest.mark.parametrize("name", ["network.ckpt", "optimizer.ckpt", "counter.ckpt", "CKPT.yaml", WHOLE])
def test_a_checkpoint_that_changed_on_the_disk_is_named_or_without_effect(saved, name):
    path = saved / name
    damages = {how: content for how, content in both(path).items() if name != WHOLE or content}
    assert silently_wrong(path, damages, lambda: state_of(saved.parent), CheckpointError) == []


def test_a_checkpoint_that_lacks_a_file_is_named(saved):
    (saved / "optimizer.ckpt").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer.ckpt: damaged.*Delete .*CKPT.* and run again"):
        state_of(saved.parent)


def test_torch_alone_would_not_notice(saved):
    """Show that the checksums are needed: without them most flips in weights are read as if they were right."""
    path = saved / "network.ckpt"
    (saved / WHOLE).write_text("")
    wrong, named = [], 0
    wanted = state_of(saved.parent)
    for how, content in flips(path.read_bytes(), 120).items():
        path.write_bytes(content)
        try:
            wrong += [how] if state_of(saved.parent) != wanted else []
        except Exception:
            named += 1
    assert wrong and named


def test_a_checkpoint_of_before_checksums_is_still_loaded(saved):
    (saved / WHOLE).write_text("")
    assert state_of(saved.parent)[0] == 4


def test_what_a_kill_left_of_checkpoints_is_removed_by_the_next_one(saved):
    torn, half_deleted = saved.parent / "CKPT+torn", saved.parent / "CKPT+half"
    for folder in (torn, half_deleted):
        folder.mkdir()
    (torn / "CKPT.yaml").write_text("end-of-ep")
    (half_deleted / WHOLE).write_text('{"network.ckpt": 1}')
    assert state_of(saved.parent)[0] == 4
    training(saved.parent, 5.0).save_and_keep_only(meta={"epoch": 5})
    assert len(list(saved.parent.glob("CKPT*"))) == 1 and state_of(saved.parent)[0] == 5


# Recognisers, adapters and manifests.


@pytest.fixture
def recogniser(tmp_path):
    torch.manual_seed(0)
    sizes = {"input_size": 4, "n_classes": 2, "hidden_size": 8}
    network = EmotionClassifier(**sizes)
    about = {"labels": list(LABELS), "features": {"encoder": "toy", "dim": 4}, "classifier": sizes}
    RECOGNIZER.write(tmp_path / "r", network.state_dict(), "labels: [angry, sad]\n", about)
    return tmp_path / "r"


def weights_of(network):
    return {name: value.tolist() for name, value in network.state_dict().items()}


def load_recogniser(folder):
    return weights_of(load_classifier(folder, LABELS, {"encoder": "toy", "dim": 4}))


def test_an_exported_recogniser_that_is_cut_is_named(recogniser):
    for name in ("classifier.safetensors", "about.json"):
        path = recogniser / name
        read = lambda: load_recogniser(recogniser)  # noqa: E731
        assert silently_wrong(path, cuts(path.read_bytes()), read, RecogniserError) == []


def test_an_adapter_that_is_cut_is_named(tmp_path):
    features = {"dim": 8, "layer": 2}
    export_adapter(tmp_path, WAPTransformer(8, n_heads=2), features, {"seed": 1})
    for name in ("adapter.safetensors", "about.json"):
        path = tmp_path / name
        read = lambda: weights_of(load_adapter(tmp_path, features))  # noqa: E731
        assert silently_wrong(path, cuts(path.read_bytes()), read, AdapterError) == []


@pytest.fixture
def prepared(tmp_path):
    listed = []
    for number in range(6):
        path = tmp_path / f"{number}.wav"
        soundfile.write(path, np.full(1600, number / 10), 16000)
        listed.append(Utterance(f"t-{number}", path, LABELS[number % 2], str(number // 2)))
    toy = Corpus("toy", "toy", "*.wav", ("0", "1", "2"), lambda folder: listed)
    toy.prepare_in(tmp_path, tmp_path / "m", {"train": 0.67, "test": 0.33})
    return tmp_path / "m"


def test_a_manifest_that_is_cut_is_named(prepared):
    for name in ("train.json", "corpus.json"):
        path = prepared / name
        read = lambda: read_manifest(prepared / "train.json")  # noqa: E731
        assert silently_wrong(path, cuts(path.read_bytes()), read, CorpusError) == []


# A full disk.

ROOM = 64 << 10


@contextlib.contextmanager
def file_limit(folder):
    """No file may grow beyond a limit; gives what takes the limit away."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, before[1]))
    lift = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)  # noqa: E731
    try:
        yield folder, lift
    finally:
        lift()


@contextlib.contextmanager
def small_disk(folder):
    """Mount a file system with little room left; gives what makes room."""
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("no file system can be mounted here")
    try:
        filler = folder / "filler"
        filler.write_bytes(bytes((2 << 20) - ROOM))
        yield folder, filler.unlink
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(params=[file_limit, small_disk])
def full(request, tmp_path):
    with request.param(tmp_path) as found:
        yield found


def long_frames(number):
    return np.random.default_rng(number).normal(size=(2, 40, 16)).astype(np.float16)


def test_a_feature_store_on_a_full_disk_says_so_keeps_what_it_has_and_is_completed_later(full):
    folder, make_room = full
    store = FeatureStore(folder / "s", FINGERPRINT)
    with pytest.raises(StoreError, match=r"cannot be written .*Free some space"), store.writer(2) as add:
        for number in range(30):
            add(f"u{number}", long_frames(number), audio=f"{number:064x}", file=(1, 1))
    kept = FeatureStore(folder / "s", FINGERPRINT)
    assert 0 < len(kept.rows) < 30 and kept.verify() == [] and kept.rows == store.rows
    make_room()
    with kept.writer() as add:
        for number in range(len(kept.rows), 30):
            add(f"u{number}", long_frames(number), audio=f"{number:064x}", file=(1, 1))
    whole = FeatureStore(folder / "s", FINGERPRINT)
    assert all(np.array_equal(whole.frames(f"u{number}"), long_frames(number)) for number in range(30))
    assert (folder / "s" / "frames.f16").stat().st_size == 30 * 2 * 40 * 16 * 2


def test_a_checkpoint_on_a_full_disk_says_so_and_leaves_the_one_before(full):
    folder, make_room = full
    training(folder / "save", 4.0).save_and_keep_only(meta={"epoch": 4})
    large = training(folder / "save", 5.0)
    large.add_recoverable("large", torch.nn.Linear(128, 256))
    with pytest.raises(CheckpointError, match=r"save: no checkpoint can be written .*full or read-only\? Run again"):
        large.save_and_keep_only(meta={"epoch": 5})
    assert len(list((folder / "save").iterdir())) == 1 and state_of(folder / "save")[0] == 4
    make_room()
    large.save_and_keep_only(meta={"epoch": 5})
    assert state_of(folder / "save")[0] == 5


def test_a_file_that_does_not_fit_leaves_the_old_one_and_no_part_of_the_new(full):
    folder, make_room = full
    atomic_write(folder / "manifest.json", "{}")
    with pytest.raises(OSError):
        atomic_write(folder / "manifest.json", "x" * 4 * ROOM)
    assert (folder / "manifest.json").read_text() == "{}"
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    make_room()
    atomic_write(folder / "manifest.json", "x" * 4 * ROOM)
    assert len((folder / "manifest.json").read_text()) == 4 * ROOM


def test_a_label_store_on_a_full_disk_says_so_and_is_completed_later(full):
    folder, make_room = full
    path = folder / "labels.sqlite"
    with (
        pytest.raises(LabelStoreError, match=r"labels.sqlite: .*(full|I/O|disk).*\. "),
        LabelStore(path) as store,
    ):
        for number, audio in enumerate(AUDIO):
            store.put_many(QUERY, [Record(audio, k, "u", long_answer(number, k)) for k in range(3)])
    make_room()
    with LabelStore(path) as store:
        missing = [(n, k) for n in range(12) for k in range(3) if (AUDIO[n], k) not in store.have(QUERY)]
        assert missing
        for number, k in missing:
            store.put_many(QUERY, [Record(AUDIO[number], k, "u", long_answer(number, k))])
        assert check(store).problems == []
        assert store.load(QUERY, AUDIO, 3).mask.all()


def long_answer(number, k):
    given = answer(number, k)
    return Response(given.answer, json.dumps({"text": "sad " * 1000}))


# A read-only folder.


def test_a_read_only_feature_store_is_read_and_writing_or_damage_are_named(stored, read_only):
    flip(stored / "frames.f16", 2 * FeatureStore(stored, FINGERPRINT).rows["u3"].offset)
    read_only(stored)
    store = FeatureStore(stored, FINGERPRINT)
    assert np.array_equal(store.frames("u1"), frames(1))
    with pytest.raises(StoreError, match=r"u3.*Delete"):
        store.frames("u3")
    with pytest.raises(StoreError, match=r"cannot be written \(.*[Rr]ead-only|Permission"), store.writer() as add:
        add("u9", frames(9), audio="ab", file=(1, 1))


def test_training_into_a_read_only_folder_is_one_clear_error_before_anything_is_computed(tmp_path, read_only):
    (tmp_path / "save").mkdir()
    read_only(tmp_path)
    with pytest.raises(WriteError, match=r"settings.json: cannot be written .*--output_folder"):
        same_settings(tmp_path / "settings.json", {"seed": 1})
    with pytest.raises(WriteError, match=r"cannot be written .*--output_folder"), training_lock(tmp_path / "save"):
        pass
    with pytest.raises(StoreError, match="cannot be written"):
        FeatureStore(tmp_path / "s", FINGERPRINT)
    with pytest.raises(LabelStoreError, match=r"labels\.sqlite"):
        LabelStore(tmp_path / "labels.sqlite")


REFUSALS = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO, errno.ESTALE]


@pytest.mark.parametrize("number", REFUSALS)
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_whatever_a_disk_says_is_one_line_with_a_remedy_and_the_old_file_stays(
    tmp_path, monkeypatch, capsys, number, function
):
    path = tmp_path / "results.json"
    atomic_write(path, "old")
    monkeypatch.setattr(os, function, lambda *_: (_ for _ in ()).throw(OSError(number, os.strerror(number))))
    with pytest.raises(SystemExit) as stopped, one_clear_error():
        atomic_write(path, "new")
    monkeypatch.undo()
    assert stopped.value.code == 2 and path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    remedy = r"(Free some space|Change its permissions|Check the disk), or choose another folder .*--output_folder"
    said = rf"error: {path}: cannot be written \({re.escape(os.strerror(number))}\)\. {remedy}.* same command again.*\n"
    assert re.fullmatch(said, capsys.readouterr().err)


@pytest.mark.parametrize("number", [*REFUSALS, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP])
def test_an_error_of_a_disk_that_nothing_else_has_named_is_one_line_too(tmp_path, capsys, number):
    with pytest.raises(SystemExit) as stopped, one_clear_error():
        raise OSError(number, os.strerror(number), str(tmp_path / "lock"))
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path / 'lock'}: cannot be read or written (") and said.count("\n") == 1


def test_an_error_that_is_none_of_a_disk_is_not_hidden():
    with pytest.raises(ConnectionRefusedError), one_clear_error():
        raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")
    with pytest.raises(FileNotFoundError), one_clear_error():
        Path("/no/such/file").read_text()


def test_the_log_of_a_training_on_a_full_disk_is_one_error_that_names_it(full):
    folder, make_room = full
    log = TrainLog(folder / "train_log.txt")
    with pytest.raises(WriteError, match=r"(train_log\.txt|events\.out\..*): cannot be written .*Free some space"):
        for epoch in range(3000):
            log.log_stats({"epoch": epoch}, train_stats={f"loss_{name}": 1.0 for name in range(50)}, verbose=False)
    make_room()
    TrainLog(folder / "train_log.txt").log_stats({"epoch": epoch}, train_stats={"loss": 1.0}, verbose=False)


@pytest.mark.parametrize("said", ["database or disk is full", "attempt to write a readonly database", "disk I/O error"])
def test_a_cache_of_hashes_that_cannot_be_opened_now_is_kept(tmp_path, monkeypatch, said):
    wav = tmp_path / "a.wav"
    wav.touch()
    os.utime(wav, (1, 1))
    with HashCache(tmp_path / "hashes.sqlite") as cache:
        cache.put(wav, file_stamp(wav), Known("ab" * 32, 1.0))
    with monkeypatch.context() as patch:
        patch.setattr(HashCache, "_opened", lambda _: (_ for _ in ()).throw(sqlite3.OperationalError(said)))
        with HashCache(tmp_path / "hashes.sqlite") as cache:
            assert cache.get(wav) is None
    with HashCache(tmp_path / "hashes.sqlite") as cache:
        assert cache.get(wav) == Known("ab" * 32, 1.0)


def test_tables_pages_and_cards_in_a_read_only_folder_are_one_error_that_names_the_file(tmp_path, read_only):
    read_only(tmp_path)
    writers = {
        "t.csv": lambda path: write_csv(path, []),
        "results.md": lambda path: atomic_write(path, "text"),
        "a.png": lambda path: plot_confusion(path, torch.ones(2, 3, dtype=torch.int64), LABELS, "toy"),
        "classifier.safetensors": lambda path: RECOGNIZER.write(path.parent, b"", "", {}),
        "adapter.safetensors": lambda path: export_adapter(path.parent, WAPTransformer(8, n_heads=2), {"layer": 1}, {}),
    }
    for name, write in writers.items():
        with pytest.raises(WriteError, match=rf"{name}: cannot be written \(.*\)\. Change its permissions, or choose"):
            write(tmp_path / name)


# A clock that goes backwards.


def set_clock(monkeypatch, seconds):
    monkeypatch.setattr(time, "time", lambda: seconds)


def test_after_the_clock_went_back_the_last_checkpoint_is_kept_and_loaded(tmp_path, monkeypatch):
    for number, seconds in enumerate((2e9, 1e9, 1.5e9, 1e9), start=1):
        set_clock(monkeypatch, seconds)
        training(tmp_path, float(number)).save_and_keep_only(meta={"epoch": number})
        assert state_of(tmp_path)[0] == number
        assert len(list(tmp_path.glob("CKPT*"))) == 1


def test_after_the_clock_went_back_a_kill_between_saving_and_deleting_goes_on_from_the_last(tmp_path, monkeypatch):
    set_clock(monkeypatch, 2e9)
    training(tmp_path, 1.0).save_checkpoint()
    set_clock(monkeypatch, 1e9)
    training(tmp_path, 2.0).save_checkpoint()
    assert len(list(tmp_path.glob("CKPT*"))) == 2 and state_of(tmp_path)[0] == 2


def test_a_recording_that_seems_to_come_from_the_future_is_read_again(tmp_path, monkeypatch):
    path = tmp_path / "a.wav"
    path.write_bytes(b"wave")
    set_clock(monkeypatch, path.stat().st_mtime - 3600)
    with HashCache(tmp_path / "hashes.sqlite") as cache:
        cache.put(path, file_stamp(path), Known("ab" * 32, 1.0))
        assert cache.get(path) is None


def test_the_pace_of_requests_and_what_a_server_asks_for_do_not_follow_a_clock_that_goes_back(monkeypatch):
    set_clock(monkeypatch, 1e9)
    pace, start = Pace(requests_per_minute=6000), time.monotonic()

    async def three():
        for _ in range(3):
            set_clock(monkeypatch, time.time() - 3600)
            await pace.admit(tokens=1)

    asyncio.run(three())
    assert time.monotonic() - start < 60
    assert retry_after({"retry-after": "Thu, 01 Jan 1970 00:01:00 GMT"}, now=lambda: 3600.0) == 0.0


@pytest.mark.parametrize(
    "date", ["Thu, 01 Jan {} 00:00:00 GMT", "Thu, 01 Jan 1970 {}:00:00 GMT", "Thu, 01 Jan 1970 00:00:00 +{}"]
)
def test_a_date_beyond_every_calendar_asks_for_no_wait(date):
    assert retry_after({"retry-after": date.format("9" * 20)}) is None


# Two runs in one folder.


def test_a_second_run_in_a_folder_waits_for_the_first_and_says_so(tmp_path, caplog):
    entered = []

    def second():
        with training_lock(tmp_path / "save"):
            entered.append(True)

    other = threading.Thread(target=second)
    with caplog.at_level("INFO"), training_lock(tmp_path / "save"):
        other.start()
        other.join(0.3)
        assert not entered and "another run trains there" in caplog.text
    other.join(10)
    assert entered


def test_two_extractions_into_one_store_make_it_once(tmp_path, prepared):
    calls = []

    class Reader:
        encoder = SimpleNamespace(sample_rate=16000)

        def fingerprint(self):
            return {"layers": [1], "dim": 4}

        def encode(self, wave):
            calls.append(1)
            time.sleep(0.02)
            return wave[:400].view(1, 100, 4)

    manifests = [prepared / "train.json", prepared / "test.json"]
    runs = [threading.Thread(target=extract, args=(manifests, Reader(), tmp_path / "s")) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert len(calls) == 6 and FeatureStore(tmp_path / "s", Reader().fingerprint()).verify() == []


# Stopped --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ignored", [False, True])
def test_work_that_resumes_is_ended_by_sigterm_in_one_line_and_keeps_what_has_arrived(capsys, ignored):
    kept = []

    async def work():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(60)
        finally:
            kept.append("an answer")

    # A shell lets programs in the background ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
    term = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stopped, stopped_by_ctrl_c():
            asyncio.run(work())
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.code == 130 and kept == ["an answer"] and signal.getsignal(signal.SIGTERM) is term
    assert capsys.readouterr().err == "stopped; the same command goes on\n"
