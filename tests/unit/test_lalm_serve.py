import base64
import concurrent.futures
import contextlib
import http.client
import io
import json
import logging
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import openai
import pytest
import soundfile
import torch
from lalm_support import LABELS, EnergyRecogniser, tone

from speechbrain_mifuse.features.extract import ENCODING_THREADS
from speechbrain_mifuse.inference import http_server
from speechbrain_mifuse.inference import server as serve
from speechbrain_mifuse.inference.http_limits import SPARE_DESCRIPTORS, Limits
from speechbrain_mifuse.inference.server import EmotionServer
from speechbrain_mifuse.lalm.collect import encode_wav
from speechbrain_mifuse.lalm.prompt import Prompt
from speechbrain_mifuse.utils.errors import UserError


@pytest.fixture(scope="module")
def recogniser():
    return EnergyRecogniser()


@pytest.fixture(scope="module")
def server(recogniser):
    with EmotionServer(recogniser) as server:
        yield server


@pytest.fixture(scope="module")
def api(server):
    return openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0, timeout=10)


def ask(api, form="distribution", wav=None, **fields):
    prompt = Prompt(LABELS, form)
    data = base64.b64encode(wav if wav is not None else encode_wav(tone(3))).decode()
    fields = {"model": "mifuse", **prompt.request_options(), **fields}
    return api.chat.completions.create(messages=prompt.messages(data), **fields)


def texts(completion):
    return [choice.message.content for choice in completion.choices]


def expected(recogniser, index):
    return recogniser.predict_proba(torch.from_numpy(np.round(tone(index).numpy() * 32768) / 32768).float())[0]


@pytest.mark.parametrize("index", [0, 7])
def test_distribution_follows_the_audio(api, recogniser, index):
    reply = ask(api, wav=encode_wav(tone(index)), temperature=0)
    scores = json.loads(texts(reply)[0])
    assert tuple(scores) == LABELS
    assert list(scores.values()) == pytest.approx(expected(recogniser, index).tolist(), abs=1e-5)


def test_response_format_asks_for_a_distribution_without_the_word(api):
    data = base64.b64encode(encode_wav(tone(3))).decode()
    audio = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    messages = [
        {"role": "system", "content": "Judge emotions."},
        {"role": "user", "content": [audio]},
    ]
    for response_format in (
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "s", "schema": {}}},
    ):
        reply = api.chat.completions.create(model="mifuse", messages=messages, response_format=response_format)
        assert sum(json.loads(texts(reply)[0]).values()) == pytest.approx(1, abs=1e-5)
    assert texts(api.chat.completions.create(model="mifuse", messages=messages))[0] in LABELS


def test_audio_as_a_data_uri_is_heard_like_input_audio(api):
    data = base64.b64encode(encode_wav(tone(3))).decode()
    prompt = Prompt(LABELS)

    def answer(url):
        parts = [{"type": "audio_url", "audio_url": {"url": url}}, {"type": "text", "text": prompt.text()}]
        message = {"role": "user", "content": parts}
        return texts(api.chat.completions.create(model="mifuse", messages=[message], temperature=0))

    assert answer(f"data:audio/wav;base64,{data}") == texts(ask(api, temperature=0))
    for address in ("http://127.0.0.1:1/a.wav", "file:///etc/hostname", data, ""):
        with pytest.raises(openai.BadRequestError, match=r"audio_url\.url: must be a data URI"):
            answer(address)


def test_a_schema_with_one_choice_is_answered_by_one_label(api, recogniser):
    properties = {"emotion": {"type": "string", "enum": list(LABELS)}}
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"properties": properties}}}
    reply = texts(ask(api, "label", temperature=0, response_format=schema))
    assert json.loads(reply[0]) == {"emotion": LABELS[expected(recogniser, 3).argmax()]}


def test_label_at_temperature_zero_is_the_most_likely(api, recogniser):
    reply = ask(api, "label", temperature=0, n=3)
    assert texts(reply) == [LABELS[expected(recogniser, 3).argmax()]] * 3


def test_logprobs_are_the_logarithms_of_the_probabilities(api, recogniser):
    choice = ask(api, "logprobs", temperature=0).choices[0]
    token = choice.logprobs.content[0]
    assert token.token == choice.message.content
    given = {item.token: math.exp(item.logprob) for item in token.top_logprobs}
    wanted = dict(zip(LABELS, expected(recogniser, 3).tolist(), strict=True))
    assert given == pytest.approx(wanted, abs=1e-4)
    assert list(given.values()) == sorted(given.values(), reverse=True)
    assert len(ask(api, "logprobs", top_logprobs=2).choices[0].logprobs.content[0].top_logprobs) == 2


def test_n_choices_differ_and_the_seed_repeats_them(api):
    first = texts(ask(api, n=5, temperature=1, seed=11))
    assert len(set(first)) == 5
    assert texts(ask(api, n=5, temperature=1, seed=11)) == first
    assert texts(ask(api, n=5, temperature=1, seed=99)) != first
    assert texts(ask(api, n=1, temperature=1)) != texts(ask(api, n=1, temperature=1))


def test_choice_j_equals_a_single_request_with_seed_plus_j(api):
    together = texts(ask(api, n=4, temperature=1, seed=5))
    assert together == [texts(ask(api, temperature=1, seed=5 + j))[0] for j in range(4)]


def test_temperature_flattens_the_drawn_labels(api):
    def share_of_mode(temperature):
        labels = texts(ask(api, "label", n=128, temperature=temperature, seed=0))
        return max(map(labels.count, labels)) / len(labels)

    assert share_of_mode(0.05) > share_of_mode(2.0) + 0.1


def test_different_recordings_do_not_share_their_noise():
    class Undecided(EnergyRecogniser):
        def predict_proba(self, waveform, n=1, stochastic=False, seed=None):
            return torch.full((n, 4), 0.25)

    with EmotionServer(Undecided()) as server:
        api = openai.OpenAI(base_url=server.base_url, api_key="none")
        drawn = {texts(ask(api, "label", wav=encode_wav(tone(i)), seed=0))[0] for i in range(30)}
    assert drawn == set(LABELS)


def test_usage_grows_with_the_audio(api):
    short, long = (ask(api, wav=encode_wav(tone(1, seconds))).usage for seconds in (1.0, 3.0))
    assert long.prompt_tokens - short.prompt_tokens == 50
    assert short.prompt_tokens_details.audio_tokens == 25
    assert ask(api, n=3).usage.completion_tokens > ask(api, n=1).usage.completion_tokens > 0


def test_a_format_that_cannot_seek_is_read_from_its_beginning(api):
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(3)[::2].numpy(), 8000, format="WAV", subtype="GSM610")
    near = json.loads(texts(ask(api, wav=buffer.getvalue(), temperature=0))[0])
    exact = json.loads(texts(ask(api, temperature=0))[0])
    assert near == pytest.approx(exact, abs=0.2) and sum(near.values()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG"])
def test_other_formats_rates_and_channels_are_understood(api, form):
    buffer = io.BytesIO()
    samples = np.repeat(torch.nn.functional.interpolate(tone(3)[None, None], scale_factor=3)[0].numpy().T, 2, axis=1)
    soundfile.write(buffer, samples, 48000, format=form)
    near = json.loads(texts(ask(api, wav=buffer.getvalue(), temperature=0))[0])
    exact = json.loads(texts(ask(api, temperature=0))[0])
    assert near == pytest.approx(exact, abs=0.05)


def test_models_are_listed(api):
    assert [model.id for model in api.models.list()] == ["mifuse"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"stream": "no", "wav": b""}, "stream: must be true or false"),
        ({"response_format": {"type": ["json_object"]}}, "type: must be text"),
        ({"n": 0}, "n: "),
        ({"n": 129}, "n: "),
        ({"n": True}, "n: "),
        ({"temperature": -1}, "temperature: "),
        ({"temperature": "hot"}, "temperature: "),
        ({"seed": 1.5}, "seed: "),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: "),
        ({"wav": b"RIFFnonsense"}, "not an audio file"),
        ({"wav": encode_wav(torch.zeros(0))}, "no samples"),
        ({"wav": b""}, "input_audio.data: missing"),
        ({"messages": []}, "input_audio"),
        ({"messages": [{"role": "user", "content": "hello"}]}, "input_audio"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "user", "content": "!" * 100_001}]}, "more than 100000 characters of text"),
        (
            {"response_format": {"json_schema": {"schema": {"properties": {"k" * 201: {"enum": []}}}}}},
            "response_format: a property's name of more than 200",
        ),
        ({"messages": [{"role": 3, "content": "hello"}]}, "role: must be text"),
        ({"messages": [{"role": "user", "content": [{"type": ["text"], "text": "hello"}]}]}, "type: must be text"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": {}}]}]}, "text: must be text"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": 3}]}]}, "input_audio"),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "?"}}]}]},
            "base64",
        ),
    ],
)
def test_wrong_request_is_answered_with_status_400_naming_the_field(api, fields, named):
    fields = dict(fields)
    body = {"messages": fields.pop("messages")} if "messages" in fields else None
    with pytest.raises(openai.BadRequestError, match=named):
        ask(api, **fields, extra_body=body)


def written(samples, rate=16000, **options):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, **{"format": "WAV", **options})
    return buffer.getvalue()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e38, -1e38])
def test_samples_that_are_no_sound_are_refused(api, value):
    with pytest.raises(openai.BadRequestError, match="not finite or far too large"):
        ask(api, wav=written(np.full(100, value), subtype="FLOAT"))


def test_any_rate_of_a_recording_is_resampled_and_others_are_refused(api):
    for rate in (1000, 15999, 44101, 192_000, 1_000_000):
        assert texts(ask(api, wav=written(np.zeros(100), rate)))
    for rate in (999, 1_000_001):
        with pytest.raises(openai.BadRequestError, match=f"a rate of {rate} Hz; must be from 1000 to 1000000 Hz"):
            ask(api, wav=written(np.zeros(100), rate))


def test_recordings_that_would_unfold_beyond_measure_are_refused(api, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(openai.BadRequestError, match="more than 100 samples"):
        patched.setattr(serve, "MAX_SAMPLES", 100)
        ask(api, wav=written(np.zeros((51, 2))))
    # 28 kB that would be ten minutes.
    bomb = written(np.zeros(600 * 16000), format="FLAC")
    assert len(bomb) < 40_000
    with pytest.raises(openai.BadRequestError, match="600 s of audio, more than 120 s"):
        ask(api, wav=bomb)


def test_unknown_model_and_route_are_404_in_openai_shape(api):
    with pytest.raises(openai.NotFoundError, match="mifuse") as caught:
        ask(api, model="other")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="no such route"):
        api.embeddings.create(model="mifuse", input="x")


def connection_to(server):
    return socket.create_connection(server._http.address, timeout=10)


def send(connection, data):
    """Send requests, with the server's address in the place of the host `x`."""
    host, port = connection.getpeername()
    connection.sendall(data.replace(b"Host: x", b"Host: %s:%d" % (host.encode(), port)))


def reply_on(connection):
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.status, response.headers, json.loads(response.read() or "null")


def raw(server, data):
    with connection_to(server) as connection:
        send(connection, data)
        status, _, body = reply_on(connection)
        return status, body["error"]


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def question(index=3, **fields):
    data = base64.b64encode(encode_wav(tone(index))).decode()
    body = {"model": "mifuse", "messages": Prompt(LABELS).messages(data), "temperature": 0, **fields}
    return json.dumps(body).encode()


def posted(body, *headers):
    lines = b"".join(header + b"\r\n" for header in headers)
    return HEAD + lines + b"Content-Length: %d\r\n\r\n" % len(body) + body


def get(server, path, key=None, method="GET"):
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    request = urllib.request.Request(server.base_url.removesuffix("/v1") + path, headers=headers, method=method)
    with urllib.request.urlopen(request, timeout=10) as response:
        return response.status, response.headers, response.read().decode()


def value_of(server, line):
    return float(get(server, "/metrics")[2].split(f"\n{line} ")[1].splitlines()[0])


def test_broken_http_gets_a_json_error(server):
    assert raw(server, HEAD + b"Content-Length: 3\r\n\r\n{x}")[0] == 400
    assert raw(server, HEAD + b"Content-Length: 2\r\n\r\n[]")[0] == 400
    assert raw(server, HEAD + b"\r\n")[0] == 400
    assert raw(server, HEAD + b"Content-Length: -5\r\n\r\n")[0] == 400
    assert raw(server, HEAD + b"Transfer-Encoding: gzip\r\n\r\n")[0] == 400
    assert raw(server, b"BREW /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 400
    with connection_to(server) as connection:
        send(connection, b"GET /v1/models HTTP/2.0\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/2.0 505 ")
    assert "not valid HTTP" in raw(server, b"\x16\x03\x01\x02")[1]["message"]


def test_a_path_with_another_method_is_a_405_that_names_the_right_one(server):
    with connection_to(server) as connection:
        send(connection, b"DELETE /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
        status, headers, _ = reply_on(connection)
    assert (status, headers["Allow"]) == (405, "GET")


def test_head_is_answered_like_get_without_the_body(server):
    status, headers, body = get(server, "/v1/models", method="HEAD")
    assert (status, body, headers["Content-Length"]) == (200, "", str(len(get(server, "/v1/models")[2])))


def test_a_body_beyond_the_limit_is_refused_before_it_is_sent():
    with EmotionServer(EnergyRecogniser(), limits=Limits(max_body_bytes=100)) as server:
        status, error = raw(server, HEAD + b"Content-Length: 101\r\n\r\n")
        assert status == 413 and "100 bytes" in error["message"]
        # More than aiohttp takes for a length.
        assert raw(server, HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n")[0] == 400
        assert value_of(server, 'mifuse_rejected_total{reason="too_large"}') == 1


def test_chunks_and_expect_are_understood_and_the_connection_goes_on(server):
    body = question()
    chunks = b"".join(b"%x;a=b\r\n%s\r\n" % (len(part), part) for part in (body[:7], body[7:5000], body[5000:]))
    with connection_to(server) as connection:
        send(connection, posted(body))
        _, _, plain = reply_on(connection)
        send(connection, HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\nX: y\r\n\r\n")
        status, _, chunked = reply_on(connection)
        assert status == 200 and chunked["choices"] == plain["choices"]
        send(connection, HEAD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body))
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        send(connection, body)
        assert reply_on(connection)[2]["choices"] == plain["choices"]


class Waiting(EnergyRecogniser):
    """Answers when it is told to."""

    def __init__(self):
        super().__init__()
        self.begun, self.go_on = threading.Semaphore(0), threading.Semaphore(0)

    def predict_proba(self, *args, **options):
        self.begun.release()
        assert self.go_on.acquire(timeout=20)
        return super().predict_proba(*args, **options)


# Pages of other sites.


def ask_with(server, *headers, body=None, host=None, path="/v1/models", key=None):
    """Status and headers of a request with such headers; without a host if that is empty."""
    host = server.base_url.split("/")[2] if host is None else host
    lines = [f"Host: {host}"] * bool(host) + [f"Authorization: Bearer {key}"] * (key is not None) + list(headers)
    if body is not None:
        path, lines = "/v1/chat/completions", [*lines, f"Content-Length: {len(body)}"]
    first = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1"
    with connection_to(server) as connection:
        connection.sendall("\r\n".join([first, *lines, "", ""]).encode() + (body or b""))
        status, headers, _ = reply_on(connection)
    assert not [name for name in headers if name.lower().startswith("access-control-")]
    return status, headers


def test_a_name_that_was_bound_to_this_address_reads_nothing(server):
    """DNS rebinding: the page's own name leads here, so the browser takes the reply for one of the page's server."""
    port = server._http.address[1]
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"LOCALHOST:{port}", f"[::1]:{port}"):
        assert ask_with(server, host=host)[0] == 200
    for host in (f"evil.example:{port}", "evil.example", f"localhost.evil.example:{port}", "localhost", "127.0.0.1:1"):
        for path in ("/v1/models", "/metrics", "/health"):
            assert ask_with(server, host=host, path=path)[0] == 421
        assert ask_with(server, "Content-Type: application/json", host=host, body=question())[0] == 421
    for headers in ((), (f"Host: localhost:{port}", f"Host: localhost:{port}"), (f"Host: localhost:{port}, x",)):
        assert ask_with(server, *headers, host="")[0] == 400
    for host in ("a b", "@", "localhost:1234567", "x/y", "user@localhost"):
        assert ask_with(server, host=host)[0] in {400, 421}


def test_a_page_of_another_site_can_ask_nothing(server):
    json_type, host = "Content-Type: application/json", server.base_url.split("/")[2]
    with EmotionServer(EnergyRecogniser(), api_key="a-key") as keyed:
        for origin in ("https://evil.example", "null", "", "http://localhost.evil.example", "http://127.0.0.1@evil"):
            for each, key in ((server, None), (keyed, "a-key")):
                for status, _ in (
                    ask_with(each, f"Origin: {origin}", key=key),
                    ask_with(each, f"Origin: {origin}", json_type, body=question(), key=key),
                ):
                    assert status == 403
        assert ask_with(keyed, f"Origin: http://{host}", key="a-key")[0] == 403
        assert ask_with(keyed, "Origin: https://mine.example", host="mine.example", key="a-key")[0] == 200
    assert ask_with(server, "Sec-Fetch-Site: cross-site")[0] == 403
    assert ask_with(server, "Sec-Fetch-Site: none")[0] == 200
    for origin in ("http://localhost:3000", "http://127.0.0.1", "https://[::1]:1"):
        assert ask_with(server, f"Origin: {origin}", json_type, body=question())[0] == 200


def test_a_form_or_a_text_that_any_page_may_send_is_not_taken(recogniser, server):
    calls = recogniser.calls
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", None):
        assert ask_with(server, *([f"Content-Type: {kind}"] if kind else []), body=question())[0] == 415
    assert recogniser.calls == calls
    assert ask_with(server, "Content-Type: application/json; charset=utf-8", body=question())[0] == 200


def test_with_a_key_any_host_is_answered_as_behind_a_proxy():
    with EmotionServer(EnergyRecogniser(), api_key="a-key") as server:
        assert ask_with(server, host="emotions.example", key="a-key")[0] == 200
        assert ask_with(server, host="emotions.example")[0] == 401
        assert ask_with(server, host="", key="a-key")[0] == 400


# Many requests at a time.


class SideBySide(EnergyRecogniser):
    """Answers several at the same time, as `EmotionRecognizer`, and waits until so many have begun."""

    def __init__(self, together):
        super().__init__()
        self.together = threading.Barrier(together)

    def predict_each(self, waveform, seeds):
        self.together.wait(20)
        rows = [self.predict_proba(waveform, stochastic=seed is not None, seed=seed) for seed in seeds]
        return torch.cat(rows)


def test_requests_that_come_together_are_computed_side_by_side():
    workers = ENCODING_THREADS
    with EmotionServer(SideBySide(workers)) as server:
        api = openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0)
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            jobs = [pool.submit(ask, api, wav=encode_wav(tone(i)), temperature=1, seed=i) for i in range(workers)]
            together = [texts(job.result(30)) for job in jobs]
    with EmotionServer(EnergyRecogniser()) as server:
        api = openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0)
        alone = [texts(ask(api, wav=encode_wav(tone(i)), temperature=1, seed=i)) for i in range(workers)]
    assert together == alone


def test_answers_to_one_recording_follow_each_other():
    class Once(SideBySide):
        at_work = 0

        def predict_each(self, waveform, seeds):
            self.at_work += 1
            assert self.at_work == 1
            time.sleep(0.02)
            self.at_work -= 1
            return super().predict_each(waveform, seeds)

    with EmotionServer(Once(1)) as server:
        api = openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0)
        with concurrent.futures.ThreadPoolExecutor(5) as pool:
            answers = list(pool.map(lambda seed: texts(ask(api, temperature=1, seed=seed))[0], range(5)))
        assert len(set(answers)) == 5 and not server._turns


def test_audio_of_all_requests_together_is_bounded():
    model = Waiting()
    with EmotionServer(model, limits=Limits(max_seconds=0.5)) as server, contextlib.ExitStack() as stack:
        # Of 0.3 s each, where 4 s are taken.
        connections = [stack.enter_context(connection_to(server)) for _ in range(14)]
        for index, connection in enumerate(connections[:13]):
            send(connection, posted(question(index)))
        until = time.monotonic() + 20
        while server._held_seconds < 13 * 0.299 and time.monotonic() < until:
            time.sleep(0.01)
        send(connections[13], posted(question(13)))
        status, headers, body = reply_on(connections[13])
        assert (status, headers["Retry-After"], body["error"]["code"]) == (503, "1", "overloaded")
        assert "more than 4 s of audio" in body["error"]["message"]
        model.go_on.release(13)
        assert {reply_on(connection)[0] for connection in connections[:13]} == {200}
    assert server._held_seconds == pytest.approx(0)


def test_a_request_whose_client_has_gone_is_dropped_before_it_is_computed():
    model = Waiting()
    with EmotionServer(model) as server, connection_to(server) as first:
        send(first, posted(question()))
        assert model.begun.acquire(timeout=10)
        with connection_to(server) as gone:
            send(gone, posted(question(7)))
            until = time.monotonic() + 20
            while len(server._jobs) < 2 and time.monotonic() < until:
                time.sleep(0.01)
        while server._http.in_flight > 1 and time.monotonic() < until:
            time.sleep(0.01)
        assert server._http.in_flight == 1
        model.go_on.release(2)
        assert reply_on(first)[0] == 200
    assert model.calls == 1


def test_connections_leave_room_below_the_limit_of_open_files(caplog):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + SPARE_DESCRIPTORS + 12, before[1]))
        with EmotionServer(EnergyRecogniser()) as server, contextlib.ExitStack() as crowd:
            assert 0 < server._http.max_connections <= 12
            assert "raise it with `ulimit -n`" in caplog.text
            for _ in range(40):
                crowd.enter_context(connection_to(server))
            assert get(server, "/health")[0] == 200
            assert len(server._http.connections) <= 12
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, before[1]))
        with pytest.raises(UserError, match=r"^max_connections: this process may open .* ulimit -n \d+$"):
            EmotionServer(EnergyRecogniser())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


# Limits, key, counters.


def test_requests_beyond_the_limit_are_told_to_come_back_and_the_rest_of_the_server_answers():
    model = Waiting()
    with EmotionServer(model, limits=Limits(max_concurrent=1)) as server, connection_to(server) as first:
        send(first, posted(question()))
        assert model.begun.acquire(timeout=10)
        with connection_to(server) as second:
            send(second, posted(question(7)))
            status, headers, body = reply_on(second)
            assert (status, headers["Retry-After"], body["error"]["code"]) == (503, "1", "overloaded")
            assert get(server, "/health")[2] == '{"status": "ok"}'
            assert value_of(server, "mifuse_in_flight") == 1
            model.go_on.release(2)
            assert reply_on(first)[0] == 200
            send(second, posted(question(7)))
            assert reply_on(second)[0] == 200
        assert value_of(server, 'mifuse_rejected_total{reason="busy"}') == 1
        assert value_of(server, "mifuse_in_flight") == 0


def test_all_bodies_together_are_bounded(monkeypatch):
    monkeypatch.setattr(http_server, "MAX_LARGE_BODIES", 1)
    body = question()
    limits = Limits(max_concurrent=1, max_body_bytes=len(body), read_timeout=20)
    with EmotionServer(EnergyRecogniser(), limits=limits) as server, connection_to(server) as slow:
        send(slow, posted(body)[:-10])
        until = time.monotonic() + 20
        while server._http.body_bytes < len(body) - 10 and time.monotonic() < until:
            time.sleep(0.01)
        status, error = raw(server, posted(body))
        assert (status, error["code"]) == (503, "overloaded")
        send(slow, body[-10:])
        assert reply_on(slow)[0] == 200
        assert server._http.body_bytes == 0


def test_only_whoever_has_the_key_is_heard_and_it_is_told_to_nobody(caplog):
    caplog.set_level(logging.DEBUG)
    key = "s3cret-of-this-test"
    with EmotionServer(EnergyRecogniser(), api_key=key) as server:
        for given in ("s3cret-of-this-tesT", key + "x", key[:-1], ""):
            with pytest.raises(urllib.error.HTTPError) as caught:
                get(server, "/v1/models", given)
            assert (caught.value.code, caught.value.headers["WWW-Authenticate"]) == (401, "Bearer")
            assert key not in caught.value.read().decode()
        for path in ("/v1/models", "/metrics"):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                get(server, path)
        assert raw(server, HEAD + b"Content-Length: 5000\r\n\r\n")[0] == 401
        assert get(server, "/health")[0] == 200
        api = openai.OpenAI(base_url=server.base_url, api_key=key, max_retries=0)
        assert texts(ask(api, "label", temperature=0))[0] in LABELS
        shown = get(server, f"/metrics?key={key}", key)[2]
        assert 'mifuse_rejected_total{reason="key"} 7' in shown
        assert key not in shown + repr(vars(server)) + repr(vars(server._http))
    own = [record.getMessage() for record in caplog.records if record.name.startswith("speechbrain_mifuse")]
    assert own and not [message for message in own if key in message]


@pytest.mark.parametrize("key", ["", " ", "a b", "a\n", "schlüssel"])
def test_a_key_that_no_client_could_send_is_refused_without_showing_it(key):
    with pytest.raises(UserError, match=r"^api_key is set, but to nothing or to something with blanks") as caught:
        EmotionServer(EnergyRecogniser(), api_key=key)
    assert len(key) < 2 or key not in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_concurrent": 0},
        {"max_connections": 32},
        {"max_body_bytes": 0.5},
        {"read_timeout": 0},
        {"idle_timeout": math.nan},
        {"max_seconds": 0},
    ],
)
def test_limits_that_cannot_be_meant_are_refused_by_name(wrong):
    with pytest.raises(UserError, match=f"^{next(iter(wrong))}: "):
        Limits(**wrong)


def test_requests_are_counted_by_route_and_status_with_their_seconds():
    with EmotionServer(EnergyRecogniser()) as server:
        assert raw(server, posted(b"{}"))[0] == 404
        with connection_to(server) as connection:
            send(connection, posted(question()))
            assert reply_on(connection)[0] == 200
        assert raw(server, b"GET /secret/path HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 404
        get(server, "/metrics")
        _, headers, shown = get(server, "/metrics")
        chat = 'mifuse_requests_total{route="/v1/chat/completions",status='
        assert f'{chat}"200"}} 1\n' in shown and f'{chat}"404"}} 1\n' in shown
        assert 'mifuse_requests_total{route="other",status="404"} 1\n' in shown and "secret" not in shown
        assert 'mifuse_requests_total{route="/metrics",status="200"} 1\n' in shown
        assert value_of(server, 'mifuse_request_seconds_sum{route="/v1/chat/completions"}') > 0
        assert value_of(server, 'mifuse_request_seconds_count{route="/v1/chat/completions"}') == 2
        assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
        form = re.compile(r"(# (HELP|TYPE) mifuse_\w+ .+|mifuse_\w+({\w+=\"[^\"]*\"(,\w+=\"[^\"]*\")*})? [0-9.]+)")
        assert all(form.fullmatch(line) for line in shown.splitlines()) and shown.endswith("\n")


def test_failing_recogniser_is_a_500_without_its_details():
    class Broken(EnergyRecogniser):
        def predict_proba(self, *args, **kwargs):
            raise RuntimeError("secret path")

    class NotADistribution(EnergyRecogniser):
        def predict_proba(self, *args, **kwargs):
            return torch.full((1, 4), math.nan)

    for model in (Broken(), NotADistribution()):
        with EmotionServer(model) as server:
            api = openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0)
            with pytest.raises(openai.InternalServerError) as caught:
                ask(api)
            assert "secret" not in str(caught.value)
            assert [model.id for model in api.models.list()] == ["mifuse"]


def test_requests_in_parallel_get_their_own_answers(api):
    wavs = [encode_wav(tone(i)) for i in range(12)]
    alone = [texts(ask(api, wav=wav, temperature=1, seed=1)) for wav in wavs]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda wav: texts(ask(api, wav=wav, temperature=1, seed=1)), wavs))
    assert together == alone


def test_closed_server_ends_kept_alive_connections_and_frees_the_port():
    server = EmotionServer(EnergyRecogniser()).start()
    api = openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0, timeout=5)
    api.models.list()
    port = server._http.address[1]
    server.close()
    with pytest.raises(openai.APIConnectionError):
        api.models.list()
    with EmotionServer(EnergyRecogniser(), port=port) as again:
        assert again.base_url == f"http://127.0.0.1:{port}/v1"
        with pytest.raises(UserError, match="--port"):
            EmotionServer(EnergyRecogniser(), port=port)


def test_closing_with_grace_answers_what_has_begun_and_takes_nothing_new():
    model = Waiting()
    server = EmotionServer(model).start()
    with connection_to(server) as begun, connection_to(server) as arriving, connection_to(server) as idle:
        send(begun, posted(question()))
        assert model.begun.acquire(timeout=10)
        send(arriving, posted(question(7))[:-9])
        send(idle, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert reply_on(idle)[0] == 200
        closing = threading.Thread(target=server.close, args=(20.0,))
        closing.start()
        assert idle.recv(1) == b""
        with pytest.raises(OSError):
            connection_to(server).close()
        model.go_on.release(2)
        send(arriving, posted(question(7))[-9:])
        for connection in (begun, arriving):
            status, headers, _ = reply_on(connection)
            assert (status, headers["Connection"]) == (200, "close")
        closing.join(20)
        assert not closing.is_alive()


@pytest.mark.parametrize("signals", [1, 2])
def test_sigterm_lets_a_request_be_answered_and_a_second_one_does_not(signals, capsys):
    model, outcome = Waiting(), []
    server = EmotionServer(model)

    def client():
        with connection_to(server) as connection:
            send(connection, posted(question()))
            assert model.begun.acquire(timeout=20)
            os.kill(os.getpid(), signal.SIGTERM)
            while not server._http.closing:
                time.sleep(0.01)
            if signals == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                model.go_on.release()
            try:
                outcome.append(reply_on(connection)[0])
            except (OSError, http.client.HTTPException):
                outcome.append(None)
            model.go_on.release()

    before, asking = signal.getsignal(signal.SIGTERM), threading.Thread(target=client)
    asking.start()
    serve.serve_until_stopped(server, 20.0)
    asking.join(20)
    assert outcome == [200 if signals == 1 else None]
    assert signal.getsignal(signal.SIGTERM) is before
    assert "mifuse at http://127.0.0.1" in capsys.readouterr().out


def test_help_of_serve_loads_neither_model_nor_client():
    code = "import sys; from speechbrain_mifuse.cli.main import main\ntry: main(['serve', '--help'])\n"
    code += "except SystemExit: pass\n"
    code += "assert not {'torch', 'numpy', 'speechbrain', 'openai', 'soundfile'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.DEVNULL).returncode == 0


def test_server_is_silent(api, capfd, caplog):
    ask(api)
    with pytest.raises(openai.NotFoundError):
        ask(api, model="other")
    out, err = capfd.readouterr()
    assert (out, err, caplog.text) == ("", "", "")
