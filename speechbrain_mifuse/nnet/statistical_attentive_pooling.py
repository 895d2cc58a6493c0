"""Statistical attentive pooling (SAP) of frames to one vector per utterance."""

from __future__ import annotations

import torch
from torch import nn


def frame_mask(lengths: torch.Tensor, frames: int) -> torch.Tensor:
    """Mark the true frames of a padded batch.

    Parameters
    ----------
    lengths : torch.Tensor
        `[batch]`, relative to the longest, as SpeechBrain's.
    frames : int
        T, of the padded batch.

    Returns
    -------
    torch.Tensor
        `[batch, T]`, bool; at least one of each utterance.

    Example
    -------
    >>> frame_mask(torch.tensor([0.5, 1.0]), 4).int().tolist()
    [[1, 1, 0, 0], [1, 1, 1, 1]]
    """
    counts = (lengths * frames).round().clamp(min=1)
    return torch.arange(frames, device=lengths.device)[None, :] < counts[:, None]


class StatisticalAttentivePooling(nn.Module):
    """Attention-weighted mean and standard deviation over time.

    `e_t = v' tanh(W z_t + b)`, `a = softmax(e)`, `mu = sum_t a_t z_t`, `sigma = sqrt(sum_t a_t (z_t - mu)^2)`,
    `u = [mu; sigma]` (Okabe, Koshinaka & Shinoda 2018; the pooling that arXiv 2509.23795 names). Ours: `v` starts at
    zero, so training begins with plain statistics pooling.

    Parameters
    ----------
    input_size : int
        Dimension D of a frame.
    attention_size : int
        Rows of W.

    Attributes
    ----------
    output_size : int
        2 D.

    Example
    -------
    >>> pool = StatisticalAttentivePooling(1)
    >>> pool(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([2 / 3])).tolist()
    [[2.0, 1.0]]
    """

    def __init__(self, input_size: int, attention_size: int = 64):
        super().__init__()
        self.output_size = 2 * input_size
        self.project = nn.Linear(input_size, attention_size)
        self.score = nn.Linear(attention_size, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    def attention(self, frames: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Weigh the frames: `[batch, frames]`, 0 behind the end of an utterance."""
        energy = self.score(torch.tanh(self.project(frames))).squeeze(-1)
        if lengths is not None:
            energy = energy.masked_fill(~frame_mask(lengths, frames.shape[1]), float("-inf"))
        return torch.softmax(energy, dim=1)

    def forward(self, frames: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Pool a batch.

        Parameters
        ----------
        frames : torch.Tensor
            `[batch, frames, D]`.
        lengths : torch.Tensor, optional
            `[batch]`, relative; all full by default.

        Returns
        -------
        torch.Tensor
            `[batch, 2 D]`: means, then standard deviations. Padding has no influence.
        """
        weights = self.attention(frames, lengths).unsqueeze(1)
        mean = torch.bmm(weights, frames)
        # Centred before squaring: the difference of two large moments would lose the digits that matter. The mean is
        # detached because the variance does not change with it to first order: sum_t a_t (z_t - mu) is 0. The gradient
        # stays exact, and the backward pass is spared two tensors of the size of the batch. Squaring in place spares
        # the forward pass one more: at these sizes, fresh memory costs as much as the arithmetic.
        variance = torch.bmm(weights, (frames - mean.detach()).square_())
        return torch.cat([mean, variance.clamp(min=1e-8).sqrt()], dim=-1).squeeze(1)
