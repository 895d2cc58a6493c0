"""Temperature scaling: one number that makes probabilities mean what they say, and changes no label."""

from __future__ import annotations

import torch

# Between these, a temperature is fitted. A handful of utterances that are all right would ask for 0.
LEAST, GREATEST = 0.1, 20.0
# Of a probability, before its logarithm.
FLOOR = 1e-12


def tempered(probs: torch.Tensor, temperature: float) -> torch.Tensor:
    """`softmax(log p / T)` (Guo et al. 2017): less certain above 1; 1 leaves every digit as it is."""
    if temperature == 1.0:
        return probs
    return (probs.clamp_min(FLOOR).log() / temperature).softmax(-1)


def mean_nll(probs: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0) -> float:
    """Average the negative log-likelihood, in nats, of one-hot or soft targets at a temperature."""
    logs = (probs.double().clamp_min(FLOOR).log() / temperature).log_softmax(-1)
    return float(-(targets.double() * logs).sum(-1).mean())


def fit_temperature(probs: torch.Tensor, targets: torch.Tensor) -> float:
    """Find the temperature at which targets are most likely; 1.0 without any utterance."""
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
