"""Replies whose right reading is known beforehand, and garbage, against the parser of answers.

`python tests/answer_fuzz.py --cases 1000000` reads that many replies and prints what came of them; status 1 if a wrong
label, a sample where none may be, or an exception was found. Case number i of a seed is always the same one.

Three kinds of cases are made, in turn:

- told: a truth is drawn and put into words that leave it as it is (case, punctuation, code fences, blanks, characters
  of another form, JSON, prose around it). The parser gives that truth, or no sample.
- unclear: two labels, a negation, a label inside another word, an unknown emotion, objects that contradict each other,
  a refusal. The parser gives no sample.
- garbage: random characters, bytes and JSON, and told replies that were damaged. Whatever comes, it is a distribution
  over the labels, and a label that comes stands in the text.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import random
import re
import sys
import time
import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple

from speechbrain_mifuse.lalm.answer import KINDS, Answer, Reply
from speechbrain_mifuse.lalm.prompt import ANSWER_FORMS, Prompt
from speechbrain_mifuse.utils.progress import progress

# Words for each label, apart from the parser's own: a slip there must not hide itself here.
WORDS = {
    "angry": ("angry", "anger"),
    "happy": ("happy", "happiness", "joyful"),
    "neutral": ("neutral",),
    "sad": ("sad", "sadness"),
    "fear": ("fear", "fearful"),
    "disgust": ("disgust", "disgusted"),
    "surprise": ("surprise", "surprised"),
    "very sad": ("very sad",),
    "wütend": ("wütend",),
    "froh": ("froh",),
}
SETS = (
    ("angry", "happy", "neutral", "sad"),
    ("sad", "neutral", "happy", "angry"),
    ("angry", "disgust", "fear", "happy", "neutral", "sad", "surprise"),
    ("sad", "very sad", "happy"),
    ("wütend", "froh", "neutral"),
)
# Emotions that no set above holds, and some that only some sets hold.
STRANGERS = ("bored", "excited", "frustrated", "contempt", "fearful", "surprised", "disgusted")
SENTENCES = (
    "The speaker sounds {}.",
    "Emotion: {}",
    "Answer: {}.",
    "I would say {}",
    "The voice is {}, clearly {}!",
    "> {}",
    "The emotion is: {}",
    "{} (the voice shakes)",
    "It is {}",
)
NEGATIONS = (
    "not {}",
    "The speaker isn't {}.",
    "isn’t {}",
    "isn`t {}",
    "Neither {} nor anything else",
    "no {} at all",
    "never {}",
    "far from {}",
    "hardly {}",
    "anything but {}",
    "rather than {}, I hear nothing",
    "without {}",
    "I can't say {}",
    "dont think {}",
    "less {} than before",
    "{}: 0%",
    "{} = 0.0",
    "!{}",
    "unsure, maybe {}",
    "Is the speaker {}?",
    "{}? Is that what you want to hear, or what",
)
REFUSALS = (
    "I'm sorry, but I can't identify {} from audio.",
    "As an AI language model I don't have ears, {} or otherwise.",
    "I am unable to hear audio. {}?",
    "Unfortunately the file is empty, {}",
    "Please upload the audio; {} comes later",
    "Sadly, the audio is silent.",
    "I'd be happy to listen.",
    "I'm afraid nothing can be heard.",
)
INSIDE = (
    "un{}",
    "un-{}",
    "un\u00ad{}",
    "un\u200b{}",
    "un\u2011{}",
    "non-{}",
    "{}ish",
    "{}-free",
    "x{}",
    "{}\u0336",
    "{}s'",
    "un\0{}",
    "un\x1c{}",
    "un\ud800{}",
    "un\ufffd{}",
)
ARGUED = "{} because of the loud voice and the tense manner of speaking in this recording of one person, I think"
BLANKS = (" ", "\n", "\t", "\u00a0", "\u2003", "\r\n", "")
UNSEEN = "\u200b\u00ad\u2060\ufeff\0\x1c"
MARKS = ("", ".", "!", "**", "`", '"', "'", "_", "...", ",", ":", "“", "”", "«", "»", "*", "。", "！")
THOUGHTS = (
    ("<think>", "</think>"),
    ("<thought>", "</thought>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
)
UNFINISHED = ("length", "content_filter", "MAX_TOKENS", "SAFETY", "model_length", "max_tokens", "RECITATION")
PARTS = (
    "{",
    "}",
    "[",
    "]",
    '"',
    ":",
    ",",
    "angry",
    "sad",
    "0.5",
    "1e999",
    "NaN",
    "<think>",
    "</think>",
    "\\ud800",
    "null",
    "%",
)
# How far a probability may lie from the truth: six digits are written.
ROUNDED = 1e-4


class Case(NamedTuple):
    """A reply, how it is asked for, and what it may be read as."""

    kind: str
    form: str
    labels: tuple[str, ...]
    reply: Reply
    truth: tuple[float, ...] | None = None


class Tally(NamedTuple):
    """What came of some cases: counts by kind and outcome, the first failures, the slowest case in seconds."""

    counts: collections.Counter
    failures: list[str]
    slowest: float
    seconds: float

    def of(self, kind: str, outcome: str) -> int:
        """Count of one outcome of one kind of cases."""
        return self.counts[kind, outcome]


def one_hot(label: str, labels: Sequence[str]) -> tuple[float, ...]:
    """Distribution that is sure."""
    return tuple(float(other == label) for other in labels)


def told_label(rng: random.Random) -> Case:
    """Name one label."""
    labels = rng.choice(SETS)
    label = rng.choice(labels)
    text = dressed(rng.choice(WORDS[label]), rng)
    if rng.random() < 0.5:
        text = rng.choice(SENTENCES).replace("{}", text)
    elif rng.random() < 0.4:
        key = rng.choice(("emotion", "label", "answer", "Predicted_Emotion", "final answer"))
        text = json.dumps({key: text, **others(rng)}, ensure_ascii=rng.random() < 0.5)
    return Case("told", "label", labels, Reply(wrapped(text, labels, rng), "stop"), one_hot(label, labels))


def told_distribution(rng: random.Random) -> Case:
    """Give each label its probability."""
    labels = rng.choice(SETS)
    weights = [rng.random() ** 3 + 1e-6 for _ in labels]
    truth = [weight / sum(weights) for weight in weights]
    unit = rng.choice((lambda p: p, lambda p: f"{100 * p:.6f}%", lambda p: f"{p:.8f}", lambda p: 100 * p))
    scores = {cased(rng.choice(WORDS[label]), rng): unit(p) for label, p in zip(labels, truth, strict=True)}
    content = dict(rng.sample(list(scores.items()), len(scores))) | others(rng)
    content = {rng.choice(("scores", "probabilities")): content} if rng.random() < 0.2 else content
    text = json.dumps(content, indent=rng.choice((None, 1, "\t")), ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.4:
        text = rng.choice(SHAPES)(scores)
    return Case("told", "distribution", labels, Reply(wrapped(text, labels, rng), "stop"), tuple(truth))


# Other ways to write what labels are given.
SHAPES: tuple[Callable[[dict], str], ...] = (
    lambda scores: json.dumps({"labels": list(scores), "scores": list(scores.values())}),
    lambda scores: json.dumps([{"label": word, "score": score} for word, score in scores.items()]),
    lambda scores: json.dumps(json.dumps(scores)),
    lambda scores: json.dumps({f"p_{word}": score for word, score in scores.items()}),
    lambda scores: json.dumps({f"{word} 😠": score for word, score in scores.items()}, ensure_ascii=False),
    lambda scores: json.dumps(scores).replace('"', "'"),
    lambda scores: json.dumps(scores).replace("}", ",}"),
    lambda scores: json.dumps({word: str(score).replace(".", ",") for word, score in scores.items()}),
    lambda scores: "\n".join(f"- {word}: {score}" for word, score in scores.items()),
    lambda scores: "\n".join(f"| {word} | {score} |" for word, score in scores.items()),
)


def told_logprobs(rng: random.Random) -> Case:
    """Give log-probabilities of first tokens, beside those of other words."""
    labels = rng.choice(SETS[:3])
    mass = rng.uniform(0.05, 1.0)
    weights = [rng.random() ** 2 + 1e-6 for _ in labels]
    truth = [weight / sum(weights) for weight in weights]
    tokens = [
        (rng.choice(("", " ", "Ġ", "▁", '"')) + cased(label, rng), math.log(mass * p))
        for label, p in zip(labels, truth, strict=True)
    ]
    tokens += [(word, math.log((1 - mass) / 4 + 1e-9)) for word in rng.sample(("The", "I", "a", "An", "<", "!", ""), 3)]
    rng.shuffle(tokens)
    said = Reply(wrapped(rng.choice(labels), labels, rng), "stop", None, tuple(tokens))
    return Case("told", "logprobs", labels, said, tuple(truth))


def others(rng: random.Random) -> dict:
    """Entries of an object that choose nothing."""
    known = {
        "confidence": rng.random(),
        "note": "loud, not happy",
        "time": None,
        "transcript": "I am so sad",
        "n": [1, 2],
    }
    return dict(rng.sample(list(known.items()), rng.choice((0, 0, 1, 2))))


def cased(word: str, rng: random.Random) -> str:
    """Another case."""
    return rng.choice((str, str.upper, str.title, str.swapcase))(word)


def dressed(word: str, rng: random.Random) -> str:
    """Another case, other forms of the characters, unseen ones between them, marks around."""
    word = cased(word, rng)
    if rng.random() < 0.15:
        word = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in word)
    if rng.random() < 0.15:
        place = rng.randrange(len(word))
        word = word[:place] + rng.choice(UNSEEN) + word[place:]
    if rng.random() < 0.15:
        word = unicodedata.normalize("NFD", word)
    return rng.choice(MARKS) + word + rng.choice(MARKS)


def wrapped(text: str, labels: Sequence[str], rng: random.Random) -> str:
    """Blanks, a code fence, or a train of thought about all labels around a reply."""
    text = rng.choice(BLANKS) + text + rng.choice(BLANKS)
    if rng.random() < 0.15:
        text = f"```{rng.choice(('', 'json'))}\n{text}\n```"
    if rng.random() < 0.15:
        begin, end = rng.choice(THOUGHTS)
        text = f"{begin}{rng.choice(labels)}? {json.dumps({rng.choice(labels): 1})} no{end}{text}"
    return text


def unclear(rng: random.Random) -> Case:
    """Say what must not be read as a label or a distribution."""
    labels = rng.choice(SETS[:3])
    form = rng.choice(tuple(ANSWER_FORMS))
    text = rng.choice(UNCLEAR)(labels, rng)
    tokens = tuple((label, math.log(0.9 / len(labels))) for label in labels) if form == "logprobs" else None
    if rng.random() < 0.05:
        return Case("unclear", form, labels, Reply(rng.choice(labels), rng.choice(UNFINISHED)))
    if rng.random() < 0.05:
        return Case("unclear", form, labels, Reply(rng.choice(THOUGHTS)[0] + rng.choice(labels), "stop"))
    return Case("unclear", form, labels, Reply(wrapped(text, labels, rng), "stop", None, tokens))


def several(labels: Sequence[str], rng: random.Random) -> str:
    """Name two labels."""
    first, second = (rng.choice(WORDS[label]) for label in rng.sample(labels, 2))
    return rng.choice(("{} or {}", "{}/{}", "{}, {}", "a mix of {} and {}", "{}; no wait, {}", "{}\n{}")).format(
        first, second
    )


def in_other_words(labels: Sequence[str], rng: random.Random) -> str:
    """Negate, ask, decline, argue, or hide a label inside another word."""
    word = rng.choice(WORDS[rng.choice(labels)])
    return rng.choice((*NEGATIONS, *REFUSALS, *INSIDE, ARGUED)).replace("{}", cased(word, rng))


def strange(labels: Sequence[str], rng: random.Random) -> str:
    """Name an emotion outside the set, alone or beside a label."""
    known = {word for label in labels for word in WORDS[label]}
    stranger = rng.choice([word for word in STRANGERS if word not in known])
    beside = f"{stranger} {rng.choice(('and', 'or', '/', ','))} {rng.choice(labels)}"
    return rng.choice((stranger, beside, json.dumps({"emotion": stranger}), json.dumps({"emotion": beside})))


def contradicting(labels: Sequence[str], rng: random.Random) -> str:
    """Give objects of which none is the answer."""
    a, b = rng.sample(labels, 2)
    chosen = rng.choice(
        (
            f'{{"{a}": 1}} or rather {{"{b}": 1}}',
            f'{{"first": {{"{a}": 1}}, "final": {{"{b}": 1}}}}',
            f'[{{"{a}": 0.9}}, {{"{b}": 0.9}}]',
            f'{{"{a}": 0.9, "more": [{{"{b}": 0.9}}]}}',
            f'{{"{a}": 0.5, "{a}": 0.1}}',
            f'{{"not {a}": 0.9, "{b}": 0.1}}',
            f'{{"{a}_or_{b}": 0.9, "{b}": 0.1}}',
            f'{{"{a}": "90%", "{b}": 10}}',
            f'{{"{a}": -1, "{b}": 2}}',
            f'{{"{a}": NaN}}',
            f'{{"{a}": 1e999, "{b}": 1}}',
            f'{{"{a}": 0, "{b}": 0}}',
            f'{{"{a}": true}}',
            f'{{"{a}": 0.05, "puzzled": 0.95}}',
            f'[{{"label": "{a}", "score": 0.05}}, {{"label": "puzzled", "score": 0.95}}]',
            f'[{{"label": "{a}", "score": 0.5}}, {{"label": "{b}", "sc',
            f'{{"first": {{"{a}": 1}}, "final": {{"{b}": 1',
            f"{{'{a}': 1}} or rather {{\"{b}\": 1}}",
            f'{{"labels": ["{a}", "{b}"], "scores": [0.7]}}',
            f"{a}: 0.05\npuzzled: 0.95",
            f'{{"{a}": "high"}}',
            f'{{"bored": 0.9, "{b}": 0.1}}',
            f'{{"{a}": 0.7, "{b}',
            f'I cannot hear anything. {{"{a}": 0.5, "{b}": 0.5}}',
            f'{{"{a}": 0.5, "{b}": 0.5, "note": "I cannot hear the audio"}}',
            f'{{"emotion": "{a}", "label": "{b}"}}',
            f'{{"emotion": "{a}"}} - no, {b}',
            f'{{"transcript": "so {a}", "emotion": "unclear"}}',
        )
    )
    return chosen


UNCLEAR: tuple[Callable[[Sequence[str], random.Random], str], ...] = (several, in_other_words, strange, contradicting)


def garbage(rng: random.Random) -> Case:
    """Random characters, bytes or pieces, or a damaged reply."""
    labels, form = rng.choice(SETS), rng.choice(tuple(ANSWER_FORMS))
    length = rng.choice((0, 1, 3, 10, 40, 120))
    make = rng.choice((characters, octets, pieces, damaged))
    text = make(length, rng)
    tokens = None
    if form == "logprobs":
        strange = (0.0, -1.0, 5.0, -9999.0, math.nan, math.inf, -math.inf)
        tokens = tuple((characters(3, rng) or "sad", rng.choice(strange)) for _ in range(rng.randrange(4)))
    ends = rng.choice(("stop", "stop", None, "length", "tool_calls"))
    return Case("garbage", form, labels, Reply(text, ends, rng.choice((None, None, None, text)), tokens))


def characters(length: int, rng: random.Random) -> str:
    """Characters of all planes, halves of surrogate pairs among them."""
    most = rng.choice((0x7F, 0x2FF, 0xFFFF, 0x10FFFF))
    return "".join(chr(rng.randrange(most + 1)) for _ in range(length))


def octets(length: int, rng: random.Random) -> str:
    """Random bytes read as text."""
    return rng.randbytes(length).decode(rng.choice(("latin-1", "utf-8", "utf-16")), "replace")


def pieces(length: int, rng: random.Random) -> str:
    """Pieces of JSON and of replies."""
    return "".join(rng.choice(PARTS) for _ in range(length))


def damaged(length: int, rng: random.Random) -> str:
    """Cut off a reply that was right, and take out, double and put in characters."""
    text = rng.choice((told_label, told_distribution))(rng).reply.text
    for _ in range(rng.randrange(1, 4)):
        place = rng.randrange(len(text) + 1)
        text = rng.choice(
            (
                text[:place],
                text[:place] + text[place + 1 :],
                text[:place] + rng.choice(PARTS) + text[place:],
                text[place:] * 2,
            )
        )
    return text


MAKERS = (told_label, told_distribution, told_logprobs, unclear, unclear, garbage)


def case(number: int, seed: int = 0) -> Case:
    """Case number `number` of a seed."""
    return MAKERS[number % len(MAKERS)](random.Random(f"{seed}:{number}"))


def fault(one: Case, answer: Answer) -> str:
    """Say what is wrong with the reading of a case; empty if nothing is."""
    if answer.kind not in KINDS or answer.is_sample != (answer.probs is not None):
        return f"no answer: {answer}"
    try:
        answer.reason.encode()
    except UnicodeEncodeError:
        return "a reason that cannot be stored"
    if not answer.is_sample:
        return "" if answer.reason else "no reason given"
    if one.kind == "unclear":
        return f"read as {answer.probs}"
    whole = len(answer.probs) == len(one.labels) and all(0 <= p <= 1 for p in answer.probs)
    if not whole or abs(sum(answer.probs) - 1) > 1e-9:
        return f"no distribution: {answer.probs}"
    if one.truth is not None and not as_told(one, answer):
        return f"read as {answer.kind} {answer.probs}, told {one.truth}"
    if one.kind == "garbage" and answer.kind == "label" and not stands_in(one.reply.text, one.labels, answer.probs):
        return f"read as {answer.probs}, which does not stand in the text"
    return ""


def as_told(one: Case, answer: Answer) -> bool:
    """Whether probabilities are the truth."""
    return all(abs(p - q) <= ROUNDED for p, q in zip(answer.probs, one.truth, strict=True))


def stands_in(text: str, labels: Sequence[str], probs: Sequence[float]) -> bool:
    """Whether a text holds a word of the label that it was read as, in JSON's escapes too."""
    text = re.sub(r"\\u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), text)
    (label,) = (label for label, p in zip(labels, probs, strict=True) if p)
    plain = "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) not in ("Cc", "Cf", "Cs"))
    # "ang", "hap" and "joy" are words for a label too.
    stems = [word[:3] for word in WORDS[label]]
    return any(stem in plain.casefold() for stem in stems)


def run(cases: int, seed: int = 0, show_progress: bool = False, most: int = 20) -> Tally:
    """Read cases and count what came of them.

    Parameters
    ----------
    cases : int
        How many.
    seed : int
        Of the generator.
    show_progress : bool
        Show a progress bar.
    most : int
        Failures that are described.

    Returns
    -------
    Tally
        Outcomes are accepted, refused, wrong and crashed.
    """
    counts, failures, slowest, began = collections.Counter(), [], 0.0, time.perf_counter()
    prompts = {(form, labels): Prompt(labels, form) for form in ANSWER_FORMS for labels in SETS}
    for number in progress(range(cases), unit="reply", desc="fuzz", disable=not show_progress):
        one = case(number, seed)
        start = time.perf_counter()
        try:
            found = prompts[one.form, one.labels].parse(one.reply)
            wrong = fault(one, found)
            outcome = "wrong" if wrong else "accepted" if found.is_sample else "refused"
            stored = one.reply.to_json()
            # A stored reply is parsed again by a later version: it must come back as it was.
            if (
                stored.encode()
                and number % 16 == 0
                and "nan" not in stored.lower()
                and Reply.from_json(stored) != one.reply
            ):
                outcome, wrong = "wrong", "does not survive storage"
        except Exception as error:
            outcome, wrong = "crashed", repr(error)
        slowest = max(slowest, time.perf_counter() - start)
        counts[one.kind, outcome] += 1
        if wrong and len(failures) < most:
            failures.append(
                f"case {number} of seed {seed}, {one.kind}, {one.form}, {one.labels}: {one.reply!r}: {wrong}"
            )
    return Tally(counts, failures, slowest, time.perf_counter() - began)


def told(tally: Tally) -> str:
    """Summary in a few lines."""
    lines = [f"{sum(tally.counts.values())} cases in {tally.seconds:.1f} s, slowest {1000 * tally.slowest:.1f} ms"]
    for kind in ("told", "unclear", "garbage"):
        parts = [f"{tally.of(kind, outcome)} {outcome}" for outcome in ("accepted", "refused", "wrong", "crashed")]
        lines.append(f"{kind:8} {', '.join(parts)}")
    totals = collections.Counter()
    for (_, outcome), count in tally.counts.items():
        totals[outcome] += count
    lines.append(
        f"all      {', '.join(f'{totals[name]} {name}' for name in ('accepted', 'refused', 'wrong', 'crashed'))}"
    )
    return "\n".join([*lines, *tally.failures])


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Fuzz the parser of answers.")
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tally = run(options.cases, options.seed, show_progress=True)
    print(told(tally))
    return int(bool(tally.failures))


if __name__ == "__main__":
    sys.exit(main())
