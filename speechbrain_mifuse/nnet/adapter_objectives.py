"""What an adapter is pretrained towards: one object per objective, each with its weight, head and state.

A recipe's YAML names the objectives of a run; a new one is a class here and an entry there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from speechbrain_mifuse.nnet.adapter_losses import (
    frame_distillation,
    local_attribute_prediction,
    mask_prediction,
    mean_frame,
    unit_frames,
    utterance_distillation,
)
from speechbrain_mifuse.nnet.local_attributes import LocalAttributes
from speechbrain_mifuse.nnet.wap_transformer import WAPTransformer


@dataclass(frozen=True)
class Views:
    """One batch as the student and the teacher see it; `toy_views` makes a small one."""

    # [batch, frames, D]: the encoder's frames, standardized and not masked.
    inputs: torch.Tensor
    # [batch, frames], bool: frames that are no padding; those that the student does not see.
    true: torch.Tensor
    masked: torch.Tensor
    # [batch, frames]: a random number of each true frame.
    keys: torch.Tensor
    # [batch, frames, d]: of the EMA teacher, which sees everything; of the student, which sees the masked input.
    teacher: torch.Tensor
    student: torch.Tensor | None = None
    # [batch, frames, layers, D]: further layers of the encoder, where an objective asks for them.
    layers: torch.Tensor | None = None
    # [batch, V] by the objective's name, where an objective has prepared some.
    vectors: Mapping[str, torch.Tensor] = field(default_factory=dict)


def toy_views(dim: int = 4) -> Views:
    """Make two utterances of six frames, two of each masked, for examples."""
    generator = torch.Generator().manual_seed(0)
    inputs, teacher, student = torch.randn(3, 2, 6, dim, generator=generator)
    true = torch.ones(2, 6, dtype=torch.bool)
    masked = torch.zeros_like(true)
    masked[:, 2:4] = True
    keys = torch.rand(2, 6, generator=generator)
    return Views(inputs, true, masked, keys, teacher, student)


class Objective(nn.Module):
    """Base of the objectives.

    Parameters
    ----------
    weight : float
        Of its loss in the sum.

    Attributes
    ----------
    layers : tuple of int
        Encoder layers that its targets need beyond the input's.
    """

    layers: Sequence[int] = ()

    def __init__(self, weight: float = 1.0):
        super().__init__()
        self.weight = weight

    def prepare(self, survey) -> Mapping[str, torch.Tensor] | None:
        """Look at the pretraining set before `build`; may give a target vector by utterance id."""
        return None

    def build(self, input_size: int, d_model: int) -> None:
        """Make what is trained."""

    def forward(self, views: Views, name: str) -> torch.Tensor:
        """Give the loss of a batch, before its weight; `name` is the objective's own."""
        raise NotImplementedError

    def statistics(self) -> dict[str, float]:
        """Give what happened since the last call, by name, for the log."""
        return {}


class MaskPrediction(Objective):
    """`L_mask`: regress the encoder's own frames under the mask; see `adapter_losses.mask_prediction`.

    Example
    -------
    >>> objective = MaskPrediction()
    >>> objective.build(4, 4)
    >>> objective(toy_views(), "mask").shape
    torch.Size([])
    """

    def build(self, input_size: int, d_model: int) -> None:
        """Make the head; see `Objective.build`."""
        self.head = nn.Linear(d_model, input_size)

    def forward(self, views: Views, name: str) -> torch.Tensor:
        """Compare head and input; see `Objective.forward`."""
        return mask_prediction(self.head(views.student), views.inputs, views.masked)


class LayerPrediction(MaskPrediction):
    """`L_mask` with the mean of several encoder layers as target, each normalised by itself (as data2vec averages).

    Its control is the same objective with the input's layer alone.

    Parameters
    ----------
    layers : sequence of int
        Layers of the encoder; they must be in the feature store (`encoder_layers`).
    weight : float
        Of its loss.

    Example
    -------
    >>> import dataclasses
    >>> objective = LayerPrediction(layers=[2, 3])
    >>> objective.build(4, 4)
    >>> objective(dataclasses.replace(toy_views(), layers=torch.randn(2, 6, 2, 4)), "layers").shape
    torch.Size([])
    """

    def __init__(self, layers: Sequence[int], weight: float = 1.0):
        super().__init__(weight)
        self.layers = tuple(layers)

    def forward(self, views: Views, name: str) -> torch.Tensor:
        """Compare head and layers; see `Objective.forward`."""
        target = unit_frames(views.layers).mean(2)
        return mask_prediction(self.head(views.student), target, views.masked)


class FrameDistillation(Objective):
    """Frame part of `L_sd`; see `adapter_losses.frame_distillation`.

    Example
    -------
    >>> objective = FrameDistillation()
    >>> objective.build(4, 4)
    >>> objective(toy_views(), "frames").shape
    torch.Size([])
    """

    def build(self, input_size: int, d_model: int) -> None:
        """Make the head; see `Objective.build`."""
        self.head = nn.Linear(d_model, d_model)

    def forward(self, views: Views, name: str) -> torch.Tensor:
        """Compare head and teacher; see `Objective.forward`."""
        return frame_distillation(self.head(views.student), views.teacher, views.true)


class UtteranceDistillation(Objective):
    """Utterance part of `L_sd`: the student's mean frame agrees with the teacher's, normalised.

    Example
    -------
    >>> objective = UtteranceDistillation()
    >>> objective.build(4, 4)
    >>> objective(toy_views(), "utterances").shape
    torch.Size([])
    """

    def build(self, input_size: int, d_model: int) -> None:
        """Make the head; see `Objective.build`."""
        self.head = nn.Linear(d_model, d_model)

    def forward(self, views: Views, name: str) -> torch.Tensor:
        """Compare head and teacher; see `Objective.forward`."""
        target = unit_frames(mean_frame(views.teacher, views.true))
        predicted = self.head(mean_frame(views.student, views.true))
        return utterance_distillation(predicted, target)


class LocalAttributePrediction(Objective):
    """`L_la`: name the cluster of the teacher's frame under the mask; see `LocalAttributes`.

    With a `span` above 1 attributes belong to spans of that many neighbouring frames: the means of teacher and student
    over a span take the place of frames, and a span counts as masked when more than half of its frames are. The control
    of that is a span of 1, the paper's form.

    Parameters
    ----------
    weight : float
        Of its loss.
    size : int
        Codes.
    decay, dead_share : float
        As for `LocalAttributes`.
    span : int
        Frames that share an attribute.

    Example
    -------
    >>> objective = LocalAttributePrediction(size=3, span=2)
    >>> objective.build(4, 4)
    >>> objective(toy_views(), "attributes").shape, sorted(objective.statistics())
    (torch.Size([]), ['codebook_perplexity', 'codes_reseeded', 'codes_used'])
    """

    def __init__(
        self, weight: float = 1.0, size: int = 256, decay: float = 0.9, dead_share: float = 0.02, span: int = 1
    ):
        super().__init__(weight)
        self.size, self.decay, self.dead_share, self.span = size, decay, dead_share, span

    def build(self, input_size: int, d_model: int) -> None:
        """Make codebook and head; see `Objective.build`."""
        self.attributes = LocalAttributes(d_model, self.size, self.decay, self.dead_share)
        self.head = nn.Linear(d_model, self.size)

    def forward(self, views: Views, name: str) -> torch.Tensor:
        """Update the codebook and compare; see `Objective.forward`."""
        true, masked, keys = views.true, views.masked, views.keys
        teacher, student = views.teacher, views.student
        if self.span > 1:
            teacher, student = span_means(teacher, true, self.span), span_means(student, true, self.span)
            covered = span_counts(masked, self.span) * 2 > span_counts(true, self.span)
            true, masked, keys = span_counts(true, self.span) > 0, covered, keys[:, :: self.span]
        found = self.attributes.update(unit_frames(teacher)[true], keys[true])
        attributes = torch.zeros(true.shape, dtype=torch.long, device=true.device)
        attributes[true] = found
        return local_attribute_prediction(self.head(student), attributes, masked)

    def statistics(self) -> dict[str, float]:
        """Use of the codebook; see `LocalAttributes.statistics`."""
        return self.attributes.statistics()


def span_counts(chosen: torch.Tensor, span: int) -> torch.Tensor:
    """Count the chosen frames of each span, `[batch, ceil(frames / span)]`; the last span may be a short one.

    Example
    -------
    >>> span_counts(torch.tensor([[True, False, True, True, True]]), 2).tolist()
    [[1, 2, 1]]
    """
    short = -chosen.shape[1] % span
    return nn.functional.pad(chosen, (0, short)).unflatten(1, (-1, span)).sum(-1)


def span_means(frames: torch.Tensor, true: torch.Tensor, span: int) -> torch.Tensor:
    """Average each span's true frames, `[batch, ceil(frames / span), D]`.

    Example
    -------
    >>> span_means(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.ones(1, 3).bool(), 2).flatten().tolist()
    [2.0, 9.0]
    """
    kept = frames.masked_fill(~true.unsqueeze(-1), 0.0)
    short = -frames.shape[1] % span
    total = nn.functional.pad(kept, (0, 0, 0, short)).unflatten(1, (-1, span)).sum(2)
    return total / span_counts(true, span).clamp(min=1).unsqueeze(-1)


@dataclass(frozen=True)
class UtteranceSurvey:
    """What is known of each utterance of a pretraining set: no label."""

    ids: Sequence[str]
    # [N, 2 D]: mean and standard deviation of the encoder's frames.
    statistics: torch.Tensor
    speakers: Sequence[str]
    # Gives prosodic functionals [N, P]; a function, so that only who asks pays.
    prosody: Callable[[], torch.Tensor]


def corpus_centred(vectors: torch.Tensor, speakers: Sequence[str]) -> torch.Tensor:
    """Vectors less the mean of all: what is left also tells who speaks.

    Parameters
    ----------
    vectors : torch.Tensor
        `[N, V]`.
    speakers : sequence of str
        Not looked at.

    Returns
    -------
    torch.Tensor
        `[N, V]`.

    Example
    -------
    >>> corpus_centred(torch.tensor([[1.0], [3.0]]), ["a", "b"]).tolist()
    [[-1.0], [1.0]]
    """
    return vectors - vectors.mean(0)


def speaker_centred(vectors: torch.Tensor, speakers: Sequence[str]) -> torch.Tensor:
    """Vectors less the mean of their speaker's: what is left tells how something is said.

    A speaker with a single utterance is left with nothing. Where each speaker has one emotion, emotion goes with it.

    Parameters
    ----------
    vectors : torch.Tensor
        `[N, V]`.
    speakers : sequence of str
        `[N]`.

    Returns
    -------
    torch.Tensor
        `[N, V]`.

    Example
    -------
    >>> speaker_centred(torch.tensor([[1.0], [3.0], [9.0]]), ["a", "a", "b"]).tolist()
    [[-1.0], [1.0], [0.0]]
    """
    names = {name: place for place, name in enumerate(sorted(set(speakers)))}
    whose = torch.tensor([names[speaker] for speaker in speakers])
    total = torch.zeros(len(names), vectors.shape[1]).index_add_(0, whose, vectors)
    return vectors - (total / torch.bincount(whose).unsqueeze(1))[whose]


def _component_targets(vectors: torch.Tensor, count: int) -> torch.Tensor:
    """Give leading principal components `[N, count]` of centred, standardized vectors, of variance 1 on average."""
    standardised = vectors / vectors.std(0, correction=0).clamp(min=1e-6)
    left, values, _ = torch.linalg.svd(standardised, full_matrices=False)
    scores = left[:, :count] * values[:count]
    return scores / scores.square().mean().sqrt().clamp(min=1e-6)


class UtteranceStatistics(Objective):
    """Regress a vector of the whole, unmasked utterance from the masked one. Ours, not the paper's.

    The vector holds principal components of the encoder's mean and standard deviation and, if asked for, of prosodic
    functionals; both less what `centre` takes away. With `speaker_centred` this is *speaker-centred utterance
    distillation*, which needs speaker ids and no label; its controls are `corpus_centred` and
    `PermutedUtteranceStatistics`.

    Parameters
    ----------
    weight : float
        Of its loss.
    centre : callable
        `speaker_centred` or `corpus_centred`.
    components, prosody_components : int
        Principal components of the encoder's statistics and of the prosodic functionals; 0 for none.

    Example
    -------
    >>> import dataclasses
    >>> objective = UtteranceStatistics(components=3, prosody_components=0)
    >>> survey = UtteranceSurvey(["t-a", "t-b"], torch.randn(2, 8), ["1", "1"], prosody=None)
    >>> targets = objective.prepare(survey)
    >>> objective.build(4, 4)
    >>> vectors = {"utt": torch.stack([targets["t-a"], targets["t-b"]])}
    >>> objective(dataclasses.replace(toy_views(), vectors=vectors), "utt").shape
    torch.Size([])
    """

    def __init__(
        self,
        weight: float = 1.0,
        centre: Callable[[torch.Tensor, Sequence[str]], torch.Tensor] = speaker_centred,
        components: int = 64,
        prosody_components: int = 24,
    ):
        super().__init__(weight)
        self.centre, self.components, self.prosody_components = centre, components, prosody_components

    def prepare(self, survey: UtteranceSurvey) -> dict[str, torch.Tensor]:
        """Compute the targets; see `Objective.prepare`."""
        parts = []
        if self.components:
            parts.append(_component_targets(self.centre(survey.statistics, survey.speakers), self.components))
        if self.prosody_components:
            prosody = self.centre(survey.prosody(), survey.speakers)
            parts.append(_component_targets(prosody, self.prosody_components))
        vectors = self.dealt(torch.cat(parts, dim=1))
        self.size = vectors.shape[1]
        return dict(zip(survey.ids, vectors, strict=True))

    def dealt(self, vectors: torch.Tensor) -> torch.Tensor:
        """Give each utterance a target `[N, V]`: its own."""
        return vectors

    def build(self, input_size: int, d_model: int) -> None:
        """Make the head; see `Objective.build`."""
        self.head = nn.Linear(2 * d_model, self.size)

    def forward(self, views: Views, name: str) -> torch.Tensor:
        """Compare head and target; see `Objective.forward`."""
        mean = mean_frame(views.student, views.true)
        squares = mean_frame((views.student.float() - mean.unsqueeze(1)).square(), views.true)
        pooled = torch.cat([mean, squares.clamp(min=1e-6).sqrt()], dim=-1)
        return utterance_distillation(self.head(pooled), views.vectors[name])


class PermutedUtteranceStatistics(UtteranceStatistics):
    """Control of `UtteranceStatistics`: every utterance gets another one's target.

    Parameters
    ----------
    weight, centre, components, prosody_components
        As for `UtteranceStatistics`.

    Example
    -------
    >>> PermutedUtteranceStatistics().dealt(torch.tensor([[1.0], [2.0], [3.0]])).flatten().tolist() != [1.0, 2.0, 3.0]
    True
    """

    def dealt(self, vectors: torch.Tensor) -> torch.Tensor:
        """Shuffle, and turn by one: no utterance keeps its own; see `UtteranceStatistics.dealt`."""
        order = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))
        dealt = torch.empty_like(vectors)
        dealt[order] = vectors[order.roll(1)]
        return dealt


class AdapterPretraining(nn.Module):
    """The student: adapter, what stands in the place of a masked frame, and the objectives.

    Parameters
    ----------
    adapter : WAPTransformer
        What is pretrained.
    objectives : mapping of str to Objective
        By the name under which their loss is logged; already built.

    Example
    -------
    >>> objective = MaskPrediction()
    >>> objective.build(4, 4)
    >>> student = AdapterPretraining(WAPTransformer(4, n_heads=2), {"mask": objective})
    >>> losses = student(toy_views(), torch.ones(2))
    >>> sorted(losses), losses["mask"].ndim
    (['mask'], 0)
    """

    def __init__(self, adapter: WAPTransformer, objectives: Mapping[str, Objective]):
        super().__init__()
        self.adapter, self.objectives = adapter, nn.ModuleDict(objectives)
        self.mask_frame = nn.Parameter(torch.zeros(adapter.sizes["input_size"]))

    def forward(self, views: Views, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        """Give the losses of a batch by the objective's name, each before its weight."""
        seen = torch.where(views.masked.unsqueeze(-1), self.mask_frame, views.inputs)
        views = replace(views, student=self.adapter.encode(seen, lengths))
        return {name: objective(views, name) for name, objective in self.objectives.items()}

    def statistics(self) -> dict[str, float]:
        """Give layer weights and what the objectives log."""
        weights = {f"layer_{place}": w for place, w in enumerate(self.adapter.layer_weights.tolist(), start=1)}
        told = [objective.statistics() for objective in self.objectives.values()]
        return weights | {name: value for part in told for name, value in part.items()}
