"""The Batch API of OpenAI's kind (``/v1/files``, ``/v1/batches``): the same questions within a day, at half the price.

Four steps, each of which can be stopped at any moment and repeated: `make` writes request files, `submit` uploads them
and starts batches, `poll` looks how far they are, `ingest` brings the answers into the label store. `run` goes on from
wherever the job stands. What is known of it is in ``state.json`` in a folder beside the store.

No batch is started twice. Before it is started the state says so; if the answer to that is lost, the server's list of
batches tells by the input file and by the metadata whether it was started. Requests that expired, failed or were not
answered are made again; refused and unusable answers too, within the attempts of the store.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import dataclasses
import json
import logging
import os
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import openai
from filelock import FileLock, Timeout

from speechbrain_mifuse.lalm.answer import Response
from speechbrain_mifuse.lalm.client import BLOCKED, FAULTS, LalmClient
from speechbrain_mifuse.lalm.collect import Ask, Utterance, Wanted, check_usable, read_recording, run_to_end
from speechbrain_mifuse.lalm.hashes import HashCache
from speechbrain_mifuse.lalm.limits import LalmError, expected_tokens, most_tokens
from speechbrain_mifuse.lalm.prompt import Clip, Prompt
from speechbrain_mifuse.lalm.redaction import redacted, short
from speechbrain_mifuse.lalm.store import LabelStore, Query, Record
from speechbrain_mifuse.utils.audio import BadAudio
from speechbrain_mifuse.utils.audio_warnings import summarized
from speechbrain_mifuse.utils.errors import UserError, WriteError, writing
from speechbrain_mifuse.utils.files import atomic_write
from speechbrain_mifuse.utils.progress import progress

logger = logging.getLogger(__name__)

ENDPOINT = "/v1/chat/completions"

# OpenAI's limits of one input file: requests, and bytes (200 MB, less some room).
MAX_REQUESTS = 50_000
MAX_BYTES = 190_000_000

# Keys of a batch's metadata by which it is found again.
JOB, PART = "speechbrain_mifuse_job", "speechbrain_mifuse_part"

# Files of up to 200 MB take longer than a question.
TRANSFER_SECONDS = 900.0
TRANSFER_RETRIES = 4
# Of a file of results, which is read whole.
_MOST_BYTES = 2**29

# Batches older than this before an attempt to start one cannot be its outcome, whatever the clocks say.
_DAY = 86400

STATE_VERSION = 1
_WAITING, _OVER = ("made", "uploaded", "starting"), ("ingested", "failed")
_ENDED = ("completed", "expired", "cancelled")
_QUEUE_FULL = "token_limit_exceeded"


@dataclasses.dataclass
class Part:
    """One request file and its batch."""

    name: str
    requests: int
    most: float = 0.0
    status: str = "made"
    file_id: str | None = None
    batch_id: str | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    tried: float = 0.0
    progress: str = ""
    errors: list[str] = dataclasses.field(default_factory=list)

    @property
    def open(self) -> bool:
        """Whether answers to it may still come."""
        return self.status not in _OVER


@dataclasses.dataclass
class Ingested:
    """What `BatchJob.ingest` found in the files of answers."""

    stored: int = 0
    refused: int = 0
    invalid: int = 0
    unanswered: dict[str, int] = dataclasses.field(default_factory=dict)
    unknown: list[str] = dataclasses.field(default_factory=list)

    @property
    def answers(self) -> int:
        """All of them."""
        return self.stored + self.refused + self.invalid

    def __iadd__(self, other: Ingested) -> Ingested:
        for name in ("stored", "refused", "invalid"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.unanswered = dict(collections.Counter(self.unanswered) + collections.Counter(other.unanswered))
        self.unknown += other.unknown
        return self

    def summary(self, most: int = 20) -> str:
        """Say it in a few lines, naming at most `most` unknown lines."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.unanswered.items()))
        lines = [
            f"{self.stored} samples stored of {self.answers} answers ({self.refused} refused, {self.invalid} invalid); "
            f"{sum(self.unanswered.values())} requests unanswered" + (f" ({reasons})" if reasons else "")
        ]
        lines += [f"  {place}" for place in self.unknown[:most]]
        if len(self.unknown) > most:
            lines.append(f"  ... and {len(self.unknown) - most} more unknown lines")
        return "\n".join(lines)


class _Request(NamedTuple):
    """What is remembered of a request, by its custom id."""

    utt_id: str
    audio: str
    k: int
    n: int
    seed: int | None


class BatchJob:
    """Collection of one query's answers by the Batch API.

    The same prompt, client, store and query must be given every time. One process at a time works on a job.

    Parameters
    ----------
    prompt : Prompt
        The question.
    client : LalmClient
        Access to the API; its bodies and its way to read replies are those of live calls.
    store : LabelStore
        Where the answers go.
    query : Query
        Their key.
    folder : str or pathlib.Path, optional
        For the state and the request files; by default beside the store, named after the query.

    Raises
    ------
    UserError
        If another process works on the job, or the folder holds the job of another query.

    Example
    -------
    >>> prompt, client = Prompt(("angry", "sad")), LalmClient("http://127.0.0.1:8000/v1", "m")
    >>> query = Query.of(prompt, "m", client.base_url, {"temperature": 1.0, "seed": 0})
    >>> with LabelStore(tempfile.mkdtemp() + "/labels.sqlite") as store:
    ...     with BatchJob(prompt, client, store, query) as job:
    ...         job.make([], k=5)
    ...         print(job.status())
    0
    nothing is made yet
    """

    def __init__(
        self, prompt: Prompt, client: LalmClient, store: LabelStore, query: Query, folder: str | Path | None = None
    ):
        self.prompt, self.client, self.store, self.query = prompt, client, store, query
        self.folder = Path(folder or f"{store.path}.batch-{query.digest[:8]}")
        self._explained: set[str] = set()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / "lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"{self.folder}: another process works on this batch job. Wait for it or stop it."
            ) from None
        try:
            self.job, self.parts = self._load()
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> BatchJob:
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Let other processes work on the job."""
        self._lock.release()

    @summarized()
    def make(
        self,
        utterances: Sequence[Utterance],
        k: int,
        max_attempts: int = 3,
        max_requests: int = MAX_REQUESTS,
        max_bytes: int = MAX_BYTES,
        show_progress: bool = True,
    ) -> int:
        """Write request files for all samples that neither the store nor an open batch has.

        Parameters
        ----------
        utterances : sequence of (str, path or callable)
            As for `speechbrain_mifuse.lalm.collect.collect`.
        k : int
            Samples per recording.
        max_attempts : int
            How often a sample is asked for before it is given up.
        max_requests, max_bytes : int
            Limits of one file.
        show_progress : bool
            Show a progress bar.

        Returns
        -------
        int
            Requests written. Recordings that cannot be read are warned of and left out.

        Raises
        ------
        UserError
            If the client has a budget that these requests could pass, or one request is larger than a file may be.
            Nothing is made then.
        """
        wanted = Wanted(self.prompt, self.client.profile.honours_n, self.store, self.query, k, max_attempts)
        for part in self._with("made", "uploaded", "starting", "started", "ended"):
            wanted.have.update((r.audio, r.k + i) for r in self._index(part).values() for i in range(r.n))
        self._cut = 0
        writer = _PartWriter(self, max_requests, max_bytes, self._spent())
        try:
            with writing(self.folder), HashCache.beside(self.store.path) as hashes:
                for utt_id, source in progress(utterances, desc="requests", unit="utt", disable=not show_progress):
                    for ask, audio, clip in self._asks(utt_id, source, wanted, hashes):
                        writer.add(utt_id, audio, ask, clip)
                made = writer.close()
        except BaseException:
            writer.discard()
            raise
        self.parts += made
        self._save()
        if self._cut:
            logger.warning(
                "%d recordings are longer than the %g s that %s hears: only their beginning is sent",
                *(self._cut, self.client.profile.longest_audio, self.client.model),
            )
        return sum(part.requests for part in made)

    def submit(self) -> None:
        """Upload request files and start a batch for each; one that may have been started already is looked for first.

        Raises
        ------
        LalmError
            If the server is down or refuses; the next call goes on.
        """
        self._online(self._submit)

    def poll(self) -> bool:
        """Ask how far the batches are.

        Returns
        -------
        bool
            Whether every batch that was started has ended.

        Raises
        ------
        LalmError
            If the server is down, or rejected a request file: its message is in the error and in the state.
        """
        self._online(self._poll)
        return not self._with("started")

    def ingest(self) -> Ingested:
        """Bring the answers of batches that have ended into the store, each file in one transaction.

        Returns
        -------
        Ingested

        Raises
        ------
        LalmError
            If the server is down, or no answer to the query can be used.
        StoreError
            If the store cannot be written.
        """
        found = Ingested()
        if any(file_id and not path.exists() for part in self._with("ended") for path, file_id in self._results(part)):
            self._online(self._download)
        for part in self._with("ended"):
            found += self._take(part)
            part.status = "ingested"
            self._save()
            for kind in ("requests", "index"):  # they hold all the audio; the answers' files stay
                self._path(part, kind).unlink(missing_ok=True)
        if found.answers and not found.stored and not self.store.have(self.query):
            check_usable(self.store, self.query)
        return found

    def run(
        self,
        utterances: Sequence[Utterance],
        k: int,
        max_attempts: int = 3,
        every: float = 60.0,
        max_requests: int = MAX_REQUESTS,
        max_bytes: int = MAX_BYTES,
        show_progress: bool = True,
    ) -> Ingested:
        """Go on from wherever the job stands until every recording has `k` samples or is out of attempts.

        Parameters
        ----------
        utterances, k, max_attempts, max_requests, max_bytes, show_progress
            As for `make`.
        every : float
            Seconds between two looks.

        Returns
        -------
        Ingested
            Of all rounds of this call.

        Raises
        ------
        LalmError
            As `submit` and `poll`, or if a whole round of batches brings no answer.
        """
        found = Ingested()
        while True:
            nothing_open = not any(part.open for part in self.parts)
            if nothing_open and not self.make(utterances, k, max_attempts, max_requests, max_bytes, show_progress):
                return found
            round_ = self._round(every, show_progress)
            found += round_
            if not round_.answers:
                raise LalmError(f"{self.folder}: a round of batches brought no answer: {round_.summary()}")

    def status(self) -> str:
        """Say where each part stands, one a line."""
        lines = [
            f"part {part.name}: {part.requests} requests, {part.status}"
            + (f", {part.batch_id}" if part.batch_id else "")
            + (f", {part.progress}" if part.progress else "")
            for part in self.parts
        ]
        return "\n".join(lines) or "nothing is made yet"

    def _round(self, every: float, show_progress: bool) -> Ingested:
        total, found = sum(part.requests for part in self.parts if part.open), Ingested()
        with progress(total=total, unit="request", desc="batches", disable=not show_progress) as bar:
            while any(part.open for part in self.parts):
                self._online(self._submit, self._poll, self._download)
                bar.set_postfix_str(", ".join(part.progress for part in self._with("started")), refresh=False)
                bar.update(sum(part.requests for part in self._with("ended")))
                found += self.ingest()
                if self._with("started"):
                    time.sleep(every)
        return found

    def _asks(self, utt_id: str, source, wanted: Wanted, hashes: HashCache) -> Iterator[tuple[Ask, str, Clip]]:
        known = None if callable(source) else hashes.get(source)
        if known is not None and wanted.nothing(known.audio):
            return
        try:
            recording = read_recording(source, self.client.profile.longest_audio, hashes)
        except WriteError:
            raise
        except (BadAudio, OSError) as error:
            logger.warning("%s: left out (%s)", utt_id, error)
            return
        asks = wanted.claim(recording.known.audio)
        self._cut += bool(asks) and recording.cut
        for ask in asks:
            yield ask, recording.known.audio, recording.clip

    def _online(self, *steps: Callable[[], Awaitable[None]]) -> None:
        """Do something on one connection to the server."""

        async def connected() -> None:
            async with self.client, self.client.connection(_MOST_BYTES) as self._api:
                try:
                    for step in steps:
                        await step()
                except LalmError:
                    raise
                except FAULTS as error:
                    raise await self.client.explain(error) from error

        run_to_end(connected)

    async def _submit(self) -> None:
        for part in self._with("starting"):
            batch = await self._find(part)
            part.status = "uploaded"
            if batch is not None:
                self._started(part, batch)
        self._save()
        for part in self._with("made"):
            with self._path(part, "requests").open("rb") as file:
                name = f"mifuse-{self.job}-{part.name}.jsonl"
                sent = await self._patient().files.create(file=(name, file), purpose="batch")
            part.file_id, part.status = self._id(sent.id), "uploaded"
            self._save()
        for part in self._with("uploaded"):
            if part.progress == _QUEUE_FULL and self._with("started"):
                continue  # there is room again when another batch has ended
            await self._start(part)

    async def _start(self, part: Part) -> None:
        part.status, part.tried, part.progress = "starting", time.time(), ""
        self._save()
        try:
            # Never retried by itself: what failed may have been started all the same.
            batch = await self._api.batches.create(
                input_file_id=part.file_id,
                endpoint=ENDPOINT,
                completion_window="24h",
                metadata={JOB: self.job, PART: part.name},
            )
        except openai.APIStatusError as error:
            if error.status_code < 500:  # refused, so certainly not started
                part.status = "uploaded"
                self._save()
            raise
        self._started(part, batch)
        self._save()

    def _started(self, part: Part, batch) -> None:
        part.batch_id, part.status, part.progress = self._id(batch.id), "started", short(batch.status)

    def _id(self, named: object) -> str:
        """Give the id by which the server wants to be asked about something."""
        if not short(named):
            raise LalmError(f"{self.folder}: the server gave no id for what it was sent: it has no Batch API")
        return short(named)

    async def _find(self, part: Part):
        """Find the batch that an attempt with an unknown outcome has started; `None` if it has not."""
        async for batch in self._patient().batches.list(limit=100):
            if batch.created_at and batch.created_at < part.tried - _DAY:
                return None
            marks = batch.metadata or {}
            mine = (marks.get(JOB), marks.get(PART)) == (self.job, part.name) or batch.input_file_id == part.file_id
            if mine and batch.status != "failed":
                return batch
        return None

    async def _poll(self) -> None:
        failed_before = self._with("failed")
        for part in self._with("started"):
            batch = await self._patient().batches.retrieve(part.batch_id)
            counts = batch.request_counts
            share = f" {short(counts.completed)}/{short(counts.total)}" if counts else ""
            part.progress = f"{short(batch.status)}{share}"
            if batch.status in _ENDED:
                part.status, part.output_file_id, part.error_file_id = (
                    "ended",
                    short(batch.output_file_id) or None,
                    short(batch.error_file_id) or None,
                )
            elif batch.status == "failed":
                self._rejected(part, batch)
            self._save()
        failed = [part for part in self._with("failed") if part not in failed_before]
        if failed:
            told = "; ".join(error for part in failed for error in part.errors[:3])
            raise LalmError(f"{self.folder}: the server rejected {len(failed)} request files: {told}", hopeless=True)

    def _rejected(self, part: Part, batch) -> None:
        errors = (batch.errors and batch.errors.data) or []
        others = [other for other in self._with("started") if other is not part]
        if others and any(error.code == _QUEUE_FULL for error in errors):
            part.status, part.batch_id, part.progress = "uploaded", None, _QUEUE_FULL
            return
        part.status = "failed"
        part.errors = [redacted(f"{e.message} (line {e.line})" if e.line else str(e.message)) for e in errors]
        part.errors = part.errors or ["no reason given"]
        for kind in ("requests", "index"):
            self._path(part, kind).unlink(missing_ok=True)

    async def _download(self) -> None:
        for part in self._with("ended"):
            for path, file_id in self._results(part):
                if file_id and not path.exists():
                    content = await self._patient().files.content(file_id)
                    atomic_write(path, redacted(content.content.decode("utf-8", "replace")))

    def _results(self, part: Part) -> list[tuple[Path, str | None]]:
        return [(self._path(part, "output"), part.output_file_id), (self._path(part, "error"), part.error_file_id)]

    def _take(self, part: Part) -> Ingested:
        index, found, records = self._index(part), Ingested(), []
        left = dict.fromkeys(index, "no answer")
        answered: set[str] = set()
        for place, line in self._answers(part):
            custom_id = line.get("custom_id") if isinstance(line, dict) else None
            if not isinstance(custom_id, str) or custom_id not in index or custom_id in answered:
                found.unknown.append(f"{place}: answers nothing that was asked, or a second time ({custom_id!r})")
                continue
            request = index[custom_id]
            responses, reason = self._responses(request, line, part.batch_id)
            if responses:
                answered.add(custom_id)
            missing = request.n - len(responses)
            left[custom_id] = reason or ("fewer choices than asked for" if missing else "")
            records += [
                Record(request.audio, request.k + i, request.utt_id, response) for i, response in enumerate(responses)
            ]
        self.store.put_many(self.query, self._not_stored_before(records))
        kinds = collections.Counter(record.response.answer.kind for record in records)
        found.refused, found.invalid = kinds["refusal"], kinds["invalid"]
        found.stored = len(records) - found.refused - found.invalid
        found.unanswered = dict(collections.Counter(reason for reason in left.values() if reason))
        return found

    def _not_stored_before(self, records: Sequence[Record]) -> list[Record]:
        """Leave out rejected answers that a killed `ingest` has stored: again they would count as another attempt."""
        stored = {
            (entry.audio, entry.k, entry.seed, entry.raw)
            for entry in self.store.entries(self.query)
            if not entry.is_sample
        }
        return [r for r in records if (r.audio, r.k, r.response.seed, r.response.raw) not in stored]

    def _answers(self, part: Part) -> Iterator[tuple[str, object]]:
        for path, _ in self._results(part):
            if not path.exists():
                continue
            with path.open(encoding="utf-8") as file:
                for number, text in enumerate(file, start=1):
                    with contextlib.suppress(ValueError, RecursionError):
                        yield f"{path}:{number}", json.loads(text)
                        continue
                    yield f"{path}:{number}", None

    def _responses(self, request: _Request, line: Mapping, batch_id: str | None) -> tuple[list[Response], str]:
        """Answers in one line, or why there are none."""
        response = line.get("response") or {}
        body = response.get("body") or {}
        if response.get("status_code") == 200 and isinstance(body, dict) and body.get("choices"):
            prompt = self.prompt.at(request.k, self.query.sampling.get("seed"))
            responses = self.client.responses(prompt, body, request.n, request.seed)
            usage = {**(responses[0].usage or {}), "batch": batch_id}
            return [dataclasses.replace(responses[0], usage=usage), *responses[1:]], ""
        code, message = self.client.error_in(line.get("error") or body)
        if code in BLOCKED:
            seeds = (None if request.seed is None else request.seed + i for i in range(request.n))
            return [self.client.blocked(message, seed) for seed in seeds], ""
        reason = code or f"status {response.get('status_code')}"
        if reason not in self._explained:
            self._explained.add(reason)
            logger.warning("batch %s: %s, for instance: %s", batch_id, reason, message)
        return [], reason

    def _with(self, *statuses: str) -> list[Part]:
        return [part for part in self.parts if part.status in statuses]

    def _patient(self) -> openai.AsyncOpenAI:
        return self._api.with_options(max_retries=TRANSFER_RETRIES, timeout=TRANSFER_SECONDS)

    def _spent(self) -> float:
        """Cost of this query's batches so far, with all that open ones can cost."""
        price = self.client.budget.price
        if price is None:
            return 0.0
        used = [price.cost(batch=asked.batch_tokens) for asked in self.store.queries() if asked.query == self.query]
        return sum(used) + sum(part.most for part in self.parts if part.open)

    def _path(self, part: Part, kind: str) -> Path:
        return self.folder / f"{part.name}.{kind}.jsonl"

    def _index(self, part: Part) -> dict[str, _Request]:
        with self._path(part, "index").open(encoding="utf-8") as file:
            return {custom_id: _Request(*rest) for custom_id, *rest in map(json.loads, file)}

    def _load(self) -> tuple[str, list[Part]]:
        for left in self.folder.glob(".*"):  # by a process that was killed while it wrote
            left.unlink()
        path = self.folder / "state.json"
        if not path.exists():
            return uuid.uuid4().hex[:12], []
        state = json.loads(path.read_text(encoding="utf-8"))
        if (state["version"], state["query"]) != (STATE_VERSION, self.query.digest):
            raise UserError(
                f"{path}: holds the batch job of another query (model, prompt, sampling or endpoint), or of another "
                "version. Finish that one first, or name another folder."
            )
        return state["job"], [Part(**part) for part in state["parts"]]

    def _save(self) -> None:
        parts = [dataclasses.asdict(part) for part in self.parts]
        state = {"version": STATE_VERSION, "query": self.query.digest, "job": self.job, "parts": parts}
        atomic_write(self.folder / "state.json", json.dumps(state, indent=1))


class _PartWriter:
    """Spreads requests over files within the limits; files get their names when all are written."""

    def __init__(self, job: BatchJob, max_requests: int, max_bytes: int, spent: float):
        self.job, self.max_requests, self.max_bytes, self.spent = job, max_requests, max_bytes, spent
        self.numbers = len(job.parts)
        self.finished: list[tuple[Part, Path, Path]] = []
        self.files: list[IO[bytes]] = []
        self.names: list[Path] = []
        self.part: Part | None = None
        self.size = 0

    def add(self, utt_id: str, audio: str, ask: Ask, clip: Clip) -> None:
        job, seed = self.job, self.job.query.sampling.get("seed")
        prompt = job.prompt.at(ask.k, seed)
        body = job.client.body(prompt, clip.data, ask.n, **{**job.query.sampling, "seed": ask.seed})
        custom_id = _custom_id(job.query, audio, ask)
        line = json.dumps({"custom_id": custom_id, "method": "POST", "url": ENDPOINT, "body": body}).encode() + b"\n"
        if len(line) > self.max_bytes:
            raise UserError(
                f"{utt_id}: one request of {len(line)} bytes, and a file of them may have {self.max_bytes}. Set "
                "`longest_audio` in the lalm_profile."
            )
        if self.part is None or self.part.requests == self.max_requests or self.size + len(line) > self.max_bytes:
            self._begin()
        self._count(prompt, ask, clip)
        self.files[0].write(line)
        self.files[1].write(json.dumps([custom_id, utt_id, audio, *ask]).encode() + b"\n")
        self.part.requests += 1
        self.size += len(line)

    def close(self) -> list[Part]:
        self._end()
        for part, *paths in self.finished:
            for path, kind in zip(paths, ("requests", "index"), strict=True):
                os.replace(path, self.job._path(part, kind))
        return [part for part, *_ in self.finished]

    def discard(self) -> None:
        for file in self.files:
            with contextlib.suppress(OSError):  # of what a full disk has refused already
                file.close()
        for path in [*self.names, *(path for _, *paths in self.finished for path in paths)]:
            path.unlink(missing_ok=True)

    def _begin(self) -> None:
        self._end()
        self.part = Part(f"{self.numbers + len(self.finished) + 1:04d}", 0)
        self.size = 0
        made = [tempfile.mkstemp(dir=self.job.folder, prefix=".") for _ in range(2)]
        self.names = [Path(name) for _, name in made]
        self.files = [os.fdopen(handle, "wb") for handle, _ in made]

    def _end(self) -> None:
        if self.part is None:
            return
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        self.finished.append((self.part, *self.names))
        self.part = None

    def _count(self, prompt: Prompt, ask: Ask, clip: Clip) -> None:
        budget, profile = self.job.client.budget, self.job.client.profile
        if budget.price is None:
            return
        expected = expected_tokens(prompt, clip.seconds, ask.n, profile)
        most = most_tokens(prompt, expected, ask.n, profile.output_limit(self.job.query.sampling))
        cost = budget.price.cost(batch=most)
        self.part.most += cost
        self.spent += cost
        if budget.limit is not None and self.spent > budget.limit:
            raise UserError(
                f"--lalm_budget: these batches could cost more than {budget.limit:g} {budget.price.currency} together "
                "with those before. Nothing was made. Raise it, or ask about fewer recordings."
            )


def _custom_id(query: Query, audio: str, ask: Ask) -> str:
    """Query, content hash, sample index and count in less than the 64 characters that some servers allow."""
    digest = base64.urlsafe_b64encode(bytes.fromhex(audio)).decode().rstrip("=")
    return f"{query.digest[:8]}-{digest}-{ask.k}-{ask.n}"
