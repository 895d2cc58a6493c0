"""What a collection will ask and cost, before anything is spent."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from speechbrain_mifuse.lalm.collect import Wanted, known_recording
from speechbrain_mifuse.lalm.hashes import HashCache, Known
from speechbrain_mifuse.lalm.limits import estimated_tokens
from speechbrain_mifuse.lalm.profile import NO_TOKENS, Price, Profile, Tokens
from speechbrain_mifuse.lalm.prompt import Prompt
from speechbrain_mifuse.lalm.store import LabelStore, Query
from speechbrain_mifuse.utils.audio import BadAudio
from speechbrain_mifuse.utils.audio_warnings import summarized
from speechbrain_mifuse.utils.errors import WriteError
from speechbrain_mifuse.utils.progress import progress

if TYPE_CHECKING:  # it imports the openai package, which takes a second
    from speechbrain_mifuse.lalm.client import LalmClient

logger = logging.getLogger(__name__)

READERS = 4


@dataclasses.dataclass(frozen=True)
class Plan:
    """A collection that has not begun: what is asked of whom, how often, and what that takes."""

    prompt: str
    fields: Mapping
    profile: Profile
    utterances: int
    recordings: int
    wanted: int
    stored: int
    given_up: int
    calls: int = 0
    expected: Tokens = NO_TOKENS
    most: Tokens = NO_TOKENS
    spent: float = 0.0
    longer: int = 0
    budget: float | None = None

    @property
    def cost(self) -> float | None:
        """Estimate of what the calls cost; `None` without prices."""
        return self.profile.price.cost(self.expected) if self.profile.price else None

    @property
    def seconds(self) -> float:
        """Least time that the calls take at the configured rates and the assumed time of a call."""
        profile = self.profile
        by_latency = self.calls * profile.seconds_per_call / profile.concurrency
        by_requests = 60 * self.calls / profile.requests_per_minute if profile.requests_per_minute else 0.0
        by_tokens = 60 * self.expected.total / profile.tokens_per_minute if profile.tokens_per_minute else 0.0
        return max(by_latency, by_requests, by_tokens)

    def told(self) -> str:
        """Describe the plan, with one whole question."""
        stored, asked = self.stored, self.wanted - self.stored - self.given_up
        given_up = f", {self.given_up} given up after repeated refusals" if self.given_up else ""
        parts = (
            ("recordings", f"{self.recordings} different ones among {self.utterances} utterances"),
            ("samples", f"{self.wanted} wanted, {stored} stored{given_up}, {asked} to ask for"),
            ("calls", f"{self.calls}"),
            ("tokens", self._tokens()),
            ("cost", self._cost()),
            ("time", self._time()),
            ("audio", self._audio()),
        )
        question = "\n".join(f"  {line}" for line in self.prompt.splitlines())
        fields = json.dumps(dict(self.fields), ensure_ascii=False)
        head = f"Question about one recording, after its audio ({self.profile.audio_part}):\n\n{question}\n"
        return "\n".join([head, f"with {fields}\n", *(f"{name:15} {text}" for name, text in parts if text)])

    def _tokens(self) -> str:
        counts = (f"{count:,.0f} {kind}" for kind, count in self.expected._asdict().items())
        return f"about {', '.join(counts)}"

    def _cost(self) -> str:
        price = self.profile.price
        if price is None:
            return "price unknown: add `price` to the lalm_profile"
        text = f"about {self.cost:.2f} {price.currency}, at most {price.cost(self.most):.2f}"
        if self.profile.output_limit(self.fields) is None:
            text += " if answers are as short as asked for (no max_tokens)"
        if self.spent:
            text += f"; {self.spent:.2f} were spent before"
        if self.budget is not None:
            text += f"; budget {self.budget:g}"
            text += ": IT STOPS BEFORE THE END" if self.spent + self.cost > self.budget else ""
        return f"{text} (prices: {price.source or 'yours'})"

    def _time(self) -> str:
        profile, rates = self.profile, f"{self.profile.concurrency} calls at a time of"
        rates += f" {profile.seconds_per_call:g} s (assumed)"
        for rate, unit in ((profile.requests_per_minute, "requests"), (profile.tokens_per_minute, "tokens")):
            rates += f", {rate:g} {unit} a minute" if rate else ""
        return f"{_duration(self.seconds)} at {rates}"

    def _audio(self) -> str:
        longest = self.profile.longest_audio
        return f"{self.longer} recordings are longer than {longest:g} s: their beginning is sent" if self.longer else ""


def make_plan(
    known: Mapping[str, Known], prompt: Prompt, client: LalmClient, store: LabelStore, query: Query, k: int
) -> Plan:
    """Plan what `collect` would do, asking nothing.

    Parameters
    ----------
    known : mapping of str to Known
        Content hash and length of each utterance's recording, as `known_recordings` gives.
    prompt, client, store, query, k
        As for `lalm.collect.collect`.

    Returns
    -------
    Plan
        Calls, tokens, cost and time; `told` describes it.

    Example
    -------
    >>> from speechbrain_mifuse.lalm.client import LalmClient
    >>> prompt, client = Prompt(("angry", "sad")), LalmClient("http://127.0.0.1:8000/v1", "m")
    >>> query = Query.of(prompt, client.model, client.base_url, {"temperature": 1.0, "seed": 0})
    >>> with LabelStore(":memory:") as store:
    ...     plan = make_plan({"u1": Known("ab" * 32, 2.0)}, prompt, client, store, query, k=5)
    >>> plan.calls, plan.wanted, plan.expected.audio, plan.expected.output
    (1, 5, 50, 100)
    """
    profile, seed = client.profile, query.sampling.get("seed")
    wanted = Wanted(prompt, profile.honours_n, store, query, k)
    lengths = {recording.audio: recording.seconds for recording in known.values()}
    samples = [(audio, i) for audio in lengths for i in range(k)]
    stored = sum(sample in wanted.have for sample in samples)
    given_up = sum(wanted.rejected.get(sample, 0) >= wanted.max_attempts for sample in samples)
    calls, expected, most = 0, NO_TOKENS, NO_TOKENS
    for audio, seconds in lengths.items():
        for ask in wanted.claim(audio):
            question = prompt.at(ask.k, seed)
            call, bound = estimated_tokens(question, seconds, ask.n, profile, query.sampling)
            calls, expected, most = calls + 1, expected.plus(call), most.plus(bound)
    first = prompt.at(0, seed)
    n = 1 if wanted.most else k
    fields = {key: value for key, value in client.body(first, "", n, **query.sampling).items() if key != "messages"}
    return Plan(
        *(first.text(), fields, profile, len(known), len(lengths), len(samples), stored, given_up),
        *(calls, expected, most),
        spent=client.budget.spent,
        longer=sum(seconds > profile.longest_audio for seconds in lengths.values()) if profile.longest_audio else 0,
        budget=client.budget.limit,
    )


def spent_before(store: LabelStore, query: Query, price: Price | None) -> float:
    """Price of the answers to a query that are stored, refused ones and those they replaced included."""
    if price is None:
        return 0.0
    bills = ((asked.tokens, asked.batch_tokens) for asked in store.queries() if asked.query == query)
    return sum((price.cost(*tokens) for tokens in bills), 0.0)


@summarized()
def known_recordings(wavs: Mapping[str, str | Path], hashes: HashCache, show_progress: bool = True) -> dict[str, Known]:
    """Find content hash and length of recordings, reading only those that are new or have changed."""

    def find(item: tuple[str, str | Path]) -> tuple[str, Known | None]:
        utt_id, wav = item
        try:
            return utt_id, known_recording(wav, hashes)
        except WriteError:
            raise
        except (BadAudio, OSError) as error:
            logger.warning("%s: %s", utt_id, error)
            return utt_id, None

    with concurrent.futures.ThreadPoolExecutor(READERS) as readers:
        found = readers.map(find, wavs.items())
        bar = progress(found, total=len(wavs), unit="utt", desc="reading recordings", disable=not show_progress)
        return {utt_id: known for utt_id, known in bar if known is not None}


def _duration(seconds: float) -> str:
    """Time for people: two units are enough."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
