"""Speaker normalisation of stored frames: each speaker's mean, shrunk by how little is known of it, is subtracted.

An option, never a silent default. It reads manifests without labels, one split at a time, and is transductive: the
offset of a test speaker comes from all of that speaker's unlabelled test utterances.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from scipy.cluster.vq import kmeans2

from speechbrain_mifuse.corpora.checks import MANY
from speechbrain_mifuse.corpora.manifest import read_manifest
from speechbrain_mifuse.features.store import FeatureStore, StoreError
from speechbrain_mifuse.utils.audio import load_audio
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.files import atomic_write
from speechbrain_mifuse.utils.progress import progress

logger = logging.getLogger(__name__)

# Part of the name of cached offsets: to be raised when the arithmetic changes.
VERSION = 1
RESTARTS, ITERATIONS = 5, 50
TRANSDUCTIVE = "transductive: for a test utterance from all unlabelled test utterances of its {of}"


def shrunken_offsets(sums: torch.Tensor, counts: torch.Tensor, strength: float) -> torch.Tensor:
    """Offset of each speaker: `n_s / (n_s + strength) * (mean_s - mean)`, the shrinkage of empirical Bayes.

    A speaker heard once keeps nearly all that sets the utterance apart, its emotion included; one heard often is
    centred on the mean of all.

    Parameters
    ----------
    sums : torch.Tensor
        `[S, ...]`, sum over each speaker's utterances of their mean frames. Row 0 holds the recordings whose speaker
        is not known: they count for the mean of all and get no offset.
    counts : torch.Tensor
        `[S]`, utterances of each.
    strength : float
        Utterances at which half of the difference is subtracted; 0 subtracts all of it.

    Returns
    -------
    torch.Tensor
        `[S, ...]`; zeros in row 0.

    Example
    -------
    >>> sums, counts = torch.tensor([[0.0], [6.0], [6.0]]), torch.tensor([0, 3, 1])
    >>> shrunken_offsets(sums, counts, strength=1.0).flatten().tolist()  # means 2 and 6, of all 3
    [0.0, -0.75, 1.5]
    """
    counts = counts.to(sums.dtype).view(-1, *[1] * (sums.dim() - 1))
    offsets = counts / (counts + strength).clamp(min=1e-9) * (sums / counts.clamp(min=1) - sums.sum(0) / counts.sum())
    offsets[0] = 0
    return offsets


def frame_statistics(rows: Mapping[str, Mapping], store: FeatureStore) -> np.ndarray:
    """Mean and standard deviation of the earliest stored layer's frames, each dimension scaled over the utterances."""
    frames = (store.frames(key, min(store.layers)).astype(np.float32) for key in rows)
    vectors = np.stack([np.concatenate([part.mean(0), part.std(0)]) for part in frames])
    spread = vectors.std(0)
    return (vectors - vectors.mean(0)) / np.where(spread > 0, spread, 1)


def speaker_vectors(source: str, rows: Mapping[str, Mapping], store: FeatureStore) -> np.ndarray:
    """Embeddings of SpeechBrain's speaker models, such as `speechbrain/spkrec-ecapa-voxceleb`, of unit length."""
    from speechbrain.inference.classifiers import EncoderClassifier

    try:
        model = EncoderClassifier.from_hparams(source)
    except Exception as error:
        raise UserError(
            f"--speaker_embedding: {source} cannot be loaded ({error}). "
            f"Name a speaker model of SpeechBrain, or one of {', '.join(EMBEDDINGS)}."
        ) from None
    bar = progress(rows.values(), desc="speaker embeddings", unit="clip")
    with torch.inference_mode():
        found = [
            model.encode_batch(load_audio(row["wav"], model.audio_normalizer.sample_rate).unsqueeze(0)) for row in bar
        ]
    return torch.nn.functional.normalize(torch.cat(found).flatten(1), dim=-1).cpu().numpy()


EMBEDDINGS: dict[str, Callable[[Mapping, FeatureStore], np.ndarray]] = {"frames": frame_statistics}


def cluster(vectors: np.ndarray, k: int) -> np.ndarray:
    """K-means from k-means++ starts, the tightest of a few; the same for the same vectors."""

    def attempt(seed: int) -> tuple[float, np.ndarray]:
        # Fewer different vectors than clusters leave some clusters empty, and nothing to draw further centres by.
        with warnings.catch_warnings(), np.errstate(invalid="ignore"):
            warnings.filterwarnings("ignore", message="One of the clusters is empty")
            centres, found = kmeans2(vectors, k, iter=ITERATIONS, minit="++", seed=seed)
        return float(((vectors - centres[found]) ** 2).sum()), found

    return min((attempt(seed) for seed in range(RESTARTS)), key=lambda tried: tried[0])[1]


@dataclasses.dataclass(frozen=True)
class KnownSpeakers:
    """Speakers are those that the manifest names; a recording whose speaker is not known keeps its frames."""

    strength: float
    name = "known"

    def speakers(self, rows: Mapping[str, Mapping], store: FeatureStore) -> list[str | None]:
        """Name the speaker of each utterance, `None` where it is not known."""
        return [row["speaker"] if row.get("speaker_known", True) else None for row in rows.values()]

    def told(self) -> str:
        """Say what is done, for the protocol."""
        return (
            f"known (from each frame the speaker's mean frame, shrunk by n / (n + {self.strength:g}), is subtracted; "
            f"{TRANSDUCTIVE.format(of='speaker')})"
        )


@dataclasses.dataclass(frozen=True)
class FoundSpeakers:
    """Speakers are clusters of utterances, found in each split apart without labels or names."""

    strength: float
    embedding: str
    clusters: int | None
    name = "clustered"

    def count(self, utterances: int) -> int:
        """Give the number of clusters of so many utterances."""
        return min(utterances, self.clusters or max(1, round(math.sqrt(utterances / 2))))

    def speakers(self, rows: Mapping[str, Mapping], store: FeatureStore) -> list[str | None]:
        """Name the cluster of each utterance."""
        vectors = EMBEDDINGS.get(self.embedding, functools.partial(speaker_vectors, self.embedding))(rows, store)
        return [str(number) for number in cluster(vectors, self.count(len(rows)))]

    def told(self) -> str:
        """Say what is done, for the protocol."""
        many = f"{self.clusters}" if self.clusters else "sqrt(N / 2)"
        return (
            f"clustered (from each frame the mean frame of its cluster, one of {many} in each split by k-means of "
            f"{self.embedding}, shrunk by n / (n + {self.strength:g}), is subtracted; "
            f"{TRANSDUCTIVE.format(of='cluster')})"
        )


SPEAKER_NORMS: dict[str, Callable[[Mapping], KnownSpeakers | FoundSpeakers | None]] = {
    "none": lambda options: None,
    "known": lambda options: KnownSpeakers(float(options["speaker_norm_strength"])),
    "clustered": lambda options: FoundSpeakers(
        float(options["speaker_norm_strength"]), options["speaker_embedding"], options["speaker_clusters"]
    ),
}


def chosen_norm(options: Mapping) -> KnownSpeakers | FoundSpeakers | None:
    """Find the speaker normalisation that a recipe asks for."""
    name = options["speaker_norm"]
    if name not in SPEAKER_NORMS:
        raise UserError(f"--speaker_norm: '{name}' is none of {', '.join(SPEAKER_NORMS)}.")
    strength, clusters = options.get("speaker_norm_strength", 0), options.get("speaker_clusters")
    if not isinstance(strength, int | float) or not 0 <= strength < math.inf:
        raise UserError(f"--speaker_norm_strength: {strength} is no number of utterances, 0 or more.")
    if clusters is not None and (not isinstance(clusters, int) or clusters < 1):
        raise UserError(f"--speaker_clusters: {clusters} is no number of clusters; null leaves it to a rule.")
    return SPEAKER_NORMS[name](options)


@dataclasses.dataclass(frozen=True)
class SpeakerOffsets:
    """Offset of every utterance of some manifests."""

    norm: KnownSpeakers | FoundSpeakers
    digest: str
    offsets: Mapping[str, torch.Tensor]

    def fingerprint(self) -> dict:
        """Describe them, of JSON's types: `speaker_norm` says how, `speaker_offsets` of which utterances."""
        about = {"name": self.norm.name, **dataclasses.asdict(self.norm)}
        return {"speaker_norm": about, "speaker_offsets": self.digest}

    def subtract(self, utt_id: str, frames: torch.Tensor, place: int | slice) -> torch.Tensor:
        """Subtract an utterance's offset."""
        if utt_id not in self.offsets:
            raise StoreError(f"'{utt_id}' is in none of the manifests whose speakers were normalised.")
        return (frames.float() - self.offsets[utt_id][place]).to(frames.dtype)


def speaker_offsets(
    manifests: Sequence[str | Path], store: FeatureStore, norm: KnownSpeakers | FoundSpeakers
) -> SpeakerOffsets:
    """Compute the offsets of manifests, each by itself, or find them computed beside the store.

    Parameters
    ----------
    manifests : sequence of str or pathlib.Path
        Manifests, best those without labels; each is normalised by its own utterances alone.
    store : FeatureStore
        Frames of their utterances; those that it lacks are passed over.
    norm : KnownSpeakers or FoundSpeakers
        Who the speakers are, and how far their means are shrunk.

    Returns
    -------
    SpeakerOffsets
        What `StoredFrames` subtracts from the frames of each utterance.

    Example
    -------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> store = FeatureStore(folder / "store", {"layers": [1], "dim": 1})
    >>> with store.writer() as add:
    ...     for name, value in {"t-a": 0.0, "t-b": 4.0}.items():
    ...         add(name, np.full((1, 3, 1), value), audio=name, file=(1, 1))
    >>> rows = {name: {"wav": "x.wav", "speaker": name} for name in ("t-a", "t-b")}
    >>> atomic_write(folder / "test.json", json.dumps(rows))
    >>> atomic_write(folder / "corpus.json", '{"data_root": "/toy"}')
    >>> found = speaker_offsets([folder / "test.json"], store, KnownSpeakers(strength=1.0))
    >>> found.subtract("t-b", torch.full((3, 1), 4.0), 0).flatten().tolist()  # half of the way to the mean, 2
    [3.0, 3.0, 3.0]
    """
    offsets, digest = {}, hashlib.sha256()
    for manifest in manifests:
        rows = {key: row for key, row in read_manifest(manifest).items() if key in store}
        name = offsets_digest(rows, store, norm)
        digest.update(name.encode())
        if rows:
            table, places = cached_offsets(store.folder / "speakers" / f"{name}.safetensors", rows, store, norm)
            offsets |= {key: table[place] for key, place in zip(rows, places.tolist(), strict=True)}
            without = int((places == 0).sum())
            logger.info("%s: speaker_norm %s: %d speakers", manifest, norm.name, len(table) - 1)
            if without:
                logger.warning("%s: %d recordings without a known speaker keep their frames", manifest, without)
    return SpeakerOffsets(norm, digest.hexdigest()[:16], offsets)


def offsets_digest(rows: Mapping[str, Mapping], store: FeatureStore, norm: KnownSpeakers | FoundSpeakers) -> str:
    """Hash of all that decides the offsets of a manifest."""
    names = [(key, row["speaker"], row.get("speaker_known", True), store.rows[key].audio) for key, row in rows.items()]
    about = [VERSION, store.fingerprint, norm.name, dataclasses.asdict(norm), names]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def cached_offsets(
    path: Path, rows: Mapping[str, Mapping], store: FeatureStore, norm: KnownSpeakers | FoundSpeakers
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read the offsets of a manifest, or compute and keep them."""
    try:
        found = load_file(path)
        return found["table"], found["places"]
    except FileNotFoundError:
        pass
    except (SafetensorError, KeyError):
        logger.warning("%s is damaged and computed anew", path)
    speakers = norm.speakers(rows, store)
    order = {name: place for place, name in enumerate(sorted({*speakers} - {None}), start=1)}
    places = torch.tensor([order.get(name, 0) for name in speakers])
    sums = torch.zeros(1 + len(order), len(store.layers), store.dim, dtype=torch.float64)
    bar = progress(rows, desc="speaker means", unit="clip", disable=len(rows) < MANY)
    for key, place in zip(bar, places.tolist(), strict=True):
        sums[place] += torch.from_numpy(store.frames(key).astype(np.float64).mean(1))
    table = shrunken_offsets(sums, torch.bincount(places, minlength=len(sums)), norm.strength).float()
    atomic_write(path, save({"table": table, "places": places}))
    return table, places
