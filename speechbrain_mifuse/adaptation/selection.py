"""Which moment of a run to keep, without a label: criteria of the student's predictions on the adaptation set.

For all of them, higher is better. None is known to agree with the accuracy on the target in general, which is why the
last step is the default and every run reports what each criterion would have chosen.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence

import torch
from torch.nn import functional as F

from speechbrain_mifuse.adaptation.uncertainty import entropy
from speechbrain_mifuse.utils.errors import UserError


def soft_neighbourhood_density(
    features: torch.Tensor, temperature: float = 0.05, most: int = 4096, block: int = 512
) -> torch.Tensor:
    """How densely utterances lie together: entropy of each one's softmax over cosines to all others, averaged.

    SND (Saito et al. 2021), which takes the predicted distributions as features.

    Parameters
    ----------
    features : torch.Tensor
        `[N, H]`, N at least 2.
    temperature : float
        Of the softmax; the paper's default.
    most : int
        Of a larger set, this many rows at even distances are used: the effort grows with the square.
    block : int
        Rows compared at a time.

    Returns
    -------
    torch.Tensor
        Scalar, nats.

    Example
    -------
    >>> pairs = torch.eye(2).repeat_interleave(3, 0)
    >>> round(float(soft_neighbourhood_density(pairs)), 4)  # two neighbours each: log 2
    0.6931
    """
    chosen = F.normalize(features[:: -(-len(features) // most)], dim=1)
    total = chosen.new_zeros(())
    for first in range(0, len(chosen), block):
        similarity = chosen[first : first + block] @ chosen.T / temperature
        similarity.diagonal(first).fill_(float("-inf"))
        total += entropy(similarity.softmax(1)).sum()
    return total / len(chosen)


def information_maximisation(probs: torch.Tensor) -> torch.Tensor:
    """`H(mean p) - mean H(p)`: certain predictions of many classes.

    Parameters
    ----------
    probs : torch.Tensor
        `[N, C]`.

    Returns
    -------
    torch.Tensor
        Scalar, nats, in [0, log C].

    Example
    -------
    >>> round(float(information_maximisation(torch.eye(2))), 4)
    0.6931
    """
    return entropy(probs.mean(0)) - entropy(probs).mean()


def negative_entropy(probs: torch.Tensor) -> torch.Tensor:
    """`-mean H(p)`: certain predictions.

    Parameters
    ----------
    probs : torch.Tensor
        `[N, C]`.

    Returns
    -------
    torch.Tensor
        Scalar, nats, in [-log C, 0].

    Example
    -------
    >>> round(float(negative_entropy(torch.full((3, 2), 0.5))), 4)
    -0.6931
    """
    return -entropy(probs).mean()


CRITERIA: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "snd": soft_neighbourhood_density,
    "information_maximisation": information_maximisation,
    "entropy": negative_entropy,
}

# What each value of the recipe's `selection` ranks snapshots by, and what results call it.
RULES = {
    "last": ("step", "last step, no label"),
    "snd": ("snd", "greatest soft neighbourhood density on the adaptation set, no label"),
    "information_maximisation": (
        "information_maximisation",
        "greatest mutual information on the adaptation set, no label",
    ),
    "entropy": ("entropy", "least entropy on the adaptation set, no label"),
}


def criteria(probs: torch.Tensor) -> dict[str, float]:
    """Every criterion of the student's predictions on the adaptation set.

    Parameters
    ----------
    probs : torch.Tensor
        `[N, C]`.

    Returns
    -------
    dict of str to float
        `snd`, `information_maximisation`, `entropy` (minus the mean entropy): nats, higher is better.

    Example
    -------
    >>> list(criteria(torch.eye(2)))
    ['snd', 'information_maximisation', 'entropy']
    """
    return {name: float(criterion(probs)) for name, criterion in CRITERIA.items()}


def known_rule(rule: str) -> tuple[str, str]:
    """Look a value of the recipe's `selection` up.

    Parameters
    ----------
    rule : str
        A key of `RULES`.

    Returns
    -------
    key : str
        What snapshots are ranked by.
    said : str
        What results call it.

    Raises
    ------
    UserError
        If it is unknown; the message lists the known ones.

    Example
    -------
    >>> known_rule("best")
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.utils.errors.UserError: selection: 'best' is none of last, snd, information_maximisation, ...
    """
    if rule not in RULES:
        known = ", ".join(RULES)
        raise UserError(f"selection: '{rule}' is none of {known}. Pass --adaptation \"{{selection: last}}\".")
    return RULES[rule]


def chosen_snapshot(snapshots: Sequence[Mapping], rule: str) -> Mapping:
    """Choose the snapshot that a rule prefers, the latest of equal ones.

    Parameters
    ----------
    snapshots : sequence of mapping
        Each with `step` and every criterion.
    rule : str
        A key of `RULES`.

    Returns
    -------
    mapping
        One of them.

    Example
    -------
    >>> snapshots = [{"step": 60, "snd": 2.0}, {"step": 120, "snd": 1.0}]
    >>> chosen_snapshot(snapshots, "last")["step"], chosen_snapshot(snapshots, "snd")["step"]
    (120, 60)
    """
    key, _ = known_rule(rule)
    return max(snapshots, key=operator.itemgetter(key, "step"))
