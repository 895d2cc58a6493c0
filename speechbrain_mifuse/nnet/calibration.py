"""Temperature scaling: one number that makes probabilities mean what they say, and changes no label."""

from __future__ import annotations

import torch

# Between these, a temperature is fitted. A handful of utterances that are all right would ask for 0.
LEAST, GREATEST = 0.1, 20.0
# Of a probability, before its logarithm.
FLOOR = 1e-12


def tempered(probs: torch.Tensor, temperature: float) -> torch.Tensor:
    """Scale probabilities by a temperature: `softmax(log p / T)` (Guo et al. 2017).

    Parameters
    ----------
    probs : torch.Tensor
        `[..., C]`.
    temperature : float
        T: less certain above 1, more below; 1 leaves every digit as it is.

    Returns
    -------
    torch.Tensor
        `[..., C]`.

    Example
    -------
    >>> tempered(torch.tensor([0.8, 0.2]), 2.0)
    tensor([0.6667, 0.3333])
    """
    if temperature == 1.0:
        return probs
    return (probs.clamp_min(FLOOR).log() / temperature).softmax(-1)


def mean_nll(probs: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0) -> float:
    """Average the negative log-likelihood, in nats, of one-hot or soft targets at a temperature.

    Parameters
    ----------
    probs, targets : torch.Tensor
        `[N, C]`.
    temperature : float
        Of the probabilities.

    Returns
    -------
    float
        `-1/N sum_n sum_c t_nc log p_nc`.

    Example
    -------
    >>> round(mean_nll(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]])), 4)
    0.6931
    """
    logs = (probs.double().clamp_min(FLOOR).log() / temperature).log_softmax(-1)
    return float(-(targets.double() * logs).sum(-1).mean())


def fit_temperature(probs: torch.Tensor, targets: torch.Tensor) -> float:
    """Find the temperature at which targets are most likely (Guo et al. 2017, section 4.2).

    Parameters
    ----------
    probs : torch.Tensor
        `[N, C]`, at temperature 1.
    targets : torch.Tensor
        `[N, C]`, one-hot or soft.

    Returns
    -------
    float
        Between `LEAST` and `GREATEST`, four digits; 1.0 without any utterance.

    Example
    -------
    >>> probs = torch.tensor([0.9, 0.1]).expand(4, 2)  # right three times of four
    >>> fit_temperature(probs, torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]]))
    2.0
    """
    if len(probs) == 0:
        return 1.0
    # The negative log-likelihood is convex in 1 / T: its slope is halved down to the one place where it is 0.
    logs, targets = probs.double().clamp_min(FLOOR).log(), targets.double()

    def slope(inverse: float) -> float:
        expected = ((inverse * logs).softmax(-1) * logs).sum(-1)
        return float((expected - (targets * logs).sum(-1)).mean())

    low, high = 1 / GREATEST, 1 / LEAST
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return float(f"{1 / low:.4g}")
