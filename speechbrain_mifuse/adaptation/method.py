"""What every adaptation method is: targets from teachers, a loss, a predictor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from speechbrain_mifuse.adaptation.fusion import diversity, soft_cross_entropy
from speechbrain_mifuse.adaptation.uncertainty import masked_mean


@dataclass(frozen=True)
class Teachers:
    """What the teachers say of one batch.

    Parameters
    ----------
    lalm : torch.Tensor
        `[B, K_L, C]`, stored answers of the audio language model.
    lalm_mask : torch.Tensor
        `[B, K_L]`, bool: which answers are samples.
    classifier : callable
        Gives `[B, K_S, C]`, Monte-Carlo dropout predictions of the EMA classifier. A function, so that a method that
        does not use them does not pay for them.
    reference : torch.Tensor, optional
        `[B]`, class indices; only given to a method with `uses_labels`.

    Example
    -------
    >>> answers, answered = torch.ones(2, 5, 4) / 4, torch.ones(2, 5, dtype=torch.bool)
    >>> teachers = Teachers(answers, answered, classifier=lambda: torch.ones(2, 16, 4) / 4)
    >>> teachers.lalm_mean.shape, teachers.lalm_available.tolist()
    (torch.Size([2, 4]), [True, True])
    """

    lalm: torch.Tensor
    lalm_mask: torch.Tensor
    classifier: Callable[[], torch.Tensor]
    reference: torch.Tensor | None = None

    @property
    def lalm_mean(self) -> torch.Tensor:
        """`[B, C]`, mean of the answers that are samples."""
        return masked_mean(self.lalm, self.lalm_mask)

    @property
    def lalm_available(self) -> torch.Tensor:
        """`[B]`, bool: whether there is any."""
        return self.lalm_mask.any(1)


class AdaptationMethod:
    """Base of the methods: a student trained towards soft targets, kept from collapse by the diversity term.

    A new method is a subclass with `targets`, and one line in the recipe's YAML.

    Parameters
    ----------
    diversity_weight : float
        lambda.

    Attributes
    ----------
    trains : bool
        Whether there is anything to train; otherwise the method is the starting point or the teacher itself.
    uses_labels : bool
        Whether it is given the target's labels: true for the upper bound alone.
    answers_for : tuple of str
        Which sets the language model is asked about: `adapt`, `test`, both or none.
    predictor : str
        Who answers in the end: `student` or `lalm`.

    Example
    -------
    >>> method = AdaptationMethod(diversity_weight=1.0)
    >>> round(float(method.loss(torch.zeros(2, 4), torch.ones(2, 4) / 4)), 4)
    0.0
    """

    trains = True
    uses_labels = False
    answers_for: tuple[str, ...] = ("adapt",)
    predictor = "student"

    def __init__(self, diversity_weight: float = 1.0):
        self.diversity_weight = diversity_weight

    def targets(self, teachers: Teachers) -> torch.Tensor:
        """Soft labels of a batch.

        Parameters
        ----------
        teachers : Teachers
            What the teachers say.

        Returns
        -------
        torch.Tensor
            `[B, C]`; all-zero rows carry no loss.
        """
        raise NotImplementedError

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """`CE(q, p) + lambda sum_c pbar_c log pbar_c`.

        Parameters
        ----------
        logits : torch.Tensor
            The student's, `[B, C]`.
        targets : torch.Tensor
            `[B, C]`.

        Returns
        -------
        torch.Tensor
            Scalar.
        """
        return soft_cross_entropy(logits, targets) + self.diversity_weight * diversity(logits)
