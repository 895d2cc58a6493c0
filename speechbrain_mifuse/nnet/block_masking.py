"""Block masks over the frames of an utterance, drawn for each utterance by itself."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch


def block_mask(frames: int, share: float, width: int, generator: torch.Generator) -> torch.Tensor:
    """Cover about a share of an utterance with blocks of neighbouring frames; true where covered."""
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
    """Draw block masks `[batch, frames]`, and a number in [0, 1) for each frame, -1 behind the end."""
    masked = torch.zeros(len(ids), max(counts), dtype=torch.bool)
    keys = torch.full(masked.shape, -1.0)
    for row, (utt_id, count) in enumerate(zip(ids, counts, strict=True)):
        generator = utterance_generator(seed, epoch, utt_id)
        masked[row, :count] = block_mask(count, share, width, generator)
        keys[row, :count] = torch.rand(count, generator=generator)
    return masked, keys
