import asyncio
import base64
import contextlib
import functools
import logging
import os
import re
import signal
import socket
import threading
import time

import pytest
import torch
from lalm_support import LABELS, EnergyRecogniser, completion, scripted_server, tone, write_tones

from speechbrain_mifuse.inference.server import EmotionServer
from speechbrain_mifuse.lalm.client import LalmClient, LalmError
from speechbrain_mifuse.lalm.collect import MAX_UNUSABLE, RETRY_SEED_STRIDE, CollectReport, collect, plan
from speechbrain_mifuse.lalm.prompt import Prompt
from speechbrain_mifuse.lalm.store import LabelStore, Query, StoreError
from speechbrain_mifuse.utils.audio import content_hash, load_audio
from speechbrain_mifuse.utils.errors import UserError

KEY = "sk-planted-0123456789"
ENDPOINT = "local:test"


@pytest.fixture(autouse=True)
def planted_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.fixture
def store(tmp_path):
    with LabelStore(tmp_path / "labels.sqlite") as store:
        yield store


@pytest.fixture(scope="module")
def teacher():
    with EmotionServer(EnergyRecogniser(), "m") as server:
        yield server.base_url


def run(store, url, utterances, k, form="distribution", prompt=None, seed=0, **options):
    prompt = prompt or Prompt(LABELS, form)
    client = LalmClient(url, "m", max_retries=1, timeout=10)
    query = Query.of(prompt, "m", url, {"temperature": 1.0, "seed": seed}, ENDPOINT)
    report = collect(utterances, prompt, client, store, query, k, **{"show_progress": False, **options})
    return report, query


def hashes(utterances):
    return [content_hash(load_audio(path)) for _, path in utterances]


@pytest.mark.parametrize("form", ["distribution", "label", "logprobs"])
def test_every_sample_of_every_recording_is_stored(store, teacher, tmp_path, form):
    utterances = write_tones(tmp_path, 5)
    report, query = run(store, teacher, utterances, 3, form)
    assert report == CollectReport(stored=15)
    loaded = store.load(query, hashes(utterances), 3)
    assert loaded.mask.all() and torch.allclose(loaded.probs.sum(-1), torch.ones(5, 3))
    assert store.counts(query)[form] == 15


def test_second_run_asks_nothing(store, teacher, tmp_path):
    utterances = write_tones(tmp_path, 4)
    run(store, teacher, utterances, 2)
    report, _ = run(store, teacher, utterances, 2)
    assert (report.asked, report.skipped) == (0, 8)


def test_larger_k_asks_only_for_the_new_samples_and_equals_asking_at_once(store, teacher, tmp_path):
    utterances = write_tones(tmp_path, 4)
    first, query = run(store, teacher, utterances, 2)
    before = store.load(query, hashes(utterances), 2).probs
    topped, _ = run(store, teacher, utterances, 5)
    assert (first.asked, topped.asked, topped.skipped) == (8, 12, 8)
    after = store.load(query, hashes(utterances), 5).probs
    assert torch.equal(after[:, :2], before)
    with LabelStore(tmp_path / "at_once.sqlite") as other:
        run(other, teacher, utterances, 5)
        assert torch.equal(other.load(query, hashes(utterances), 5).probs, after)


def test_recordings_with_equal_samples_are_asked_about_once(store, teacher, tmp_path):
    (_, path), *_ = write_tones(tmp_path, 1)
    report, query = run(store, teacher, [(f"copy{i}", path) for i in range(6)], 2)
    assert (report.asked, report.skipped) == (2, 10)
    assert len(store.have(query)) == 2


def test_waveforms_may_come_from_a_function(store, teacher):
    report, query = run(store, teacher, [("u0", lambda: tone(0)), ("u1", lambda: tone(1))], 1)
    assert report.stored == 2
    assert store.have(query) == {(content_hash(tone(i)), 0) for i in range(2)}


def test_interrupted_run_is_resumed_and_asks_only_for_the_rest(store, teacher, tmp_path):
    utterances = write_tones(tmp_path, 12)

    def interrupting():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        return load_audio(utterances[7][1])

    cut = [*utterances[:7], ("u7", interrupting), *utterances[8:]]
    with pytest.raises(KeyboardInterrupt):
        run(store, teacher, cut, 2, concurrency=1)
    report, query = run(store, teacher, utterances, 2)
    assert report.skipped == 14 and report.asked == 10
    assert store.load(query, hashes(utterances), 2).mask.all()


def test_api_that_dies_in_the_middle_stops_the_run_and_keeps_what_was_answered(store, tmp_path):
    utterances, served = write_tones(tmp_path, 40), []

    def dying(body, _):
        served.append(1)
        return (200, completion("sad")) if len(served) <= 10 else (500, {"error": {"message": "out of memory"}})

    with scripted_server(dying) as (url, requests):
        with pytest.raises(LalmError, match=r"out of memory[\s\S]*5 failed requests in a row[\s\S]*10 new samples"):
            run(store, url, utterances, 1, "label", concurrency=2)
        assert len(requests) < 30
    with scripted_server(lambda *_: (200, completion("sad"))) as (url, requests):
        report, _ = run(store, url, utterances, 1, "label")
    assert (report.skipped, report.asked, len(requests)) == (10, 30, 30)


def test_api_that_is_down_is_one_clear_error_at_once(store, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    utterances, start = write_tones(tmp_path, 30), time.perf_counter()
    with pytest.raises(LalmError, match="is the server running") as caught:
        run(store, url, utterances, 3)
    assert time.perf_counter() - start < 30
    assert url in str(caught.value) and str(caught.value).count("\n") == 0


def test_wrong_model_stops_at_the_first_request(store, tmp_path):
    server = EmotionServer(EnergyRecogniser(), "another")
    with server, pytest.raises(LalmError, match="it offers another"):
        run(store, server.base_url, write_tones(tmp_path, 20), 1, concurrency=1)


def test_bad_replies_never_become_labels(store, tmp_path):
    utterances = write_tones(tmp_path, 24)
    order = {content_hash(load_audio(path)): i for i, (_, path) in enumerate(utterances)}
    good = '{"angry": 0.7, "sad": 0.3}'
    scripts = [
        lambda: (200, completion(good)),
        lambda: (200, completion("I'm sorry, I can't judge emotions such as anger.")),
        lambda: (200, completion("lorem ipsum")),
        lambda: (200, completion("")),
        lambda: (200, completion(good, finish_reason="length")),
        lambda: (200, completion(good, refusal="I will not")),
        lambda: (500, {"error": {"message": "boom"}}),
        lambda: (200, b"<html>proxy</html>"),
    ]

    def script(body, _):
        wav = base64.b64decode(body["messages"][0]["content"][0]["input_audio"]["data"])
        digest = content_hash(torch.frombuffer(bytearray(wav[44:]), dtype=torch.int16) / 32768)
        return scripts[order[digest] % 8]()

    with scripted_server(script) as (url, _):
        report, query = run(store, url, utterances, 2, concurrency=1)
    loaded = store.load(query, hashes(utterances), 2)
    answered = torch.arange(24) % 8 == 0
    assert torch.equal(loaded.mask.all(1), answered) and torch.equal(loaded.mask.any(1), answered)
    assert torch.allclose(loaded.probs[answered], torch.tensor([0.7, 0, 0, 0.3]))
    assert not loaded.probs[~answered].any()
    assert (report.asked, report.stored, report.refused, report.invalid) == (36, 6, 12, 18)
    assert [utt_id for utt_id, _ in report.failed] == [f"u{i}" for i in range(24) if i % 8 in (6, 7)]
    assert "boom" in report.summary() and "6 utterances failed" in report.summary()


def test_rejected_answers_are_retried_with_other_seeds_until_attempts_run_out(store, tmp_path):
    utterances = write_tones(tmp_path, 1)
    with scripted_server(lambda *_: (200, completion("hm", "hm"))) as (url, requests):
        for _ in range(3):
            with pytest.raises(LalmError, match="none of the first 2 answers can be used"):
                run(store, url, utterances, 2, max_attempts=2, seed=5)
    assert [body["seed"] for body in requests] == [5, 5 + RETRY_SEED_STRIDE]
    with scripted_server(lambda *_: (200, completion('{"sad": 1}', '{"sad": 1}'))) as (url, _):
        report, query = run(store, url, utterances, 2, max_attempts=3, seed=5)
    assert report.stored == 2 and store.rejected(query) == {}


def test_unreadable_recordings_are_listed_and_the_rest_is_answered(store, teacher, tmp_path):
    good, broken = write_tones(tmp_path, 8), tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF")
    bad = [("b0", broken), ("b1", tmp_path / "missing.wav")] * 5
    report, _ = run(store, teacher, [*bad, *good], 1, max_failures_in_a_row=2)
    assert report.stored == 8 and len(report.failed) == 10
    assert "broken.wav" in dict(report.failed)["b0"]


def test_store_that_cannot_be_written_stops_the_run(store, teacher, tmp_path, monkeypatch):
    calls = []

    def full(*_):
        calls.append(1)
        raise StoreError("disk full")

    monkeypatch.setattr(store, "put_many", full)
    with pytest.raises(StoreError, match="disk full"):
        run(store, teacher, write_tones(tmp_path, 20), 1, concurrency=1)
    assert len(calls) == 1


@pytest.fixture
def cancellations_get_lost(monkeypatch):
    """Calls that are cancelled bring their answer all the same, as `asyncio.wait_for` may before Python 3.12."""
    ask_once = LalmClient.ask_once

    async def deaf(self, *args, **sampling):
        call = asyncio.ensure_future(ask_once(self, *args, **sampling))
        while not call.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([call])
        return call.result()

    monkeypatch.setattr(LalmClient, "ask_once", deaf)


@pytest.mark.usefixtures("cancellations_get_lost")
@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_store_that_cannot_be_written_stops_also_a_worker_that_lost_its_cancellation(
    store, tmp_path, monkeypatch, concurrency
):
    asked = []

    def slow(*_):
        asked.append(1)
        time.sleep(0.1)
        return 200, completion("sad")

    def full(*_):
        raise StoreError("disk full")

    monkeypatch.setattr(store, "put_many", full)
    with scripted_server(slow) as (url, _), pytest.raises(StoreError, match="disk full"):
        run(store, url, write_tones(tmp_path, 40), 1, "label", concurrency=concurrency)
    assert len(asked) <= 3 * concurrency


@pytest.mark.usefixtures("cancellations_get_lost")
def test_after_the_deadline_a_worker_that_lost_its_cancellation_asks_no_more_and_its_answer_is_kept(store, tmp_path):
    asked = []

    def slow(*_):
        asked.append(1)
        time.sleep(0.4)
        return 200, completion("sad")

    with scripted_server(slow) as (url, _), pytest.raises(LalmError, match="4 new samples are stored"):
        run(store, url, write_tones(tmp_path, 40), 1, "label", concurrency=4, deadline=0.2)
    assert len(asked) == 4


def test_answers_are_on_disk_before_they_count(store, teacher, tmp_path, monkeypatch):
    put_many, order = store.put_many, []

    def watched(query, records):
        put_many(query, records)
        with LabelStore(store.path) as other:
            order.append(len(other.have(query)))

    monkeypatch.setattr(store, "put_many", watched)
    run(store, teacher, write_tones(tmp_path, 4), 2, concurrency=1)
    assert order == [2, 4, 6, 8]


def test_recordings_are_asked_about_at_the_same_time(store, tmp_path):
    together = threading.Barrier(16, timeout=60)

    def waits_for_the_others(*_):
        together.wait()
        return 200, completion("sad")

    with scripted_server(waits_for_the_others) as (url, _):
        report, _ = run(store, url, write_tones(tmp_path, 16), 1, "label", concurrency=16)
    assert report.stored == 16 and not together.broken


def test_planted_key_reaches_no_file_and_no_log(store, tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    replies = iter(range(100))

    def echo(body, headers):
        text = f"you sent {headers['Authorization']}"
        if next(replies) % 2:
            return 400, {"error": {"message": text, "code": text}}
        return 200, completion(text, refusal=text, model=text)

    with scripted_server(echo) as (url, _), pytest.raises(LalmError, match="you sent Bearer") as caught:
        run(store, url, write_tones(tmp_path, 6), 1, show_progress=True)
    store.close()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "labels.sqlite" for path in files) and "3 refused" in caplog.text
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    assert KEY not in caplog.text + "".join(capfd.readouterr()) + str(caught.value)


@pytest.mark.parametrize(("count", "asked_at_most"), [(4, 4), (200, MAX_UNUSABLE + 2 * 4)])
def test_a_run_in_which_no_answer_can_be_used_stops_early_and_quotes_reason_and_reply(
    store, tmp_path, count, asked_at_most
):
    replies = iter(range(1000))

    def script(*_):
        if next(replies) % 4 == 0:
            return 200, completion("Ich höre\n nur Rauschen. " * 20, model=KEY)
        return 200, completion("angry", finish_reason="MAX_TOKENS")

    with scripted_server(script) as (url, requests):
        with pytest.raises(LalmError) as caught:
            run(store, url, [(f"u{i}", functools.partial(tone, i)) for i in range(count)], 1, concurrency=4)
        assert min(count, MAX_UNUSABLE) <= len(requests) <= asked_at_most
    said = str(caught.value)
    assert re.search(r"--lalm_model m: none of the first \d+ answers can be used", said)
    assert "truncated (max_tokens)" in said and "'angry'" in said and "--lalm_answer_form" in said
    assert "\n" not in said
    assert store.queries()[0].counts["invalid"] == len(requests)


def test_answers_that_stand_only_in_the_reasoning_stop_the_run_with_what_to_set(store, tmp_path):
    body = completion(None)
    body["choices"][0]["message"]["reasoning_content"] = '{"sad": 1}'
    with scripted_server(lambda *_: (200, body)) as (url, _), pytest.raises(LalmError) as caught:
        run(store, url, write_tones(tmp_path, 2), 1)
    assert re.search(r"reasoning_content: switch thinking off.*One reply begins: '\{\"sad\": 1\}'", str(caught.value))


def test_answers_that_are_usable_at_a_low_rate_are_collected_to_the_end(store):
    replies, lock = iter(range(1000)), threading.Lock()

    def script(*_):
        with lock:
            return 200, completion("sad" if next(replies) % 20 == 10 else "hm")

    utterances = [(f"u{i}", functools.partial(tone, i)) for i in range(100)]
    with scripted_server(script) as (url, requests):
        report, _ = run(store, url, utterances, 1, "label")
    assert (report.stored, report.invalid, len(requests)) == (5, 95, 100)


def test_a_later_run_in_which_only_rejected_answers_are_left_is_no_error(store, tmp_path):
    utterances = write_tones(tmp_path, 4)
    with scripted_server(lambda *_: (200, completion("sad"))) as (url, _):
        run(store, url, utterances[:1], 1, "label")
    with scripted_server(lambda *_: (200, completion("hm"))) as (url, _):
        report, _ = run(store, url, utterances, 1, "label")
    assert (report.stored, report.invalid) == (0, 3)


def test_query_of_another_prompt_or_model_is_refused(store, teacher, tmp_path):
    prompt, client = Prompt(LABELS), LalmClient(teacher, "m")
    utterances, sampling = write_tones(tmp_path, 1), {"temperature": 1.0}
    for query in (
        Query.of(Prompt(LABELS, "label"), "m", teacher, sampling),
        Query.of(prompt, "n", teacher, sampling),
        Query.of(prompt, "m", "http://127.0.0.1:1/v1", sampling),
        Query.of(prompt, "m", teacher, {}),
    ):
        with pytest.raises(UserError):
            collect(utterances, prompt, client, store, query, 1, show_progress=False)
    with pytest.raises(UserError, match="at least 1"):
        run(store, teacher, utterances, 0)


def test_plan_groups_only_consecutive_seeds():
    assert list(plan([0, 1, 2], [0, 0, 0], None)) == [(0, 3, None)]
    assert list(plan([0, 1, 3], [0, 1, 0], 7)) == [(0, 1, 7), (1, 1, 8 + RETRY_SEED_STRIDE), (3, 1, 10)]
    assert list(plan([], [], 0)) == []
