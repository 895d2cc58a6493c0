"""Filling a label store: every recording is asked about until it has K samples, and no answer is paid for twice."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import io
import itertools
import json
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import soundfile
import torch
from tqdm import tqdm

from speechbrain_mifuse.lalm.hashes import HashCache, Known
from speechbrain_mifuse.lalm.limits import BudgetReached, LalmError, Signal
from speechbrain_mifuse.lalm.prompt import Clip, Prompt
from speechbrain_mifuse.lalm.store import LabelStore, Query, Record
from speechbrain_mifuse.utils.audio import BadAudio, content_hash, load_audio, pcm16
from speechbrain_mifuse.utils.audio_warnings import summarized
from speechbrain_mifuse.utils.errors import UserError, WriteError
from speechbrain_mifuse.utils.files import file_stamp
from speechbrain_mifuse.utils.progress import progress
from speechbrain_mifuse.utils.texts import first_of

if TYPE_CHECKING:  # it imports the openai package, which takes a second
    from speechbrain_mifuse.lalm.client import LalmClient

SAMPLE_RATE = 16000

# A retry with the seed that led to a refusal would be refused again; this stride keeps the seeds of retries apart from
# those of other samples.
RETRY_SEED_STRIDE = 1_000_003
# How often a sample is asked for before it is given up.
MAX_ATTEMPTS = 3
# Seconds between two looks whether a loop outside was told to stop, after which a task that has not ended is cancelled
# once more, and between two looks at the counts: writing them out for each call would cost more than counting.
LOOK_FOR_CTRL_C = CANCEL_AGAIN = BETWEEN_LOOKS = 0.2
# First answers of a query after which a collection stops if none of them can be used: all others would be paid for in
# vain, too.
MAX_UNUSABLE = 30
# Characters of an unusable reply that an error quotes.
QUOTED = 120
logger = logging.getLogger(__name__)

Utterance = tuple[str, "str | Path | Callable[[], torch.Tensor]"]


class Ask(NamedTuple):
    """Consecutive samples that one request can bring: `k`, ..., `k + n - 1`, the first with `seed`."""

    k: int
    n: int
    seed: int | None


@dataclasses.dataclass
class AnswerCounts:
    """Numbers of new answers by what became of them; refused and invalid ones are asked for again by the next run."""

    stored: int = 0
    refused: int = 0
    invalid: int = 0

    @property
    def asked(self) -> int:
        """All of them."""
        return self.stored + self.refused + self.invalid

    def count(self, records: Sequence[Record]):
        """Count answers."""
        kinds = collections.Counter(record.response.answer.kind for record in records)
        self.refused += kinds["refusal"]
        self.invalid += kinds["invalid"]
        self.stored += len(records) - kinds["refusal"] - kinds["invalid"]

    def counted(self) -> str:
        """Say it in a line."""
        return f"{self.stored} samples stored of {self.asked} answers ({self.refused} refused, {self.invalid} invalid)"


@dataclasses.dataclass
class CollectReport(AnswerCounts):
    """What one run of `collect` did: `skipped` counts samples, `cut` recordings of which the beginning was sent."""

    skipped: int = 0
    failed: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    cut: int = 0
    cost: str = ""

    def summary(self) -> str:
        """Describe the run in a few lines."""
        line = f"{self.counted()}, {self.skipped} skipped, {len(self.failed)} utterance"
        line += f"{'' if len(self.failed) == 1 else 's'} failed" + (f", {self.cost} spent" if self.cost else "")
        return "\n".join([line, *first_of([f"{utt_id}: {reason}" for utt_id, reason in self.failed])])


@summarized()
def collect(
    utterances: Sequence[Utterance],
    prompt: Prompt,
    client: LalmClient,
    store: LabelStore,
    query: Query,
    k: int,
    concurrency: int = 8,
    max_attempts: int = MAX_ATTEMPTS,
    max_failures_in_a_row: int = 5,
    show_progress: bool = True,
    deadline: float | None = None,
) -> CollectReport:
    """Ask the teacher until every recording has `k` samples in the store.

    Only what is missing is asked for: after an interruption the rest, with a larger `k` the additional samples. An
    answer counts when it is on disk. Sample `i` is asked with seed `query.sampling["seed"] + i`. Refused and unusable
    answers are asked for again by later runs, `max_attempts` times in all. Recordings with equal samples are asked
    about once. Hashes of files are kept beside the store, so a file that did not change and has all its samples is not
    read again. Works inside a running event loop (a notebook) too, and returns when all is done.

    Parameters
    ----------
    utterances : sequence of (str, path or callable)
        Identifier, and a file or a function that returns the waveform `[samples]` at 16 kHz.
    prompt, client : Prompt, LalmClient
        The question, and access to the API with its limits and the budget.
    store, query : LabelStore, Query
        Where the answers go, and their key, which must belong to `prompt` and `client`.
    k : int
        Samples per recording.
    concurrency, max_attempts, max_failures_in_a_row : int
        Calls at the same time, attempts before a sample is given up, and failed calls before the run stops.
    show_progress : bool
        Show a progress bar.
    deadline : float, optional
        Seconds after which the run stops, cancelling open calls.

    Returns
    -------
    CollectReport
        Also lists utterances that failed on their own; they are tried again by the next run.

    Raises
    ------
    LalmError
        If the API is down or fails for every request, the deadline has passed, or no answer to the query can be used:
        then at most about `MAX_UNUSABLE` are asked for. Also if the next call could pass the budget. What was answered
        before is kept.
    StoreError
        If the store cannot be written; asking on would pay for answers that are lost.
    UserError
        If `query` does not belong to `prompt` and `client`, or a number is not positive.
    KeyboardInterrupt
        On Ctrl-C, after open calls were cancelled; the store is consistent and the next run goes on.

    Example
    -------
    >>> import tempfile
    >>> from speechbrain_mifuse.lalm.client import LalmClient
    >>> prompt, client = Prompt(("angry", "sad")), LalmClient("http://127.0.0.1:8000/v1", "m")
    >>> query = Query.of(prompt, client.model, client.base_url, {"temperature": 1.0, "seed": 0})
    >>> with LabelStore(tempfile.mkdtemp() + "/labels.sqlite") as store:
    ...     collect([], prompt, client, store, query, k=5, show_progress=False).asked
    0
    """
    _check(prompt, client, query, k, concurrency, deadline)
    if not utterances:
        return CollectReport()
    wanted = Wanted(prompt, client.profile.honours_n, store, query, k, max_attempts)
    title = f"asking {client.model}"
    with (
        HashCache.beside(store.path) as hashes,
        progress(total=len(utterances) * k, unit="answer", desc=title, disable=not show_progress) as bar,
    ):
        job = _Job(wanted, client, store, hashes, max_failures_in_a_row, bar)
        try:
            run_to_end(lambda: job.run(utterances, concurrency, deadline))
        except KeyboardInterrupt:
            logger.warning("interrupted; run again to go on. %s", job.report.summary())
            raise
        finally:
            warn_of_cut(job.report.cut, client, "was")
    if job.report.failed:
        logger.warning("%s", job.report.summary())
    if job.unusable or not job.usable:
        check_usable(store, query)
    return job.report


def warn_of_cut(count: int, client: LalmClient, when: str):
    """Tell of recordings of which only the beginning is sent."""
    if count:
        message = "%d recordings are longer than the %g s that %s hears: only their beginning %s sent"
        logger.warning(message, count, client.profile.longest_audio, client.model, when)


def check_usable(store: LabelStore, query: Query):
    """Check that not all answers to a query are unusable."""
    rejections = store.rejections(query)
    if not rejections:
        return
    total, (kind, reason, count, raw) = sum(count for *_, count, _ in rejections), rejections[0]
    reply = {"text": "", **dict(json.loads(raw) or {})}
    said = " ".join(str(reply["text"] or reply.get("refusal") or reply.get("reasoning") or "").split())
    raise LalmError(
        f"--lalm_model {query.model}: none of the first {total} answers can be used. {count} of them: {kind}, "
        f"{reason}. One reply begins: {said[:QUOTED]!r}. Change the question (--lalm_answer_form, the prompt), "
        "max_tokens or other fields in the lalm_profile, or the model; `speechbrain-mifuse probe` shows what the "
        "server can do. All replies are kept in the label store.",
        hopeless=True,
    )


def run_to_end(main: Callable):
    """Run a coroutine to its end, also where an event loop runs already: then on a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(main())
    outer, started, place = asyncio.current_task(), threading.Event(), {}

    async def noted():
        place.update(loop=asyncio.get_running_loop(), task=asyncio.current_task())
        started.set()
        return await main()

    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        future = thread.submit(lambda: asyncio.run(noted()))
        try:
            while not future.done():
                concurrent.futures.wait([future], timeout=LOOK_FOR_CTRL_C)
                # From Python 3.11 on, asyncio.run takes Ctrl-C for itself and only notes it in its task.
                if outer is not None and getattr(outer, "cancelling", int)():
                    raise asyncio.CancelledError
            return future.result()
        except (KeyboardInterrupt, asyncio.CancelledError):
            started.wait()
            with contextlib.suppress(RuntimeError):  # it has just ended by itself
                place["loop"].call_soon_threadsafe(place["task"].cancel)
            concurrent.futures.wait([future])
            raise


async def cancel_until_ended(tasks: Collection[asyncio.Task]):
    """Cancel tasks, and those again that go on."""
    while tasks:
        for task in tasks:
            task.cancel()
        _, tasks = await asyncio.wait(tasks, timeout=CANCEL_AGAIN)


def encode_wav(waveform: torch.Tensor) -> bytes:
    """Waveform at 16 kHz as a mono 16-bit PCM WAV file."""
    buffer = io.BytesIO()
    soundfile.write(buffer, pcm16(waveform), SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def plan(missing: Sequence[int], attempts: Sequence[int], seed: int | None, most: int | None = None) -> Iterator[Ask]:
    """Group missing sample indices into requests whose choices have consecutive seeds."""
    pairs = enumerate(zip(missing, attempts, strict=True))
    for _, group in itertools.groupby(pairs, key=lambda item: (item[1][0] - item[0], item[1][1])):
        run = [pair for _, pair in group]
        step = most or len(run)
        for start in range(0, len(run), step):
            first, tried = run[start]
            own = None if seed is None else seed + first + tried * RETRY_SEED_STRIDE
            yield Ask(first, min(step, len(run) - start), own)


class Wanted:
    """What is still to be asked about each recording, by what the store holds."""

    def __init__(
        self, prompt: Prompt, honours_n: bool, store: LabelStore, query: Query, k: int, max_attempts: int = MAX_ATTEMPTS
    ):
        self.prompt, self.query, self.k, self.max_attempts = prompt, query, k, max_attempts
        # Questions that differ from sample to sample cannot be asked together.
        self.most = 1 if prompt.varies or not honours_n else None
        self.have, self.rejected = store.have(query), store.rejected(query)
        self.claimed: set[str] = set()

    def claim(self, audio: str) -> list[Ask]:
        """List the requests about a recording; none the second time, when another utterance has the same recording."""
        if audio in self.claimed:
            return []
        self.claimed.add(audio)
        missing = [i for i in range(self.k) if self._wanted(audio, i)]
        attempts = [self.rejected.get((audio, i), 0) for i in missing]
        return list(plan(missing, attempts, self.query.sampling.get("seed"), self.most))

    def nothing(self, known: Known | None) -> bool:
        """Whether a recording is known, and nothing is to be asked about it."""
        if known is None:
            return False
        return known.audio in self.claimed or not any(self._wanted(known.audio, i) for i in range(self.k))

    def _wanted(self, audio: str, index: int) -> bool:
        key = (audio, index)
        return key not in self.have and self.rejected.get(key, 0) < self.max_attempts


class Recording(NamedTuple):
    """A recording that was read."""

    known: Known
    clip: Clip
    cut: bool


def read_known(source, hashes: HashCache | None = None) -> tuple[Known, torch.Tensor]:
    """Read a recording, and remember its content hash and length."""
    before = file_stamp(source)
    waveform = source() if callable(source) else load_audio(source, SAMPLE_RATE)
    known = Known(content_hash(waveform), len(waveform) / SAMPLE_RATE)
    if hashes is not None:
        hashes.put(source, before, known)
    return known, waveform


def known_recording(source, hashes: HashCache) -> Known:
    """Look a recording up, or read it."""
    return hashes.get(source) or read_known(source, hashes)[0]


def read_recording(source, longest_audio: float | None = None, hashes: HashCache | None = None) -> Recording:
    """Read a recording and make it ready to be sent."""
    known, waveform = read_known(source, hashes)
    heard = waveform if longest_audio is None else waveform[: int(longest_audio * SAMPLE_RATE)]
    return Recording(known, Clip.of(encode_wav(heard)), len(heard) < len(waveform))


class _Call(NamedTuple):
    """One request to be made."""

    utt_id: str
    audio: str
    clip: Clip
    ask: Ask


class _Halt(Exception):
    """Ends all workers at once; why, the job knows."""


class _Job:
    """State of one run that its workers share."""

    def __init__(
        self, wanted: Wanted, client: LalmClient, store: LabelStore, hashes: HashCache, max_failures: int, bar: tqdm
    ):
        self.wanted, self.client, self.store, self.hashes = wanted, client, store, hashes
        self.max_failures, self.failures, self.bar = max_failures, 0, bar
        self.report = CollectReport()
        self.failed: set[str] = set()
        self.ready: collections.deque[_Call] = collections.deque()
        self.reading, self.was_read = 0, Signal()
        self.stop: LalmError | None = None
        self.why = "Stopped"
        self.ending = self.unusable = False
        self.usable, self.answered = bool(wanted.have), 0
        self.next_look = 0.0

    async def run(self, utterances: Sequence[Utterance], concurrency: int, deadline: float | None):
        queue, writer = iter(utterances), _Writer(self.store, self.wanted.query, concurrency, self._on_disk)
        async with self.client:
            await self.client.check()
            writing = asyncio.create_task(writer.run())
            # One utterance can become several calls, so there may be more workers than utterances.
            count = min(concurrency, len(utterances) * self.wanted.k)
            workers = [asyncio.create_task(self._work(queue, writer)) for _ in range(count)]
            everyone = asyncio.gather(*workers)
            try:
                await self._watch(everyone, writing, deadline)
            finally:
                self.ending = True
                await cancel_until_ended(workers)
                await asyncio.gather(everyone, return_exceptions=True)
                await writer.close(writing)
                self.report.cost = self.client.budget.told()
        if self.stop is not None:
            kept = f"{self.why}; {self.report.stored} new samples are stored. Run again to go on."
            self.stop.args = (f"{self.stop}\n{kept}",)
            raise self.stop from None

    async def _watch(self, everyone: asyncio.Future, writing: asyncio.Task, deadline: float | None):
        """Wait for the workers, for a store that cannot be written, or for the deadline."""
        done, _ = await asyncio.wait({everyone, writing}, timeout=deadline, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            self.stop = LalmError(f"--lalm_deadline: the {deadline:g} s for the whole collection have passed")
        for task in done:
            with contextlib.suppress(_Halt):
                task.result()

    async def _work(self, queue: Iterator[Utterance], writer: _Writer):
        while self.stop is None and not self.ending and (call := await self._next(queue)) is not None:
            try:
                records = await self._ask(call)
            except BudgetReached as error:
                self.stop = error  # the others bring home what they asked for
            except LalmError as error:
                self._call_failed(call, error)
            else:
                self.failures = 0
                self._count_unusable(records)
                await writer.put(records)

    async def _next(self, queue: Iterator[Utterance]) -> _Call | None:
        """Take the next call; where there is none, read the next recording or wait for those who do."""
        while not self.ready:
            utterance = next(queue, None)
            if utterance is not None:
                self.reading += 1
                try:
                    await self._prepare(*utterance)
                finally:
                    self.reading -= 1
                    self.was_read.fire()
            elif self.reading:
                await self.was_read.wait()
            else:
                return None
        return self.ready.popleft()

    async def _prepare(self, utt_id: str, source):
        if self.wanted.nothing(self.hashes.get(source)):
            self._skip(self.wanted.k)
            await asyncio.sleep(0)  # thousands of these in a row must not keep the others from their replies
            return
        longest = self.client.profile.longest_audio
        try:
            recording = await asyncio.to_thread(read_recording, source, longest, self.hashes)
        except WriteError:
            raise
        except (BadAudio, OSError) as error:  # one unreadable recording says nothing about the API
            self._utterance_failed(utt_id, error, self.wanted.k)
            return
        asks = self.wanted.claim(recording.known.audio)
        self._skip(self.wanted.k - sum(ask.n for ask in asks))
        self.report.cut += bool(asks) and recording.cut
        self.ready.extend(_Call(utt_id, recording.known.audio, recording.clip, ask) for ask in asks)

    async def _ask(self, call: _Call) -> list[Record]:
        sampling, (k, n, seed) = self.wanted.query.sampling, call.ask
        prompt = self.wanted.prompt.at(k, sampling.get("seed"))
        responses = await self.client.ask_once(prompt, call.clip, n, **{**sampling, "seed": seed})
        got = len(responses)
        if got < n:  # what came is brought to disk before the rest is asked for
            rest = Ask(k + got, n - got, None if seed is None else seed + got)
            self.ready.appendleft(call._replace(ask=rest))
        return [Record(call.audio, k + i, call.utt_id, response) for i, response in enumerate(responses)]

    def _count_unusable(self, records: Sequence[Record]):
        """Stop where none of the first answers can be used; answers to open calls are still stored."""
        self.usable |= any(record.response.answer.is_sample for record in records)
        self.answered += len(records)
        if not self.usable and self.answered >= MAX_UNUSABLE:
            self.unusable = self.ending = True

    def _on_disk(self, records: Sequence[Record]):
        self.report.count(records)
        self._show(len(records))

    def _skip(self, count: int):
        self.report.skipped += count
        self._show(count)

    def _call_failed(self, call: _Call, error: LalmError):
        if call.utt_id in self.failed:
            self._show(call.ask.n)
        else:
            self._utterance_failed(call.utt_id, error, call.ask.n)
        # An API that is down fails every call, and asking on helps nobody.
        self.failures += 1
        if (error.hopeless or self.failures >= self.max_failures) and self.stop is None:
            self.stop, self.why = error, f"Stopped after {self.failures} failed requests in a row"
            raise _Halt

    def _utterance_failed(self, utt_id: str, error: Exception, count: int):
        self.failed.add(utt_id)
        self.report.failed.append((utt_id, str(error)))
        self._show(count)

    def _show(self, count: int):
        self.bar.update(count)
        now = time.monotonic()
        if now < self.next_look and self.bar.n < self.bar.total:
            return
        self.next_look = now + BETWEEN_LOOKS
        counts = {"refused": self.report.refused, "invalid": self.report.invalid, "failed": len(self.failed)}
        cost = self.client.budget.told()
        self.bar.set_postfix({**({"cost": cost} if cost else {}), **counts}, refresh=False)


class _Writer:
    """Brings answers to disk, as many at a time as came in while the last ones were written."""

    def __init__(self, store: LabelStore, query: Query, room: int, on_disk: Callable[[Sequence[Record]], None]):
        self.store, self.query, self.room, self.on_disk = store, query, room, on_disk
        self.waiting: list[list[Record]] = []
        self.came, self.taken = Signal(), Signal()
        self.commit: asyncio.Future | None = None

    async def put(self, records: list[Record]):
        self.waiting.append(records)
        self.came.fire()
        while len(self.waiting) >= self.room:
            await self.taken.wait()

    async def run(self):
        while True:
            while not self.waiting:
                await self.came.wait()
            self.commit = asyncio.ensure_future(self._write())
            # Cancelling cannot stop a thread that writes: `close` waits for it.
            await asyncio.shield(self.commit)
            self.commit = None

    async def close(self, writing: asyncio.Task):
        """Stop `run`; write what is left, unless writing failed."""
        failed = writing.done() and not writing.cancelled() and writing.exception() is not None
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        if failed:
            return
        if self.commit is not None:
            await self.commit
        if self.waiting:
            await self._write()

    async def _write(self):
        records = [record for call in self.waiting for record in call]
        self.waiting = []
        self.taken.fire()
        await asyncio.to_thread(self.store.put_many, self.query, records)
        self.on_disk(records)


def _check(prompt: Prompt, client: LalmClient, query: Query, k: int, concurrency: int, deadline: float | None):
    mine = (prompt.prompt_hash(), prompt.labels, client.model, client.base_url)
    if mine != (query.prompt_hash, query.labels, query.model, query.base_url):
        raise UserError("the query belongs to another prompt, label set, model or base_url than the ones given")
    if k < 1 or concurrency < 1:
        raise UserError(f"the number of samples ({k}) and the concurrency ({concurrency}) must be at least 1")
    if deadline is not None and not deadline > 0:
        raise UserError(f"--lalm_deadline must be a positive number of seconds, not {deadline}")
    if "temperature" not in query.sampling:
        raise UserError("the query's sampling parameters must name the temperature that is sent")
