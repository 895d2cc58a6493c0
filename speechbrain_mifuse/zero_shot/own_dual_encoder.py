"""A dual encoder trained here as an audio-text model, and its files.

It is no foundation model: it was trained on captions made from the labels of a few corpora, and knows only the classes
that these have (`classes_known`). For another class its scores say nothing.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save

from speechbrain_mifuse import __version__
from speechbrain_mifuse.features.encoder import FrozenEncoder
from speechbrain_mifuse.features.extract import FrameReader
from speechbrain_mifuse.features.store import difference
from speechbrain_mifuse.features.text_encoder import FrozenTextEncoder
from speechbrain_mifuse.inference.model_card import dual_encoder_card
from speechbrain_mifuse.nnet.adapter_files import SAME_LAYER
from speechbrain_mifuse.nnet.dual_encoder import DualEncoder
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.model_folder import ABOUT, ModelFolder, object_yaml, pretrainer_yaml
from speechbrain_mifuse.utils.schemas import DualEncoderAbout
from speechbrain_mifuse.zero_shot.audio_text import AudioTextModel, name_of, open_audio_text_model
from speechbrain_mifuse.zero_shot.window import known_repeats

HEAD = """# A dual encoder of speech and text, for speechbrain_mifuse.zero_shot.own_dual_encoder.load_dual_encoder.
# It was trained on captions made from labels and knows only these classes: {classes}.
# In a recipe of your own, include this file or copy it; then
#   run_on_main(hparams["pretrainer"].collect_files); hparams["pretrainer"].load_collected()
dual_encoder_folder: .
"""


class DualEncoderError(UserError):
    """A dual encoder's folder that is not whole, or does not fit what is asked of it."""


DUAL_ENCODER = ModelFolder(
    "dual encoder", "dual_encoder.safetensors", DualEncoderAbout, DualEncoderError, "Train the dual encoder again."
)
# The hook that its YAML names.
load_dual_encoder_weights = DUAL_ENCODER.load_weights


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
        frames = {key: self.about["features"].get(key) for key in SAME_LAYER}
        about = {"audio_text_model": self.name, "weights": _weights_digest(self.network), "frames": frames}
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


def export_dual_encoder(folder: str | Path, network: DualEncoder, about: Mapping) -> None:
    """Write a dual encoder: weights, the YAML that builds it, what it was trained on, a model card.

    Parameters
    ----------
    folder : str or pathlib.Path
        Made if missing.
    network : DualEncoder
        Trained.
    about : mapping
        `classes_known`, `encoder`, `features` (the frames' fingerprint with their `layer`) and `text_encoder`, as
        `utils.schemas.DualEncoderAbout` checks them; `toy_about` is an example, `load_dual_encoder` shows it at work.
    """
    text = HEAD.format(classes=", ".join(about["classes_known"]))
    text += object_yaml("dual_encoder", "speechbrain_mifuse.nnet.dual_encoder.DualEncoder", network.sizes)
    hook = "speechbrain_mifuse.zero_shot.own_dual_encoder.load_dual_encoder_weights"
    text += pretrainer_yaml("dual_encoder", "<dual_encoder_folder>/dual_encoder.safetensors", hook)
    about = {"dual_encoder": network.sizes, **about, "code_version": __version__}
    DUAL_ENCODER.write(folder, network.state_dict(), text, about, dual_encoder_card(about))


def _weights_digest(network: torch.nn.Module) -> str:
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    return hashlib.sha256(save(weights)).hexdigest()[:16]


def refuse_other_frames(place: str | Path, found: Mapping, wanted: Mapping) -> None:
    """Make sure that a dual encoder reads frames of the kind that it was trained on."""
    differs = difference(*({key: part.get(key) for key in SAME_LAYER} for part in (found, wanted)))
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
    about = DUAL_ENCODER.about(folder).model_dump(exclude_unset=True)
    about["encoder"] = encoder or about["encoder"]
    about["text_encoder"]["source"] = text_encoder or about["text_encoder"]["source"]
    if features is not None:
        refuse_other_frames(folder, about["features"], features)
    sizes = about["dual_encoder"]
    network = DUAL_ENCODER.build(lambda: DualEncoder(**sizes), Path(folder) / DUAL_ENCODER.weights)
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
    """Load an audio-text model: our own dual encoder from its folder, or one of transformers.

    Parameters
    ----------
    source : str
        Folder, or a hub id.
    window, trust_remote_code, flag
        As for `GenericAudioTextModel`; our own model needs none of them.
    device : str or torch.device
        Where it computes.

    Returns
    -------
    AudioTextModel
        The model.
    """
    if is_own(source):
        return load_dual_encoder(source).to(device)
    return open_audio_text_model(source, trust_remote_code, flag, window=window).to(device)
