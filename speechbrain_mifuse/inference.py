"""Trained recognisers: written as safetensors and YAML, loaded through SpeechBrain's `Pretrained`."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from speechbrain.inference.interfaces import Pretrained

from speechbrain_mifuse import __version__
from speechbrain_mifuse.audio import content_hash, load_audio
from speechbrain_mifuse.corpora.manifest import atomic_write
from speechbrain_mifuse.errors import UserError
from speechbrain_mifuse.features.extract import FrameReader
from speechbrain_mifuse.features.store import difference
from speechbrain_mifuse.nnet.classifier import EmotionClassifier

logger = logging.getLogger(__name__)

# Pooled vectors that a recogniser remembers: K stochastic answers to one recording then encode it once.
REMEMBERED = 256

# What two stores must share for a classifier of the one to read the other.
DECISIVE = ("encoder", "dim", "trim_db", "frame_average", "preprocessing_version", "speaker_norm")

YAML = """# An emotion recogniser; load it with speechbrain_mifuse.inference.EmotionRecognizer.from_hparams.
pretrained_path: .
labels: {labels}
sample_rate: 16000
trim_db: {trim_db}
frame_average: {frame_average}
encoder: !new:speechbrain_mifuse.features.encoder.FrozenEncoder
    source: {encoder}
    layers: {layers}
classifier: !new:speechbrain_mifuse.nnet.classifier.EmotionClassifier
    input_size: {input_size}
    n_classes: {n_classes}
    hidden_size: {hidden_size}
    dropout: {dropout}
    n_layers: {n_layers}
    attention_size: {attention_size}
    adapter: {adapter}
modules:
    encoder: !ref <encoder>
    classifier: !ref <classifier>
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
        classifier: !ref <classifier>
    paths:
        classifier: !ref <pretrained_path>/classifier.safetensors
    custom_hooks:
        classifier: !name:speechbrain_mifuse.inference.load_weights
"""
NORMALISED = """# Trained on frames from which each speaker's offset was subtracted. A recording comes without a speaker
# here, so its offset is 0.
speaker_norm: {name}
"""


class RecogniserError(UserError):
    """A recogniser's folder that is not whole, or does not fit what is asked of it."""


def load_weights(module: torch.nn.Module, path: str | Path, end_of_epoch: bool = False) -> None:
    """Load safetensors into a module; a hook for SpeechBrain's `Pretrainer`.

    Parameters
    ----------
    module : torch.nn.Module
        Receives the weights; all must fit.
    path : str or pathlib.Path
        A safetensors file.
    end_of_epoch : bool
        Part of the hook's signature, of no meaning here.

    Raises
    ------
    RecogniserError
        If the file is missing, damaged, or of another architecture.

    Example
    -------
    >>> load_weights(torch.nn.Linear(1, 1), "missing.safetensors")
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.inference.RecogniserError: missing.safetensors: cannot be loaded ...
    """
    try:
        module.load_state_dict(load_file(str(path)))
    except Exception as error:
        raise RecogniserError(f"{path}: cannot be loaded ({error}). Export the recogniser again.") from None


def export_recogniser(folder: str | Path, classifier, front, hparams: Mapping, about: Mapping) -> None:
    """Write a recogniser: weights, the YAML that builds it, and what it was trained on.

    Parameters
    ----------
    folder : str or pathlib.Path
        Target folder.
    classifier : EmotionClassifier
        Trained.
    front : StoredFrames or FinetunedEncoder
        Decides the encoder: the stored frames' own, or the finetuned one, which is written too.
    hparams : mapping
        `labels`, `encoder`, `trim_db`.
    about : mapping
        Provenance, of JSON's types; `features` is the fingerprint of the frames.

    Example
    -------
    >>> export_recogniser.__name__  # runs in `recipes/RAVDESS/classifier/train.py`
    'export_recogniser'
    """
    folder = Path(folder)
    source, layers = hparams["encoder"], None
    if hasattr(front, "export"):
        source = str((folder / "encoder").resolve())
        front.export(source)
    else:
        layers = front.store.layers if front.layer is None else [front.layer]
    sizes = {
        "input_size": front.dim,
        "n_classes": len(hparams["labels"]),
        "hidden_size": classifier.hidden.out_features,
        "dropout": classifier.dropout,
        "n_layers": front.n_layers,
        "attention_size": classifier.pooling.project.out_features,
        "adapter": None if classifier.adapter is None else classifier.adapter.sizes,
    }
    text = YAML.format(
        labels=list(hparams["labels"]),
        trim_db="null" if hparams["trim_db"] is None else hparams["trim_db"],
        frame_average=getattr(front, "frame_average", 1),
        encoder=json.dumps(str(source)),
        layers=json.dumps(layers),
        **{**sizes, "adapter": json.dumps(sizes["adapter"])},
    )
    norm = about["features"].get("speaker_norm")
    text += NORMALISED.format(**norm) if norm else ""
    weights = {name: tensor.contiguous() for name, tensor in classifier.state_dict().items()}
    atomic_write(folder / "classifier.safetensors", save(weights))
    atomic_write(folder / "hyperparams.yaml", text)
    # Last, because its presence tells that the folder is whole.
    atomic_write(
        folder / "about.json", json.dumps({**about, "classifier": sizes, "code_version": __version__}, indent=1)
    )


def recogniser_digest(folder: str | Path) -> str:
    """Identity of a recogniser: SHA-256 over its weights and its YAML.

    Parameters
    ----------
    folder : str or pathlib.Path
        A folder that `export_recogniser` wrote.

    Returns
    -------
    str
        First 16 hexadecimal digits.

    Raises
    ------
    RecogniserError
        If the folder is not whole.

    Example
    -------
    >>> recogniser_digest("/nowhere")
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.inference.RecogniserError: /nowhere: no whole recogniser ...
    """
    folder = Path(folder)
    try:
        content = [(folder / name).read_bytes() for name in ("classifier.safetensors", "hyperparams.yaml")]
    except OSError:
        raise RecogniserError(f"{folder}: no whole recogniser there. Train it again.") from None
    return hashlib.sha256(b"".join(content)).hexdigest()[:16]


def load_classifier(folder: str | Path, labels: Sequence[str], features: Mapping) -> EmotionClassifier:
    """Build the classifier of a recogniser without its encoder, for frames that are stored already.

    Parameters
    ----------
    folder : str or pathlib.Path
        A folder that `export_recogniser` wrote.
    labels : sequence of str
        The label order that is wanted.
    features : mapping
        Fingerprint of the stored frames that it is to read.

    Returns
    -------
    EmotionClassifier
        With its weights.

    Raises
    ------
    RecogniserError
        If the folder is not whole, or its classifier knows other labels or reads another encoder's frames.

    Example
    -------
    >>> load_classifier("/nowhere", ("angry",), {})
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.inference.RecogniserError: /nowhere: no whole recogniser there (...). Train it again.
    """
    folder = Path(folder)
    try:
        about = json.loads((folder / "about.json").read_text())
        found = {"labels": about["labels"], **{key: about["features"].get(key) for key in DECISIVE}}
    except (OSError, ValueError, KeyError) as error:
        raise RecogniserError(f"{folder}: no whole recogniser there ({error!r}). Train it again.") from None
    wanted = {"labels": list(labels), **{key: features.get(key) for key in DECISIVE}}
    differs = difference(found, wanted)
    if differs:
        raise RecogniserError(
            f"{folder}: was trained on something else ({differs}). Pass the same --encoder and --speaker_norm."
        )
    classifier = EmotionClassifier(**about["classifier"])
    load_weights(classifier, folder / "classifier.safetensors")
    return classifier


class EmotionRecognizer(Pretrained):
    """Emotion of recordings, from a folder that `export_recogniser` wrote.

    Recordings come without a speaker: nothing is subtracted from their frames, also where the classifier was trained
    on speaker-normalised ones, which is said in the log.

    Example
    -------
    >>> sorted(EmotionRecognizer.HPARAMS_NEEDED)
    ['frame_average', 'labels', 'sample_rate', 'trim_db']
    """

    HPARAMS_NEEDED = ("labels", "sample_rate", "trim_db", "frame_average")
    MODULES_NEEDED = ("encoder", "classifier")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.labels = tuple(self.hparams.labels)
        self.sample_rate = self.hparams.sample_rate
        self.reader = FrameReader(self.mods.encoder, self.hparams.trim_db, self.hparams.frame_average)
        self._vectors: OrderedDict[str, torch.Tensor] = OrderedDict()
        norm = getattr(self.hparams, "speaker_norm", None)
        if norm:
            logger.warning(
                "trained with speaker_norm %s; a recording comes without a speaker here, so its offset is 0", norm
            )

    @classmethod
    def from_hparams(cls, source, overrides=None, **kwargs):
        """Load a recogniser.

        Parameters
        ----------
        source : str or pathlib.Path
            Local folder or hub repository.
        overrides : dict, optional
            Changes to its YAML.
        **kwargs
            As for SpeechBrain's `Pretrained.from_hparams`.

        Returns
        -------
        EmotionRecognizer
            In evaluation mode.

        Raises
        ------
        RecogniserError
            If the weights cannot be loaded.
        """
        return super().from_hparams(
            str(source), overrides={"pretrained_path": str(source), **(overrides or {})}, **kwargs
        )

    @torch.inference_mode()
    def _vector(self, waveform: torch.Tensor) -> torch.Tensor:
        key = content_hash(waveform)
        if key not in self._vectors:
            frames = self.reader.encode(waveform.to(self.device))
            frames = frames[0] if len(frames) == 1 else frames.transpose(0, 1)
            self._vectors[key] = self.mods.classifier.embed(frames.unsqueeze(0))[0]
            while len(self._vectors) > REMEMBERED:
                self._vectors.popitem(last=False)
        return self._vectors[key]

    @torch.inference_mode()
    def predict_proba(
        self, waveform: torch.Tensor, n: int = 1, stochastic: bool = False, seed: int | None = None
    ) -> torch.Tensor:
        """Class probabilities of one waveform.

        Parameters
        ----------
        waveform : torch.Tensor
            `[samples]` at `sample_rate`.
        n : int
            Number of predictions.
        stochastic : bool
            Whether each is drawn with dropout on; otherwise all are equal.
        seed : int, optional
            Seed of the dropout masks: the same seed gives the same predictions.

        Returns
        -------
        torch.Tensor
            `[n, C]`.
        """
        vectors = self._vector(waveform).expand(n, -1)
        with torch.random.fork_rng(devices=[] if self.device_type == "cpu" else None):
            if seed is not None:
                torch.manual_seed(seed)
            return self.mods.classifier.head(vectors, stochastic).softmax(-1).cpu()

    def classify_file(self, path, savedir=None) -> tuple[str, torch.Tensor]:
        """Most likely emotion of one recording.

        Parameters
        ----------
        path : str or pathlib.Path
            Any file that libsndfile reads.
        savedir
            Part of SpeechBrain's signature, of no meaning here.

        Returns
        -------
        label : str
            One of `labels`.
        probs : torch.Tensor
            `[C]`.

        Raises
        ------
        BadAudio
            If the recording cannot be read.
        """
        probs = self.predict_proba(load_audio(path, self.sample_rate))[0]
        return self.labels[int(probs.argmax())], probs
