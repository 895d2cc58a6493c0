"""Confidence intervals that respect speakers: utterances of one speaker are not independent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from speechbrain_mifuse.evaluation.metrics import confusion, unweighted_accuracy


def speaker_counts(
    predicted: torch.Tensor, reference: torch.Tensor, speakers: Sequence[str], n_classes: int
) -> torch.Tensor:
    """Confusion counts of each speaker."""
    names = np.asarray(speakers)
    chosen = [torch.from_numpy(np.flatnonzero(names == name)) for name in sorted(set(speakers))]
    return torch.stack([confusion(predicted[rows], reference[rows], n_classes) for rows in chosen])


def speaker_bootstrap(counts: torch.Tensor, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of UA when whole speakers are drawn with replacement (cluster bootstrap, percentile form).

    With few speakers (two in one of the open corpora's test sets) such an interval is coarse and rather too narrow;
    the number of speakers belongs beside it.

    Parameters
    ----------
    counts : torch.Tensor
        `[speakers, C, C + 1]`, as `speaker_counts` gives.
    draws : int
        Bootstrap samples.
    seed : int
        Of the draws.

    Returns
    -------
    tuple of float
        Lower and upper bound, in [0, 1].

    Example
    -------
    >>> perfect = torch.tensor([[[2, 0, 0], [0, 2, 0]]] * 3)
    >>> speaker_bootstrap(perfect)
    (1.0, 1.0)
    """
    generator = np.random.default_rng(seed)
    picks = generator.integers(0, len(counts), size=(draws, len(counts)))
    # How often each draw holds each speaker, `[draws, speakers]`: the counts of all draws are then one product.
    draw = np.arange(draws)[:, None]
    times = np.bincount((draw * len(counts) + picks).ravel(), minlength=picks.size).reshape(picks.shape)
    drawn = torch.from_numpy(times).double() @ counts.double().flatten(1)
    low, high = np.percentile(unweighted_accuracy(drawn.view(draws, *counts.shape[1:])), [2.5, 97.5])
    return float(low), float(high)
