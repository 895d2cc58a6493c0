"""Asking a server about itself before it is paid: the capability card.

A server's documentation says what it accepts; many accept more than they heed. So each capability is tried on real
audio, in a fixed number of calls, and each finding is "yes", "no" or "cannot tell" with what was seen.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from speechbrain_mifuse.lalm.answer import Reply, parse_distribution, parse_label, parse_logprobs
from speechbrain_mifuse.lalm.card import NO, REJECTED, UNKNOWN, YES, Card, Finding
from speechbrain_mifuse.lalm.client import LalmClient
from speechbrain_mifuse.lalm.collect import SAMPLE_RATE, encode_wav, run_to_end
from speechbrain_mifuse.lalm.completion import reply_of
from speechbrain_mifuse.lalm.limits import LalmError, known_usage
from speechbrain_mifuse.lalm.profile import AUDIO_PARTS, CONSTRAINTS, Profile
from speechbrain_mifuse.lalm.prompt import ANSWER_FORMS, Prompt
from speechbrain_mifuse.lalm.redaction import redacted, short
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.progress import progress

_TEXT_ONLY = "without audio"
LENGTHS = (10.0, 30.0, 60.0)
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
    usage: Mapping = dataclasses.field(default_factory=dict)
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
        return self.usage.get("prompt_tokens_details", {}).get("audio_tokens") or self.usage.get("prompt_tokens")

    def shown(self) -> str:
        """One short line for people: the reply or the error."""
        if self.error:
            return (f"HTTP {self.status}: " if self.status else "") + _short(self.error, 96)
        return repr(_short(self.text, 48))


class Question(NamedTuple):
    """One call."""

    clip: str | None
    text: str
    fields: Mapping = {}
    audio_part: str = "input_audio"

    def messages(self, wavs: Mapping[str, str]) -> list[dict]:
        """Messages of the request, with the clip from `wavs`, WAV files in base64."""
        audio = [] if self.clip is None else [AUDIO_PARTS[self.audio_part](wavs[self.clip])]
        return [{"role": "user", "content": [*audio, {"type": "text", "text": self.text}]}]


def probe(
    client: LalmClient, profile: Profile, speech: torch.Tensor, temperature=1.0, lengths=LENGTHS, show_progress=True
) -> Card:
    """Ask a server about itself: whether it takes audio, honors n, temperature, seed and constraints, and so on.

    Parameters
    ----------
    client : LalmClient
        Access to the server.
    profile : Profile
        What is asked of it: form of the audio, sampling fields, form of answers.
    speech : torch.Tensor
        `[samples]` at 16 kHz, one second or more; `speech_like` where no recording is at hand.
    temperature : float
        At which samples are to be drawn.
    lengths : sequence of float
        Seconds of the longer recordings, ascending.
    show_progress : bool
        On standard error.

    Returns
    -------
    Card
        The findings, each with its evidence.

    Raises
    ------
    LalmError
        If no call is answered.
    UserError
        If the recording is too short or the lengths do not fit.

    Example
    -------
    >>> class Deaf(LalmClient):
    ...     async def check(self): ...
    ...     async def complete(self, messages, **fields):
    ...         return {"choices": [{"message": {"content": "sad"}}], "usage": {"prompt_tokens": 9}}
    >>> card = probe(Deaf("http://127.0.0.1:8000/v1", "m"), Profile(), speech_like(), show_progress=False)
    >>> card["hears_input_audio"].verdict, card["honours_n"].verdict
    ('no', 'no')
    """
    asked = questions(profile, temperature, lengths)
    wavs = {name: base64.b64encode(wav).decode() for name, wav in clips(speech, lengths).items()}
    with progress(total=len(asked), unit="call", desc=f"probing {client.model}", disable=not show_progress) as bar:
        outcomes = run_to_end(lambda: _ask_all(client, asked, wavs, min(profile.concurrency, 4), bar))
    first = outcomes["speech 1"]
    card = Card(
        *(client.base_url, client.model, first.served_model, first.fingerprint, profile.audio_part, profile.constraint),
        calls=len(asked),
        prompt_tokens=sum(outcome.usage.get("prompt_tokens", 0) for outcome in outcomes.values()),
        completion_tokens=sum(outcome.usage.get("completion_tokens", 0) for outcome in outcomes.values()),
        findings=findings(outcomes, profile, lengths),
    )
    # A careless server may echo the key, and cards are kept and passed on.
    return Card.from_json(redacted(card.to_json()))


def questions(profile: Profile, temperature: float, lengths: Sequence[float]) -> dict[str, Question]:
    """List every call of a probe by name, so that their number is known before the first."""
    part, always = profile.audio_part, dict(profile.sampling)
    score, word = (Prompt(LABELS, form).text() for form in ("distribution", "label"))
    shape = ANSWER_FORMS[profile.answer_form].shape
    off_list = f"Reply with the single word {OFF_LIST} and nothing else."
    cold, warm = {**always, "temperature": 0}, {**always, "temperature": temperature}
    # The same pass of a model that also computes at random.
    same_pass = {"seed": 1} if profile.honours_seed else {}
    first_token = {**always, **Prompt(LABELS, "logprobs").request_options(), **same_pass}
    json_object = {"response_format": {"type": "json_object"}}
    return {
        **{f"{clip} {i}": Question(clip, score, cold, part) for clip in ("speech", "silence") for i in (1, 2, 3)},
        "noise": Question("noise", score, cold, part),
        "tagged": Question("tagged", score, cold, part),
        _TEXT_ONLY: Question(None, score, cold),
        **{
            f"{other} {clip}": Question(clip, score, cold, other)
            for other in AUDIO_PARTS
            for clip in ("speech", "silence", "tagged")
            if other != part
        },
        **{f"warm {i}": Question("speech", score, warm, part) for i in (1, 2, 3)},
        "seed 1": Question("speech", score, {**warm, "seed": 1}, part),
        "seed 1 again": Question("speech", score, {**warm, "seed": 1}, part),
        "seed 2": Question("speech", score, {**warm, "seed": 2}, part),
        "n": Question("speech", score, {**warm, "n": CHOICES}, part),
        "first token warm": Question("speech", word, {**first_token, "temperature": WARM}, part),
        "first token cool": Question("speech", word, {**first_token, "temperature": COOL}, part),
        "free": Question("speech", off_list, cold, part),
        **{
            f"constraint {name}": Question("speech", off_list, {**cold, **forms[shape](LABELS)}, part)
            for name, forms in constraints_of(shape).items()
        },
        "json_object": Question("speech", score, {**cold, **json_object}, part),
        **{f"{seconds:g} s": Question(f"{seconds:g} s", score, cold, part) for seconds in lengths},
    }


def seconds_sent(asked: Mapping[str, Question]) -> float:
    """Seconds of audio in all questions together, at most."""
    named = [question.clip for question in asked.values() if question.clip is not None]
    return sum(float(clip[:-2]) if clip.endswith(" s") else CLIP_SECONDS for clip in named)


def lengths_up_to(longest: float | None) -> list[float]:
    """Give the durations to be tried, with the longest recording of a collection among them."""
    further = {float(longest)} if longest is not None and longest > CLIP_SECONDS else set()
    return sorted(set(LENGTHS) | further)


def clips(speech: torch.Tensor, lengths: Sequence[float]) -> dict[str, bytes]:
    """Make the recordings that a probe sends."""
    if len(lengths) < 2 or sorted(set(lengths)) != list(lengths) or lengths[0] <= CLIP_SECONDS:
        raise UserError(f"the probe's lengths {list(lengths)}: name at least two, ascending, above {CLIP_SECONDS:g} s")
    if len(speech) < SAMPLE_RATE:
        raise UserError(f"the probe's recording has {len(speech) / SAMPLE_RATE:.2g} s: at least one second is needed")
    speech = speech[: int(CLIP_SECONDS * SAMPLE_RATE)]
    noise = torch.randn(len(speech), generator=torch.Generator().manual_seed(0))
    made = {"speech": speech, "silence": torch.zeros_like(speech), "noise": noise * speech.std()}
    for seconds in lengths:
        samples = int(seconds * SAMPLE_RATE)
        made[f"{seconds:g} s"] = speech.repeat(math.ceil(samples / len(speech)))[:samples]
    wavs = {name: encode_wav(clip) for name, clip in made.items()}
    return {**wavs, "tagged": _tagged(wavs["speech"])}


def _tagged(wav: bytes) -> bytes:
    """Give a WAV file a comment: the same sound in other bytes."""
    text = b"probe\0"
    comment = b"INFOICMT" + len(text).to_bytes(4, "little") + text
    chunk = b"LIST" + len(comment).to_bytes(4, "little") + comment
    return wav[:4] + (len(wav) + len(chunk) - 8).to_bytes(4, "little") + wav[8:] + chunk


def speech_like() -> torch.Tensor:
    """Render vowels with a moving pitch: a stand-in for speech where no recording is at hand."""
    time = torch.arange(int(CLIP_SECONDS * SAMPLE_RATE)) / SAMPLE_RATE
    pitch = 140 + 40 * torch.sin(2 * torch.pi * 0.7 * time) + 5 * torch.sin(2 * torch.pi * 5 * time)
    phase = 2 * torch.pi * torch.cumsum(pitch, 0) / SAMPLE_RATE
    vowels = torch.tensor([[730, 1090, 2440], [270, 2290, 3010], [300, 870, 2240], [530, 1840, 2480]])  # a i u e
    formants = vowels[(4 * time).long() % len(vowels)]
    wave = torch.zeros_like(time)
    for harmonic in range(1, 24):
        distance = (harmonic * pitch[:, None] - formants) / 90
        wave += torch.sin(harmonic * phase) * (1 / (1 + distance.square())).sum(1) / harmonic**0.5
    syllables = torch.sin(torch.pi * (4 * time % 1)).sqrt()
    wave = wave * syllables
    return 0.5 * wave / wave.abs().max()


async def _ask_all(client: LalmClient, asked: Mapping[str, Question], wavs: Mapping[str, str], workers: int, bar):
    """Ask all questions; a wrong address, key or server is found out by the first ones."""
    outcomes: dict[str, Outcome] = {}

    async def work(names):
        for name in names:
            outcomes[name] = await _ask(client, asked[name], wavs)
            bar.update()

    first = [next(iter(asked)), _TEXT_ONLY]
    queue = iter([name for name in asked if name not in first])
    async with client:
        await client.check()
        await work(first)
        if not any(outcome.answered or outcome.refused for outcome in outcomes.values()):
            raise _failed(outcomes, "Calls with and without audio failed")
        await asyncio.gather(*(work(queue) for _ in range(workers)))
    if not any(outcome.answered for outcome in outcomes.values()):
        raise _failed(outcomes, f"All {len(asked)} calls failed")
    return {name: outcomes[name] for name in asked}


def _failed(outcomes: Mapping[str, Outcome], what: str) -> LalmError:
    cause = next(iter(outcomes.values())).cause
    return LalmError(f"{cause}\n{what}, so the probe can say nothing about this model.")


async def _ask(client: LalmClient, question: Question, wavs: Mapping[str, str]) -> Outcome:
    try:
        completion = await client.complete(question.messages(wavs), **question.fields)
    except LalmError as error:
        if error.hopeless:
            raise
        # The card names the address once, and what to do is said where it is held against a collection.
        said = error.said.removeprefix(f"HTTP {error.status}: ") or str(error)
        return Outcome(error=said, status=error.status, cause=error)
    return Outcome(
        tuple(map(reply_of, completion["choices"])),
        known_usage(completion.get("usage")) or {},
        short(completion.get("model")),
        short(completion.get("system_fingerprint")),
    )


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
    listed = ", ".join("unknown" if count is None else str(count) for count in counts)
    evidence += f"; tokens of longer and longer audio {listed}"
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
    different = [len({outcome.text for outcome in each}) for each in (cold, warm)]
    evidence = f"{different[0]} different answers of {len(cold)} at 0, {different[1]} of {len(warm)} above"
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
    # A label, or an object with one.
    fits = _is_object if shape == "object" else lambda text: parse_label(Reply(text), LABELS).is_sample
    inside = [fits(outcome.text) for outcome in (bound, free)]
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


def _short(text: str, most: int) -> str:
    text = "".join(character if character.isprintable() and character != "\ufffd" else "?" for character in text)
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."
