"""What differs between providers of audio language models, as data: one YAML file for each in `hparams/lalm/`."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import operator
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import UnionType
from typing import NamedTuple

from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.schemas import plain_yaml

Labels = tuple[str, ...]


def _input_audio(wav_base64: str) -> dict:
    return {"type": "input_audio", "input_audio": {"data": wav_base64, "format": "wav"}}


def _audio_url(wav_base64: str) -> dict:
    return {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{wav_base64}"}}


# How a WAV file in base64 becomes a part of a message.
AUDIO_PARTS: dict[str, Callable[[str], dict]] = {"input_audio": _input_audio, "audio_url": _audio_url}


def _probabilities(labels: Labels) -> dict:
    """JSON schema of one probability for each label."""
    number = {"type": "number", "minimum": 0, "maximum": 1}
    return _object({label: number for label in labels})


def _object(properties: dict) -> dict:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _response_format(schema: dict) -> dict:
    named = {"name": "emotion", "strict": True, "schema": schema}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def _word_pattern(labels: Labels) -> str:
    return "(" + "|".join(map(re.escape, labels)) + ")"


def _object_pattern(labels: Labels) -> str:
    """Regular expression of one JSON object, which also keeps a weak model from endless digits."""
    pairs = (re.escape(json.dumps(label, ensure_ascii=False)) + r": (0(\.\d{1,4})?|1(\.0)?)" for label in labels)
    return r"\{" + ", ".join(pairs) + r"\}"


# By name, then by what the answer shall be: one "word", one "object" of probabilities, or a word whose "first_token"
# is looked at. Each function takes the labels and gives fields of the request's body. A shape that is missing cannot be
# had: a schema's reply begins with a brace, so its first token says nothing.
CONSTRAINTS: dict[str, dict[str, Callable[[Labels], dict]]] = {
    "none": dict.fromkeys(("word", "object", "first_token"), lambda labels: {}),
    # vLLM. Its older field guided_choice is ignored today, with status 200.
    "structured_outputs": {
        "word": lambda labels: {"structured_outputs": {"choice": list(labels)}},
        "object": lambda labels: {"structured_outputs": {"json": _probabilities(labels)}},
        "first_token": lambda labels: {"structured_outputs": {"choice": list(labels)}},
    },
    "json_schema": {
        "word": lambda labels: _response_format(_object({"emotion": {"type": "string", "enum": list(labels)}})),
        "object": lambda labels: _response_format(_probabilities(labels)),
    },
    # SGLang.
    "regex": {
        "word": lambda labels: {"regex": _word_pattern(labels)},
        "object": lambda labels: {"regex": _object_pattern(labels)},
        "first_token": lambda labels: {"regex": _word_pattern(labels)},
    },
}


# What a token costs by the Batch API, as a share of its price.
BATCH_SHARE = 0.5


class Tokens(NamedTuple):
    """Numbers of tokens by what they cost: input text, input audio, output."""

    text: float = 0
    audio: float = 0
    output: float = 0

    @property
    def total(self) -> float:
        """All of them, as limits count."""
        return self.text + self.audio + self.output

    def plus(self, other: Tokens) -> Tokens:
        """Add those of another call."""
        return Tokens(*map(operator.add, self, other))


NO_TOKENS = Tokens()


@dataclasses.dataclass(frozen=True)
class Price:
    """What a provider asks for a million tokens. Prices change: they are the user's to check.

    Example
    -------
    >>> Price(2.0, 40.0, 10.0).cost(Tokens(text=1000, audio=500_000, output=100))
    20.003
    """

    per_million_input_text: float
    per_million_input_audio: float
    per_million_output: float
    currency: str = "USD"
    source: str = ""

    def __post_init__(self):
        for name in ("per_million_input_text", "per_million_input_audio", "per_million_output"):
            value = getattr(self, name)
            if not is_number(value) or value < 0:
                raise UserError(f"lalm_profile: price: {name} must be a number that is not negative, not {value!r}")
        _require_kind(self, "lalm_profile: price: ", str, "currency", "source")

    def cost(self, tokens: Tokens = NO_TOKENS, batch: Tokens = NO_TOKENS) -> float:
        """Price of tokens, and of those of the Batch API, in the currency."""
        prices = (self.per_million_input_text, self.per_million_input_audio, self.per_million_output)
        live, later = (sum(map(operator.mul, each, prices)) / 1e6 for each in (tokens, batch))
        return live + BATCH_SHARE * later


@dataclasses.dataclass(frozen=True)
class Profile:
    """One provider: where it is, what its API understands, what it allows and what it costs.

    Parameters
    ----------
    name : str
        For people.
    base_url, model : str, optional
        Address of the API and name of the model; without an address the teacher is a classifier served on this machine.
    audio_part : str
        Form of the audio in a message: a key of `AUDIO_PARTS`.
    constraint : str
        How the server is made to answer in no other form: a key of `CONSTRAINTS`.
    answer_form : str
        A key of `lalm.prompt.ANSWER_FORMS`.
    sampling : mapping
        Further fields of every request, such as `max_tokens`; they are part of the answers' key.
    requests_per_minute, tokens_per_minute : float, optional
        Limits of the provider.
    concurrency : int
        Calls at a time.
    honours_n : bool
        Whether one call can bring several answers; if not, each answer is a call.
    honours_seed : bool
        Whether `seed` is sent.
    longest_audio : float, optional
        Seconds that the model reads; of longer recordings the beginning is sent.
    audio_tokens_per_second, seconds_per_call : float
        Estimates for plans and budgets; replies say what was used.
    timeout, deadline : float
        Seconds for one attempt, and for one call with all its attempts.
    max_retries : int
        Further attempts after a passing fault.
    price : Price, optional
        What tokens cost.

    Raises
    ------
    UserError
        If a value is of no use; the message names its key.

    Example
    -------
    >>> profile = Profile.of({"name": "here", "base_url": "http://127.0.0.1:8000/v1", "audio_part": "audio_url"})
    >>> profile.honours_n, profile.price
    (True, None)
    >>> Profile.of({"audio_part": "wav"})
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.utils.errors.UserError: lalm_profile: audio_part 'wav' is none of input_audio, audio_url
    """

    name: str = "default"
    base_url: str | None = None
    model: str | None = None
    audio_part: str = "input_audio"
    constraint: str = "none"
    answer_form: str = "distribution"
    sampling: Mapping = dataclasses.field(default_factory=dict, hash=False)
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    concurrency: int = 8
    honours_n: bool = True
    honours_seed: bool = True
    longest_audio: float | None = None
    audio_tokens_per_second: float = 25.0
    seconds_per_call: float = 2.0
    timeout: float = 60.0
    deadline: float = 300.0
    max_retries: int = 6
    price: Price | None = None

    def __post_init__(self):
        _require_kind(self, "lalm_profile: ", str, "name", "audio_part", "constraint", "answer_form")
        _require_kind(self, "lalm_profile: ", str | None, "base_url", "model")
        _require_kind(self, "lalm_profile: ", bool, "honours_n", "honours_seed")
        for name, known in (("audio_part", AUDIO_PARTS), ("constraint", CONSTRAINTS)):
            if getattr(self, name) not in known:
                raise UserError(f"lalm_profile: {name} {getattr(self, name)!r} is none of {', '.join(known)}")
        for name in (*_MAY_BE_NONE, *_NUMBERS):
            value, least = getattr(self, name), -1 if name == "max_retries" else 0
            if not ((value is None and name in _MAY_BE_NONE) or (is_number(value) and value > least)):
                raise UserError(f"lalm_profile: {name} must be a number above 0, not {value!r}")
        if not isinstance(self.sampling, Mapping):
            raise UserError(f"lalm_profile: sampling must be a mapping of request fields, not {self.sampling!r}")

    @classmethod
    def of(cls, values: Mapping | None, **given) -> Profile:
        """Make a profile of a YAML file's values."""
        fields = {**(values or {}), **given}
        if fields.get("price") is not None:
            fields["price"] = _of(Price, fields["price"], "lalm_profile: price: ")
        return _of(cls, fields, "lalm_profile: ")

    def output_limit(self, sampling: Mapping) -> float | None:
        """Tokens that one answer can have at most, if some field of the request limits them."""
        limits = [sampling[name] for name in OUTPUT_LIMITS if sampling.get(name) is not None]
        return min(limits, default=None)


# Fields of a request that limit the length of an answer; providers differ in the name.
OUTPUT_LIMITS = ("max_completion_tokens", "max_tokens")

_MAY_BE_NONE = ("requests_per_minute", "tokens_per_minute", "longest_audio")
_NUMBERS = ("concurrency", "audio_tokens_per_second", "seconds_per_call", "timeout", "deadline", "max_retries")


def is_number(value: object) -> bool:
    """Whether a value is a finite number, which a truth value is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def _require_kind(fields: object, where: str, kind: type | UnionType, *names: str) -> None:
    what = "true or false" if kind is bool else "a string"
    for name in names:
        if not isinstance(getattr(fields, name), kind):
            raise UserError(f"{where}{name} must be {what}, not {getattr(fields, name)!r}")


def _of(cls, values: Mapping, where: str):
    if not isinstance(values, Mapping):
        raise UserError(f"{where}must be a mapping of keys, not {values!r}")
    known = inspect.signature(cls).parameters
    unknown = [key for key in values if key not in known]
    if unknown:
        raise UserError(f"{where}{', '.join(map(str, unknown))} is none of {', '.join(known)}")
    missing = [name for name, given in known.items() if given.default is given.empty and name not in values]
    if missing:
        raise UserError(f"{where}{', '.join(missing)} missing")
    return cls(**values)


def read_profile(path: str | Path | None, **given) -> Profile:
    r"""Read a provider's profile.

    Parameters
    ----------
    path : str or pathlib.Path, optional
        A YAML file with fields of `Profile`, such as ``hparams/lalm/openai.yaml``; none for the defaults.
    **given
        Fields that count instead of the file's.

    Returns
    -------
    Profile
        The profile.

    Raises
    ------
    UserError
        If the file cannot be read, or a field is unknown or of no use.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "mine.yaml"
    >>> _ = path.write_text("base_url: http://127.0.0.1:8000/v1\nmodel: m\nsampling: {max_tokens: 40}\n")
    >>> profile = read_profile(path, concurrency=2)
    >>> profile.model, profile.concurrency, profile.output_limit(profile.sampling)
    ('m', 2, 40)
    """
    try:
        values = {} if path is None else plain_yaml(path)
    except ValueError as error:
        raise UserError(
            f"--profile {path}: cannot be read: {error}. Name a file such as hparams/lalm/openai.yaml"
        ) from None
    if not isinstance(values, Mapping):
        raise UserError(f"--profile {path}: holds no keys of a profile. Name a file such as hparams/lalm/openai.yaml")
    return Profile.of(values, **given)
