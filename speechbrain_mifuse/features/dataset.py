"""Glue between manifests, the feature store and SpeechBrain's datasets and loaders."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from speechbrain.dataio.batch import PaddedBatch

from speechbrain_mifuse.corpora.manifest import CorpusError, read_manifest

logger = logging.getLogger(__name__)


def pad_frames(items: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad stored frames to one float32 batch, in one pass over the memory.

    Example
    -------
    >>> batch, lengths = pad_frames([torch.ones(4, 2).half(), torch.ones(1, 2).half()])
    >>> batch.shape, batch.dtype, lengths.tolist()
    (torch.Size([2, 4, 2]), torch.float32, [1.0, 0.25])
    """
    counts = [len(item) for item in items]
    longest = max(counts)
    data = torch.empty(len(items), longest, *items[0].shape[1:])
    for place, item, count in zip(data, items, counts, strict=True):
        place[:count] = item
        place[count:] = 0
    return data, torch.tensor(counts) / longest


def frame_batches(padding=pad_frames, **options):
    """Loader options for stored frames: SpeechBrain's `PaddedBatch`, with `feats` alone padded."""
    # All values are tensors, strings or numbers already; looking into each for arrays would take longer than padding.
    ready = {"padded_keys": ["feats"], "padding_func": padding, "apply_default_convert": False}
    return {"collate_fn": functools.partial(PaddedBatch, **ready), **options}


def encoded_rows(manifest: str | Path, store) -> dict[str, dict]:
    """Rows of a manifest whose frames are in the store; the others are named in the log."""
    rows = read_manifest(manifest)
    missing = [key for key in rows if store is not None and key not in store]
    if missing:
        logger.warning("%s: %d utterances have no frames and are left out: %s", manifest, len(missing), missing[:20])
    for key in missing:
        del rows[key]
    if not rows:
        raise CorpusError(f"{manifest}: none of its utterances could be encoded; see the log above for the reasons.")
    return rows


def label_index(labels: Sequence[str], row: Mapping, utt_id: str) -> int:
    """Class index of a row in the fixed label order.

    Example
    -------
    >>> label_index(("angry", "sad"), {"emo": "sad"}, "t-a")
    1
    """
    if row.get("emo") is None:
        raise CorpusError(
            f"'{utt_id}' has no label, and what is asked for needs one of every recording. Give that entry of its "
            "manifest an 'emo', or leave it out."
        )
    if row["emo"] not in labels:
        raise CorpusError(
            f"'{utt_id}' has the label '{row['emo']}', which is none of {', '.join(labels)}. Mend the 'emo' "
            "of that entry of its manifest, or add the label to 'labels' in the YAML."
        )
    return list(labels).index(row["emo"])
