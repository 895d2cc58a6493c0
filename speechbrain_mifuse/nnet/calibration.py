"""Temperature scaling: one number that makes probabilities mean what they say, and changes no label."""

from __future__ import annotations

import torch

# Between these, a temperature is fitted. A handful of utterances that are all right would ask for 0.
LEAST, GREATEST = 0.1, 20.0
# Of a probability, before its logarithm.
FLOOR = 1e-12


def tempered(probs: torch.Tensor, temperature: float) -> torch.Tensor:
    """`softmax(log p / T)`: probabilities at another temperature (Guo et al. 2017).

    Parameters
    ----------
    probs : torch.Tensor
        `[..., C]`.
    temperature : float
        T; above 1 less certain, below 1 more, and 1 leaves every digit as it is.

    Returns
    -------
    torch.Tensor
        `[..., C]`, in the same order of size.

    Example
    -------
    >>> [round(p, 3) for p in tempered(torch.tensor([0.9, 0.1]), 2.0).tolist()]
    [0.75, 0.25]
    """
    if temperature == 1.0:
        return probs
    return (probs.clamp_min(FLOOR).log() / temperature).softmax(-1)


def mean_nll(probs: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0) -> float:
    """Mean negative log-likelihood of targets under probabilities at a temperature.

    Parameters
    ----------
    probs, targets : torch.Tensor
        `[N, C]`; targets are one-hot or soft.
    temperature : float
        T.

    Returns
    -------
    float
        Nats.

    Example
    -------
    >>> round(mean_nll(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]])), 4)
    0.6931
    """
    logs = (probs.double().clamp_min(FLOOR).log() / temperature).log_softmax(-1)
    return float(-(targets.double() * logs).sum(-1).mean())


def fit_temperature(probs: torch.Tensor, targets: torch.Tensor) -> float:
    """Temperature that makes targets most likely.

    The negative log-likelihood is convex in 1 / T, so its slope is halved down to the one place where it is 0.

    Parameters
    ----------
    probs : torch.Tensor
        `[N, C]`, what a classifier said.
    targets : torch.Tensor
        `[N, C]`, one-hot labels, or what somebody else says.

    Returns
    -------
    float
        T in [0.1, 20], four digits; 1.0 without any utterance.

    Example
    -------
    >>> said = torch.tensor([[0.99, 0.01]]).repeat(4, 1)
    >>> fit_temperature(said, torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))  # 3 in 4, not 99 in 100
    4.183
    """
    if len(probs) == 0:
        return 1.0
    logs, targets = probs.double().clamp_min(FLOOR).log(), targets.double()

    def slope(inverse: float) -> float:
        expected = ((inverse * logs).softmax(-1) * logs).sum(-1)
        return float((expected - (targets * logs).sum(-1)).mean())

    low, high = 1 / GREATEST, 1 / LEAST
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return float(f"{1 / low:.4g}")
