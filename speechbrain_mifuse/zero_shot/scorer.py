"""Zero-shot scores: cosines between utterances and classes, each class being a mean of its prompts."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

from speechbrain_mifuse.corpora.manifest import read_manifest
from speechbrain_mifuse.features.dataset import pad_frames
from speechbrain_mifuse.features.extract import batched, fill_store
from speechbrain_mifuse.features.store import FeatureStore, StoreError
from speechbrain_mifuse.utils.audio import content_hash
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.zero_shot.audio_text import AudioTextModel
from speechbrain_mifuse.zero_shot.prompts import PromptSet, repeated

logger = logging.getLogger(__name__)


class ReusingReader:
    """A model's reader that takes over what stores of other numbers of repeats hold of the very same input."""

    def __init__(self, model: AudioTextModel, repeats: int, stores: Mapping[int, FeatureStore]):
        self.model, self.repeats, self.taken_over = model, repeats, set()
        self.reader = model.reader(repeats)
        self.encoder = self.reader.encoder
        self.stored = [
            (others, store, {row.audio: key for key, row in store.rows.items()}) for others, store in stores.items()
        ]

    def fingerprint(self) -> dict:
        """Describe what decides the frames; where they come from makes no difference."""
        return self.reader.fingerprint()

    def encode(self, wave: torch.Tensor) -> torch.Tensor:
        """Give the frames of a waveform, from another store if the model would hear the same."""
        audio = content_hash(wave) if self.stored else None
        for others, store, keys in self.stored:
            if audio in keys and self.model.hears_the_same(wave, self.repeats, others):
                self.taken_over.add(audio)
                return torch.from_numpy(store.frames(keys[audio])).float()
        return self.reader.encode(wave)


def embed_manifests(
    model: AudioTextModel,
    manifests: Iterable[str | Path],
    audio_repeats: int,
    base_folder: str | Path | None,
    corpus: str,
    stores: Mapping[int, FeatureStore] | None = None,
) -> FeatureStore:
    """Embed every recording of some manifests that was not embedded yet; an interrupted run resumes.

    Parameters
    ----------
    model : AudioTextModel
        The model.
    manifests : iterable of str or pathlib.Path
        Files of utterances.
    audio_repeats : int
        N, how often each recording is repeated.
    base_folder : str or pathlib.Path, optional
        Where the stores are kept; in the cache by default.
    corpus : str
        In the name of the store's folder.
    stores : mapping of int to FeatureStore, optional
        Stores of other N, whose rows are taken over where the model would hear the same.

    Returns
    -------
    FeatureStore
        One row for each recording that could be read.
    """
    reader = ReusingReader(model, audio_repeats, stores or {})
    # Named as other stores are: a model that reads frames finds those that are there.
    store = fill_store(corpus, manifests, reader, base_folder)
    if reader.taken_over:
        logger.info("%s: N = %d: %d heard before, not encoded again.", corpus, audio_repeats, len(reader.taken_over))
    return store


def class_vectors(model: AudioTextModel, prompts: PromptSet, labels: Sequence[str], text_repeats: int) -> torch.Tensor:
    """Embed classes: t_c = normalise(mean over prompts of normalise(E_text(repeat(prompt_c, M)))).

    Parameters
    ----------
    model : AudioTextModel
        The model.
    prompts : PromptSet
        Forms and words.
    labels : sequence of str
        Classes, in their fixed order.
    text_repeats : int
        M.

    Returns
    -------
    torch.Tensor
        `[C, E]`, of unit norm.

    Raises
    ------
    UserError
        If a label has no words, is none that the model knows, or a repeated prompt is too long for the model.

    Example
    -------
    >>> class Model:
    ...     name, classes_known = "letters", None
    ...     def text_vectors(self, texts):
    ...         return F.normalize(torch.tensor([[float(text.count(c)) for c in "as"] for text in texts]), dim=-1)
    >>> prompts = PromptSet("mine", ("{e}",), {"angry": ("a",), "sad": ("s", "as")})
    >>> class_vectors(Model(), prompts, ["angry", "sad"], text_repeats=2)
    tensor([[1.0000, 0.0000],
            [0.3827, 0.9239]])
    """
    unknown = [label for label in labels if model.classes_known is not None and label not in model.classes_known]
    if unknown:
        raise UserError(
            f"--alm: {model.name} was trained on {', '.join(model.classes_known)}, not {', '.join(unknown)}."
        )
    texts = [[repeated(text, text_repeats) for text in prompts.texts(label)] for label in labels]
    vectors = model.text_vectors([text for group in texts for text in group])
    means = [group.mean(0) for group in vectors.split([len(group) for group in texts])]
    return F.normalize(torch.stack(means), dim=-1)


def audit_texts(
    model: AudioTextModel, prompts: PromptSet, labels: Sequence[str], text_repeats: Sequence[int]
) -> list[dict]:
    """Tell for each number of repeats how long the repeated prompts are and whether the model reads all of them."""
    rows = []
    for times in text_repeats:
        lengths = model.text_lengths([repeated(text, times) for label in labels for text in prompts.texts(label)])
        limit, longest = model.longest_text, max(lengths)
        figures = {"texts": len(lengths), "shortest": min(lengths), "longest": longest, "limit": limit}
        rows.append({"repeats": times, **figures, "fits": limit is None or longest <= limit})
    return rows


def zero_shot_scores(
    model: AudioTextModel, store: FeatureStore, keys: Sequence[str], classes: torch.Tensor, batch_size: int = 256
) -> torch.Tensor:
    """Score utterances: s_c = <a, t_c>.

    Parameters
    ----------
    model : AudioTextModel
        The model.
    store : FeatureStore
        As `embed_manifests` gives; for a model that reads frames, the ordinary store of these frames.
    keys : sequence of str
        Utterance ids.
    classes : torch.Tensor
        `[C, E]`, as `class_vectors` gives.
    batch_size : int
        Utterances at a time; the scores do not depend on it.

    Returns
    -------
    torch.Tensor
        `[keys, C]`: raw cosines in [-1, 1], float32, on the CPU.

    Raises
    ------
    StoreError
        If the store lacks an utterance or the model's layer, or holds several and the model names none.

    Example
    -------
    >>> import tempfile, numpy
    >>> store = FeatureStore(tempfile.mkdtemp(), {"layers": [0], "dim": 2})
    >>> with store.writer() as add:
    ...     add("t-a", numpy.array([[[0.6, 0.8]]]), audio="ab", file=(1, 1))
    >>> class Model:
    ...     layer = 0
    ...     def audio_vectors(self, frames, lengths):
    ...         return frames.squeeze(1)
    >>> zero_shot_scores(Model(), store, ["t-a"], torch.eye(2))
    tensor([[0.6001, 0.7998]])
    """
    if model.layer is None and len(store.layers) > 1:
        raise StoreError(f"{store.folder} holds layers {store.layers}, and {model.name} does not say which it reads.")
    layer = store.layers[0] if model.layer is None else model.layer
    parts = [torch.empty(0, len(classes))]
    for part in batched(keys, batch_size):
        frames, lengths = pad_frames([torch.from_numpy(store.frames(key, layer)) for key in part])
        with torch.no_grad():
            parts.append(model.audio_vectors(frames, lengths).cpu() @ classes.T)
    return torch.cat(parts)


def zero_shot_predictions(scores: torch.Tensor) -> torch.Tensor:
    """Decide for the class of the highest score: `[N, C]` to `[N]`."""
    return scores.argmax(dim=-1)


def normalise_scores(scores: torch.Tensor, reference_scores: torch.Tensor) -> torch.Tensor:
    """Standardize every class's scores by their mean and deviation over a reference set: `z_c = (s_c - m_c) / d_c`.

    Parameters
    ----------
    scores : torch.Tensor
        `[N, C]`.
    reference_scores : torch.Tensor
        `[R, C]`, of unlabeled utterances of the same corpus.

    Returns
    -------
    torch.Tensor
        `[N, C]`.

    Raises
    ------
    UserError
        If there are fewer than two reference utterances.

    Example
    -------
    >>> reference = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    >>> normalise_scores(torch.tensor([[4.0, 6.0]]), reference).tolist()
    [[2.0, 1.0]]
    """
    if len(reference_scores) < 2:
        raise UserError(f"Scores of {len(reference_scores)} utterances have no deviation: take two or more.")
    deviation = reference_scores.std(0, correction=0)
    return (scores - reference_scores.mean(0)) / torch.where(deviation > 0, deviation, torch.ones_like(deviation))


class AmplifiedScores(NamedTuple):
    """Scores `[keys, C]` of some utterances at one number of repeats of the audio (N) and of the text (M)."""

    audio_repeats: int
    text_repeats: int
    keys: tuple[str, ...]
    scores: torch.Tensor


def amplification_grid(
    model: AudioTextModel,
    prompts: PromptSet,
    labels: Sequence[str],
    manifests: Iterable[str | Path],
    audio_repeats: Sequence[int],
    text_repeats: Sequence[int],
    base_folder: str | Path | None,
    corpus: str,
) -> Iterator[AmplifiedScores]:
    """Score utterances at every number of repeats of the audio (N) and of the text (M).

    Parameters
    ----------
    model, prompts, labels
        As for `class_vectors`.
    manifests, base_folder, corpus
        As for `embed_manifests`.
    audio_repeats, text_repeats : sequence of int
        Values of N and of M.

    Yields
    ------
    AmplifiedScores
        One for each pair of N and M.

    Raises
    ------
    UserError
        If there is no N or no M.
    """
    if not audio_repeats or not text_repeats:
        asked = f"--audio_repeats {list(audio_repeats)}, --text_repeats {list(text_repeats)}"
        raise UserError(f"{asked}: give at least one number each.")
    manifests, stores = list(manifests), {}
    classes = [class_vectors(model, prompts, labels, times) for times in text_repeats]
    wanted = list(dict.fromkeys(key for manifest in manifests for key in read_manifest(manifest)))
    for times in audio_repeats:
        stores[times] = embed_manifests(model, manifests, times, base_folder, corpus, stores)
        keys = tuple(key for key in wanted if key in stores[times])
        scores = zero_shot_scores(model, stores[times], keys, torch.cat(classes))
        for text_times, part in zip(text_repeats, scores.split(len(labels), dim=1), strict=True):
            yield AmplifiedScores(times, text_times, keys, part)
