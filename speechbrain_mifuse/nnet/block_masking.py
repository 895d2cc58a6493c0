"""Block masks over the frames of an utterance, drawn for each utterance by itself."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch


def block_mask(frames: int, share: float, width: int, generator: torch.Generator) -> torch.Tensor:
    """Cover about a share of an utterance with blocks of neighboring frames.

    Parameters
    ----------
    frames : int
        T, of the utterance.
    share : float
        Of frames to be covered, in [0, 1]; met to within a block.
    width : int
        Frames of a block.
    generator : torch.Generator
        Draws where blocks begin.

    Returns
    -------
    torch.Tensor
        `[T]`, bool: true where covered. From two frames on something is covered and something is left.

    Example
    -------
    >>> mask = block_mask(100, 0.4, width=10, generator=torch.Generator().manual_seed(0))
    >>> 40 <= int(mask.sum()) < 50
    True
    """
    # SpeechBrain's `compute_mask` sets the number of blocks by the shortest utterance of the batch, fails where one is
    # no longer than a block, and draws from global generators. Here a mask depends on its utterance alone, and its
    # share is met to within a block; from two frames on something is covered and something is left.
    wanted = min(max(round(share * frames), 1), frames - 1)
    if wanted < 1 or share <= 0:
        return torch.zeros(frames, dtype=torch.bool)
    width = max(1, min(width, frames // 2))
    # Blocks may begin before the first frame, or frames at the ends would be covered less often than others.
    order = torch.randperm(frames + width - 1, generator=generator)
    covered_by = order.unfold(0, width, 1).amin(1)
    last = covered_by.kthvalue(wanted).values
    mask = covered_by <= last
    return mask if not mask.all() else covered_by < last


def utterance_generator(seed: int, epoch: int, utt_id: str) -> torch.Generator:
    """Seed one utterance's draws in one epoch: they depend neither on the batch nor on the order."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {epoch} {utt_id}".encode()))


def draw_masks(
    ids: Sequence[str], counts: Sequence[int], share: float, width: int, seed: int, epoch: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw block masks for a batch; what an utterance gets depends neither on the batch nor on the order.

    Parameters
    ----------
    ids, counts : sequence of str, sequence of int
        Identifier and number of frames of each utterance.
    share, width
        As for `block_mask`.
    seed, epoch : int
        With the identifier, what is drawn from.

    Returns
    -------
    masked : torch.Tensor
        `[batch, frames]`, bool.
    keys : torch.Tensor
        `[batch, frames]`, a number in [0, 1) for each true frame, -1 behind the end.

    Example
    -------
    >>> alone, _ = draw_masks(["b"], [20], share=0.4, width=5, seed=1, epoch=1)
    >>> both, _ = draw_masks(["a", "b"], [9, 20], share=0.4, width=5, seed=1, epoch=1)
    >>> torch.equal(alone[0], both[1]), both[0, 9:].any().item()
    (True, False)
    """
    masked = torch.zeros(len(ids), max(counts), dtype=torch.bool)
    keys = torch.full(masked.shape, -1.0)
    for row, (utt_id, count) in enumerate(zip(ids, counts, strict=True)):
        generator = utterance_generator(seed, epoch, utt_id)
        masked[row, :count] = block_mask(count, share, width, generator)
        keys[row, :count] = torch.rand(count, generator=generator)
    return masked, keys
