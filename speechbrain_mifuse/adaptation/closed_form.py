"""Ours, no paper's: what `mi_fuse_plus` is made of, without a student. No gradient, no dropout, no seed.

The teachers' product is refined by the target's geometry a few times, then one linear discriminant is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from speechbrain_mifuse.adaptation.fusion import prior_corrected, product_of_experts
from speechbrain_mifuse.adaptation.geometry import (
    cross_fitted_expert,
    dealt_folds,
    discriminant,
    principal_directions,
    trusted_shares,
    with_class_shares,
)
from speechbrain_mifuse.adaptation.method import AdaptationMethod, Survey, Teachers
from speechbrain_mifuse.adaptation.uncertainty import pseudo_answers


class ClosedForm(AdaptationMethod):
    """Geometry expert G fitted in rounds on the product of teachers and G; a test recording gets `G * L * S`.

    Each round estimates how large the classes are, drawn half-way towards equal shares, and fits G anew on the fused
    soft labels of the adaptation set, cross-fitted as in `MIFusePlus`. G, kept from the last round, is a linear
    function of the pooled vector. S is the source classifier without dropout.

    Parameters
    ----------
    answers : sequence of str
        Which sets the language model is asked about: `adapt` and `test`, `adapt` alone (a test recording then gets
        `G * S`, without the API), or none (S and G alone).
    rounds : int
        How often G is fitted.
    share_trust, temperature, shrinkage, components, folds, together
        As for `MIFusePlus`.
    target_statistics, prior_correction
        As for `AdaptationMethod`; the latter concerns every teacher.
    balance_gate : float, optional
        Stay with the first G where the class shares that it was fitted with are further than this from equal ones
        (total variation): further rounds help a target of balanced classes and hurt a skewed one.

    Example
    -------
    >>> from speechbrain_mifuse.adaptation.method import Outputs
    >>> vectors = torch.tensor([[0.0], [0.2], [0.1], [5.0], [5.2], [5.1]])
    >>> logits = torch.tensor([[1.0, 0.0]] * 2 + [[0.0, 1.0]] + [[0.0, 1.0]] * 3)  # the third is wrong
    >>> silent = torch.zeros(6, 1, 2)
    >>> outputs = Outputs(vectors, vectors, logits)
    >>> survey = Survey(silent, silent.bool().any(2), classifier=lambda: None, student=lambda: outputs)
    >>> method = ClosedForm(answers=(), together=1)
    >>> method.start(survey)
    >>> method.predict(survey).argmax(1).tolist()
    [0, 0, 0, 1, 1, 1]
    """

    trains = False

    def __init__(
        self,
        answers: Sequence[str] = ("adapt", "test"),
        rounds: int = 10,
        share_trust: float = 0.5,
        temperature: float = 1.0,
        shrinkage: float = 0.3,
        components: int = 256,
        folds: int = 5,
        together: int = 8,
        target_statistics: bool = True,
        prior_correction: bool = True,
        *,
        balance_gate: float | None = None,
        **options: bool,
    ):
        super().__init__(target_statistics=target_statistics, prior_correction=prior_correction, **options)
        self.answers, self.answers_for = list(answers), tuple(answers)
        self.rounds, self.balance_gate, self.share_trust = rounds, balance_gate, share_trust
        self.temperature, self.shrinkage, self.components = temperature, shrinkage, components
        self.folds, self.together = folds, together

    # The teachers are corrected one by one, before they are multiplied.
    corrects_answers = False
    corrected = "every teacher"

    def start(self, survey: Survey) -> None:
        """Fit G on the adaptation set; see `AdaptationMethod.start`."""
        student = survey.student()
        self.state = {"pseudo_answers": pseudo_answers(survey.lalm, survey.lalm_mask)}
        self.state["classifier"] = student.probs.mean(0)
        if "adapt" in self.answers_for:
            self.state["lalm"] = survey.lalm_average(self.state["pseudo_answers"])
        self.state["centre"] = student.vectors.mean(0)
        self.state["axes"] = principal_directions(student.vectors, self.components)
        space = self.arranged(self.space(student.vectors))
        labels = self.fused(space, survey, student.probs)
        self.state["directions"], self.state["offsets"] = discriminant(space, labels, self.shrinkage)

    def space(self, vectors: torch.Tensor) -> torch.Tensor:
        """`[N, components]`: pooled vectors in the space that G works in."""
        return (vectors - self.state["centre"]) @ self.state["axes"].T

    def arranged(self, space: torch.Tensor) -> torch.Tensor:
        """Leave each utterance of the adaptation set at its place; the permuted control does not."""
        return space

    def fused(self, space: torch.Tensor, survey: Survey, source: torch.Tensor) -> torch.Tensor:
        """`[N, C]`: what teachers and G say together of the adaptation set after the last round but for its G."""
        folds = dealt_folds(space, self.folds, self.together)
        expert = torch.full_like(source, 1 / source.shape[1])
        shares = expert[0]
        for number in range(self.rounds):
            estimated = product_of_experts([*self.teachers(survey, source, shares), expert]).mean(0)
            shares = trusted_shares(estimated, self.share_trust)
            labels = product_of_experts([*self.teachers(survey, source, shares), expert])
            labels = with_class_shares(labels, shares)
            if number == 0 and self.balance_gate is not None and unevenness(shares) >= self.balance_gate:
                break
            expert = cross_fitted_expert(space, labels, folds, self.temperature, self.shrinkage)
        return labels

    def teachers(self, said: Teachers, source: torch.Tensor, shares: torch.Tensor) -> list[torch.Tensor]:
        """Mean distributions `[N, C]` of classifier and language model, corrected for what each prefers."""
        means = {"classifier": source}
        if "lalm" in self.state:
            means["lalm"] = said.lalm_smoothed(self.state["pseudo_answers"])
        if not self.prior_correction:
            return list(means.values())
        return [prior_corrected(mean, self.state[name] / shares) for name, mean in means.items()]

    def predict(self, test: Survey) -> torch.Tensor:
        """`G * S`, and `* L` where the language model was asked; see `AdaptationMethod.predict`."""
        student = test.student()
        scores = self.space(student.vectors) @ self.state["directions"] - self.state["offsets"]
        equal = torch.full_like(self.state["classifier"], 1 / scores.shape[1])
        teachers = self.teachers(test, student.probs, equal)
        if "test" not in self.answers_for:
            teachers = teachers[:1]
        return product_of_experts([(scores / self.temperature).softmax(-1), *teachers])


def unevenness(shares: torch.Tensor) -> float:
    """Total variation of class shares `[C]` from equal ones, in [0, 1)."""
    return float((shares - 1 / len(shares)).abs().sum()) / 2


class PermutedClosedForm(ClosedForm):
    """Control: in the adaptation set, each utterance has the place of another one.

    What is left of the gain here is not owed to where an utterance lies.

    Parameters
    ----------
    answers, rounds, share_trust, temperature, shrinkage, components, folds, together, target_statistics
        As for `ClosedForm`.
    prior_correction : bool
        As for `ClosedForm`.

    Example
    -------
    >>> PermutedClosedForm().arranged(torch.arange(4.0)[:, None]).flatten().sort().values.tolist()
    [0.0, 1.0, 2.0, 3.0]
    """

    def arranged(self, space: torch.Tensor) -> torch.Tensor:
        """Permute the places, always alike."""
        return space[torch.randperm(len(space), generator=torch.Generator().manual_seed(0))]
