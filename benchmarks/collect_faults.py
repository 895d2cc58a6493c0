"""Collection under fire: killed at random moments, and with half of all replies faulty. Nothing may be lost or wrong.

Killed: a process collects five answers to each recording from a server on this machine and is ended by SIGKILL at a
random moment, again and again, before a last run is let finish. Counted on the server's side and in the store:

- `complete_share`: utterances with exactly five samples at the end (1 is all),
- `asked_again_of_stored`: samples asked for although they were on disk when the process was killed (0 is right),
- `asked_again_per_kill`: samples asked for a second time: they were in flight when the process was killed,
- `lost_replies_per_kill`: requests among them that the server had answered already; the reply was on its way to disk,
- `reply_to_disk_ms`: how long before the kill the earliest of these replies had left the server.

Faulty: half of all replies are drawn from the faults of `tests/chaos_server.py` (429 with and without Retry-After, 5xx,
dropped, truncated, malformed, slow, empty, cut off, refused, contradicting, ...), with the program's own pauses.

- `answered_share`, `reported_share`: samples stored after one run, and those not stored that the report accounts for,
- `wrong`: stored samples that differ from the one right answer to their recording and seed (0 is right),
- `runs_until_complete`: runs of the same command until nothing is missing.

The run stops with an error where a promise is broken: a figure that is printed was kept.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from measure import Figure
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from chaos_server import LABELS, MODEL, PASSING, ChaosServer, noise, noises, right_scores
from processes import start

from speechbrain_mifuse.lalm.client import LalmClient
from speechbrain_mifuse.lalm.collect import RETRY_SEED_STRIDE, CollectReport, collect
from speechbrain_mifuse.lalm.integrity import check
from speechbrain_mifuse.lalm.profile import Profile
from speechbrain_mifuse.lalm.prompt import Prompt
from speechbrain_mifuse.lalm.store import LabelStore, Query
from speechbrain_mifuse.utils.audio import content_hash
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.progress import progress

ROOT = Path(__file__).resolve().parents[1]
K, WORKERS = 5, 8
PROMPT = Prompt(LABELS)
HERE = Profile(model=MODEL)


def run(quick: bool) -> tuple[str, dict[str, Figure]]:
    """Do both parts."""
    kills, killed_count, faulty_count = (3, 60, 30) if quick else (50, 2000, 500)
    with tempfile.TemporaryDirectory() as scratch:
        killed = killed_again_and_again(Path(scratch) / "killed.sqlite", kills, killed_count)
        faulty = half_of_all_replies_faulty(Path(scratch) / "faulty.sqlite", faulty_count)
    data = (
        f"{kills} kills over {killed_count} utterances, half-faulty over {faulty_count}, {K} samples, {WORKERS} workers"
    )
    return data, {**killed, **faulty}


def killed_again_and_again(
    path: Path, kills: int, count: int, latency: float = 0.05, profile: Profile = HERE, faults: tuple[str, ...] = ()
) -> dict[str, Figure]:
    """Kill a collection at random moments, let it finish at last, and hold it to its promises."""
    moments, marks, lost = random.Random(0), [], []
    calls = count if profile.honours_n else count * K
    longest = 2 * calls * latency / WORKERS / (kills + 1)
    with ChaosServer(faults, rate=1.0, latency=latency) as server:
        for _ in progress(range(kills), desc="kill -9", unit="kill"):
            before = len(server.asked)
            kill_after(moments.uniform(0, longest), started(path, server.base_url, count, profile), server)
            killed = time.monotonic()
            time.sleep(2 * latency)  # until what was in flight is answered on the server's side
            require_sound(path)
            stored = stored_samples(path, server.base_url)
            marks.append((len(server.asked), stored))
            answered = [entry for entry in server.asked[before:] if (entry.answered or killed) < killed]
            lost.append([killed - entry.answered for entry in answered if not stored.issuperset(entry.samples)])
        process = started(path, server.base_url, count, profile)
        process.join()
        require(process.exitcode == 0, f"the last run ended with status {process.exitcode}")
        return {**completeness(path, server, count), **repeats(server, marks), **losses(lost)}


def kill_after(seconds: float, process, server: ChaosServer, how: int = signal.SIGKILL) -> float:
    """Send a process a signal some time after its first question, and wait for its end; how long that took."""
    asked = len(server.asked)
    while len(server.asked) == asked and process.is_alive():
        time.sleep(0.002)
    time.sleep(seconds)
    sent = time.monotonic()
    os.kill(process.pid, how)
    process.join()
    return time.monotonic() - sent


def completeness(path: Path, server: ChaosServer, count: int) -> dict[str, Figure]:
    """Every utterance has exactly K samples, each the right one, and the store is sound."""
    stored, wanted = stored_samples(path, server.base_url), {(audio, k) for audio in hashes(count) for k in range(K)}
    require(stored == wanted, f"{len(wanted - stored)} samples missing, {len(stored - wanted)} too many")
    require_sound(path)
    require(wrong_samples(path, server.base_url, count) == 0, "a stored sample is not the right answer")
    return {"complete_share": Figure("of 1", [len(stored & wanted) / len(wanted)])}


def repeats(server: ChaosServer, marks: list[tuple[int, set]]) -> dict[str, Figure]:
    """What was asked for again after a kill was not on disk."""
    again, of_stored = [], []
    for (mark, stored), (end, _) in zip(marks, [*marks[1:], (len(server.asked), None)], strict=True):
        asked_before = {sample for entry in server.asked[:mark] for sample in entry.samples}
        asked_after = {sample for entry in server.asked[mark:end] for sample in entry.samples}
        again.append(len(asked_after & asked_before))
        of_stored.append(len(asked_after & stored))
    require(sum(of_stored) == 0, f"{sum(of_stored)} samples were asked for although they were stored")
    return {
        "asked_again_of_stored": Figure("samples", of_stored),
        "asked_again_per_kill": Figure("samples", again),
    }


def losses(lost: list[list[float]]) -> dict[str, Figure]:
    """Replies that had left the server and were not on disk when the process was killed."""
    require(max(map(len, lost)) <= 2 * WORKERS, f"{max(map(len, lost))} replies were lost at once")
    return {
        "lost_replies_per_kill": Figure("replies", [len(times) for times in lost]),
        "reply_to_disk_ms": Figure("ms", [1000 * max(times, default=0.0) for times in lost]),
    }


def half_of_all_replies_faulty(path: Path, count: int) -> dict[str, Figure]:
    """Collect from a server of which every second reply is faulty, and account for every sample."""
    with ChaosServer(PASSING, rate=0.5, latency=0.01) as server:
        shares, accounted = [], []
        start = time.perf_counter()
        while not shares or shares[-1] < 1:
            require(len(shares) < 10, "ten runs did not complete it")
            report = collect_all(path, server.base_url, count)
            shares.append(len(stored_samples(path, server.base_url)) / (count * K))
            accounted.append(accounted_for(report, path, server.base_url, count))
            require(accounted[-1] == 1, "a sample is neither stored nor reported")
        seconds = time.perf_counter() - start
        completeness(path, server, count)
        return {
            "faulty_reply_share": Figure("of 1", [1 - server.drawn["answer_right"] / sum(server.drawn.values())]),
            "answered_share": Figure("of 1", shares[:1]),
            "accounted_share": Figure("of 1", accounted),
            "wrong": Figure("samples", [wrong_samples(path, server.base_url, count)]),
            "runs_until_complete": Figure("runs", [len(shares)]),
            "faulty_seconds": Figure("s", [seconds]),
        }


def accounted_for(report: CollectReport, path: Path, url: str, count: int) -> float:
    """Share of the samples that are stored, were refused or unusable, or belong to an utterance reported as failed."""
    failed = {content_hash(noise(int(utt_id[1:]))) for utt_id, _ in report.failed}
    with LabelStore(path) as store:
        known = store.have(query(url)) | set(store.rejected(query(url)))
    wanted = [(audio, k) for audio in hashes(count) for k in range(K)]
    return sum(audio in failed or (audio, k) in known for audio, k in wanted) / len(wanted)


def collect_all(path: Path, url: str, count: int, profile: Profile = HERE) -> CollectReport:
    """Collect as a recipe does."""
    with LabelStore(path) as store:
        client = LalmClient(url, MODEL, timeout=5, deadline=60, profile=profile)
        return collect(
            noises(count), PROMPT, client, store, query(url), K, WORKERS, max_attempts=20, show_progress=False
        )


def started(path: Path, url: str, count: int, profile: Profile = HERE):
    """Begin `collect_all` in a process of its own, forked from one that has imported everything."""
    return start(in_own_process, path, url, count, profile)


def in_own_process(path: Path, url: str, count: int, profile: Profile):
    """Collect in a process that may be killed, without the lock that progress bars share between processes."""
    tqdm.set_lock(threading.RLock())  # a semaphore that a killed process leaves behind is warned of
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with Ctrl-C ignored
    collect_all(path, url, count, profile)


def query(url: str) -> Query:
    """Name the answers of this benchmark."""
    return Query.of(PROMPT, MODEL, url, {"temperature": 1.0, "seed": 0}, "local:chaos")


def hashes(count: int) -> list[str]:
    """Content hashes of all recordings, in their order."""
    return [content_hash(waveform()) for _, waveform in noises(count)]


def stored_samples(path: Path, url: str) -> set[tuple[str, int]]:
    """Pairs of content hash and sample index on disk."""
    with LabelStore(path) as store:
        return store.have(query(url))


def wrong_samples(path: Path, url: str, count: int) -> int:
    """Count stored samples that are no right answer to their recording and to a seed their index can have."""
    audios = hashes(count)
    with LabelStore(path) as store:
        samples = store.load(query(url), audios, K)
    wrong = 0
    for row, audio in enumerate(audios):
        for k in samples.mask[row].nonzero().flatten().tolist():
            right = (right_scores(audio, k + attempt * RETRY_SEED_STRIDE) for attempt in range(21))
            found = samples.probs[row, k]
            wrong += not any(torch.allclose(found, torch.tensor([*scores.values()]), atol=1e-4) for scores in right)
    return wrong


def require_sound(path: Path):
    """Stop if the store's own check finds anything."""
    with LabelStore(path) as store:
        found = check(store)
    require(not found.problems, f"the store is damaged: {found.summary()}")


def require(kept: bool, otherwise: str):
    """Stop where a promise is broken."""
    if not kept:
        raise UserError(f"collect_faults: {otherwise}")
