"""Lower and upper bounds, each teacher alone, and both without training: the rows that a method must be seen beside."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from speechbrain_mifuse.adaptation.fusion import prior_corrected, product_of_experts
from speechbrain_mifuse.adaptation.geometry import discriminant, principal_directions
from speechbrain_mifuse.adaptation.method import AdaptationMethod, Survey, Teachers
from speechbrain_mifuse.adaptation.uncertainty import pseudo_answers


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
    >>> answers = torch.tensor([[[0.2, 0.8], [0.4, 0.6]]])
    >>> test = Survey(answers, torch.ones(1, 2, dtype=torch.bool), classifier=lambda: None, student=lambda: None)
    >>> print(LalmZeroShot().predict(test))
    tensor([[0.3000, 0.7000]])
    """

    trains = False
    answers_for = ("test",)

    def __init__(self, **options: bool):
        super().__init__(**options)
        if self.prior_correction:
            self.answers_for = ("adapt", "test")

    def predict(self, test: Survey) -> torch.Tensor:
        """`mean_L`; see `AdaptationMethod.predict`."""
        return test.lalm_mean


class ZeroTraining(AdaptationMethod):
    """Both teachers without any training: each corrected by its own prior, then multiplied.

    Ours, no paper's: the least that a method that trains has to beat. Each teacher's mean distribution is divided by
    its average over the adaptation set, which assumes that the target's classes are of comparable size, as the
    diversity term of the other methods does; see `prior_corrected` and `product_of_experts`. Answers that are single
    labels are smoothed first (`pseudo_answers`). An utterance that the language model did not answer is left to the
    source classifier.

    Example
    -------
    >>> answers, unsure = torch.tensor([[[0.9, 0.1]], [[0.7, 0.3]]]), torch.full((2, 4, 2), 0.5)
    >>> survey = Survey(answers, torch.ones(2, 1, dtype=torch.bool), lambda: unsure, student=lambda: None)
    >>> method = ZeroTraining()
    >>> method.start(survey)
    >>> method.predict(survey).argmax(1).tolist()
    [0, 1]
    """

    trains = False
    answers_for = ("adapt", "test")
    corrects_answers = False
    corrected = "every teacher"

    def __init__(self, *, prior_correction: bool = True, **options: bool):
        super().__init__(prior_correction=prior_correction, **options)

    def start(self, survey: Survey) -> None:
        """Estimate what each teacher says on average; see `AdaptationMethod.start`."""
        self.state = {"pseudo_answers": pseudo_answers(survey.lalm, survey.lalm_mask)}
        self.state["lalm"] = survey.lalm_average(self.state["pseudo_answers"])
        self.state["classifier"] = survey.classifier().mean((0, 1))

    def predict(self, test: Survey) -> torch.Tensor:
        """`q` proportional to `mean_L / prior_L * mean_S / prior_S`; see `AdaptationMethod.predict`."""
        lalm, classifier = test.lalm_smoothed(self.state["pseudo_answers"]), test.classifier().mean(1)
        if self.prior_correction:
            lalm = prior_corrected(lalm, self.state["lalm"])
            classifier = prior_corrected(classifier, self.state["classifier"])
        return product_of_experts([lalm, classifier])


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

    Parameters
    ----------
    diversity_weight : float
        lambda.
    class_balanced : bool
        Let each class count the same, as the source classifier's training does: weights `N / (C N_c)`.

    Example
    -------
    >>> from speechbrain_mifuse.adaptation.method import Outputs
    >>> student = Outputs(torch.zeros(1, 8), torch.zeros(1, 3), torch.tensor([[9.0, 0.0]]))
    >>> round(float(Oracle(diversity_weight=0.0).loss(student, torch.tensor([[1.0, 0.0]]))), 4)
    0.0001
    """

    uses_labels = True
    answers_for = ()

    def __init__(self, diversity_weight: float = 1.0, *, class_balanced: bool = False, **options: bool):
        super().__init__(diversity_weight, **options)
        self.class_balanced = class_balanced

    def start(self, survey: Survey) -> None:
        """Count the classes if they are to be balanced; see `AdaptationMethod.start`."""
        if self.class_balanced:
            counts = survey.reference.bincount(minlength=survey.lalm.shape[-1])
            self.state["weights"] = len(survey.reference) / (len(counts) * counts.clamp(min=1))

    def targets(self, teachers: Teachers) -> torch.Tensor:
        """One-hot reference labels, times the weight of their class. See `AdaptationMethod.targets`."""
        labels = F.one_hot(teachers.reference, teachers.lalm.shape[-1]).to(teachers.lalm.dtype)
        return labels * self.state["weights"] if self.class_balanced else labels


class OracleDiscriminant(AdaptationMethod):
    """Supervised linear discriminant analysis on the target's labels: an upper bound for what G can be.

    It works in the space of `ClosedForm`, of the first principal components, with the same shrinkage.

    Parameters
    ----------
    shrinkage : float
        See `geometry.discriminant`.
    components : int
        Dimension of the space.

    Example
    -------
    >>> OracleDiscriminant.uses_labels, OracleDiscriminant.trains
    (True, False)
    """

    trains = False
    uses_labels = True
    answers_for = ()

    def __init__(self, shrinkage: float = 0.3, components: int = 256, **options: bool):
        super().__init__(**options)
        self.shrinkage, self.components = shrinkage, components

    def start(self, survey: Survey) -> None:
        """Fit the discriminant; see `AdaptationMethod.start`."""
        vectors = survey.student().vectors
        labels = F.one_hot(survey.reference, survey.lalm.shape[-1]).to(vectors.dtype)
        axes = principal_directions(vectors, self.components).T
        directions, self.state["offsets"] = discriminant(vectors @ axes, labels, self.shrinkage)
        self.state["directions"] = axes @ directions

    def predict(self, test: Survey) -> torch.Tensor:
        """Softmax of the discriminant's scores; see `AdaptationMethod.predict`."""
        return (test.student().vectors @ self.state["directions"] - self.state["offsets"]).softmax(-1)
