"""Replies as language models and their servers really give them, each with its right reading.

Four labels are asked for, as a distribution. A case is one choice of a chat completion; `reading` is `USUAL`, another
distribution, or the kind of an answer without probabilities and a pattern of its reason.
"""

from __future__ import annotations

import json
from typing import NamedTuple

LABELS = ("angry", "happy", "neutral", "sad")
USUAL = (0.7, 0.1, 0.1, 0.1)
OBJECT = json.dumps(dict(zip(LABELS, USUAL, strict=True)))
ROWS = tuple(zip(LABELS, USUAL, strict=True))
DOUBTS = 'maybe {"angry":0.1,"sad":0.9}'


class Case(NamedTuple):
    """A choice and its right reading."""

    name: str
    choice: dict
    reading: tuple


def said(name: str, content, reading: tuple = USUAL, finish_reason: str | None = "stop", **message) -> Case:
    """Case of a message with this content."""
    message = {"role": "assistant", "content": content, **message}
    return Case(name, {"index": 0, "message": message, "finish_reason": finish_reason}, reading)


def called(name: str, arguments, content=None) -> Case:
    """Case of a function call."""
    call = {"id": "1", "type": "function", "function": {"name": "set_emotion", "arguments": arguments}}
    return said(name, content, finish_reason="tool_calls", tool_calls=[call])


def listed(name_key: str, score_key: str, rows=ROWS) -> str:
    """List of objects."""
    return json.dumps([{name_key: name, score_key: score} for name, score in rows])


INVALID, REFUSAL = ("invalid", "."), ("refusal", ".")
TRUNCATED, OUTSIDE = ("invalid", "truncated"), ("invalid", "outside the label set")
INCOMPLETE, CONTRADICTING = ("invalid", "incomplete"), ("invalid", "contradict")

THOUGHTS = {
    "think": ("<think>", "</think>\n\n"),
    "thinking": ("<thinking>", "</thinking>"),
    "thought": ("<thought>", "</thought>"),
    "reasoning": ("<reasoning>", "</reasoning>"),
    "tag with an attribute": ('<think type="fast">', "</think>"),
    "seed": ("<seed:think>", "</seed:think>"),
    "square brackets": ("[THINK]", "[/THINK]"),
    "triangles": ("◁think▷", "◁/think▷"),
    "begin of thought": ("<|begin_of_thought|>", "<|end_of_thought|>"),
    "no beginning": ("", "</think>"),
    "channels": (
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
    ),
    "channels with a format": (
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final <|constrain|>json<|message|>",
    ),
    "channels without their marks": ("analysisWe need one object: ", "assistantfinal"),
    "channel of one kind": ("<|channel>thought\n", "<channel|>"),
    "unused tokens": ("<unused94>thought\n", "<unused95>"),
}

CASES = (
    *(said(f"thoughts: {name}", f"{begin}{DOUBTS}{end}{OBJECT}") for name, (begin, end) in THOUGHTS.items()),
    *(
        said(f"thoughts without an end: {name}", f"{begin}{OBJECT}", TRUNCATED)
        for name, (begin, _) in THOUGHTS.items()
        if begin
    ),
    said("answer in tags", f"<think>{DOUBTS}</think><answer>{OBJECT}</answer>"),
    said("end of the turn as text", f"{OBJECT}<|im_end|>"),
    said("only reasoning", None, ("invalid", "reasoning_content.*switch thinking off"), reasoning_content=OBJECT),
    said("only reasoning, other name", "", ("invalid", "reasoning_content"), reasoning=OBJECT),
    said("reasoning beside content", OBJECT, reasoning_content=DOUBTS),
    said("parts", [{"type": "thinking", "text": DOUBTS}, {"type": "text", "text": OBJECT}]),
    # Shapes of a distribution.
    said("two lists", json.dumps({"labels": LABELS, "scores": USUAL})),
    said("two lists, other names", json.dumps({"result": {"emotions": LABELS, "probabilities": USUAL}})),
    said("two lists that do not match", json.dumps({"labels": LABELS, "scores": USUAL[:3]}), INVALID),
    said("label and score", listed("label", "score", ROWS[::-1])),
    *(said(f"{name} and {score}", listed(name, score)) for name in ("emotion", "class", "name") for score in ("prob",)),
    *(said(f"label and {score}", listed("label", score)) for score in ("probability", "confidence", "value")),
    said("list under a key", f'{{"emotions": {listed("label", "score")}, "transcript": "so sad"}}'),
    said("list without all labels", listed("label", "score", (("angry", 0.05), ("puzzled", 0.95))), OUTSIDE),
    said("pairs", json.dumps(ROWS)),
    said("object of objects", json.dumps({name: {"score": score, "reason": "loud"} for name, score in ROWS})),
    said("object under keys", f'{{"result": {{"scores": {OBJECT}}}, "confidence": 0.9}}'),
    said("string", json.dumps(OBJECT)),
    said("string under a key", json.dumps({"answer": OBJECT})),
    said("quotes escaped", OBJECT.replace('"', '\\"')),
    called("function call", OBJECT),
    called("function call, decoded", json.loads(OBJECT)),
    called("function call beside the same content", OBJECT, OBJECT),
    said("function call, older form", None, function_call={"name": "f", "arguments": OBJECT}),
    said("lines", "angry: 0.7\nhappy: 0.1\nneutral: 0.1\nsad: 0.1"),
    said("bullets", "Here you are:\n- **Angry**: 70%\n- **Happy**: 10%\n- **Neutral**: 10%\n- **Sad**: 10%\n"),
    said("numbered", "1. angry - 0.7\n2. happy - 0.1\n3. neutral - 0.1\n4. sad - 0.1"),
    said("table", "| Emotion | P |\n|---|---|\n| angry | 0.7 |\n| happy | 0.1 |\n| neutral | 0.1 |\n| sad | .1 |"),
    said("one line", "angry 0.7, happy 0.1, neutral 0.1, sad 0.1"),
    said("lines, one of them longer", "angry: 0.7, loud\nhappy: 0.1\nneutral: 0.1\nsad: 0.1 or so", INVALID),
    said("lines without a label", "angry: 0.7\nhappy: 0.3", INVALID),
    # JSON that is none.
    said("decimal commas in quotes", '{"angry":"0,7","happy":"0,1","neutral":"0,1","sad":"0,1"}'),
    said("decimal commas", '{"angry": 0,7, "happy": 0,1, "neutral": 0,1, "sad": 0,1}'),
    said("comma that may be of a thousand", '{"angry":"1,700","happy":"0,1"}', INVALID),
    said("percent", '{"angry": 70%, "happy": 10 %, "neutral": 10%, "sad": 10%}'),
    said("a comma too many", OBJECT.replace("}", ",}")),
    said("curly quotes", "{“angry”:0.7,“happy”:0.1,“neutral”:0.1,“sad”:0.1}"),
    said("low quotes", "{„angry“:0.7,„happy“:0.1,„neutral“:0.1,„sad“:0.1}"),
    said("single quotes", OBJECT.replace('"', "'")),
    said("constants of Python", "{'angry': 0.7, 'happy': 0.1, 'neutral': 0.1, 'sad': 0.1, 'note': None}"),
    said("no quotes", "{angry: 0.7, happy: 0.1, neutral: .1, sad: .1}"),
    said("a number of 5,000 digits", f'{{"angry": {"9" * 5000}, "sad": 1}}', INVALID),
    # Labels with other words.
    said("two languages", '{"生气/angry":0.7,"开心/happy":0.1,"中立/neutral":0.1,"难过/sad":0.1}'),
    said("two languages, one script", '{"angry (Wut)":0.7,"happy (Freude)":0.1,"neutral":0.1,"sad (Trauer)":0.1}'),
    said("pictures", '{"angry 😠":0.7,"happy 😀":0.1,"neutral 😐":0.1,"sad 😢":0.1}'),
    *(
        said(f"key {pattern.format('x')}", json.dumps({pattern.format(name): score for name, score in ROWS}))
        for pattern in ("p_{}", "{}_probability", "P({})", "probability of {}", "{} score", "emotion: {}")
    ),
    said("camel case", '{"angryScore":0.7,"happyScore":0.1,"neutralScore":0.1,"sadScore":0.1}'),
    said("a word whose meaning is open", '{"не angry": 0.9, "sad": 0.1}', INVALID),
    said("negated keys", json.dumps({f"not {name}": score for name, score in ROWS}), INVALID),
    said("two labels in a key", '{"angry or sad": 0.9, "happy": 0.1}', INVALID),
    # How a reply ended.
    *(
        said(f"refusal: {name}", content, REFUSAL, name)
        for content, name in (
            *(("", "SAFETY"), (None, "SAFETY"), (None, "PROHIBITED_CONTENT"), (None, "RECITATION"), ("", "BLOCKLIST")),
            *(("", "SPII"), (OBJECT, "content_filter"), ("No.", "refusal"), ("", "guardrail_intervened")),
            *((OBJECT, "sensitive"), ("", "FinishReason.SAFETY"), ("", "content_filtered"), ("", "ERROR_TOXIC")),
        )
    ),
    *(
        said(f"cut off: {name}", content, TRUNCATED, name)
        for name in ("MAX_TOKENS", "max_tokens", "length", "model_length", "max_output_tokens", "ERROR_LIMIT", "abort")
        for content in ("angry", OBJECT)
    ),
    *(
        said(f"ended: {name}", OBJECT, USUAL, name)
        for name in ("STOP", "end_turn", "eos", "eos_token", "stop_sequence", "COMPLETE", "tool_use", "", None)
    ),
    # Part of a reply.
    said("contradiction", '{"angry":0.7,"sad":0.3}\nFinal: {"angry":0.1,"sad":0.9}', CONTRADICTING),
    said("the same twice", f"{OBJECT}\nFinal: {OBJECT.replace('0.', '').replace('7', '70').replace('1', '10')}"),
    said("most mass elsewhere", '{"angry":0.05,"puzzled":0.95}', OUTSIDE),
    said("half of the mass elsewhere", '{"angry":0.5,"other":0.5}', OUTSIDE),
    said("least mass elsewhere", '{"angry":0.6,"sad":0.2,"puzzled":0.2}', (0.75, 0, 0, 0.25)),
    said("all labels and others", f'{OBJECT[:-1]}, "puzzled": 1, "tense": 0.4}}'),
    said("other numbers", f'{OBJECT[:-1]}, "confidence": 0.9, "valence": -0.4, "reason": "loud"}}'),
    said("few labels and other numbers", '{"sad": 0.3, "confidence": 0.9, "arousal": 7}', (0, 0, 0, 1)),
    said("an object inside one that is cut", f'{{"first": {OBJECT}, "final": {{"angry": 0.1, "sa', INCOMPLETE),
    said("a list that is cut", listed("label", "score")[:-20], INCOMPLETE),
)
