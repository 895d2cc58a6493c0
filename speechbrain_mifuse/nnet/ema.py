"""Exponential moving average of a model: the teacher that follows a student."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def ema_decay(window: float, steps: int) -> float:
    """Give the decay whose averaging window is a share of the run: `alpha = 1 - 1 / (window * steps)`.

    Parameters
    ----------
    window : float
        Share of the run, in (0, 1].
    steps : int
        Updates of the run.

    Returns
    -------
    float
        alpha.

    Example
    -------
    >>> ema_decay(0.1, 1000)
    0.99
    """
    # A fixed decay means another thing for each length of run: at 0.999 and 200 steps the average is still the start.
    return 1 - 1 / max(window * steps, 1.0)


def linear_decay(start: float, end: float, steps: int) -> Callable[[int], float]:
    """Raise the decay from `start` to `end` within `steps` updates (Baevski et al. 2022, data2vec).

    Parameters
    ----------
    start, end : float
        First and last alpha.
    steps : int
        Updates between them; `end` afterwards.

    Returns
    -------
    callable
        From the number of updates to alpha.

    Example
    -------
    >>> decay = linear_decay(0.5, 1.0, 10)
    >>> decay(0), decay(5), decay(20)
    (0.5, 0.75, 1.0)
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
    update = _scheduled_update(decay) if callable(decay) else get_ema_multi_avg_fn(decay)
    average = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
    # At 0 the first update would copy the student, and the teacher forget where it came from.
    average.n_averaged.fill_(1)
    return average.requires_grad_(False).eval()


def _scheduled_update(decay: Callable[[int], float]) -> Callable:
    """Make an update rule for `AveragedModel` whose decay follows a schedule."""

    @torch.no_grad()
    def update(averages, values, count):
        # `ema_copy` counts the copy itself as the first.
        torch._foreach_lerp_(averages, values, 1 - decay(int(count) - 1))

    return update
