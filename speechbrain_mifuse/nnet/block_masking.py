"""Block masks over the frames of an utterance, drawn for each utterance by itself."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch


def block_mask(frames: int, share: float, width: int, generator: torch.Generator) -> torch.Tensor:
    """Cover about a share of an utterance with blocks of neighbouring frames.

    Blocks of `width` frames are laid at random places, overlapping as it comes, until `share` of the frames is covered:
    the share is met to within a block, whatever the length. An utterance shorter than two blocks gets narrower ones, so
    that from two frames on something is covered and something is left; a single frame stays uncovered.

    SpeechBrain's `compute_mask` is not used: it sets the number of blocks by the shortest utterance of the batch, fails
    where one is no longer than a block, and draws from global generators, so that a mask would depend on the batch.

    Parameters
    ----------
    frames : int
        Length.
    share : float
        Of the frames to cover, in [0, 1].
    width : int
        Frames of a block.
    generator : torch.Generator
        Of the places.

    Returns
    -------
    torch.Tensor
        `[frames]`, bool: covered.

    Example
    -------
    >>> mask = block_mask(100, 0.8, 10, torch.Generator().manual_seed(0))
    >>> 0.7 <= mask.float().mean() <= 0.9
    tensor(True)
    """
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
    """Seed one utterance's draws in one epoch: they do not depend on the batch, the order or the process.

    Parameters
    ----------
    seed : int
        Of the run.
    epoch : int
        Epoch.
    utt_id : str
        Utterance id.

    Returns
    -------
    torch.Generator
        On the CPU.

    Example
    -------
    >>> draw = lambda epoch: torch.rand(1, generator=utterance_generator(1, epoch, "t-a")).item()
    >>> draw(1) == draw(1), draw(1) == draw(2)
    (True, False)
    """
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {epoch} {utt_id}".encode()))


def draw_masks(
    ids: Sequence[str], counts: Sequence[int], share: float, width: int, seed: int, epoch: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a batch of block masks, and a number for each frame that sampling frames can go by.

    Parameters
    ----------
    ids : sequence of str
        Utterance ids.
    counts : sequence of int
        Frames of each.
    share, width
        As for `block_mask`.
    seed, epoch
        As for `utterance_generator`.

    Returns
    -------
    masked : torch.Tensor
        `[batch, frames]`, bool; false behind each utterance's end.
    keys : torch.Tensor
        `[batch, frames]`, uniform in [0, 1), -1 behind each utterance's end.

    Example
    -------
    >>> masked, keys = draw_masks(["t-a", "t-b"], [3, 5], share=0.5, width=2, seed=1, epoch=1)
    >>> masked[0, 3:].any().item(), (keys[0] < 0).tolist()
    (False, [False, False, False, True, True])
    """
    masked = torch.zeros(len(ids), max(counts), dtype=torch.bool)
    keys = torch.full(masked.shape, -1.0)
    for row, (utt_id, count) in enumerate(zip(ids, counts, strict=True)):
        generator = utterance_generator(seed, epoch, utt_id)
        masked[row, :count] = block_mask(count, share, width, generator)
        keys[row, :count] = torch.rand(count, generator=generator)
    return masked, keys
