"""Late fusion of a specialist's vector with zero-shot scores (ZS-Fuse, arXiv 2603.23057)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from speechbrain_mifuse.errors import UserError
from speechbrain_mifuse.nnet.adapter_classifier import AdapterClassifier


class LateFusion(nn.Module):
    """Concatenate both sides, each behind a LayerNorm of its own, and classify with one linear layer.

    `logits = Linear([LayerNorm(v); g LayerNorm(s)])`, `v` the specialist's vector, `s` the scores. The form is the
    paper's as a secondary summary tells it, which is `g = 1`; the fixed scale `g` is ours: a few scores of unit
    variance drown among hundreds of dimensions, and weight decay then keeps their weights small.

    Parameters
    ----------
    specialist : AdapterClassifier
        Gives `v`; its own linear layer is not used.
    n_scores : int
        Scores S of an utterance.
    n_classes : int
        C.
    score_scale : float
        g.
    dropout : float
        Of the specialist's part; the few scores are never dropped.

    Example
    -------
    >>> fusion = LateFusion(AdapterClassifier(8, 4), n_scores=3, n_classes=4)
    >>> fusion(torch.randn(2, 5, 8), torch.ones(2), torch.randn(2, 3)).shape
    torch.Size([2, 4])
    """

    def __init__(
        self,
        specialist: AdapterClassifier,
        n_scores: int,
        n_classes: int,
        score_scale: float = 1.0,
        dropout: float = 0.5,
    ):
        super().__init__()
        size = specialist.pooling.output_size
        specialist.output = nn.Identity()
        self.specialist, self.score_scale, self.dropout = specialist, score_scale, dropout
        self.vector_norm, self.score_norm = nn.LayerNorm(size), nn.LayerNorm(n_scores)
        self.output = nn.Linear(size + n_scores, n_classes)

    def forward(self, frames: torch.Tensor, lengths: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Classify a batch; dropout is on in training mode.

        Parameters
        ----------
        frames : torch.Tensor
            `[batch, frames, D]`.
        lengths : torch.Tensor
            `[batch]`, relative.
        scores : torch.Tensor
            `[batch, S]`.

        Returns
        -------
        torch.Tensor
            Logits `[batch, C]`.
        """
        vector = F.dropout(self.vector_norm(self.specialist.vector(frames, lengths)), self.dropout, self.training)
        return self.output(torch.cat([vector, self.score_scale * self.score_norm(scores)], dim=-1))


class SpecialistOnly(LateFusion):
    """The same without scores: `logits = Linear(LayerNorm(v))`.

    Example
    -------
    >>> alone = SpecialistOnly(AdapterClassifier(8, 4), n_scores=3, n_classes=4).eval()
    >>> frames, lengths = torch.randn(2, 5, 8), torch.ones(2)
    >>> torch.equal(*(alone(frames, lengths, torch.randn(2, 3)) for _ in range(2)))
    True
    """

    def __init__(self, specialist: AdapterClassifier, n_scores: int, n_classes: int, dropout: float = 0.5):
        super().__init__(specialist, 0, n_classes, dropout=dropout)

    def forward(self, frames: torch.Tensor, lengths: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Classify a batch; see `LateFusion.forward`."""
        return super().forward(frames, lengths, scores[:, :0])


class LogitAverage(SpecialistOnly):
    """An ablation: the specialist learns alone, and its log-probabilities are averaged with those of the scores.

    `log p = (log softmax(specialist) + log softmax(g LayerNorm(s))) / 2 + constant`, `LayerNorm` without its learned
    part: nothing of the scores is fitted, so there must be one score for each class, in the classes' order.

    Parameters
    ----------
    specialist, n_scores, n_classes, dropout
        As for `LateFusion`.
    score_scale : float
        g.

    Raises
    ------
    UserError
        If there are more or fewer scores than classes.

    Example
    -------
    >>> average = LogitAverage(AdapterClassifier(8, 2), n_scores=2, n_classes=2).eval()
    >>> average(torch.randn(1, 5, 8), torch.ones(1), torch.tensor([[900.0, -900.0]])).argmax().item()
    0
    """

    def __init__(
        self,
        specialist: AdapterClassifier,
        n_scores: int,
        n_classes: int,
        score_scale: float = 1.0,
        dropout: float = 0.5,
    ):
        if n_scores != n_classes:
            raise UserError(
                f"--arm: averaging needs one score for each of {n_classes} classes, and there are {n_scores}."
            )
        super().__init__(specialist, n_scores, n_classes, dropout)
        self.score_scale = score_scale

    def forward(self, frames: torch.Tensor, lengths: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Classify a batch; see `LateFusion.forward`."""
        logits = super().forward(frames, lengths, scores)
        if self.training:
            return logits
        told = self.score_scale * F.layer_norm(scores, scores.shape[-1:])
        return (logits.log_softmax(-1) + told.log_softmax(-1)) / 2


class ScoresOnly(nn.Module):
    """The other side alone: `logits = Linear(LayerNorm(s))`.

    Parameters
    ----------
    specialist : AdapterClassifier
        Not used.
    n_scores, n_classes : int
        S and C.

    Example
    -------
    >>> ScoresOnly(None, n_scores=3, n_classes=4)(torch.randn(2, 5, 8), torch.ones(2), torch.randn(2, 3)).shape
    torch.Size([2, 4])
    """

    def __init__(self, specialist: AdapterClassifier | None, n_scores: int, n_classes: int):
        super().__init__()
        self.score_norm, self.output = nn.LayerNorm(n_scores), nn.Linear(n_scores, n_classes)

    def forward(self, frames: torch.Tensor, lengths: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Classify a batch; see `LateFusion.forward`."""
        return self.output(self.score_norm(scores))
