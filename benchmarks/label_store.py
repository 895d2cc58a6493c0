"""Loading the targets of 100,000 utterances among 1,000,000 rows of a label store, against two plain alternatives.

The store holds five answers of each of 200,000 recordings, with replies, usage and seeds as a collection writes them,
written in random order. Asked for are all five answers of every second recording, in random order. The same answers are
also kept as an export in JSON lines, which is read from beginning to end, and as one JSON file per recording, written
for those asked for alone. Each side opens its files anew in every turn and ends with the tensors that training reads;
they must be equal. Files come from the system's cache on every side.

`load_s` is the store's time, `load_cpu_s` what it needs of the processor (on a busy machine the smaller of the two);
`jsonl_ratio` and `files_ratio` are the other sides' time over the store's. Data: seeded noise.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence, Set
from pathlib import Path

import numpy as np
import torch
from measure import Figure, ratio, take_turns

from speechbrain_mifuse.lalm.answer import KINDS, Answer, Reply, Response
from speechbrain_mifuse.lalm.exchange import export
from speechbrain_mifuse.lalm.store import LabelStore, Query, Record, Samples
from speechbrain_mifuse.utils.progress import progress

LABELS, K, BLOCK = ("angry", "happy", "neutral", "sad"), 5, 2000
QUERY = Query("0" * 64, LABELS, "noise", "http://127.0.0.1/v1", {"temperature": 1, "seed": 0})


def run(quick: bool) -> tuple[str, dict[str, Figure]]:
    """Compare the store with the plain ways."""
    recordings, turns = (400, 2) if quick else (200_000, 3)
    hashes = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(recordings)]
    random.Random(0).shuffle(hashes)
    wanted = random.Random(1).sample(hashes, recordings // 2)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        fill_s = fill(folder, hashes, set(wanted))
        sides = {"store": from_store, "jsonl": from_lines, "files": from_files}
        assert all(equal(sides["store"](folder, wanted), side(folder, wanted)) for side in sides.values())
        cpu = {name: [] for name in sides}
        timed = {name: functools.partial(seconds, side, folder, wanted, cpu[name]) for name, side in sides.items()}
        found = take_turns(timed, turns, "label_store", warm_up=0)
    figures = {
        "load_s": Figure("s", found["store"]),
        "load_cpu_s": Figure("s", cpu["store"]),
        "jsonl_ratio": ratio(found["jsonl"], found["store"]),
        "files_ratio": ratio(found["files"], found["store"]),
        "rows": Figure("rows", [recordings * K]),
        "write_rows_per_s": Figure("rows/s", [recordings * K / fill_s]),
    }
    return f"synthetic answers, {K} for each of {recordings} recordings, {len(wanted)} of them loaded", figures


def fill(folder: Path, hashes: Sequence[str], wanted: Set[str]) -> float:
    """Write the answers all three ways; the seconds that the store took."""
    with LabelStore(folder / "labels.sqlite") as store:
        begin, making = time.perf_counter(), 0.0
        for first in progress(range(0, len(hashes), BLOCK), desc="writing", unit="block"):
            made = time.perf_counter()
            records = [record for audio in hashes[first : first + BLOCK] for record in records_of(audio)]
            making += time.perf_counter() - made
            store.put_many(QUERY, records)
        taken = time.perf_counter() - begin - making
        export(store, folder / "labels.jsonl")
        write_files(folder, store, wanted)
    return taken


def records_of(audio: str) -> Iterator[Record]:
    """Answers about one recording, all from its hash."""
    rng = np.random.default_rng(int(audio[:8], 16))
    for k, probs in enumerate(rng.dirichlet(np.ones(len(LABELS)), K).tolist()):
        reply = Reply(json.dumps(dict(zip(LABELS, probs, strict=True))), "stop").to_json()
        usage = {"prompt_tokens": 150, "completion_tokens": 30} if k == 0 else None
        answer = Answer("distribution", tuple(probs))
        yield Record(audio, k, f"u-{audio[:12]}", Response(answer, reply, k, usage, "noise", "fp"))


def write_files(folder: Path, store: LabelStore, wanted: Set[str]) -> None:
    """Write one JSON file for each recording that is asked for."""
    answers: dict[str, list] = {}
    for entry in progress(store.entries(QUERY), desc="writing", unit="answer"):
        if entry.audio in wanted:
            about = {"k": entry.k, "kind": entry.kind, "probs": entry.probs, "raw": entry.raw}
            answers.setdefault(entry.audio, []).append(about)
    for audio, found in progress(answers.items(), desc="writing", unit="file"):
        path = folder / "files" / audio[:2] / f"{audio}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))


def from_store(folder: Path, wanted: Sequence[str]) -> Samples:
    """Targets out of the label store."""
    with LabelStore(folder / "labels.sqlite") as store:
        return store.load(QUERY, wanted, K)


def from_lines(folder: Path, wanted: Sequence[str]) -> Samples:
    """Targets out of JSON lines, all of which are read."""
    rows = {audio: row for row, audio in enumerate(wanted)}
    with (folder / "labels.jsonl").open() as file:
        answers = (json.loads(line) for line in file)
        return gathered(
            len(wanted), ((rows[answer["audio"]], answer) for answer in answers if answer.get("audio") in rows)
        )


def from_files(folder: Path, wanted: Sequence[str]) -> Samples:
    """Targets out of one file for each recording."""
    paths = (folder / "files" / audio[:2] / f"{audio}.json" for audio in wanted)
    return gathered(
        len(wanted), ((row, answer) for row, path in enumerate(paths) for answer in json.loads(path.read_text()))
    )


def gathered(count: int, answers: Iterator[tuple[int, dict]]) -> Samples:
    """Tensors of (row, answer) pairs."""
    probs = np.zeros((count, K, len(LABELS)), np.float32)
    kinds = np.full((count, K), -1, np.int8)
    for row, answer in answers:
        probs[row, answer["k"]] = answer["probs"]
        kinds[row, answer["k"]] = KINDS.index(answer["kind"])
    return Samples(torch.from_numpy(probs), torch.from_numpy(kinds >= 0), torch.from_numpy(kinds))


def equal(one: Samples, other: Samples) -> bool:
    """Whether two sides gave the same targets."""
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def seconds(
    side: Callable[[Path, Sequence[str]], Samples], folder: Path, wanted: Sequence[str], cpu: list[float]
) -> float:
    """Time of one side; what it took of the processor goes into `cpu`."""
    begin, used = time.perf_counter(), time.process_time()
    side(folder, wanted)
    cpu.append(time.process_time() - used)
    return time.perf_counter() - begin
