"""What an API that means harm, or has gone wrong, can do to the client: each attack made for real, on loopback."""

import asyncio
import contextlib
import gzip
import json
import logging
import resource
import sqlite3
import struct
import time
import zlib

import pytest
from batch_server import simulated_batch_server
from hostile_http import forever, raw_server, reply
from lalm_support import LABELS, completion, scripted_server, tone, write_tones

from speechbrain_mifuse.cli.main import main
from speechbrain_mifuse.lalm import batch as batch_module
from speechbrain_mifuse.lalm import exchange
from speechbrain_mifuse.lalm.answer import Answer, Response
from speechbrain_mifuse.lalm.batch import BatchJob
from speechbrain_mifuse.lalm.client import LalmClient, LalmError
from speechbrain_mifuse.lalm.collect import collect, encode_wav
from speechbrain_mifuse.lalm.hashes import HashCache
from speechbrain_mifuse.lalm.limits import known_usage
from speechbrain_mifuse.lalm.profile import Profile
from speechbrain_mifuse.lalm.prompt import Prompt
from speechbrain_mifuse.lalm.store import LabelStore, Query, Record, StoreError

KEY = "a-key-of-nobody-0123456789"
GOOD = json.dumps(completion("sad")).encode()
MODELS = json.dumps({"object": "list", "data": [{"id": "m", "object": "model"}]}).encode()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("speechbrain_mifuse.lalm.client._FIRST_BACKOFF", 0.01)


def ask(url, **options):
    async def main():
        async with LalmClient(url, "m", **{"timeout": 5.0, "max_retries": 1, **options}) as client:
            return await client.ask(Prompt(LABELS, "label"), encode_wav(tone(0)))

    return asyncio.run(main())


def failure(url, **options):
    with pytest.raises(LalmError) as caught:
        ask(url, **options)
    assert KEY not in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def check(url, **options):
    async def main():
        async with LalmClient(url, "m", **{"max_retries": 0, **options}) as client:
            await client.check()

    asyncio.run(main())


def gather(client, utterances, store, k):
    prompt = Prompt(LABELS, "label")
    query = Query.of(prompt, "m", client.base_url, {"temperature": 1.0, "seed": 0})
    return collect(utterances, prompt, client, store, query, k, show_progress=False)


# Another origin.


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
def test_a_redirect_carries_neither_recording_nor_key_to_another_address(status):
    with raw_server(lambda *_: [reply(GOOD)]) as (elsewhere, received):
        headers = [f"Location: {elsewhere}/chat/completions"]
        with raw_server(lambda *_: [reply(b"", headers, status)]) as (url, asked):
            said = failure(url)
    assert not received and len(asked) == 1
    assert f"redirects to {elsewhere}" in said and "--lalm_base_url" in said


def test_a_redirect_of_the_list_of_models_ends_the_check_before_any_recording_is_sent():
    with raw_server(lambda *_: [reply(MODELS)]) as (elsewhere, received):
        moved = reply(b"", [f"Location: {elsewhere}/models"], "307 Moved")
        with raw_server(lambda *_: [moved]) as (url, _), pytest.raises(LalmError, match="redirects to"):
            check(url)
    assert not received


# The key.


def echoing(head):
    """Make a completion that has the key wherever a server can put it."""
    key = head.split("Bearer ")[1].split()[0]
    body = completion("sad", model=f"m {key}")
    body |= {"system_fingerprint": f"f {key}", "id": key, key: key, "service_tier": key}
    body["usage"] |= {"note": key, key: 1, "prompt_tokens_details": {"audio_tokens": 3, key: key}}
    body["choices"][0] |= {"finish_reason": f"stop {key}", "note": key}
    body["choices"][0]["message"] |= {"content": f'sad\n"{key}"', "refusal": None, "annotations": [key]}
    top = [{"token": f"sad {key}", "logprob": -0.1}]
    body["choices"][0]["logprobs"] = {"content": [{"token": key, "logprob": -0.1, "top_logprobs": top}]}
    return body


def test_the_key_that_a_server_echoes_reaches_neither_the_store_nor_an_export_nor_the_log(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    utterances = write_tones(tmp_path, 3)
    script = lambda path, head, _: [reply(MODELS if "models" in path else json.dumps(echoing(head)).encode())]  # noqa: E731
    with raw_server(script) as (url, asked), LabelStore(tmp_path / "labels.sqlite") as store:
        gather(LalmClient(url, "m"), utterances, store, 2)
        exchange.export(store, tmp_path / "labels.jsonl", show_progress=False)
        assert len(store.queries()) == 1
    assert any(KEY in head for _, head, _ in asked)
    stored = "\n".join(sqlite3.connect(tmp_path / "labels.sqlite").iterdump())
    assert "***" in stored and KEY not in stored
    for path in tmp_path.glob("labels*"):
        assert KEY.encode() not in path.read_bytes()
    assert KEY not in caplog.text and "UklGR" not in caplog.text


def test_of_usage_only_counts_of_known_names_and_sensible_size_are_kept():
    odd = {"prompt_tokens": 5, "completion_tokens": -1, "total_tokens": 10**400, "cost": 1, "x": {"y": [1]}}
    odd["prompt_tokens_details"] = {"audio_tokens": True, "cached_tokens": 2, "z": "text"}
    assert known_usage(odd) == {"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": 2}}
    assert known_usage({"total_tokens": 1.5}) is known_usage([]) is known_usage(None) is known_usage("7") is None


@pytest.mark.parametrize("tokens", [10**400, -5, 1.5, "12", None, True, [1]])
def test_a_count_of_tokens_that_is_none_costs_what_was_set_aside_and_ends_nothing(tokens):
    body = {**completion("sad"), "usage": {"prompt_tokens": tokens, "completion_tokens": tokens}}
    with scripted_server(lambda *_: (200, body)) as (url, _):
        (response,) = ask(url)
    assert response.answer.is_sample and response.usage is None


@pytest.mark.parametrize("name", [["m"], {"a": KEY}, 10**400, "x" * 10**6, 1.5, True, None])
def test_a_name_of_another_kind_or_size_is_bounded(name):
    body = {**completion("sad"), "model": name, "system_fingerprint": name}
    with scripted_server(lambda *_: (200, body)) as (url, _):
        (response,) = ask(url)
    assert response.answer.is_sample and len(response.served_model) <= 200 >= len(response.system_fingerprint)


def test_a_text_without_end_is_kept_in_part():
    with scripted_server(lambda *_: (200, completion("sad " * 10**6))) as (url, _):
        (response,) = ask(url)
    assert len(response.raw) < 2**18 + 1000


@pytest.mark.parametrize("pause", [0.0, 0.02])
def test_a_reply_that_nobody_asked_for_is_never_the_answer_about_the_next_recording(pause):
    def script(*_):
        answer, stray = (reply(json.dumps(completion(said)).encode()) for said in (LABELS[len(asked)], "angry"))
        if pause:
            yield answer
            time.sleep(pause)
            yield stray
        else:
            yield answer + stray

    async def main(url):
        async with LalmClient(url, "m", timeout=5.0, max_retries=0) as client:
            for _ in range(3):
                yield (await client.ask(Prompt(LABELS, "label"), encode_wav(tone(0))))[0].answer
                await asyncio.sleep(3 * pause)  # in which the second reply arrives

    async def answers(url):
        return [answer.probs.index(1.0) async for answer in main(url)]

    with raw_server(script) as (url, asked):
        assert asyncio.run(answers(url)) == [1, 2, 3]


def test_cookies_are_neither_kept_nor_sent_back():
    cookies = [f"Set-Cookie: {name}={'x' * 4000}" for name in range(50)]
    with raw_server(lambda *_: [reply(GOOD, cookies)]) as (url, asked):

        async def main():
            async with LalmClient(url, "m") as client:
                await client.ask(Prompt(LABELS, "label"), encode_wav(tone(0)), n=2)

        asyncio.run(main())
    assert len(asked) == 2 and all("cookie" not in head.lower() and len(head) < 2000 for _, head, _ in asked)


# Size and time.


def memory():
    """Peak of this process's memory in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def packed(megabytes, form):
    """Compress so many megabytes of blanks."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31 if form == "gzip" else 15)
    return b"".join([packer.compress(b" " * 2**20) for _ in range(megabytes)]) + packer.flush()


@pytest.mark.parametrize("form", ["gzip", "deflate"])
def test_a_small_reply_that_unpacks_to_much_is_left_after_few_megabytes(form):
    bomb = reply(packed(200, form), [f"Content-Encoding: {form}"])
    before = memory()
    with raw_server(lambda *_: [bomb]) as (url, asked):
        assert "more than 8 MB" in failure(url)
    assert len(asked) == 2 and memory() - before < 100


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip"])
def test_a_compression_that_was_not_asked_for_is_no_answer(encoding):
    with raw_server(lambda *_: [reply(gzip.compress(GOOD), [f"Content-Encoding: {encoding}"])]) as (url, _):
        assert "compression" in failure(url)


def test_a_compressed_answer_is_read():
    with raw_server(lambda *_: [reply(gzip.compress(GOOD), ["Content-Encoding: gzip"])]) as (url, _):
        assert ask(url)[0].answer.is_sample


ENDLESS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def endless(piece, pause=0.0):
    yield ENDLESS
    yield from forever(b"%x\r\n%s\r\n" % (len(piece), piece), pause)


def test_a_reply_without_end_is_left_after_few_megabytes():
    before = memory()
    with raw_server(lambda *_: endless(b" " * 2**16)) as (url, _):
        assert "more than 8 MB" in failure(url)
    assert memory() - before < 100


def test_a_reply_that_trickles_for_ever_ends_with_the_time_out():
    with raw_server(lambda *_: endless(b" ", 0.05)) as (url, asked):
        assert "no answer within 0.5 s" in failure(url, timeout=0.5)
    assert len(asked) == 2


@pytest.mark.parametrize("reply_of_list", [lambda: endless(b" ", 0.05), lambda: endless(b" " * 2**16)])
def test_a_list_of_models_without_end_holds_nothing_up(reply_of_list, monkeypatch):
    monkeypatch.setattr("speechbrain_mifuse.lalm.client._QUICKLY", 0.5)
    missing = reply(b'{"error": {"message": "no such model"}}', status="404 Not Found")
    with raw_server(lambda path, *_: reply_of_list() if "models" in path else [missing]) as (url, _):
        check(url)
        assert "no such model" in failure(url)


@pytest.mark.parametrize("status", ["200 OK", "404 Not Found"])
@pytest.mark.parametrize("charset", ["punycode", "zlib", "rot13", "undefined", "utf-16", "quopri"])
def test_a_reply_is_read_as_utf_8_whatever_codec_it_names(charset, status):
    """Some codecs of Python fail in their own ways, and punycode takes minutes."""
    body, header = b"a" * 2**17 + b"-" + b"9" * 2**17, f"Content-Type: application/json; charset={charset}"
    replies = iter([reply(body, [header], "500 Oops"), reply(GOOD, [header], status)])
    with raw_server(lambda path, *_: [reply(body, [header]) if "models" in path else next(replies)]) as (url, _):
        if status == "200 OK":
            assert ask(url)[0].answer.is_sample
        else:
            assert "HTTP 404" in failure(url)


def test_a_list_of_a_million_models_is_read_soon():
    models = reply(b'{"data": [{"id": "m7"}, ' + b"{}, " * 10**6 + b"{}]}")
    missing = reply(b"{}", status="404 Not Found")
    with raw_server(lambda path, *_: [models if "models" in path else missing]) as (url, _):
        check(url)
        assert failure(url).endswith("it offers m7")


def test_a_server_that_counts_a_billion_tokens_holds_the_next_call_up_for_minutes_at_most(monkeypatch):
    monkeypatch.setattr("speechbrain_mifuse.lalm.limits.LONGEST_PAUSE", 0.01)
    usage = {"prompt_tokens": 10**12, "completion_tokens": 0, "total_tokens": 10**12}
    profile = Profile(tokens_per_minute=10**6)
    with scripted_server(lambda *_: (200, {**completion("sad"), "usage": usage})) as (url, asked):

        async def main():
            async with LalmClient(url, "m", profile=profile) as client:
                await asyncio.wait_for(client.ask(Prompt(LABELS, "label"), encode_wav(tone(0)), n=2), 10)

        asyncio.run(main())
    assert len(asked) == 2


# The Batch API.


@contextlib.contextmanager
def job_at(url, tmp_path):
    prompt = Prompt(LABELS)
    query = Query.of(prompt, "m", url, {"temperature": 1.0, "seed": 0}, "hostile")
    with LabelStore(tmp_path / "labels.sqlite") as store:
        yield BatchJob(prompt, LalmClient(url, "m", max_retries=0, timeout=2.0), store, query)


def in_batches(job, tmp_path):
    return job.run(write_tones(tmp_path, 2), 1, every=0, show_progress=False)


def test_a_file_of_results_without_end_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(batch_module, "_MOST_BYTES", 2**20)
    monkeypatch.setattr(batch_module, "TRANSFER_RETRIES", 0)
    with (
        simulated_batch_server(lambda _: (200, completion("sad" * 2**20))) as server,
        job_at(server.url, tmp_path) as job,
        pytest.raises(LalmError, match="more than 1 MB"),
    ):
        in_batches(job, tmp_path)


ODD = [[], {}, {"id": ["x"]}, {"id": KEY, "status": {"a": 1}, "request_counts": 7, "errors": "e"}, {"id": 10**400}]


@pytest.mark.parametrize("said", [json.dumps(odd).encode() for odd in ODD] + [b"\xff", b"[" * 200_000, b"9" * 5000])
def test_a_batch_api_that_says_odd_things_is_one_clear_error(said, tmp_path, monkeypatch):
    monkeypatch.setattr(batch_module, "TRANSFER_RETRIES", 0)
    with raw_server(lambda *_: [reply(said)]) as (url, _), job_at(url, tmp_path) as job:
        with pytest.raises(LalmError) as caught:
            in_batches(job, tmp_path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
        assert all(KEY.encode() not in path.read_bytes() for path in job.folder.rglob("*") if path.is_file())


def test_a_list_of_batches_without_end_is_left_and_starts_no_batch_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(batch_module, "MAX_LISTED", 20)
    monkeypatch.setattr(batch_module, "TRANSFER_RETRIES", 0)
    page = {"data": [{"id": "other", "created_at": 10**12, "status": "completed"}] * 10, "has_more": True}

    def script(path, head, _):
        if "/files" in path:
            return [reply(b'{"id": "file-1"}')]
        return [reply(json.dumps(page).encode()) if head.startswith("GET") else reply(b"{}", status="500 Oops")]

    with raw_server(script) as (url, asked), job_at(url, tmp_path) as job:
        with pytest.raises(LalmError, match="HTTP 500"):
            in_batches(job, tmp_path)
        with pytest.raises(LalmError, match="none of the 20 newest batches"):
            in_batches(job, tmp_path)
    assert sum(path.endswith("/batches") and head.startswith("POST") for path, head, _ in asked) == 1


# Bad replies: no answer, tried again by the rules, named.

BAD = {
    "bytes that are no text": reply(b'{"choices": "\xff\xfe\xfa"}'),
    "a number of 5,000 digits": reply(b'{"choices": [' + b"9" * 5000 + b"]}"),
    "a deep nesting": reply(b'{"choices": ' + b"[" * 200_000),
    "a deep nesting that ends": reply(b'{"choices": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "many headers": reply(GOOD, [f"X-{number}: x" for number in range(100_000)]),
    "a long header": reply(GOOD, ["X-Long: " + "x" * 10**6]),
    "a long status line": b"HTTP/1.1 200 " + b"x" * 10**6 + b"\r\n\r\n",
    "another protocol": b"SSH-2.0-OpenSSH_9.6\r\n",
    "half a reply": reply(GOOD)[:-20],
    "no gzip": reply(GOOD, ["Content-Encoding: gzip"]),
    "chunks of no number": ENDLESS + b"zz\r\nhello\r\n",
    "a negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_reply_is_tried_again_and_the_next_one_counts(bad):
    replies = iter([BAD[bad]])

    def script(*_):
        piece = next(replies, None)
        if piece is None:
            return [reply(GOOD)]
        return [piece]

    with raw_server(closing(script)) as (url, asked):
        assert ask(url)[0].answer.is_sample
    assert len(asked) == 2


@pytest.mark.parametrize("bad", BAD)
def test_a_server_with_nothing_but_bad_replies_is_one_clear_error(bad):
    with raw_server(closing(lambda *_: [BAD[bad]])) as (url, asked):
        said = failure(url, timeout=1.0)
    assert url in said and len(said) < 700 and len(asked) == 2


@pytest.mark.parametrize("status", ["400 Bad", "401 Unauthorized", "404 Not Found", "500 Oops"])
@pytest.mark.parametrize("bad", ["bytes that are no text", "a number of 5,000 digits", "a deep nesting that ends"])
def test_a_bad_body_of_an_error_is_one_clear_error(status, bad):
    body = BAD[bad].partition(b"\r\n\r\n")[2]
    with raw_server(lambda *_: [reply(body, status=status)]) as (url, _):
        assert status.split()[0] in failure(url)


def closing(script):
    """Close the connection after each reply, as broken servers do."""

    def ended(*seen):
        yield from script(*seen)
        raise OSError("closed")

    return ended


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_list_of_models_says_nothing_against_the_server(bad):
    with raw_server(closing(lambda *_: [BAD[bad]])) as (url, _):
        try:
            check(url, timeout=1.0)
        except LalmError as error:
            assert url in str(error)


@pytest.mark.parametrize(
    "choice",
    [
        {"message": {"content": "sad"}, "finish_reason": [[["stop"]]]},
        {"message": {"content": None, "tool_calls": [{"function": {"arguments": {"a": [1e308] * 9}}}]}},
        {"message": {"content": "sad", "refusal": {"a": 1}}},
        {"message": {"content": "sad"}, "logprobs": {"content": [{"token": [], "top_logprobs": [{"token": {}}]}]}},
        {"message": {"content": [["sad"]]}},
        {"message": "sad"},
        "sad",
        [],
        7,
        None,
    ],
)
def test_a_choice_of_any_form_is_kept_as_an_answer_of_some_kind(choice):
    with scripted_server(lambda *_: (200, {**completion("sad"), "choices": [choice]})) as (url, _):
        (response,) = ask(url)
    assert response.answer.kind and json.loads(response.raw)


def test_one_bad_reply_among_many_ends_no_run(tmp_path):
    utterances, bad = write_tones(tmp_path, 6), iter(BAD.values())

    def script(path, *_):
        return [reply(MODELS)] if "models" in path else [next(bad, None) or reply(GOOD)]

    with raw_server(script) as (url, _), LabelStore(tmp_path / "labels.sqlite") as store:
        client = LalmClient(url, "m", timeout=2.0, max_retries=20)
        gather(client, utterances, store, 1)
        assert sum(summary.counts["label"] for summary in store.queries()) == 6


# Answers of others.

LINE = {"query": "q", "audio": "0" * 64, "k": 0, "kind": "label", "probs": [1, 0], "raw": "{}", "attempts": 1}


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 200_000,
        b'{"k": ' + b"9" * 5000 + b"}",
        b"\xff\xfe",
        b'{"query": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}",
        json.dumps({**LINE, "raw": "[" * 100_000}).encode(),
        json.dumps({**LINE, "raw": "[]"}).encode(),
        json.dumps({**LINE, "usage": {"replaced": "x"}}).encode(),
        json.dumps({**LINE, "usage": {"prompt_tokens": float("nan")}}).encode(),
        json.dumps({**LINE, "usage": {"\ud800": 1}}).encode(),
        json.dumps({**LINE, "raw": '{"text": "\ud800"}'}).encode(),
        json.dumps({**LINE, "utt_id": "\ud800"}).encode(),
        json.dumps({**LINE, "created": 1e300}).encode(),
        json.dumps({**LINE, "created": 10**400}).encode(),
        json.dumps({**LINE, "attempts": 2**63 - 1}).encode(),
        json.dumps({**LINE, "k": 2**63 - 1}).encode(),
    ],
)
@pytest.mark.parametrize("place", [1, 2])
def test_a_hostile_line_of_an_export_is_one_error_with_its_place(tmp_path, line, place):
    query = Query.of(Prompt(("angry", "sad"), "label"), "m", "http://127.0.0.1:9/v1", {"temperature": 1.0})
    with LabelStore(tmp_path / "a.sqlite") as store:
        exchange.export(store, tmp_path / "a.jsonl", [query], show_progress=False)
        header = (tmp_path / "a.jsonl").read_bytes().splitlines()[0]
        line = line.replace(b'"query": "q"', b'"query": "' + query.digest[:16].encode() + b'"')
        (tmp_path / "a.jsonl").write_bytes(b"\n".join(([header] if place == 2 else []) + [line, b""]))
        with pytest.raises(StoreError, match=f"a.jsonl:{place}: "):
            exchange.import_file(tmp_path / "a.jsonl", store, show_progress=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": 5},
        {"prompt": "\ud800"},
        {"model": ["m"]},
        {"model": "\ud800"},
        {"endpoint": {"a": 1}},
        {"base_url": 5},
        {"labels": [1, 2]},
        {"labels": [["a"], ["b"]]},
        {"labels": []},
        {"sampling": [1]},
        {"sampling": None},
        {"sampling": {"a": {"b": float("inf")}}},
    ],
    ids=str,
)
def test_a_hostile_query_of_an_export_is_one_error(tmp_path, changes):
    about = {"prompt_hash": "0" * 64, "labels": ["angry", "sad"], "model": "m", "base_url": "http://127.0.0.1/v1"}
    about |= {"sampling": {"temperature": 1}, "prompt": "p", **changes}
    header = {"format": exchange.FORMAT, "version": exchange.VERSION, "queries": {"0" * 16: about}}
    (tmp_path / "a.jsonl").write_text(f'{json.dumps(header)}\n{{"answers": 0}}\n')
    with LabelStore(tmp_path / "a.sqlite") as store, pytest.raises(StoreError, match=r"a\.jsonl:1: "):
        exchange.import_file(tmp_path / "a.jsonl", store, show_progress=False)


def test_a_line_without_end_is_left_after_few_megabytes(tmp_path, monkeypatch):
    monkeypatch.setattr(exchange, "MAX_LINE_BYTES", 2**20)
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        for _ in range(64):
            file.write(b" " * 2**20)
    with LabelStore(tmp_path / "a.sqlite") as store, pytest.raises(StoreError, match=r"a\.jsonl\.gz:1: a line of more"):
        exchange.import_file(tmp_path / "a.jsonl.gz", store, show_progress=False)


# A label store of somebody else.


@pytest.fixture
def stranger(tmp_path):
    """A store with one sample, to be changed behind its back."""
    query = Query.of(Prompt(("angry", "sad"), "label"), "m", "http://127.0.0.1:9/v1", {"temperature": 1.0})
    path = tmp_path / "stranger.sqlite"
    with LabelStore(path) as store:
        store.put_many(query, [Record("ab" * 32, 0, "u", Response(Answer("distribution", (0.5, 0.5)), "{}"))])
    return path


def changed(path, *statements):
    with contextlib.closing(sqlite3.connect(path)) as database:
        for statement in statements:
            database.execute(statement)
        database.commit()


SCHEMAS = {
    "a trigger": ["CREATE TRIGGER t AFTER INSERT ON answers BEGIN DELETE FROM answers; END"],
    "a view in the place of a table": [
        "ALTER TABLE audio RENAME TO other",
        "CREATE VIEW audio AS WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT * FROM r",
    ],
    "an expression": ["CREATE INDEX i ON answers (length(zeroblob(900000000)))"],
    "a missing table": ["DROP TABLE audio"],
    "a trigger under a name of SQLite's own": [
        "PRAGMA writable_schema = ON",
        "INSERT INTO sqlite_master VALUES ('trigger', 'sqlite_t', 'answers', 0, "
        "'CREATE TRIGGER sqlite_t AFTER INSERT ON answers BEGIN DELETE FROM answers; END')",
    ],
}


@pytest.mark.parametrize("what", SCHEMAS)
@pytest.mark.parametrize("read_only", [True, False])
def test_a_label_store_that_would_run_something_is_refused(stranger, what, read_only):
    # An index by an expression is computed when it is made, and made here without rows.
    changed(stranger, "DELETE FROM answers", *SCHEMAS[what])
    with pytest.raises(StoreError, match=r"stranger\.sqlite: no label store"):
        LabelStore.existing(stranger, read_only)


ROWS = {
    "probabilities beyond 1": "probs = x'0000a0400000a0c0'",
    "probabilities that are no numbers": "probs = x'0000c07f0000c07f'",
    "too few probabilities": "probs = x'0000803f'",
    "half a number": "probs = x'00'",
    "text in place of probabilities": "probs = 'text'",
    "an unknown kind": "kind = 'evil'",
    "more attempts than can be added up": "attempts = 9223372036854775807",
    "a time beyond every calendar": "created = 1e300",
    "bytes in place of an utterance": "utt_id = x'ff'",
    "a reply that is none": "raw = 'text'",
    "usage that is none": "usage = 'text'",
    "usage that is a list": "usage = '[1]'",
    "usage that is no number": """usage = '{"total_tokens": 9e999}'""",
    "a time that is bytes": "created = x'00'",
    "an infinite time": "created = 9e999",
    "a sample index beyond all memory": "k = 2147483647",
    "a sample index below zero": "k = -1",
    "a sample index that is bytes": "k = x'01'",
    "half a sample index": "k = 0.5",
}


@pytest.mark.parametrize("what", ROWS)
def test_a_wrong_answer_in_a_label_store_of_somebody_else_is_merged_nowhere(stranger, tmp_path, what):
    changed(stranger, f"UPDATE answers SET {ROWS[what]}")
    with pytest.raises(StoreError, match=r"stranger\.sqlite"):
        exchange.merge([stranger], tmp_path / "all.sqlite", show_progress=False)
    with LabelStore(tmp_path / "all.sqlite") as store:
        assert store.queries() == []


@pytest.mark.parametrize("what", ROWS)
def test_a_wrong_answer_in_a_label_store_of_somebody_else_is_one_error_of_every_command(
    stranger, tmp_path, what, capsys
):
    changed(stranger, f"UPDATE answers SET {ROWS[what]}")
    manifest = tmp_path / "all.json"
    manifest.write_text('{"u": {"wav": "/nowhere/u.wav", "length": 1, "speaker": "s"}}')
    (tmp_path / "corpus.json").write_text('{"data_root": "/nowhere"}')
    export, report = ["export", tmp_path / "all.jsonl"], ["report", "--manifest", manifest, "--output", tmp_path]
    for command, *others in (["show"], ["check"], export, report):
        status = 0
        try:
            main(["labels", command, str(stranger), *map(str, others)])
        except SystemExit as stopped:
            status = stopped.code
        said = capsys.readouterr().err.splitlines()
        if command == "export":
            assert status == 2
        if status == 2:
            assert [line for line in said if "error" in line] == said[-1:]
    assert not (tmp_path / "all.jsonl").exists()


@pytest.mark.parametrize("what", ["probabilities beyond 1", "half a number", "text in place of probabilities"])
def test_wrong_probabilities_are_never_trained_on(stranger, what):
    changed(stranger, f"UPDATE answers SET {ROWS[what]}")
    with LabelStore.existing(stranger) as store, pytest.raises(StoreError, match=r"stranger\.sqlite: an answer cannot"):
        store.load(store.queries()[0].query, ["ab" * 32], 1)


def test_an_export_that_would_lack_answers_is_an_error(stranger, tmp_path):
    changed(stranger, "UPDATE audio SET sha256 = 'text'")
    with LabelStore.existing(stranger) as store, pytest.raises(StoreError, match="only 0 of 1 answers"):
        exchange.export(store, tmp_path / "all.jsonl", show_progress=False)
    with pytest.raises(StoreError, match="only 0 of 1 answers"):
        exchange.merge([stranger], tmp_path / "all.sqlite", show_progress=False)


def test_a_cache_of_hashes_that_would_run_something_is_made_anew(tmp_path):
    with HashCache.beside(tmp_path / "stranger.sqlite"):
        pass
    endless = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT n AS path, n AS size, "
    endless += "n AS mtime_ns, 'ab' AS sha256, n AS seconds FROM r WHERE n < 0"
    changed(tmp_path / "stranger.sqlite.hashes", "DROP TABLE files", f"CREATE VIEW files AS {endless}")
    (tmp_path / "a.wav").touch()
    with HashCache.beside(tmp_path / "stranger.sqlite") as cache:
        assert cache.get(tmp_path / "a.wav") is None


def test_a_journal_beside_a_label_store_deletes_no_other_file(stranger, tmp_path):
    """SQLite rolls a journal back that lies beside a database, and deletes the journal over several files it names."""
    changed(stranger, "PRAGMA journal_mode = DELETE")
    victim = tmp_path / "victim.txt"
    victim.write_text("precious")
    size = int.from_bytes(stranger.read_bytes()[16:18], "big")
    pages = stranger.stat().st_size // size
    magic = bytes.fromhex("d9d505f920a163d7")
    first = struct.pack(">8s5I", magic, 0, 0, pages, 512, size)
    name = str(victim).encode()
    last = struct.pack(f">I{len(name)}sII8s", 2**30 // size + 1, name, len(name), sum(name), magic)
    (tmp_path / "stranger.sqlite-journal").write_bytes(first.ljust(512, b"\0") + last)
    with pytest.raises(StoreError, match=r"stranger\.sqlite-journal: names another file"):
        LabelStore.existing(stranger, read_only=True)
    assert victim.exists()
    # SQLite alone deletes it, so that this test can fail.
    changed(stranger, "SELECT * FROM answers")
    assert not victim.exists()
