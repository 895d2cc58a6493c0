"""Adapter training without labels (arXiv 2509.23795): mask prediction, self-distillation, local attributes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import speechbrain as sb
import torch
from speechbrain.utils.checkpoints import mark_as_loader, mark_as_saver, register_checkpoint_hooks
from torch.utils.data import Sampler

from speechbrain_mifuse.brains.training import ResumableBrain
from speechbrain_mifuse.nnet.adapter_objectives import Views
from speechbrain_mifuse.nnet.block_masking import draw_masks
from speechbrain_mifuse.nnet.statistical_attentive_pooling import frame_mask


class LengthBatches(Sampler):
    """Batches of utterances of similar length and about equal numbers of frames, in another order in each epoch.

    Parameters
    ----------
    lengths : sequence of int
        Frames of each utterance.
    frames_per_batch : int
        About how many frames a batch has.
    seed : int
        Decides the order, with the epoch.
    blur : float
        Largest share by which a length is raised at random before utterances are sorted by it.

    Example
    -------
    >>> batches = LengthBatches([10, 100, 11, 90], frames_per_batch=110, seed=1)
    >>> sorted(sorted(batch) for batch in batches)
    [[0, 2, 3], [1]]
    """

    def __init__(self, lengths: Sequence[int], frames_per_batch: int, seed: int, blur: float = 0.05):
        self.lengths = torch.tensor(lengths, dtype=torch.double)
        self.count = math.ceil(sum(lengths) / frames_per_batch)
        self.seed, self.blur, self.epoch = seed, blur, 0

    def set_epoch(self, epoch: int) -> None:
        """Order the utterances anew."""
        self.epoch = epoch

    def __iter__(self):
        # Far enough apart that no epoch of one seed is an epoch of another.
        generator = torch.Generator().manual_seed(self.seed * 100003 + self.epoch)
        blurred = self.lengths * (1 + self.blur * torch.rand(len(self.lengths), generator=generator))
        order = blurred.argsort()
        # An utterance belongs to the part in which its middle lies.
        middle = self.lengths[order].cumsum(0) - self.lengths[order] / 2
        part = (middle / self.lengths.sum() * self.count).long()
        cut = [order[part == number].tolist() for number in range(self.count)]
        return iter([cut[number] for number in torch.randperm(self.count, generator=generator) if cut[number]])

    def __len__(self) -> int:
        return self.count


@register_checkpoint_hooks
class History:
    """The log of each epoch, kept with the checkpoints: curves of a resumed run have no gap."""

    def __init__(self):
        self.rows: list[dict] = []

    @mark_as_saver
    def save(self, path):
        """Write the rows."""
        Path(path).write_text(json.dumps(self.rows))

    @mark_as_loader
    def load(self, path, end_of_epoch):
        """Read the rows."""
        self.rows = json.loads(Path(path).read_text())


class AdapterBrain(ResumableBrain):
    """Train an adapter without labels (arXiv 2509.23795): the weighted sum of its objectives' losses.

    Batches give `id`, `feats`, and a vector for each objective that has prepared some. Every epoch is logged, every
    `log_interval`-th one saved.

    Parameters
    ----------
    modules : dict
        `student`, an `AdapterPretraining`.
    hparams : dict
        Those of `ResumableBrain`, and `ema` (from `ema_copy` of its adapter), `batches` (a `LengthBatches`),
        `schedule` (of the learning rate by step), `vectors` (names of the objectives that have prepared some),
        `mask_share`, `mask_width` (in frames) and `history` (a `History`).
    **options
        See `speechbrain.Brain`.

    Example
    -------
    >>> from types import SimpleNamespace
    >>> student = torch.nn.Module()
    >>> student.objectives = {"mask": SimpleNamespace(weight=1.0), "frame": SimpleNamespace(weight=0.5)}
    >>> brain = AdapterBrain(modules={"student": student})
    >>> brain.statistics = {}
    >>> losses = {"mask": torch.tensor(2.0), "frame": torch.tensor(4.0)}
    >>> brain.compute_objectives(losses, None, sb.Stage.TRAIN).item()
    4.0
    """

    def on_stage_start(self, stage, epoch=None):
        """Seed the epoch, order its batches."""
        super().on_stage_start(stage, epoch)
        self.hparams.batches.set_epoch(epoch)

    def on_fit_batch_start(self, batch, should_step):
        """Set the learning rate of the step."""
        self.hparams.schedule(self.optimizer, self.optimizer_step + 1)

    def compute_forward(self, batch, stage):
        """Give each objective's loss."""
        batch = batch.to(self.device)
        frames, lengths = batch.feats
        layers = None
        if frames.dim() == 4:  # the input's layer, then those that an objective asks for
            frames, layers = frames[:, :, 0], frames[:, :, 1:]
        with torch.no_grad():
            views = self.views(batch, frames, layers, lengths)
        return self.modules.student(views, lengths)

    def views(self, batch, frames, layers, lengths) -> Views:
        """Collect what the objectives compare, but for the student's own part."""
        student = self.modules.student
        true = frame_mask(lengths, frames.shape[1])
        how = (self.hparams.mask_share, self.hparams.mask_width, self.hparams.seed, self.epoch)
        masked, keys = draw_masks(batch.id, true.sum(1).tolist(), *how)
        masked, keys = masked.to(self.device), keys.to(self.device)
        inputs = student.adapter.standardise(frames)
        vectors = {name: getattr(batch, name) for name in student.objectives if name in self.hparams.vectors}
        return Views(
            inputs=inputs,
            true=true,
            masked=masked,
            keys=keys,
            teacher=self.hparams.ema.module.encode(inputs, lengths),
            layers=layers,
            vectors=vectors,
        )

    def compute_objectives(self, predictions, batch, stage):
        """Weigh and add the losses."""
        objectives = self.modules.student.objectives
        total = sum(objectives[name].weight * loss for name, loss in predictions.items())
        self.count(loss=total.detach(), **{name: loss.detach() for name, loss in predictions.items()})
        return total

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """Let the teacher follow the student."""
        if should_step:
            self.hparams.ema.update_parameters(self.modules.student.adapter)

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Log the epoch; save a checkpoint every `log_interval` epochs and at the last one."""
        if stage != sb.Stage.TRAIN:
            return
        means = {name: total / batches for name, (total, batches) in self.statistics.items()}
        row = {**means, **self.modules.student.statistics(), "learning_rate": self.optimizer.param_groups[0]["lr"]}
        self.hparams.history.rows.append({"epoch": epoch, "step": self.optimizer_step, **row})
        self.hparams.train_logger.log_stats({"epoch": epoch}, train_stats=row)
        if epoch % self.hparams.log_interval == 0 or epoch == self.hparams.epoch_counter.limit:
            self.save_epoch(epoch)
