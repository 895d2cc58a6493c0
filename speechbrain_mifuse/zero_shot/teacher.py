"""An audio-text model as a teacher: stochastic class distributions from prompts drawn at random, without any API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional as F

from speechbrain_mifuse.features.store import FeatureStore
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.zero_shot.audio_text import AudioTextModel
from speechbrain_mifuse.zero_shot.prompts import PromptSet
from speechbrain_mifuse.zero_shot.scorer import normalise_scores, zero_shot_scores


def drawn_classes(
    vectors: Mapping[str, torch.Tensor], labels: Sequence[str], count: int, dice: torch.Generator
) -> torch.Tensor:
    """Draw prompts with replacement, as many as each class has, and average them to one vector a class."""
    drawn = []
    for label in labels:
        prompts = vectors[label]
        chosen = torch.randint(len(prompts), (count, len(prompts)), generator=dice)
        drawn.append(prompts[chosen].mean(1))
    return F.normalize(torch.stack(drawn, dim=1), dim=-1)


def teacher_samples(
    model: AudioTextModel,
    store: FeatureStore,
    keys: Sequence[str],
    prompts: PromptSet,
    labels: Sequence[str],
    k: int,
    seed: int,
    reference: Sequence[str],
) -> torch.Tensor:
    """Draw K class distributions for each utterance: `softmax(z)`, `z` the standardized cosines of drawn prompts.

    Parameters
    ----------
    model : AudioTextModel
        The model.
    store : FeatureStore
        What it heard, as `scorer.embed_manifests` gives.
    keys : sequence of str
        N utterance ids.
    prompts : PromptSet
        Each answer draws from these with replacement, as many as a class has.
    labels : sequence of str
        C classes.
    k : int
        K.
    seed : int
        Of the draws.
    reference : sequence of str
        Utterances over which each class's cosines are standardized, see `scorer.normalise_scores`.

    Returns
    -------
    torch.Tensor
        `[N, K, C]`.

    Raises
    ------
    UserError
        If the model does not know a label, or there are fewer than two reference utterances.
    """
    unknown = [label for label in labels if model.classes_known is not None and label not in model.classes_known]
    if unknown:
        raise UserError(
            f"--teacher_alm: {model.name} knows {', '.join(model.classes_known)}, not {', '.join(unknown)}."
        )
    vectors = {label: model.text_vectors(prompts.texts(label)) for label in labels}
    classes = drawn_classes(vectors, labels, k, torch.Generator().manual_seed(seed)).flatten(0, 1)
    scores = zero_shot_scores(model, store, keys, classes)
    scores = normalise_scores(scores, zero_shot_scores(model, store, reference, classes))
    return scores.unflatten(1, (k, len(labels))).softmax(-1)
