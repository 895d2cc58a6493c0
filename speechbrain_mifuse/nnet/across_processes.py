"""Sums, samples and whole batches over all processes of a distributed run; in a single process they are the local ones.

A training step deals the frames of a batch to the processes, place by place. Each pools its own; what lies behind the
pooling (normalisation over the batch, dropout, losses, memories) sees the whole batch in every process, as it would in
one, and draws the same random numbers. So a run does not depend on the number of its processes, but for rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence

import torch
from torch import distributed

from speechbrain_mifuse.utils.errors import UserError

# Utterances of the batch whose frames are dealt to the processes; None outside of a training step.
_dealt: int | None = None


def process_count() -> int:
    """Count the processes of the run.

    Returns
    -------
    int
        1 when it is not distributed.

    Example
    -------
    >>> process_count()
    1
    """
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over all processes.

    Parameters
    ----------
    tensor : torch.Tensor
        Of the same shape everywhere; without gradient.

    Returns
    -------
    torch.Tensor
        The sum, the same everywhere.

    Example
    -------
    >>> summed(torch.ones(2)).tolist()
    [1.0, 1.0]
    """
    if process_count() == 1:
        return tensor
    total = tensor.clone()
    distributed.all_reduce(total)
    return total


def sampled_rows(rows: torch.Tensor, keys: torch.Tensor, count: int) -> torch.Tensor:
    """Rows with the greatest keys over all processes, the greatest first.

    With random keys that do not depend on how the batch is dealt to processes, it is the same sample however many they
    are.

    Parameters
    ----------
    rows : torch.Tensor
        `[N, D]`.
    keys : torch.Tensor
        `[N]`, not negative.
    count : int
        Rows wanted; with fewer there are, they are repeated.

    Returns
    -------
    torch.Tensor
        `[count, D]`, the same everywhere.

    Example
    -------
    >>> sampled_rows(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0.1, 0.9, 0.5]), 4).flatten().tolist()
    [2.0, 3.0, 1.0, 2.0]
    """
    best = keys.topk(min(count, len(keys)))
    keys, rows = best.values, rows[best.indices]
    if process_count() > 1:
        short = count - len(keys)
        keys = torch.cat([keys, keys.new_full((short,), -1.0)])
        rows = torch.cat([rows, rows.new_zeros(short, rows.shape[1])])
        keys, rows = gathered(keys), gathered(rows)
        keys, order = keys.sort(descending=True)
        rows = rows[order][keys >= 0]
    repeats = -(-count // max(len(rows), 1))
    return rows.repeat(repeats, 1)[:count]


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """Tensors of all processes, one after another.

    Parameters
    ----------
    tensor : torch.Tensor
        `[N, ...]`, of the same shape everywhere.

    Returns
    -------
    torch.Tensor
        `[processes N, ...]`.

    Example
    -------
    >>> gathered(torch.ones(2)).tolist()
    [1.0, 1.0]
    """
    if process_count() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(process_count())]
    distributed.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def process_rank() -> int:
    """Give the number of this process.

    Returns
    -------
    int
        From 0.

    Example
    -------
    >>> process_rank()
    0
    """
    return distributed.get_rank() if process_count() > 1 else 0


def own_part(batch: Sequence) -> Sequence:
    """Take what this process gets of a batch that is dealt place by place.

    Parameters
    ----------
    batch : sequence
        The whole batch.

    Returns
    -------
    sequence
        Every `process_count()`-th of it.

    Raises
    ------
    UserError
        If there are fewer utterances than processes.

    Example
    -------
    >>> own_part([3, 1, 2])
    [3, 1, 2]
    """
    if len(batch) < process_count():
        raise UserError(f"a batch has {len(batch)} utterances for {process_count()} processes: use fewer of them.")
    return batch[process_rank() :: process_count()]


@contextlib.contextmanager
def frames_dealt(utterances: int):
    """Let `whole_batch` put together what the processes have pooled; outside, every process goes through all itself.

    Parameters
    ----------
    utterances : int
        Size of the whole batch.

    Example
    -------
    >>> with frames_dealt(2):
    ...     whole_batch(torch.ones(2, 1)).tolist()
    [[1.0], [1.0]]
    """
    global _dealt
    _dealt = utterances
    try:
        yield
    finally:
        _dealt = None


def whole_batch(own: torch.Tensor) -> torch.Tensor:
    """Put the rows of all processes together in the order of the batch, inside `frames_dealt`.

    The gradient goes back to the process that a row came from, times the number of processes: the average over
    processes that `average_gradients` takes is then right before and behind this point.

    Parameters
    ----------
    own : torch.Tensor
        `[rows, ...]`, of `own_part`.

    Returns
    -------
    torch.Tensor
        `[batch, ...]`; `own` itself outside of `frames_dealt` or in a single process.

    Example
    -------
    >>> rows = torch.ones(2, 1)
    >>> whole_batch(rows) is rows
    True
    """
    return own if _dealt is None or process_count() == 1 else _WholeBatch.apply(own, _dealt)


class _WholeBatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, own: torch.Tensor, size: int) -> torch.Tensor:
        """Gather rows; with a size that cannot be dealt evenly, the last processes have one less."""
        room = own.new_zeros(-(-size // process_count()), *own.shape[1:])
        room[: len(own)] = own
        return gathered(room).unflatten(0, (process_count(), -1)).transpose(0, 1).flatten(0, 1)[:size]

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return own_part(gradient) * process_count(), None


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by its average over the processes.

    Parameters
    ----------
    parameters : iterable of torch.nn.Parameter
        In the same order everywhere. Where a process has no gradient, as behind a layer that it has dropped, it is 0
        there; where none has, there is none.

    Example
    -------
    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> weight.grad = torch.ones(1)
    >>> average_gradients([weight])
    >>> weight.grad.item()
    1.0
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    if process_count() == 1 or not parameters:
        return
    gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
    there = torch.tensor([float(one.grad is not None) for one in parameters], device=parameters[0].device)
    # One message for all: these networks have many small tensors.
    together = torch.cat([there, *(gradient.flatten() for gradient in gradients)])
    distributed.all_reduce(together)
    there, together = together[: len(there)].tolist(), together[len(there) :] / process_count()
    parts = together.split([one.numel() for one in parameters])
    for parameter, part, count in zip(parameters, parts, there, strict=True):
        parameter.grad = part.view_as(parameter) if count else None
