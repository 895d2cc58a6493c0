"""Frames of a recipe's corpora: from the store, or from an encoder that is trained along."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from speechbrain_mifuse.features.encoder import FrozenEncoder
from speechbrain_mifuse.features.extract import FrameReader, fill_store
from speechbrain_mifuse.features.front import FinetunedEncoder, StoredFrames
from speechbrain_mifuse.features.speakers import chosen_norm, speaker_offsets
from speechbrain_mifuse.features.store import FeatureStore
from speechbrain_mifuse.utils.errors import UserError

# Whose frames `speaker_norm` changes. The API teacher is a black box: what it hears and answers stays the same.
NORMALISED_ROLES = ("target", "source")


def device_of(run_opts: Mapping | None) -> str:
    """Give the device of a run."""
    # Options read from a command line hold the key in any case.
    return (run_opts or {}).get("device") or "cpu"


def open_reader(hparams: Mapping, run_opts: Mapping | None = None) -> FrameReader:
    """Build the frozen encoder with its preprocessing, on the device of the run."""
    try:
        encoder = FrozenEncoder(hparams["encoder"], hparams["encoder_layers"])
    except (OSError, ValueError) as error:
        raise UserError(f"--encoder: {error}") from None
    encoder.to(device_of(run_opts))
    return FrameReader(encoder, hparams["trim_db"], hparams["frame_average"])


def store_frames(hparams: Mapping, role: str, reader: FrameReader) -> FeatureStore:
    """Fill the feature store of the corpus that plays a role."""
    manifests = sorted(Path(hparams[f"{role}_manifests"]).glob("*_unlabelled.json"))
    return fill_store(hparams[role], manifests, reader, hparams["feature_folder"])


def open_front(hparams: Mapping, role: str, layer: int | None, reader: FrameReader) -> StoredFrames:
    """Fill the feature store of the corpus that plays a role and read its frames, speaker-normalised if asked."""
    norm = chosen_norm(hparams) if role in NORMALISED_ROLES else None
    store = store_frames(hparams, role, reader)
    if norm is None:
        return StoredFrames(store, layer)
    manifests = sorted(Path(hparams[f"{role}_manifests"]).glob("*_unlabelled.json"))
    return StoredFrames(store, layer, speaker_offsets(manifests, store, norm))


def chosen_front(hparams: Mapping, run_opts: Mapping | None = None) -> StoredFrames | FinetunedEncoder:
    """Build where a classifier's frames come from, by the name in `features`."""
    if hparams["features"] not in hparams["fronts"]:
        raise UserError(f"--features: '{hparams['features']}' is none of {', '.join(hparams['fronts'])}.")
    return hparams["fronts"][hparams["features"]](hparams, run_opts)


def stored_front(hparams: Mapping, run_opts: Mapping | None = None) -> StoredFrames:
    """Fill the store of the source corpus and read frames from it."""
    return open_front(hparams, "source", hparams["layer"], open_reader(hparams, run_opts))


def finetuned_front(hparams: Mapping, run_opts: Mapping | None = None) -> FinetunedEncoder:
    """Load the encoder to be trained along."""
    if chosen_norm(hparams) is not None:
        raise UserError(
            f"--speaker_norm {hparams['speaker_norm']}: the frames of an encoder that is trained along change all the "
            "time. Pass --features stored, or --speaker_norm none."
        )
    try:
        return FinetunedEncoder(hparams["encoder"], hparams["trim_db"])
    except (OSError, ValueError) as error:
        raise UserError(f"--encoder: {error}") from None
