"""What adapter training is measured by: pooling and one linear layer, with an adapter before it or not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from speechbrain_mifuse.nnet.adapter_losses import mean_frame
from speechbrain_mifuse.nnet.statistical_attentive_pooling import StatisticalAttentivePooling, frame_mask


class MeanPooling(nn.Module):
    """Mean over an utterance's frames.

    Parameters
    ----------
    input_size : int
        Dimension D of a frame.

    Attributes
    ----------
    output_size : int
        D.

    Example
    -------
    >>> MeanPooling(1)(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([0.7])).tolist()
    [[2.0]]
    """

    def __init__(self, input_size: int):
        super().__init__()
        self.output_size = input_size

    def forward(self, frames: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Pool `[batch, frames, D]` with relative lengths `[batch]` to `[batch, D]`."""
        return mean_frame(frames, frame_mask(lengths, frames.shape[1]))


class AdapterClassifier(nn.Module):
    """Adapter (or none), pooling, batch normalisation without affine part, dropout, linear layer.

    Parameters
    ----------
    input_size : int
        Dimension D of an encoder frame.
    n_classes : int
        C.
    adapter : WAPTransformer, optional
        Before the pooling.
    pooling : callable
        From a frame's dimension to a pooling module with `output_size`.
    dropout : float
        Before the linear layer.
    frozen : bool
        Whether the adapter stays as it came: what is left is a linear probe of it.

    Example
    -------
    >>> from speechbrain_mifuse.nnet.wap_transformer import WAPTransformer
    >>> model = AdapterClassifier(8, 4, WAPTransformer(8, n_heads=2))
    >>> model(torch.randn(2, 5, 8), torch.tensor([0.4, 1.0])).shape
    torch.Size([2, 4])
    """

    def __init__(
        self,
        input_size: int,
        n_classes: int,
        adapter: nn.Module | None = None,
        pooling: Callable[[int], nn.Module] = StatisticalAttentivePooling,
        dropout: float = 0.5,
        frozen: bool = False,
    ):
        super().__init__()
        self.adapter, self.dropout, self.frozen = adapter, dropout, frozen
        self.pooling = pooling(input_size if adapter is None else adapter.output_size)
        self.norm = nn.BatchNorm1d(self.pooling.output_size, affine=False)
        self.output = nn.Linear(self.pooling.output_size, n_classes)
        if frozen:
            adapter.requires_grad_(False)

    def train(self, mode: bool = True) -> AdapterClassifier:
        """Set the mode; a frozen adapter stays in evaluation mode, or its dropout would move what is probed."""
        super().train(mode)
        if self.frozen:
            self.adapter.eval()
        return self

    def adapted(self, frames: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Give the frames that the pooling sees, `[batch, frames, d]`."""
        return frames if self.adapter is None else self.adapter(frames, lengths)

    def vector(self, frames: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Give the normalized vector of each utterance that the linear layer sees, `[batch, V]`."""
        return self.norm(self.pooling(self.adapted(frames, lengths), lengths))

    def forward(self, frames: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Give logits `[batch, C]` of frames `[batch, frames, D]`; dropout is on in training mode."""
        return self.output(F.dropout(self.vector(frames, lengths), self.dropout, self.training))
