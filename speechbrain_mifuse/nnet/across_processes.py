"""Sums and samples over all processes of a distributed run; in a single process they are the local ones."""

from __future__ import annotations

import torch
from torch import distributed


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
