"""What one reply of an audio language model says: a distribution, a label, a refusal, or nothing usable.

Written by hand: libraries that read loose JSON guess, and none knows a refusal from a label.

Parsing is pure and pessimistic. A teacher that refuses, rambles or is cut off gives *no sample*: turning such a reply
into a uniform distribution, or into the one label that its apology happens to mention, would teach the student noise.
A reply is a stranger's text: whatever it holds, reading it ends soon and raises nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from speechbrain_mifuse.lalm.loose_json import distinct, json_values, number_lines, unquoted, walk
from speechbrain_mifuse.utils.files import encodable

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

# Codes that name an emotion where they stand alone, and are words of other languages in a sentence.
_CODES = {"ang", "hap", "neu"}

# Keys of a JSON object whose text is the choice; other texts (a transcript, a reason) may name what they like.
_CHOICE_KEYS = {
    f"{of}{what}"
    for of in ("", "predicted ", "final ", "detected ", "dominant ", "primary ", "emotion ")
    for what in ("emotion", "label", "answer", "class", "category", "prediction", "choice", "result", "word")
}

# Keys of a list or an object whose text is a label, and whose number is its probability.
_NAME_KEYS = _CHOICE_KEYS | {"name"}
_SCORE_KEYS = {"score", "probability", "prob", "p", "confidence", "likelihood", "value", "percentage", "percent"}
_NAME_LISTS = {"labels", "emotions", "classes", "categories", "names"}
_SCORE_LISTS = {"scores", "probabilities", "probs", "confidences", "likelihoods", "values", "percentages"}

# Words of a key that change nothing about the label beside them.
_DECORATION = {*_SCORE_KEYS, "pr", "probs", "pct", "emotion", "label", "class", "of", "the", "is", "being"}

# Words of keys whose number describes the answer and is no share of it.
_MEASURES = {
    *("confidence", "certainty", "uncertainty", "entropy", "valence", "arousal", "dominance", "intensity", "strength"),
    *("energy", "duration", "seconds", "time", "timestamp", "start", "end", "id", "index", "age", "total", "sum"),
    *("count", "n", "temperature", "version"),
}

# Below this share of probability on the labels, the first token was about something else ("I", "<think>", "The").
MIN_LABEL_MASS = 0.01

# A longer text that names one emotion is more likely to talk about it than to choose it.
MAX_LABEL_WORDS = 12

# Characters beyond which a reply to a question of one word or one object is a runaway, and not worth its time.
MAX_CHARACTERS = 20_000

_LONGEST_REASON = 300
_ONLY_REASONING = (
    "the content is empty and all text is in reasoning_content: switch thinking off (sampling: {chat_template_kwargs: "
    "{enable_thinking: false}} or reasoning_effort in the profile), or start the server without its reasoning parser"
)

# Apostrophes and hyphens of all kinds; compatibility normalisation would make blanks of some of them.
_ONE_KIND = str.maketrans(dict.fromkeys("’‘ʼ´`′＇", "'") | dict.fromkeys("‐‑‒–−－", "-"))
_EDGES = " \"'*_,.:;()[]<>«»“”„~#|-—。、「」『』【】\\/"
_ENDS = _EDGES + "!?"
_BLANKS, _UNSEEN = "\t\n\v\f\r", {"Cc", "Cf", "Cs"}
# A letter, an accent that was not joined to its letter, what stands for a letter that was lost, or a hyphen or
# apostrophe inside a word.
_LETTER = r"[\w\u0300-\u036f\u20d0-\u20ff\ue000-\uf8ff\ufffd]"
_NOT_BEHIND, _NOT_AHEAD = rf"(?<!{_LETTER})(?<!\w['-])", rf"(?!{_LETTER}|['-]\w)"

_REFUSAL = re.compile(
    r"\b(sorry|apologi[sz]e|unable to|not able to|can ?not|can'?t|could ?n't"
    r"|(?:do|did)(?: not|n't) (?:have|hear|see)|as an ai|language model"
    r"|(?:happy|glad|sad) to|i(?:'d| would|'ll| will)(?: be)? (?:happily|gladly|happy|glad)"
    r"|i(?:'m| am) afraid|unfortunately|sadly,|please (?:provide|upload|share|attach)|against my)\b|^\W*sadly\b"
    r"|\bsadly,"
)
# In a text beside numbers only what says that nothing was heard; a transcript may well say "sorry".
_DEAF = re.compile(
    r"as an ai\b|language model|(?:can ?not|can't|unable to|not able to) "
    r"(?:hear|listen|process|access|analy[sz]e|judge|identify|determine|detect|assess)"
)
_NEGATION = re.compile(
    r"\b(no|not|never|neither|nor|non|none|nothing|nobody|without|rather than|instead of|far from|anything but|all but"
    r"|hardly|barely|scarcely|lack\w*|less|least|except|unlike|opposite|absen\w+|rul(?:e|ed|ing) out|exclud\w+|fail\w*"
    r"|wrong|false|incorrect|isnt|wasnt|arent|doesnt|dont|didnt|aint|unsure|uncertain\w*|unclear|unknown|undetermined"
    r"|inaudible|nicht|kein\w*|nie|pas|\w+n't)\b|[!¬~≠](?=\w)"
)
# "happy: 0 %" chooses anything but happy.
_ZERO = re.compile(r"(?<![\w.,])0+(?:[.,]0+)?(?![\w.,]*\d)")
# Marks with which models begin and end their thoughts, and others that surround an answer.
_TAG = r"think(?:ing)?|thoughts?|reason(?:ing)?|analysis|reflection|scratchpad|seed:think"
_THOUGHTS_BEGIN = re.compile(
    rf"<(?:{_TAG})(?:\s[^<>]{{0,60}})?>|\[think(?:ing)?\]|◁think▷|<\|begin_of_thought\|>|<\|think(?:ing)?\|>"
    r"|<\|?channel\|?>\s?(?:analysis|commentary|thought)|<unused94>|\Aanalysis(?=[A-Z])",
    re.IGNORECASE,
)
_THOUGHTS_END = re.compile(
    rf"</(?:{_TAG})>|\[/think(?:ing)?\]|◁/think▷|<\|end_of_thought\|>|<\|/think(?:ing)?\|>"
    r"|<\|channel\|>\s?final\s?(?:<\|constrain\|>\w{1,20})?<\|message\|>|assistantfinal|<channel\|>|<unused95>",
    re.IGNORECASE,
)
_AROUND_ANSWER = re.compile(
    r"<\|[a-z_]{1,40}\|>|</?s>|<eos>|<(?:start|end)_of_turn>|</?(?:final_)?(?:answer|response|output|result)>",
    re.IGNORECASE,
)
# Parts of the names that servers have for the end of a reply. Other names ("stop", "end_turn", "tool_calls") are of a
# reply that ended by itself.
_ENDED_AS_REFUSAL = re.compile(
    r"filter|safety|prohibit|recit|block|spii|refus|guardrail|sensitiv|toxic|moderat|violat|policy|armor"
)
_ENDED_EARLY = re.compile(
    r"length|max|limit|exceed|trunc|incomplete|abort|cancel|error|time|interrupt|malformed|unexpected|resource|pause"
    r"|other|language|overload"
)
_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")


@dataclasses.dataclass(frozen=True)
class Reply:
    """One choice of a chat completion, free of any client library, and all that is needed to parse it again.

    Parameters
    ----------
    text : str
        What the model wrote.
    finish_reason : str, optional
        Why it stopped, in the server's words.
    refusal : str, optional
        Text of a refusal that the server marks as one.
    top_logprobs : tuple of (str, float), optional
        Alternatives for the first token, with their natural logarithms.
    reasoning : str, optional
        Train of thought that the server keeps apart from an empty text.

    Example
    -------
    >>> Reply.from_json(Reply("sad", "stop").to_json()) == Reply("sad", "stop")
    True
    """

    text: str
    finish_reason: str | None = None
    refusal: str | None = None
    top_logprobs: tuple[tuple[str, float], ...] | None = None
    reasoning: str | None = None

    def to_json(self) -> str:
        """Serialise without loss, so that a stored reply can be parsed again by a better parser."""
        fields = dataclasses.asdict(self)
        if self.reasoning is None:  # most replies are written as every version writes and reads them
            del fields["reasoning"]
        text = json.dumps(fields, ensure_ascii=False)
        # Half a surrogate pair, which JSON's escapes can bring, cannot be encoded, hence neither stored nor sent.
        return text if encodable(text) else json.dumps(fields)

    @classmethod
    def from_json(cls, text: str) -> Reply:
        """Inverse of `to_json`."""
        fields = json.loads(text)
        tokens = fields.pop("top_logprobs")
        return cls(**fields, top_logprobs=None if tokens is None else tuple((t, p) for t, p in tokens))


@dataclasses.dataclass(frozen=True)
class Answer:
    """A parsed reply.

    Parameters
    ----------
    kind : str
        One of `KINDS`.
    probs : tuple of float, optional
        `[C]`, in the order of the label set; there for the `SAMPLE_KINDS` alone.
    label_mass : float, optional
        Probability of the labels among all first tokens, for "logprobs".
    reason : str
        Why a "refusal" or "invalid" reply is no sample.

    Example
    -------
    >>> Answer("label", (1.0, 0.0)).is_sample, Answer("refusal", reason="declined").is_sample
    (True, False)
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
    """One answer with its provenance: the reply as JSON, the seed, the tokens, and what the server calls itself."""

    answer: Answer
    raw: str
    seed: int | None = None
    usage: dict | None = None
    served_model: str | None = None
    system_fingerprint: str | None = None


Parser = Callable[[Reply, tuple[str, ...]], Answer]


def parse_answer(reply: Reply, labels: Sequence[str], parsers: Sequence[Parser]) -> Answer:
    """Read one reply with the first parser that finds a sample in it; if none does, give the first one's reason.

    Parameters
    ----------
    reply : Reply
        Anything that a server may send.
    labels : sequence of str
        The label set, in the order of the probabilities.
    parsers : sequence of callable
        In the order tried: `parse_distribution`, `parse_logprobs`, `parse_label`, `parse_exact_label`.

    Returns
    -------
    Answer
        A refusal, a truncated reply and one that does not plainly choose are no samples; nothing is raised.

    Example
    -------
    >>> parse_answer(Reply("Anger.", "stop"), ("angry", "sad"), [parse_label])
    Answer(kind='label', probs=(1.0, 0.0), label_mass=None, reason='')
    >>> parse_answer(Reply('{"angry": 3, "sad": 1}', "stop"), ("angry", "sad"), [parse_distribution]).probs
    (0.75, 0.25)
    >>> parse_answer(Reply("I'm sorry, I can't judge anger.", "stop"), ("angry", "sad"), [parse_label]).kind
    'refusal'
    """
    ended = str(reply.finish_reason or "").casefold()
    if reply.refusal or _ENDED_AS_REFUSAL.search(ended):
        return Answer("refusal", reason=_printable(reply.refusal or f"the server stopped the reply ({ended})"))
    if _ENDED_EARLY.search(ended):
        # No sample even where an object is complete: it may be an example, or the first of several thoughts.
        return Answer("invalid", reason=_printable(f"truncated ({ended}): at a token limit, raise max_tokens"))
    text = _without_thoughts(reply.text)
    if text is None:
        return Answer("invalid", reason="truncated: the reply ends among its thoughts. Raise max_tokens")
    if not text:
        return Answer("invalid", reason=_ONLY_REASONING if reply.reasoning else "empty reply")
    if len(text) > MAX_CHARACTERS:
        return Answer("invalid", reason=f"a reply of more than {MAX_CHARACTERS} characters is not an answer")
    reply = dataclasses.replace(reply, text=unquoted(text))
    answers = []
    for parse in parsers:
        answers.append(parse(reply, tuple(labels)))
        if answers[-1].is_sample:
            return answers[-1]
    if _REFUSAL.search(_plain(reply.text)):
        return Answer("refusal", reason="the model declined in words")
    return answers[0]


def parse_distribution(reply: Reply, labels: tuple[str, ...]) -> Answer:
    """Read probabilities of labels in JSON, among prose or not."""
    words = _vocabulary(tuple(labels))
    try:
        values, beside = json_values(reply.text)
        nodes = list(walk(values))
        tables = [scores for node in nodes if (scores := _scores(_table(node), words))]
        tables = tables or _table_of_lines(beside, words)
        found = [_normalised([table.get(label, 0.0) for label in labels]) for table in tables]
        # Rounded, so that percentages contradict no fractions.
        vectors = {tuple(round(p, 6) for p in probs): probs for probs in found}
    except (ValueError, OverflowError) as error:
        return Answer("invalid", reason=_printable(error))
    if not vectors:
        return Answer("invalid", reason="no JSON object with a label of the set")
    if len(vectors) > 1:
        return Answer("invalid", reason="several distributions that contradict each other")
    notes = _plain(" ".join(node for node in nodes if isinstance(node, str)))
    if _REFUSAL.search(_plain(beside)) or _DEAF.search(notes):
        return Answer("invalid", reason="a distribution beside words that decline")
    return Answer("distribution", probs=vectors.popitem()[1])


def parse_logprobs(reply: Reply, labels: tuple[str, ...]) -> Answer:
    """Read the probability of each label from the alternatives for the first token."""
    if not reply.top_logprobs:
        return Answer("invalid", reason="the server returned no log-probabilities")
    if not _chooses(reply, labels):  # "Happy to help, please upload ..." begins with a label
        return Answer("invalid", reason="the first token belongs to a text that is no answer")
    words = _vocabulary(tuple(labels)).bare
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
    """Read a single label from a short text, as a one-hot distribution."""
    exact = parse_exact_label(reply, labels)
    if exact.is_sample:
        return exact
    words = _vocabulary(tuple(labels))
    text, beside = _plain(reply.text), ""
    if "{" in reply.text:
        try:
            text, beside = (_plain(part) for part in _choice_in_json(reply.text, words))
        except ValueError as error:
            return Answer("invalid", reason=_printable(error))
    elif len([name for name, _ in number_lines(reply.text)[0] if not _is_measure(name)]) > 1:
        return Answer("invalid", reason="a table and not a choice")
    named = words.named(text)
    if len(named) != 1:
        return Answer("invalid", reason=f"names {len(named)} labels of the set: {', '.join(named) or 'none'}")
    doubt = _doubt(f"{text} {beside}", named[0], words)
    if doubt:
        return Answer("invalid", reason=f"names {named[0]!r} but {doubt}")
    if len(_WORD.findall(text)) > MAX_LABEL_WORDS:
        return Answer("invalid", reason=f"a text of more than {MAX_LABEL_WORDS} words is not a choice")
    return _one_hot(named[0], labels)


def parse_exact_label(reply: Reply, labels: tuple[str, ...]) -> Answer:
    """Read a reply that is a label (or a synonym) and nothing else but punctuation."""
    label = _bare_label(reply.text, _vocabulary(tuple(labels)))
    return _one_hot(label, labels) if label else Answer("invalid", reason="not a bare label")


class _Vocabulary(NamedTuple):
    """Words of a label set: `bare` by themselves, in a sentence, and those of emotions outside the set."""

    labels: tuple[str, ...]
    bare: dict[str, str]
    in_a_sentence: re.Pattern
    other_emotions: re.Pattern

    def named(self, text: str) -> list[str]:
        """Labels that occur in a plain text as whole words, longest first so that "very sad" hides its "sad"."""
        found = {self.bare[match.group()] for match in self.in_a_sentence.finditer(text)}
        return [label for label in self.labels if label in found]


@functools.lru_cache(maxsize=64)
def _vocabulary(labels: tuple[str, ...]) -> _Vocabulary:
    owners: dict[str, set[str]] = {}
    for label in labels:
        owners.setdefault(_plain(label), set()).add(label)
    # Labels that differ only in what is made one here cannot be told apart in a reply.
    exact = {word: label for word, (label, *others) in owners.items() if word and not others}
    words = {}
    for group in SYNONYMS:
        named = [exact[word] for word in group if word in exact]
        if len(named) == 1:
            words.update(dict.fromkeys(group, named[0]))
    bare = {**words, **exact}
    sentence = [word for word in bare if word in exact or word not in _CODES]
    # "Calm" says how an emotion sounds, and contradicts none.
    known = {word for group in SYNONYMS for word in group} - _CODES - {"calm", "calmness"}
    return _Vocabulary(labels, bare, _any_of(sentence), _any_of(known - bare.keys()))


def _any_of(words: Sequence[str] | set[str]) -> re.Pattern:
    """Any of some words, the longest that fits; nothing if there are none."""
    longest_first = sorted(words, key=lambda word: (-len(word), word))
    return re.compile(f"{_NOT_BEHIND}(?:{'|'.join(map(re.escape, longest_first)) or '(?!)'}){_NOT_AHEAD}")


@functools.lru_cache(maxsize=16)
def _plain(text: str) -> str:
    """Lower case, one form of each character, apostrophe, hyphen and blank, and nothing that is not seen."""
    text = text.translate(_ONE_KIND)
    if not (text.isascii() and text.isprintable()):
        text = unicodedata.normalize("NFKC", text)
        # A soft hyphen, a zero byte or half a character inside "unhappy" must not make a word of "happy".
        text = "".join(c for c in text if c in _BLANKS or unicodedata.category(c) not in _UNSEEN)
    return " ".join(text.split()).casefold()


def _printable(reason: object) -> str:
    """Make a short text of anything, which every file can hold."""
    return str(reason)[:_LONGEST_REASON].encode("utf-8", "backslashreplace").decode()


def _bare_label(text: str, words: _Vocabulary) -> str | None:
    plain = _plain(text)
    return words.bare.get(plain) or words.bare.get(plain.lstrip(_EDGES).rstrip(_ENDS))


def _doubt(text: str, label: str, words: _Vocabulary) -> str:
    """Say what in a plain text speaks against its one label; empty if nothing does."""
    if words.named(text) != [label]:
        return "another label stands beside it"
    other = words.other_emotions.search(text)
    if other:
        return f"also {other.group()!r}, which is no label of the set"
    if _REFUSAL.search(text) or _NEGATION.search(text):
        return "negates, doubts or declines"
    if "?" in text:
        return "asks"
    if _ZERO.search(text):
        return "gives a number of zero"
    said = set(_WORD.findall(text))
    longer = [other for other in words.labels if other != label and _holds(_plain(other), label, said)]
    return f"may mean {longer[0]!r}" if longer else ""


def _holds(longer: str, label: str, said: set[str]) -> bool:
    """Whether a longer label holds all words of a label, and a text those of both."""
    parts = set(_WORD.findall(longer))
    return parts > set(_WORD.findall(_plain(label))) and parts <= said


def _chooses(reply: Reply, labels: tuple[str, ...]) -> bool:
    """Whether a text chooses, if need be in its first sentence with no other label behind it."""
    if parse_label(reply, labels).is_sample or parse_distribution(reply, labels).is_sample:
        return True
    opening = re.split(r"[.\n]", reply.text, maxsplit=1)[0]
    label = _bare_label(opening, _vocabulary(labels))
    return label is not None and _vocabulary(labels).named(_plain(reply.text)) == [label]


def _one_hot(label: str, labels: Sequence[str]) -> Answer:
    return Answer("label", probs=tuple(float(other == label) for other in labels))


def _choice_in_json(text: str, words: _Vocabulary) -> tuple[str, str]:
    """Texts that the JSON objects of a text hold under keys of a choice, and what stands beside the objects."""
    values, beside = json_values(text)
    if not values:
        return text, ""
    objects = [item for value in values for item in (value if isinstance(value, list) else [value])]
    texts = [_under(item, _CHOICE_KEYS) for item in objects if isinstance(item, dict)]
    choices = [" ; ".join(said) for each in texts if (said := [part for part in each if isinstance(part, str)])]
    if len(choices) > 1 and not all(words.named(_plain(choice)) for choice in choices):
        raise ValueError("several objects, and not all choose a label")
    return " ; ".join(choices), beside


def _key(key: str) -> str:
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", key)
    return _plain(words).replace("_", " ").replace("-", " ").strip(_ENDS)


def _label_of_token(token: str, labels: Sequence[str], words: Mapping[str, str]) -> str | None:
    # Byte-pair vocabularies mark a leading space as "Ġ" or "▁".
    piece = _plain(token.strip(" \t\r\n\"'`*Ġ▁"))
    if piece in ("", "a", "an"):  # articles are prefixes of "angry" and yet open any sentence
        return None
    if piece in words:
        return words[piece]
    owners = [label for label in labels if _plain(label).startswith(piece)]
    return owners[0] if len(owners) == 1 else None


def _without_thoughts(text: str) -> str | None:
    """Give what stands behind a train of thought; `None` if it does not end."""
    ends = [match.end() for match in _THOUGHTS_END.finditer(text)]
    text = text[ends[-1] :] if ends else text
    return None if _THOUGHTS_BEGIN.search(text) else _AROUND_ANSWER.sub(" ", text).strip()


def _table(value: object) -> dict[str, object]:
    """Give what a decoded value assigns to names; empty if nothing."""
    if isinstance(value, dict):
        return _parallel(value) or value
    entries = [_entry(item) for item in value] if isinstance(value, list) else []
    return distinct(entry for entry in entries if entry) if all(entries) else {}


def _entry(item: object) -> tuple[str, object] | None:
    """Name and number of an item such as `{"label": "angry", "score": 0.7}` or `["angry", 0.7]`."""
    if isinstance(item, dict):
        names, scores = (_under(item, keys) for keys in (_NAME_KEYS, _SCORE_KEYS))
        item = [*names, *scores] if len(names) == len(scores) == 1 else ()
    pair = tuple(item) if isinstance(item, (list, tuple)) and len(item) == 2 else (None, None)
    return pair if isinstance(pair[0], str) and _is_number(pair[1]) else None


def _parallel(value: dict) -> dict[str, object]:
    """Join a list of names and a list of as many numbers."""
    lists = [[item for item in _under(value, keys) if isinstance(item, list)] for keys in (_NAME_LISTS, _SCORE_LISTS)]
    if [len(found) for found in lists] != [1, 1]:
        return {}
    (names,), (scores,) = lists
    if not all(isinstance(name, str) for name in names) or not all(map(_is_number, scores)):
        return {}
    if len(names) != len(scores):
        raise ValueError(f"{len(names)} labels and {len(scores)} scores")
    return distinct(zip(names, scores, strict=True))


def _under(item: Mapping, keys: set[str]) -> list:
    return [value for key, value in item.items() if _key(key) in keys]


def _table_of_lines(text: str, words: _Vocabulary) -> list[dict[str, float]]:
    """Probabilities in lines of a text, if all labels have one: a line with one more word is prose."""
    pairs, _ = number_lines(text)
    scores = _scores(distinct(pairs), words)
    return [scores] if len(scores) == len(words.labels) else []


def _scores(table: Mapping[str, object], words: _Vocabulary) -> dict[str, float]:
    """Numbers given to labels in a table; empty if it names none."""
    given: dict[str, object] = {}
    outside, other_emotions, unclear = 0.0, 0.0, []
    for key, value in table.items():
        number = _score_in(value)
        label, plain = _bare_label(key, words), _key(key)
        if label is None and _is_number(number):
            label, certain = _label_in_key(key, plain, words)
            unclear += [key] * (not certain)
        if label in given:
            raise ValueError(f"the label {label!r} is named twice")
        if label is not None:
            given[label] = number
        elif _is_number(number) and not _is_measure(key):
            outside += max(_number(number), 0.0)
            other_emotions = max(other_emotions, _number(number) if words.other_emotions.search(plain) else 0.0)
    complete = len(given) == len(words.labels)
    if unclear and not complete:
        # "angry (of 1)": 0.9 must not be passed over beside a number for another label.
        raise ValueError(f"the key {unclear[0]!r} holds a label and more")
    if any(map(_is_percentage, given.values())) and any(
        not _is_percentage(number) and _number(number) > 1 for number in given.values()
    ):
        raise ValueError("percentages beside numbers above 1")
    scores = {label: _number(number) for label, number in given.items()}
    if scores and (other_emotions > max(scores.values()) or not (complete or sum(scores.values()) > outside)):
        raise ValueError("most of what was given is outside the label set")
    return scores


def _label_in_key(key: str, plain: str, words: _Vocabulary) -> tuple[str | None, bool]:
    """Label that a key holds as a word among others, and whether these certainly change nothing about it."""
    named = words.named(plain)
    if not named:
        return None, True
    if len(named) > 1 or _NEGATION.search(plain) or words.other_emotions.search(plain):
        raise ValueError(f"the key {key!r} holds a label and more")
    rest = words.in_a_sentence.sub(" ", plain)
    return named[0], not re.search(r"\d", rest) and set(_WORD.findall(rest)) <= _DECORATION


def _is_measure(key: str) -> bool:
    return not _MEASURES.isdisjoint(_WORD.findall(_key(key)))


def _score_in(value: object) -> object:
    """Give the number of `{"score": 0.7, ...}`, and anything else as it is."""
    scores = _under(value, _SCORE_KEYS) if isinstance(value, dict) else ()
    return scores[0] if len(scores) == 1 else value


def _is_percentage(value: object) -> bool:
    return isinstance(value, str) and value.rstrip().endswith("%")


def _is_number(value: object) -> bool:
    try:
        _number(value)
    except (ValueError, OverflowError):
        return False
    return True


def _number(value: object) -> float:
    if isinstance(value, str) and "_" not in value:
        digits = value.strip().rstrip("% ")
        if re.fullmatch(r"[1-9]\d{0,2},\d{3}", digits):
            raise ValueError(f"{digits} may be a thousand or a fraction")
        value = float(digits.replace(",", ".", 1)) / (100.0 if _is_percentage(value) else 1.0)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        # Not the value itself: it may be an object of any depth.
        raise ValueError(f"{type(value).__name__} is not a probability")
    return float(value)


def _normalised(values: Sequence[float]) -> tuple[float, ...]:
    total = sum(values)
    if not all(math.isfinite(v) and v >= 0 for v in values) or not math.isfinite(total) or total <= 0:
        raise ValueError("the probabilities are negative, not finite, or all zero")
    return tuple(v / total for v in values)
