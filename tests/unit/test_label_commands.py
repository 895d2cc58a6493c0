"""The commands `labels` and `batch`, as a user types them."""

import contextlib
import json
import re
import shutil
import sqlite3
import sys
import threading
from pathlib import Path

import pytest
from lalm_support import LABELS, completion
from test_lalm_store import QUERY, REFUSAL, audio, record, sample

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from batch_server import simulated_batch_server

from speechbrain_mifuse.cli.main import main
from speechbrain_mifuse.lalm.store import LabelStore

ROOT = Path(__file__).resolve().parents[2]
KEY = "sk-planted-0123456789"


@pytest.fixture
def store(tmp_path):
    path = tmp_path / "labels.sqlite"
    with LabelStore(path) as store:
        usage = {"prompt_tokens": 1200, "completion_tokens": 30}
        store.put_many(QUERY, [record(1, 0, sample(1, 0, 0, 0), usage=usage), record(1, 1, REFUSAL)])
    return str(path)


def status_of(*arguments):
    """Exit status of a command; 0 when it returns."""
    try:
        main(list(arguments))
    except SystemExit as stopped:
        return stopped.code
    return 0


def test_show_lists_what_was_asked_and_what_came_back(store, capsys):
    main(["labels", "show", store])
    shown = capsys.readouterr().out
    assert f"query {QUERY.digest[:8]}: m at http://127.0.0.1:1/v1" in shown
    assert "1 distribution, 1 refusal, 50.0 % refused; 2 answers received" in shown
    assert "1,200 audio, 30 output" in shown


def test_check_ends_with_status_1_for_a_store_that_is_not_sound(store, capsys):
    assert status_of("labels", "check", store) == 0 and capsys.readouterr().out == "sound\n"
    with sqlite3.connect(store) as db:
        db.execute("UPDATE answers SET kind = 'guess' WHERE k = 1")
    assert status_of("labels", "check", store) == 1
    assert "sample 1: is of no known kind" in capsys.readouterr().out


def test_export_and_import_carry_a_store_to_another_place(store, tmp_path, capsys):
    file, other = str(tmp_path / "labels.jsonl.gz"), str(tmp_path / "other.sqlite")
    main(["labels", "export", store, file, "--no_ids"])
    assert status_of("labels", "import", file, "--into", other) == 0
    assert "2 answers written" in (shown := capsys.readouterr().out) and "2 answers stored, 0 were there" in shown
    with LabelStore(other) as there:
        assert there.have(QUERY) == {(audio(1), 0)}
        there.put_many(QUERY, [record(2, 0, sample(0, 0, 0, 1))])
    main(["labels", "merge", store, other, "--into", str(tmp_path / "all.sqlite")])
    with LabelStore(tmp_path / "all.sqlite") as merged:
        assert merged.have(QUERY) == {(audio(1), 0), (audio(2), 0)}


def test_a_conflict_ends_with_status_1_and_keeps_what_was_there(store, tmp_path, capsys):
    with LabelStore(tmp_path / "other.sqlite") as other:
        other.put_many(QUERY, [record(1, 0, sample(0, 1, 0, 0))])
    file = str(tmp_path / "labels.jsonl")
    main(["labels", "export", store, file])
    assert status_of("labels", "import", file, "--into", str(tmp_path / "other.sqlite")) == 1
    assert status_of("labels", "merge", store, "--into", str(tmp_path / "other.sqlite")) == 1
    assert capsys.readouterr().out.count("another sample") == 2


@pytest.mark.parametrize("what", ["show", "check", "export"])
def test_a_store_that_does_not_exist_is_one_clear_error_and_is_not_made(tmp_path, capsys, what):
    arguments = [str(tmp_path / "nowhere.sqlite"), *([str(tmp_path / "x.jsonl")] if what == "export" else [])]
    assert status_of("labels", what, *arguments) == 2
    assert "nowhere.sqlite: no such file" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.fixture
def flags(toy_folder, tmp_path, monkeypatch):
    """Flags of a recipe whose teacher is asked two samples of each utterance."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    given = {"data_folder": toy_folder, "output_folder": tmp_path / "out", "lalm_model": "m", "lalm_samples": 2}
    return [str(ROOT / "hparams" / "nemo2rav.yaml"), *(f"--{key}={value}" for key, value in given.items())]


def answer(body):
    return 200, completion(*['{"angry": 0.5, "happy": 0.5}'] * body["n"])


def test_batch_starts_by_steps_and_run_goes_on_to_the_end(flags, tmp_path, capsys):
    with simulated_batch_server(answer) as server:
        flags = [*flags, f"--lalm_base_url={server.url}"]
        main(["batch", "submit", *flags])
        assert "nothing is made yet" in capsys.readouterr().out
        main(["batch", "make", *flags])
        main(["batch", "run", *flags, "--every", "0"])
        shown = capsys.readouterr().out
        assert len(server.batches) == 1 and server.keys == {f"Bearer {KEY}"}
    asked = len(server.executed)
    assert asked > 5 and f"{asked} requests made" in shown and "part 0001" in shown
    assert f"{2 * asked} samples stored of {2 * asked} answers" in shown
    with LabelStore.existing(tmp_path / "out" / "labels.sqlite") as store:
        (found,) = store.queries()
        assert found.query.labels == LABELS and found.counts["distribution"] == 2 * asked
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path


def test_batch_needs_a_provider_and_a_file(flags, capsys):
    assert status_of("batch", "run", *flags) == 2
    assert "has no Batch API" in capsys.readouterr().err
    assert status_of("batch", "run", "none.yaml") == 2
    assert "none.yaml: no such file" in capsys.readouterr().err


READING = {
    "show": [],
    "check": [],
    "export": ["labels.jsonl"],
    "report": ["--manifest", "test.json", "--output", "report"],
}


@pytest.fixture
def manifest(tmp_path, monkeypatch):
    """Work in a folder with a manifest of the stored recordings, so that reports can be made."""
    monkeypatch.chdir(tmp_path)
    Path("corpus.json").write_text('{"data_root": "/toy"}')
    Path("test.json").write_text(json.dumps({"u1": {"wav": "u1.wav", "speaker": "1"}}))


@pytest.mark.parametrize("log", ["merged", "left by a killed process", "none: journal"])
@pytest.mark.parametrize("what", READING)
@pytest.mark.usefixtures("manifest")
def test_reading_commands_work_in_a_folder_that_is_read_only(tmp_path, capsys, read_only, what, log):
    folder = tmp_path / "answers"
    folder.mkdir()
    path = folder / "labels.sqlite"
    with LabelStore(path) as store:
        store.put_many(QUERY, [record(1, 0, sample(1, 0, 0, 0))])
        if log == "left by a killed process":
            killed = tmp_path / "killed"
            shutil.copytree(folder, killed)
    if log == "left by a killed process":
        shutil.rmtree(folder)
        shutil.copytree(killed, folder)
        assert (folder / "labels.sqlite-wal").stat().st_size
    if log == "none: journal":
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute("PRAGMA journal_mode = DELETE")
    before = sorted(item.name for item in folder.iterdir())
    read_only(folder)
    assert status_of("labels", what, str(path), *READING[what]) == 0
    shown = capsys.readouterr().out
    assert {"show": "1 recordings", "check": "sound", "export": "1 answers written", "report": "angry"}[what] in shown
    assert sorted(item.name for item in folder.iterdir()) == before


def test_answers_that_no_reader_can_reach_are_an_error_and_not_left_out(tmp_path, capsys, read_only):
    folder, path = tmp_path / "answers", tmp_path / "labels.sqlite"
    folder.mkdir()
    with LabelStore(path) as store:
        store.put_many(QUERY, [record(1, 0, sample(1, 0, 0, 0))])
        for ending in ("", "-wal"):
            shutil.copy(f"{path}{ending}", folder)
    read_only(folder)
    assert status_of("labels", "show", str(folder / "labels.sqlite")) == 2
    assert re.search(r"labels.sqlite-wal cannot be read.*Copy both files", capsys.readouterr().err)


def test_importing_into_a_store_that_is_read_only_is_one_clear_error(store, tmp_path, capsys, read_only):
    file = str(tmp_path / "labels.jsonl")
    main(["labels", "export", store, file])
    folder = tmp_path / "answers"
    folder.mkdir()
    shutil.copy(store, folder)
    read_only(folder)
    assert status_of("labels", "import", file, "--into", str(folder / "labels.sqlite")) == 2
    assert re.search(r"labels.sqlite: .*permissions", capsys.readouterr().err)


@pytest.mark.parametrize("what", READING)
@pytest.mark.usefixtures("manifest")
def test_reading_commands_wait_for_no_writer_and_leave_no_files(store, tmp_path, what, caplog):
    with contextlib.closing(sqlite3.connect(store, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        assert status_of("labels", what, store, *READING[what]) == 0
    assert "waiting" not in caplog.text
    assert not list(tmp_path.glob("labels.sqlite-*"))


@pytest.mark.parametrize("lock", ["BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"])
def test_a_store_that_stays_locked_is_named_with_its_lock_after_a_word_about_waiting(
    store, tmp_path, capsys, caplog, monkeypatch, lock
):
    monkeypatch.setattr("speechbrain_mifuse.lalm.store.LOCK_SECONDS", 0.5)
    monkeypatch.setattr("speechbrain_mifuse.lalm.store.SILENT_SECONDS", 0.1)
    file = str(tmp_path / "labels.jsonl")
    main(["labels", "export", store, file])
    with contextlib.closing(sqlite3.connect(store, isolation_level=None)) as writer:
        writer.execute("PRAGMA journal_mode = DELETE" if "EXCLUSIVE" in lock else "SELECT 1")
        writer.execute(lock)
        assert status_of("labels", "import", file, "--into", store) == 2
    said = capsys.readouterr().err
    assert re.search(r"label store \S*labels.sqlite: database is locked. Another process.* 0.5 s", said)
    assert "free space" not in said
    assert caplog.text.count("locked by another process, waiting up to 0.5 s") == 1


def test_a_lock_that_is_given_back_in_time_only_delays(store, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("speechbrain_mifuse.lalm.store.SILENT_SECONDS", 0.1)
    file = str(tmp_path / "labels.jsonl")
    main(["labels", "export", store, file])
    with contextlib.closing(sqlite3.connect(store, isolation_level=None, check_same_thread=False)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        threading.Timer(0.5, writer.execute, ["ROLLBACK"]).start()
        assert status_of("labels", "import", file, "--into", store) == 0
    assert "waiting" in caplog.text
