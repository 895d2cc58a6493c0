"""From two teachers' stochastic predictions to one soft label, and the losses of the student.

Equations of MI-Fuse (arXiv 2509.20706) as far as its abstract and summaries give them; what is our default says so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from speechbrain_mifuse.adaptation.uncertainty import entropy

# Least probability that counts in a product: one expert's zero must not silence the others.
FLOOR = 1e-6


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


def prior_corrected(means: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
    """Divide distributions by a teacher's own average, and normalise: `p'_c = (p_c / prior_c) / sum_j (p_j / prior_j)`.

    A teacher that prefers a class on a whole set is taken to be biased towards it. That assumes a set whose classes
    are of comparable size; where they are not, it takes away true frequency as well (label-shift correction of Saerens
    et al. 2002, with a uniform target prior).

    Parameters
    ----------
    means : torch.Tensor
        `[N, C]`, distributions; an all-zero row (no answer) stays one.
    prior : torch.Tensor
        `[C]`, the average over the set; below 1e-6 it counts as 1e-6.

    Returns
    -------
    torch.Tensor
        `[N, C]`.

    Example
    -------
    >>> print(prior_corrected(torch.tensor([[0.6, 0.4], [0.0, 0.0]]), torch.tensor([0.75, 0.25])))
    tensor([[0.3333, 0.6667],
            [0.0000, 0.0000]])
    """
    corrected = means / prior.clamp(min=FLOOR)
    return corrected / corrected.sum(-1, keepdim=True).clamp(min=torch.finfo(means.dtype).tiny)


def product_of_experts(
    distributions: Sequence[torch.Tensor], exponents: Sequence[torch.Tensor | float] | None = None
) -> torch.Tensor:
    """`q_c` proportional to `prod_m p_mc ^ e_m`: what experts of different evidence say together (Hinton 2002).

    Parameters
    ----------
    distributions : sequence of torch.Tensor
        Each `[N, C]`; an all-zero row is no answer and takes no part. Other probabilities count as 1e-6 at least.
    exponents : sequence, optional
        One number or `[N]` tensor per expert; 1 by default.

    Returns
    -------
    torch.Tensor
        `[N, C]`; all zero where nobody answered.

    Example
    -------
    >>> answers, silent = torch.tensor([[0.8, 0.2]]), torch.zeros(1, 2)
    >>> print(product_of_experts([answers, answers, silent]), product_of_experts([silent]))
    tensor([[0.9412, 0.0588]]) tensor([[0., 0.]])
    """
    exponents = [1.0] * len(distributions) if exponents is None else exponents
    answered = torch.stack([p.sum(-1) > 0 for p in distributions])
    evidence = torch.zeros_like(distributions[0])
    for probs, exponent, present in zip(distributions, exponents, answered, strict=True):
        weight = torch.as_tensor(exponent, dtype=probs.dtype, device=probs.device) * present
        evidence = evidence + weight.unsqueeze(-1) * probs.clamp(min=FLOOR).log()
    return evidence.softmax(-1) * answered.any(0).unsqueeze(-1)


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


def information(logits: torch.Tensor, diversity_weight: float = 1.0) -> torch.Tensor:
    """`mean H(p) + lambda sum_c pbar_c log pbar_c`: minus the mutual information of input and prediction at lambda 1.

    Least when each prediction is certain and all classes are used (SHOT, Liang et al. 2020).

    Parameters
    ----------
    logits : torch.Tensor
        `[B, C]`.
    diversity_weight : float
        lambda.

    Returns
    -------
    torch.Tensor
        Scalar, nats.

    Example
    -------
    >>> round(float(information(torch.tensor([[99.0, 0.0], [0.0, 99.0]]))), 4)
    -0.6931
    """
    return entropy(logits.softmax(-1)).mean() + diversity_weight * diversity(logits)
