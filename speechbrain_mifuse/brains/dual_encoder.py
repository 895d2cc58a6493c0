"""Contrastive training of a dual encoder on captions of labelled corpora, never of the target."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from speechbrain_mifuse.brains.training import ResumableBrain
from speechbrain_mifuse.nnet.dual_encoder import contrastive_loss
from speechbrain_mifuse.zero_shot.captions import draw_caption


@dataclass(frozen=True)
class Source:
    """A labelled corpus that a dual encoder is trained on."""

    prepare: Callable[[], None]
    manifests: str
    gender: Callable[[str], str | None] | None = None

    def manifest(self, split: str) -> Path:
        """Path of a split."""
        return Path(self.manifests) / f"{split}.json"

    def gender_of(self, row: Mapping) -> str | None:
        """Gender of an utterance's speaker."""
        return self.gender(row["speaker"]) if self.gender and row.get("speaker_known", True) else None


class Captioner:
    """The captions of a training set, embedded once, and which of them each utterance gets in an epoch.

    Parameters
    ----------
    fitting : mapping of str to sequence of str
        Captions that fit an utterance, by its id.
    encode : callable
        Embeds a list of N texts, `[N, D]`.
    seed : int
        Of the draws.

    Example
    -------
    >>> captioner = Captioner({"a": ["I am sad.", "sad!"], "b": ["sad!"]}, lambda texts: torch.eye(len(texts)), seed=1)
    >>> captioner.texts, captioner.draw(["b"], epoch=1).tolist()
    (['I am sad.', 'sad!'], [1])
    """

    def __init__(self, fitting: Mapping[str, Sequence[str]], encode: Callable, seed: int):
        self.texts = list(dict.fromkeys(text for texts in fitting.values() for text in texts))
        place = {text: number for number, text in enumerate(self.texts)}
        # Utterances of one label and gender share a list.
        places = {texts: [place[text] for text in texts] for texts in {tuple(some) for some in fitting.values()}}
        self.fitting = {key: places[tuple(texts)] for key, texts in fitting.items()}
        self.vectors, self.seed = encode(self.texts), seed

    def draw(self, keys: Sequence[str], epoch: int) -> torch.Tensor:
        """Draw a caption for each utterance."""
        fitting = [self.fitting[key] for key in keys]
        drawn = [some[draw_caption(len(some), self.seed, epoch, key)] for key, some in zip(keys, fitting, strict=True)]
        return torch.tensor(drawn)


# Which pairs of a batch are positives of each other: number of the group by place of the caption and class index.
POSITIVES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "caption": lambda captions, labels: captions,
    "label": lambda captions, labels: labels,
}


class DualEncoderBrain(ResumableBrain):
    """Contrastive training of a dual encoder of speech and captions; see `contrastive_loss` for the equation.

    Batches give `id`, `pooled` (what `frame_statistics` makes of frames) and `label`.

    Parameters
    ----------
    modules : dict
        `dual_encoder`, a `DualEncoder`.
    hparams : dict
        Those of `ResumableBrain`, and `captioner` (a `Captioner`), `class_weight` (a tensor `[C]`), and `groups` (a
        value of `POSITIVES`).
    **options
        See `speechbrain.Brain`.

    Example
    -------
    >>> from types import SimpleNamespace
    >>> brain = DualEncoderBrain(hparams={"class_weight": torch.ones(2), "groups": POSITIVES["label"]})
    >>> brain.statistics = {}
    >>> vectors, drawn = torch.eye(2), torch.tensor([0, 1])
    >>> predictions = (vectors, vectors, torch.tensor(2.0), drawn)  # audio, text, scale, captions
    >>> batch = SimpleNamespace(label=torch.tensor([0, 1]))
    >>> round(brain.compute_objectives(predictions, batch, "train").item(), 4)  # log(1 + exp(-2))
    0.1269
    """

    def compute_forward(self, batch, stage):
        """Vectors of both sides, scale, and the captions drawn."""
        batch = batch.to(self.device)
        captioner = self.hparams.captioner
        drawn = captioner.draw(batch.id, self.epoch)
        return *self.modules.dual_encoder(batch.pooled, captioner.vectors[drawn].to(self.device)), drawn

    def compute_objectives(self, predictions, batch, stage):
        """Contrastive loss."""
        audio, text, scale, drawn = predictions
        groups = self.hparams.groups(drawn.to(self.device), batch.label)
        self.count(scale=scale.detach())
        return contrastive_loss(audio, text, groups, scale, self.hparams.class_weight.to(self.device)[batch.label])

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """Keep the temperature within its bounds."""
        if should_step:
            self.modules.dual_encoder.clamp_scale()
