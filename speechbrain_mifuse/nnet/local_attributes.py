"""Local attributes: an online codebook of the teacher's frames, kept as exponential moving averages."""

from __future__ import annotations

import torch
from torch import nn


class LocalAttributes(nn.Module):
    """Codebook that clusters frames without labels as they come.

    For codes k with the frames `Z_k` of a batch assigned to them: `n_k <- g n_k + (1 - g) |Z_k|`,
    `s_k <- g s_k + (1 - g) sum Z_k`, `e_k = s_k / n_k` (the form of Liu et al. 2023, DinoSR; arXiv 2509.23795 speaks of
    unsupervised clustering of the teacher branch and does not say which). A frame belongs to the nearest code,
    `argmin_k ||z - e_k||^2`. A code whose `n_k` falls below a share of the average is put onto a random frame of the
    batch. The first batch seeds all codes. Everything is in buffers: a checkpoint restores it exactly.

    Parameters
    ----------
    dim : int
        Of a frame.
    size : int
        Codes K.
    decay : float
        g.
    dead_share : float
        A code is dead when its `n_k` is below this share of the mean of n.

    Example
    -------
    >>> frames = torch.tensor([[0.0, 0.0], [0.0, 0.1], [5.0, 5.0], [5.0, 5.1]])
    >>> attributes = LocalAttributes(dim=2, size=2)
    >>> _ = attributes.update(frames, keys=torch.tensor([0.9, 0.1, 0.8, 0.2]))
    >>> attributes.assign(frames).tolist()
    [0, 0, 1, 1]
    """

    def __init__(self, dim: int, size: int = 256, decay: float = 0.9, dead_share: float = 0.02):
        super().__init__()
        self.decay, self.dead_share = decay, dead_share
        self.register_buffer("codes", torch.zeros(size, dim))
        self.register_buffer("counts", torch.zeros(size))
        self.register_buffer("sums", torch.zeros(size, dim))
        self.register_buffer("seeded", torch.zeros((), dtype=torch.bool))
        self.register_buffer("usage", torch.zeros(size))
        self.register_buffer("reseeded", torch.zeros(()))

    def assign(self, frames: torch.Tensor) -> torch.Tensor:
        """Find the nearest code `[N]` of each frame `[N, D]`."""
        # ||z||^2 is the same for every code.
        return (self.codes.square().sum(1) - 2 * frames @ self.codes.T).argmin(1)

    # Which codes are dead decides what runs next: nothing that torch.compile could trace.
    @torch.compiler.disable
    @torch.no_grad()
    def update(self, frames: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Assign a batch, then move the codes; random `keys` say which frames dead codes are put onto."""
        size, frames = len(self.codes), frames.float()
        candidates = None
        if not self.seeded:
            candidates = _sampled_rows(frames, keys, size)
            self._place(torch.ones_like(self.counts, dtype=torch.bool), candidates, 1.0)
            self.seeded.fill_(True)
        ids = self.assign(frames)
        found = torch.zeros_like(self.counts).index_add_(0, ids, torch.ones_like(ids, dtype=self.counts.dtype))
        total = torch.zeros_like(self.sums).index_add_(0, ids, frames)
        self.usage += found
        self.counts.mul_(self.decay).add_(found, alpha=1 - self.decay)
        self.sums.mul_(self.decay).add_(total, alpha=1 - self.decay)
        dead = self.counts < self.dead_share * self.counts.mean()
        if dead.any():
            candidates = _sampled_rows(frames, keys, size) if candidates is None else candidates
            self._place(dead, candidates, float(self.counts.mean()))
            self.reseeded += dead.sum()
        self.codes.copy_(self.sums / self.counts.clamp(min=1e-6).unsqueeze(1))
        return ids

    def _place(self, dead: torch.Tensor, candidates: torch.Tensor, count: float) -> None:
        chosen = candidates[: int(dead.sum())]
        self.codes[dead] = chosen
        # As if it had been found as often as the average code: it then has about 1 / (1 - g) steps to prove itself.
        self.counts[dead] = count
        self.sums[dead] = chosen * count

    def statistics(self) -> dict[str, float]:
        """Give the use of the codebook since the last call; a perplexity of K is even use."""
        # exp(H(usage)): 1 when one code takes everything.
        shares = self.usage / self.usage.sum().clamp(min=1)
        found = {
            "codebook_perplexity": float(torch.special.entr(shares).sum().exp()),
            "codes_used": float((self.usage > 0).sum()),
            "codes_reseeded": float(self.reseeded),
        }
        self.usage.zero_()
        self.reseeded.zero_()
        return found


def _sampled_rows(rows: torch.Tensor, keys: torch.Tensor, count: int) -> torch.Tensor:
    """Rows with the greatest keys, the greatest first, and repeated where there are fewer than `count`."""
    rows = rows[keys.topk(min(count, len(keys))).indices]
    return rows.repeat(-(-count // max(len(rows), 1)), 1)[:count]
