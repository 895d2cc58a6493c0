import base64
import concurrent.futures
import http.client
import io
import json
import math
import socket

import numpy as np
import openai
import pytest
import soundfile
import torch
from lalm_support import LABELS, EnergyRecogniser, tone

from speechbrain_mifuse.errors import UserError
from speechbrain_mifuse.lalm import serve
from speechbrain_mifuse.lalm.collect import encode_wav
from speechbrain_mifuse.lalm.prompt import Prompt
from speechbrain_mifuse.lalm.serve import EmotionServer


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


def test_not_finite_and_endless_audio_are_refused(api, monkeypatch):
    buffer = io.BytesIO()
    soundfile.write(buffer, np.full(100, np.nan), 16000, format="WAV", subtype="FLOAT")
    with pytest.raises(openai.BadRequestError, match="not finite"):
        ask(api, wav=buffer.getvalue())
    monkeypatch.setattr(serve, "MAX_SECONDS", 0.1)
    with pytest.raises(openai.BadRequestError, match="0 s of audio"):
        ask(api)


def test_unknown_model_and_route_are_404_in_openai_shape(api):
    with pytest.raises(openai.NotFoundError, match="mifuse") as caught:
        ask(api, model="other")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="no such route"):
        api.embeddings.create(model="mifuse", input="x")


def raw(server, data):
    host, port = server._http.server_address
    with socket.create_connection((host, port), timeout=5) as connection:
        connection.sendall(data)
        response = http.client.HTTPResponse(connection)
        response.begin()
        return response.status, json.loads(response.read())["error"]


def test_broken_http_gets_a_json_error(server, monkeypatch):
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
    assert raw(server, head + b"Content-Length: 3\r\n\r\n{x}")[0] == 400
    assert raw(server, head + b"Content-Length: 2\r\n\r\n[]")[0] == 400
    assert raw(server, head + b"\r\n")[0] == 411
    assert raw(server, head + b"Content-Length: -5\r\n\r\n")[0] == 411
    assert raw(server, b"BREW /v1/models HTTP/1.1\r\n\r\n")[0] == 501
    monkeypatch.setattr(serve, "MAX_BODY_BYTES", 100)
    status, error = raw(server, head + b"Content-Length: 101\r\n\r\n")
    assert status == 413 and "100 bytes" in error["message"]


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
    port = server._http.server_address[1]
    server.close()
    with pytest.raises(openai.APIConnectionError):
        api.models.list()
    with EmotionServer(EnergyRecogniser(), port=port) as again:
        assert again.base_url == f"http://127.0.0.1:{port}/v1"
        with pytest.raises(UserError, match="--port"):
            EmotionServer(EnergyRecogniser(), port=port)


def test_server_is_silent(api, capfd, caplog):
    ask(api)
    with pytest.raises(openai.NotFoundError):
        ask(api, model="other")
    out, err = capfd.readouterr()
    assert (out, err, caplog.text) == ("", "", "")
