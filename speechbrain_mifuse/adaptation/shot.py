"""SHOT (Liang, Hu & Feng 2020): keep the source's decisions, adapt what comes before them."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from speechbrain_mifuse.adaptation.fusion import information, soft_cross_entropy
from speechbrain_mifuse.adaptation.method import AdaptationMethod, Outputs, Survey, Teachers


def nearest_centroid(features: torch.Tensor, affinity: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """Class of the centroid that points most nearly the same way.

    Parameters
    ----------
    features : torch.Tensor
        `[N, H]`.
    affinity : torch.Tensor
        `[N, C]`, how much each utterance counts for each class's centroid.
    used : torch.Tensor
        `[C]`, bool: classes that are given out.

    Returns
    -------
    torch.Tensor
        `[N]`, class indices.

    Example
    -------
    >>> nearest_centroid(torch.eye(2), torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([True, True])).tolist()
    [0, 1]
    """
    # A centroid's length does not matter to the cosine, so the weighted sum need not be divided.
    cosine = F.normalize(features, dim=1) @ F.normalize(affinity.T @ features, dim=1).T
    return cosine.masked_fill(~used, float("-inf")).argmax(1)


def centroid_labels(hidden: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """Pseudo-labels of SHOT: centroids weighted by the predictions, then once more by the labels they gave.

    `f = [h; 1] / |[h; 1]|`, `c_k = sum_n p_nk f_n / sum_n p_nk`, `y_n = argmax_k cos(f_n, c_k)`; then the same with
    one-hot y for p. A class that no utterance is assigned to is left out.

    Parameters
    ----------
    hidden : torch.Tensor
        `[N, H]`.
    probs : torch.Tensor
        `[N, C]`.

    Returns
    -------
    torch.Tensor
        `[N, C]`, one-hot.

    Example
    -------
    >>> hidden = torch.tensor([[5.0, 0.0], [4.0, 0.1], [0.0, 5.0]])
    >>> centroid_labels(hidden, torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.1, 0.9]])).argmax(1).tolist()
    [0, 0, 1]
    """
    features, classes = F.normalize(F.pad(hidden, (0, 1), value=1.0), dim=1), probs.shape[1]
    affinity, hard = probs, F.one_hot(probs.argmax(1), classes)
    for _ in range(2):
        hard = F.one_hot(nearest_centroid(features, affinity, hard.any(0)), classes)
        affinity = hard.to(probs.dtype)
    return affinity


class Shot(AdaptationMethod):
    """SHOT: centroid pseudo-labels and information maximisation, the output layer as the source left it.

    The paper's: frozen classifier, cosine centroids in two rounds, their labels refreshed 15 times per run, the loss
    `0.3 CE(pseudo) + mean H(p) + sum_c pbar_c log pbar_c`. Adapted to stored frames: what is trained is pooling and
    hidden layer, since the encoder lies before them and is never trained here; labels are not smoothed at the source;
    optimiser and steps are this harness's. It asks no language model.

    Parameters
    ----------
    diversity_weight : float
        lambda.
    pseudo_weight : float
        Weight of the cross-entropy to the pseudo-labels.

    Example
    -------
    >>> method = Shot()
    >>> method.state["labels"] = torch.eye(2)
    >>> answers = torch.zeros(1, 5, 2)
    >>> method.targets(Teachers(answers, answers.bool().any(2), lambda: None, rows=torch.tensor([1]))).tolist()
    [[0.0, 1.0]]
    """

    answers_for = ()
    frozen = ("output",)
    refreshes = 15

    def __init__(self, diversity_weight: float = 1.0, pseudo_weight: float = 0.3, **options: bool):
        super().__init__(diversity_weight, **options)
        self.pseudo_weight = pseudo_weight

    def refresh(self, survey: Survey) -> None:
        """Find the pseudo-labels anew; see `AdaptationMethod.refresh`."""
        student = survey.student()
        self.state["labels"] = centroid_labels(student.hidden, student.probs)

    def targets(self, teachers: Teachers) -> torch.Tensor:
        """Pseudo-labels of the batch; see `AdaptationMethod.targets`."""
        return self.state["labels"][teachers.rows]

    def loss(self, student: Outputs, targets: torch.Tensor) -> torch.Tensor:
        """`0.3 CE(y, p) + mean H(p) + lambda sum_c pbar_c log pbar_c`; see `AdaptationMethod.loss`."""
        pseudo = soft_cross_entropy(student.logits, targets)
        return self.pseudo_weight * pseudo + information(student.logits, self.diversity_weight)
