"""Emotion over time: overlapping windows, how much of each is speech, smoothing, and stretches of one answer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from speechbrain_mifuse.utils.audio import nothing_varies
from speechbrain_mifuse.utils.errors import UserError

# Value of silence and full scale of integer samples, as in WAV files.
INTEGER_SCALES = {torch.uint8: (128, 2.0**7), torch.int16: (0, 2.0**15), torch.int32: (0, 2.0**31)}
SAMPLE_TYPES = "Give floating point with full scale 1.0, int16, int32 or uint8."

# Decoders overshoot full scale a little; floats beyond this hold integer samples that were not scaled.
MAX_PEAK = 10.0

# Samples of the pieces whose loudness is compared (25 ms at 16 kHz).
PIECE = 400


class Segment(NamedTuple):
    """A stretch of a recording with one answer.

    Parameters
    ----------
    start, end : float
        Seconds since the beginning.
    label : str or None
        `None` where nothing is to be heard or the answer is unsure.
    probs : torch.Tensor
        `[C]`; all zero where nothing is to be heard.
    """

    start: float
    end: float
    label: str | None
    probs: torch.Tensor


class Timeline(NamedTuple):
    """What was recognized over time.

    Parameters
    ----------
    segments : list of Segment
        One after the other, without gaps.
    label : str or None
        Of the whole recording.
    probs : torch.Tensor
        `[C]`, of the whole recording: the mean over its windows, weighted by how much of them is speech.
    """

    segments: list[Segment]
    label: str | None
    probs: torch.Tensor


class Windowing(NamedTuple):
    """How a recording is cut into overlapping windows.

    Parameters
    ----------
    window_s, hop_s, smooth_s : float
        Seconds of a window, between the starts of two, and of smoothing to each side.

    Example
    -------
    >>> Windowing.of(4.0)
    Windowing(window_s=4.0, hop_s=2.0, smooth_s=4.0)
    >>> Windowing.of(4.0, hop_s=5.0)
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.utils.errors.UserError: hop_s: 5.0 must be above 0 and at most window_s (4.0), ...
    """

    window_s: float
    hop_s: float
    smooth_s: float

    @classmethod
    def of(cls, window_s: float, hop_s: float | None = None, smooth_s: float | None = None) -> Windowing:
        """Fill in half a window between two starts and a window of smoothing where they are not given; check all."""
        hop_s = window_s / 2 if hop_s is None else hop_s
        smooth_s = window_s if smooth_s is None else smooth_s
        if not 0 < window_s < math.inf:
            raise UserError(f"window_s: {window_s} is no length of a window; give seconds above 0.")
        if not 0 < hop_s <= window_s:
            raise UserError(f"hop_s: {hop_s} must be above 0 and at most window_s ({window_s}), or speech is left out.")
        if not smooth_s >= 0:
            raise UserError(f"smooth_s: {smooth_s} must be 0 or more seconds.")
        return cls(float(window_s), float(hop_s), float(smooth_s))


def window_starts(samples: int, window: int, hop: int) -> list[int]:
    """Where windows begin: every `hop`, and one more that ends with the recording."""
    if samples <= window:
        return [0]
    starts = list(range(0, samples - window + 1, hop))
    return starts if starts[-1] + window == samples else [*starts, samples - window]


def loud_share(wave: torch.Tensor, loudest: float, threshold_db: float | None) -> float:
    """Share of a window that is not silence; none where nothing varies."""
    if nothing_varies(wave):
        return 0.0
    if threshold_db is None:
        return 1.0
    return float((piece_powers(wave) > loudest * 10 ** (-threshold_db / 10)).float().mean())


def piece_powers(wave: torch.Tensor) -> torch.Tensor:
    """Mean square of every 25 ms."""
    whole = len(wave) // PIECE * PIECE
    pieces = wave[:whole].view(-1, PIECE) if whole else wave[None]
    return pieces.square().mean(1)


def smoothed(probs: torch.Tensor, weights: torch.Tensor, centres: torch.Tensor, reach: float) -> torch.Tensor:
    """Average each window with its neighbours, the nearer and the more speech in it the more."""
    found = torch.zeros_like(probs)
    first = torch.searchsorted(centres, centres - reach)
    last = torch.searchsorted(centres, centres + reach, right=True)
    for i in torch.nonzero(weights > 0).flatten().tolist():
        near = slice(int(first[i]), int(last[i]))
        distance = (centres[near] - centres[i]).abs()
        kernel = (1 - distance / reach).clamp(min=0) if reach else torch.ones_like(distance)
        share = kernel * weights[near]
        found[i] = share @ probs[near] / share.sum()
    return found


def stretches(centres: torch.Tensor, seconds: float, labels: Sequence, probs: torch.Tensor) -> list[Segment]:
    """Put windows with the same answer together; each window stands for the time nearest to its centre."""
    edges = [0.0, *((centres[1:] + centres[:-1]) / 2).tolist(), float(seconds)]
    found: list[Segment] = []
    for label, row, start, end in zip(labels, probs, edges[:-1], edges[1:], strict=True):
        before = found[-1] if found else None
        if before is None or before.label != label or bool(before.probs.any()) != bool(row.any()):
            found.append(Segment(start, end, label, row))
            continue
        share = (end - start) / (end - before.start)
        found[-1] = before._replace(end=end, probs=(1 - share) * before.probs + share * row)
    return found


def heard_windows(chunks: Iterable, window: int, hop: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Gather chunks of any size to what was heard last, every `hop` samples."""
    kept, end, due = torch.empty(0), 0, hop
    for number, chunk in enumerate(chunks):
        rest = checked_waveform(chunk, f"chunk {number}")
        while len(rest):
            taken, rest = rest[: due - end], rest[due - end :]
            kept = torch.cat([kept, taken])[-window:]
            end += len(taken)
            if end == due:
                yield end, kept
                due += hop
    if end > due - hop:
        yield end, kept


def checked_waveform(samples, name: str) -> torch.Tensor:
    """Convert one waveform to float32, and check it."""
    wave = float_samples(samples, name)
    if wave.dim() != 1:
        raise UserError(f"{name}: shape {list(wave.shape)} is not [samples]. Average the channels first.")
    peak = float(wave.abs().max()) if len(wave) else 0.0
    if not math.isfinite(peak):
        raise UserError(f"{name}: holds NaN or infinite samples.")
    if peak > MAX_PEAK:
        raise UserError(f"{name}: reaches {peak:g}, but full scale is 1.0. Divide 16-bit samples by 32768.")
    return wave


def float_samples(samples, name: str) -> torch.Tensor:
    """Convert samples of any shape to float32 with full scale 1.0."""
    if isinstance(samples, np.ndarray):
        if samples.dtype.kind not in "fiu":
            raise UserError(f"{name}: {samples.dtype} is not a type of samples. {SAMPLE_TYPES}")
        # Copied, since torch takes neither foreign byte orders nor negative strides, and warns of read-only memory.
        samples = torch.from_numpy(samples.astype(samples.dtype.newbyteorder("="), order="C"))
    if not isinstance(samples, torch.Tensor):
        raise UserError(f"{name}: {type(samples).__name__} is neither a tensor nor an array of samples.")
    samples = samples.detach().cpu()
    if samples.is_floating_point():
        return samples.float()
    if samples.dtype not in INTEGER_SCALES:
        raise UserError(f"{name}: {samples.dtype} is not a type of samples. {SAMPLE_TYPES}")
    silence, full_scale = INTEGER_SCALES[samples.dtype]
    return (samples.float() - silence) / full_scale
