"""Self-training on confident pseudo-labels, begun from what both teachers say without any training."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from speechbrain_mifuse.adaptation.method import AdaptationMethod, Survey, Teachers
from speechbrain_mifuse.adaptation.references import ZeroTraining


def confident_labels(probs: torch.Tensor, share: float) -> torch.Tensor:
    """Keep the most confident predictions of each class as labels.

    Parameters
    ----------
    probs : torch.Tensor
        `[N, C]`, distributions.
    share : float
        How many of those predicted to be of one class are kept, in (0, 1].

    Returns
    -------
    torch.Tensor
        `[N, C]`, one-hot rows, and all-zero ones for what is left out.

    Example
    -------
    >>> print(confident_labels(torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]]), share=0.5))
    tensor([[1., 0.],
            [0., 0.],
            [0., 1.],
            [0., 0.]])
    """
    top, predicted = probs.max(1)
    labels = F.one_hot(predicted, probs.shape[1]).to(probs.dtype)
    for label in predicted.unique():
        rows = torch.nonzero(predicted == label).flatten()
        kept = -(-len(rows) * share // 1)
        labels[rows[top[rows].argsort(descending=True)[int(kept) :]]] = 0
    return labels


class SelfTraining(ZeroTraining):
    """Student of hard labels, first those of `ZeroTraining`, later its own; always the most confident half per class.

    Ours in this form; pseudo-labels by class are those of class-balanced self-training (Zou et al. 2018).

    Parameters
    ----------
    diversity_weight : float
        lambda.
    share : float
        See `confident_labels`.
    target_statistics, prior_correction : bool
        As for `ZeroTraining`.

    Example
    -------
    >>> method, answers = SelfTraining(), torch.zeros(1, 5, 2)
    >>> method.state["labels"] = torch.eye(2)
    >>> method.targets(Teachers(answers, answers.bool().any(2), lambda: None, rows=torch.tensor([1]))).tolist()
    [[0.0, 1.0]]
    """

    trains = True
    answers_for = ("adapt",)
    refreshes = 10

    def __init__(
        self,
        diversity_weight: float = 1.0,
        share: float = 0.5,
        *,
        target_statistics: bool = False,
        prior_correction: bool = True,
    ):
        super().__init__(target_statistics=target_statistics, prior_correction=prior_correction)
        self.diversity_weight, self.share = diversity_weight, share

    def refresh(self, survey: Survey) -> None:
        """Label the set anew; see `AdaptationMethod.refresh`."""
        probs = survey.student().probs if "labels" in self.state else super().predict(survey)
        self.state["labels"] = confident_labels(probs, self.share)

    def targets(self, teachers: Teachers) -> torch.Tensor:
        """Labels of the batch; see `AdaptationMethod.targets`."""
        return self.state["labels"][teachers.rows]

    def predict(self, test: Survey) -> torch.Tensor:
        """Let the student answer; see `AdaptationMethod.predict`."""
        return AdaptationMethod.predict(self, test)
