"""Adapter training without labels (arXiv 2509.23795): mask prediction, self-distillation, local attributes.

The dataset of this module holds frames and, where an objective has prepared some, target vectors. It has no field for
labels.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import speechbrain as sb
import torch
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.nnet.schedulers import WarmCoolDecayLRSchedule
from speechbrain.utils.checkpoints import mark_as_loader, mark_as_saver, register_checkpoint_hooks
from speechbrain.utils.epoch_loop import EpochCounter
from speechbrain.utils.seed import seed_everything
from torch.utils.data import Sampler

from speechbrain_mifuse.adaptation.method import described
from speechbrain_mifuse.brains.train_log import TrainLog
from speechbrain_mifuse.brains.training import ResumableBrain, WholeCheckpointer, fit, same_settings
from speechbrain_mifuse.features.dataset import encoded_rows, frame_batches
from speechbrain_mifuse.nnet.adapter_files import export_adapter
from speechbrain_mifuse.nnet.adapter_objectives import AdapterPretraining, Objective, UtteranceSurvey, Views
from speechbrain_mifuse.nnet.block_masking import draw_masks
from speechbrain_mifuse.nnet.ema import ema_copy, linear_decay
from speechbrain_mifuse.nnet.model_folder import ABOUT
from speechbrain_mifuse.nnet.statistical_attentive_pooling import frame_mask
from speechbrain_mifuse.report.figures import plot_codebook, plot_layer_weights
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.files import file_digest

logger = logging.getLogger(__name__)

# Checkpoints of a run, at most: each holds weights, teacher and optimiser.
CHECKPOINTS = 10
# What decides the pretrained weights, beside network, objectives and data.
DECISIVE = (
    *("number_of_steps", "frames_per_batch", "learning_rate", "warmup", "mask_share", "mask_width"),
    *("ema_start", "ema_end", "pretraining_dropout"),
)


class LengthBatches(Sampler):
    """Batches of utterances of similar length and about equal numbers of frames."""

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
    """What each epoch told, kept with the checkpoints: curves of a resumed run have no gap."""

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
    """Train an adapter without labels.

    `modules.student` is an `AdapterPretraining`. Beyond `ResumableBrain`'s, `hparams` must hold `ema` (from `ema_copy`
    of its adapter), `batches` (a `LengthBatches`), `schedule` (of the learning rate by step), `mask_share`,
    `mask_width` and `history`. Batches give `id`, `feats` and a vector for each objective that has prepared some. Every
    epoch is logged, every `log_interval`-th one saved.
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
        told = {**means, **self.modules.student.statistics(), "learning_rate": self.optimizer.param_groups[0]["lr"]}
        self.hparams.history.rows.append({"epoch": epoch, "step": self.optimizer_step, **told})
        self.hparams.train_logger.log_stats({"epoch": epoch}, train_stats=told)
        if epoch % self.hparams.log_interval == 0 or epoch == self.hparams.epoch_counter.limit:
            self.save_epoch(epoch)


def unlabelled_dataset(
    manifests: Sequence[str | Path],
    front,
    vectors: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    layers: Sequence[int] = (),
) -> DynamicItemDataset:
    """Frames of each utterance of some manifests, without any label."""
    rows = {key: row for path in manifests for key, row in encoded_rows(path, front.store).items()}
    labelled = next((key for key, row in rows.items() if "emo" in row), None)
    if labelled is not None:
        raise UserError(
            f"'{labelled}' comes with a label. Adapter training takes the manifests named *_unlabelled.json."
        )
    vectors = vectors or {}
    data = {
        key: {"wav": row["wav"]} | {name: found[key] for name, found in vectors.items()} for key, row in rows.items()
    }

    def frames(utt_id: str, wav: str) -> torch.Tensor:
        read = front.read(utt_id, wav)
        further = [torch.from_numpy(front.store.frames(utt_id, layer)) for layer in layers]
        return torch.stack([read, *further], dim=1) if further else read

    dataset = DynamicItemDataset(data)
    dataset.add_dynamic_item(frames, takes=["id", "wav"], provides="feats")
    dataset.set_output_keys(["id", "feats", *vectors])
    return dataset


def survey_utterances(
    manifests: Sequence[str | Path], front, prosody: Callable[[], Mapping[str, torch.Tensor]]
) -> tuple[UtteranceSurvey, torch.Tensor, torch.Tensor]:
    """Go through a pretraining set once."""
    rows = {key: row for path in manifests for key, row in encoded_rows(path, front.store).items()}
    means, squares, counts = [], [], []
    for key, row in rows.items():
        frames = front.read(key, row["wav"]).float()
        means.append(frames.mean(0))
        squares.append(frames.square().mean(0))
        counts.append(len(frames))
    means, squares = torch.stack(means).double(), torch.stack(squares).double()
    share = (torch.tensor(counts).double() / sum(counts)).unsqueeze(1)
    mean = (share * means).sum(0)
    deviation = ((share * squares).sum(0) - mean.square()).clamp(min=0).sqrt()
    spread = (squares - means.square()).clamp(min=0).sqrt()
    statistics = torch.cat([means, spread], dim=1).float()
    speakers = [row["speaker"] for row in rows.values()]

    def functionals() -> torch.Tensor:
        found = prosody()
        return torch.stack([found[key] for key in rows])

    return UtteranceSurvey(list(rows), statistics, speakers, functionals), mean.float(), deviation.float()


def pretrain(
    name: str,
    hparams: Mapping,
    manifests: Sequence[str | Path],
    front,
    folder: str | Path,
    seed: int,
    prosody: Callable[[], Mapping[str, torch.Tensor]],
    run_opts: Mapping | None = None,
) -> Path:
    """Pretrain the adapter that `hparams["pretrainings"]` defines under `name`, or find it pretrained.

    An interrupted run resumes. `manifests` have no labels; `prosody` gives prosodic functionals by utterance id,
    should an objective want them. Returns the adapter's folder, for `load_adapter`.
    """
    if name not in hparams["pretrainings"]:
        raise UserError(f"pretraining '{name}' is none of {', '.join(hparams['pretrainings'])}.")
    folder = Path(folder)
    settings = pretraining_settings(name, hparams, manifests, front, seed)
    begun = same_settings(folder / "settings.json", settings)
    if begun and (folder / "adapter" / ABOUT).exists():
        logger.info("%s: adapter is pretrained already, skipped.", folder)
        return folder / "adapter"
    seed_everything(seed)
    brain, dataset = make_brain(name, hparams, manifests, front, folder, seed, prosody, run_opts)
    loader = brain.make_dataloader(
        dataset, sb.Stage.TEST, ckpt_prefix=None, **frame_batches(batch_sampler=brain.hparams.batches)
    )
    fit(brain, loader, f"pretrain {name}")
    finish(brain, folder, {**settings, "utterances": len(dataset)})
    return folder / "adapter"


def finish(brain: AdapterBrain, folder: Path, settings: Mapping) -> None:
    """Write the figures of a pretraining and the adapter, and remove the checkpoints, which are ten times its size."""
    rows, adapter = brain.hparams.history.rows, brain.modules.student.adapter
    plot_codebook(folder / "codebook.png", rows)
    plot_layer_weights(folder / "layer_weights.png", rows)
    told = {**settings, "epochs": len(rows), "steps": brain.optimizer_step, "last_epoch": rows[-1]}
    export_adapter(folder / "adapter", adapter, settings["features"], told)
    shutil.rmtree(folder / "save")


def pretraining_settings(name: str, hparams: Mapping, manifests: Sequence[str | Path], front, seed: int) -> dict:
    """Everything that decides the pretrained weights."""
    objectives = {}
    for key, objective in hparams["pretrainings"][name].items():
        objectives |= described(key, objective)
    digests = [file_digest(path) for path in manifests]
    return {
        "pretraining": name,
        "seed": seed,
        "manifests": digests,
        "features": {**front.fingerprint, "layer": front.layer},
        "network": described("network", hparams["network"]),
        "objectives": objectives,
        **{key: hparams[key] for key in DECISIVE},
    }


def make_brain(
    name, hparams, manifests, front, folder, seed, prosody, run_opts
) -> tuple[AdapterBrain, DynamicItemDataset]:
    """Wire an `AdapterBrain` with its objectives, teacher, batches, logs and checkpointer."""
    folder.mkdir(parents=True, exist_ok=True)
    survey, mean, deviation = survey_utterances(manifests, front, prosody)
    objectives: dict[str, Objective] = {key: make() for key, make in hparams["pretrainings"][name].items()}
    prepared = {key: objective.prepare(survey) for key, objective in objectives.items()}
    vectors = {key: found for key, found in prepared.items() if found is not None}
    adapter = hparams["network"](input_size=front.dim)
    adapter.standardise_by(mean, deviation)
    adapter.set_dropout(hparams["pretraining_dropout"])
    for objective in objectives.values():
        objective.build(front.dim, adapter.output_size)
    student = AdapterPretraining(adapter, objectives)
    layers = sorted({layer for objective in objectives.values() for layer in objective.layers})
    dataset = unlabelled_dataset(manifests, front, vectors, layers)
    lengths = [front.store.rows[key].frames for key in dataset.data_ids]
    batches = LengthBatches(lengths, hparams["frames_per_batch"], seed)
    epochs = math.ceil(hparams["number_of_steps"] / len(batches))
    steps = epochs * len(batches)
    ema = ema_copy(adapter, linear_decay(hparams["ema_start"], hparams["ema_end"], steps))
    counter, history = EpochCounter(epochs), History()
    warm = max(1, round(hparams["warmup"] * steps))
    own = {
        "seed": seed,
        "ema": ema,
        "batches": batches,
        "vectors": sorted(vectors),
        "schedule": WarmCoolDecayLRSchedule(hparams["learning_rate"], warm, steps - warm, steps),
        "mask_share": hparams["mask_share"],
        "mask_width": hparams["mask_width"],
        "epoch_counter": counter,
        "log_interval": math.ceil(epochs / CHECKPOINTS),
        "history": history,
        "train_logger": TrainLog(folder / "train_log.txt"),
    }
    recoverables = {"student": student, "ema": ema, "counter": counter, "history": history}
    brain = AdapterBrain(
        modules={"student": student},
        opt_class=hparams["opt_class"],
        hparams=own,
        run_opts=run_opts,
        checkpointer=WholeCheckpointer(folder / "save", recoverables),
    )
    ema.to(brain.device)
    return brain, dataset
