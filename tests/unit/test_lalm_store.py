import dataclasses
import hashlib
import os
import re
import signal
import sqlite3
import subprocess
import sys

import pytest
import torch

from speechbrain_mifuse.lalm.answer import KINDS, Answer, Response
from speechbrain_mifuse.lalm.integrity import check
from speechbrain_mifuse.lalm.profile import Tokens
from speechbrain_mifuse.lalm.store import LabelStore, Query, Record, StoreError
from speechbrain_mifuse.utils.errors import UserError

LABELS = ("angry", "happy", "neutral", "sad")
QUERY = Query("0" * 64, LABELS, "m", "http://127.0.0.1:1/v1", {"temperature": 1.0, "seed": 0})
REFUSAL = Answer("refusal", reason="no")


def audio(i):
    return hashlib.sha256(str(i).encode()).hexdigest()


def sample(*probs, kind="distribution"):
    return Answer(kind, probs)


def record(i, k, answer, **fields):
    return Record(audio(i), k, f"u{i}", Response(answer, "{}", **fields))


@pytest.fixture
def store(tmp_path):
    with LabelStore(tmp_path / "labels.sqlite") as store:
        yield store


def test_samples_come_back_exactly_in_the_order_and_multiplicity_asked(store):
    first, second = sample(0.1, 0.2, 0.3, 0.4), sample(0.0, 0.0, 1.0, 0.0, kind="label")
    store.put_many(QUERY, [record(1, 0, first), record(2, 1, second), record(2, 5, first)])
    probs, mask, kinds = store.load(QUERY, [audio(2), audio(9), audio(1), audio(2)], 3)
    assert probs.shape == (4, 3, 4) and probs.dtype == torch.float32
    assert mask.tolist() == [[False, True, False], [False] * 3, [True, False, False], [False, True, False]]
    assert torch.equal(probs[2, 0], torch.tensor(first.probs))
    assert torch.equal(probs[0], probs[3]) and torch.equal(probs[0, 1], torch.tensor(second.probs))
    assert KINDS[kinds[0, 1]] == "label" and kinds[1].tolist() == [-1, -1, -1]
    assert not probs[~mask].any()


def test_nothing_asked_or_nothing_stored_gives_empty_masks(store):
    assert not store.load(QUERY, [audio(1)], 2).mask.any()
    assert store.load(QUERY, [], 2).probs.shape == (0, 2, 4)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_hash": "1" * 64},
        {"labels": LABELS[::-1]},
        {"model": "n"},
        {"base_url": "http://127.0.0.1:1/v2", "endpoint": None},
        {"endpoint": "local:abc"},
        {"sampling": {"temperature": 0.5, "seed": 0}},
        {"sampling": {"temperature": 1.0, "seed": 1}},
        {"sampling": {"temperature": 1.0, "seed": 0, "top_p": 0.9}},
    ],
)
def test_every_part_of_the_query_separates_answers(store, change):
    store.put_many(QUERY, [record(1, 0, sample(1, 0, 0, 0))])
    other = dataclasses.replace(QUERY, **change)
    assert other != QUERY
    assert store.have(other) == set()
    assert not store.load(other, [audio(1)], 1).mask.any()


def test_named_endpoint_makes_the_port_irrelevant(store):
    first = dataclasses.replace(QUERY, base_url="http://127.0.0.1:1111/v1", endpoint="local:abc")
    second = dataclasses.replace(QUERY, base_url="http://127.0.0.1:2222/v1", endpoint="local:abc")
    store.put_many(first, [record(1, 0, sample(1, 0, 0, 0))])
    assert first == second and store.have(second) == {(audio(1), 0)}


def test_spelling_of_url_and_numbers_does_not_split_a_query():
    other = dataclasses.replace(QUERY, base_url="http://127.0.0.1:1/v1/", sampling={"seed": 0, "temperature": 1})
    assert (other.endpoint, other.sampling_json) == (QUERY.endpoint, QUERY.sampling_json)


def test_refused_answer_is_kept_counted_and_never_a_sample(store):
    store.put_many(QUERY, [record(1, 0, REFUSAL)])
    store.put_many(QUERY, [record(1, 0, Answer("invalid", reason="prose"))])
    assert store.have(QUERY) == set()
    assert store.rejected(QUERY) == {(audio(1), 0): 2}
    loaded = store.load(QUERY, [audio(1)], 1)
    assert not loaded.mask.any() and not loaded.probs.any()
    assert KINDS[loaded.kinds[0, 0]] == "invalid"
    store.put_many(QUERY, [record(1, 0, sample(0, 1, 0, 0))])
    assert store.have(QUERY) == {(audio(1), 0)} and store.rejected(QUERY) == {}
    assert store.counts(QUERY)["distribution"] == 1


def test_stored_sample_is_never_overwritten(store):
    store.put_many(QUERY, [record(1, 0, sample(1, 0, 0, 0))])
    store.put_many(QUERY, [record(1, 0, sample(0, 1, 0, 0)), record(1, 0, REFUSAL)])
    assert store.load(QUERY, [audio(1)], 1).probs[0, 0].tolist() == [1, 0, 0, 0]


def test_bad_record_leaves_the_whole_transaction_out(store):
    with pytest.raises(StoreError, match=r"u2.*3 probabilities for 4 labels"):
        store.put_many(QUERY, [record(1, 0, sample(1, 0, 0, 0)), record(2, 0, sample(1, 0, 0))])
    assert store.have(QUERY) == set()
    store.put_many(QUERY, [record(1, 0, sample(1, 0, 0, 0))])
    assert len(store.have(QUERY)) == 1


def test_provenance_is_stored(store, tmp_path):
    fields = {"seed": 7, "usage": {"prompt_tokens": 9}, "served_model": "m-1", "system_fingerprint": "fp"}
    store.put_many(QUERY, [record(1, 0, sample(1, 0, 0, 0), **fields)])
    rows = sqlite3.connect(tmp_path / "labels.sqlite").execute(
        "SELECT utt_id, seed, json_extract(usage, '$.prompt_tokens'), served_model, system_fingerprint, raw "
        "FROM answers"
    )
    assert rows.fetchall() == [("u1", 7, 9, "m-1", "fp", "{}")]


def test_other_schema_version_is_refused(tmp_path):
    path = tmp_path / "labels.sqlite"
    LabelStore(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreError, match=r"labels.sqlite.*schema version 1 \(found 99\)"):
        LabelStore(path)


def test_foreign_file_is_refused_and_left_alone(tmp_path):
    text, database = tmp_path / "notes.txt", tmp_path / "other.sqlite"
    text.write_text("not a database, but long enough to look at " * 50)
    with sqlite3.connect(database) as db:
        db.execute("CREATE TABLE mine (x)")
    for path in (text, database):
        before = path.read_bytes()
        with pytest.raises(StoreError, match=path.name):
            LabelStore(path)
        assert path.read_bytes() == before
    with pytest.raises(StoreError, match="folder exists"):
        LabelStore(tmp_path / "missing" / "labels.sqlite")


def test_file_is_in_wal_mode_and_synchronised_on_every_commit(store):
    assert store._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert store._db.execute("PRAGMA synchronous").fetchone() == (2,)


def test_two_stores_on_one_file_see_each_other(tmp_path):
    path = tmp_path / "labels.sqlite"
    with LabelStore(path) as one, LabelStore(path) as two:
        one.put_many(QUERY, [record(1, 0, sample(1, 0, 0, 0))])
        two.put_many(QUERY, [record(1, 1, sample(0, 1, 0, 0))])
        assert one.have(QUERY) == two.have(QUERY) == {(audio(1), 0), (audio(1), 1)}


@pytest.mark.parametrize(
    "url", ["http://user:hunter2@h/v1", "http://h/v1?api_key=hunter2", "ftp://h", "hunter2", "http://h:port/v1"]
)
def test_url_that_could_hide_a_secret_is_refused_without_repeating_it(url):
    with pytest.raises(UserError, match="--lalm_base_url") as caught:
        dataclasses.replace(QUERY, base_url=url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_sampling_parameter_that_is_no_json_value_is_refused(value):
    with pytest.raises(UserError, match="top_p"):
        dataclasses.replace(QUERY, sampling={"top_p": value})


WRITER = """
import sys
sys.path.insert(0, {folder!r})
from test_lalm_store import QUERY, LabelStore, record, sample
with LabelStore({path!r}) as store:
    for i in range(100000):
        store.put_many(QUERY, [record(i, k, sample(0.5, 0.5, 0, 0)) for k in range(5)])
        print(i, flush=True)
"""


def test_killed_writer_leaves_a_readable_store_with_every_reported_row(tmp_path):
    path = tmp_path / "labels.sqlite"
    code = WRITER.format(path=str(path), folder=os.path.dirname(__file__))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    done = -1
    while done < 20:
        done = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read().split("\n")[:-1]
    process.wait()
    done = max([done, *map(int, rest)])
    with LabelStore(path) as store:
        assert store._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        mask = store.load(QUERY, [audio(i) for i in range(done + 2)], 5).mask
        assert mask[: done + 1].all()
        assert mask[done + 1].all() or not mask[done + 1].any()
        store.put_many(QUERY, [record(10**6, 0, sample(1, 0, 0, 0))])


def test_many_rows_load_across_blocks(tmp_path):
    count = 20000
    with LabelStore(tmp_path / "labels.sqlite") as store:
        answer = sample(0.5, 0.25, 0.25, 0)
        store.put_many(QUERY, [record(i, k, answer) for i in range(count) for k in range(2)])
        store.put_many(QUERY, [record(count, 0, REFUSAL), record(count, 1, sample(0, 0, 0, 1))])
        hashes = [audio(i) for i in range(count + 1)]
        loaded = store.load(QUERY, hashes, 2)
        assert loaded.mask[:count].all() and loaded.mask[count].tolist() == [False, True]
        assert loaded.probs[count, 1].tolist() == [0, 0, 0, 1]
        assert torch.equal(loaded.probs[:count], torch.tensor(answer.probs).expand(count, 2, 4))


def test_queries_are_listed_with_counts_refusals_attempts_and_tokens(store):
    usage = {"prompt_tokens": 50, "prompt_tokens_details": {"audio_tokens": 40}, "completion_tokens": 7}
    other = dataclasses.replace(QUERY, model="n", prompt="Which?")
    store.put_many(QUERY, [record(1, 0, sample(1, 0, 0, 0), usage=usage), record(1, 2, REFUSAL, usage=usage)])
    store.put_many(QUERY, [record(1, 2, REFUSAL, usage=usage), record(2, 0, Answer("invalid", reason="?"))])
    store.put_many(other, [record(1, 0, sample(1, 0, 0, 0), usage={**usage, "batch": "b1"})])
    first, second = store.queries()
    assert (first.query, second.query, second.query.prompt) == (QUERY, other, "Which?")
    assert first.counts == {"distribution": 1, "logprobs": 0, "label": 0, "refusal": 1, "invalid": 1}
    assert (first.recordings, first.k, first.attempts) == (2, 3, 4) and first.first <= first.last
    assert (first.tokens, first.batch_tokens) == (Tokens(30, 120, 21), Tokens())
    assert (second.tokens, second.batch_tokens) == (Tokens(), Tokens(10, 40, 7))


def test_tokens_of_replaced_attempts_stay_counted_however_many_they_were(store):
    for answer in (REFUSAL, Answer("invalid", reason="?"), REFUSAL, sample(1, 0, 0, 0)):
        store.put_many(QUERY, [record(1, 0, answer, usage={"prompt_tokens": 10, "completion_tokens": 1})])
    store.put_many(QUERY, [record(1, 0, sample(0, 1, 0, 0), usage={"prompt_tokens": 1000})])
    assert store.queries()[0].tokens == Tokens(0, 40, 4)


def test_entries_come_back_whole_and_in_an_order_that_only_the_answers_decide(store, tmp_path):
    fields = {"seed": 7, "usage": {"prompt_tokens": 9}, "served_model": "m-1", "system_fingerprint": "fp"}
    records = [record(i, k, sample(0.1, 0.2, 0.3, 0.4), **fields) for i in range(5) for k in (1, 0)]
    records.append(record(7, 0, REFUSAL))
    store.put_many(QUERY, records)
    with LabelStore(tmp_path / "reversed.sqlite") as other:
        for item in reversed(records):
            other.put_many(QUERY, [item])
        there = [entry._replace(created=0) for entry in other.entries(QUERY)]
    here = [entry._replace(created=0) for entry in store.entries(QUERY)]
    assert here == there and len(here) == 11
    (refused,) = [entry for entry in here if not entry.is_sample]
    assert (refused.audio, refused.kind, refused.reason, refused.probs) == (audio(7), "refusal", "no", None)
    one = next(entry for entry in here if (entry.audio, entry.k) == (audio(3), 1))
    assert (one.utt_id, one.seed, one.usage, one.served_model) == ("u3", 7, {"prompt_tokens": 9}, "m-1")
    assert one.probs == tuple(torch.tensor([0.1, 0.2, 0.3, 0.4]).tolist())


def test_a_store_that_must_exist_is_not_made(tmp_path):
    with pytest.raises(StoreError, match=r"nothing.sqlite: no such file"):
        LabelStore.existing(tmp_path / "nothing.sqlite")
    assert not list(tmp_path.iterdir())


def test_a_sound_store_passes_its_check_and_gaps_are_a_note(store):
    store.put_many(QUERY, [record(1, 0, sample(0.1, 0.2, 0.3, 0.4)), record(1, 1, REFUSAL)])
    assert check(store).summary() == "sound"
    store.put_many(QUERY, [record(1, 4, sample(1, 0, 0, 0)), record(2, 1, sample(1, 0, 0, 0))])
    found = check(store)
    assert found.problems == [] and found.notes == ["query 1: 2 recordings lack 3 samples below their greatest index"]


DAMAGE = {
    "UPDATE answers SET kind = 'guess' WHERE k = 1": r"sample 1: is of no known kind",
    "UPDATE answers SET kind = 'refusal' WHERE k = 1": r"sample 1: is a sample by its status and none by its kind",
    "UPDATE answers SET probs = NULL WHERE k = 1": r"sample 1: is a sample without probabilities",
    "UPDATE answers SET probs = x'0000803F' WHERE k = 2": r"sample 2: is rejected and has probabilities",
    "UPDATE answers SET probs = x'0000803F' WHERE k = 1": r"sample 1: has not 4 probabilities$",
    "UPDATE answers SET probs = x'0000803F0000803F0000000000000000' WHERE k < 2": r"sample 0: .* 1 \(and 1 more\)",
    "UPDATE answers SET probs = x'00000040000080BF0000000000000000' WHERE k = 1": r"sample 1: .* negative",
    "UPDATE answers SET probs = x'0000C07F0000803F0000000000000000' WHERE k = 1": r"sample 1: .* not finite",
    "UPDATE answers SET k = -1 WHERE k = 1": r"sample -1: has a sample index that is not from 0 to 9999",
    "UPDATE answers SET created = 1e300 WHERE k = 1": r"sample 1: has a time that is none",
    "UPDATE answers SET raw = x'7B7D' WHERE k = 1": r"sample 1: holds other things than text",
    "UPDATE answers SET attempts = 0 WHERE k = 1": r"sample 1: was stored without an attempt",
    "UPDATE answers SET label_mass = 1.5 WHERE k = 1": r"sample 1: has a label mass outside",
    "UPDATE answers SET raw = 'cut o' WHERE k = 1": r"sample 1: has a reply or usage that is no JSON",
    "UPDATE answers SET query_id = 9": r"query 9, recording \w{64}, sample 0: belongs to a query that does not",
    "DELETE FROM audio": r"recording number 1, sample 0: belongs to a recording that does not exist \(and 2 more\)",
    "UPDATE audio SET sha256 = x'AB'": r"recording ab, sample 0: .* is no SHA-256",
    'UPDATE queries SET labels = \'["angry","sad"]\'': r"query 1: labels or sampling are not in their canonical form",
    "UPDATE queries SET sampling = 'hot'": r"query 1: cannot be read",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_check_names_what_is_wrong_and_where(store, damage):
    good = sample(0.1, 0.2, 0.3, 0.4)
    store.put_many(QUERY, [record(1, 0, good), record(1, 1, good), record(1, 2, REFUSAL)])
    store._db.execute("PRAGMA foreign_keys = OFF")
    store._db.execute(damage)
    assert any(re.search(DAMAGE[damage], problem) for problem in check(store).problems), check(store)


def test_check_reports_damaged_pages(tmp_path):
    path = tmp_path / "labels.sqlite"
    with LabelStore(path) as store:
        store.put_many(QUERY, [record(i, 0, sample(1, 0, 0, 0)) for i in range(500)])
    content = bytearray(path.read_bytes())
    content[-8192:] = b"\xff" * 8192
    path.write_bytes(content)
    with LabelStore(path) as store:
        problems = check(store).problems
    assert problems and any(word in problems[0].lower() for word in ("sqlite", "malformed"))
