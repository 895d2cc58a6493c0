"""An emotion recogniser behind an OpenAI-compatible chat-completions API: audio in, label or distribution out.

The form of the reply follows the request: `logprobs: true` gives a label with the log-probabilities of its token;
otherwise a `response_format` whose schema has a single property with an `enum` gives a JSON object with a label;
otherwise a `response_format` of a JSON type, or the word "JSON" in the text, gives a JSON object of probabilities;
otherwise the reply is a single label. Audio is taken as `input_audio`, or as `audio_url` with a data URI.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import math
import re
import secrets
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import soundfile
import torch

from speechbrain_mifuse import __version__
from speechbrain_mifuse.inference.http_limits import Limits, checked_key
from speechbrain_mifuse.inference.http_server import HttpServer, RequestError, Route, overloaded
from speechbrain_mifuse.inference.recognizer import one_core_threads
from speechbrain_mifuse.utils.audio import HIGHEST_RATE, LOUDEST, LOWEST_RATE, resampled
from speechbrain_mifuse.utils.errors import UserError, terminated_like_ctrl_c

# Samples of all channels together that are decoded: a small FLAC file may hold very many of silence.
MAX_SAMPLES = 2**24
# Audio of all requests together, in recordings of the longest duration.
MAX_LONG_RECORDINGS = 8
# Characters of text in a request.
MAX_TEXT = 100_000
MAX_CHOICES = 128
# Characters of the key of a JSON object that is asked for.
MAX_LABEL_KEY = 200
# A request of the largest size may hold so many values at most: empty lists take thirty times their text.
MAX_VALUES = 2**16
KEY_VARIABLE = "MIFUSE_SERVE_KEY"
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
DEFAULT_LIMITS = Limits()
AUDIO_TOKENS_PER_SECOND = 25
_JSON_FORMATS = {"json_object", "json_schema"}

logger = logging.getLogger(__name__)
logger.addHandler(logging.NullHandler())


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """A validated request."""

    waveform: torch.Tensor
    seconds: float
    recording: bytes
    text: str
    n: int
    temperature: float
    seed: int | None
    top_logprobs: int | None
    wants_json: bool
    label_key: str | None = None


class EmotionServer:
    """Serve a recogniser as a chat model, from a background thread, until closed.

    Choice j of a request with seed s equals the choice of a request with seed s + j for the same recording, so asking
    five times for one answer and once for five is the same. At temperature 0 the prediction is deterministic; above,
    it is one stochastic pass of the recogniser, and where a single label is given, that label is drawn from
    softmax(log p / temperature).

    A request that comes alone is computed on all cores, and requests that come together side by side on one core each:
    their replies are the same.

    Parameters
    ----------
    recogniser : EmotionRecognizer or the like
        The model: `labels`, `sample_rate`, and `predict_proba(waveform, n, stochastic, seed)`, or a `predict_each` that
        threads may call at the same time.
    model_name : str
        Name that requests must give.
    host : str
        Address to listen on; other machines reach the server only if this is changed, and only `api_key` protects it
        then.
    port : int
        0 takes a free one.
    limits : Limits
        What clients may take up.
    api_key : str, optional
        What clients must send as ``Authorization: Bearer ...``, except to ``/health``. Only its digest is kept.

    Raises
    ------
    UserError
        If the address cannot be listened on, or the key cannot be sent.

    Example
    -------
    >>> class Undecided:
    ...     labels, sample_rate = ("angry", "sad"), 16000
    ...     def predict_proba(self, waveform, n=1, stochastic=False, seed=None):
    ...         return torch.full((n, 2), 0.5)
    >>> import urllib.request
    >>> with EmotionServer(Undecided()) as server:
    ...     listing = json.load(urllib.request.urlopen(server.base_url + "/models"))
    >>> listing["data"][0]["id"]
    'mifuse'
    """

    def __init__(
        self,
        recogniser,
        model_name: str = "mifuse",
        host: str = "127.0.0.1",
        port: int = 0,
        limits: Limits = DEFAULT_LIMITS,
        api_key: str | None = None,
    ):
        self.recogniser = recogniser
        self.model_name = model_name
        self.limits = limits
        self._model_lock = threading.Lock()
        self._resources = contextlib.ExitStack()
        self._jobs: set[Future] = set()
        # Seconds of audio that requests hold.
        self._held_seconds = 0.0
        # Answers to one recording follow each other: the recogniser remembers what it computed for the first one.
        self._turns: weakref.WeakValueDictionary[bytes, asyncio.Lock] = weakref.WeakValueDictionary()
        routes = {
            "/v1/chat/completions": Route("POST", self._completion),
            "/v1/models": Route("GET", self._models),
            "/health": Route("GET", self._health, public=True),
            "/metrics": Route("GET", self._metrics, METRICS_TYPE),
        }
        key = checked_key(api_key, "api_key")
        try:
            self._http = HttpServer((host, port), routes, limits, key)
        except (OSError, OverflowError) as error:
            raise UserError(f"cannot listen on {host}:{port} ({error}): choose another --host or --port") from None

    def __enter__(self) -> EmotionServer:
        return self.start()

    def __exit__(self, *_):
        self.close()

    @property
    def base_url(self) -> str:
        """Address to give to a client, ending in ``/v1``."""
        host, port = self._http.address
        return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"

    def start(self) -> EmotionServer:
        """Begin to answer; returns the server itself."""
        self._all_cores = self._resources.enter_context(ThreadPoolExecutor(1))
        self._one_core = self._resources.enter_context(one_core_threads())
        self._http.start()
        return self

    def close(self, grace: float = 0.0):
        """Take no more connections, free the port, let requests that have begun be answered, drop the others.

        Parameters
        ----------
        grace : float
            Seconds for those requests.
        """
        self._http.close(grace)
        for job in list(self._jobs):
            job.cancel()
        self._resources.close()

    async def _models(self, _) -> bytes:
        entry = {"id": self.model_name, "object": "model", "created": 0, "owned_by": "speechbrain-mifuse"}
        return json.dumps({"object": "list", "data": [entry]}).encode()

    async def _health(self, _) -> bytes:
        return b'{"status": "ok"}'

    async def _metrics(self, _) -> bytes:
        return self._http.metrics_text().encode()

    async def _completion(self, body: bytearray) -> bytes:
        request = await self._computed(lambda: self._parsed(body), True)
        most = MAX_LONG_RECORDINGS * self.limits.max_seconds
        if self._held_seconds + request.seconds > most:
            raise overloaded(f"requests with more than {most:.0f} s of audio are being answered")
        self._held_seconds += request.seconds
        try:
            async with self._turns.setdefault(request.recording, asyncio.Lock()):
                each = hasattr(self.recogniser, "predict_each")
                return await self._computed(lambda: json.dumps(self._answer(request)).encode(), each)
        finally:
            self._held_seconds -= request.seconds

    async def _computed(self, function: Callable, side_by_side: bool):
        """Call a function in a thread: on all cores, or on one if others are at work and it may run beside them."""
        job = (self._one_core if self._jobs and side_by_side else self._all_cores).submit(function)
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)
        return await asyncio.wrap_future(job)

    def _parsed(self, body: bytearray) -> ChatRequest:
        return _parse(_decoded(body), self.model_name, self.recogniser.sample_rate, self.limits.max_seconds)

    def _answer(self, request: ChatRequest) -> dict:
        choices = [{"index": j, **choice} for j, choice in enumerate(self._choices(request))]
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.model_name,
            "system_fingerprint": f"speechbrain-mifuse-{__version__}",
            "choices": choices,
            "usage": _usage(request, choices),
        }

    def _choices(self, request: ChatRequest) -> list[dict]:
        labels = tuple(self.recogniser.labels)
        first = secrets.randbits(62) if request.seed is None else request.seed
        seeds = [_mixed_seed(first + j, request.recording) for j in range(request.n)]
        if request.temperature > 0:
            probs = self._probs(request.waveform, seeds)
        else:
            probs = self._probs(request.waveform, [None]) * request.n
        return [_form_reply(each, labels, request, seed) for each, seed in zip(probs, seeds, strict=True)]

    def _probs(self, waveform: torch.Tensor, seeds: Sequence[int | None]) -> list[np.ndarray]:
        probs = self._predicted(waveform, seeds).double().cpu().numpy()
        for each in probs:
            if not np.isfinite(each).all() or each.min() < 0 or not math.isclose(each.sum(), 1.0, abs_tol=1e-3):
                raise RuntimeError(f"the recogniser returned {each.tolist()}, which is no distribution")
        return list(probs)

    def _predicted(self, waveform: torch.Tensor, seeds: Sequence[int | None]) -> torch.Tensor:
        if hasattr(self.recogniser, "predict_each"):
            return self.recogniser.predict_each(waveform, seeds)
        with self._model_lock, torch.inference_mode():
            predict = self.recogniser.predict_proba
            return torch.cat([predict(waveform, n=1, stochastic=seed is not None, seed=seed) for seed in seeds])


def serve_until_stopped(server: EmotionServer, grace: float = 10.0) -> None:
    """Serve until SIGTERM or Ctrl-C; for the main thread.

    Parameters
    ----------
    server : EmotionServer
        Not started yet.
    grace : float
        Seconds that requests which have begun get to their end.
    """
    with terminated_like_ctrl_c():
        try:
            print(f"{server.model_name} at {server.base_url}; Ctrl-C stops it", flush=True)
            server.start()
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            print(f"stopping; requests that have begun get {grace:g} s", flush=True)
        try:
            server.close(grace)
        except KeyboardInterrupt:
            server.close()


def _decoded(body: bytes | bytearray) -> object:
    """Decode JSON, unless it would take up far more memory than its text."""
    if sum(body.count(mark) for mark in (b"[", b"{", b",")) > MAX_VALUES:
        raise RequestError(f"the body holds more than {MAX_VALUES} values")
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise RequestError("the body is not valid JSON") from None


def _parse(body: object, model_name: str, sample_rate: int, max_seconds: float) -> ChatRequest:
    """Validate the body of a chat completion and decode its audio."""
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object")
    if body.get("model") != model_name:
        message = f"the model {_shown(body.get('model'))} does not exist; this server offers {model_name!r}"
        raise RequestError(message, 404, "model_not_found")
    if _typed(body, "stream", bool):
        raise RequestError("stream: not supported, leave it out")
    parts = _parts(body.get("messages"))
    text = "\n".join(_typed(part, "text", str) or "" for part in parts if part.get("type") == "text")
    if len(text) > MAX_TEXT:
        raise RequestError(f"messages: more than {MAX_TEXT} characters of text")
    top = _field(body, "top_logprobs", 0, int, 0, 20)
    response_format = _typed(body, "response_format", dict) or {}
    wants_json = _typed(response_format, "type", str) in _JSON_FORMATS or "json" in text.lower()
    options = {
        "n": _field(body, "n", 1, int, 1, MAX_CHOICES),
        "temperature": _field(body, "temperature", 1.0, (int, float), 0.0, 2.0),
        "seed": _field(body, "seed", None, int, -(2**63), 2**63 - 1),
        "top_logprobs": top if _typed(body, "logprobs", bool) else None,
        "wants_json": wants_json,
        "label_key": _label_key(response_format),
    }
    # Last, because it is what costs.
    waveform, seconds = _decode_audio(_audio_data(parts), sample_rate, max_seconds)
    recording = hashlib.sha256(waveform.numpy().tobytes()).digest()
    return ChatRequest(waveform=waveform, seconds=seconds, recording=recording, text=text, **options)


def _decode_audio(data: str, sample_rate: int, max_seconds: float) -> tuple[torch.Tensor, float]:
    """Decode a recording sent in base64."""
    try:
        content = base64.b64decode(data, validate=True)
    except ValueError:
        raise RequestError("input_audio.data: not valid base64") from None
    try:
        with soundfile.SoundFile(_Seekable(content)) as file:
            rate = file.samplerate
            _check_size(file, max_seconds)
            # Without a number, soundfile refuses formats that cannot seek, such as GSM.
            samples = file.read(file.frames, dtype="float32", always_2d=True)
    except (RuntimeError, OSError):
        raise RequestError("input_audio.data: not an audio file that can be decoded") from None
    if len(samples) == 0 or not max(samples.max(), -samples.min()) <= LOUDEST:
        raise RequestError("input_audio.data: holds no samples, or samples that are not finite or far too large")
    waveform = torch.from_numpy(samples.mean(axis=1))
    return resampled(waveform, rate, sample_rate), len(samples) / rate


class _Seekable(io.BytesIO):
    """A file in memory for libsndfile, through which no exception of Python's can pass."""

    def seek(self, offset: int, whence: int = 0) -> int:
        # Damaged files make it seek to before the beginning.
        return super().seek(offset, whence) if whence or offset >= 0 else self.tell()


def _check_size(file: soundfile.SoundFile, max_seconds: float) -> None:
    """Refuse by its header a recording that would cost far more than its file."""
    rate, seconds = file.samplerate, file.frames / file.samplerate
    if not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise RequestError(f"input_audio: a rate of {rate} Hz; must be from {LOWEST_RATE} to {HIGHEST_RATE} Hz")
    if seconds > max_seconds:
        raise RequestError(f"input_audio: {seconds:.0f} s of audio, more than {max_seconds:g} s")
    if file.frames * file.channels > MAX_SAMPLES:
        raise RequestError(f"input_audio: more than {MAX_SAMPLES} samples in all channels together")


def _parts(messages: object) -> list[dict]:
    """All content parts of all messages; plain text counts as one text part."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise RequestError("messages: must be a list of objects")
    parts: list[dict] = []
    for message in messages:
        _typed(message, "role", str)
        content = message.get("content")
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
            raise RequestError("messages: content must be text or a list of parts")
        for part in content:
            _typed(part, "type", str)
        parts += content
    return parts


def _audio_data(parts: list[dict]) -> str:
    audios = [part for part in parts if part.get("type") in ("input_audio", "audio_url")]
    if len(audios) != 1:
        number = "more than one" if audios else "no"
        raise RequestError(f"messages: {number} part of type input_audio or audio_url")
    kind = audios[0]["type"]
    content = audios[0].get(kind)
    content = content if isinstance(content, dict) else {}
    if kind == "audio_url":
        # An address to fetch from would let a request make this server open connections.
        head, _, data = str(content.get("url")).partition(";base64,")
        if not head.startswith("data:") or not data:
            raise RequestError("audio_url.url: must be a data URI in base64")
        return data
    data = content.get("data")
    if not isinstance(data, str) or not data:
        raise RequestError("input_audio.data: missing")
    return data


def _typed(owner: dict, name: str, kind: type):
    value = owner.get(name)
    if value is not None and not isinstance(value, kind):
        raise RequestError(f"{name}: must be {_KINDS[kind]}")
    return value


_KINDS = {str: "text", bool: "true or false", dict: "an object"}


def _shown(value: object) -> str:
    return repr(value)[:100] if isinstance(value, str) else f"of type {type(value).__name__}"


def _field(body: dict, name: str, default, kind, low, high):
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        raise RequestError(f"{name}: must be a number from {low} to {high}")
    return value


def _label_key(response_format: dict) -> str | None:
    """Key of a schema's only property, if that is a choice."""
    schema: object = response_format
    for name in ("json_schema", "schema", "properties"):
        schema = schema.get(name) if isinstance(schema, dict) else None
    if not isinstance(schema, dict) or len(schema) != 1:
        return None
    ((key, value),) = schema.items()
    if len(key) > MAX_LABEL_KEY:  # every choice repeats it
        raise RequestError(f"response_format: a property's name of more than {MAX_LABEL_KEY} characters")
    return key if isinstance(value, dict) and "enum" in value else None


def _mixed_seed(seed: int, recording: bytes) -> int:
    """Make a seed that also depends on the recording."""
    digest = hashlib.sha256(str(seed).encode() + b":" + recording).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _form_reply(probs: np.ndarray, labels: tuple[str, ...], request: ChatRequest, seed: int) -> dict:
    """Answer in the form that the module's docstring describes."""
    if request.top_logprobs is not None:
        return _logprobs_choice(probs, labels, request, seed)
    if request.label_key is None and request.wants_json:
        scores = {label: round(float(p), 6) for label, p in zip(labels, probs, strict=True)}
        return _choice(json.dumps(scores, ensure_ascii=False))
    label = labels[_draw(probs, request.temperature, seed)]
    if request.label_key is None:
        return _choice(label)
    return _choice(json.dumps({request.label_key: label}, ensure_ascii=False))


def _logprobs_choice(probs: np.ndarray, labels: tuple[str, ...], request: ChatRequest, seed: int) -> dict:
    chosen = _draw(probs, request.temperature, seed)
    tokens = [_token(label, p) for label, p in zip(labels, probs, strict=True)]
    ranked = sorted(tokens, key=lambda token: -token["logprob"])[: request.top_logprobs]
    return _choice(labels[chosen], {"content": [{**tokens[chosen], "top_logprobs": ranked}], "refusal": None})


def _choice(text: str, logprobs: dict | None = None) -> dict:
    message = {"role": "assistant", "content": text, "refusal": None}
    return {"message": message, "logprobs": logprobs, "finish_reason": "stop"}


def _token(label: str, p: float) -> dict:
    # OpenAI's floor for a probability of zero, which JSON could not hold as a logarithm.
    logprob = math.log(p) if p > 0 else -9999.0
    return {"token": label, "logprob": logprob, "bytes": list(label.encode())}


def _draw(probs: np.ndarray, temperature: float, seed: int) -> int:
    """Index of the label drawn from softmax(log p / temperature)."""
    if temperature == 0:
        return int(probs.argmax())
    with np.errstate(divide="ignore"):
        logits = np.log(probs) / temperature
    weights = np.exp(logits - logits.max())
    return int(np.random.default_rng(seed).choice(len(probs), p=weights / weights.sum()))


def _usage(request: ChatRequest, choices: list[dict]) -> dict:
    audio = math.ceil(request.seconds * AUDIO_TOKENS_PER_SECOND)
    prompt = audio + _count_tokens(request.text)
    completion = sum(_count_tokens(choice["message"]["content"]) for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"audio_tokens": audio},
    }


def _count_tokens(text: str) -> int:
    return len(re.findall(r"\w+|[^\w\s]", text))
