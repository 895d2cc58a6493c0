"""From recordings to frames, several at a time: side by side on the cores, or in padded batches on a GPU."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from speechbrain_mifuse.utils.audio import BadAudio, content_hash, load_audio

# Recordings that are read ahead of the one whose turn it is.
AHEAD = 64
# Of so many recordings those of similar length share a batch, of this many seconds with the padding.
SORTED, BATCH_S = 128, 120.0


class Recording(NamedTuple):
    """A recording whose frames are missing or may be outdated."""

    wav: str
    stamp: tuple[int, int]
    audio: str | None = None


class Outcome(NamedTuple):
    """What became of a recording."""

    utt_id: str
    recording: Recording
    audio: str = ""
    frames: np.ndarray | None = None
    problem: BadAudio | None = None


def _loaded(item: tuple[str, Recording], reader) -> tuple[Outcome, torch.Tensor | None]:
    """Read a recording."""
    utt_id, recording = item
    try:
        wave = load_audio(recording.wav, reader.encoder.sample_rate)
    except BadAudio as problem:
        return Outcome(utt_id, recording, problem=problem), None
    audio = content_hash(wave)
    return Outcome(utt_id, recording, audio), None if audio == recording.audio else wave


def side_by_side(todo: Mapping[str, Recording], reader, pool: Executor) -> Iterator[Outcome]:
    """Read and encode recordings one by one, several at a time: on processors as fast as batches, and never padded."""
    yield from ahead(pool, partial(_loaded_and_encoded, reader=reader), todo.items(), AHEAD)


def _loaded_and_encoded(item: tuple[str, Recording], reader) -> Outcome:
    outcome, wave = _loaded(item, reader)
    if wave is None:
        return outcome
    with torch.inference_mode():
        return outcome._replace(frames=reader.encode(wave).cpu().numpy())


def in_batches(todo: Mapping[str, Recording], reader, pool: Executor) -> Iterator[Outcome]:
    """Read recordings several at a time and encode those of similar length together: made for a GPU."""
    loaded = ahead(pool, partial(_loaded_and_prepared, reader=reader), todo.items(), SORTED)
    while part := list(itertools.islice(loaded, SORTED)):
        yield from (outcome for outcome, wave in part if wave is None)
        waiting = [(outcome, wave) for outcome, wave in part if wave is not None]
        for batch in similar(waiting, int(BATCH_S * reader.encoder.sample_rate)):
            with torch.inference_mode():
                encoded = reader.encode_together([wave for _, wave in batch])
            for (outcome, _), frames in zip(batch, encoded, strict=True):
                yield outcome._replace(frames=frames.numpy())


def _loaded_and_prepared(item: tuple[str, Recording], reader) -> tuple[Outcome, torch.Tensor | None]:
    outcome, wave = _loaded(item, reader)
    return outcome, None if wave is None else reader.prepare(wave)


def similar(waiting: list[tuple], room: int) -> Iterator[list[tuple]]:
    """Put waveforms of similar length together."""
    rest = deque(sorted(waiting, key=lambda pair: -len(pair[1])))
    while rest:
        count = max(1, room // len(rest[0][1]))
        yield [rest.popleft() for _ in range(min(count, len(rest)))]


def ahead(pool: Executor, function: Callable, items: Iterable, count: int) -> Iterator:
    """Apply a function to many things in the threads of a pool, which are kept busy while results are handed out."""
    jobs = deque()
    for item in items:
        jobs.append(pool.submit(function, item))
        if len(jobs) > count:
            yield jobs.popleft().result()
    while jobs:
        yield jobs.popleft().result()
