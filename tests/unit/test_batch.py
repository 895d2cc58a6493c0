"""The Batch API's path, against a simulated server: what is paid for is stored, and nothing is started twice."""

import base64
import errno
import json
import logging
import os
import sys
from pathlib import Path

import pytest
import torch
from lalm_support import LABELS, completion, write_tones

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from batch_server import simulated_batch_server

from speechbrain_mifuse.lalm import batch as batch_module
from speechbrain_mifuse.lalm.batch import BatchJob
from speechbrain_mifuse.lalm.client import LalmClient, LalmError
from speechbrain_mifuse.lalm.collect import RETRY_SEED_STRIDE, collect, encode_wav
from speechbrain_mifuse.lalm.integrity import check
from speechbrain_mifuse.lalm.limits import Budget
from speechbrain_mifuse.lalm.profile import BATCH_SHARE, Price, Profile, Tokens
from speechbrain_mifuse.lalm.prompt import Prompt
from speechbrain_mifuse.lalm.store import LabelStore, Query, StoreError
from speechbrain_mifuse.utils.audio import content_hash, load_audio
from speechbrain_mifuse.utils.errors import UserError, WriteError

KEY = "sk-planted-0123456789"
PROMPT = Prompt(LABELS)


@pytest.fixture(autouse=True)
def planted_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr(batch_module, "TRANSFER_RETRIES", 1)


@pytest.fixture
def store(tmp_path):
    with LabelStore(tmp_path / "labels.sqlite") as store:
        yield store


@pytest.fixture
def tones(tmp_path):
    folder = tmp_path / "audio"
    folder.mkdir()
    return write_tones(folder, 4)


def distribution(body):
    """Answer with numbers that only the audio and the seed decide."""
    audio = len(body["messages"][0]["content"][0]["input_audio"]["data"])
    texts = []
    for position in range(body.get("n", 1)):
        rest = ((audio + 7 * (body.get("seed", 0) + position)) % 10) / 10
        texts.append(json.dumps({"angry": rest, "happy": 1 - rest, "neutral": 0, "sad": 0}))
    return 200, completion(*texts)


def job_of(store, server, prompt=PROMPT, profile=None, budget=None, folder=None):
    client = LalmClient(server.url, "m", max_retries=0, timeout=10, profile=profile, budget=budget)
    query = Query.of(prompt, "m", server.url, {"temperature": 1.0, "seed": 0}, "simulated")
    return BatchJob(prompt, client, store, query, folder)


def limited(job, max_requests=BatchJob.max_requests, max_bytes=BatchJob.max_bytes):
    job.max_requests, job.max_bytes = max_requests, max_bytes
    return job


def run(job, tones, k=3, **limits):
    return limited(job, **limits).run(tones, k, every=0, show_progress=False)


def make(job, tones, k=3, **limits):
    return limited(job, **limits).make(tones, k, show_progress=False)


def hashes(tones):
    return [content_hash(load_audio(path)) for _, path in tones]


def test_a_run_brings_every_sample_and_a_second_one_asks_nothing(store, tones):
    with simulated_batch_server(distribution, looks=2) as server, job_of(store, server) as job:
        found = run(job, tones)
        assert (found.stored, found.asked, found.unanswered, found.unknown) == (12, 12, {}, [])
        assert store.load(job.query, hashes(tones), 3).mask.all() and check(store).problems == []
        assert run(job, tones).asked == 0 and len(server.batches) == 1
        assert job.status() == "part 0001: 4 requests, ingested, batch-1, completed 4/4"


def test_answers_and_seeds_are_those_of_live_calls(store, tones, tmp_path):
    from lalm_support import scripted_server

    with simulated_batch_server(distribution) as server, job_of(store, server) as job:
        run(job, tones)
        query = job.query
        sent = [line["body"] for line in server.executed]
    with scripted_server(lambda body, headers: distribution(body)) as (url, asked):
        live = Query.of(PROMPT, "m", url, {"temperature": 1.0, "seed": 0}, "simulated")
        with LabelStore(tmp_path / "live.sqlite") as other:
            collect(tones, PROMPT, LalmClient(url, "m"), other, live, 3, show_progress=False)
            here, there = store.load(query, hashes(tones), 3), other.load(live, hashes(tones), 3)
            assert all(torch.equal(*pair) for pair in zip(here, there, strict=True))
            seeds = [[(e.audio, e.k, e.seed, e.raw, e.utt_id) for e in s.entries(query)] for s in (store, other)]
            assert seeds[0] == seeds[1]

    def by_audio(bodies):
        return sorted(json.dumps(body, sort_keys=True) for body in bodies)

    assert by_audio(sent) == by_audio(asked)


def test_each_request_says_whom_and_what_it_asks_in_64_characters(store, tones):
    with simulated_batch_server(distribution) as server, job_of(store, server) as job:
        make(job, tones)
        path = job.folder / "0001.requests.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["custom_id"] for line in lines}) == 4
    for (_, tone), line in zip(tones, lines, strict=True):
        query, rest = line["custom_id"].split("-", 1)
        digest, k, n = rest[:43], *rest[44:].split("-")
        audio = content_hash(load_audio(tone))
        assert base64.urlsafe_b64decode(digest + "=").hex() == audio and (query, k, n) == (
            job.query.digest[:8],
            "0",
            "3",
        )
        assert len(line["custom_id"]) <= 64
        part = line["body"]["messages"][0]["content"][0]["input_audio"]
        assert base64.b64decode(part["data"]) == encode_wav(load_audio(tone))


def test_requests_are_spread_over_files_by_count_and_by_size(store, tones):
    with simulated_batch_server(distribution) as server, job_of(store, server) as job:
        assert make(job, tones, max_requests=3) == 4
        assert [part.requests for part in job.parts] == [3, 1]
        size = max(len(line) for line in (job.folder / "0001.requests.jsonl").read_text().splitlines()) + 1
    with simulated_batch_server(distribution) as server, job_of(store, server, folder=job.folder / "b") as job:
        assert make(job, tones, max_bytes=2 * size) == 4
        files = sorted(job.folder.glob("*.requests.jsonl"))
        assert len(files) == 2 and all(path.stat().st_size <= 2 * size for path in files)
        with pytest.raises(UserError, match=r"u0: one request of \d+ bytes"):
            make(job_of(store, server, folder=job.folder / "c"), tones, max_bytes=1000)
    with simulated_batch_server(distribution) as server, job_of(store, server, folder=job.folder / "d") as job:
        run(job, tones, max_requests=1)
        assert len(server.batches) == 4 and store.load(job.query, hashes(tones), 3).mask.all()


def test_what_is_stored_or_under_way_is_not_asked_again(store, tones):
    with simulated_batch_server(distribution) as server, job_of(store, server) as job:
        make(job, tones[:2], k=2)
        assert make(job, tones, k=2) == 2
        run(job, tones, k=2)
        assert make(job, tones, k=5) == 4
        run(job, tones, k=5)
        assert store.load(job.query, hashes(tones), 5).mask.all()
        asked = [(line["body"]["seed"], line["body"]["n"]) for line in server.executed]
    assert sorted(asked) == [(0, 2)] * 4 + [(2, 3)] * 4


def test_equal_recordings_are_asked_about_once(store, tones):
    with simulated_batch_server(distribution) as server, job_of(store, server) as job:
        assert make(job, [*tones, ("copy", tones[0][1]), ("again", lambda: load_audio(tones[1][1]))]) == 4


def test_a_recording_that_cannot_be_read_is_left_out_with_a_warning(store, tones, tmp_path, caplog):
    (tmp_path / "bad.wav").write_text("no sound")
    caplog.set_level(logging.WARNING)
    with simulated_batch_server(distribution) as server, job_of(store, server) as job:
        assert make(job, [("broken", tmp_path / "bad.wav"), *tones]) == 4
    assert "broken: left out" in caplog.text


def test_recordings_longer_than_the_model_hears_are_cut_with_a_warning(store, tones, caplog):
    caplog.set_level(logging.WARNING)
    profile = Profile.of({"longest_audio": 0.1})
    with simulated_batch_server(distribution) as server, job_of(store, server, profile=profile) as job:
        make(job, tones)
        body = json.loads((job.folder / "0001.requests.jsonl").read_text().splitlines()[0])["body"]
    wav = base64.b64decode(body["messages"][0]["content"][0]["input_audio"]["data"])
    assert len(wav) == 44 + 2 * 1600 and "4 recordings are longer than the 0.1 s that m hears" in caplog.text


def test_each_step_can_be_repeated_and_resumed_by_another_process(store, tones):
    with simulated_batch_server(distribution, looks=2) as server:
        for step in ("make", "submit", "submit", "poll", "submit", "poll", "poll", "ingest", "ingest", "poll"):
            with job_of(store, server) as job:
                if step == "make":
                    make(job, tones, max_requests=2)
                else:
                    getattr(job, step)()
        assert len(server.batches) == len(server.names) == 2 and len(server.executed) == 4
        assert store.load(job.query, hashes(tones), 3).mask.all()


KILLED_AT = [
    ("_save", 1, 0),  # files written, state not
    ("_save", 2, 1),  # uploaded, state not
    ("_started", 1, 1),  # batch started, state not
    ("_save", 5, 1),
    ("_download", 1, 1),
    ("_take", 1, 1),
    ("_save", 7, 1),  # ingested, state not
]


class Killed(BaseException):
    pass


@pytest.mark.parametrize(("name", "call", "batches"), KILLED_AT)
def test_a_job_killed_anywhere_goes_on_and_starts_no_batch_twice(store, tones, monkeypatch, name, call, batches):
    with simulated_batch_server(distribution) as server:
        original, calls = getattr(BatchJob, name), []

        def killed(self, *args):
            calls.append(1)
            if len(calls) == call:
                raise Killed
            return original(self, *args)

        monkeypatch.setattr(BatchJob, name, killed)
        with job_of(store, server) as job, pytest.raises(Killed):
            run(job, tones)
        assert len(server.batches) <= batches
        monkeypatch.setattr(BatchJob, name, original)
        with job_of(store, server) as job:
            run(job, tones)
            assert store.load(job.query, hashes(tones), 3).mask.all()
            assert len(server.batches) == 1 and len(server.executed) == 4
            assert not list(job.folder.glob(".*"))


def test_a_refusal_stored_by_a_killed_ingest_counts_as_one_attempt(store, tones, monkeypatch):
    refusing = completion("I'm sorry, I can't.", refusal="no")
    with simulated_batch_server(lambda body: (200, refusing)) as server:
        original = BatchJob._save
        with job_of(store, server) as job:
            make(job, tones, k=1)
            job.submit()
            job.poll()
            monkeypatch.setattr(BatchJob, "_save", lambda self: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                job.ingest()
            monkeypatch.setattr(BatchJob, "_save", original)
        with job_of(store, server) as job:
            with pytest.raises(LalmError, match="4 of them: refusal"):
                job.ingest()
            assert set(store.rejected(job.query).values()) == {1}


def test_a_batch_whose_start_was_not_heard_of_is_found_and_not_started_again(store, tones):
    outcomes = iter(["lost", "ok", "ok"])
    with simulated_batch_server(distribution, create=lambda: next(outcomes)) as server, job_of(store, server) as job:
        for number in range(3):  # older batches of others, over two pages of the list
            server.batches[f"other-{number}"] = {**OTHER, "id": f"other-{number}"}
        make(job, tones)
        with pytest.raises(LalmError):
            job.submit()
        assert job.parts[0].status == "starting"
        run(job, tones)
        mine = [batch for batch in server.batches.values() if batch["input_file_id"] == "file-1"]
        assert len(mine) == 1 and len(server.executed) == 4
        assert store.load(job.query, hashes(tones), 3).mask.all()


OTHER = {
    **{"object": "batch", "endpoint": "/v1/chat/completions", "completion_window": "24h", "status": "completed"},
    **{"created_at": 10**10, "input_file_id": "file-of-another", "metadata": {"speechbrain_mifuse_job": "another"}},
}


@pytest.mark.parametrize("outcome", ["400", "429", "500"])
def test_a_refused_start_is_an_error_and_the_next_call_starts_it_once(store, tones, outcome):
    outcomes = iter([outcome, "ok"])
    with simulated_batch_server(distribution, create=lambda: next(outcomes)) as server, job_of(store, server) as job:
        make(job, tones)
        with pytest.raises(LalmError, match="refused"):
            job.submit()
        run(job, tones)
        assert len(server.batches) == 1 and len(server.names) == 1


def test_expired_and_failed_requests_are_reported_and_asked_again(store, tones):
    calls = []

    def answer(body):
        calls.append(body)
        if len(calls) == 1:
            return None
        if len(calls) == 2:
            return 500, {"error": {"message": "broken", "code": "server_error"}}
        return distribution(body)

    with simulated_batch_server(answer) as server, job_of(store, server) as job:
        found = run(job, tones)
        assert found.unanswered == {"batch_expired": 1, "server_error": 1} and found.stored == 12
        assert len(server.batches) == 2 and len(server.executed) == 6
        assert store.load(job.query, hashes(tones), 3).mask.all() and store.rejected(job.query) == {}


def test_fewer_choices_than_asked_for_are_made_up_for(store, tones):
    def one_choice(body):
        return distribution({**body, "n": 1})

    with simulated_batch_server(one_choice) as server, job_of(store, server) as job:
        found = run(job, tones)
        assert found.stored == 12 and found.unanswered == {"fewer choices than asked for": 8}
        assert sorted(line["body"]["seed"] for line in server.executed) == [0] * 4 + [1] * 4 + [2] * 4


def test_refusals_are_kept_retried_with_another_seed_and_given_up(store, tones):
    def answer(body):
        if body["seed"] % RETRY_SEED_STRIDE == 1:
            return 400, {"error": {"message": f"blocked, {KEY}", "code": "content_filter"}}
        return distribution(body)

    profile = Profile.of({"honours_n": False})
    with simulated_batch_server(answer) as server, job_of(store, server, profile=profile) as job:
        found = run(job, tones)
        assert (found.stored, found.refused) == (8, 12) and len(server.batches) == 3
        assert store.rejected(job.query) == {(audio, 1): 3 for audio in hashes(tones)}
        seeds = sorted(
            line["body"]["seed"] for line in server.executed if line["body"]["seed"] % RETRY_SEED_STRIDE == 1
        )
        assert seeds == [1] * 4 + [1 + RETRY_SEED_STRIDE] * 4 + [1 + 2 * RETRY_SEED_STRIDE] * 4


def test_questions_that_vary_are_asked_and_read_by_sample(store, tones):
    prompt = Prompt(LABELS, "label", variants=["{labels}! {answer}"], shuffle_labels=True)
    with simulated_batch_server(lambda body: (200, completion("sad"))) as server, job_of(store, server, prompt) as job:
        run(job, tones, k=2)
        texts = {line["body"]["messages"][0]["content"][1]["text"] for line in server.executed}
        assert texts == {prompt.at(0, 0).text(), prompt.at(1, 0).text()} and len(texts) == 2
        assert store.load(job.query, hashes(tones), 2).probs[..., 3].eq(1).all()


def test_lines_that_answer_nothing_are_reported_with_their_place_and_left_alone(store, tones):
    stranger = json.dumps({"custom_id": "stranger", "response": {"status_code": 200, "body": completion("sad")}})
    extra = [stranger, "cut o", "[]"]
    with simulated_batch_server(distribution, extra=extra) as server, job_of(store, server) as job:
        found = run(job, tones)
        assert found.stored == 12 and len(found.unknown) == 3
        assert (
            "0001.output.jsonl:5: answers nothing that was asked" in found.unknown[0]
            and "'stranger'" in found.unknown[0]
        )
        assert "stranger" in found.summary()


@pytest.mark.parametrize("body", [{"choices": {"0": {}}}, {"choices": True}, "sad", None])
def test_answers_that_are_no_completions_leave_their_requests_unanswered(store, tones, body):
    with simulated_batch_server(lambda _: (200, body)) as server, job_of(store, server) as job:
        make(job, tones)
        for step in (job.submit, job.poll):
            step()
        assert job.ingest().unanswered == {"status 200": len(tones)}


def test_a_second_answer_to_one_request_changes_nothing(store, tones):
    with simulated_batch_server(distribution) as server, job_of(store, server) as job:
        make(job, tones[:1])
        line = json.loads((job.folder / "0001.requests.jsonl").read_text())
        other = {"custom_id": line["custom_id"], "response": {"status_code": 200, "body": completion(*["sad"] * 3)}}
        server.extra = [json.dumps(other)]
        found = run(job, tones[:1])
        assert found.stored == 3 and len(found.unknown) == 1
        assert not store.load(job.query, hashes(tones[:1]), 3).probs[..., 3].any()


def test_a_file_that_the_server_rejects_is_an_error_and_is_made_anew_by_the_next_run(store, tones):
    with simulated_batch_server(distribution, reject=lambda lines: "bad line") as server, job_of(store, server) as job:
        with pytest.raises(LalmError, match=r"rejected 1 request files: bad line \(line 1\)"):
            run(job, tones)
        server.reject = lambda lines: None
        run(job, tones)
        assert [part.status for part in job.parts] == ["failed", "ingested"]
        assert store.load(job.query, hashes(tones), 3).mask.all()


def test_batches_that_find_no_room_wait_for_the_others(store, tones):
    with simulated_batch_server(distribution, room=1, looks=2) as server, job_of(store, server) as job:
        found = run(job, tones, max_requests=2)
        assert found.stored == 12 and len(server.executed) == 4 and len(server.names) == 2
        assert [batch["status"] for batch in server.batches.values()].count("completed") == 2


def test_rounds_without_any_answer_end_in_an_error(store, tones):
    with simulated_batch_server(lambda body: None) as server, job_of(store, server) as job:
        with pytest.raises(LalmError, match=r"no answer: .*4 batch_expired"):
            run(job, tones)
        assert len(server.batches) == 1


def test_a_budget_counts_what_open_batches_can_cost(store, tones):
    price = Price(1000.0, 1000.0, 1000.0)
    profile = Profile.of({"sampling": {}, "audio_tokens_per_second": 10})
    with simulated_batch_server(distribution) as server:
        with job_of(store, server, profile=profile, budget=Budget(100.0, price)) as job:
            make(job, tones[:1])
            one = job.parts[0].most
        assert one > 0
        with job_of(store, server, profile=profile, budget=Budget(2.5 * one, price)) as job:
            with pytest.raises(UserError, match="--lalm_budget: these batches could cost more"):
                make(job, tones)
            assert len(job.parts) == 1 and make(job, tones[:2]) == 1
            with pytest.raises(UserError, match="--lalm_budget"):
                make(job, tones[:3])


def test_tokens_of_batches_are_told_apart_at_half_the_price(store, tones):
    with simulated_batch_server(distribution) as server, job_of(store, server) as job:
        run(job, tones)
        (found,) = store.queries()
    assert (found.tokens, found.batch_tokens) == (Tokens(), Tokens(0, 40, 4)) and BATCH_SHARE == 0.5


def test_no_key_and_no_audio_is_left_behind(store, tones, tmp_path):
    def echo(body):
        status, answer = distribution(body)
        answer["choices"][0]["message"]["content"] += f" {KEY}"
        return status, {**answer, "model": KEY}

    with simulated_batch_server(echo) as server, job_of(store, server) as job:
        run(job, tones)
        assert server.keys == {f"Bearer {KEY}"}
        left = [path for path in job.folder.iterdir() if path.is_file()]
        assert {path.name for path in left} == {"state.json", "lock", "0001.output.jsonl"}
    store.close()
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path


def test_two_processes_do_not_work_on_one_job_and_another_query_not_in_its_folder(store, tones):
    with simulated_batch_server(distribution) as server, job_of(store, server) as job:
        make(job, tones)
        with pytest.raises(UserError, match="another process works on this batch job"):
            job_of(store, server)
        job.close()
        with pytest.raises(UserError, match="batch job of another query"):
            job_of(store, server, Prompt(LABELS, "label"), folder=job.folder)
        job_of(store, server).close()


def test_a_server_that_is_down_is_one_clear_error_and_a_full_disk_loses_no_answer(store, tones, monkeypatch):
    with simulated_batch_server(distribution) as server, job_of(store, server) as job:
        make(job, tones)
        job.submit()
        job.poll()
        monkeypatch.setattr(store, "put_many", lambda *_: (_ for _ in ()).throw(StoreError("disk full")))
        with pytest.raises(StoreError, match="disk full"):
            job.ingest()
        monkeypatch.undo()
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        assert job.ingest().stored == 12
        make(job, tones, k=4)
    with job_of(store, server) as job, pytest.raises(LalmError, match="is the server running"):
        job.submit()


def test_request_files_on_a_full_disk_are_one_error_and_the_next_call_makes_them(store, tones, monkeypatch):
    said = r"batch-.*: cannot be written \(No space.* run the same command again: finished work is kept"
    with simulated_batch_server(distribution) as server:
        for call in (1, 2, 3):
            with monkeypatch.context() as patch, job_of(store, server) as job:
                refuse_fsync(patch, call)
                with pytest.raises(WriteError, match=said):
                    make(job, tones)
                assert not list(job.folder.glob(".*"))
        with job_of(store, server) as job:
            assert make(job, tones) == 4 and run(job, tones).stored == 12
            assert store.load(job.query, hashes(tones), 3).mask.all()


def refuse_fsync(patch, call):
    """Let the disk be full at the call-th file that is brought to it."""
    original, calls = os.fsync, []

    def fsync(handle):
        calls.append(handle)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(handle)

    patch.setattr(os, "fsync", fsync)


def test_a_batch_in_which_no_answer_can_be_used_is_an_error_and_asks_no_more(store, tones):
    with simulated_batch_server(lambda body: (200, completion("hm"))) as server, job_of(store, server) as job:
        with pytest.raises(LalmError, match="none of the first 4 answers can be used"):
            run(job, tones)
        assert len(server.batches) == 1 and sum(store.rejected(job.query).values()) == 4


@pytest.mark.parametrize("body", [{"error": "no audio here"}, {"detail": "no audio here"}, ["no audio here"]])
def test_the_message_of_a_request_that_failed_is_logged_once_whatever_its_form(store, tones, body, caplog):
    calls = []

    def answer(asked):
        calls.append(asked)
        return (422, body) if len(calls) <= 2 else distribution(asked)

    with simulated_batch_server(answer) as server, job_of(store, server) as job:
        found = run(job, tones)
    assert found.unanswered == {"status 422": 2} and found.stored == 12
    assert caplog.text.count("no audio here") == 1
