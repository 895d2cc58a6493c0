"""Brains of a classifier on a pretrained adapter or on a baseline in its place, alone or beside zero-shot scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.epoch_loop import EpochCounter

from speechbrain_mifuse.brains.classifier import ClassifierBrain, class_weights
from speechbrain_mifuse.brains.train_log import TrainLog

# Lines of the log and checkpoints of a run, at most.
LOG_POINTS = 3


class FinetuningBrain(ClassifierBrain):
    """`ClassifierBrain` whose adapter is trained at a learning rate of its own.

    Parameters
    ----------
    modules : dict
        As for `ClassifierBrain`; the classifier's part named `adapter` is the adapter, if it has one.
    hparams : dict
        Those of `ClassifierBrain`, and `adapter_learning_rate`.
    **options
        See `speechbrain.Brain`; a checkpointer is needed.

    Example
    -------
    >>> import functools, tempfile
    >>> from speechbrain.utils.checkpoints import Checkpointer
    >>> classifier = torch.nn.ModuleDict({"adapter": torch.nn.Linear(2, 2), "output": torch.nn.Linear(2, 3)})
    >>> brain = FinetuningBrain(
    ...     modules={"classifier": classifier},
    ...     opt_class=functools.partial(torch.optim.AdamW, lr=0.001),
    ...     hparams={"adapter_learning_rate": 0.0001},
    ...     checkpointer=Checkpointer(tempfile.mkdtemp()),
    ... )
    >>> brain.init_optimizers()
    >>> [group["lr"] for group in brain.optimizer.param_groups]
    [0.0001, 0.001]
    """

    def init_optimizers(self):
        """Group the parameters: adapter, then the rest; see `sb.Brain.init_optimizers`."""
        named = [item for item in self.modules.named_parameters() if item[1].requires_grad]
        adapter = [value for name, value in named if ".adapter." in name]
        rest = [value for name, value in named if ".adapter." not in name]
        # SpeechBrain clips the gradient of the first group alone: the adapter's, where there is one.
        groups = [{"params": adapter, "lr": self.hparams.adapter_learning_rate}] if adapter else []
        self.optimizer = self.opt_class([*groups, {"params": rest}])
        self.optimizers_dict = {"opt_class": self.optimizer}
        self.checkpointer.add_recoverable("optimizer", self.optimizer)


class FusionBrain(FinetuningBrain):
    """`FinetuningBrain` of a late fusion, whose classifier also reads each utterance's zero-shot `scores`.

    Parameters
    ----------
    modules : dict
        As for `FinetuningBrain`; `classifier` also takes scores `[B, S]`, such as `LateFusion` does.
    hparams : dict
        Those of `FinetuningBrain`.
    **options
        See `speechbrain.Brain`.

    Example
    -------
    >>> from speechbrain.dataio.batch import PaddedBatch
    >>> from speechbrain_mifuse.nnet.adapter_classifier import AdapterClassifier
    >>> from speechbrain_mifuse.nnet.late_fusion import LateFusion
    >>> class Same(torch.nn.Module):
    ...     def forward(self, frames, lengths):
    ...         return frames, lengths
    >>> fusion = LateFusion(AdapterClassifier(8, 4), score_classes=[0, 1, 3], n_classes=4)
    >>> brain = FusionBrain(modules={"front": Same(), "classifier": fusion}, hparams={"class_weight": None})
    >>> rows = [{"id": key, "feats": torch.randn(5, 8), "scores": torch.zeros(3)} for key in "ab"]
    >>> batch = PaddedBatch(rows, padded_keys=["feats"])
    >>> brain.compute_forward(batch, "test").shape
    torch.Size([2, 4])
    """

    def compute_forward(self, batch, stage):
        """Logits `[batch, C]` of one batch."""
        batch = batch.to(self.device)
        return self.modules.classifier(*self.modules.front(*batch.feats), batch.scores)


def finetuning_hparams(settings: Mapping, train: DynamicItemDataset, seed: int, folder: Path) -> dict:
    """Derive the `hparams` of a `FinetuningBrain`: as many epochs as make the steps asked for, and class weights."""
    steps_per_epoch = max(len(train) // min(settings["finetuning_batch_size"], len(train)), 1)
    epoch_counter = EpochCounter(math.ceil(settings["finetuning_steps"] / steps_per_epoch))
    labels = torch.tensor([row["label"] for row in train.data.values()])
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "seed": seed,
        "class_weight": class_weights(labels, len(settings["labels"])) if settings["class_balanced"] else None,
        "adapter_learning_rate": settings["adapter_learning_rate"],
        "epoch_counter": epoch_counter,
        "log_interval": math.ceil(epoch_counter.limit / LOG_POINTS),
        "train_logger": TrainLog(folder / "train_log.txt"),
    }
