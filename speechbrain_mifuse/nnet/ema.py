"""Exponential moving average of a model: the teacher that follows a student."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def ema_decay(window: float, steps: int) -> float:
    """Decay whose averaging window is a share of the run: `alpha = 1 - 1 / (window * steps)`.

    A fixed decay means another thing for each length of run: at 0.999 and 200 steps the average is still the start.

    Parameters
    ----------
    window : float
        Share of the run.
    steps : int
        Optimiser steps of the run.

    Returns
    -------
    float
        alpha.

    Example
    -------
    >>> ema_decay(0.5, 200)
    0.99
    """
    return 1 - 1 / max(window * steps, 1.0)


def linear_decay(start: float, end: float, steps: int) -> Callable[[int], float]:
    """Schedule of the decay: from `start` at the first update to `end` at update number `steps`, then constant.

    `alpha_n = start + (end - start) min(n / steps, 1)`: a young student is followed closely, a grown one slowly
    (Baevski et al. 2022, data2vec).

    Parameters
    ----------
    start, end : float
        alpha of the first and of the last update.
    steps : int
        Updates from the one to the other.

    Returns
    -------
    callable
        From the number of updates done so far to alpha.

    Example
    -------
    >>> alpha = linear_decay(0.9, 1.0, 10)
    >>> [round(alpha(n), 3) for n in (0, 5, 10, 20)]
    [0.9, 0.95, 1.0, 1.0]
    """
    return lambda updates: start + (end - start) * min(updates / max(steps, 1), 1.0)


def ema_copy(model: torch.nn.Module, decay: float | Callable[[int], float]) -> AveragedModel:
    """Copy a model as the start of its exponential moving average `S <- alpha S + (1 - alpha) student`.

    Parameters
    ----------
    model : torch.nn.Module
        The student, as it starts.
    decay : float or callable
        alpha, or a schedule of it as `linear_decay` gives. The number of updates is part of the state, so a restored
        teacher goes on at its place in the schedule.

    Returns
    -------
    AveragedModel
        In evaluation mode, without gradients, buffers averaged too.

    Example
    -------
    >>> student = torch.nn.Linear(1, 1, bias=False)
    >>> teacher = ema_copy(student, 0.75)
    >>> before = float(teacher.module.weight)
    >>> _ = torch.nn.init.constant_(student.weight, before + 1.0)
    >>> teacher.update_parameters(student)
    >>> round(float(teacher.module.weight) - before, 4)
    0.25
    """
    update = scheduled_update(decay) if callable(decay) else get_ema_multi_avg_fn(decay)
    average = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
    # At 0 the first update would copy the student, and the teacher forget where it came from.
    average.n_averaged.fill_(1)
    return average.requires_grad_(False).eval()


def scheduled_update(decay: Callable[[int], float]) -> Callable:
    """Update rule for `AveragedModel` whose decay follows a schedule.

    Parameters
    ----------
    decay : callable
        From the number of updates done so far to alpha.

    Returns
    -------
    callable
        `(averages, values, count)`, in place.

    Example
    -------
    >>> average = [torch.zeros(1)]
    >>> scheduled_update(lambda n: 0.5)(average, [torch.ones(1)], 1)
    >>> average[0].item()
    0.5
    """

    @torch.no_grad()
    def update(averages, values, count):
        # `ema_copy` counts the copy itself as the first.
        torch._foreach_lerp_(averages, values, 1 - decay(int(count) - 1))

    return update
