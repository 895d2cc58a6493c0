"""What is asked of an audio language model, and in which form it shall answer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence

from speechbrain_mifuse.errors import UserError
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

DEFAULT_TEMPLATE = (
    "Listen to the recording. Judge the emotion from how the voice sounds, not from what is said. "
    "The possible emotions are: {labels}. {answer}"
)


@dataclasses.dataclass(frozen=True)
class AnswerForm:
    """A form of answer: how it is asked for and how it is read.

    Attributes
    ----------
    instruction : callable
        Takes the labels, returns the sentence that replaces `{answer}` in the template.
    options : callable
        Takes the labels, returns extra fields of the request.
    parsers : tuple of callable
        Tried in order on a reply; the first is the form asked for, the others what may still be believed.

    Example
    -------
    >>> ANSWER_FORMS["label"].options(("angry", "sad"))
    {}
    """

    instruction: Callable[[tuple[str, ...]], str]
    options: Callable[[tuple[str, ...]], dict]
    parsers: tuple[Parser, ...]


def _ask_distribution(labels: tuple[str, ...]) -> str:
    shape = ", ".join(f"{json.dumps(label, ensure_ascii=False)}: p{i}" for i, label in enumerate(labels, start=1))
    return (
        f"Reply with one JSON object that gives every emotion its probability, in the shape {{{shape}}}. "
        "The probabilities sum to 1. Write nothing else."
    )


def _ask_label(labels: tuple[str, ...]) -> str:
    return "Reply with exactly one of these words and nothing else."


# No response_format: some audio models refuse it (HTTP 400) and some servers ignore it silently, so every form is asked
# for in words and read from text.
ANSWER_FORMS = {
    "distribution": AnswerForm(_ask_distribution, lambda labels: {}, (parse_distribution, parse_exact_label)),
    "label": AnswerForm(_ask_label, lambda labels: {}, (parse_label,)),
    "logprobs": AnswerForm(
        _ask_label, lambda labels: {"logprobs": True, "top_logprobs": 20}, (parse_logprobs, parse_label)
    ),
}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A question about one recording: a template, a label set and a form of answer.

    Parameters
    ----------
    labels : sequence of str
        At least two distinct labels; their order is the order of every distribution.
    answer_form : str
        A key of `ANSWER_FORMS`: "distribution" (probabilities in JSON), "label" (one word) or "logprobs" (one word,
        with the log-probabilities of its first token).
    template : str
        Text in which `{labels}` and `{answer}` are replaced; both must occur.

    Raises
    ------
    UserError
        If the labels, the form or the template cannot be used.

    Example
    -------
    >>> prompt = Prompt(("angry", "sad"), "label", "Which of {labels}? {answer}")
    >>> prompt.text()
    'Which of angry, sad? Reply with exactly one of these words and nothing else.'
    >>> [part["type"] for part in prompt.messages("UklGRg==")[0]["content"]]
    ['input_audio', 'text']
    """

    labels: Sequence[str]
    answer_form: str = "distribution"
    template: str = DEFAULT_TEMPLATE

    def __post_init__(self):
        object.__setattr__(self, "labels", tuple(self.labels))
        words = [label.strip().casefold() for label in self.labels]
        if len(words) < 2 or len(set(words)) < len(words) or not all(words):
            raise UserError(f"labels {list(self.labels)}: at least two different, non-empty labels are needed")
        if self.answer_form not in ANSWER_FORMS:
            raise UserError(
                f"lalm answer form {self.answer_form!r} is unknown: choose one of {', '.join(ANSWER_FORMS)}"
            )
        missing = [name for name in ("{labels}", "{answer}") if name not in self.template]
        if missing:
            raise UserError(f"the prompt template lacks {' and '.join(missing)}: {self.template!r}")

    @property
    def form(self) -> AnswerForm:
        """The answer form itself."""
        return ANSWER_FORMS[self.answer_form]

    def text(self) -> str:
        """Render the question without its audio."""
        instruction = self.form.instruction(self.labels)
        return self.template.replace("{labels}", ", ".join(self.labels)).replace("{answer}", instruction)

    def messages(self, wav_base64: str) -> list[dict]:
        """Chat messages of one request.

        Parameters
        ----------
        wav_base64 : str
            A WAV file in base64.

        Returns
        -------
        list of dict
            One user message: the audio part, then the text part.
        """
        audio = {"type": "input_audio", "input_audio": {"data": wav_base64, "format": "wav"}}
        return [{"role": "user", "content": [audio, {"type": "text", "text": self.text()}]}]

    def request_options(self) -> dict:
        """Fields of the request that the answer form needs, such as `logprobs`."""
        return self.form.options(self.labels)

    def prompt_hash(self) -> str:
        """SHA-256 over everything sent except audio, model and sampling parameters: 64 hexadecimal digits."""
        sent = {"messages": self.messages(""), "options": self.request_options()}
        return hashlib.sha256(json.dumps(sent, sort_keys=True).encode()).hexdigest()

    def parse(self, reply: Reply) -> Answer:
        """Read one reply to this prompt, see `speechbrain_mifuse.lalm.answer.parse_answer`."""
        return parse_answer(reply, self.labels, self.form.parsers)
