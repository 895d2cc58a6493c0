import asyncio
import json
import re
import time

import openai
import pytest
from lalm_support import LABELS, EnergyRecogniser, completion, scripted_server, tone

from speechbrain_mifuse.inference.server import EmotionServer
from speechbrain_mifuse.lalm.client import LalmClient, LalmError
from speechbrain_mifuse.lalm.collect import encode_wav
from speechbrain_mifuse.lalm.prompt import Prompt

WAV = encode_wav(tone(3))
KEY = "sk-planted-0123456789"


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def ask(client, form="distribution", n=1, **sampling):
    async def run():
        async with client:
            return await client.ask(Prompt(LABELS, form), WAV, n, **sampling)

    return asyncio.run(run())


def failure(base_url, **options):
    with pytest.raises(LalmError) as caught:
        ask(LalmClient(base_url, "m", **{"max_retries": 0, **options}))
    return caught.value


@pytest.mark.parametrize("form", ["distribution", "label", "logprobs"])
def test_every_form_round_trips_through_a_real_server(form):
    with EmotionServer(EnergyRecogniser()) as server:
        client = LalmClient(server.base_url, "mifuse")
        first = ask(client, form, n=3, temperature=1.0, seed=4)
        again = ask(client, form, n=3, temperature=1.0, seed=4)
    assert [response.answer.kind for response in first] == [form] * 3
    assert all(sum(response.answer.probs) == pytest.approx(1) for response in first)
    assert [response.seed for response in first] == [4, 5, 6]
    assert [r.answer for r in again] == [r.answer for r in first]
    assert first[0].usage["prompt_tokens"] > 0 and first[1].usage is None
    assert first[0].served_model == "mifuse" and first[0].system_fingerprint


def test_server_that_ignores_n_is_asked_again_with_the_next_seed():
    with scripted_server(lambda body, _: (200, completion("angry"))) as (url, requests):
        responses = ask(LalmClient(url, "m"), "label", n=3, seed=10)
    assert [r.seed for r in responses] == [10, 11, 12]
    assert [(body["n"], body["seed"]) for body in requests] == [(3, 10), (2, 11), (1, 12)]
    assert sum(r.usage["prompt_tokens"] for r in responses) == 30


def test_surplus_choices_are_cut():
    with scripted_server(lambda body, _: (200, completion("angry", "sad", "happy"))) as (url, _):
        assert len(ask(LalmClient(url, "m"), "label", n=2)) == 2


def test_sampling_parameters_and_audio_are_sent_and_no_seed_unless_given():
    with scripted_server(lambda body, _: (200, completion("angry"))) as (url, requests):
        ask(LalmClient(url, "m"), "logprobs", temperature=0.3, top_p=0.9)
    body = requests[0]
    assert (body["temperature"], body["top_p"], body["logprobs"], body["top_logprobs"]) == (0.3, 0.9, True, 20)
    assert "seed" not in body
    assert body["messages"][0]["content"][0]["input_audio"]["data"].startswith("UklGR")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_fault_is_retried(status):
    replies = iter([(status, {"error": {"message": "busy"}})] * 2 + [(200, completion("sad"))])
    with scripted_server(lambda *_: next(replies)) as (url, requests):
        assert ask(LalmClient(url, "m", max_retries=2), "label")[0].answer.kind == "label"
    assert len(requests) == 3


@pytest.mark.parametrize(
    ("status", "error", "said", "hopeless"),
    [
        (401, {"message": "bad key"}, "OPENAI_API_KEY", True),
        (403, {"message": "no"}, "may not use", True),
        (404, {"message": "no such model"}, "--lalm_model.*it offers m1, m2", True),
        (429, {"message": "slow down"}, "limits the rate", False),
        (429, {"message": "broke", "code": "insufficient_quota"}, "no credit", True),
        (400, {"message": "audio too short"}, "audio too short", False),
        (500, {"message": "oops"}, "oops", False),
    ],
)
def test_error_names_the_address_and_the_remedy(status, error, said, hopeless):
    with scripted_server(lambda *_: (status, {"error": error}), models=("m1", "m2")) as (url, _):
        caught = failure(url)
    assert url in str(caught) and "--lalm_base_url" in str(caught)
    assert re.search(said, str(caught))
    assert caught.hopeless is hopeless


@pytest.mark.parametrize("status", [400, 404, 422, 500, 503])
@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "the reason is here"}},
        {"error": "the reason is here"},
        [{"error": {"code": 400, "message": "the reason is here", "status": "INVALID_ARGUMENT"}}],
        {"detail": "the reason is here"},
        {"detail": [{"loc": ["body", "n"], "msg": "the reason is here", "type": "value_error"}]},
        {"object": "error", "message": "the reason is here", "type": "BadRequestError", "code": 400},
        {"errors": [{"message": "the reason is here"}]},
        {"code": "InvalidParameter", "msg": "the reason is here"},
        {"error": {"code": "the reason is here"}},
        b"the reason\n is   here",
        b'"the reason is here"',
        b"<html><head><style>h1 {color: red}</style></head><body><h1>the reason is here</h1></body></html>",
    ],
)
def test_message_of_the_server_is_quoted_in_one_line_whatever_the_form_of_its_error(status, body):
    with scripted_server(lambda *_: (status, body)) as (url, _):
        caught = failure(url)
    assert "the reason is here" in str(caught) and str(caught).count("\n") == 0
    assert str(status) in str(caught) and caught.status == status and "color" not in str(caught)


@pytest.mark.parametrize("body", [b"x" * 100_000, b"[" * 100_000, {"error": [[[[[[[["deep"]]]]]]]]}, b"", {}, []])
def test_error_with_a_body_that_says_nothing_is_still_one_short_line(body):
    with scripted_server(lambda *_: (400, body)) as (url, _):
        caught = str(failure(url))
    assert len(caught) < 600 and caught.count("\n") == 0 and "400" in caught


def test_key_in_any_error_body_is_redacted_before_the_body_is_cut(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    bodies = [f"{'x' * place}{KEY}".encode() for place in (280, 290, 2990)]
    bodies += [
        f"<p>{' ' * 2970}{KEY}".encode(),
        json.dumps([{"detail": KEY}]).encode(),
        json.dumps({"x": KEY}).encode(),
    ]
    for status in (200, 400):
        for body in bodies:
            with scripted_server(lambda *_, status=status, body=body: (status, body)) as (url, _):
                assert KEY[:12] not in str(failure(url))


@pytest.mark.parametrize(
    ("error", "status", "asked"),
    [
        ({"error": {"message": "busy", "code": 429}}, 429, 3),
        ({"error": {"message": "busy", "code": "502"}}, 502, 3),
        ({"error": {"message": "busy", "status": "RESOURCE_EXHAUSTED"}}, 429, 3),
        ({"error": {"message": "busy", "type": "overloaded_error"}}, 503, 3),
        ([{"error": {"message": "busy", "code": 503}}], 503, 3),
        ({"error": {"message": "busy"}}, None, 3),
        ({"error": "busy"}, None, 3),
        ({"error": {"message": "busy", "code": 400}}, 400, 1),
        ({"object": "error", "message": "busy", "type": "NotFoundError", "code": 404}, 404, 1),
        ({"error": {"message": "busy", "type": "invalid_request_error"}}, 400, 1),
        ({"error": {"message": "busy", "code": "insufficient_quota"}}, 429, 1),
        ({"error": {"message": "busy", "code": "invalid_api_key"}}, 401, 1),
        (b'data: {"error": {"message": "busy", "code": 400}}\n\n', 400, 1),
    ],
)
def test_error_in_a_reply_with_status_200_counts_as_that_error(error, status, asked, monkeypatch):
    monkeypatch.setattr("speechbrain_mifuse.lalm.client._FIRST_BACKOFF", 0.01)
    with scripted_server(lambda *_: (200, error)) as (url, requests):
        caught = failure(url, max_retries=2)
    assert "busy" in str(caught) and caught.status == status and len(requests) == asked


def test_error_beside_choices_is_no_error():
    with scripted_server(lambda *_: (200, {**completion("sad"), "error": None, "code": 0})) as (url, _):
        assert ask(LalmClient(url, "m"), "label")[0].answer.is_sample


def test_filter_in_a_reply_with_status_200_is_a_refusal():
    with scripted_server(lambda *_: (200, {"error": {"message": "blocked", "code": "content_filter"}})) as (url, _):
        assert ask(LalmClient(url, "m"))[0].answer.kind == "refusal"


@pytest.mark.parametrize("beginning", ["", ": waiting\n\n", "event: message\nid: 1\n"])
def test_stream_that_was_not_asked_for_is_named(beginning):
    stream = f'{beginning}data: {{"choices": [{{"delta": {{"content": "sad"}}}}]}}\n\ndata: [DONE]\n\n'
    with scripted_server(lambda *_: (200, stream.encode())) as (url, _):
        assert re.search(r"stream of events.*stream: false", str(failure(url)))


@pytest.mark.parametrize(
    "body", [b"<html>hello</html>", b"", {"object": "error"}, {"choices": []}, {"choices": None}, b"[1, 2]", b"null"]
)
def test_body_that_is_no_completion_is_one_clear_error(body):
    with scripted_server(lambda *_: (200, body)) as (url, _):
        assert "--lalm_base_url" in str(failure(url))


@pytest.mark.parametrize("choice", [{}, {"message": None}, {"message": {}}, {"message": {"content": [{"x": 1}]}}])
def test_choice_without_content_is_invalid(choice):
    with scripted_server(lambda *_: (200, {"choices": [choice]})) as (url, _):
        assert ask(LalmClient(url, "m"))[0].answer.kind == "invalid"


def test_content_in_parts_is_joined():
    with scripted_server(lambda *_: (200, completion([{"type": "text", "text": "sad"}]))) as (url, _):
        assert ask(LalmClient(url, "m"), "label")[0].answer.kind == "label"


def test_request_blocked_by_a_content_filter_is_a_refusal():
    error = {"error": {"message": "blocked", "code": "content_filter"}}
    with scripted_server(lambda *_: (400, error)) as (url, _):
        responses = ask(LalmClient(url, "m"), n=2)
    assert [r.answer.kind for r in responses] == ["refusal", "refusal"]


def test_server_that_is_down_is_named_at_once():
    start = time.perf_counter()
    with pytest.raises(LalmError, match=r"127\.0\.0\.1:9/v1.*server running"):
        asyncio.run(LalmClient("http://127.0.0.1:9/v1", "m").check())
    assert time.perf_counter() - start < 30


def test_check_passes_without_a_list_of_models_but_not_with_a_refused_key(monkeypatch):
    with EmotionServer(EnergyRecogniser()) as server:
        asyncio.run(LalmClient(server.base_url.replace("/v1", "/other"), "mifuse").check())
    with pytest.raises(LalmError, match="set the environment variable OPENAI_API_KEY"):
        asyncio.run(LalmClient("https://api.example.org/v1", "m").check())


def test_slow_server_runs_into_the_deadline():
    def slow(*_):
        time.sleep(0.5)
        return 200, completion("sad")

    with scripted_server(slow) as (url, _):
        assert "0.1 s" in str(failure(url, deadline=0.1))
        assert "0.05 s" in str(failure(url, timeout=0.05))


def test_one_client_serves_several_event_loops():
    with EmotionServer(EnergyRecogniser()) as server:
        client, prompt = LalmClient(server.base_url, "mifuse"), Prompt(LABELS)
        for _ in range(3):
            assert asyncio.run(client.ask(prompt, WAV))[0].answer.is_sample


def test_key_is_sent_but_never_repeated(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    seen = []

    def echo(body, headers):
        seen.append(headers["Authorization"])
        return 200, completion(f"{headers['Authorization']}", refusal=None, model=KEY)

    def reject(body, headers):
        return 401, {"error": {"message": f"key {headers['Authorization']} is wrong"}}

    with scripted_server(echo) as (url, _):
        client = LalmClient(url, "m")
        response = ask(client)[0]
    with scripted_server(reject) as (url, _):
        error = failure(url)
    assert seen == [f"Bearer {KEY}"]
    assert KEY not in repr(response) + str(error) + repr(error) + repr(client) + repr(vars(client))
    assert error.__cause__ is None and error.__suppress_context__


def test_base_url_falls_back_to_the_environment(monkeypatch):
    assert LalmClient(None, "m").base_url == "https://api.openai.com/v1"
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:7/v1/")
    assert LalmClient(None, "m").base_url == "http://127.0.0.1:7/v1"


def test_proxy_from_the_environment_is_not_used_on_this_machine(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    with EmotionServer(EnergyRecogniser()) as server:
        with pytest.raises(openai.APIConnectionError):
            openai.OpenAI(base_url=server.base_url, api_key="x", max_retries=0).models.list()
        assert ask(LalmClient(server.base_url, "mifuse", max_retries=0))[0].answer.is_sample


def test_plain_http_to_another_machine_is_warned_of(monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret-0123456789")

    async def connect(base_url):
        await LalmClient(base_url, "m").connection().close()

    for base_url in ("https://far.example/v1", "http://127.0.0.1:9/v1"):
        asyncio.run(connect(base_url))
    assert not caplog.records
    asyncio.run(connect("http://far.example/v1"))
    (record,) = caplog.records
    assert "http://far.example/v1: plain http" in record.getMessage() and "secret" not in record.getMessage()
