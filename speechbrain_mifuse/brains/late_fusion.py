"""The Brain of late fusion: zero-shot scores beside a specialist's frames."""

from __future__ import annotations

from speechbrain_mifuse.brains.finetuning import FinetuningBrain


class FusionBrain(FinetuningBrain):
    """`FinetuningBrain` whose classifier also reads each utterance's `scores`."""

    def compute_forward(self, batch, stage):
        """Logits `[batch, C]` of one batch."""
        batch = batch.to(self.device)
        return self.modules.classifier(*self.modules.front(*batch.feats), batch.scores)
