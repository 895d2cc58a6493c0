"""MI-Fuse (arXiv 2509.20706): two teachers, weighted by the mutual information of their stochastic predictions.

With it, three that differ in the weights alone: by entropy, dealt to the wrong utterances, and equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from speechbrain_mifuse.adaptation.fusion import exponential_weight, fused_label, teacher_weights
from speechbrain_mifuse.adaptation.method import AdaptationMethod, Teachers
from speechbrain_mifuse.adaptation.uncertainty import entropy, masked_mean, mutual_information


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
    measure : str
        What the log calls the uncertainty.
    least_samples : int
        Answers that it takes; where there are fewer, both teachers count alike.
    statistics : dict of str to float
        Means over the last batch, for the log: weight of the language model and both teachers' uncertainty.

    Example
    -------
    >>> unsure = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    >>> sure = torch.tensor([[[0.9, 0.1], [0.9, 0.1]]])
    >>> teachers = Teachers(unsure, torch.ones(1, 2, dtype=torch.bool), lambda: sure)
    >>> print(MIFuse().targets(teachers))
    tensor([[0.8973, 0.1027]])
    """

    measure = "mi"
    least_samples = 2

    def __init__(
        self,
        diversity_weight: float = 1.0,
        weight: Callable[[torch.Tensor], torch.Tensor] = exponential_weight,
        **options: bool,
    ):
        super().__init__(diversity_weight, **options)
        self.weight = weight

    def uncertainty(self, samples: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """How unsure a teacher is of each utterance: the mutual information of its predictions.

        Parameters
        ----------
        samples : torch.Tensor
            `[B, K, C]`.
        mask : torch.Tensor, optional
            `[B, K]`, bool: which of them exist.

        Returns
        -------
        torch.Tensor
            `[B]`, in [0, 1].
        """
        return mutual_information(samples, mask)

    def weights(self, lalm: torch.Tensor, classifier: torch.Tensor, available: torch.Tensor) -> torch.Tensor:
        """Weights of the two teachers.

        Parameters
        ----------
        lalm, classifier : torch.Tensor
            `[B]`, their uncertainties.
        available : torch.Tensor
            `[B]`, bool: whether the language model answered.

        Returns
        -------
        torch.Tensor
            `[B, 2]`: language model, classifier.
        """
        reliability = self.weight(torch.stack([lalm, classifier], dim=1))
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
        lalm, other = self.uncertainty(teachers.lalm, teachers.lalm_mask), self.uncertainty(classifier)
        # One answer cannot disagree with itself: that is no reason to trust it most.
        unsure = (torch.where(teachers.lalm_mask.sum(1) < self.least_samples, other, lalm), other)
        weights = self.weights(*unsure, teachers.lalm_available)
        self.statistics = {
            "lalm_weight": float(weights[:, 0].mean()),
            f"lalm_{self.measure}": float(unsure[0].mean()),
            f"classifier_{self.measure}": float(unsure[1].mean()),
        }
        return fused_label(torch.stack([teachers.lalm_mean, masked_mean(classifier)], dim=1), weights)


class EntropyFusion(MIFuse):
    """MI-Fuse with the plain uncertainty in the place of mutual information: the entropy of each teacher's mean.

    Tells whether it matters that mutual information leaves out what every sample alone is unsure of.

    Parameters
    ----------
    diversity_weight, weight
        As for `MIFuse`.

    Example
    -------
    >>> unsure = torch.full((1, 3, 2), 0.5)
    >>> MIFuse().uncertainty(unsure).tolist(), EntropyFusion().uncertainty(unsure).tolist()
    ([0.0], [1.0])
    """

    measure = "entropy"
    least_samples = 1

    def uncertainty(self, samples: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """`H(mean) / log C`; see `MIFuse.uncertainty`."""
        return entropy(masked_mean(samples, mask)) / math.log(samples.shape[-1])


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

    def weights(self, lalm: torch.Tensor, classifier: torch.Tensor, available: torch.Tensor) -> torch.Tensor:
        """Permute the weights among the utterances that both teachers answered; see `MIFuse.weights`."""
        weights = super().weights(lalm, classifier, available)
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

    def __init__(self, diversity_weight: float = 1.0, **options: bool):
        super().__init__(diversity_weight, weight=torch.ones_like, **options)
