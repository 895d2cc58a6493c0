"""Dual encoder: light projections of a frozen speech encoder's frames and a frozen text encoder's vectors to one space.

Trained contrastively on captions of labelled emotional speech, it knows the emotions it was trained on and no others.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from speechbrain_mifuse.nnet.adapter_losses import mean_frame
from speechbrain_mifuse.nnet.statistical_attentive_pooling import frame_mask

# What the learned scale of the cosines starts at, and what it is kept between (Radford et al. 2021).
SCALE_START, SCALE_MIN, SCALE_MAX = 1 / 0.07, 1.0, 100.0


def frame_statistics(frames: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
    """Give mean and standard deviation over each utterance's true frames.

    Parameters
    ----------
    frames : torch.Tensor
        `[batch, frames, D]`.
    lengths : torch.Tensor, optional
        `[batch]`, relative; all full by default.

    Returns
    -------
    torch.Tensor
        `[batch, 2 D]`: means, then standard deviations.

    Example
    -------
    >>> frame_statistics(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([2 / 3])).tolist()
    [[2.0, 1.0]]
    """
    lengths = torch.ones(len(frames), device=frames.device) if lengths is None else lengths
    true = frame_mask(lengths, frames.shape[1])
    mean = mean_frame(frames, true)
    # Centred before squaring: the difference of two large moments would lose the digits that matter.
    variance = mean_frame((frames - mean.unsqueeze(1)).square(), true)
    return torch.cat([mean, variance.sqrt()], dim=-1)


def contrastive_loss(
    audio: torch.Tensor,
    text: torch.Tensor,
    groups: torch.Tensor,
    scale: torch.Tensor | float,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Symmetric InfoNCE in which all pairs of one group are positives of each other.

    `L_i = -1/|P_i| sum_{j in P_i} log softmax_j(k <a_i, t_j>)`, `P_i = {j: g_j = g_i}`, and the same from text to
    audio; `L = sum_i w_i (L_i^at + L_i^ta) / (2 sum_i w_i)`. The two directions are CLIP's (Radford et al. 2021), the
    mean over several positives outside the logarithm is that of supervised contrastive learning (Khosla et al. 2020):
    captions repeat within a batch, and a caption must not be pushed away from an utterance that it describes. With
    groups of one pair each, it is CLIP's loss.

    Parameters
    ----------
    audio, text : torch.Tensor
        `[B, E]`, unit norm; row i of both is a pair.
    groups : torch.Tensor
        `[B]`, g: equal numbers are positives of each other.
    scale : torch.Tensor or float
        k, inverse of the temperature.
    weights : torch.Tensor, optional
        `[B]`, w: how much a pair counts; all the same by default.

    Returns
    -------
    torch.Tensor
        L, a scalar, in nats.

    Example
    -------
    >>> pairs, groups = torch.eye(2), torch.tensor([0, 1])
    >>> round(float(contrastive_loss(pairs, pairs, groups, 1.0)), 4)  # log(1 + exp(-1))
    0.3133
    """
    positive = (groups[:, None] == groups[None, :]).to(audio.dtype)
    positive = positive / positive.sum(1, keepdim=True)
    logits = scale * audio @ text.T
    # Positives are symmetric: the shares of the rows serve both directions.
    per_pair = -(positive * (logits.log_softmax(1) + logits.T.log_softmax(1))).sum(1) / 2
    if weights is None:
        return per_pair.mean()
    return (weights * per_pair).sum() / weights.sum()


class DualEncoder(nn.Module):
    """Project pooled speech frames and text vectors to unit vectors whose cosine says how well they fit.

    Audio: mean and standard deviation over the true frames, standardised by `standardise_by`, dropout, a hidden layer
    (linear, layer normalisation, GELU), dropout, linear. Text: linear. Ours.

    Parameters
    ----------
    audio_size : int
        Dimension D of an encoder frame.
    text_size : int
        Size of a text vector.
    size : int
        E, of the common space.
    hidden_size : int
        Width of the hidden layer.
    dropout : float
        Probability of dropping a value, of the input and of the hidden layer.

    Attributes
    ----------
    sizes : dict
        What it was built with, for a file that builds it again.

    Example
    -------
    >>> model = DualEncoder(8, 6, size=4).eval()
    >>> audio = model.audio_vectors(torch.randn(2, 5, 8), torch.tensor([0.4, 1.0]))
    >>> (audio @ model.text_vectors(torch.randn(3, 6)).T).shape
    torch.Size([2, 3])
    """

    def __init__(self, audio_size: int, text_size: int, size: int = 128, hidden_size: int = 256, dropout: float = 0.3):
        super().__init__()
        self.sizes = {"audio_size": audio_size, "text_size": text_size, "size": size}
        self.sizes |= {"hidden_size": hidden_size, "dropout": dropout}
        self.register_buffer("centre", torch.zeros(2 * audio_size))
        self.register_buffer("spread", torch.ones(2 * audio_size))
        self.audio = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(2 * audio_size, hidden_size),
            nn.LayerNorm(hidden_size),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_size, size),
        )
        self.text = nn.Linear(text_size, size)
        self.log_scale = nn.Parameter(torch.tensor(math.log(SCALE_START)))

    @property
    def scale(self) -> torch.Tensor:
        """Scalar, k: inverse of the learned temperature."""
        return self.log_scale.exp()

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Bring the scale back between `SCALE_MIN` and `SCALE_MAX`; call it after each step."""
        self.log_scale.clamp_(math.log(SCALE_MIN), math.log(SCALE_MAX))

    def standardise_by(self, statistics: torch.Tensor) -> None:
        """Set what pooled frames are centred on and divided by, from those of the training set."""
        self.centre.copy_(statistics.mean(0))
        self.spread.copy_(statistics.std(0, correction=0).clamp(min=1e-4))

    def audio_vectors(self, frames: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Embed frames `[batch, frames, D]` as unit vectors `[batch, E]`; padding has no influence."""
        return self.project(frame_statistics(frames, lengths))

    def project(self, pooled: torch.Tensor) -> torch.Tensor:
        """Embed utterances that `frame_statistics` has pooled already."""
        return F.normalize(self.audio((pooled - self.centre) / self.spread), dim=-1)

    def text_vectors(self, embedded: torch.Tensor) -> torch.Tensor:
        """Embed vectors of the text encoder `[texts, text_size]` as unit vectors `[texts, E]`."""
        return F.normalize(self.text(embedded), dim=-1)

    def forward(self, pooled: torch.Tensor, embedded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Embed pairs of pooled utterances and texts; give both sides and the scale of their cosines."""
        return self.project(pooled), self.text_vectors(embedded), self.scale
