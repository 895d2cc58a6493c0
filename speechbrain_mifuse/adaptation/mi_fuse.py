"""MI-Fuse (arXiv 2509.20706): two teachers, weighted by the mutual information of their stochastic predictions."""

from __future__ import annotations

from collections.abc import Callable

import torch

from speechbrain_mifuse.adaptation.fusion import exponential_weight, fused_label, teacher_weights
from speechbrain_mifuse.adaptation.method import AdaptationMethod, Teachers
from speechbrain_mifuse.adaptation.uncertainty import masked_mean, mutual_information


class MIFuse(AdaptationMethod):
    """Mixture of the audio language model and the EMA classifier, weights from mutual information.

    Parameters
    ----------
    diversity_weight : float
        lambda.
    weight : callable
        f, from mutual information to reliability.

    Attributes
    ----------
    statistics : dict of str to float
        Means over the last batch, for the log: weight of the language model and both teachers' mutual information.

    Example
    -------
    >>> unsure = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    >>> sure = torch.tensor([[[0.9, 0.1], [0.9, 0.1]]])
    >>> teachers = Teachers(unsure, torch.ones(1, 2, dtype=torch.bool), lambda: sure)
    >>> print(MIFuse().targets(teachers))
    tensor([[0.8973, 0.1027]])
    """

    def __init__(
        self, diversity_weight: float = 1.0, weight: Callable[[torch.Tensor], torch.Tensor] = exponential_weight
    ):
        super().__init__(diversity_weight)
        self.weight = weight
        self.statistics: dict[str, float] = {}

    def weights(self, lalm_mi: torch.Tensor, classifier_mi: torch.Tensor, available: torch.Tensor) -> torch.Tensor:
        """Weights of the two teachers.

        Parameters
        ----------
        lalm_mi, classifier_mi : torch.Tensor
            `[B]`.
        available : torch.Tensor
            `[B]`, bool: whether the language model answered.

        Returns
        -------
        torch.Tensor
            `[B, 2]`: language model, classifier.
        """
        reliability = self.weight(torch.stack([lalm_mi, classifier_mi], dim=1))
        return teacher_weights(reliability, torch.stack([available, torch.ones_like(available)], dim=1))

    def targets(self, teachers: Teachers) -> torch.Tensor:
        """`q = w_L mean_L + w_S mean_S`.

        Parameters
        ----------
        teachers : Teachers
            What the teachers say.

        Returns
        -------
        torch.Tensor
            `[B, C]`.
        """
        classifier = teachers.classifier()
        lalm_mi = mutual_information(teachers.lalm, teachers.lalm_mask)
        classifier_mi = mutual_information(classifier)
        weights = self.weights(lalm_mi, classifier_mi, teachers.lalm_available)
        self.statistics = {
            "lalm_weight": float(weights[:, 0].mean()),
            "lalm_mi": float(lalm_mi.mean()),
            "classifier_mi": float(classifier_mi.mean()),
        }
        return fused_label(torch.stack([teachers.lalm_mean, masked_mean(classifier)], dim=1), weights)


class PermutedMIFuse(MIFuse):
    """Control: the same weights, dealt to other utterances of the batch.

    What is left of MI-Fuse's gain here is not owed to knowing which utterance a teacher is unsure of. An utterance that
    the language model did not answer keeps its own weights.

    Parameters
    ----------
    diversity_weight, weight
        As for `MIFuse`.

    Example
    -------
    >>> mi, answered = torch.tensor([0.0, 1.0]), torch.tensor([True, True])
    >>> PermutedMIFuse().weights(mi, mi.flip(0), answered).sum(1).tolist()
    [1.0, 1.0]
    """

    def weights(self, lalm_mi: torch.Tensor, classifier_mi: torch.Tensor, available: torch.Tensor) -> torch.Tensor:
        """Permute the weights among the utterances that both teachers answered; see `MIFuse.weights`."""
        weights = super().weights(lalm_mi, classifier_mi, available)
        answered = torch.nonzero(available).flatten()
        shuffled = answered[torch.randperm(len(answered), device=answered.device)]
        weights[answered] = weights[shuffled]
        return weights


class MeanFusion(MIFuse):
    """Both teachers at equal weight: MI-Fuse without its weighting.

    Parameters
    ----------
    diversity_weight : float
        lambda.

    Example
    -------
    >>> mi, answered = torch.tensor([0.0, 1.0]), torch.tensor([True, False])
    >>> MeanFusion().weights(mi, mi, answered).tolist()
    [[0.5, 0.5], [0.0, 1.0]]
    """

    def __init__(self, diversity_weight: float = 1.0):
        super().__init__(diversity_weight, weight=torch.ones_like)
