"""Batches of a distributed run: every process has all of a batch but the frames, of which it reads its own part."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from speechbrain.dataio.dataloader import make_dataloader
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.dataio.sampler import ReproducibleRandomSampler
from torch.utils.data import BatchSampler, DataLoader, Dataset

from speechbrain_mifuse.features.dataset import frame_batches, pad_frames
from speechbrain_mifuse.nnet.across_processes import own_part


class DealtBatches:
    """Batches of places in a dataset of which a process reads its own part: other places come as `~place`."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            own = set(own_part(batch))
            yield [place if place in own else ~place for place in batch]

    def __len__(self) -> int:
        return len(self.batches)


class DealtDataset(Dataset):
    """A dataset that reads no frames of the places that come as `~place`, and all else of them."""

    def __init__(self, dataset: DynamicItemDataset):
        self.dataset = dataset
        self.others = [key for key in dataset.pipeline.output_mapping if key != "feats"]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: int) -> dict:
        if place >= 0 or "feats" not in self.dataset.pipeline.output_mapping:
            return self.dataset[max(place, ~place)]
        utt_id = self.dataset.data_ids[~place]
        point = {"id": utt_id, **self.dataset.data[utt_id]}
        return {**self.dataset.pipeline.compute_specific(self.others, point), "feats": torch.empty(0)}


def dealt_loader(dataset: DynamicItemDataset, batch_size: int) -> tuple[DataLoader, ReproducibleRandomSampler]:
    """Load the batches that one process would, each process with its own part of the frames alone."""
    # As `sb.Brain` shuffles in a single process.
    seed = os.environ.get("SB_GLOBAL_SEED")
    sampler = ReproducibleRandomSampler(dataset, **({} if seed is None else {"seed": int(seed)}))
    batches = DealtBatches(BatchSampler(sampler, batch_size, drop_last=True))
    options = frame_batches(batch_sampler=batches, padding=own_frames)
    return make_dataloader(DealtDataset(dataset), **options), sampler


def own_frames(items: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad the frames that this process has read; see `pad_frames`."""
    return pad_frames(own_part(items))
