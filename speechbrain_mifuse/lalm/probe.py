"""Asking a server about itself before it is paid: the capability card.

A server's documentation says what it accepts; many accept more than they heed. So each capability is tried on real
audio, in a fixed number of calls, and each finding is "yes", "no" or "cannot tell" with what was seen.
"""

from __future__ import annotations

import asyncio
import base64
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from speechbrain_mifuse.lalm.card import Card
from speechbrain_mifuse.lalm.client import LalmClient, LalmError, reply_of
from speechbrain_mifuse.lalm.collect import SAMPLE_RATE, encode_wav, run_to_end
from speechbrain_mifuse.lalm.findings import (
    CHOICES,
    CLIP_SECONDS,
    COOL,
    LABELS,
    OFF_LIST,
    WARM,
    Outcome,
    constraints_of,
    findings,
)
from speechbrain_mifuse.lalm.limits import known_usage
from speechbrain_mifuse.lalm.profile import AUDIO_PARTS, Profile
from speechbrain_mifuse.lalm.prompt import ANSWER_FORMS, Prompt
from speechbrain_mifuse.lalm.redaction import redacted, short
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.progress import progress

_TEXT_ONLY = "without audio"
LENGTHS = (10.0, 30.0, 60.0)


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
    client: LalmClient,
    profile: Profile,
    speech: torch.Tensor,
    temperature: float = 1.0,
    lengths: Sequence[float] = LENGTHS,
    show_progress: bool = True,
) -> Card:
    """Ask a server about itself."""
    asked = questions(profile, temperature, lengths)
    wavs = {name: base64.b64encode(wav).decode() for name, wav in clips(speech, lengths).items()}
    with progress(total=len(asked), unit="call", desc=f"probing {client.model}", disable=not show_progress) as bar:
        outcomes = run_to_end(lambda: _ask_all(client, asked, wavs, min(profile.concurrency, 4), bar))
    first = outcomes["speech 1"]
    card = Card(
        *(client.base_url, client.model, first.served_model, first.fingerprint, profile.audio_part, profile.constraint),
        calls=len(asked),
        prompt_tokens=sum(outcome.prompt_tokens or 0 for outcome in outcomes.values()),
        completion_tokens=sum(outcome.completion_tokens or 0 for outcome in outcomes.values()),
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


def speech_like(seconds: float = CLIP_SECONDS) -> torch.Tensor:
    """Render vowels with a moving pitch: a stand-in for speech where no recording is at hand."""
    time = torch.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
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
    usage = known_usage(completion.get("usage")) or {}
    return Outcome(
        tuple(map(reply_of, completion["choices"])),
        usage.get("prompt_tokens"),
        usage.get("prompt_tokens_details", {}).get("audio_tokens"),
        usage.get("completion_tokens"),
        short(completion.get("model")),
        short(completion.get("system_fingerprint")),
    )
