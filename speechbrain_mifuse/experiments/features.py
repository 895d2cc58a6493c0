"""Frames of a recipe's corpora: which encoder makes them, whose recordings they are, where they are stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from speechbrain_mifuse.corpora.folds import fold_folder
from speechbrain_mifuse.features.encoder import FrozenEncoder
from speechbrain_mifuse.features.extract import FrameReader, fill_store
from speechbrain_mifuse.features.front import FinetunedEncoder, StoredFrames
from speechbrain_mifuse.features.speakers import FoundSpeakers, KnownSpeakers, chosen_norm, speaker_offsets
from speechbrain_mifuse.features.store import FeatureStore
from speechbrain_mifuse.utils.errors import UserError

SpeakerNorm = KnownSpeakers | FoundSpeakers


@dataclass(frozen=True)
class EncoderSettings:
    """The frozen encoder of a recipe, and what is done to the audio before it and to the frames behind it."""

    source: str
    layers: int | Sequence[int]
    trim_db: float | None
    frame_average: int

    @classmethod
    def of(cls, hparams: Mapping) -> EncoderSettings:
        """Read them from a recipe's hparams."""
        return cls(
            source=hparams["encoder"],
            layers=hparams["encoder_layers"],
            trim_db=hparams["trim_db"],
            frame_average=hparams["frame_average"],
        )


@dataclass(frozen=True)
class CorpusSettings:
    """A corpus in a recipe: its name, where its manifests and frames lie, what makes the manifests.

    `classifier` holds the settings of the classifier that is trained on it, if one is; `norm` is the speaker
    normalization of its frames.
    """

    name: str
    manifests: Path
    prepare: Callable[[], None]
    feature_folder: str | None
    classifier: Mapping | None = None
    norm: SpeakerNorm | None = None

    @classmethod
    def target_of(cls, hparams: Mapping) -> CorpusSettings:
        """Read which corpus is adapted to."""
        return cls(
            name=hparams["target"],
            manifests=Path(hparams["target_manifests"]),
            prepare=hparams["prepare_target"],
            feature_folder=hparams["feature_folder"],
            norm=norm_of(hparams),
        )

    @classmethod
    def source_of(cls, hparams: Mapping) -> CorpusSettings:
        """Read which corpus the source classifier is trained on."""
        return cls(
            name=hparams["source"],
            manifests=Path(hparams["source_manifests"]),
            prepare=hparams["prepare_source"],
            feature_folder=hparams["feature_folder"],
            classifier=hparams["source_classifier"],
            norm=norm_of(hparams),
        )

    @classmethod
    def fold_of(cls, hparams: Mapping, fold: int) -> CorpusSettings:
        """Read which corpus is cut into folds, with the manifests of one of them."""
        return cls(
            name=hparams["source"],
            manifests=fold_folder(hparams["manifests"], fold),
            prepare=hparams["prepare"],
            feature_folder=hparams["feature_folder"],
            norm=norm_of(hparams),
        )

    @classmethod
    def teacher_of(cls, hparams: Mapping) -> CorpusSettings:
        """Read which corpus the teacher's classifier is trained on; never normalized: the teacher is a black box."""
        return cls(
            name=hparams["teacher"],
            manifests=Path(hparams["teacher_manifests"]),
            prepare=hparams["prepare_teacher"],
            feature_folder=hparams["feature_folder"],
            classifier=hparams["teacher_classifier"],
        )


def norm_of(hparams: Mapping) -> SpeakerNorm | None:
    """Read the speaker normalization that a recipe asks for."""
    return chosen_norm(
        {
            "speaker_norm": hparams["speaker_norm"],
            "speaker_norm_strength": hparams["speaker_norm_strength"],
            "speaker_embedding": hparams["speaker_embedding"],
            "speaker_clusters": hparams["speaker_clusters"],
        }
    )


def device_of(run_opts: Mapping | None) -> str:
    """Give the device of a run."""
    # Options read from a command line hold the key in any case.
    return (run_opts or {}).get("device") or "cpu"


def open_reader(settings: EncoderSettings, run_opts: Mapping | None = None) -> FrameReader:
    """Build the frozen encoder with its preprocessing, on the device of the run."""
    try:
        encoder = FrozenEncoder(settings.source, settings.layers)
    except (OSError, ValueError) as error:
        raise UserError(f"--encoder: {error}") from None
    encoder.to(device_of(run_opts))
    return FrameReader(encoder, settings.trim_db, settings.frame_average)


def store_frames(corpus: CorpusSettings, reader: FrameReader) -> FeatureStore:
    """Fill the feature store of a corpus."""
    return fill_store(corpus.name, _unlabelled_manifests(corpus), reader, corpus.feature_folder)


def open_frame_source(corpus: CorpusSettings, layer: int | None, reader: FrameReader) -> StoredFrames:
    """Fill the feature store of a corpus and read its frames, speaker-normalized if asked."""
    store = store_frames(corpus, reader)
    if corpus.norm is None:
        return StoredFrames(store, layer)
    return StoredFrames(store, layer, speaker_offsets(_unlabelled_manifests(corpus), store, corpus.norm))


def finetuned_frame_source(source: str, trim_db: float | None, norm: SpeakerNorm | None) -> FinetunedEncoder:
    """Load an encoder to be trained along."""
    if norm is not None:
        raise UserError(
            f"--speaker_norm {norm.name}: the frames of an encoder that is trained along change all the time. Pass "
            "--features stored, or --speaker_norm none."
        )
    try:
        return FinetunedEncoder(source, trim_db)
    except (OSError, ValueError) as error:
        raise UserError(f"--encoder: {error}") from None


def _unlabelled_manifests(corpus: CorpusSettings) -> list[Path]:
    """List the manifests of a corpus that hold no labels."""
    return sorted(corpus.manifests.glob("*_unlabelled.json"))
