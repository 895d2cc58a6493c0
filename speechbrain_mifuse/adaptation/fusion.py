"""From two teachers' stochastic predictions to one soft label, and the losses of the student.

Equations of MI-Fuse (arXiv 2509.20706) as far as its abstract and summaries give them; what is our default says so.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def exponential_weight(uncertainty: torch.Tensor, temperature: float = 0.2) -> torch.Tensor:
    """`f(u) = exp(-u / tau)`, our default for the form the paper leaves open.

    Parameters
    ----------
    uncertainty : torch.Tensor
        Any shape, >= 0.
    temperature : float
        tau, in the unit of the uncertainty.

    Returns
    -------
    torch.Tensor
        In (0, 1].

    Example
    -------
    >>> exponential_weight(torch.tensor([0.0, 0.2])).tolist()
    [1.0, 0.3678...]
    """
    return torch.exp(-uncertainty / temperature)


def reciprocal_weight(uncertainty: torch.Tensor, epsilon: float = 0.01) -> torch.Tensor:
    """`f(u) = 1 / (u + eps)`, the alternative form.

    Parameters
    ----------
    uncertainty : torch.Tensor
        Any shape, >= 0.
    epsilon : float
        Bounds the weight of a certain teacher.

    Returns
    -------
    torch.Tensor
        Positive.

    Example
    -------
    >>> reciprocal_weight(torch.tensor([0.0]), epsilon=0.5).tolist()
    [2.0]
    """
    return 1 / (uncertainty + epsilon)


def teacher_weights(reliability: torch.Tensor, available: torch.Tensor) -> torch.Tensor:
    """`w_m = f(MI_m) / sum_j f(MI_j)` over the teachers that gave at least one sample.

    Parameters
    ----------
    reliability : torch.Tensor
        `[B, M]`, f(MI) of M teachers.
    available : torch.Tensor
        `[B, M]`, bool.

    Returns
    -------
    torch.Tensor
        `[B, M]`, each row adds up to 1, or is all 0 where no teacher is available.

    Example
    -------
    >>> teacher_weights(torch.tensor([[1.0, 3.0]]), torch.tensor([[True, True]])).tolist()
    [[0.25, 0.75]]
    """
    # The largest becomes 1 first, so that two very uncertain teachers cannot underflow to no teacher at all.
    scaled = reliability / reliability.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(reliability.dtype).tiny)
    kept = torch.where(available, scaled.clamp(min=1e-12), 0.0)
    return kept / kept.sum(-1, keepdim=True).clamp(min=1e-12)


def fused_label(means: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`q = sum_m w_m mean_m`: the mixture of the teachers' mean distributions.

    Parameters
    ----------
    means : torch.Tensor
        `[B, M, C]`.
    weights : torch.Tensor
        `[B, M]`.

    Returns
    -------
    torch.Tensor
        `[B, C]`.

    Example
    -------
    >>> fused_label(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[0.25, 0.75]])).tolist()
    [[0.25, 0.75]]
    """
    return torch.einsum("bmc,bm->bc", means, weights)


def soft_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`-sum_c q_c log p_c`, averaged over the utterances that have a target.

    Parameters
    ----------
    logits : torch.Tensor
        `[B, C]`.
    targets : torch.Tensor
        `[B, C]`, distributions; an all-zero row means that no teacher answered, and counts for nothing.

    Returns
    -------
    torch.Tensor
        Scalar, nats.

    Example
    -------
    >>> round(float(soft_cross_entropy(torch.zeros(1, 2), torch.tensor([[0.5, 0.5]]))), 4)
    0.6931
    """
    losses = -(targets * F.log_softmax(logits, dim=-1)).sum(-1)
    return losses.sum() / (targets.sum(-1) > 0).sum().clamp(min=1)


def diversity(logits: torch.Tensor) -> torch.Tensor:
    """`sum_c pbar_c log pbar_c`, pbar the batch mean of p: minus the entropy of the mean prediction.

    Least when the student uses all classes equally often, which holds off collapse to one class. It assumes that the
    target's classes are of comparable size (term and weight 1.0: SHOT, Liang et al. 2020).

    Parameters
    ----------
    logits : torch.Tensor
        `[B, C]`.

    Returns
    -------
    torch.Tensor
        Scalar, nats, in [-log C, 0].

    Example
    -------
    >>> round(float(diversity(torch.tensor([[9.0, 0.0], [0.0, 9.0]]))), 4)
    -0.6931
    """
    return -torch.special.entr(logits.softmax(-1).mean(0)).sum()
