"""Uncertainty of stochastic predictions: entropy and mutual information, with failed answers masked out.

All of it is from MI-Fuse (arXiv 2509.20706), which takes mutual information in its BALD form (Houlsby et al. 2011).
"""

from __future__ import annotations

import math

import torch


def entropy(probs: torch.Tensor) -> torch.Tensor:
    """Shannon entropy `H(p) = -sum_c p_c log p_c`.

    Parameters
    ----------
    probs : torch.Tensor
        `[..., C]`, each row a distribution.

    Returns
    -------
    torch.Tensor
        `[...]`, nats.

    Example
    -------
    >>> round(float(entropy(torch.tensor([0.5, 0.5]))), 4)
    0.6931
    """
    return torch.special.entr(probs).sum(-1)


def masked_mean(samples: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over the K samples that exist.

    Parameters
    ----------
    samples : torch.Tensor
        `[B, K, ...]`.
    mask : torch.Tensor, optional
        `[B, K]`, bool: which answers are samples. A failed or refused answer is none.

    Returns
    -------
    torch.Tensor
        `[B, ...]`; zeros where no sample exists.

    Example
    -------
    >>> masked_mean(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[True, False]])).tolist()
    [[1.0, 0.0]]
    """
    if mask is None:
        return samples.mean(1)
    weight = mask.to(samples.dtype).view(*mask.shape, *[1] * (samples.dim() - 2))
    return (samples * weight).sum(1) / weight.sum(1).clamp(min=1)


def mutual_information(samples: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Disagreement among stochastic predictions: `MI = H(mean_k p^k) - mean_k H(p^k)`, divided by `log C`.

    With one-hot samples every `H(p^k)` is 0 and MI is the entropy of the mean: valid, but no epistemic term any more.
    The division by `log C` is our default; the paper's equation has none.

    Parameters
    ----------
    samples : torch.Tensor
        `[B, K, C]`, K distributions per utterance.
    mask : torch.Tensor, optional
        `[B, K]`, bool: which of them exist.

    Returns
    -------
    torch.Tensor
        `[B]`, in [0, 1]; 0 where fewer than two samples exist.

    Example
    -------
    >>> opposed = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    >>> mutual_information(opposed).tolist()
    [1.0]
    """
    gap = entropy(masked_mean(samples, mask)) - masked_mean(entropy(samples), mask)
    return gap.clamp(min=0) / math.log(samples.shape[-1])
