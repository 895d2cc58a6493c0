"""What is asked of an audio language model, and in which form it shall answer."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import random
import wave
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from speechbrain_mifuse.lalm.answer import (
    Answer,
    Parser,
    Reply,
    parse_answer,
    parse_distribution,
    parse_exact_label,
    parse_label,
    parse_logprobs,
)
from speechbrain_mifuse.lalm.profile import AUDIO_PARTS, CONSTRAINTS
from speechbrain_mifuse.utils.errors import UserError

DEFAULT_TEMPLATE = (
    "Listen to the recording. Judge the emotion from how the voice sounds, not from what is said. "
    "The possible emotions are: {labels}. {answer}"
)


class Clip(NamedTuple):
    """A recording ready to be sent any number of times: a WAV file in base64, and its length."""

    data: str
    seconds: float

    @classmethod
    def of(cls, wav: bytes) -> Clip:
        """Encode a WAV file."""
        with wave.open(io.BytesIO(wav)) as file:
            return cls(base64.b64encode(wav).decode(), file.getnframes() / file.getframerate())


@dataclasses.dataclass(frozen=True)
class AnswerForm:
    """A form of answer: the sentence that asks for it, parsers in the order tried, a shape of `CONSTRAINTS`, fields."""

    instruction: Callable[[Sequence[str]], str]
    parsers: tuple[Parser, ...]
    shape: str
    options: Mapping = dataclasses.field(default_factory=dict)


def _ask_distribution(labels: Sequence[str]) -> str:
    shape = ", ".join(f"{json.dumps(label, ensure_ascii=False)}: p{i}" for i, label in enumerate(labels, start=1))
    return (
        f"Reply with one JSON object that gives every emotion its probability, in the shape {{{shape}}}. "
        "The probabilities sum to 1. Write nothing else."
    )


def _ask_label(labels: Sequence[str]) -> str:
    return "Reply with exactly one of these words and nothing else."


# Every form is asked for in words and read from text, whatever the constraint: some audio models refuse constraints
# (HTTP 400) and some servers ignore them silently.
ANSWER_FORMS = {
    "distribution": AnswerForm(_ask_distribution, (parse_distribution, parse_exact_label), "object"),
    "label": AnswerForm(_ask_label, (parse_label,), "word"),
    "logprobs": AnswerForm(
        _ask_label, (parse_logprobs, parse_label), "first_token", {"logprobs": True, "top_logprobs": 20}
    ),
}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A question about one recording: a template, a label set and a form of answer.

    With `variants` or `shuffle_labels` it is a family of questions, one for each sample: `at` gives the question of
    sample k. Their answers name labels, so all are read into the same fixed order.

    Parameters
    ----------
    labels : sequence of str
        At least two distinct labels; their order is the order of every distribution.
    answer_form : str
        A key of `ANSWER_FORMS`: "distribution" (probabilities in JSON), "label" (one word) or "logprobs" (one word,
        with the log-probabilities of its first token).
    template : str
        Text in which `{labels}` and `{answer}` are replaced; both must occur.
    audio_part, constraint : str
        Keys of `AUDIO_PARTS` and of `CONSTRAINTS` in `speechbrain_mifuse.lalm.profile`.
    variants : sequence of str
        Further templates: sample k is asked with number k modulo their count, `template` being number 0.
    shuffle_labels : bool
        Name the labels in an order drawn from the seed and k.
    order : sequence of str, optional
        Order in which the labels are named, that of `labels` by default; no part of the meaning of an answer.

    Example
    -------
    >>> prompt = Prompt(("angry", "sad"), "label", "Which of {labels}? {answer}", variants=["{labels}? {answer}"])
    >>> prompt.at(0).text()
    'Which of angry, sad? Reply with exactly one of these words and nothing else.'
    >>> prompt.at(3).text()
    'angry, sad? Reply with exactly one of these words and nothing else.'
    >>> [part["type"] for part in prompt.at(0).messages("UklGRg==")[0]["content"]]
    ['input_audio', 'text']
    """

    labels: Sequence[str]
    answer_form: str = "distribution"
    template: str = DEFAULT_TEMPLATE
    audio_part: str = "input_audio"
    constraint: str = "none"
    variants: Sequence[str] = ()
    shuffle_labels: bool = False
    order: Sequence[str] | None = None

    def __post_init__(self):
        object.__setattr__(self, "labels", tuple(self.labels))
        object.__setattr__(self, "variants", tuple(self.variants))
        object.__setattr__(self, "order", tuple(self.order or self.labels))
        words = [label.strip().casefold() for label in self.labels]
        if len(words) < 2 or len(set(words)) < len(words) or not all(words):
            raise UserError(f"labels {list(self.labels)}: at least two different, non-empty labels are needed")
        for what, known in (("answer_form", ANSWER_FORMS), ("audio_part", AUDIO_PARTS), ("constraint", CONSTRAINTS)):
            if getattr(self, what) not in known:
                name = what.replace("_", " ")
                raise UserError(f"lalm {name} {getattr(self, what)!r} is unknown: choose one of {', '.join(known)}")
        if self.form.shape not in CONSTRAINTS[self.constraint]:
            raise UserError(
                f"lalm constraint {self.constraint!r} gives no answer of the form {self.answer_form!r}: choose another "
                "--lalm_answer_form, or another constraint in the lalm_profile"
            )
        for template in self.templates:
            missing = [name for name in ("{labels}", "{answer}") if name not in template]
            if missing:
                raise UserError(f"the prompt template lacks {' and '.join(missing)}: {template!r}")

    @property
    def form(self) -> AnswerForm:
        """The answer form itself."""
        return ANSWER_FORMS[self.answer_form]

    @property
    def templates(self) -> tuple[str, ...]:
        """All templates."""
        return (self.template, *self.variants)

    @property
    def varies(self) -> bool:
        """Whether samples are asked for with different questions."""
        return bool(self.variants) or self.shuffle_labels

    def at(self, k: int, seed: int | None = None) -> Prompt:
        """Give the one question that sample `k` is asked with."""
        if not self.varies:
            return self
        order = list(self.labels)
        if self.shuffle_labels:
            random.Random(f"{seed}:{k}").shuffle(order)
        template = self.templates[k % len(self.templates)]
        return dataclasses.replace(self, template=template, variants=(), shuffle_labels=False, order=tuple(order))

    def text(self) -> str:
        """Render the question without its audio; all wordings, one a line, if there are several."""
        instruction, labels = self.form.instruction(self.order), ", ".join(self.order)
        return "\n".join(
            template.replace("{labels}", labels).replace("{answer}", instruction) for template in self.templates
        )

    def messages(self, wav_base64: str) -> list[dict]:
        """Chat messages of one request."""
        if self.varies:
            raise UserError("this prompt differs from sample to sample: ask with prompt.at(k, seed)")
        return self._messages(wav_base64)

    def request_options(self) -> dict:
        """Fields of the request's body that the answer form and the constraint need, such as `logprobs`."""
        return {**self.form.options, **CONSTRAINTS[self.constraint][self.form.shape](self.order)}

    def prompt_hash(self) -> str:
        """SHA-256 over everything sent except audio, model and sampling parameters: 64 hexadecimal digits."""
        sent = {"messages": self._messages(""), "options": self.request_options()}
        if self.shuffle_labels:
            sent["shuffle_labels"] = True
        if self.variants:
            sent["variants"] = list(self.variants)
        return hashlib.sha256(json.dumps(sent, sort_keys=True).encode()).hexdigest()

    def parse(self, reply: Reply) -> Answer:
        """Read one reply to this prompt, see `speechbrain_mifuse.lalm.answer.parse_answer`."""
        return parse_answer(reply, self.labels, self.form.parsers)

    def _messages(self, wav_base64: str) -> list[dict]:
        audio = AUDIO_PARTS[self.audio_part](wav_base64)
        return [{"role": "user", "content": [audio, {"type": "text", "text": self.text()}]}]
