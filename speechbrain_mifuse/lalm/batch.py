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
import shutil
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import openai
from filelock import FileLock, Timeout

from speechbrain_mifuse.lalm.answer import Response
from speechbrain_mifuse.lalm.client import FAULTS, LalmClient
from speechbrain_mifuse.lalm.collect import (
    AnswerCounts,
    Ask,
    Utterance,
    Wanted,
    check_usable,
    read_recording,
    run_to_end,
    warn_of_cut,
)
from speechbrain_mifuse.lalm.completion import BLOCKED, blocked, error_in, field, responses
from speechbrain_mifuse.lalm.hashes import HashCache
from speechbrain_mifuse.lalm.limits import LalmError, estimated_tokens
from speechbrain_mifuse.lalm.prompt import Clip, Prompt
from speechbrain_mifuse.lalm.redaction import redacted, short
from speechbrain_mifuse.lalm.store import LabelStore, Query, Record
from speechbrain_mifuse.utils.audio import BadAudio
from speechbrain_mifuse.utils.audio_warnings import summarized
from speechbrain_mifuse.utils.errors import UserError, WriteError, writing
from speechbrain_mifuse.utils.files import atomic_write
from speechbrain_mifuse.utils.progress import progress
from speechbrain_mifuse.utils.texts import first_of

logger = logging.getLogger(__name__)

ENDPOINT = "/v1/chat/completions"

# Keys of a batch's metadata by which it is found again.
JOB, PART = "speechbrain_mifuse_job", "speechbrain_mifuse_part"
# Files of up to 200 MB take longer than a question.
TRANSFER_SECONDS = 900.0
TRANSFER_RETRIES = 4
# Of a file of results, which is read whole.
_MOST_BYTES = 2**29

# Batches that are looked through for one that may have been started; a server can list batches without end.
MAX_LISTED = 10_000
# Batches older than this before an attempt to start one cannot be its outcome, whatever the clocks say.
_DAY = 86400
STATE_VERSION = 1
_OVER = ("ingested", "failed")
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
class Ingested(AnswerCounts):
    """What `BatchJob.ingest` found in the files of answers."""

    unanswered: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    unknown: list[str] = dataclasses.field(default_factory=list)

    def __iadd__(self, other: Ingested) -> Ingested:
        for name in vars(other):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self

    def summary(self) -> str:
        """Say it in a few lines."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.unanswered.items()))
        line = f"{self.counted()}; {sum(self.unanswered.values())} requests unanswered"
        return "\n".join([line + (f" ({reasons})" if reasons else ""), *first_of(self.unknown, "more unknown lines")])


class _Request(NamedTuple):
    """What is remembered of a request, by its custom id."""

    utt_id: str
    audio: str
    k: int
    n: int
    seed: int | None


class BatchJob(contextlib.AbstractContextManager):
    """Collection of one query's answers by the Batch API.

    Close it, or use it as a context manager: one process works on a job at a time.

    Parameters
    ----------
    prompt, client, store, query : Prompt, LalmClient, LabelStore, Query
        As for `lalm.collect.collect`; the same must be given every time.
    folder : str or pathlib.Path, optional
        State and files of the job; beside the store by default.

    Raises
    ------
    UserError
        If another process works on the job, or the folder holds that of another query.

    Example
    -------
    >>> import tempfile, torch
    >>> prompt, client = Prompt(("angry", "sad")), LalmClient("http://127.0.0.1:8000/v1", "m")
    >>> query = Query.of(prompt, client.model, client.base_url, {"temperature": 1.0, "seed": 0})
    >>> recordings = [("u1", lambda: torch.rand(16_000)), ("u2", lambda: torch.rand(16_000))]
    >>> with LabelStore(tempfile.mkdtemp() + "/labels.sqlite") as store, BatchJob(prompt, client, store, query) as job:
    ...     job.make(recordings, k=5, show_progress=False), job.status()
    (2, 'part 0001: 2 requests, made')
    """

    # OpenAI's limits of one input file: requests, and bytes (200 MB, less some room).
    max_requests, max_bytes = 50_000, 190_000_000

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

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Let other processes work on the job."""
        self._lock.release()

    @summarized()
    def make(self, utterances: Sequence[Utterance], k: int, show_progress: bool = True) -> int:
        """Write request files for all samples that neither the store nor an open batch has.

        Parameters
        ----------
        utterances : sequence of (str, path or callable)
            As for `lalm.collect.collect`.
        k : int
            Samples per recording.
        show_progress : bool
            On standard error.

        Returns
        -------
        int
            Number of requests made.
        """
        wanted = Wanted(self.prompt, self.client.profile.honours_n, self.store, self.query, k)
        for part in self._with("made", "uploaded", "starting", "started", "ended"):
            wanted.have.update((r.audio, r.k + i) for r in self._index(part).values() for i in range(r.n))
        self._cut = 0
        with (
            writing(self.folder),
            tempfile.TemporaryDirectory(dir=self.folder, prefix=".") as folder,
            HashCache.beside(self.store.path) as hashes,
        ):
            writer = _PartWriter(self, Path(folder))
            try:
                for utt_id, source in progress(utterances, desc="requests", unit="utt", disable=not show_progress):
                    for ask, audio, clip in self._asks(utt_id, source, wanted, hashes):
                        writer.add(utt_id, audio, ask, clip)
                made = writer.close()
            finally:
                writer.discard()
        self.parts += made
        self._save()
        warn_of_cut(self._cut, self.client, "is")
        return sum(part.requests for part in made)

    def submit(self) -> None:
        """Upload request files and start a batch for each; one that may have been started is looked for first."""
        self._online(self._submit)

    def poll(self) -> bool:
        """Ask how far the batches are; true if none is on its way any more."""
        self._online(self._poll)
        return not self._with("started")

    def ingest(self) -> Ingested:
        """Bring the answers of batches that have ended into the store, each file in one transaction."""
        found = Ingested()
        if any(file_id and not path.exists() for part in self._with("ended") for path, file_id in self._results(part)):
            self._online(self._download)
        for part in self._with("ended"):
            self._take(part, found)
            part.status = "ingested"
            self._save()
            self._forget(part)
        if found.asked and not found.stored and not self.store.have(self.query):
            check_usable(self.store, self.query)
        return found

    def run(self, utterances: Sequence[Utterance], k: int, every=60.0, show_progress=True) -> Ingested:
        """Go on from wherever the job stands until every recording has `k` samples or is out of attempts.

        Parameters
        ----------
        utterances, k, show_progress
            As for `make`.
        every : float
            Seconds between two looks at the batches.

        Returns
        -------
        Ingested
            Numbers of answers.

        Raises
        ------
        LalmError
            If the server rejects a file, or a round of batches brings no answer.
        """
        found = Ingested()
        while True:
            nothing_open = not any(part.open for part in self.parts)
            if nothing_open and not self.make(utterances, k, show_progress):
                return found
            round_ = self._round(every, show_progress)
            found += round_
            if not round_.asked:
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
        if wanted.nothing(hashes.get(source)):
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
            options = {"completion_window": "24h", "metadata": {JOB: self.job, PART: part.name}}
            batch = await self._api.batches.create(input_file_id=part.file_id, endpoint=ENDPOINT, **options)
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
        looked_at = 0
        async for batch in self._patient().batches.list(limit=100):
            looked_at += 1
            if looked_at > MAX_LISTED:
                raise LalmError(
                    f"{self.folder}: none of the {MAX_LISTED} newest batches of the server is part {part.name}, which "
                    "may have been started. If the server's own pages show that it was not, delete this folder and run "
                    "again"
                )
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
                part.status = "ended"
                part.output_file_id = short(batch.output_file_id) or None
                part.error_file_id = short(batch.error_file_id) or None
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
        self._forget(part)

    async def _download(self) -> None:
        for part in self._with("ended"):
            for path, file_id in self._results(part):
                if file_id and not path.exists():
                    content = await self._patient().files.content(file_id)
                    atomic_write(path, redacted(content.content.decode("utf-8", "replace")))

    def _results(self, part: Part) -> list[tuple[Path, str | None]]:
        return [(self._path(part, "output"), part.output_file_id), (self._path(part, "error"), part.error_file_id)]

    def _take(self, part: Part, found: Ingested) -> None:
        index, records = self._index(part), []
        left = dict.fromkeys(index, "no answer")
        answered: set[str] = set()
        for place, line in self._answers(part):
            custom_id = line.get("custom_id") if isinstance(line, dict) else None
            if not isinstance(custom_id, str) or custom_id not in index or custom_id in answered:
                found.unknown.append(f"{place}: answers nothing that was asked, or a second time ({custom_id!r})")
                continue
            request = index[custom_id]
            answers, reason = self._responses(request, line, part.batch_id)
            if answers:
                answered.add(custom_id)
            missing = request.n - len(answers)
            left[custom_id] = reason or ("fewer choices than asked for" if missing else "")
            records += [Record(request.audio, request.k + i, request.utt_id, r) for i, r in enumerate(answers)]
        self.store.put_many(self.query, self._not_stored_before(records))
        found.count(records)
        found.unanswered.update(reason for reason in left.values() if reason)

    def _not_stored_before(self, records: Sequence[Record]) -> list[Record]:
        """Leave out rejected answers that a killed `ingest` has stored: again they would count as another attempt."""
        entries = self.store.entries(self.query)
        stored = {(entry.audio, entry.k, entry.seed, entry.raw) for entry in entries if not entry.is_sample}
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
        response = line.get("response")
        status, body = field(response, "status_code"), field(response, "body")
        if status == 200 and isinstance(body, dict):
            prompt = self.prompt.at(request.k, self.query.sampling.get("seed"))
            answers = responses(prompt, body, request.n, request.seed)
            if answers:
                usage = {**(answers[0].usage or {}), "batch": batch_id}
                return [dataclasses.replace(answers[0], usage=usage), *answers[1:]], ""
        code, message = error_in(line.get("error") or body or {})
        if code in BLOCKED:
            seeds = (None if request.seed is None else request.seed + i for i in range(request.n))
            return [blocked(message, seed) for seed in seeds], ""
        reason = code or f"status {short(status) or None}"
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

    def _asked(self, part: Part) -> list[Path]:
        return [self._path(part, "requests"), self._path(part, "index")]

    def _forget(self, part: Part) -> None:
        """Delete the files of requests, which hold all the audio; the answers' files stay."""
        for path in self._asked(part):
            path.unlink(missing_ok=True)

    def _index(self, part: Part) -> dict[str, _Request]:
        with self._path(part, "index").open(encoding="utf-8") as file:
            return {custom_id: _Request(*rest) for custom_id, *rest in map(json.loads, file)}

    def _load(self) -> tuple[str, list[Part]]:
        for left in self.folder.glob(".*"):  # by a process that was killed while it wrote
            shutil.rmtree(left) if left.is_dir() else left.unlink()
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
    """Spreads requests over files within the limits, in a folder that only `close` empties."""

    def __init__(self, job: BatchJob, folder: Path):
        self.job, self.folder = job, folder
        self.parts: list[Part] = []
        self.files: list[IO[bytes]] = []
        self.size, self.spent = 0, job._spent()

    def add(self, utt_id: str, audio: str, ask: Ask, clip: Clip) -> None:
        job, seed = self.job, self.job.query.sampling.get("seed")
        prompt = job.prompt.at(ask.k, seed)
        body = job.client.body(prompt, clip.data, ask.n, **{**job.query.sampling, "seed": ask.seed})
        custom_id = _custom_id(job.query, audio, ask)
        line = json.dumps({"custom_id": custom_id, "method": "POST", "url": ENDPOINT, "body": body}).encode() + b"\n"
        if len(line) > job.max_bytes:
            raise UserError(
                f"{utt_id}: one request of {len(line)} bytes, and a file of them may have {job.max_bytes}. Set "
                "`longest_audio` in the lalm_profile."
            )
        if not self.files or self.parts[-1].requests == job.max_requests or self.size + len(line) > job.max_bytes:
            self._begin()
        self._count(prompt, ask, clip)
        self.files[0].write(line)
        self.files[1].write(json.dumps([custom_id, utt_id, audio, *ask]).encode() + b"\n")
        self.parts[-1].requests += 1
        self.size += len(line)

    def close(self) -> list[Part]:
        self._end()
        for part in self.parts:
            for path in self.job._asked(part):
                os.replace(self.folder / path.name, path)
        return self.parts

    def discard(self) -> None:
        for file in self.files:
            with contextlib.suppress(OSError):  # of what a full disk has refused already
                file.close()

    def _begin(self) -> None:
        self._end()
        self.parts.append(Part(f"{len(self.job.parts) + len(self.parts) + 1:04d}", 0))
        paths = (self.folder / path.name for path in self.job._asked(self.parts[-1]))
        self.files = [open(path, "wb") for path in paths]  # noqa: SIM115 - closed by `close` or `discard`
        self.size = 0

    def _end(self) -> None:
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        self.files = []

    def _count(self, prompt: Prompt, ask: Ask, clip: Clip) -> None:
        budget, profile = self.job.client.budget, self.job.client.profile
        if budget.price is None:
            return
        _, most = estimated_tokens(prompt, clip.seconds, ask.n, profile, self.job.query.sampling)
        cost = budget.price.cost(batch=most)
        self.parts[-1].most += cost
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
