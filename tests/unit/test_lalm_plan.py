import asyncio
import json
import logging
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import soundfile
from lalm_support import LABELS, completion, scripted_server, tone, write_tones

from speechbrain_mifuse.cli.main import main
from speechbrain_mifuse.lalm import collect as collect_module
from speechbrain_mifuse.lalm.card import Card, Finding
from speechbrain_mifuse.lalm.client import LalmClient, LalmError
from speechbrain_mifuse.lalm.collect import collect
from speechbrain_mifuse.lalm.hashes import HashCache, Known, file_stamp
from speechbrain_mifuse.lalm.limits import Budget, BudgetReached
from speechbrain_mifuse.lalm.plan import known_recordings, make_plan, spent_before
from speechbrain_mifuse.lalm.profile import Price, Profile
from speechbrain_mifuse.lalm.prompt import Prompt
from speechbrain_mifuse.lalm.store import LabelStore, Query
from speechbrain_mifuse.utils import audio
from speechbrain_mifuse.utils.audio import content_hash, load_audio
from speechbrain_mifuse.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
KEY = "sk-planted-0123456789"
PRICE = Price(1e6, 1e6, 1e6, "XTS")  # one coin for each token
SAD = (200, completion("sad"))


@pytest.fixture(autouse=True)
def planted_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def store(tmp_path):
    with LabelStore(tmp_path / "labels.sqlite") as store:
        yield store


def settle(utterances):
    """Make recordings look as old as those of a corpus."""
    for _, path in utterances:
        os.utime(path, (1, 1))
    return utterances


def run(store, url, utterances, k=1, prompt=None, budget=None, profile=None, sampling=(), **options):
    prompt = prompt or Prompt(LABELS, "label")
    client = LalmClient(url, "m", 10, 1, profile=Profile(model="m", **(profile or {})), budget=budget)
    query = Query.of(prompt, "m", url, {"temperature": 1.0, "seed": 0, **dict(sampling)}, "local:test")
    report = collect(utterances, prompt, client, store, query, k, **{"show_progress": False, **options})
    return report, query


# What is read again.


def test_a_second_run_reads_no_recording_that_did_not_change(store, tmp_path, monkeypatch):
    utterances = settle(write_tones(tmp_path, 6))
    with scripted_server(lambda *_: SAD) as (url, _):
        run(store, url, utterances)
        read = []
        monkeypatch.setattr(collect_module, "load_audio", lambda path, *_: read.append(path) or load_audio(path))
        report, _ = run(store, url, utterances)
        assert (report.skipped, report.asked, read) == (6, 0, [])
        soundfile.write(utterances[2][1], tone(17).numpy(), 16000)
        report, query = run(store, url, utterances)
    assert (report.skipped, report.asked, read) == (5, 1, [utterances[2][1]])
    assert (content_hash(load_audio(utterances[2][1])), 0) in store.have(query)


def test_a_file_that_changed_a_moment_ago_is_not_remembered(tmp_path):
    ((_, path),) = write_tones(tmp_path, 1)
    with HashCache(tmp_path / "hashes") as cache:
        cache.put(path, file_stamp(path), Known("ab" * 32, 1.0))
        assert cache.get(path) is None
        os.utime(path, (1, 1))
        cache.put(path, file_stamp(path), Known("ab" * 32, 1.0))
        assert cache.get(path) == Known("ab" * 32, 1.0)
        os.utime(path, (2, 2))
        assert cache.get(path) is None


def test_a_file_that_changes_while_it_is_read_is_not_remembered(tmp_path):
    ((_, path),) = settle(write_tones(tmp_path, 1))
    with HashCache(tmp_path / "hashes") as cache:
        before = file_stamp(path)
        os.utime(path, (3, 3))
        cache.put(path, before, Known("ab" * 32, 1.0))
        assert cache.get(path) is None


def test_a_broken_cache_is_made_anew(tmp_path, caplog):
    (tmp_path / "hashes").write_bytes(b"no database " * 1000)
    ((_, path),) = settle(write_tones(tmp_path, 1))
    for _ in range(2):
        with HashCache(tmp_path / "hashes") as cache:
            cache.put(path, file_stamp(path), Known("cd" * 32, 1.0))
            assert cache.get(path)
    assert caplog.text.count("made anew") == 1


# Where and how long it runs.


def test_it_runs_inside_a_running_event_loop(store, tmp_path):
    async def notebook():
        with scripted_server(lambda *_: SAD) as (url, _):
            return run(store, url, write_tones(tmp_path, 5))[0]

    assert asyncio.run(notebook()).stored == 5


def test_the_deadline_ends_a_run_that_hangs_and_keeps_what_was_answered(store, tmp_path):
    served = []

    def hanging(*_):
        served.append(1)
        if len(served) > 4:
            time.sleep(3)
        return SAD

    with scripted_server(hanging) as (url, _):
        start = time.monotonic()
        with pytest.raises(LalmError, match=r"--lalm_deadline[\s\S]*4 new samples are stored"):
            run(store, url, write_tones(tmp_path, 30), concurrency=2, deadline=1.0)
        assert time.monotonic() - start < 20


@pytest.mark.parametrize("where", ["script", "asyncio.run", "notebook"])
def test_ctrl_c_keeps_every_answer_that_came_in(store, tmp_path, where):
    asked = []

    def interrupting(*_):
        asked.append(1)
        if len(asked) == 7:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)
        return SAD

    utterances = write_tones(tmp_path, 20)
    with scripted_server(interrupting) as (url, _):

        async def inside():
            return run(store, url, utterances, concurrency=1)

        ways = {
            "script": lambda: run(store, url, utterances, concurrency=1),
            "asyncio.run": lambda: asyncio.run(inside()),
            "notebook": lambda: asyncio.new_event_loop().run_until_complete(inside()),
        }
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            ways[where]()
        assert time.monotonic() - start < 5
        query = Query.of(Prompt(LABELS, "label"), "m", url, {"temperature": 1.0, "seed": 0}, "local:test")
        assert len(store.have(query)) == 6
        report, _ = run(store, url, utterances, concurrency=1)
    assert (report.skipped, report.stored) == (6, 14)


@pytest.mark.parametrize("deadline", [0, -1])
def test_a_deadline_that_is_no_time_is_refused(store, tmp_path, deadline):
    with pytest.raises(UserError, match="--lalm_deadline"):
        run(store, "http://127.0.0.1:9/v1", write_tones(tmp_path, 1), deadline=deadline)


def test_more_calls_than_recordings_are_made_at_the_same_time(store, tmp_path):
    together = threading.Barrier(16, timeout=60)

    def waits_for_the_others(*_):
        together.wait()
        return SAD

    with scripted_server(waits_for_the_others) as (url, requests):
        run(store, url, write_tones(tmp_path, 2), k=8, profile={"honours_n": False}, concurrency=16)
        assert len(requests) == 16 and not together.broken


# What it costs.


def test_the_budget_stops_the_run_and_every_paid_answer_is_on_disk(store, tmp_path):
    utterances, budget = write_tones(tmp_path, 60), Budget(800, PRICE)
    with scripted_server(lambda *_: SAD) as (url, requests):  # 11 coins a call
        with pytest.raises(BudgetReached, match=r"budget of 800 XTS[\s\S]*new samples are stored"):
            run(store, url, utterances, budget=budget, sampling={"max_tokens": 5})
        query = Query.of(
            Prompt(LABELS, "label"), "m", url, {"temperature": 1, "seed": 0, "max_tokens": 5}, "local:test"
        )
        assert len(store.have(query)) == len(requests) and budget.spent == 11 * len(requests) <= 800
        assert 800 - budget.spent < 400
        assert spent_before(store, query, PRICE) == budget.spent
        more = Budget(10_000, PRICE, budget.spent)
        report, _ = run(store, url, utterances, budget=more, sampling={"max_tokens": 5})
    assert len(requests) == 60 and report.cost == "660/10000 XTS"


def test_progress_shows_rate_cost_refusals_and_invalid_answers(store, tmp_path, capfd):
    replies = iter([SAD, (200, completion("I'm sorry, I cannot help.")), (200, completion("hm"))] * 3)
    with scripted_server(lambda *_: next(replies)) as (url, _):
        run(store, url, write_tones(tmp_path, 9), budget=Budget(None, PRICE), show_progress=True, concurrency=1)
    shown = capfd.readouterr().err
    assert re.search(r"9/9 .*answer/s|9/9 .*s/answer", shown)
    assert "cost=99 XTS, refused=3, invalid=3, failed=0" in shown


def test_recordings_longer_than_the_model_hears_are_cut_and_counted_once(store, tmp_path, caplog):
    utterances = write_tones(tmp_path, 3)
    for name in ("long1", "long2"):
        path = tmp_path / f"{name}.wav"
        soundfile.write(path, tone(len(utterances), seconds=1.0).numpy(), 16000)
        utterances.append((name, path))
    with scripted_server(lambda *_: SAD) as (url, requests), caplog.at_level(logging.WARNING):
        report, query = run(store, url, utterances, profile={"longest_audio": 0.5})
        client = LalmClient(url, "m", profile=Profile(longest_audio=0.5))
        with HashCache.beside(store.path) as hashes:
            known = known_recordings(dict(utterances), hashes, show_progress=False)
    sizes = sorted(len(body["messages"][0]["content"][0]["input_audio"]["data"]) for body in requests)
    assert report.cut == 2 and sizes[-1] < 4 * (44 + 2 * 8000) / 3 + 4 < 2 * sizes[-1]
    assert [record.message for record in caplog.records if "longer than" in record.message] == [
        "2 recordings are longer than the 0.5 s that m hears: only their beginning was sent"
    ]
    assert store.have(query) == {(content_hash(load_audio(path)), 0) for _, path in utterances}
    assert make_plan(known, Prompt(LABELS, "label"), client, store, query, 1).longer == 2


# Questions that vary.


def test_shuffled_questions_are_asked_stored_in_the_fixed_order_and_found_again(store, tmp_path):
    seen = []

    def first_is_likely(body, _):
        """A teacher with a bias: most for the label that is named first."""
        order = re.search(r"emotions are: ([\w, ]+)\.", body["messages"][0]["content"][1]["text"])[1].split(", ")
        seen.append(tuple(order))
        return 200, completion(json.dumps({order[0]: 0.7, order[1]: 0.3}))

    prompt, utterances = Prompt(LABELS, shuffle_labels=True), write_tones(tmp_path, 2)
    with scripted_server(first_is_likely) as (url, requests):
        report, query = run(store, url, utterances, k=8, prompt=prompt, concurrency=1)
        again, _ = run(store, url, utterances, k=8, prompt=prompt)
        other, _ = run(store, url, utterances, k=8, prompt=prompt, sampling={"seed": 1})
    assert (report.stored, again.asked, other.asked) == (16, 0, 16)
    assert all(body["n"] == 1 for body in requests) and len(set(seen[:8])) > 3
    assert seen[:8] == seen[8:16] == [prompt.at(k, 0).order for k in range(8)] != seen[16:24]
    samples = store.load(query, [content_hash(load_audio(path)) for _, path in utterances], 8).probs
    assert [LABELS[index] for index in samples[0].argmax(-1)] == [order[0] for order in seen[:8]]


def test_wordings_are_taken_in_turn_by_sample(store, tmp_path):
    prompt = Prompt(LABELS, "label", "A {labels} {answer}", variants=["B {labels} {answer}"])
    with scripted_server(lambda *_: SAD) as (url, requests):
        run(store, url, write_tones(tmp_path, 1), k=2, prompt=prompt, concurrency=1)
        run(store, url, write_tones(tmp_path, 1), k=5, prompt=prompt, concurrency=1)
    assert [body["messages"][0]["content"][1]["text"][0] for body in requests] == list("ABABA")


# The plan.


@pytest.mark.parametrize("honours_n", [True, False])
def test_the_plan_names_the_calls_that_are_made_and_their_tokens(store, tmp_path, honours_n):
    utterances = settle([*write_tones(tmp_path, 7), ("copy", tmp_path / "tone3.wav")])
    with scripted_server(lambda body, _: (200, completion(*["sad"] * body.get("n", 1)))) as (url, requests):
        profile = {"honours_n": honours_n, "price": PRICE, "requests_per_minute": 600}
        _, query = run(store, url, utterances[:2], k=3, profile=profile)
        before = len(requests)
        client = LalmClient(url, "m", profile=Profile(model="m", **profile))
        with HashCache.beside(store.path) as hashes:
            known = known_recordings(dict(utterances), hashes, show_progress=False)
        plan = make_plan(known, Prompt(LABELS, "label"), client, store, query, 3)
        assert len(requests) == before
        run(store, url, utterances, k=3, profile={**profile, "requests_per_minute": None})
    assert plan.calls == len(requests) - before == (5 if honours_n else 15)
    assert (plan.utterances, plan.recordings, plan.wanted, plan.stored) == (8, 7, 21, 6)
    assert plan.cost == plan.expected.total and plan.seconds == max(plan.calls * 0.1, plan.calls * 2 / 8)
    assert "21 wanted, 6 stored, 15 to ask for" in plan.told()


def test_the_plan_leaves_out_what_was_refused_too_often(store, tmp_path):
    utterances = write_tones(tmp_path, 2)
    with scripted_server(lambda *_: (200, completion("hm"))) as (url, _):
        for _ in range(3):
            with pytest.raises(LalmError, match="none of the first 1 answers can be used"):
                run(store, url, utterances[:1])
        client, query = LalmClient(url, "m"), store.queries()[0].query
        known = {name: Known(content_hash(load_audio(path)), 0.3) for name, path in utterances}
        plan = make_plan(known, Prompt(LABELS, "label"), client, store, query, 1)
    assert (plan.given_up, plan.calls) == (1, 1) and "1 given up" in plan.told()


def test_the_plan_warns_of_a_budget_that_does_not_reach(store):
    client = LalmClient("http://127.0.0.1:9/v1", "m", profile=Profile(price=PRICE), budget=Budget(100, PRICE))
    query = Query.of(Prompt(LABELS), "m", client.base_url, {"temperature": 1.0, "seed": 0})
    told = make_plan({"a": Known("ab" * 32, 2.0)}, Prompt(LABELS), client, store, query, 5).told()
    assert "budget 100: IT STOPS BEFORE THE END" in told and "no max_tokens" in told


# The command.


def command(tmp_path, toy_folder, *flags, profile=""):
    """Words of the command line on the toy corpora; a profile replaces the pair's."""
    folder = tmp_path / "hparams"
    if not folder.exists():
        shutil.copytree(ROOT / "hparams", folder)
    if profile:
        (folder / "lalm" / "mifuse_serve.yaml").write_text(profile, encoding="utf-8")
    places = ["--data_folder", str(toy_folder), "--output_folder", str(tmp_path / "out")]
    return ["collect", str(folder / "nemo2rav.yaml"), *places, *flags]


PRICED = """
base_url: {url}
model: m
answer_form: label
concurrency: 4
honours_n: False
sampling: {{max_tokens: 5}}
price: {{per_million_input_text: 1, per_million_input_audio: 1, per_million_output: 1000000, source: test}}
"""


def test_the_command_plans_collects_and_goes_on_and_the_key_stays_in_the_environment(tmp_path, toy_folder, capfd):
    with scripted_server(lambda *_: SAD) as (url, requests):
        words = command(tmp_path, toy_folder, profile=PRICED.format(url=url))
        main([*words, "--dry_run"])
        plan = capfd.readouterr().out
        assert not requests and not (tmp_path / "out" / "labels.sqlite").exists()
        count = int(re.search(r"calls +(\d+)", plan)[1])
        assert "The possible emotions are" in plan and "cost            about" in plan and count == 36 * 5
        with pytest.raises(SystemExit) as stopped:
            main([*words, "--budget", "50"])
        assert stopped.value.code == 2 and "budget of 50 USD" in capfd.readouterr().err
        paid = len(requests)
        assert 40 < paid <= 50
        with pytest.raises(SystemExit):
            main([*words, "--budget", "50"])  # what was spent counts
        assert len(requests) == paid
        main(words)
    out = capfd.readouterr().out
    assert len(requests) == count and f"{paid} stored" in out and f"{count} label" in out
    main([*words, "--dry_run"])
    assert "0 to ask for" in capfd.readouterr().out
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not [path for path in files if KEY.encode() in path.read_bytes()]


def test_a_dry_run_for_a_local_teacher_trains_none(tmp_path, toy_folder, capfd):
    main([*command(tmp_path, toy_folder), "--dry_run"])
    assert "price unknown" in capfd.readouterr().out
    assert not (tmp_path / "out" / "teacher").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--data_folder", "twice"], "--data_folder: is given twice"),
        (["--no_such_flag", "1"], "no_such_flag"),
        (["--method", "source_only"], "--method: source_only needs no answers"),
        (["--lalm_base_url", "http://127.0.0.1:9/v1", "--budget", "1"], "--lalm_budget needs prices"),
        (["--lalm_base_url", "http://127.0.0.1:9/v1"], "is the server running"),
        (["--lalm_answer_form", "poem", "--lalm_base_url", "http://127.0.0.1:9/v1"], "answer form 'poem'"),
    ],
)
def test_what_cannot_be_done_is_one_clear_error(tmp_path, toy_folder, capfd, flags, said):
    with pytest.raises(SystemExit) as stopped:
        main(command(tmp_path, toy_folder, *flags))
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert stopped.value.code == 2 and len(errors) == 1 and said in errors[0]


def test_a_corpus_that_is_not_there_is_one_clear_error(tmp_path, capfd):
    with pytest.raises(SystemExit) as stopped:
        main(command(tmp_path, "/no/such/folder", "--dry_run"))
    assert stopped.value.code == 2 and "/no/such/folder is no folder" in capfd.readouterr().err


def test_ctrl_c_ends_the_command_without_a_traceback(tmp_path, toy_folder, capfd, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(audio, "load_audio", interrupted)
    monkeypatch.setattr("speechbrain_mifuse.experiments.teacher.known_recordings", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(command(tmp_path, toy_folder))
    assert stopped.value.code == 130 and "the same command goes on" in capfd.readouterr().err


def test_nothing_is_asked_of_a_server_whose_card_shows_that_it_lacks_what_is_needed(tmp_path, toy_folder, capfd):
    card = tmp_path / "card.json"
    with scripted_server(lambda *_: SAD) as (url, requests):
        words = command(tmp_path, toy_folder, "--lalm_card", str(card), profile=PRICED.format(url=url))
        card.write_text(Card(url, "m", findings={"hears_input_audio": Finding("no", "same answers")}).to_json())
        with pytest.raises(SystemExit):
            main(words)
        assert "audio" in capfd.readouterr().err and not requests


def test_unknown_flags_of_other_commands_are_refused_still(capfd):
    with pytest.raises(SystemExit) as stopped:
        main(["recipes", "--nonsense"])
    assert stopped.value.code == 2 and "unrecognized arguments: --nonsense" in capfd.readouterr().err


def test_answers_of_a_server_that_gives_fewer_than_asked_are_on_disk_before_the_rest_is_asked_for(store, tmp_path):
    served = []

    def one_choice_then_nothing(*_):
        served.append(1)
        return SAD if len(served) <= 3 else (400, {"error": {"message": "enough"}})

    with scripted_server(one_choice_then_nothing) as (url, requests):
        report, query = run(store, url, write_tones(tmp_path, 1), k=5, concurrency=1)
    assert [(body["n"], body["seed"]) for body in requests] == [(5, 0), (4, 1), (3, 2), (2, 3)]
    assert {k for _, k in store.have(query)} == {0, 1, 2} and report.stored == 3 and len(report.failed) == 1
