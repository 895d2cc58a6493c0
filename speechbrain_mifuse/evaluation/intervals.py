"""Intervals for few clusters: Student's t on how far each cluster moves a score, in place of a percentile bootstrap.

Recordings of one speaker are not independent, so the clusters are speakers, and two to ten of them are usual here. A
percentile bootstrap of so few is too narrow: it cannot draw a speaker that it has not seen, and it lacks the factor
`n / (n - 1)`. Here the score is linearized (infinitesimal jackknife), its variance is that between clusters, and the
quantile is Student's, with as many degrees of freedom as the clusters give.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

LEVEL = 0.95


def influences(counts: np.ndarray) -> np.ndarray:
    """Tell how far each speaker moves the unweighted accuracy of all.

    Parameters
    ----------
    counts : np.ndarray
        `[..., speakers, C, C + 1]`, confusion counts as `metrics.confusion` gives.

    Returns
    -------
    np.ndarray
        `[..., speakers]`, in the unit of UA; their sum is 0. Of equal speakers it is `(UA_s - UA) / n`.

    Example
    -------
    >>> counts = np.array([[[3, 1, 0], [0, 4, 0]], [[1, 3, 0], [0, 4, 0]]])
    >>> influences(counts).tolist()
    [0.0625, -0.0625]
    """
    hits, total = np.diagonal(counts[..., :-1], axis1=-2, axis2=-1), counts.sum(-1)  # [..., speakers, C]
    size = total.sum(-2, keepdims=True)
    recall = hits.sum(-2, keepdims=True) / np.maximum(size, 1)
    moved = ((hits - recall * total) / np.maximum(size, 1)).sum(-1)
    return moved / np.maximum((size > 0).sum(-1), 1)


def margin(groups: Sequence[np.ndarray]) -> np.ndarray:
    """Half the width of a 95 % interval of a score that independent groups of clusters move.

    Parameters
    ----------
    groups : sequence of np.ndarray
        Each `[..., n]`: influences of the n clusters of one group, such as the test speakers of one corpus.

    Returns
    -------
    np.ndarray
        `[...]`; infinite where a group has one cluster: nothing is known of how clusters differ.

    Example
    -------
    >>> scores = np.array([1.0, 2.0, 3.0])
    >>> float(margin([(scores - scores.mean()) / 3]).round(3))  # as the textbook's: 4.303 * 1 / sqrt(3)
    2.484
    """
    if any(group.shape[-1] < 2 for group in groups):
        return np.full(groups[0].shape[:-1], np.inf)
    freedom = [group.shape[-1] - 1 for group in groups]
    variances = [(n + 1) / n * (group**2).sum(-1) for n, group in zip(freedom, groups, strict=True)]
    total = np.sum(variances, axis=0)
    # Welch and Satterthwaite: the group with most of the variance decides how much is known of it.
    parts = np.sum([variance**2 / n for n, variance in zip(freedom, variances, strict=True)], axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        degrees = np.where(parts > 0, total**2 / parts, 1.0)
    return stats.t.ppf((1 + LEVEL) / 2, degrees) * np.sqrt(total)


def deviations(scores: np.ndarray) -> np.ndarray:
    """Influences of clusters whose plain mean is the score.

    Parameters
    ----------
    scores : np.ndarray
        `[..., n]`, one score of each cluster.

    Returns
    -------
    np.ndarray
        `[..., n]`.

    Example
    -------
    >>> deviations(np.array([1.0, 3.0])).tolist()
    [-0.5, 0.5]
    """
    return (scores - scores.mean(-1, keepdims=True)) / scores.shape[-1]
