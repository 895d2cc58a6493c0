"""Brains of a classifier on a pretrained adapter or on a baseline in its place, alone or beside zero-shot scores."""

from __future__ import annotations

from speechbrain_mifuse.brains.classifier import ClassifierBrain


class FinetuningBrain(ClassifierBrain):
    """`ClassifierBrain` with a learning rate of its own for the adapter.

    `hparams` must also hold `adapter_learning_rate`.
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
    """`FinetuningBrain` whose classifier also reads each utterance's `scores`."""

    def compute_forward(self, batch, stage):
        """Logits `[batch, C]` of one batch."""
        batch = batch.to(self.device)
        return self.modules.classifier(*self.modules.front(*batch.feats), batch.scores)
