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


def masked_mean(
    samples: torch.Tensor, mask: torch.Tensor | None = None, pseudo: torch.Tensor | float = 0.0
) -> torch.Tensor:
    """Mean over the K samples that exist, and over some that say nothing: `(sum_k p_k + a / C) / (K + a)`.

    Parameters
    ----------
    samples : torch.Tensor
        `[B, K, ...]`.
    mask : torch.Tensor, optional
        `[B, K]`, bool: which answers are samples. A failed or refused answer is none.
    pseudo : torch.Tensor or float
        a, how many say nothing: each is the same for all C; see `pseudo_answers`. Not without a mask.

    Returns
    -------
    torch.Tensor
        `[B, ...]`; zeros where no sample exists.

    Example
    -------
    >>> samples, mask = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[True, False]])
    >>> masked_mean(samples, mask).tolist(), masked_mean(samples, mask, pseudo=1.0).tolist()
    ([[1.0, 0.0]], [[0.75, 0.25]])
    """
    if mask is None:
        return samples.mean(1)
    weight = mask.to(samples.dtype).view(*mask.shape, *[1] * (samples.dim() - 2))
    count = weight.sum(1)
    return ((samples * weight).sum(1) + pseudo / samples.shape[-1]) / (count + pseudo).clamp(min=1) * (count > 0)


def single_label_share(samples: torch.Tensor, mask: torch.Tensor) -> float:
    """Share of the samples that name one label and say nothing of the others.

    Parameters
    ----------
    samples : torch.Tensor
        `[N, K, C]`.
    mask : torch.Tensor
        `[N, K]`, bool: which of them exist.

    Returns
    -------
    float
        0 where there is none.

    Example
    -------
    >>> single_label_share(torch.tensor([[[1.0, 0.0], [0.6, 0.4]]]), torch.ones(1, 2, dtype=torch.bool))
    0.5
    """
    found = samples.amax(-1)[mask] > 0.999
    return found.float().mean().item() if len(found) else 0.0


def pseudo_answers(samples: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Give how many answers that say nothing a mean is smoothed with: one, where most answers are single labels.

    Five times "angry" do not make "sad" impossible, but as factors of a product their zeros would. A distribution tells
    by itself how likely the other labels are.

    Parameters
    ----------
    samples, mask : torch.Tensor
        As for `single_label_share`, of a whole set.

    Returns
    -------
    torch.Tensor
        Scalar, 0 or 1.

    Example
    -------
    >>> pseudo_answers(torch.tensor([[[1.0, 0.0]]]), torch.ones(1, 1, dtype=torch.bool)).item()
    1.0
    """
    return torch.tensor(float(single_label_share(samples, mask) > 0.5), device=samples.device)


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
