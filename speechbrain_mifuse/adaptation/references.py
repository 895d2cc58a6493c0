"""Lower and upper bounds and the language model alone: the rows every table of adaptation begins and ends with."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from speechbrain_mifuse.adaptation.method import AdaptationMethod, Teachers


class SourceOnly(AdaptationMethod):
    """The source classifier as it came: the lower bound.

    Example
    -------
    >>> SourceOnly.trains
    False
    """

    trains = False
    answers_for = ()


class LalmZeroShot(AdaptationMethod):
    """The audio language model itself: argmax of its mean distribution on the test utterances.

    Example
    -------
    >>> LalmZeroShot.predictor
    'lalm'
    """

    trains = False
    answers_for = ("test",)
    predictor = "lalm"


class LalmSfuda(AdaptationMethod):
    """Student trained on the language model's mean distribution alone: MI-Fuse's strongest baseline, as we read it.

    Example
    -------
    >>> teachers = Teachers(torch.ones(1, 5, 4) / 4, torch.ones(1, 5, dtype=torch.bool), lambda: None)
    >>> LalmSfuda().targets(teachers).tolist()
    [[0.25, 0.25, 0.25, 0.25]]
    """

    def targets(self, teachers: Teachers) -> torch.Tensor:
        """`q = mean_L`; an utterance without an answer has no target. See `AdaptationMethod.targets`."""
        return teachers.lalm_mean


class Oracle(AdaptationMethod):
    """Supervised training on the target's labels, from the same start with the same optimiser: the upper bound.

    Example
    -------
    >>> logits = torch.tensor([[9.0, 0.0]])
    >>> round(float(Oracle(diversity_weight=0.0).loss(logits, torch.tensor([[1.0, 0.0]]))), 4)
    0.0001
    """

    uses_labels = True
    answers_for = ()

    def targets(self, teachers: Teachers) -> torch.Tensor:
        """One-hot reference labels. See `AdaptationMethod.targets`."""
        return F.one_hot(teachers.reference, teachers.lalm.shape[-1]).to(teachers.lalm.dtype)
