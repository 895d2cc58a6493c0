"""NRC (Yang et al. 2021): neighbours in the target's own feature space should be predicted alike."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from speechbrain_mifuse.adaptation.fusion import diversity
from speechbrain_mifuse.adaptation.method import AdaptationMethod, Outputs, Survey, Teachers


def nearest(bank: torch.Tensor, rows: torch.Tensor, k: int, block: int = 256) -> torch.Tensor:
    """Most similar rows of a bank, the row itself left out.

    Parameters
    ----------
    bank : torch.Tensor
        `[N, H]`, of unit length.
    rows : torch.Tensor
        `[M]`, which ones to find the neighbours of.
    k : int
        How many; all others where there are fewer.
    block : int
        Rows compared at a time, so that memory stays at `block` x N.

    Returns
    -------
    torch.Tensor
        `[M, k]`, rows by falling cosine.

    Example
    -------
    >>> bank = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.2], [0.0, 1.0], [0.1, 1.0]]), dim=1)
    >>> nearest(bank, torch.tensor([0, 3]), k=2).tolist()
    [[1, 3], [2, 1]]
    """
    found = []
    for some in rows.split(block):
        similarity = bank[some] @ bank.T
        similarity.scatter_(1, some.unsqueeze(1), float("-inf"))
        found.append(similarity.topk(min(k, len(bank) - 1)).indices)
    return torch.cat(found)


def neighbourhood(
    features: torch.Tensor, scores: torch.Tensor, rows: torch.Tensor, neighbours: int, expanded: int, weak: float
) -> torch.Tensor:
    """Sum up what the neighbours of each utterance predict: `sum_k w_k s_k + r sum_k sum_m s_km`.

    `w_k` is 1 for a neighbour that has the utterance among its own `expanded` nearest, and r otherwise. The utterance
    counts among the neighbours of its neighbours too, which is the paper's self-regularisation.

    Parameters
    ----------
    features : torch.Tensor
        `[N, H]`, bank of unit-length features.
    scores : torch.Tensor
        `[N, C]`, bank of predictions.
    rows : torch.Tensor
        `[B]`, the batch's places in the banks.
    neighbours, expanded : int
        K, and neighbours of each neighbour M (`KK` in the authors' code).
    weak : float
        r.

    Returns
    -------
    torch.Tensor
        `[B, C]`, not normalised.

    Example
    -------
    >>> features, scores = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.2], [0.0, 1.0]]), dim=1), torch.eye(3)
    >>> print(neighbourhood(features, scores, torch.tensor([0]), neighbours=1, expanded=1, weak=0.1))
    tensor([[0.1000, 1.0000, 0.0000]])
    """
    near = nearest(features, rows, neighbours)
    # Utterances of one batch share neighbours: each is searched once.
    distinct, place = near.unique(return_inverse=True)
    far = nearest(features, distinct, expanded)[place]
    reciprocal = (far == rows.view(-1, 1, 1)).any(2)
    weights = torch.where(reciprocal, 1.0, weak).to(scores.dtype)
    return torch.einsum("bk,bkc->bc", weights, scores[near]) + weak * scores[far].sum((1, 2))


class Nrc(AdaptationMethod):
    """NRC: agreement with nearest neighbours, the reciprocal ones in full, kept from collapse by the diversity term.

    The paper's: `-mean_n <p_n, sum_k w_k s_k + r sum_k sum_m s_km> + diversity`, banks of features and predictions over
    the whole set that each batch updates before it reads them, K = 4 and M = 3, r = 0.1. Adapted to this harness:
    features are the hidden units before dropout, the batch's predictions enter the bank with its dropout, optimiser and
    steps are everyone's. It asks no language model.

    Parameters
    ----------
    diversity_weight : float
        lambda.
    neighbours, expanded : int
        K and M.
    weak : float
        r.

    Example
    -------
    >>> method = Nrc(diversity_weight=0.0, neighbours=1)
    >>> banks = Outputs(torch.zeros(3, 2), torch.tensor([[1.0, 0.0], [1.0, 0.2], [0.0, 1.0]]), torch.zeros(3, 2))
    >>> answers = torch.zeros(3, 5, 2)
    >>> method.start(Survey(answers, answers.bool().any(2), lambda: None, student=lambda: banks))
    >>> batch = Outputs(torch.zeros(1, 2), banks.hidden[:1], banks.logits[:1])
    >>> round(float(method.loss(batch, torch.tensor([0]))), 3)  # -<p, 1 * s_1 + 0.1 * (s_0 + s_2)>
    -0.6
    """

    answers_for = ()

    def __init__(
        self,
        diversity_weight: float = 1.0,
        neighbours: int = 4,
        expanded: int = 3,
        weak: float = 0.1,
        **options: bool,
    ):
        super().__init__(diversity_weight, **options)
        self.neighbours, self.expanded, self.weak = neighbours, expanded, weak

    def start(self, survey: Survey) -> None:
        """Fill both banks; see `AdaptationMethod.start`."""
        student = survey.student()
        self.state = {"features": F.normalize(student.hidden, dim=1), "scores": student.probs}

    def targets(self, teachers: Teachers) -> torch.Tensor:
        """Places `[B]` of the batch in the banks, which only the loss can update; see `AdaptationMethod.targets`."""
        return teachers.rows

    def loss(self, student: Outputs, targets: torch.Tensor) -> torch.Tensor:
        """`-mean <p, neighbourhood> + lambda sum_c pbar_c log pbar_c`; see `AdaptationMethod.loss`."""
        probs, features, scores = student.probs, self.state["features"], self.state["scores"]
        with torch.no_grad():
            features[targets] = F.normalize(student.hidden, dim=1)
            scores[targets] = probs
            around = neighbourhood(features, scores, targets, self.neighbours, self.expanded, self.weak)
        return -(probs * around).sum(1).mean() + self.diversity_weight * diversity(student.logits)
