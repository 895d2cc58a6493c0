"""The commands `labels` and `batch`, as a user types them."""

import sqlite3
import sys
from pathlib import Path

import pytest
from lalm_support import LABELS, completion
from test_lalm_store import QUERY, REFUSAL, audio, record, sample

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from batch_server import simulated_batch_server

from speechbrain_mifuse.cli import main
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
