"""What one reply of an audio language model says: a distribution, a label, a refusal, or nothing usable.

Parsing is pure and pessimistic. A teacher that refuses, rambles or is cut off gives *no sample*: turning such a reply
into a uniform distribution, or into the one label that its apology happens to mention, would teach the student noise.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence

SAMPLE_KINDS = ("distribution", "logprobs", "label")
KINDS = (*SAMPLE_KINDS, "refusal", "invalid")

# Words that name the same emotion. A word counts for a label when both stand in one group and no other label of
# the set does; so "fear" and "fearful" in one label set never borrow each other's words.
SYNONYMS = (
    ("angry", "anger", "angered", "angrily", "ang"),
    ("happy", "happiness", "happily", "joy", "joyful", "hap"),
    ("sad", "sadness", "sadly"),
    ("neutral", "neutrality", "neu"),
    ("calm", "calmness"),
    ("fear", "fearful", "afraid", "scared"),
    ("disgust", "disgusted"),
    ("surprise", "surprised"),
    ("contempt", "contemptuous"),
    ("boredom", "bored"),
    ("excited", "excitement"),
    ("frustrated", "frustration"),
)

# Below this share of probability on the labels, the first token was about something else ("I", "<think>", "The").
MIN_LABEL_MASS = 0.01

# A longer text that names one emotion is more likely to talk about it than to choose it.
MAX_LABEL_WORDS = 12

# Articles are prefixes of "angry" and yet open any sentence.
_ARTICLES = {"a", "an"}

_REFUSAL = re.compile(
    r"\b(sorry|apologi[sz]e|unable to|not able to|can ?not|can['’]?t|could ?n['’]?t"
    r"|(?:do|did)(?: not|n['’]?t) (?:have|hear|see)|as an ai|language model"
    r"|happy to (?:help|assist|analy[sz]e)|please (?:provide|upload|share|attach)|against my)\b",
    re.IGNORECASE,
)
_NEGATION = re.compile(r"\b(no|not|never|neither|nor|without|rather than|instead of|\w+n['’]t)\b", re.IGNORECASE)
_THINKING = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL | re.IGNORECASE)
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")


@dataclasses.dataclass(frozen=True)
class Reply:
    """One choice of a chat completion, free of any client library, and all that is needed to parse it again.

    Attributes
    ----------
    text : str
        Content of the message, empty if there was none.
    finish_reason : str, optional
        As the server gave it: "stop", "length", "content_filter", ...
    refusal : str, optional
        The message's refusal field.
    top_logprobs : tuple of (str, float), optional
        Alternatives for the first token that is not blank, with natural-log probabilities.

    Example
    -------
    >>> Reply.from_json(Reply("angry", "stop").to_json()) == Reply("angry", "stop")
    True
    """

    text: str
    finish_reason: str | None = None
    refusal: str | None = None
    top_logprobs: tuple[tuple[str, float], ...] | None = None

    def to_json(self) -> str:
        """Serialise without loss, so that a stored reply can be parsed again by a better parser."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Reply:
        """Inverse of `to_json`."""
        fields = json.loads(text)
        tokens = fields.pop("top_logprobs")
        return cls(**fields, top_logprobs=None if tokens is None else tuple((t, p) for t, p in tokens))


@dataclasses.dataclass(frozen=True)
class Answer:
    """A parsed reply.

    Attributes
    ----------
    kind : str
        One of `KINDS`. Only `SAMPLE_KINDS` carry probabilities.
    probs : tuple of float, optional
        Probabilities in the order of the label set, summing to 1; `None` for a refusal or an invalid reply.
    label_mass : float, optional
        For "logprobs", the probability that all labels together had before renormalisation.
    reason : str
        Why there are no probabilities; empty otherwise.

    Example
    -------
    >>> Answer("refusal", reason="the server refused").is_sample
    False
    """

    kind: str
    probs: tuple[float, ...] | None = None
    label_mass: float | None = None
    reason: str = ""

    @property
    def is_sample(self) -> bool:
        """Whether this answer may be used as a prediction of the teacher."""
        return self.kind in SAMPLE_KINDS


@dataclasses.dataclass(frozen=True)
class Response:
    """One answer with its provenance.

    Attributes
    ----------
    answer : Answer
        The parsed reply.
    raw : str
        The reply as `Reply.to_json` gives it.
    seed : int, optional
        Seed of the request plus the position among its choices.
    usage : dict, optional
        Token counts of the request, on the first of its choices only.
    served_model, system_fingerprint : str, optional
        As the server reported them.

    Example
    -------
    >>> Response(Answer("label", (1.0, 0.0)), '{"text": "angry"}').usage is None
    True
    """

    answer: Answer
    raw: str
    seed: int | None = None
    usage: dict | None = None
    served_model: str | None = None
    system_fingerprint: str | None = None


Parser = Callable[[Reply, tuple[str, ...]], Answer]


def parse_answer(reply: Reply, labels: Sequence[str], parsers: Sequence[Parser]) -> Answer:
    """Read one reply with the first parser that finds a sample in it.

    Parameters
    ----------
    reply : Reply
        One choice of a chat completion.
    labels : sequence of str
        The label set; its order is the order of the probabilities.
    parsers : sequence of callable
        Tried in order, see `speechbrain_mifuse.lalm.prompt.ANSWER_FORMS`. If none succeeds the first one's reason
        is reported.

    Returns
    -------
    Answer

    Example
    -------
    >>> parse_answer(Reply("Anger.", "stop"), ("angry", "sad"), [parse_label])
    Answer(kind='label', probs=(1.0, 0.0), label_mass=None, reason='')
    >>> parse_answer(Reply('{"angry": 3, "sad": 1}', "stop"), ("angry", "sad"), [parse_distribution]).probs
    (0.75, 0.25)
    >>> parse_answer(Reply("I'm sorry, I can't judge anger.", "stop"), ("angry", "sad"), [parse_label]).kind
    'refusal'
    """
    if reply.finish_reason == "content_filter" or reply.refusal:
        return Answer("refusal", reason=reply.refusal or "stopped by the server's content filter")
    if reply.finish_reason == "length":
        return Answer("invalid", reason="cut off: the server's token limit was reached")
    reply = dataclasses.replace(reply, text=_THINKING.sub("", reply.text).strip())
    if not reply.text:
        return Answer("invalid", reason="empty reply")
    answers = []
    for parse in parsers:
        answers.append(parse(reply, tuple(labels)))
        if answers[-1].is_sample:
            return answers[-1]
    if _REFUSAL.search(reply.text):
        return Answer("refusal", reason="the model declined in words")
    return answers[0]


def parse_distribution(reply: Reply, labels: tuple[str, ...]) -> Answer:
    """Read a JSON object `{label: probability}`, also inside prose, code fences or one more object.

    Labels that are missing count as 0; keys that name no label are ignored; percentages and numbers in quotes are
    understood; the values are normalised to sum 1. Negative, infinite or all-zero values, a label given twice and two
    contradicting objects are invalid.

    Parameters
    ----------
    reply : Reply
        One choice of a chat completion.
    labels : tuple of str
        The label set.

    Returns
    -------
    Answer
        Of kind "distribution" or "invalid".

    Example
    -------
    >>> parse_distribution(Reply('Sure: {"Anger": "75%", "sad": "25%"}'), ("angry", "happy", "sad")).probs
    (0.75, 0.0, 0.25)
    """
    words = label_words(labels)
    try:
        found = [scores for item in _json_objects(reply.text) if (scores := _scores(item, words))]
        vectors = {_normalised([scores.get(label, 0.0) for label in labels]) for scores in found}
    except (ValueError, OverflowError) as error:
        return Answer("invalid", reason=str(error))
    if not vectors:
        return Answer("invalid", reason="no JSON object with a label of the set")
    if len(vectors) > 1:
        return Answer("invalid", reason="several JSON objects that contradict each other")
    return Answer("distribution", probs=vectors.pop())


def parse_logprobs(reply: Reply, labels: tuple[str, ...]) -> Answer:
    """Read the probability of each label from the alternatives for the first token.

    A token counts for a label when it is the beginning of that label and of no other, or a synonym of it. Servers
    return raw log-probabilities over the whole vocabulary, so they are renormalised over the labels and the mass is
    kept.

    Parameters
    ----------
    reply : Reply
        One choice of a chat completion, with `top_logprobs`.
    labels : tuple of str
        The label set.

    Returns
    -------
    Answer
        Of kind "logprobs" or "invalid".

    Example
    -------
    >>> answer = parse_logprobs(Reply("angry", "stop", None, (("Ang", -0.7), (" sad", -1.4))), ("angry", "sad"))
    >>> [round(p, 2) for p in answer.probs], round(answer.label_mass, 2)
    ([0.67, 0.33], 0.74)
    """
    if not reply.top_logprobs:
        return Answer("invalid", reason="the server returned no log-probabilities")
    if _REFUSAL.search(reply.text):  # "Happy to help, please upload ..." begins with a label
        return Answer("invalid", reason="the first token belongs to a sentence that declines")
    words = label_words(labels)
    mass = dict.fromkeys(labels, 0.0)
    for token, logprob in reply.top_logprobs:
        label = _label_of_token(token, labels, words)
        if label is not None and not math.isnan(logprob):
            mass[label] += math.exp(min(logprob, 1.0))
    total = sum(mass.values())
    if not MIN_LABEL_MASS <= total <= 1.001:
        return Answer("invalid", reason=f"the labels hold a probability mass of {total:.3g} in the first token")
    return Answer("logprobs", tuple(mass[label] / total for label in labels), min(total, 1.0))


def parse_label(reply: Reply, labels: tuple[str, ...]) -> Answer:
    """Read a single label from a short text, as a one-hot distribution.

    Parameters
    ----------
    reply : Reply
        One choice of a chat completion.
    labels : tuple of str
        The label set.

    Returns
    -------
    Answer
        Of kind "label", or "invalid" if the text names no label or several, negates one, declines, or is too long to
        be a choice.

    Example
    -------
    >>> parse_label(Reply("The speaker sounds happy."), ("happy", "sad")).probs
    (1.0, 0.0)
    >>> parse_label(Reply("Not happy."), ("happy", "sad")).kind
    'invalid'
    """
    exact = parse_exact_label(reply, labels)
    if exact.is_sample:
        return exact
    text = _values_only(reply.text) if "{" in reply.text else reply.text
    named = _labels_named(text, labels)
    if len(named) != 1:
        return Answer("invalid", reason=f"names {len(named)} labels of the set: {', '.join(named) or 'none'}")
    if _REFUSAL.search(text) or _NEGATION.search(text):
        return Answer("invalid", reason=f"names {named[0]!r} but negates or declines")
    if len(_WORD.findall(text)) > MAX_LABEL_WORDS:
        return Answer("invalid", reason=f"a text of more than {MAX_LABEL_WORDS} words is not a choice")
    return _one_hot(named[0], labels)


def parse_exact_label(reply: Reply, labels: tuple[str, ...]) -> Answer:
    """Read a reply that is a label (or a synonym) and nothing else but punctuation.

    Used where another form was asked for and a bare label is the most that may be believed.

    Parameters
    ----------
    reply : Reply
        One choice of a chat completion.
    labels : tuple of str
        The label set.

    Returns
    -------
    Answer
        Of kind "label" or "invalid".

    Example
    -------
    >>> parse_exact_label(Reply("**Happy**"), ("happy", "sad")).probs
    (1.0, 0.0)
    >>> parse_exact_label(Reply('{"happy": 0.7, "sa'), ("happy", "sad")).kind
    'invalid'
    """
    word = reply.text.strip(" \t\r\n\"'`*_.,:;!?()[]").casefold()
    label = label_words(labels).get(word)
    return _one_hot(label, labels) if label else Answer("invalid", reason="not a bare label")


def label_words(labels: Sequence[str]) -> dict[str, str]:
    """Map every word that names exactly one label, in lower case, to that label.

    Parameters
    ----------
    labels : sequence of str
        The label set.

    Returns
    -------
    dict of str to str

    Example
    -------
    >>> label_words(["angry", "sad"])["sadness"]
    'sad'
    >>> "afraid" in label_words(["fear", "fearful"])
    False
    """
    exact = {label.casefold(): label for label in labels}
    words = {}
    for group in SYNONYMS:
        owners = [exact[word] for word in group if word in exact]
        if len(owners) == 1:
            words.update(dict.fromkeys(group, owners[0]))
    return {**words, **exact}


def _one_hot(label: str, labels: Sequence[str]) -> Answer:
    return Answer("label", probs=tuple(float(other == label) for other in labels))


def _labels_named(text: str, labels: Sequence[str]) -> list[str]:
    """Labels that occur in a text as whole words, longest words first so that "very sad" hides its "sad"."""
    text, named = text.casefold(), set()
    for word, label in sorted(label_words(labels).items(), key=lambda item: -len(item[0])):
        text, count = re.subn(rf"(?<!\w){re.escape(word)}(?!\w)", " ", text)
        if count:
            named.add(label)
    return [label for label in labels if label in named]


def _values_only(text: str) -> str:
    """Strings that the JSON objects of a text hold as values: keys and numbers choose nothing."""
    try:
        objects = _json_objects(text)
    except ValueError:
        return ""
    return " ".join(value for item in objects for value in item.values() if isinstance(value, str))


def _label_of_token(token: str, labels: Sequence[str], words: Mapping[str, str]) -> str | None:
    # Byte-pair vocabularies mark a leading space as "Ġ" or "▁".
    piece = token.strip(" \t\r\n\"'`*Ġ▁").casefold()
    if not piece or piece in _ARTICLES:
        return None
    if piece in words:
        return words[piece]
    owners = [label for label in labels if label.casefold().startswith(piece)]
    return owners[0] if len(owners) == 1 else None


def _json_objects(text: str) -> list[dict]:
    """All outermost JSON objects of a text, in order."""
    decoder = json.JSONDecoder(object_pairs_hook=_distinct)
    objects, start = [], text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
            objects.append(value)
        except (json.JSONDecodeError, RecursionError):
            end = start + 1
        start = text.find("{", end)
    return objects


def _distinct(pairs: list[tuple[str, object]]) -> dict:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("the JSON object repeats a key")
    return dict(pairs)


def _scores(value: dict, words: Mapping[str, str]) -> dict[str, float]:
    """Numbers given to labels in an object, or in the first object inside it that names labels."""
    scores = {}
    for key, number in value.items():
        label = words.get(key.strip().casefold())
        if label is not None:
            if label in scores:
                raise ValueError(f"the JSON object names {label!r} twice")
            scores[label] = _number(number)
    inner = (_scores(item, words) for item in value.values() if isinstance(item, dict))
    return scores or next((found for found in inner if found), {})


def _number(value: object) -> float:
    if isinstance(value, str):
        text = value.strip()
        scale = 100.0 if text.endswith("%") else 1.0
        value = float(text.rstrip("% ")) / scale
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{value!r} is not a probability")
    return float(value)


def _normalised(values: Sequence[float]) -> tuple[float, ...]:
    total = sum(values)
    if not all(math.isfinite(v) and v >= 0 for v in values) or not math.isfinite(total) or total <= 0:
        raise ValueError("the probabilities are negative, not finite, or all zero")
    return tuple(v / total for v in values)
