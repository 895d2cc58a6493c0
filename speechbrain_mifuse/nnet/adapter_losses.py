"""Losses of adapter training (arXiv 2509.23795), as functions of tensors.

The paper names mask prediction, self-distillation and supervision by local attributes; the exact forms are ours and
stand in each docstring. Every loss is a sum divided by a count, which may be given from outside: in a distributed run
it is that of all processes, so that their losses add up to the loss of the whole batch.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def mean_where(values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Average the chosen values; 0 when nothing is chosen.

    Example
    -------
    >>> mean_where(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]))
    tensor(2.)
    """
    return values.masked_fill(~chosen, 0.0).sum() / chosen.sum().clamp(min=1)


def unit_frames(frames: torch.Tensor) -> torch.Tensor:
    """Normalize frames `[..., D]` to mean 0 and variance 1: targets whose scale cannot shrink to nothing.

    Example
    -------
    >>> unit_frames(torch.tensor([[1.0, 3.0]])).round(decimals=2).tolist()
    [[-1.0, 1.0]]
    """
    return F.layer_norm(frames.float(), frames.shape[-1:])


def mask_prediction(predicted: torch.Tensor, target: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """Regress what is under the mask: `L_mask = 1 / |M| sum_{t in M} 1 / D ||f(z_t) - x_t||^2`.

    Parameters
    ----------
    predicted : torch.Tensor
        `[batch, frames, D]`: f(z), the student's guess.
    target : torch.Tensor
        `[batch, frames, D]`: x, the encoder's frames, standardised.
    masked : torch.Tensor
        `[batch, frames]`, bool: M.

    Returns
    -------
    torch.Tensor
        Scalar.

    Example
    -------
    >>> masked = torch.tensor([[True, False]])
    >>> mask_prediction(torch.zeros(1, 2, 3), torch.tensor([[[2.0] * 3, [9.0] * 3]]), masked)
    tensor(4.)
    """
    return mean_where((predicted.float() - target).square().mean(-1), masked)


def frame_distillation(predicted: torch.Tensor, teacher: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Agree with the teacher on every frame: `1 / T sum_t 1 / d ||g(z_t) - N(z^T_t)||^2`, N as `unit_frames`.

    Parameters
    ----------
    predicted : torch.Tensor
        `[batch, frames, d]`: g(z), of the student, which sees the masked input.
    teacher : torch.Tensor
        `[batch, frames, d]`: z^T, of the EMA teacher, which sees all of it; without gradient.
    true : torch.Tensor
        `[batch, frames]`, bool: frames that are no padding.

    Returns
    -------
    torch.Tensor
        Scalar.

    Example
    -------
    >>> teacher = torch.tensor([[[1.0, 3.0]]])
    >>> round(float(frame_distillation(torch.zeros(1, 1, 2), teacher, torch.ones(1, 1).bool())), 3)
    1.0
    """
    return mean_where((predicted.float() - unit_frames(teacher)).square().mean(-1), true)


def mean_frame(frames: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Average each utterance's true frames: `[batch, frames, D]` and a mask `[batch, frames]` to `[batch, D]`.

    Example
    -------
    >>> mean_frame(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[True, True, False]])).tolist()
    [[2.0]]
    """
    weight = true.unsqueeze(-1).float()
    return (frames.float() * weight).sum(1) / weight.sum(1).clamp(min=1)


def utterance_distillation(predicted: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Agree with a vector of the whole utterance: `1 / B sum_b 1 / d ||h_b - u_b||^2`.

    Parameters
    ----------
    predicted : torch.Tensor
        `[batch, d]`: h, from the student's frames.
    teacher : torch.Tensor
        `[batch, d]`: u, the target; without gradient.

    Returns
    -------
    torch.Tensor
        Scalar.

    Example
    -------
    >>> utterance_distillation(torch.zeros(2, 3), torch.ones(2, 3))
    tensor(1.)
    """
    values = (predicted.float() - teacher).square().mean(-1)
    return mean_where(values, torch.ones_like(values, dtype=torch.bool))


def local_attribute_prediction(logits: torch.Tensor, attributes: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """Name the teacher's cluster under the mask: `L_la = -1 / |M| sum_{t in M} log softmax(c(z_t))[k_t]`.

    Parameters
    ----------
    logits : torch.Tensor
        `[batch, frames, K]`: c(z), of the student.
    attributes : torch.Tensor
        `[batch, frames]`: k, cluster numbers of the teacher's frames.
    masked : torch.Tensor
        `[batch, frames]`, bool: M.

    Returns
    -------
    torch.Tensor
        Scalar.

    Example
    -------
    >>> attributes, masked = torch.zeros(1, 2).long(), torch.tensor([[True, False]])
    >>> round(float(local_attribute_prediction(torch.zeros(1, 2, 4), attributes, masked)), 4)
    1.3863
    """
    values = F.cross_entropy(logits.float().flatten(0, 1), attributes.flatten(), reduction="none")
    return mean_where(values.view_as(masked), masked)
