"""What the outcomes of a probe's questions tell: pure functions from replies to findings."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence

from speechbrain_mifuse.lalm.answer import Reply, parse_distribution, parse_label, parse_logprobs
from speechbrain_mifuse.lalm.card import NO, REJECTED, UNKNOWN, YES, Finding
from speechbrain_mifuse.lalm.profile import AUDIO_PARTS, CONSTRAINTS, Profile
from speechbrain_mifuse.lalm.prompt import ANSWER_FORMS

LABELS = ("angry", "happy", "neutral", "sad")
# A word that no constraint on the labels lets through.
OFF_LIST = "zebra"
CLIP_SECONDS = 4.0
CHOICES = 3
# Temperatures at which log-probabilities are compared.
COOL, WARM = 0.5, 1.0
# Statuses that blame the request; 408, 409 and 429 blame the moment.
_REFUSED = {400, 404, 405, 406, 411, 413, 414, 415, 422, 501}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a question: replies, or the reason why there are none."""

    replies: tuple[Reply, ...] = ()
    prompt_tokens: int | None = None
    audio_tokens: int | None = None
    completion_tokens: int | None = None
    served_model: str = ""
    fingerprint: str = ""
    error: str = ""
    status: int | None = None
    cause: Exception | None = None

    @property
    def answered(self) -> bool:
        """Whether there is a reply."""
        return bool(self.replies)

    @property
    def refused(self) -> bool:
        """Whether the server rejected the request as such."""
        return self.status in _REFUSED

    @property
    def text(self) -> str:
        """The first reply's text."""
        return self.replies[0].text if self.replies else ""

    @property
    def heard_tokens(self) -> int | None:
        """Tokens in which the audio is counted, among others perhaps."""
        return self.audio_tokens or self.prompt_tokens

    def shown(self, most: int = 48) -> str:
        """One short line for people: the reply or the error."""
        if self.error:
            return (f"HTTP {self.status}: " if self.status else "") + _short(self.error, 2 * most)
        return repr(_short(self.text, most))


def findings(outcomes: Mapping[str, Outcome], profile: Profile, lengths: Sequence[float]) -> dict[str, Finding]:
    """Judge the outcomes of all questions."""
    others = [part for part in AUDIO_PARTS if part != profile.audio_part]
    shape = ANSWER_FORMS[profile.answer_form].shape
    hears = _hears(outcomes, lengths)
    return {
        f"hears_{profile.audio_part}": hears,
        **{f"hears_{part}": _hears_other(outcomes, part) for part in others},
        "longest_audio": _longest_audio(outcomes, lengths) if hears.verdict == YES else _DEAF,
        "audio_tokens_per_second": _tokens_per_second(outcomes, lengths),
        "honours_n": _honours_n(outcomes),
        "honours_temperature": _honours_temperature(outcomes),
        "honours_seed": _honours_seed(outcomes),
        "logprobs": _logprobs(outcomes),
        **{f"constraint_{name}": _constraint(outcomes, name, shape) for name in constraints_of(shape)},
        "json_object": _json_object(outcomes),
    }


Outcomes = Mapping[str, Outcome]
_DEAF = Finding(UNKNOWN, "audio is not known to be heard")


def _hears(outcomes: Outcomes, lengths: Sequence[float]) -> Finding:
    """Whether answers at temperature 0 follow the audio, beyond what they vary by themselves."""
    speech, silence, noise = _several(outcomes, "speech"), _several(outcomes, "silence"), outcomes["noise"]
    if lost := _lost([*speech, *silence, noise]):
        return lost
    within = max(_spread(speech), _spread(silence))
    between = min(_apart(a, b) for a, b in itertools.product(speech, silence))
    to_noise = min(_apart(a, noise) for a in speech)
    counts = [outcome.heard_tokens for outcome in (speech[0], *_longer(outcomes, lengths))]
    evidence = f"speech {speech[0].shown()}, silence {silence[0].shown()}, noise {noise.shown()}"
    evidence += f"; tokens of longer and longer audio {_listed(counts)}"
    if max(between, to_noise) > 2 * within:
        return _of_sound(evidence, speech[0], outcomes["tagged"], within)
    constant = max(between, to_noise, within) == 0 and len(set(counts)) == 1
    return Finding(NO if constant else UNKNOWN, evidence)


def _hears_other(outcomes: Outcomes, part: str) -> Finding:
    """Whether another form of the audio part is heard, from one answer to each clip."""
    speech, silence = outcomes[f"{part} speech"], outcomes[f"{part} silence"]
    if lost := _lost([speech, silence]):
        return lost
    evidence = f"speech {speech.shown()}, silence {silence.shown()}, {speech.heard_tokens} tokens"
    within = _spread(_several(outcomes, "speech"))
    if _apart(speech, silence) > 2 * within:
        return _of_sound(evidence, speech, outcomes[f"{part} tagged"], within)
    deaf = speech.text == silence.text and speech.heard_tokens == outcomes["without audio"].heard_tokens
    return Finding(NO if deaf else UNKNOWN, evidence)


def _of_sound(evidence: str, speech: Outcome, tagged: Outcome, within: float) -> Finding:
    """Tell a server that hears from one that answers with some function of the request's bytes, as simulators do."""
    if _apart(speech, tagged) > 2 * within:
        return Finding(
            NO, f"answers follow the bytes of the file: the same sound with a comment gives {tagged.shown()}"
        )
    return Finding(YES, evidence)


def _longest_audio(outcomes: Outcomes, lengths: Sequence[float]) -> Finding:
    """Up to which length more audio makes a difference: "yes" if up to the longest that was tried."""
    heard, before, varies = 0.0, outcomes["speech 1"], 2 * _spread(_several(outcomes, "speech"))
    counts = [outcome.heard_tokens for outcome in (before, *_longer(outcomes, lengths))]
    counted = len({count for count in counts if count is not None}) > 1
    for seconds, now in zip(lengths, _longer(outcomes, lengths), strict=True):
        if now.refused:
            return Finding(NO, f"{seconds:g} s rejected: {now.shown()}", heard)
        if not now.answered or not before.answered:
            return Finding(UNKNOWN, f"{seconds:g} s: {now.shown()}", heard)
        if counted and now.heard_tokens == before.heard_tokens:
            return Finding(NO, f"{seconds:g} s count no more tokens than {heard:g} s", heard)
        if not counted and _apart(now, before) <= varies:
            return Finding(UNKNOWN, f"{seconds:g} s: no other answer than before, and tokens do not tell", heard)
        heard, before = seconds, now
    return Finding(YES, f"up to {heard:g} s, the longest tried", heard)


def _tokens_per_second(outcomes: Outcomes, lengths: Sequence[float]) -> Finding:
    """How many tokens a second of audio is counted as, from the two first lengths that are longer than the clip."""
    (short, first), (long, second) = zip(lengths[:2], _longer(outcomes, lengths[:2]), strict=True)
    if first.heard_tokens is None or second.heard_tokens is None:
        return Finding(UNKNOWN, "no tokens are counted")
    rate = (second.heard_tokens - first.heard_tokens) / (long - short)
    told = f"{first.heard_tokens} at {short:g} s, {second.heard_tokens} at {long:g} s"
    return Finding(YES if rate > 0 else NO, f"{rate:.4g} ({told})", rate)


def _honours_n(outcomes: Outcomes) -> Finding:
    """Whether one call brings several answers."""
    asked = outcomes["n"]
    count = len(asked.replies)
    return _lost([asked]) or Finding(YES if count >= CHOICES else NO, f"{count} of {CHOICES} choices", count)


def _honours_temperature(outcomes: Outcomes) -> Finding:
    """Whether answers are equal at temperature 0 and differ above: "no" means that samples cannot be had."""
    cold, warm = _several(outcomes, "speech"), _several(outcomes, "warm")
    if lost := _lost([*cold, *warm]):
        return lost
    warm += [outcome for outcome in (outcomes["seed 1"], outcomes["seed 2"]) if outcome.answered]
    evidence = f"{_distinct(cold)} different answers of {len(cold)} at 0, {_distinct(warm)} of {len(warm)} above"
    if _spread(warm) == 0:
        return Finding(NO, evidence)
    return Finding(YES if _spread(cold) == 0 else UNKNOWN, evidence)


def _honours_seed(outcomes: Outcomes) -> Finding:
    """Whether a seed repeats an answer and another one changes it."""
    first, again, other = outcomes["seed 1"], outcomes["seed 1 again"], outcomes["seed 2"]
    lost = _lost([first, again, other])
    if lost is not None:
        return dataclasses.replace(lost, value=REJECTED if lost.verdict == NO else None)
    same, differs = _apart(first, again) == 0, _apart(first, other) > 0
    evidence = (
        f"the same seed {'repeats' if same else 'changes'} the answer, another {'changes' if differs else 'repeats'} it"
    )
    if not same:
        return Finding(NO, evidence, "ignored")
    return Finding(YES if differs else UNKNOWN, evidence)


def _logprobs(outcomes: Outcomes) -> Finding:
    """Whether log-probabilities come, what they hold of the labels, and whether temperature has changed them."""
    warm, cool = outcomes["first token warm"], outcomes["first token cool"]
    if lost := _lost([warm, cool]):
        return lost
    tops = [dict(outcome.replies[0].top_logprobs or ()) for outcome in (warm, cool)]
    if not all(tops):
        return Finding(NO, f"none came with {warm.shown()}")
    kind = _kind_of_logprobs(*tops)
    answer = parse_logprobs(warm.replies[0], LABELS)
    if not answer.is_sample:
        return Finding(UNKNOWN, f"{kind}, but {answer.reason}", kind)
    return Finding(YES, f"{kind}; the labels hold {answer.label_mass:.3g} of the first token", kind)


def _kind_of_logprobs(warm: Mapping[str, float], cool: Mapping[str, float]) -> str:
    """Name them raw if two temperatures show the same, processed if they are sharper by the ratio of temperatures."""
    # Far down, servers cut and round.
    common = [token for token in warm if token in cool and min(warm[token], cool[token]) > -8]
    pairs = list(itertools.combinations(common, 2))
    if not pairs:
        return "raw or processed, which cannot be told"
    steps = [(warm[a] - warm[b], cool[a] - cool[b]) for a, b in pairs]
    off = {
        kind: max(abs(cold - ratio * hot) for hot, cold in steps)
        for kind, ratio in (("raw, before temperature", 1.0), ("processed, after temperature", WARM / COOL))
    }
    kind = min(off, key=off.get)
    return kind if off[kind] < 0.05 < max(off.values()) else "raw or processed, which cannot be told"


def constraints_of(shape: str) -> dict[str, Mapping]:
    """List the constraints that can ask for a shape of answer."""
    return {name: forms for name, forms in CONSTRAINTS.items() if name != "none" and shape in forms}


def _constraint(outcomes: Outcomes, name: str, shape: str) -> Finding:
    """Whether a constraint keeps a model to the labels that is told to say something else."""
    bound, free = outcomes[f"constraint {name}"], outcomes["free"]
    if lost := _lost([bound]) or _lost([free]):
        return lost
    inside = [_WITHIN[shape](outcome.text) for outcome in (bound, free)]
    evidence = f"told to say {OFF_LIST!r} it says {bound.shown()}, and {free.shown()} without the constraint"
    if not inside[0]:
        return Finding(NO, evidence)
    return Finding(UNKNOWN if inside[1] else YES, evidence)


def _is_object(text: str) -> bool:
    """Whether a text is exactly what a schema of probabilities allows; the parser of answers forgives more."""
    try:
        found = json.loads(text)
        return set(found) == set(LABELS) and all(0 <= value <= 1 for value in found.values())
    except (ValueError, TypeError, AttributeError, RecursionError):
        return False


def _is_word(text: str) -> bool:
    """Whether a text is a label, or an object with one."""
    return parse_label(Reply(text), LABELS).is_sample


_WITHIN = {"object": _is_object, "word": _is_word, "first_token": _is_word}


def _json_object(outcomes: Outcomes) -> Finding:
    """Whether `response_format: json_object` is accepted and gives JSON."""
    asked = outcomes["json_object"]
    if lost := _lost([asked]):
        return lost
    try:
        found = isinstance(json.loads(asked.text), dict)
    except (ValueError, RecursionError):
        found = False
    return Finding(YES if found else NO, asked.shown())


def _several(outcomes: Outcomes, name: str) -> list[Outcome]:
    return [outcomes[f"{name} {i}"] for i in (1, 2, 3)]


def _longer(outcomes: Outcomes, lengths: Sequence[float]) -> list[Outcome]:
    return [outcomes[f"{seconds:g} s"] for seconds in lengths]


def _lost(wanted: Sequence[Outcome]) -> Finding | None:
    """Give a finding where answers are missing: "no" if the server rejects such requests, else it cannot be told."""
    missing = [outcome for outcome in wanted if not outcome.answered]
    if not missing:
        return None
    return Finding(NO if all(outcome.refused for outcome in missing) else UNKNOWN, missing[0].shown())


def _apart(one: Outcome, other: Outcome) -> float:
    """Distance of two answers from 0 to 1: total variation of distributions, else whether the texts differ."""
    if not (one.answered and other.answered):
        return 0.0
    a, b = (parse_distribution(outcome.replies[0], LABELS).probs for outcome in (one, other))
    if a is None or b is None:
        return float(one.text != other.text)
    return sum(abs(p - q) for p, q in zip(a, b, strict=True)) / 2


def _spread(outcomes: Sequence[Outcome]) -> float:
    return max((_apart(a, b) for a, b in itertools.combinations(outcomes, 2)), default=0.0)


def _distinct(outcomes: Sequence[Outcome]) -> int:
    return len({outcome.text for outcome in outcomes})


def _listed(counts: Sequence[int | None]) -> str:
    return ", ".join("unknown" if count is None else str(count) for count in counts)


def _short(text: str, most: int) -> str:
    text = "".join(character if character.isprintable() and character != "\ufffd" else "?" for character in text)
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."
