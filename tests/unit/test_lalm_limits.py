import asyncio
import threading
import time

import pytest
from lalm_support import LABELS, completion, scripted_server, tone

from speechbrain_mifuse.lalm.client import LalmClient, LalmError
from speechbrain_mifuse.lalm.collect import encode_wav
from speechbrain_mifuse.lalm.limits import Budget, BudgetReached, Pace, estimated_tokens, used_tokens
from speechbrain_mifuse.lalm.profile import Price, Profile, Tokens
from speechbrain_mifuse.lalm.prompt import Clip, Prompt
from speechbrain_mifuse.utils.errors import UserError

WAV = encode_wav(tone(3))
PRICE = Price(1e6, 1e6, 1e6, "XTS")  # one coin for each token


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def ask_many(client, count, n=1, prompt=None, **sampling):
    """Ask `count` times at once; answers or errors."""

    async def run():
        async with client:
            calls = [client.ask(prompt or Prompt(LABELS, "label"), Clip.of(WAV), n, **sampling) for _ in range(count)]
            return await asyncio.gather(*calls, return_exceptions=True)

    return asyncio.run(run())


def client_for(url, budget=None, patience=(5, 3, 20), **profile):
    return LalmClient(url, "m", *patience, profile=Profile(model="m", **profile), budget=budget)


class Clock:
    """When requests came in, and how many were open at a time."""

    def __init__(self, reply, seconds=0.0):
        self.reply, self.seconds, self.times, self.open, self.most = reply, seconds, [], 0, 0
        self.lock = threading.Lock()

    def __call__(self, body, headers):
        with self.lock:
            self.times.append(time.monotonic())
            self.open += 1
            self.most = max(self.most, self.open)
            number = len(self.times)
        time.sleep(self.seconds)
        with self.lock:
            self.open -= 1
        return self.reply(number)


def test_requests_per_minute_space_the_calls():
    clock = Clock(lambda number: (200, completion("sad")))
    with scripted_server(clock) as (url, _):
        answers = ask_many(client_for(url, requests_per_minute=1200), 9)
    assert all(answer[0].answer.is_sample for answer in answers)
    assert clock.times[-1] - clock.times[0] >= 0.3  # a request can be late, which shortens the rest


def test_tokens_per_minute_space_the_calls_by_what_they_used():
    def run(used):
        usage = {"prompt_tokens": used, "completion_tokens": 0, "total_tokens": used}
        clock = Clock(lambda number: (200, {**completion("sad"), "usage": usage}))
        with scripted_server(clock) as (url, _):
            client = client_for(url, tokens_per_minute=60 * 2000)

            async def one_after_the_other():
                async with client:
                    for _ in range(5):
                        await client.ask(Prompt(LABELS, "label"), WAV)

            asyncio.run(one_after_the_other())
        return clock.times[-1] - clock.times[0]

    assert run(used=400) >= 4 * 0.2 - 0.03 > 2 * run(used=1)


def test_a_pause_holds_for_calls_that_already_wait():
    async def run():
        pace, start = Pace(requests_per_minute=600), time.monotonic()
        waiting = [asyncio.create_task(pace.admit(0)) for _ in range(3)]
        await asyncio.sleep(0.05)
        pace.pause(0.3)
        await asyncio.gather(*waiting[1:])
        return time.monotonic() - start

    assert asyncio.run(run()) >= 0.35


@pytest.mark.parametrize("header", [("retry-after", "0.5"), ("retry-after-ms", "500")])
def test_when_the_server_asks_to_wait_all_calls_wait(header):
    clock = Clock(lambda number: (200, completion("sad")) if number > 1 else (429, {"error": {}}, [header]))
    with scripted_server(clock) as (url, _):
        client = client_for(url)

        async def run():
            async with client:
                first = asyncio.create_task(client.ask(Prompt(LABELS, "label"), WAV))
                await asyncio.sleep(0.2)  # the first is turned away by now
                late = [client.ask(Prompt(LABELS, "label"), WAV) for _ in range(4)]
                return await asyncio.gather(first, *late)

        answers = asyncio.run(run())
    assert len(answers) == 5 and len(clock.times) == 6
    assert min(clock.times[1:]) - clock.times[0] >= 0.48


def test_waiting_for_the_server_does_not_count_against_the_deadline_of_a_call():
    busy = (503, {"error": {}}, [("retry-after", "0.4")])
    clock = Clock(lambda number: (200, completion("sad")) if number > 2 else busy)
    with scripted_server(clock) as (url, _):
        (answer,) = ask_many(client_for(url, patience=(5, 3, 0.6)), 1)
    assert answer[0].answer.is_sample and clock.times[-1] - clock.times[0] >= 0.78


def test_a_server_that_asks_for_an_hour_is_an_error_at_once():
    with scripted_server(lambda *_: (429, {"error": {}}, [("retry-after", "3600")])) as (url, requests):
        (error,) = ask_many(client_for(url), 1)
    assert isinstance(error, LalmError) and error.status == 429 and len(requests) == 1


@pytest.mark.parametrize("body", [b'{"choices": [', b"<html>busy</html>", {"choices": []}, {"error": "busy"}])
def test_a_reply_that_is_no_completion_is_asked_for_again(body):
    replies = iter([(200, body), (200, completion("sad"))])
    with scripted_server(lambda *_: next(replies)) as (url, requests):
        (answer,) = ask_many(client_for(url), 1)
    assert answer[0].answer.is_sample and len(requests) == 2


def test_forms_limits_and_constraint_of_the_profile_reach_the_wire():
    with scripted_server(lambda *_: (200, completion("sad"))) as (url, requests):
        client = client_for(url, audio_part="audio_url", constraint="structured_outputs", honours_n=False)
        prompt = Prompt(LABELS, "label", audio_part="audio_url", constraint="structured_outputs")
        ask_many(client, 1, n=2, prompt=prompt, seed=7, max_tokens=9)
        silent = client_for(url, honours_n=False, honours_seed=False)
        ask_many(silent, 1, seed=7)
    first, second, third = requests
    part = first["messages"][0]["content"][0]
    assert part["audio_url"]["url"].startswith("data:audio/wav;base64,UklGR") and "n" not in first
    assert first["structured_outputs"] == {"choice": list(LABELS)} and first["max_tokens"] == 9
    assert [first["seed"], second["seed"]] == [7, 8] and "seed" not in third


def test_a_raw_completion_tells_the_status_of_a_failure():
    replies = iter([(200, completion("sad")), (422, {"error": {"message": "no such field"}})])
    with scripted_server(lambda *_: next(replies)) as (url, _):
        client = client_for(url)

        async def run():
            async with client:
                done = await client.complete([{"role": "user", "content": "hi"}], n=1)
                with pytest.raises(LalmError, match="no such field") as caught:
                    await client.complete([], nonsense=1)
                return done, caught.value.status

        done, status = asyncio.run(run())
    assert done["choices"][0]["message"]["content"] == "sad" and done["usage"]["prompt_tokens"] == 10 and status == 422


def test_calls_in_flight_cannot_pass_the_budget_together():
    clock = Clock(lambda number: (200, completion("sad")), seconds=0.02)  # 11 tokens each
    with scripted_server(clock) as (url, _):
        budget = Budget(1600, PRICE)
        answers = ask_many(client_for(url, budget), 140, max_tokens=50)
        most = ask_bound(url)
    paid = [answer for answer in answers if not isinstance(answer, Exception)]
    assert budget.spent == 11 * len(clock.times) == 11 * len(paid) <= 1600
    assert all(isinstance(answer, BudgetReached) for answer in answers if isinstance(answer, Exception))
    # Never more in flight than the budget holds at their upper bound; and it is used, not given up early.
    assert 1 < clock.most <= 1600 / most and 1600 - budget.spent < most + 11
    assert "budget of 1600 XTS" in str(next(answer for answer in answers if isinstance(answer, Exception)))


def ask_bound(url):
    """What one call of these tests can cost at most."""
    options = (Clip.of(WAV).seconds, 1, client_for(url).profile, {"max_tokens": 50})
    return estimated_tokens(Prompt(LABELS, "label"), *options)[1].total


def test_the_first_call_goes_alone_and_shows_how_the_provider_counts():
    usage = {"prompt_tokens": 5000, "completion_tokens": 1, "total_tokens": 5001}  # ten times the upper bound
    clock = Clock(lambda number: (200, {**completion("sad"), "usage": usage}), seconds=0.05)
    with scripted_server(clock) as (url, _):
        budget = Budget(12_000, PRICE)
        ask_many(client_for(url, budget), 20, max_tokens=50)
    assert len(clock.times) == 2 and budget.spent == 10_002


def test_a_call_whose_reply_is_lost_counts_as_paid_and_one_that_is_refused_does_not():
    most = ask_bound("http://127.0.0.1:9/v1")
    with scripted_server(lambda *_: (400, {"error": {"message": "no"}})) as (url, _):
        budget = Budget(1e6, PRICE)
        ask_many(client_for(url, budget), 1, max_tokens=50)
    assert budget.spent == 0
    with scripted_server(lambda *_: (200, b"{")) as (url, requests):
        ask_many(client_for(url, budget, patience=(5, 1, 20)), 1, max_tokens=50)
    assert budget.spent == 2 * most and len(requests) == 2
    ask_many(client_for("http://127.0.0.1:9/v1", budget, patience=(1, 0, 20)), 1, max_tokens=50)
    assert budget.spent == 2 * most and budget.in_flight == 0


def test_a_server_that_reports_no_usage_is_counted_at_the_upper_bound():
    with scripted_server(lambda *_: (200, {**completion("sad"), "usage": None})) as (url, _):
        budget = Budget(1e6, PRICE)
        ask_many(client_for(url, budget), 3, max_tokens=50)
        assert budget.spent == 3 * ask_bound(url)


@pytest.mark.parametrize("limit", [0, -1, "ten", True])
def test_a_budget_that_is_no_amount_is_refused(limit):
    with pytest.raises(UserError, match="--lalm_budget"):
        Budget(limit, PRICE)


def test_usage_in_any_shape_is_read_without_an_error():
    for usage in (None, [], "x", {"prompt_tokens": None}, {"prompt_tokens": "9"}, {"prompt_tokens_details": []}):
        assert used_tokens(usage) in (None, Tokens(0, 0, 0))
