"""Unweighted and weighted accuracy, macro-F1, confusion counts, calibration, agreement, intervals over speakers.

Utterances of one speaker are not independent, so intervals are drawn over speakers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from speechbrain_mifuse.evaluation.intervals import influences, margin

BINS = 10


def confusion(predicted: torch.Tensor, reference: torch.Tensor, n_classes: int) -> torch.Tensor:
    """Count reference classes (rows) against predicted ones (columns)."""
    column = torch.where(predicted < 0, n_classes, predicted)
    flat = torch.bincount(reference * (n_classes + 1) + column, minlength=n_classes * (n_classes + 1))
    return flat.view(n_classes, n_classes + 1)


def unweighted_accuracy(counts: torch.Tensor) -> torch.Tensor:
    """UA of confusion matrices: `mean_c recall_c` over the classes that occur.

    Parameters
    ----------
    counts : torch.Tensor
        `[..., C, C + 1]`, as `confusion` gives.

    Returns
    -------
    torch.Tensor
        `[...]`, float64, in [0, 1].

    Example
    -------
    >>> unweighted_accuracy(torch.tensor([[[3, 1, 0], [0, 2, 0]], [[1, 1, 0], [0, 0, 0]]])).tolist()
    [0.875, 0.5]
    """
    counts = counts.double()
    return (counts.diagonal(dim1=-2, dim2=-1) / counts.sum(-1)).nanmean(-1)


def scores_of(counts: torch.Tensor) -> dict[str, float]:
    """UA, WA and macro-F1 of a confusion matrix."""
    counts = counts.double()
    hits, total = counts.diagonal(), counts.sum(1)
    occurs = total > 0
    f1 = 2 * hits[occurs] / (total + counts[:, :-1].sum(0))[occurs]
    return {
        "UA": float(unweighted_accuracy(counts)),
        "WA": float(hits.sum() / total.sum()),
        "macro_F1": float(f1.mean()),
    }


def scores(predicted: torch.Tensor, reference: torch.Tensor, n_classes: int) -> dict[str, float]:
    """UA, WA and macro-F1 of predictions; see `confusion` and `scores_of`."""
    return scores_of(confusion(predicted, reference, n_classes))


class Reliability(NamedTuple):
    """Stated probability against frequency, in bins of equal width that hold any; `error` is calibration error."""

    stated: list[float]
    frequency: list[float]
    count: list[int]
    error: float


def reliability(stated: torch.Tensor, happened: torch.Tensor) -> Reliability:
    """Compare stated probabilities with how often what they state is so."""
    stated, happened = stated.double(), happened.double()
    bins = (stated * BINS).long().clamp(0, BINS - 1)
    count = torch.bincount(bins, minlength=BINS)
    used = count > 0
    said, so = (torch.bincount(bins, value, BINS)[used] / count[used] for value in (stated, happened))
    error = (count[used] * (so - said).abs()).sum() / max(len(stated), 1)
    rounded = ([round(value, 6) for value in mean.tolist()] for mean in (said, so))
    return Reliability(*rounded, count[used].tolist(), round(float(error), 6))


def kappa(one: torch.Tensor, other: torch.Tensor, n_classes: int) -> float | None:
    """Cohen's kappa: agreement of two raters with what chance gives taken out; `None` where chance gives all of it."""
    marginals = [torch.bincount(rater, minlength=n_classes).double() / len(one) for rater in (one, other)]
    chance = float(marginals[0] @ marginals[1])
    agreed = float((one == other).double().mean())
    return None if chance == 1 else (agreed - chance) / (1 - chance)


def speaker_counts(
    predicted: torch.Tensor, reference: torch.Tensor, speakers: Sequence[str], n_classes: int
) -> torch.Tensor:
    """Confusion counts of each speaker."""
    names = np.asarray(speakers)
    chosen = [torch.from_numpy(np.flatnonzero(names == name)) for name in sorted(set(speakers))]
    return torch.stack([confusion(predicted[rows], reference[rows], n_classes) for rows in chosen])


def speaker_interval(counts: torch.Tensor) -> tuple[float, float]:
    """95 % interval of UA over speakers, by Student's t; from 0 to 1 where there is one speaker alone.

    `counts` is `[speakers, C, C + 1]`. The number of speakers belongs beside the interval.
    """
    score, half = float(unweighted_accuracy(counts.sum(0))), float(margin([influences(counts.numpy())]))
    return max(score - half, 0.0), min(score + half, 1.0)
