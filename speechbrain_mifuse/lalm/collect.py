"""Filling a label store: every recording is asked about until it has K samples, and no answer is paid for twice."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import itertools
import logging
import wave
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from speechbrain_mifuse.audio import BadAudio, content_hash, load_audio, pcm16
from speechbrain_mifuse.errors import UserError
from speechbrain_mifuse.lalm.client import LalmClient, LalmError
from speechbrain_mifuse.lalm.prompt import Prompt
from speechbrain_mifuse.lalm.store import LabelStore, Query, Record
from speechbrain_mifuse.progress import progress

SAMPLE_RATE = 16000

# A retry with the seed that led to a refusal would be refused again; this stride keeps the seeds of retries apart from
# those of other samples.
RETRY_SEED_STRIDE = 1_000_003

logger = logging.getLogger(__name__)

Utterance = tuple[str, "str | Path | Callable[[], torch.Tensor]"]


class Ask(NamedTuple):
    """Consecutive samples that one request can bring: `k`, ..., `k + n - 1`, the first with `seed`."""

    k: int
    n: int
    seed: int | None


@dataclasses.dataclass
class CollectReport:
    """What one run of `collect` did. Counts are answers, not utterances.

    Attributes
    ----------
    asked : int
        Answers received from the API: `stored + refused + invalid`.
    stored : int
        New samples.
    skipped : int
        Samples not asked for, because they are stored, out of attempts, or belong to a recording that another
        utterance of this run has too.
    refused, invalid : int
        Answers that are no samples; they are asked for again by the next run.
    failed : list of (str, str)
        Utterances that could not be read or asked about, and why.

    Example
    -------
    >>> print(CollectReport(asked=9, stored=8, refused=1, failed=[("u7", "no such file")]).summary())
    8 samples stored of 9 answers (1 refused, 0 invalid), 0 skipped, 1 utterance failed
      u7: no such file
    """

    asked: int = 0
    stored: int = 0
    skipped: int = 0
    refused: int = 0
    invalid: int = 0
    failed: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def summary(self, most: int = 20) -> str:
        """Describe the run in a few lines, naming at most `most` failed utterances."""
        plural = "" if len(self.failed) == 1 else "s"
        lines = [
            f"{self.stored} samples stored of {self.asked} answers ({self.refused} refused, {self.invalid} invalid), "
            f"{self.skipped} skipped, {len(self.failed)} utterance{plural} failed"
        ]
        lines += [f"  {utt_id}: {reason}" for utt_id, reason in self.failed[:most]]
        if len(self.failed) > most:
            lines.append(f"  ... and {len(self.failed) - most} more")
        return "\n".join(lines)


def collect(
    utterances: Sequence[Utterance],
    prompt: Prompt,
    client: LalmClient,
    store: LabelStore,
    query: Query,
    k: int,
    concurrency: int = 8,
    max_attempts: int = 3,
    max_failures_in_a_row: int = 5,
    show_progress: bool = True,
) -> CollectReport:
    """Ask the teacher until every recording has `k` samples in the store.

    Only what is missing is asked for: after an interruption the rest, with a larger `k` the additional samples. An
    answer counts when it is on disk. Sample `i` is asked with seed `query.sampling["seed"] + i`. Refused and unusable
    answers are asked for again by later runs, `max_attempts` times in all. Recordings with equal samples are asked
    about once.

    Parameters
    ----------
    utterances : sequence of (str, path or callable)
        Identifier, and a file or a function that returns the waveform `[samples]` at 16 kHz.
    prompt : Prompt
        The question.
    client : LalmClient
        Access to the API.
    store : LabelStore
        Where the answers go.
    query : Query
        The key of the answers; must belong to `prompt` and `client`.
    k : int
        Samples per recording.
    concurrency : int
        Recordings asked about at the same time.
    max_attempts : int
        How often a sample is asked for before it is given up.
    max_failures_in_a_row : int
        Requests that fail one after the other before the run stops.
    show_progress : bool
        Show a progress bar.

    Returns
    -------
    CollectReport
        Also lists utterances that failed on their own; they are tried again by the next run.

    Raises
    ------
    LalmError
        If the API is down, or fails for every request. What was answered before is kept.
    StoreError
        If the store cannot be written; asking on would pay for answers that are lost.
    UserError
        If `query` does not belong to `prompt` and `client`, or `k` or `concurrency` is not positive.
    KeyboardInterrupt
        On Ctrl-C, after open requests were cancelled; the store is consistent and the next run goes on.

    Example
    -------
    >>> import tempfile
    >>> prompt, client = Prompt(("angry", "sad")), LalmClient("http://127.0.0.1:8000/v1", "m")
    >>> query = Query.of(prompt, client.model, client.base_url, {"temperature": 1.0, "seed": 0})
    >>> with LabelStore(tempfile.mkdtemp() + "/labels.sqlite") as store:
    ...     collect([], prompt, client, store, query, k=5, show_progress=False).asked
    0
    """
    _check(prompt, client, query, k, concurrency)
    if not utterances:
        return CollectReport()
    job = _Job(prompt, client, store, query, k, max_attempts, max_failures_in_a_row)
    with progress(total=len(utterances), unit="utt", desc=f"asking {client.model}", disable=not show_progress) as bar:
        try:
            asyncio.run(job.run(utterances, concurrency, bar))
        except KeyboardInterrupt:
            logger.warning("interrupted; run again to go on. %s", job.report.summary())
            raise
    if job.report.failed:
        logger.warning("%s", job.report.summary())
    return job.report


def encode_wav(waveform: torch.Tensor) -> bytes:
    """Waveform at 16 kHz as a mono 16-bit PCM WAV file.

    Parameters
    ----------
    waveform : torch.Tensor
        `[samples]`, full scale 1.0.

    Returns
    -------
    bytes

    Example
    -------
    >>> len(encode_wav(torch.zeros(16000)))
    32044
    """
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(pcm16(waveform).tobytes())
    return buffer.getvalue()


def plan(missing: Sequence[int], attempts: Sequence[int], seed: int | None) -> Iterator[Ask]:
    """Group missing sample indices into requests whose choices have consecutive seeds.

    Parameters
    ----------
    missing : sequence of int
        Sample indices to ask for, ascending.
    attempts : sequence of int
        For each of them, how often it was asked for in vain.
    seed : int, optional
        Seed of sample 0.

    Yields
    ------
    Ask

    Example
    -------
    >>> list(plan([1, 2, 4], [0, 0, 0], seed=10))
    [Ask(k=1, n=2, seed=11), Ask(k=4, n=1, seed=14)]
    """
    pairs = enumerate(zip(missing, attempts, strict=True))
    for _, group in itertools.groupby(pairs, key=lambda item: (item[1][0] - item[0], item[1][1])):
        run = [pair for _, pair in group]
        first, tried = run[0]
        yield Ask(first, len(run), None if seed is None else seed + first + tried * RETRY_SEED_STRIDE)


class _Job:
    """State of one run that its workers share."""

    def __init__(self, prompt, client, store, query, k, max_attempts, max_failures):
        self.prompt, self.client, self.store, self.query = prompt, client, store, query
        self.k, self.max_attempts, self.max_failures = k, max_attempts, max_failures
        self.report = CollectReport()
        self.have = store.have(query)
        self.rejected = store.rejected(query)
        self.claimed: set[str] = set()
        self.failures_in_a_row = 0

    async def run(self, utterances: Sequence[Utterance], concurrency: int, bar: tqdm):
        queue = iter(utterances)
        async with self.client:
            await self.client.check()
            workers = [asyncio.create_task(self._work(queue, bar)) for _ in range(min(concurrency, len(utterances)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _work(self, queue: Iterator[Utterance], bar: tqdm):
        for utt_id, source in queue:
            try:
                await self._utterance(utt_id, source)
            except LalmError as error:
                self._api_failed(utt_id, error)
            except (BadAudio, OSError) as error:  # one unreadable recording says nothing about the API
                self.report.failed.append((utt_id, str(error)))
            bar.set_postfix(stored=self.report.stored, failed=len(self.report.failed), refresh=False)
            bar.update()

    async def _utterance(self, utt_id: str, source):
        waveform = await asyncio.to_thread(_waveform, source)
        audio = content_hash(waveform)
        missing = [] if audio in self.claimed else [i for i in range(self.k) if self._wanted(audio, i)]
        self.claimed.add(audio)
        self.report.skipped += self.k - len(missing)
        if not missing:
            return
        wav = encode_wav(waveform)
        attempts = [self.rejected.get((audio, i), 0) for i in missing]
        for ask in plan(missing, attempts, self.query.sampling.get("seed")):
            await self._ask(utt_id, audio, wav, ask)

    async def _ask(self, utt_id: str, audio: str, wav: bytes, ask: Ask):
        sampling = {**self.query.sampling, "seed": ask.seed}
        responses = await self.client.ask(self.prompt, wav, ask.n, **sampling)
        self.failures_in_a_row = 0
        records = [Record(audio, ask.k + i, utt_id, response) for i, response in enumerate(responses)]
        await asyncio.to_thread(self.store.put_many, self.query, records)
        kinds = [response.answer.kind for response in responses]
        self.report.asked += len(kinds)
        self.report.stored += sum(response.answer.is_sample for response in responses)
        self.report.refused += kinds.count("refusal")
        self.report.invalid += kinds.count("invalid")

    def _wanted(self, audio: str, index: int) -> bool:
        key = (audio, index)
        return key not in self.have and self.rejected.get(key, 0) < self.max_attempts

    def _api_failed(self, utt_id: str, error: LalmError):
        self.report.failed.append((utt_id, str(error)))
        self.failures_in_a_row += 1
        if error.hopeless or self.failures_in_a_row >= self.max_failures:
            raise LalmError(
                f"{error}\nStopped after {self.failures_in_a_row} failed requests in a row; {self.report.stored} new "
                "samples are stored. Run again to go on.",
                hopeless=True,
            ) from None


def _waveform(source) -> torch.Tensor:
    return source() if callable(source) else load_audio(source, SAMPLE_RATE)


def _check(prompt: Prompt, client: LalmClient, query: Query, k: int, concurrency: int):
    mine = (prompt.prompt_hash(), prompt.labels, client.model, client.base_url)
    if mine != (query.prompt_hash, query.labels, query.model, query.base_url):
        raise UserError("the query belongs to another prompt, label set, model or base_url than the ones given")
    if k < 1 or concurrency < 1:
        raise UserError(f"the number of samples ({k}) and the concurrency ({concurrency}) must be at least 1")
    if "temperature" not in query.sampling:
        raise UserError("the query's sampling parameters must name the temperature that is sent")
