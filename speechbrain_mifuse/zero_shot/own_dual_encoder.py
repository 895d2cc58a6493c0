"""A dual encoder trained here as an audio-text model, and its files.

It is no foundation model: it was trained on captions made from the labels of a few corpora, and knows only the classes
that these have (`classes_known`). For another class its scores say nothing.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save

from speechbrain_mifuse import __version__
from speechbrain_mifuse.features.encoder import FrozenEncoder
from speechbrain_mifuse.features.extract import FrameReader
from speechbrain_mifuse.features.store import difference
from speechbrain_mifuse.features.text_encoder import FrozenTextEncoder
from speechbrain_mifuse.nnet.adapter_files import DECISIVE
from speechbrain_mifuse.nnet.dual_encoder import DualEncoder
from speechbrain_mifuse.nnet.weights import build_with_weights, load_all_weights
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.files import atomic_write
from speechbrain_mifuse.utils.schemas import DualEncoderAbout, checked, plain_json
from speechbrain_mifuse.zero_shot.audio_text import AudioTextModel, name_of, open_audio_text_model
from speechbrain_mifuse.zero_shot.window import known_repeats

WEIGHTS, ABOUT = "dual_encoder.safetensors", "about.json"
TRAIN_AGAIN = "Train the dual encoder again."

YAML = """# A dual encoder of speech and text, for speechbrain_mifuse.zero_shot.own_dual_encoder.load_dual_encoder.
# It was trained on captions made from labels and knows only these classes: {classes}.
# In a recipe of your own, include this file or copy it; then
#   run_on_main(hparams["pretrainer"].collect_files); hparams["pretrainer"].load_collected()
dual_encoder_folder: .
dual_encoder: !new:speechbrain_mifuse.nnet.dual_encoder.DualEncoder
    audio_size: {audio_size}
    text_size: {text_size}
    size: {size}
    hidden_size: {hidden_size}
    dropout: {dropout}
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
        dual_encoder: !ref <dual_encoder>
    paths:
        dual_encoder: !ref <dual_encoder_folder>/dual_encoder.safetensors
    custom_hooks:
        dual_encoder: !name:speechbrain_mifuse.zero_shot.own_dual_encoder.load_dual_encoder_weights
"""


class DualEncoderError(UserError):
    """A dual encoder's folder that is not whole, or does not fit what is asked of it."""


def toy_about() -> dict:
    """Make what `about.json` says of a dual encoder of frames of dimension 8, for examples and tests."""
    return {
        "classes_known": ["angry", "sad"],
        "encoder": "toy",
        "features": {"encoder": "ab", "layers": [1, 2], "dim": 8, "trim_db": 40.0, "frame_average": 4, "layer": 2},
        "text_encoder": {"source": "demo", "text_encoder": "cd", "dim": 6, "max_tokens": 256},
    }


class DualEncoderModel(AudioTextModel):
    """Our own dual encoder behind the interface of all audio-text models."""

    name = "dual_encoder"

    def __init__(self, network: DualEncoder, about: Mapping, text_encoder: FrozenTextEncoder | None = None):
        self.network, self.about, self.device = network.eval(), about, torch.device("cpu")
        self.classes_known, self.trained_on = tuple(about["classes_known"]), tuple(about.get("trained_on", ()))
        self.layer, self.longest_text = about["features"]["layer"], about["text_encoder"]["max_tokens"]
        if text_encoder is not None:
            self.text_encoder = text_encoder

    def to(self, device: str | torch.device) -> DualEncoderModel:
        """Move all parts, also encoders of text and speech that load later; see `AudioTextModel.to`."""
        self.device = torch.device(device)
        self.network.to(self.device)
        # Only if it is loaded: asking for the attribute would load it.
        if "text_encoder" in vars(self):
            self.text_encoder.to(self.device)
        return self

    @functools.cached_property
    def text_encoder(self) -> FrozenTextEncoder:
        """The text encoder it was trained with."""
        wanted = self.about["text_encoder"]
        found = FrozenTextEncoder(wanted["source"])
        if found.fingerprint()["text_encoder"] != wanted["text_encoder"]:
            raise DualEncoderError(
                f"--text_encoder: '{wanted['source']}' is not the text encoder that the dual encoder was trained with. "
                "Restore it, or train the dual encoder again."
            )
        return found.to(self.device)

    def fingerprint(self) -> dict:
        """Describe what decides the vectors: projections, frames, text encoder."""
        frames = {key: self.about["features"].get(key) for key in DECISIVE}
        about = {"audio_text_model": self.name, "weights": weights_digest(self.network), "frames": frames}
        return {**about, "text_encoder": self.about["text_encoder"]["text_encoder"]}

    def reader(self, repeats: int) -> FrameReader:
        """Make what fills a feature store with frames of repeated recordings."""
        known_repeats(repeats, "--audio_repeats")
        wanted = self.about["features"]
        # Repeated frames are of no use to anything else, so the layers that it does not read are spared.
        layers = wanted["layers"] if repeats == 1 else [self.layer]
        try:
            encoder = FrozenEncoder(self.about["encoder"], layers)
        except (OSError, ValueError) as error:
            raise UserError(f"--encoder: {error}") from None
        encoder.to(self.device)
        reader = FrameReader(encoder, wanted["trim_db"], wanted["frame_average"], repeats)
        refuse_other_frames(self.about["encoder"], wanted, {**reader.fingerprint(), "layer": self.layer})
        return reader

    @torch.no_grad()
    def audio_vectors(self, frames: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Vectors of stored frames of the model's layer."""
        return self.network.audio_vectors(frames.to(self.device).float(), lengths.to(self.device)).cpu()

    @torch.no_grad()
    def text_vectors(self, texts: Sequence[str]) -> torch.Tensor:
        """Vectors of texts."""
        return self.network.text_vectors(self.text_encoder(texts).to(self.device)).cpu()

    def text_lengths(self, texts: Sequence[str]) -> list[int]:
        """Count tokens, with those that begin and end a text."""
        return self.text_encoder.lengths(texts)


def weights_digest(network: torch.nn.Module) -> str:
    """Identify a dual encoder by its weights and buffers."""
    return hashlib.sha256(save(weights_of(network))).hexdigest()[:16]


def weights_of(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights as they are written."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}


def export_dual_encoder(folder: str | Path, network: DualEncoder, about: Mapping) -> None:
    """Write a dual encoder: weights, the YAML that builds it, and what it was trained on."""
    folder = Path(folder)
    atomic_write(folder / WEIGHTS, save(weights_of(network)))
    text = YAML.format(**network.sizes, classes=", ".join(about["classes_known"]))
    atomic_write(folder / "hyperparams.yaml", text)
    told = {"dual_encoder": network.sizes, **about, "code_version": __version__}
    # Last, because its presence tells that the folder is whole.
    atomic_write(folder / ABOUT, json.dumps(told, indent=1))


def load_dual_encoder_weights(module: torch.nn.Module, path: str | Path, end_of_epoch: bool = False) -> None:
    """Load safetensors into a dual encoder; a hook for SpeechBrain's `Pretrainer`."""
    load_all_weights(module, path, DualEncoderError, TRAIN_AGAIN)


def refuse_other_frames(place: str | Path, found: Mapping, wanted: Mapping) -> None:
    """Make sure that a dual encoder reads frames of the kind that it was trained on."""
    differs = difference(*({key: part.get(key) for key in DECISIVE} for part in (found, wanted)))
    if differs:
        raise DualEncoderError(
            f"{place}: was trained on other frames ({differs}). Pass the same --encoder and --layer."
        )


def load_dual_encoder(
    folder: str | Path, features: Mapping | None = None, encoder: str | None = None, text_encoder: str | None = None
) -> DualEncoderModel:
    """Load a dual encoder as an audio-text model.

    Parameters
    ----------
    folder : str or pathlib.Path
        A folder that `export_dual_encoder` wrote.
    features : mapping, optional
        Fingerprint of the frames that it is to read, with their `layer`; not compared by default.
    encoder, text_encoder : str, optional
        Where the speech encoder and the text encoder lie now, if elsewhere than when it was trained: a folder or a hub
        id. They must be the same ones.

    Returns
    -------
    DualEncoderModel
        The model.

    Raises
    ------
    DualEncoderError
        If the folder is not whole, or the model was trained on other frames.

    Example
    -------
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> export_dual_encoder(folder, DualEncoder(8, 6), toy_about())
    >>> load_dual_encoder(folder).classes_known
    ('angry', 'sad')
    >>> load_dual_encoder(folder, {**toy_about()["features"], "encoder": "another"})
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.zero_shot.own_dual_encoder.DualEncoderError: ...: was trained on other frames (encoder: ...). ...
    """
    folder = Path(folder)
    try:
        content = plain_json(folder / ABOUT)
    except ValueError as error:
        raise DualEncoderError(f"{folder}: no whole dual encoder there ({ABOUT}: {error}). {TRAIN_AGAIN}") from None
    schema = checked(DualEncoderAbout, content, folder / ABOUT, DualEncoderError, TRAIN_AGAIN)
    about = schema.model_dump(exclude_unset=True)
    about["encoder"] = encoder or about["encoder"]
    about["text_encoder"]["source"] = text_encoder or about["text_encoder"]["source"]
    if features is not None:
        refuse_other_frames(folder, about["features"], features)
    sizes = about["dual_encoder"]
    network = build_with_weights(lambda: DualEncoder(**sizes), folder / WEIGHTS, DualEncoderError, TRAIN_AGAIN)
    return DualEncoderModel(network, about)


def is_own(source: str) -> bool:
    """Tell our own dual encoder from other audio-text models."""
    return (Path(source) / ABOUT).is_file()


def alm_name(source: str) -> str:
    """Give the name of an audio-text model without loading it."""
    return DualEncoderModel.name if is_own(source) else name_of(source)


def open_alm(
    source: str,
    window: str = "native",
    trust_remote_code: bool = False,
    device: str | torch.device = "cpu",
    flag: str = "--alm",
) -> AudioTextModel:
    """Load an audio-text model: our own dual encoder from its folder, or one of transformers."""
    if is_own(source):
        return load_dual_encoder(source).to(device)
    return open_audio_text_model(source, trust_remote_code, flag, window=window).to(device)
