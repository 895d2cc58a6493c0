"""Late fusion of a specialist's vector with zero-shot scores (ZS-Fuse, arXiv 2603.23057)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from speechbrain_mifuse.nnet.adapter_classifier import AdapterClassifier
from speechbrain_mifuse.utils.errors import UserError


@torch.no_grad()
def begin_at_scores(weight: torch.Tensor, score_classes: Sequence[int | None]) -> None:
    """Set a linear layer's weights so that each class's score counts for that class alone, one for one.

    Parameters
    ----------
    weight : torch.Tensor
        `[C, S]`, changed in place.
    score_classes : sequence of int or None
        Class of each score; one for no class counts for none.

    Example
    -------
    >>> weight = torch.randn(2, 3)
    >>> begin_at_scores(weight, [1, None, 0])
    >>> weight.tolist()
    [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    weight.zero_()
    for score, label in enumerate(score_classes):
        if label is not None:
            weight[label, score] = 1.0


class LateFusion(nn.Module):
    """Concatenate both sides, each behind a LayerNorm of its own, and classify with one linear layer.

    `logits = Linear([LayerNorm(v); LayerNorm(s)])`, `v` the specialist's vector, `s` the scores: the paper's form as a
    secondary summary tells it. Where the linear layer begins is ours, if `from_scores`: a few scores drown among
    hundreds of dimensions, and few labels do not tell what they are worth; so each begins as evidence for its class.

    Parameters
    ----------
    specialist : AdapterClassifier
        Gives `v`; its own linear layer is not used.
    score_classes : sequence of int or None
        Class that each of the S scores is for, if it is one of the classes.
    n_classes : int
        C.
    dropout : float
        Of the specialist's part; the few scores are never dropped.
    from_scores : bool
        Whether training begins with weights of 1 from each score to its class, and 0 to the others, instead of random
        ones.

    Example
    -------
    >>> fusion = LateFusion(AdapterClassifier(8, 4), score_classes=[0, 1, 3], n_classes=4)
    >>> fusion(torch.randn(2, 5, 8), torch.ones(2), torch.randn(2, 3)).shape
    torch.Size([2, 4])
    """

    def __init__(
        self,
        specialist: AdapterClassifier,
        score_classes: Sequence[int | None],
        n_classes: int,
        dropout: float = 0.5,
        from_scores: bool = False,
    ):
        super().__init__()
        size, n_scores = specialist.pooling.output_size, len(score_classes)
        specialist.output = nn.Identity()
        self.specialist, self.dropout = specialist, dropout
        self.vector_norm, self.score_norm = nn.LayerNorm(size), nn.LayerNorm(n_scores)
        self.output = nn.Linear(size + n_scores, n_classes)
        if from_scores:
            begin_at_scores(self.output.weight[:, size:], score_classes)

    def forward(self, frames: torch.Tensor, lengths: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Give logits `[batch, C]` of frames `[batch, frames, D]` and scores `[batch, S]`."""
        vector = F.dropout(self.vector_norm(self.specialist.vector(frames, lengths)), self.dropout, self.training)
        return self.output(torch.cat([vector, self.score_norm(scores)], dim=-1))


class SpecialistOnly(LateFusion):
    """The same without scores: `logits = Linear(LayerNorm(v))`.

    Parameters
    ----------
    specialist, score_classes, n_classes, dropout
        As for `LateFusion`; there may be any scores.

    Example
    -------
    >>> alone = SpecialistOnly(AdapterClassifier(8, 4), score_classes=[0, 1, 3], n_classes=4).eval()
    >>> frames, lengths = torch.randn(2, 5, 8), torch.ones(2)
    >>> torch.equal(*(alone(frames, lengths, torch.randn(2, 3)) for _ in range(2)))
    True
    """

    def __init__(
        self,
        specialist: AdapterClassifier,
        score_classes: Sequence[int | None],
        n_classes: int,
        dropout: float = 0.5,
    ):
        super().__init__(specialist, [], n_classes, dropout)

    def forward(self, frames: torch.Tensor, lengths: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Classify a batch; see `LateFusion.forward`."""
        return super().forward(frames, lengths, scores[:, :0])


class LogitAverage(SpecialistOnly):
    """An ablation: the specialist learns alone, and its log-probabilities are averaged with those of the scores.

    `log p = (log p_v + log p_s) / 2 + constant`, `p_v = softmax(specialist)`, `p_s` a softmax over `LayerNorm(s)`,
    without its learned part: nothing of the scores is fitted. Of a class without a score `p_s` knows nothing and says
    what `p_v` says; the classes with one share what `p_v` gives to all of them.

    Parameters
    ----------
    specialist, score_classes, n_classes, dropout
        As for `LateFusion`.

    Raises
    ------
    UserError
        If no score is for one of the classes.

    Example
    -------
    >>> average = LogitAverage(AdapterClassifier(8, 2), score_classes=[0, 1], n_classes=2).eval()
    >>> _ = torch.nn.init.zeros_(average.output.weight), torch.nn.init.zeros_(average.output.bias)
    >>> logits = average(torch.randn(1, 5, 8), torch.ones(1), torch.tensor([[900.0, -900.0]]))
    >>> logits.argmax(-1).tolist()  # what the scores say, where the specialist says nothing
    [0]
    """

    def __init__(
        self,
        specialist: AdapterClassifier,
        score_classes: Sequence[int | None],
        n_classes: int,
        dropout: float = 0.5,
    ):
        used = [place for place, label in enumerate(score_classes) if label is not None]
        if not used:
            raise UserError("--arm: averaging needs scores for at least one of the classes, and they are for others.")
        super().__init__(specialist, score_classes, n_classes, dropout)
        self.used, self.classes = used, [score_classes[place] for place in used]

    def forward(self, frames: torch.Tensor, lengths: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Classify a batch; see `LateFusion.forward`."""
        logits = super().forward(frames, lengths, scores)
        if self.training:
            return logits
        specialist = logits.log_softmax(-1)
        told, used = specialist.clone(), scores[:, self.used]
        share = specialist[:, self.classes].logsumexp(-1, keepdim=True)
        told[:, self.classes] = share + F.layer_norm(used, used.shape[-1:]).log_softmax(-1)
        return (specialist + told) / 2


class ScoresOnly(nn.Module):
    """The other side alone: `logits = Linear(LayerNorm(s))`, the linear layer beginning as `LateFusion`'s.

    Parameters
    ----------
    specialist : AdapterClassifier
        Not used.
    score_classes, n_classes, from_scores
        As for `LateFusion`.

    Example
    -------
    >>> ScoresOnly(None, [0, 1, 3], n_classes=4)(torch.randn(2, 5, 8), torch.ones(2), torch.randn(2, 3)).shape
    torch.Size([2, 4])
    """

    def __init__(
        self,
        specialist: AdapterClassifier | None,
        score_classes: Sequence[int | None],
        n_classes: int,
        from_scores: bool = False,
    ):
        super().__init__()
        n_scores = len(score_classes)
        self.score_norm, self.output = nn.LayerNorm(n_scores), nn.Linear(n_scores, n_classes)
        if from_scores:
            begin_at_scores(self.output.weight, score_classes)

    def forward(self, frames: torch.Tensor, lengths: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Classify a batch; see `LateFusion.forward`."""
        return self.output(self.score_norm(scores))
