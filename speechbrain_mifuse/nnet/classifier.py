"""Emotion classifier on encoder frames: layer weighting, pooling, normalisation, an MLP with dropout."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F

from speechbrain_mifuse.nnet.statistical_attentive_pooling import StatisticalAttentivePooling
from speechbrain_mifuse.nnet.wap_transformer import WAPTransformer


class LayerWeighting(nn.Module):
    """Learned convex combination of encoder layers: `sum_l softmax(v)_l x_l` (Peters et al. 2018).

    Parameters
    ----------
    layers : int
        L.

    Example
    -------
    >>> LayerWeighting(2)(torch.tensor([[[[1.0], [3.0]]]])).tolist()
    [[[2.0]]]
    """

    def __init__(self, layers: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(layers))

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Combine `[batch, frames, layers, D]` to `[batch, frames, D]`."""
        return torch.einsum("btld,l->btd", frames, self.weight.softmax(0))


class EmotionClassifier(nn.Module):
    """Adapter if there is one, SAP, batch normalisation without affine part, one hidden layer, dropout, output.

    Dropout stands only before the last layer, so K stochastic passes (Gal & Ghahramani 2016) share everything up to
    the hidden units and cost next to nothing.

    Parameters
    ----------
    input_size : int
        Dimension D of a frame.
    n_classes : int
        Number of emotions C.
    hidden_size : int
        Width of the hidden layer.
    dropout : float
        Probability of dropping a unit.
    n_layers : int
        Encoder layers in the input; more than one are combined by learned weights.
    attention_size : int
        Width of the pooling's attention.
    adapter : mapping, optional
        Sizes of a `WAPTransformer` before the pooling (`WAPTransformer.sizes`); none by default.

    Example
    -------
    >>> model = EmotionClassifier(8, 4).eval()
    >>> frames, lengths = torch.randn(2, 5, 8), torch.tensor([0.6, 1.0])
    >>> model(frames, lengths).shape
    torch.Size([2, 4])
    >>> model.stochastic_logits(frames, lengths, passes=16).shape
    torch.Size([2, 16, 4])
    """

    def __init__(
        self,
        input_size: int,
        n_classes: int,
        hidden_size: int = 256,
        dropout: float = 0.5,
        n_layers: int = 1,
        attention_size: int = 64,
        adapter: Mapping | None = None,
    ):
        super().__init__()
        self.layer_weighting = LayerWeighting(n_layers) if n_layers > 1 else nn.Identity()
        self.adapter = None if adapter is None else WAPTransformer(**adapter)
        pooled_size = input_size if adapter is None else self.adapter.output_size
        self.pooling = StatisticalAttentivePooling(pooled_size, attention_size)
        self.norm = nn.BatchNorm1d(2 * pooled_size, affine=False)
        self.hidden = nn.Linear(2 * pooled_size, hidden_size)
        self.output = nn.Linear(hidden_size, n_classes)
        self.dropout = dropout

    def embed(self, frames: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Pool and normalize frames `[batch, frames, D]`, or `[batch, frames, layers, D]`, to `[batch, 2 D]`."""
        frames = self.layer_weighting(frames)
        frames = frames if self.adapter is None else self.adapter(frames, lengths)
        return self.norm(self.pooling(frames, lengths))

    @torch.no_grad()
    def renormalize(self, vectors: torch.Tensor) -> None:
        """Normalize by the statistics of a set, of which `vectors` are what `embed` gave in evaluation mode."""
        variance = self.norm.running_var + self.norm.eps
        self.norm.running_mean += variance.sqrt() * vectors.mean(0)
        self.norm.running_var.copy_(variance * vectors.var(0, unbiased=False))

    def head(self, vectors: torch.Tensor, stochastic: bool) -> torch.Tensor:
        """Give logits `[..., C]` of pooled vectors `[..., 2 D]`."""
        return self.output(F.dropout(self.hidden_units(vectors), self.dropout, stochastic))

    def hidden_units(self, vectors: torch.Tensor) -> torch.Tensor:
        """Give the activations `[..., hidden_size]` that dropout acts on."""
        return F.relu(self.hidden(vectors))

    def parts(
        self, frames: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Give pooled vectors `[batch, 2 D]`, hidden units before dropout, and logits `[batch, C]`."""
        vectors = self.embed(frames, lengths)
        hidden = self.hidden_units(vectors)
        return vectors, hidden, self.output(F.dropout(hidden, self.dropout, self.training))

    def forward(self, frames: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Give logits `[batch, C]`; dropout is on in training mode."""
        return self.parts(frames, lengths)[-1]

    def stochastic_logits(self, frames: torch.Tensor, lengths: torch.Tensor | None, passes: int) -> torch.Tensor:
        """Draw Monte-Carlo dropout logits `[batch, K, C]` in one batched pass of the head."""
        units = self.hidden_units(self.embed(frames, lengths)) / (1 - self.dropout)
        # Dropout written out: on a CPU, uniform draws take a quarter of the time of `F.dropout`'s Bernoulli draws.
        kept = torch.rand(len(units), passes, units.shape[-1], device=units.device) >= self.dropout
        return self.output(units.unsqueeze(1) * kept)
