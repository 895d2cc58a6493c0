"""Supervised training of the emotion classifier, on stored frames or with the encoder."""

from __future__ import annotations

import speechbrain as sb
import torch
from torch.nn import functional as F

from speechbrain_mifuse.brains.training import ResumableBrain


def class_weights(labels: torch.Tensor, n_classes: int) -> torch.Tensor:
    """Weights that let each class count the same: `N / (C N_c)`.

    Parameters
    ----------
    labels : torch.Tensor
        `[N]`, class indices of a training set.
    n_classes : int
        C.

    Returns
    -------
    torch.Tensor
        `[C]`; 0 for a class that does not occur.

    Example
    -------
    >>> class_weights(torch.tensor([0, 0, 0, 1]), n_classes=2)
    tensor([0.6667, 2.0000])
    """
    counts = torch.bincount(labels, minlength=n_classes).float()
    return torch.where(counts > 0, len(labels) / (n_classes * counts.clamp(min=1)), 0.0)


class ClassifierBrain(ResumableBrain):
    """Cross-entropy training of an emotion classifier, on stored frames or together with their encoder.

    Parameters
    ----------
    modules : dict
        `front` maps a batch's `feats` to frames `[B, T, D]` and relative lengths `[B]`; `classifier` maps these to
        logits `[B, C]`.
    hparams : dict
        Those of `ResumableBrain`, and `class_weight`, a tensor `[C]` or `None`.
    **options
        See `speechbrain.Brain`.

    Example
    -------
    >>> from types import SimpleNamespace
    >>> brain = ClassifierBrain(hparams={"class_weight": None})
    >>> logits, batch = torch.tensor([[2.0, 0.0], [0.0, 2.0]]), SimpleNamespace(label=torch.tensor([0, 1]))
    >>> round(brain.compute_objectives(logits, batch, sb.Stage.TRAIN).item(), 4)  # log(1 + exp(-2))
    0.1269
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
        """Predict a dataset.

        Parameters
        ----------
        dataset : DynamicItemDataset
            Gives `id` and `feats`.
        **loader
            Options of the data loader, such as those of `frame_batches`.

        Returns
        -------
        dict of str to list of float
            Class probabilities `[C]` by utterance id.
        """
        self.modules.eval()
        found = {}
        for batch in self.make_dataloader(dataset, sb.Stage.TEST, ckpt_prefix=None, **loader):
            probs = self.compute_forward(batch, sb.Stage.TEST).softmax(-1).cpu()
            found.update(zip(batch.id, probs.tolist(), strict=True))
        return found
