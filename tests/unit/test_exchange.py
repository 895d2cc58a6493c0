"""Answers that move between machines: what comes out is what went in, nothing wrong, doubled or secret gets along."""

import dataclasses
import gzip
import json

import pytest
import torch
from test_lalm_store import LABELS, QUERY, REFUSAL, audio, record, sample

from speechbrain_mifuse.lalm.answer import Answer, Reply, Response
from speechbrain_mifuse.lalm.exchange import export, import_file, merge
from speechbrain_mifuse.lalm.integrity import check
from speechbrain_mifuse.lalm.store import LabelStore, Record, StoreError
from speechbrain_mifuse.utils.errors import WriteError

KEY = "sk-planted-0123456789abcdef"
OTHER = dataclasses.replace(QUERY, model="n", labels=LABELS[::-1], prompt="Which of them?")
USAGE = {"prompt_tokens": 12, "prompt_tokens_details": {"audio_tokens": 9}, "completion_tokens": 3}
HASHES = [audio(i) for i in range(7)]


@pytest.fixture
def store(tmp_path):
    """Two queries; samples of all kinds with awkward numbers, a refusal, an invalid answer, a gap."""
    generator = torch.Generator().manual_seed(0)
    with LabelStore(tmp_path / "labels.sqlite") as store:
        rows = torch.rand(6, 2, 4, generator=generator).softmax(-1).tolist()
        records = [record(i, k, sample(*rows[i][k]), seed=k, usage=USAGE) for i in range(6) for k in range(2)]
        records.append(record(6, 1, Answer("logprobs", (0.0, 1.0, 0.0, 0.0), 0.3), served_model="m-1"))
        records += [record(6, 2, REFUSAL), record(6, 3, Answer("invalid", reason="cut off: é"))]
        store.put_many(QUERY, records)
        store.put_many(OTHER, [record(1, 0, sample(0.25, 0.25, 0.25, 0.25, kind="label"))])
        yield store


@pytest.fixture
def elsewhere(tmp_path):
    with LabelStore(tmp_path / "elsewhere.sqlite") as store:
        yield store


def exported(store, path, **options):
    export(store, path, show_progress=False, **options)
    return path


def imported(path, store):
    return import_file(path, store, show_progress=False)


def contents(store):
    return [(part.query, entry) for part in store.queries() for entry in store.entries(part.query)]


@pytest.mark.parametrize("name", ["labels.jsonl", "labels.jsonl.gz"])
def test_an_imported_store_trains_bit_for_bit_as_its_origin(store, elsewhere, tmp_path, name):
    taken = imported(exported(store, tmp_path / name), elsewhere)
    assert (taken.new, taken.same, taken.conflicts) == (16, 0, [])
    for query in (QUERY, OTHER):
        for here, there in zip(store.load(query, HASHES, 4), elsewhere.load(query, HASHES, 4), strict=True):
            assert torch.equal(here, there)
        assert store.have(query) == elsewhere.have(query)
        assert store.rejected(query) == elsewhere.rejected(query)
    assert contents(store) == contents(elsewhere)
    assert elsewhere.queries()[1].query.prompt == "Which of them?"
    assert check(elsewhere).problems == []


def test_one_line_per_answer_says_where_it_came_from_and_holds_no_audio(store, tmp_path):
    lines = [json.loads(line) for line in exported(store, tmp_path / "labels.jsonl").read_text().splitlines()]
    header, *answers, last = lines
    assert (header["format"], header["version"], last) == ("speechbrain-mifuse labels", 1, {"answers": 16})
    assert len(answers) == 16
    query = header["queries"][answers[0]["query"]]
    assert (query["model"], query["endpoint"], query["labels"]) == ("m", "http://127.0.0.1:1/v1", list(LABELS))
    assert query["sampling"] == {"seed": 0, "temperature": 1} and query["prompt_hash"] == "0" * 64
    first = next(line for line in answers if line["audio"] == audio(0) and line["k"] == 1)
    assert (first["kind"], first["utt_id"], first["seed"], first["usage"]) == ("distribution", "u0", 1, USAGE)
    assert first["created"] > 1e9 and len(first["probs"]) == 4
    assert not any("audio_data" in line or len(json.dumps(line)) > 2000 for line in answers)


def test_equal_stores_give_equal_files_and_the_compressed_one_holds_the_same(store, elsewhere, tmp_path):
    first = exported(store, tmp_path / "a.jsonl")
    imported(first, elsewhere)
    assert exported(elsewhere, tmp_path / "b.jsonl").read_bytes() == first.read_bytes()
    packed = exported(store, tmp_path / "c.jsonl.gz").read_bytes()
    assert gzip.decompress(packed) == first.read_bytes()
    assert exported(store, tmp_path / "d.jsonl.gz").read_bytes() == packed


def test_ids_and_queries_can_be_left_out(store, elsewhere, tmp_path):
    path = exported(store, tmp_path / "labels.jsonl", queries=[OTHER], with_ids=False)
    assert "utt_id" not in path.read_text() and len(path.read_text().splitlines()) == 3
    imported(path, elsewhere)
    assert [part.query for part in elsewhere.queries()] == [OTHER]
    assert next(elsewhere.entries(OTHER)).utt_id == ""


def test_a_second_import_changes_nothing(store, elsewhere, tmp_path):
    path = exported(store, tmp_path / "labels.jsonl")
    imported(path, elsewhere)
    before = contents(elsewhere)
    again = imported(path, elsewhere)
    assert (again.new, again.same, again.conflicts) == (0, 16, []) and contents(elsewhere) == before


def test_a_different_sample_is_reported_with_file_and_line_and_never_overwrites(store, elsewhere, tmp_path):
    elsewhere.put_many(QUERY, [record(0, 0, sample(1, 0, 0, 0))])
    path = exported(store, tmp_path / "labels.jsonl")
    taken = imported(path, elsewhere)
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if audio(0) in text and '"k": 0' in text)
    assert taken.conflicts == [f"{path}:{line}: recording {audio(0)}, sample 0: the store has another sample there"]
    assert taken.new == 15 and "1 in conflict" in taken.summary()
    assert elsewhere.load(QUERY, HASHES, 1).probs[0, 0].tolist() == [1, 0, 0, 0]


def test_a_sample_takes_the_place_of_a_refusal_and_never_the_reverse(store, elsewhere, tmp_path):
    elsewhere.put_many(QUERY, [record(0, 0, REFUSAL), record(6, 2, sample(0, 0, 0, 1))])
    taken = imported(exported(store, tmp_path / "labels.jsonl"), elsewhere)
    assert (taken.new, taken.same, taken.conflicts) == (15, 1, [])
    assert elsewhere.load(QUERY, HASHES, 3).mask[0, 0] and elsewhere.load(QUERY, HASHES, 3).mask[6, 2]


def test_an_import_leaves_a_top_up_with_only_what_is_missing(store, elsewhere, tmp_path):
    imported(exported(store, tmp_path / "labels.jsonl"), elsewhere)
    elsewhere.put_many(QUERY, [record(6, 2, REFUSAL)])
    assert elsewhere.rejected(QUERY)[(audio(6), 2)] == 2
    assert (audio(5), 1) in elsewhere.have(QUERY) and (audio(6), 0) not in elsewhere.have(QUERY)


def changed(line, **fields):
    return json.dumps({**json.loads(line), **fields})


def without(line, field):
    return json.dumps({key: value for key, value in json.loads(line).items() if key != field})


WRONG = {
    "not JSON": (5, lambda line: line[:30], r":5: not a line of JSON"),
    "a list": (5, lambda line: "[]", r":5: not a line of JSON \(not a JSON object"),
    "other sum": (4, lambda line: changed(line, probs=[0.5, 0.5, 0.5, 0]), r":4: .*do not sum to 1"),
    "negative": (4, lambda line: changed(line, probs=[1.5, -0.5, 0, 0]), r":4: .*negative"),
    "not a number": (4, lambda line: changed(line, probs=[float("nan"), 1, 0, 0]), r":4: .*NaN is no number"),
    "too few": (4, lambda line: changed(line, probs=[0.5, 0.5]), r":4: 2 probabilities for 4 labels"),
    "unknown kind": (4, lambda line: changed(line, kind="guess"), r":4: kind must be one of distribution"),
    "refusal with probabilities": (4, lambda line: changed(line, kind="refusal"), r":4: .*'refusal' with prob"),
    "sample without": (4, lambda line: without(line, "probs"), r":4: .*'distribution' without"),
    "short hash": (4, lambda line: changed(line, audio="ab"), r":4: audio must be 64 hex"),
    "negative index": (4, lambda line: changed(line, k=-1), r":4: k must be a whole number from 0"),
    "index too large": (4, lambda line: changed(line, k=2**63), r":4: k must be"),
    "index true": (4, lambda line: changed(line, k=True), r":4: k must be"),
    "no index": (4, lambda line: without(line, "k"), r":4: k missing"),
    "unknown field": (4, lambda line: changed(line, wav="UklGRg=="), r":4: unknown field 'wav'"),
    "unknown query": (4, lambda line: changed(line, query="f" * 16), r":4: query 'ffff.* not in the header"),
    "raw no JSON": (4, lambda line: changed(line, raw="{"), r":4: raw must be an object in JSON"),
    "header": (1, lambda line: changed(line, format="csv"), r":1: no export of answers"),
    "newer version": (1, lambda line: changed(line, version=2), r":1: an export of version 2"),
    "no queries": (1, lambda line: changed(line, queries=[]), r":1: the header has no queries"),
    "another model": (1, lambda line: line.replace('"model": "m"', '"model": "x"'), r":1: query \w+ was changed"),
    "a key in the address": (1, lambda line: line.replace("http://", "http://u:hunter2@", 1), r":1: query \w+"),
    "end too early": (4, lambda line: '{"answers": 2}', r":5: follows the last line"),
    "other count": (18, lambda line: '{"answers": 20}', r":18: 16 answers .* says 20"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_line_is_named_and_nothing_of_the_file_is_taken(store, elsewhere, tmp_path, name):
    number, wrong, message = WRONG[name]
    path = exported(store, tmp_path / "labels.jsonl")
    lines = path.read_text().splitlines()
    lines[number - 1] = wrong(lines[number - 1])
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(StoreError, match=message) as caught:
        imported(path, elsewhere)
    assert str(path) in str(caught.value) and "hunter2" not in str(caught.value)
    assert elsewhere.queries() == []


@pytest.mark.parametrize("name", ["labels.jsonl", "labels.jsonl.gz"])
def test_a_file_that_was_cut_off_is_refused(store, elsewhere, tmp_path, name):
    path = exported(store, tmp_path / name)
    whole = path.read_bytes()
    end = len(whole) // 2 if name.endswith("gz") else whole.rindex(b"\n", 0, -1) + 1
    path.write_bytes(whole[:end])
    with pytest.raises(StoreError, match=name):
        imported(path, elsewhere)
    assert elsewhere.queries() == []


def test_no_key_reaches_an_export(store, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("MY_TOKEN", 'quoted"and\\slashed')
    others = ("Bearer abcdefghijklmnop0123456789", "sk-proj-abcdefghijklmnop", "AIza" + "x" * 35, "hf_" + "a" * 30)
    secrets = (KEY, *others)
    replies = [Reply(f"your key is {secret}", "stop").to_json() for secret in secrets]
    store.put_many(
        QUERY,
        [
            Record(audio(90 + i), 0, secret, Response(Answer("invalid", reason=f"said {secret}"), reply))
            for i, (secret, reply) in enumerate(zip(secrets, replies, strict=True))
        ],
    )
    for name in ("labels.jsonl", "labels.jsonl.gz"):
        content = exported(store, tmp_path / name).read_bytes()
        text = (gzip.decompress(content) if name.endswith("gz") else content).decode()
        assert not [secret for secret in secrets if secret in text] and text.count("your key is") == len(secrets)
    with LabelStore(tmp_path / "new.sqlite") as new:
        assert imported(tmp_path / "labels.jsonl", new).new == 21


def test_a_placeholder_for_a_key_does_not_damage_the_text(store, elsewhere, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    store.put_many(QUERY, [record(80, 0, Answer("invalid", reason="EMPTY reply"))])
    assert "EMPTY reply" in exported(store, tmp_path / "labels.jsonl").read_text()


def test_a_query_that_holds_a_key_is_not_exported(store, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    store.put_many(dataclasses.replace(QUERY, endpoint=f"local:{KEY}"), [record(1, 0, sample(1, 0, 0, 0))])
    with pytest.raises(StoreError, match="looks like a key") as caught:
        exported(store, tmp_path / "labels.jsonl")
    assert KEY not in str(caught.value) and [path.suffix for path in tmp_path.iterdir() if "jsonl" in path.name] == []


def test_an_export_that_fails_leaves_the_old_file(store, tmp_path, monkeypatch):
    path = exported(store, tmp_path / "labels.jsonl")
    before = path.read_bytes()
    monkeypatch.setattr(LabelStore, "entries", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        exported(store, path)
    assert path.read_bytes() == before and len([p for p in tmp_path.iterdir() if "jsonl" in p.name]) == 1
    with pytest.raises(
        WriteError,
        match=r"labels.jsonl/b.jsonl: cannot be written \(.*\)\. Remove what is in its place, or choose another folder",
    ):
        exported(store, path / "b.jsonl")


@pytest.fixture
def shards(tmp_path):
    """Three machines: two share a recording, of which they know other samples."""
    paths = [tmp_path / f"shard{i}.sqlite" for i in range(3)]
    for number, path in enumerate(paths):
        with LabelStore(path) as shard:
            own = [record(10 * number + i, k, sample(0.5, 0.5, 0, 0)) for i in range(4) for k in range(2)]
            shard.put_many(QUERY, [*own, record(99, number, sample(0, 0, 0.5, 0.5))])
            shard.put_many(QUERY, [record(98, 0, REFUSAL)] * (number + 1))
    return paths


def merged(shards, into):
    return merge(shards, into, show_progress=False)


def test_shards_become_one_store_that_has_every_answer_once(shards, tmp_path):
    taken = merged(shards, tmp_path / "all.sqlite")
    assert taken.conflicts == [] and taken.new == 30
    with LabelStore.existing(tmp_path / "all.sqlite") as store:
        wanted = [audio(10 * number + i) for number in range(3) for i in range(4)]
        assert store.load(QUERY, wanted, 2).mask.all() and store.load(QUERY, [audio(99)], 3).mask.all()
        assert store.rejected(QUERY) == {(audio(98), 0): 3}
        assert check(store).problems == []
    assert merged(shards, tmp_path / "all.sqlite").new == 0


def test_the_order_of_shards_decides_nothing_but_conflicts(shards, tmp_path):
    merged(shards, tmp_path / "a.sqlite")
    merged(shards[::-1], tmp_path / "b.sqlite")
    with LabelStore(tmp_path / "a.sqlite") as a, LabelStore(tmp_path / "b.sqlite") as b:
        assert contents(a) == contents(b)


def test_conflicting_shards_are_reported_and_the_first_one_is_kept(shards, tmp_path):
    with LabelStore(shards[1]) as shard:
        shard.put_many(QUERY, [record(0, 0, sample(1, 0, 0, 0))])
    taken = merged(shards, tmp_path / "all.sqlite")
    assert taken.conflicts == [f"{shards[1]}: recording {audio(0)}, sample 0: the store has another sample there"]
    with LabelStore(tmp_path / "all.sqlite") as store:
        assert store.load(QUERY, [audio(0)], 1).probs[0, 0].tolist() == [0.5, 0.5, 0, 0]


def test_a_merge_that_fails_half_way_stores_nothing(shards, tmp_path, monkeypatch):
    whole, calls = LabelStore.entries, []

    def failing(self, query):
        calls.append(query)
        if len(calls) == 2:
            raise StoreError("disk gone")
        return whole(self, query)

    monkeypatch.setattr(LabelStore, "entries", failing)
    with pytest.raises(StoreError, match="disk gone"):
        merged(shards, tmp_path / "all.sqlite")
    with LabelStore(tmp_path / "all.sqlite") as store:
        assert store.queries() == []


def test_a_store_is_not_merged_into_itself_and_a_missing_shard_makes_no_store(shards, tmp_path):
    with pytest.raises(StoreError, match="cannot be merged into itself"):
        merged(shards, shards[0])
    with pytest.raises(StoreError, match=r"nowhere.sqlite: no such file"):
        merged([shards[0], tmp_path / "nowhere.sqlite"], tmp_path / "all.sqlite")
    assert not (tmp_path / "all.sqlite").exists()
