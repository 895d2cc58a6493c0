"""Supervised training of the emotion classifier, on stored frames or with the encoder."""

from __future__ import annotations

import speechbrain as sb
import torch
from torch.nn import functional as F

from speechbrain_mifuse.brains.training import ResumableBrain


def class_weights(labels: torch.Tensor, n_classes: int) -> torch.Tensor:
    """Weights that let each class count the same: `N / (C N_c)`."""
    counts = torch.bincount(labels, minlength=n_classes).float()
    return torch.where(counts > 0, len(labels) / (n_classes * counts.clamp(min=1)), 0.0)


class ClassifierBrain(ResumableBrain):
    """Cross-entropy training of `modules.front` and `modules.classifier`.

    Beyond `ResumableBrain`'s, `hparams` must hold `class_weight`: `[C]` or `None`.
    """

    def compute_forward(self, batch, stage):
        """Logits `[batch, C]` of one batch."""
        batch = batch.to(self.device)
        return self.modules.classifier(*self.modules.front(*batch.feats))

    def compute_objectives(self, predictions, batch, stage):
        """Cross-entropy, weighted by class if asked for."""
        weight = self.hparams.class_weight
        return F.cross_entropy(predictions, batch.label, weight=None if weight is None else weight.to(self.device))

    @torch.inference_mode()
    def predict(self, dataset, **loader) -> dict[str, list[float]]:
        """Give class probabilities `[C]` of every utterance by its id."""
        self.modules.eval()
        found = {}
        for batch in self.make_dataloader(dataset, sb.Stage.TEST, ckpt_prefix=None, **loader):
            probs = self.compute_forward(batch, sb.Stage.TEST).softmax(-1).cpu()
            found.update(zip(batch.id, probs.tolist(), strict=True))
        return found
