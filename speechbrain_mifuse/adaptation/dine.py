"""DINE (Liang et al. 2022): distil a black box that is asked once, and trust the student more and more."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from speechbrain_mifuse.adaptation.fusion import information
from speechbrain_mifuse.adaptation.method import AdaptationMethod, Outputs, Survey, Teachers


def adaptive_label_smoothing(probs: torch.Tensor) -> torch.Tensor:
    """Keep each row's greatest probability and share out the rest evenly: what a black box says less surely is noise.

    Parameters
    ----------
    probs : torch.Tensor
        `[N, C]`, distributions.

    Returns
    -------
    torch.Tensor
        `[N, C]`.

    Example
    -------
    >>> print(adaptive_label_smoothing(torch.tensor([[0.7, 0.3, 0.0]])))
    tensor([[0.7000, 0.1500, 0.1500]])
    """
    top, place = probs.max(1, keepdim=True)
    return ((1 - top) / (probs.shape[1] - 1)).expand_as(probs).scatter(1, place, top)


def divergence(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`mean_n KL(q_n || p_n)`.

    Parameters
    ----------
    logits : torch.Tensor
        `[B, C]`, of p.
    targets : torch.Tensor
        `[B, C]`, q.

    Returns
    -------
    torch.Tensor
        Scalar, nats.

    Example
    -------
    >>> round(float(divergence(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))), 4)
    0.6931
    """
    return F.kl_div(logits.log_softmax(-1), targets, reduction="batchmean")


class Dine(AdaptationMethod):
    """DINE: distillation of a remembered mixture of teacher and student, mixup consistency, information maximisation.

    The paper's: adaptive smoothing of the black box's answers, an exponential memory of them that takes in the
    student's predictions at 1 - 0.6, KL to that memory, KL of mixed inputs to equally mixed predictions (Beta(0.3,
    0.3)), mutual information at weight 1. Adapted to this harness: the black box is the language model's mean
    distribution (the paper's is a source model behind an API) and the student starts from the source; an utterance
    without answer starts from the student's own prediction; pooled vectors are mixed, since frames of utterances of
    different length cannot be; the memory is renewed 10 times per run, the first renewal being its filling. By default
    there is one black box, and no second, purely unsupervised stage.

    Parameters
    ----------
    diversity_weight : float
        lambda.
    momentum : float
        Share of the memory that a renewal keeps.
    mixup : float
        Both parameters of the Beta distribution.
    both : bool
        Start from the mean of two black boxes, language model and source classifier, as the paper does with several.
    second_stage : float
        Share of the run, its end, in which mutual information alone is maximized, as in the paper's second stage.

    Example
    -------
    >>> answers, outputs = torch.tensor([[[0.7, 0.3, 0.0]]]), Outputs(*torch.zeros(3, 1, 3))
    >>> survey = Survey(answers, torch.ones(1, 1, dtype=torch.bool), lambda: None, student=lambda: outputs)
    >>> method = Dine(momentum=0.5)
    >>> for _ in range(2):
    ...     method.refresh(survey)
    >>> print(method.state["memory"])
    tensor([[0.5167, 0.2417, 0.2417]])
    """

    refreshes = 10

    def __init__(
        self,
        diversity_weight: float = 1.0,
        momentum: float = 0.6,
        mixup: float = 0.3,
        *,
        both: bool = False,
        second_stage: float = 0.0,
        **options: bool,
    ):
        super().__init__(diversity_weight, **options)
        self.momentum, self.mixup = momentum, mixup
        self.both, self.second_stage = both, second_stage

    def refresh(self, survey: Survey) -> None:
        """Fill the memory with what the teacher says, later mix the student in; see `AdaptationMethod.refresh`."""
        probs = survey.student().probs
        if "memory" in self.state:
            self.state["memory"] = self.momentum * self.state["memory"] + (1 - self.momentum) * probs
        else:
            lalm = (survey.lalm_mean + probs) / 2 if self.both else survey.lalm_mean
            said = torch.where(survey.lalm_available.unsqueeze(1), lalm, probs)
            self.state["memory"] = adaptive_label_smoothing(said)
        if self.second_stage:
            self.state["renewals"] = self.state.get("renewals", torch.tensor(0)) + 1

    def targets(self, teachers: Teachers) -> torch.Tensor:
        """Recall the memory of the batch; see `AdaptationMethod.targets`."""
        return self.state["memory"][teachers.rows]

    def loss(self, student: Outputs, targets: torch.Tensor) -> torch.Tensor:
        """`KL(memory || p) + KL(mixed p || p of mixed) + mean H(p) + lambda sum_c pbar_c log pbar_c`.

        See `AdaptationMethod.loss`.
        """
        if self.second_stage and self.state["renewals"] > (1 - self.second_stage) * self.refreshes:
            return information(student.logits, self.diversity_weight)
        distilled = divergence(student.logits, targets)
        return distilled + self.consistency(student) + information(student.logits, self.diversity_weight)

    def consistency(self, student: Outputs) -> torch.Tensor:
        """KL of the predictions of mixed utterances to the mixture of their predictions.

        Parameters
        ----------
        student : Outputs
            Of the batch.

        Returns
        -------
        torch.Tensor
            Scalar, nats.
        """
        share = torch.distributions.Beta(self.mixup, self.mixup).sample().item()
        other, probs = torch.randperm(len(student.logits)), student.probs.detach()
        mixed = share * student.vectors + (1 - share) * student.vectors[other]
        return divergence(student.head(mixed), share * probs + (1 - share) * probs[other])
