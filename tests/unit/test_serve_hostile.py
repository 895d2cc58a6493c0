"""What no client should be able to do to the server: a good question after every attack gets its right answer."""

import base64
import contextlib
import copy
import gzip
import io
import json
import logging
import random
import re
import socket
import struct
import threading
import time

import numpy as np
import pytest
import soundfile
import torch
from lalm_support import LABELS, EnergyRecogniser, tone

from speechbrain_mifuse.inference.http_limits import Limits
from speechbrain_mifuse.inference.server import EmotionServer
from speechbrain_mifuse.lalm.collect import encode_wav
from speechbrain_mifuse.lalm.prompt import Prompt

KEY = "the-key-of-this-test"
LIMITS = Limits(max_concurrent=4, max_connections=24, max_body_bytes=2**18, read_timeout=2.0, idle_timeout=5.0)
# Not a measure of speed: what takes longer hangs.
HANG = 30.0
AUTHORISED = b"Authorization: Bearer " + KEY.encode() + b"\r\n"
JSON = b"Host: x\r\nContent-Type: application/json\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\n" + JSON + AUTHORISED
INSIDES = re.compile(rb'Traceback|File "|\.py|site-packages|0x[0-9a-f]{6}')


class Listener(EnergyRecogniser):
    """Probabilities that are finite for whatever is finite."""

    def predict_proba(self, waveform, n=1, stochastic=False, seed=None):
        if len(waveform) < 2:
            return torch.full((n, len(LABELS)), 1 / len(LABELS))
        return super().predict_proba(waveform, n, stochastic, seed)


@pytest.fixture(scope="module")
def server():
    with EmotionServer(Listener(), limits=LIMITS, api_key=KEY) as server:
        yield server


@pytest.fixture(autouse=True)
def unharmed(server, caplog):
    """After every test: right answers, nothing held, and nothing logged as a failure of the server's own."""
    caplog.set_level(logging.WARNING)
    yield
    assert_right(server)
    until = time.monotonic() + HANG
    while (server._http.in_flight or server._http.body_bytes) and time.monotonic() < until:
        time.sleep(0.01)
    assert (server._http.in_flight, server._http.body_bytes) == (0, 0)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def fields(index=3, **changed):
    data = base64.b64encode(encode_wav(tone(index))).decode()
    prompt = Prompt(LABELS)
    return {"model": "mifuse", "messages": prompt.messages(data), "temperature": 0, "seed": 1, **changed}


def request(body, head=POST):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def audio(content, **changed):
    asked = fields(**changed)
    data = content if isinstance(content, str) else base64.b64encode(content).decode()
    for message in asked["messages"]:
        for part in message["content"] if isinstance(message["content"], list) else ():
            if part["type"] == "input_audio":
                part["input_audio"]["data"] = data
    return request(asked)


def connect(server):
    return socket.create_connection(server._http.address, timeout=HANG)


def talk(server, data, count=1):
    """Send, and return what comes back up to so many replies, or until the other side hangs up, which it always may."""
    received = b""
    with connect(server) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(data)
        while whole_replies(received) < count and (block := connection.recv(2**16)):
            received += block
    return received


def cut_off(server, data):
    """Send, end the sending side, and return the statuses of what comes back until the other side hangs up."""
    received = b""
    with connect(server) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        while block := connection.recv(2**16):
            received += block
    return [status for status, *_ in replies(received)]


def whole_replies(received):
    """Count complete replies."""
    count = 0
    while found := re.match(rb"HTTP/[^\0]*?\r\n\r\n", received):
        length = re.search(rb"Content-Length: (\d+)", found[0])
        end = found.end() + int(length[1] if length else 0)
        if len(received) < end:
            break
        count, received = count + 1, received[end:]
    return count


def replies(received):
    """Status, headers and body of each reply; fails on a byte that belongs to none, and on insides of the server."""
    found = []
    while received:
        head, ended, rest = received.partition(b"\r\n\r\n")
        assert ended, received
        first, *lines = head.decode("ascii").split("\r\n")
        assert re.fullmatch(r"HTTP/\d\.\d [1-5]\d\d [A-Za-z -]+", first), first
        headers = dict(line.split(": ", 1) for line in lines)
        length = int(headers.get("Content-Length", 0))
        body, received = rest[:length], rest[length:]
        assert len(body) == length and not INSIDES.search(body), body
        found.append((int(first.split()[1]), headers, json.loads(body)))
    return found


def only_reply(server, data):
    ((status, headers, body),) = replies(talk(server, data))
    assert ("error" in body) == (status != 200)
    return status, headers, body


def heard(samples):
    """What the listener says of samples at its own rate."""
    return Listener().predict_proba(torch.from_numpy(np.asarray(samples, np.float32)))[0].tolist()


def told(body):
    """Probabilities of an answer."""
    scores = json.loads(body["choices"][0]["message"]["content"])
    assert tuple(scores) == LABELS
    return list(scores.values())


def assert_right(server):
    """Two good questions, of which one ends its connection, have their own right answers."""
    for index, head in ((3, POST), (12, POST + b"Connection: close\r\n")):
        until = time.monotonic() + HANG
        status, headers, body = only_reply(server, request(fields(index), head))
        while status == 503 and time.monotonic() < until:
            # Others are being answered: good clients come back.
            time.sleep(float(headers["Retry-After"]) / 10)
            status, headers, body = only_reply(server, request(fields(index), head))
        assert status == 200, body
        assert told(body) == pytest.approx(heard(samples_of(index)), abs=1e-5)


def samples_of(index):
    return soundfile.read(io.BytesIO(encode_wav(tone(index))), dtype="float32")[0]


def refused(server, data, *statuses):
    status, headers, body = only_reply(server, data)
    assert status in statuses, (status, body, data[:200])
    return headers


# Heads.

LINES = [
    b"",
    b" ",
    b"GET",
    b" GET /health HTTP/1.1",
    b"GET /health HTTP/1.1 ",
    b"GET /health http/1.1",
    b"GET /health HTTP/1",
    b"GET /health HTTP/11.1",
    b"GET /health HTTP/\xb2.1",
    b"GET /he alth HTTP/1.1",
    b"GET /h\x00 HTTP/1.1",
    b"GET /h\xff HTTP/1.1",
    b"GET\t/health\tHTTP/1.1",
    b"G(T /health HTTP/1.1",
    b"GET /health HTTP/1.1\rX: y",
    b"HTTP/1.1 200 OK",
    b"GET /health HTTP/1.1\nX: y",
    b"{}",
]


@pytest.mark.parametrize("line", LINES)
def test_a_bad_request_line_is_refused(server, line):
    refused(server, line + b"\r\nHost: x\r\n\r\n", 400)


def test_other_versions_of_http_are_refused(server):
    for line in (b"GET /health", b"GET /health HTTP/0.9", b"GET /health HTTP/2.0"):
        refused(server, line + b"\r\nHost: x\r\n\r\n", 505)


@pytest.mark.parametrize(
    "header",
    [
        b"no colon",
        b": no name",
        b"X : blank before the colon",
        b" X: folded",
        b"X: y\r\n folded",
        b"X\x00: y",
        b"X: \x00",
        b"X: a\rContent-Length: 3",
        b"X: \x7f",
        b"X\xe9: y",
        b"X: " + b" " * 60000 + b"\x01",
    ],
)
def test_a_malformed_header_is_refused_and_hides_no_other(server, header):
    refused(server, POST + header + b"\r\nContent-Length: 2\r\n\r\n{}", 400)


def test_heads_without_end_are_refused(server):
    refused(server, b"GET /" + b"a" * 2**17 + b" HTTP/1.1\r\n\r\n", 431)
    refused(server, POST + b"X: " + b"a" * 2**17 + b"\r\n\r\n", 431)
    refused(server, POST + b"X: y\r\n" * 2**15 + b"\r\n", 400)


def test_unknown_routes_and_methods_are_refused_in_our_own_words(server):
    random.seed(1)
    last = b"Host: x\r\nConnection: close\r\n\r\n"
    paths = [
        "/",
        "*",
        "/v1",
        "/v1/models/",
        "//v1/models",
        "http://x/v1/models",
        "/v1/models/../../etc/passwd",
        "/%76%31/models",
        "/V1/MODELS",
    ]
    paths += ["/" + "".join(random.choices("abc/.%~;?#&=", k=random.randint(1, 40))) for _ in range(40)]
    for path in paths:
        method = random.choice(["GET", "POST", "HEAD", "PUT", "OPTIONS", "TRACE"])
        received = talk(server, f"{method} {path} HTTP/1.1\r\n".encode() + last)
        # aiohttp makes an address of the path first.
        assert re.match(rb"HTTP/1\.[01] 40[04] ", received), (method, path, received)
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "POST"):
        refused(server, f"{method} /health HTTP/1.1\r\n".encode() + last, 405)
    for method in ("get", "Get", "BREW", "X" * 200, "PRI", "__init__"):
        refused(server, f"{method} /health HTTP/1.1\r\n".encode() + last, 400)


# Keys.


def test_wrong_keys_are_refused_whatever_they_are(server):
    random.seed(2)
    keys = [b"", b" ", KEY[:-1].encode(), KEY.encode() + b"x", KEY.upper().encode(), KEY.encode() + b" " + KEY.encode()]
    keys += [b"\xff" * 50, "clé".encode(), b"a" * 50000, b"None", b"null", b"*", b"%s%n"]
    keys += [bytes(random.choices(range(33, 127), k=len(KEY))) for _ in range(40)]
    for key in keys:
        for scheme in (b"Bearer ", b"bearer  ", b"Basic ", b""):
            head = b"POST /v1/chat/completions HTTP/1.1\r\n" + JSON + b"Authorization: " + scheme + key + b"\r\n"
            refused(server, request(fields(), head), 401 if len(key) < 8000 else 431)
    basic = b"POST /v1/chat/completions HTTP/1.1\r\n" + JSON + b"Authorization: Basic " + KEY.encode() + b"\r\n"
    refused(server, request(fields(), basic), 401)
    refused(server, request(fields(), POST + AUTHORISED), 401)
    refused(server, b"GET /v1/models?key=" + KEY.encode() + b" HTTP/1.1\r\nHost: x\r\n\r\n", 401)


# Lengths and chunks.


@pytest.mark.parametrize(
    ("length", "status"),
    [
        (b"", 400),
        (b"-1", 400),
        (b"+5", 400),
        (b"5.0", 400),
        (b"0x10", 400),
        (b"1e3", 400),
        (b"5 5", 400),
        (b"5, 5", 400),
        (b"\xb2", 400),
        (b"NaN", 400),
        (b"5\r\nContent-Length: 6", 400),
        (b"5\r\nTransfer-Encoding: chunked", 400),
        (str(2**18 + 1).encode(), 413),
        (b"9" * 19, 413),
        (b"9" * 5000, 400),
        (b"0" * 5000 + b"5", 404),  # five bytes all the same
    ],
)
def test_a_wrong_length_is_refused(server, length, status):
    refused(server, POST + b"Content-Length: " + length + b"\r\n\r\n{}   ", status)


HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n"


def test_a_body_without_length_is_empty_and_one_of_a_get_is_no_request(server):
    refused(server, POST + b"Content-Length: 0\r\nConnection: close\r\n\r\n{}", 400)
    last = HEALTH + b"Connection: close\r\n\r\n"
    received = talk(server, POST + b"\r\n" + last, 9)
    assert [status for status, *_ in replies(received)] == [400, 200]
    received = talk(server, HEALTH + b"Content-Length: %d\r\n\r\n" % len(last) + last + last, 9)
    assert [status for status, *_ in replies(received)] == [200, 200]
    for length in (b"Transfer-Encoding: chunked", b"Content-Length: x"):
        received = talk(server, HEALTH + length + b"\r\n\r\n" + last, 9)
        assert [status for status, *_ in replies(received)] in ([400], [200, 400])


def test_a_body_that_is_too_large_is_refused_even_while_it_is_sent(server):
    headers = refused(server, POST + b"Content-Length: %d\r\n\r\n" % 2**22 + b"x" * 2**22, 413)
    assert headers["Connection"] == "close"


def test_a_compressed_body_is_not_unpacked(server):
    refused(server, request(gzip.compress(BODY), POST + b"Content-Encoding: gzip\r\n"), 415)


BODY = json.dumps(fields()).encode()
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


def chunks(body, sizes):
    parts, at = [], 0
    while at < len(body):
        size = next(sizes)
        parts.append(b"%x\r\n%s\r\n" % (len(body[at : at + size]), body[at : at + size]))
        at += size
    return b"".join(parts)


def test_chunks_of_any_size_are_put_together_rightly(server):
    random.seed(3)
    expected = told(only_reply(server, request(BODY))[2])
    for largest in (3, 100, 5000):
        sizes = iter(lambda largest=largest: random.randint(1, largest), 0)
        status, _, body = only_reply(server, CHUNKED + chunks(BODY, sizes) + b"0\r\n\r\n")
        assert (status, told(body)) == (200, expected)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\r\n", 400),
        (b"x\r\n", 400),
        (b"-2\r\n{}\r\n0\r\n\r\n", 400),
        (b"0x2\r\n{}\r\n0\r\n\r\n", 400),
        (b"2\r\n{}0\r\n\r\n", 400),
        (b"1\r\n{}\r\n0\r\n\r\n", 400),
        (b"3\r\n{}\r\n0\r\n\r\n", 400),
        (b"2\n{}\n0\n\n", 400),
        (b"2;\x00\r\n{}\r\n0\r\n\r\n", 400),
        (b"f" * 200 + b"\r\n{}", 400),
        (b"1\r\n \r\n" * 2**19, 413),
        (b"8000\r\n" + (b" " * 2**15 + b"\r\n8000\r\n") * 9, 413),
        (b"2\r\n{}\r\n0\r\n" + b"X: y\r\n" * 2**15, 400),
    ],
)
def test_broken_and_endless_chunks_are_refused(server, data, status):
    refused(server, CHUNKED + data, status)


@pytest.mark.parametrize("data", [b"", b"2\r\n{}\r\n", b"2\r\n{}\r\n0\r\n", b"f" * 12 + b"\r\n{}"])
def test_chunks_that_were_cut_off_are_not_answered(server, data):
    assert 200 not in cut_off(server, CHUNKED + data)


def test_other_codings_are_refused(server):
    for coding in (b"gzip", b"chunked, chunked", b"gzip, chunked", b"identity", b"xchunked", b"", b"chunked\x0b"):
        refused(
            server,
            POST + b"Transfer-Encoding: " + coding + b"\r\n\r\n" + chunks(BODY, iter([2**20])) + b"0\r\n\r\n",
            501,
            400,
        )
    refused(server, CHUNKED.replace(b"HTTP/1.1", b"HTTP/1.0") + b"0\r\n\r\n", 400)


# Damaged bytes.


def test_a_request_that_was_cut_off_is_never_answered_with_a_label(server):
    random.seed(4)
    whole = request(BODY)
    # A whole JSON text that is shorter than announced is cut off, too.
    assert not cut_off(server, POST + b"Content-Length: %d\r\n\r\n" % (len(BODY) + 1) + BODY)
    for length in [1, 10, len(POST) - 1, len(POST), len(whole) - 1, *random.sample(range(1, len(whole)), 60)]:
        assert not cut_off(server, whole[:length])


def test_garbage_is_refused(server):
    random.seed(5)
    for _ in range(150):
        data = random.randbytes(random.choice([1, 3, 50, 1000]))
        statuses = cut_off(server, random.choice([b"", b"GET ", b"POST /v1/chat/completions "]) + data)
        assert set(statuses) <= {400, 431, 505}, data


def test_a_request_with_damaged_bytes_is_refused_or_answered_as_what_it_became(server):
    random.seed(6)
    whole, answered = request(BODY), 0
    start = len(whole) - len(BODY)
    for round_ in range(160):
        damaged = bytearray(whole)
        for _ in range(random.choice([1, 1, 2, 20])):
            # Half of all damage is to the head and to what surrounds the audio.
            place = random.randrange(len(damaged)) if round_ % 2 else random.randrange(start + 60)
            damaged[place] = random.choice([random.randrange(256), damaged[place] ^ 1, 32, 10])
        # Whatever body it may now wait for, this ends it.
        received = talk(server, bytes(damaged) + HEALTH + b"Connection: close\r\n\r\n", 2)
        for status, _, body in replies(received):
            if body == {"status": "ok"}:
                continue
            assert status in {200, 400, 401, 404, 405, 408, 413, 415, 431, 501, 505}, (status, body)
            if status == 200:
                answered += 1
                assert_answers(damaged[start:], body)
    assert answered > 5


def assert_answers(asked, body):
    """The answer is that to this body, where temperature and question survived."""
    became = json.loads(bytes(asked).decode())
    data = [
        part["input_audio"]["data"]
        for message in became["messages"]
        if isinstance(message["content"], list)
        for part in message["content"]
        if part.get("type") == "input_audio"
    ]
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(data[0])), dtype="float32", always_2d=True)
    if became.get("temperature") == 0 and rate == 16000 and "JSON" in str(became["messages"]):
        assert told(body) == pytest.approx(heard(samples.mean(axis=1)), abs=1e-5)


# JSON.

DEEP = 40_000


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"null",
        b"[]",
        b"3",
        b'"text"',
        b"NaN",
        b"{",
        b"{}}",
        b"\xff\xfe",
        b"\xef\xbb\xbf\xef\xbb\xbf{}",
        b'{"model": "mifuse", "messages": Infinity}',
        b'{"model": "mifuse", "seed": ' + b"9" * 100_000 + b"}",
        b"[" * DEEP,
        b"[" * DEEP + b"]" * DEEP,
        b'{"a":' * DEEP + b"1" + b"}" * DEEP,
        b'{"model": "mifuse", "messages": ' + b"[" * 900 + b"]" * 900 + b"}",
        b"[" + b"[]," * 80_000 + b"1]",
        b'{"model": "mifuse", "messages": [' + b"{}," * 30_000 + b"{}]}",
        "{'model': 'mifuse'}".encode("utf-32"),
    ],
    ids=lambda body: repr(body[:20]),
)
def test_json_that_is_no_request_is_refused(server, body):
    refused(server, request(body), 400)


JUNK = [None, True, False, -1, 1.5, 10**400, float("nan"), float("inf"), "", "x", "\ud800", "x" * 5000, [], {}, [[]]]
JUNK += [{"a": []}, [None], ["input_audio"], {"type": ["text"]}]


def places(value, path=()):
    """Paths of everything inside a request."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield (*path, key)
        yield from places(item, (*path, key))


def replaced(value, path, junk):
    changed = copy.deepcopy(value)
    inside = changed
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = junk
    return changed


def test_a_wrong_type_in_any_field_is_refused_or_changes_no_label(server):
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"properties": {"emotion": {}}}}}
    asked = fields(n=1, logprobs=False, top_logprobs=3, stream=False, response_format=schema, stop=None)
    expected = told(only_reply(server, request(asked))[2])
    refusals = 0
    with connect(server) as connection:
        file = connection.makefile("rb")
        for path in places(asked):
            for junk in JUNK:
                connection.sendall(request(replaced(asked, path, junk)))
                status, body = next_reply(file)
                assert status in {200, 400, 404}, (path, junk, body)
                refusals += status != 200
                if status == 200 and path != ("temperature",):
                    message = body["choices"][0]["message"]["content"]
                    label = message if message in LABELS else LABELS[int(np.argmax(told(body)))]
                    assert label == LABELS[int(np.argmax(expected))], (path, junk)
    assert refusals > 200


def next_reply(file):
    """Next reply of a connection that goes on."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = file.readline()
        assert line, "the connection was closed"
        head += line
    length = int(re.search(rb"Content-Length: (\d+)", head)[1])
    ((status, _, body),) = replies(head + file.read(length))
    return status, body


# Audio.


@pytest.mark.parametrize(
    "data",
    ["?", "AAA", "====", "é", "\ud800", "AA AA", "AAAA\n", "data:audio/wav;base64,AAAA", "\x00", "-_-_", "A" * 5],
)
def test_invalid_base64_is_refused(server, data):
    refused(server, audio(data), 400)


def file_of(form, samples=None, rate=16000, **options):
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(3).numpy() if samples is None else samples, rate, format=form, **options)
    return buffer.getvalue()


def wav_with(offset, packed):
    content = file_of("WAV")
    return content[:offset] + packed + content[offset + len(packed) :]


def not_audio():
    yield b"\x89PNG\r\n\x1a\n" + b"\x00" * 100
    yield b"%PDF-1.7\n" + b"x" * 1000
    yield b"<html>RIFF</html>"
    yield b"RIFF"
    yield b"RIFF\xff\xff\xff\xffWAVE"
    yield b"fLaC" + b"\xff" * 100
    yield b"OggS" + b"\x00" * 100
    yield b"ID3" + b"\x7f" * 100
    yield b"\xff\xfb\x90" + b"\x00" * 100
    yield b"FORM\x00\x00\x00\x00AIFF"
    yield wav_with(22, struct.pack("<H", 0))  # no channels
    yield wav_with(24, struct.pack("<I", 0))  # no rate
    yield wav_with(34, struct.pack("<H", 0))  # no bits
    yield wav_with(20, struct.pack("<H", 0x7777))  # no such coding
    yield file_of("WAV", np.zeros(0))
    yield file_of("WAV", np.full(50, np.nan), subtype="FLOAT")
    yield file_of("WAV", np.full((50, 2), 3e38), subtype="FLOAT")
    yield file_of("WAV", np.zeros(50), 999)
    yield file_of("WAV", np.zeros(50), 1_000_001)


@pytest.mark.parametrize("content", not_audio(), ids=lambda content: repr(content[:12]))
def test_what_is_no_audio_is_refused(server, content):
    refused(server, audio(content), 400)


def test_files_that_lie_about_their_size_are_refused_or_heard_as_far_as_they_go(server):
    samples, _ = soundfile.read(io.BytesIO(file_of("WAV")), dtype="float32")
    for content in (wav_with(40, struct.pack("<I", 2**32 - 1)), wav_with(4, struct.pack("<I", 2**32 - 1))):
        status, _, body = only_reply(server, audio(content))
        assert status == 400 or told(body) == pytest.approx(heard(samples), abs=1e-5)
    quiet = file_of("FLAC", np.zeros((16000 * 5, 8)))
    lying = bytearray(quiet)
    lying[21:26] = bytes([lying[21] | 0x0F, 255, 255, 255, 255])  # 2^36 - 1 samples
    refused(server, audio(bytes(lying)), 400)
    assert only_reply(server, audio(quiet))[0] == 200


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG", "MP3", "AIFF", "AU"])
def test_damaged_audio_files_are_refused_or_heard_as_what_they_became(server, form, tmp_path):
    random.seed(form)
    content, heard_of, path = file_of(form), 0, tmp_path / "became"
    with connect(server) as connection:
        file = connection.makefile("rb")
        for _ in range(40):
            damaged = bytearray(content[: random.choice([len(content), random.randrange(1, len(content))])])
            for _ in range(random.choice([0, 1, 3, 30])):
                damaged[random.randrange(min(len(damaged), random.choice([60, 10**6])))] = random.randrange(256)
            connection.sendall(audio(bytes(damaged)))
            status, body = next_reply(file)
            assert status in {200, 400}, body
            if status == 200:
                heard_of += 1
                assert sum(told(body)) == pytest.approx(1, abs=1e-4)
                path.write_bytes(damaged)
                samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
                if rate == 16000 and len(samples) > 1:
                    assert told(body) == pytest.approx(heard(samples.mean(axis=1)), abs=1e-4)
    assert heard_of


# Clients that are slow, many, or gone.


def test_slow_clients_are_dropped_while_others_are_answered(server):
    stopped = threading.Event()

    def drip(data, pause=0.1):
        """Send byte by byte; whether the server hangs up before it is through."""
        with connect(server) as connection:
            connection.settimeout(pause)
            for byte in data:
                try:
                    connection.sendall(bytes([byte]))
                    if connection.recv(2**16) == b"":
                        return outcomes.append("dropped")
                except TimeoutError:
                    pass
                except ConnectionError:
                    return outcomes.append("dropped")
                if stopped.is_set():
                    return outcomes.append("went on")

    outcomes = []
    endless = [b"GET /health", HEALTH + b"X: ", POST, POST + b"Content-Length: 5000\r\n\r\n"]
    endless += [CHUNKED + b"fff\r\n", CHUNKED, b"\r\n\r\n", b"\x47"]
    threads = [threading.Thread(target=drip, args=(start + b"1" * 10_000,)) for start in endless]
    for thread in threads:
        thread.start()
    until = time.monotonic() + HANG
    while any(thread.is_alive() for thread in threads) and time.monotonic() < until:
        assert_right(server)
    stopped.set()
    for thread in threads:
        thread.join(HANG)
    assert outcomes == ["dropped"] * len(endless)


def test_a_later_request_whose_head_does_not_end_is_given_up(server):
    with connect(server) as connection:
        connection.sendall(HEALTH + b"\r\n")
        assert next_reply(connection.makefile("rb"))[0] == 200
        connection.sendall(HEALTH)
        assert connection.recv(1) == b""


@pytest.mark.parametrize("sent", [b"", b"POST /v1", POST + b"Content-Length: 500\r\n\r\n{", CHUNKED + b"5\r\n{"])
def test_a_crowd_of_connections_that_send_no_more_shuts_nobody_out(server, sent):
    with contextlib.ExitStack() as crowd:
        for _ in range(3 * LIMITS.max_connections):
            connection = crowd.enter_context(connect(server))
            with contextlib.suppress(ConnectionError):
                connection.sendall(sent)
        assert_right(server)
        assert len(server._http.connections) <= LIMITS.max_connections
    until = time.monotonic() + HANG
    while (left := len(server._http.connections)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not left


def test_clients_that_vanish_amid_a_request_leave_nothing_behind(server):
    random.seed(7)
    whole = request(BODY)
    for _ in range(60):
        with connect(server) as connection:
            # Closed with a reset instead of an end.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(whole[: random.choice([len(whole), random.randrange(len(whole))])])
        if random.random() < 0.1:
            assert_right(server)


def test_a_client_that_never_reads_its_replies_stops_nobody(server):
    with connect(server) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        deaf.settimeout(0.3)
        with contextlib.suppress(OSError):
            while True:
                deaf.sendall((HEALTH + b"\r\n") * 1000)
        assert_right(server)


def test_a_client_that_goes_on_sending_after_a_refusal_is_hung_up_on(server):
    until, hung_up = time.monotonic() + HANG, False
    with connect(server) as connection:
        connection.sendall(b"\x00")
        while time.monotonic() < until and not hung_up:
            try:
                connection.sendall(b"x" * 2**16)
            except ConnectionError:
                hung_up = True
    assert hung_up


def test_requests_in_one_go_are_answered_in_their_order(server):
    asked = [12, 3, 7, 3]
    data = b"".join(request(fields(index)) + HEALTH + b"\r\n" for index in asked)
    found = replies(talk(server, data, 8))
    assert [status for status, *_ in found] == [200] * 8
    for index, (_, _, body) in zip(asked, found[::2], strict=True):
        assert told(body) == pytest.approx(heard(samples_of(index)), abs=1e-5)


def test_a_flood_of_good_requests_gets_right_answers_or_is_told_to_come_back(server):
    outcomes = []

    def ask(index):
        status, headers, body = only_reply(server, request(fields(index)))
        expected = pytest.approx(heard(samples_of(index)), abs=1e-5)
        right = told(body) == expected if status == 200 else headers["Retry-After"] == "1"
        outcomes.append((status, right))

    # Fewer than the connections that there may be, so that each gets a reply.
    threads = [threading.Thread(target=ask, args=(index,)) for index in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    assert len(outcomes) == 20 and all(right for _, right in outcomes)
    assert {status for status, _ in outcomes} <= {200, 503} and 200 in {status for status, _ in outcomes}


def test_attacks_were_counted(server):
    shown = talk(server, b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + AUTHORISED + b"\r\n").decode()
    assert KEY not in shown
    counted = dict(re.findall(r'mifuse_requests_total{route="/health",status="(\d+)"} (\d+)', shown))
    assert set(counted) <= {"200", "401", "405", "408", "501", "505"}
    routes = set(re.findall(r'route="([^"]*)"', shown))
    assert routes <= {"/health", "/metrics", "/v1/models", "/v1/chat/completions", "other"}
