"""Ours, no paper's: MI-Fuse's two teachers multiplied, corrected for their class preferences, with a third expert.

The third expert is the target itself: how its recordings lie, see `geometry`. `docs/method.md` tells what each part
gives, with its control.
"""

from __future__ import annotations

import torch

from speechbrain_mifuse.adaptation.fusion import prior_corrected, product_of_experts
from speechbrain_mifuse.adaptation.geometry import (
    cross_fitted_expert,
    dealt_folds,
    principal_components,
    trusted_shares,
    with_class_shares,
)
from speechbrain_mifuse.adaptation.method import AdaptationMethod, Survey, Teachers
from speechbrain_mifuse.adaptation.uncertainty import pseudo_answers


class ProductFusion(AdaptationMethod):
    """Both teachers' mean distributions multiplied: `q` proportional to `mean_L * mean_S`.

    A product is sharper than MI-Fuse's mixture where the teachers agree, and a teacher that is unsure takes little part
    in it without any weight. Answers that are single labels are smoothed first (`pseudo_answers`).

    Parameters
    ----------
    diversity_weight : float
        lambda.
    prior_correction : bool
        Divide the language model's means by their average over the adaptation set first. Assumes that the target's
        classes are of comparable size.

    Example
    -------
    >>> method, answers = ProductFusion(), torch.tensor([[[0.8, 0.2]]])
    >>> method.state |= {"lalm_bias": torch.ones(2), "pseudo_answers": torch.tensor(0.0)}
    >>> teachers = Teachers(answers, torch.ones(1, 1).bool(), lambda: torch.tensor([[[0.7, 0.3]]]))
    >>> print(method.targets(teachers))
    tensor([[0.9032, 0.0968]])
    """

    def __init__(self, diversity_weight: float = 1.0, prior_correction: bool = True, **options: bool):
        super().__init__(diversity_weight, prior_correction=prior_correction, **options)

    def start(self, survey: Survey) -> None:
        """See what form the answers have and which classes are preferred; see `AdaptationMethod.start`."""
        self.state["pseudo_answers"] = pseudo_answers(survey.lalm, survey.lalm_mask)
        classes = survey.lalm.shape[-1]
        self.state["lalm_bias"] = self.bias(survey, torch.full_like(survey.lalm_mean[0], 1 / classes))

    def bias(self, survey: Survey, shares: torch.Tensor) -> torch.Tensor:
        """Say how much more often the language model names each class than it occurs; 1 without correction.

        Parameters
        ----------
        survey : Survey
            Of the adaptation set.
        shares : torch.Tensor
            `[C]`, how often each class is taken to occur.

        Returns
        -------
        torch.Tensor
            `[C]`.
        """
        if not self.prior_correction:
            return torch.ones_like(shares)
        return survey.lalm_average(self.state["pseudo_answers"]) / shares

    def lalm(self, teachers: Teachers) -> torch.Tensor:
        """`[B, C]`: the language model's mean distributions, corrected."""
        return prior_corrected(teachers.lalm_smoothed(self.state["pseudo_answers"]), self.state["lalm_bias"])

    def targets(self, teachers: Teachers) -> torch.Tensor:
        """`q` proportional to `mean_L * mean_S`; see `AdaptationMethod.targets`."""
        return product_of_experts([self.lalm(teachers), teachers.classifier().mean(1)])


class MIFusePlus(ProductFusion):
    """Product of the two teachers and of an expert on the target's geometry: `q` proportional to `L * S * G`.

    G is a linear discriminant in the space of the source's pooled vectors, fitted on the fused soft labels of the
    whole adaptation set and cross-fitted, so that it judges no utterance by its own label, nor by those of its nearest
    neighbours. It is fitted anew 30 times per run, each time on the product of the teachers with the G before, scaled
    so that each class has its share of the set. How large the shares are is estimated from the same product and drawn
    half-way towards equal shares: a target of skewed classes is not forced into balance, and a teacher's preference
    not taken for the target's.

    Parameters
    ----------
    diversity_weight, prior_correction
        As for `ProductFusion`.
    recursive : bool
        Fit G on `L * S * G`; otherwise on `L * S`.
    share_trust : float
        How far the estimated class shares count, from 0 (classes are taken to be of equal size) to 1.
    temperature, shrinkage : float
        Of G; see `cross_fitted_expert`.
    components : int
        Dimension of the space that G works in.
    folds : int
        Of cross-fitting.
    together : int
        How many utterances that lie together share a fold, on average; see `dealt_folds`.

    Example
    -------
    >>> method = MIFusePlus()
    >>> method.state |= {"lalm_bias": torch.ones(2), "expert": torch.tensor([[0.5, 0.5], [0.1, 0.9]])}
    >>> method.state["pseudo_answers"] = torch.tensor(0.0)
    >>> answers = torch.tensor([[[0.8, 0.2]]])
    >>> teachers = Teachers(answers, torch.ones(1, 1).bool(), lambda: answers, rows=torch.tensor([1]))
    >>> print(method.targets(teachers))
    tensor([[0.6400, 0.3600]])
    """

    refreshes = 30

    def __init__(
        self,
        diversity_weight: float = 1.0,
        prior_correction: bool = True,
        recursive: bool = True,
        share_trust: float = 0.5,
        temperature: float = 1.0,
        shrinkage: float = 0.3,
        components: int = 256,
        folds: int = 5,
        together: int = 8,
        **options: bool,
    ):
        super().__init__(diversity_weight, prior_correction, **options)
        self.recursive, self.share_trust = recursive, share_trust
        self.temperature, self.shrinkage, self.components = temperature, shrinkage, components
        self.folds, self.together = folds, together

    def start(self, survey: Survey) -> None:
        """Keep the space that G works in, and begin with a G that says nothing; see `AdaptationMethod.start`."""
        super().start(survey)
        vectors = survey.student().vectors
        size, classes = len(vectors), survey.lalm.shape[-1]
        self.state["space"] = principal_components(vectors, self.components)
        self.state["folds"] = dealt_folds(self.state["space"], self.folds, self.together)
        self.state["expert"] = torch.full((size, classes), 1 / classes, device=vectors.device)

    def refresh(self, survey: Survey) -> None:
        """Estimate the class shares and fit G anew; see `AdaptationMethod.refresh`."""
        classifier, expert = survey.classifier().mean(1), self.state["expert"]
        estimated = product_of_experts([self.lalm(survey), classifier, expert]).mean(0)
        shares = trusted_shares(estimated, self.share_trust)
        self.state["lalm_bias"] = self.bias(survey, shares)
        labels = product_of_experts([self.lalm(survey), classifier, expert], [1.0, 1.0, float(self.recursive)])
        labels = with_class_shares(labels, shares)
        space, folds = self.state["space"], self.state["folds"]
        self.state["expert"] = cross_fitted_expert(space, labels, folds, self.temperature, self.shrinkage)

    consensus_told = "the product of what both teachers say"

    def consensus(self, survey: Survey, source: torch.Tensor) -> torch.Tensor:
        """Multiply them: a student far above both teachers outdoes their mean; see `AdaptationMethod.consensus`."""
        return product_of_experts([self.lalm(survey), source])

    def expert(self, teachers: Teachers) -> torch.Tensor:
        """`[B, C]`: what G says of a batch."""
        return self.state["expert"][teachers.rows]

    def targets(self, teachers: Teachers) -> torch.Tensor:
        """`q` proportional to `L * S * G`; see `AdaptationMethod.targets`."""
        return product_of_experts([self.lalm(teachers), teachers.classifier().mean(1), self.expert(teachers)])


class PermutedMIFusePlus(MIFusePlus):
    """Control: what G says is dealt to other utterances of the batch.

    What is left of the gain here is not owed to knowing where an utterance lies.

    Parameters
    ----------
    diversity_weight, prior_correction, recursive, share_trust, temperature, shrinkage, components, folds, together
        As for `MIFusePlus`.

    Example
    -------
    >>> method = PermutedMIFusePlus()
    >>> method.state["expert"] = torch.eye(2)
    >>> silent = torch.zeros(2, 1, 2)
    >>> dealt = method.expert(Teachers(silent, silent.bool().any(2), lambda: silent, rows=torch.tensor([0, 1])))
    >>> dealt.sum(0).tolist()
    [1.0, 1.0]
    """

    def expert(self, teachers: Teachers) -> torch.Tensor:
        """Deal `MIFusePlus.expert` anew among the batch."""
        dealt = super().expert(teachers)
        return dealt[torch.randperm(len(dealt), device=dealt.device)]
