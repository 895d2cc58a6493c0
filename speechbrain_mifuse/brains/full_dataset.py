"""A set of utterances gone through as a whole, for what a batch cannot show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from speechbrain.dataio.dataloader import make_dataloader
from speechbrain.dataio.dataset import DynamicItemDataset

from speechbrain_mifuse.features.dataset import frame_batches


class FullDataset:
    """A dataset that is read as a whole, with the stored answers of the language model.

    Utterances of similar length are read together, which spares a third of the padding; results are in the order of
    `keys`, the dataset's.

    Parameters
    ----------
    dataset : DynamicItemDataset
        Gives what `frame_batches` collates; its rows hold `lalm` (`[K, C]`) and `lalm_mask` (`[K]`).
    frames : mapping of str to int
        Number of frames by utterance id.
    batch_size : int
        Utterances read at a time.

    Example
    -------
    >>> answer = {"lalm": torch.zeros(1, 2), "lalm_mask": torch.ones(1, dtype=torch.bool)}
    >>> data = {key: {**answer, "feats": torch.ones(length, 4)} for key, length in {"a": 3, "b": 1, "c": 2}.items()}
    >>> dataset = DynamicItemDataset(data, output_keys=["id", "feats"])
    >>> full = FullDataset(dataset, {key: len(row["feats"]) for key, row in data.items()}, batch_size=2)
    >>> full.gather(lambda batch: [batch.feats[0].sum((1, 2))])[0].tolist()
    [12.0, 4.0, 8.0]
    """

    def __init__(self, dataset: DynamicItemDataset, frames: Mapping[str, int], batch_size: int):
        self.keys = list(dataset.data_ids)
        self.positions = {key: place for place, key in enumerate(self.keys)}
        order = sorted(range(len(self.keys)), key=lambda place: frames[self.keys[place]])
        self.back = torch.tensor(order).argsort()
        self.loader = make_dataloader(dataset, sampler=order, **frame_batches(batch_size=batch_size))
        rows = [dataset.data[key] for key in self.keys]
        self.lalm = torch.stack([row["lalm"] for row in rows])
        self.lalm_mask = torch.stack([row["lalm_mask"] for row in rows])
        # Only a method that declares `uses_labels` is given a dataset with labels.
        self.reference = torch.stack([row["reference"] for row in rows]) if "reference" in rows[0] else None

    # Not in inference mode: what a method remembers of it takes part in losses.
    @torch.no_grad()
    def gather(self, function: Callable[..., Sequence[torch.Tensor]]) -> list[torch.Tensor]:
        """Apply a function to every batch and concatenate the tensors `[B, ...]` that it gives."""
        parts = zip(*(function(batch) for batch in self.loader), strict=True)
        return [torch.cat(part)[self.back] for part in parts]
