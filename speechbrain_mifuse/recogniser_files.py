"""A recogniser's folder: weights as safetensors, YAML for SpeechBrain's `Pretrained`, provenance, model card."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from safetensors.torch import save
from speechbrain.utils.parameter_transfer import Pretrainer

from speechbrain_mifuse import __version__
from speechbrain_mifuse.corpora.manifest import atomic_write
from speechbrain_mifuse.errors import UserError
from speechbrain_mifuse.features.store import difference
from speechbrain_mifuse.model_card import adapted_card, trained_card
from speechbrain_mifuse.nnet.classifier import EmotionClassifier
from speechbrain_mifuse.nnet.weights import load_all_weights

# What two stores must share for a classifier of the one to read the other.
DECISIVE = ("encoder", "dim", "trim_db", "frame_average", "preprocessing_version", "speaker_norm")

TEXT = """# An emotion recogniser; load it with speechbrain_mifuse.inference.EmotionRecognizer.from_hparams.
pretrained_path: .
labels: {labels}
sample_rate: 16000
temperature: {temperature}
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
pretrainer: !new:speechbrain_mifuse.recogniser_files.FolderPretrainer
    loadables:
        classifier: !ref <classifier>
    paths:
        classifier: !ref <pretrained_path>/classifier.safetensors
    custom_hooks:
        classifier: !name:speechbrain_mifuse.recogniser_files.load_weights
"""
NORMALISED = """# Trained on frames from which each speaker's offset was subtracted. A recording comes without a speaker
# here, so its offset is 0.
speaker_norm: {name}
"""


# How to mend a folder that is no recogniser.
GIVE_WHOLE = "Train it again, or give a whole folder as a recipe exports it; one on a hub is downloaded first."

# What the YAML of recognisers of earlier versions names.
OLDER_TAGS = {"!new:speechbrain.utils.parameter_transfer.Pretrainer", "!name:speechbrain_mifuse.inference.load_weights"}
# All that the YAML of an exported recogniser names, beside plain values: everything else is code of a stranger.
TAGS = OLDER_TAGS | {
    "!ref",
    "!new:speechbrain_mifuse.features.encoder.FrozenEncoder",
    "!new:speechbrain_mifuse.nnet.classifier.EmotionClassifier",
    "!new:speechbrain_mifuse.recogniser_files.FolderPretrainer",
    "!name:speechbrain_mifuse.recogniser_files.load_weights",
    *(f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null")),
}


# What SpeechBrain's `foreign_class` looks for beside the YAML.
INTERFACE = '''"""Lets SpeechBrain's `foreign_class` load this folder, where speechbrain-mifuse is installed."""

from speechbrain_mifuse.inference import EmotionRecognizer as CustomInterface  # noqa: F401
'''
CARD = "README.md"


class RecogniserError(UserError):
    """A recogniser's folder that is not whole, or does not fit what is asked of it."""


def refuse_foreign_code(path: str | Path) -> None:
    """Make sure that a recogniser's YAML names nothing but what our exporter writes: reading it runs what it names.

    Parameters
    ----------
    path : str or pathlib.Path
        The YAML.

    Raises
    ------
    RecogniserError
        If it names anything else, is no YAML, or cannot be read.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "hyperparams.yaml"
    >>> _ = path.write_text("labels: !apply:os.getcwd []")
    >>> refuse_foreign_code(path)
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.recogniser_files.RecogniserError: .../hyperparams.yaml: '!apply:os.getcwd' would run code ...
    """
    try:
        root = YAML().compose(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, YAMLError) as error:
        raise RecogniserError(f"{path}: cannot be read ({' '.join(str(error).split())}).") from None
    todo, seen = [root] if root is not None else [], set()
    while todo:
        node = todo.pop()
        if id(node) in seen:  # an anchor may hold itself
            continue
        seen.add(id(node))
        if str(node.tag) not in TAGS:
            remedy = "Read the file first; if you trust it, pass trust_code=True to from_hparams."
            raise RecogniserError(f"{path}: '{node.tag}' would run code that is no part of a recogniser. {remedy}")
        parts = node.value if isinstance(node.value, list) else []
        todo += [part for pair in parts for part in (pair if isinstance(pair, tuple) else [pair])]


def own_encoder(source: str | Path) -> dict:
    """Say where the encoder of a recogniser is, if it lies in its folder; its YAML names where it was exported to.

    Parameters
    ----------
    source : str or pathlib.Path
        Local folder or hub repository.

    Returns
    -------
    dict
        Changes to its YAML.

    Example
    -------
    >>> own_encoder("/nowhere")
    {}
    """
    encoder = Path(source) / "encoder"
    return {"encoder": {"source": str(encoder.resolve())}} if encoder.is_dir() else {}


class FolderPretrainer(Pretrainer):
    """SpeechBrain's `Pretrainer`, which finds weights beside the YAML wherever the process runs.

    `foreign_class` passes no `pretrained_path`, and the YAML's own is `.`, the current folder for SpeechBrain.

    Example
    -------
    >>> FolderPretrainer(loadables={}, paths={}).collect_files("/anywhere")
    {}
    """

    def collect_files(self, default_source=None, **options):
        """Fetch the weights; see SpeechBrain's `Pretrainer.collect_files`."""
        if isinstance(default_source, str | Path):
            self.paths = {
                name: f"{default_source}/{path[2:]}" if str(path).startswith("./") else path
                for name, path in self.paths.items()
            }
        return super().collect_files(default_source, **options)


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
    speechbrain_mifuse.recogniser_files.RecogniserError: missing.safetensors: cannot be loaded ...
    """
    load_all_weights(module, path, RecogniserError, "Export the recogniser again.")


def export_recogniser(
    folder: str | Path, classifier, front, hparams: Mapping, about: Mapping, temperature: float = 1.0
) -> None:
    """Write a recogniser: weights, the YAML that builds it, what it was trained on, a model card.

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
    temperature : float
        What calibrates its probabilities (see `fit_temperature`).

    Example
    -------
    >>> export_recogniser.__name__  # runs in `recipes/RAVDESS/classifier/train.py`
    'export_recogniser'
    """
    folder = Path(folder)
    # Absolute, because a recogniser is loaded from other folders than it was trained in.
    source = str(Path(hparams["encoder"]).resolve()) if Path(hparams["encoder"]).is_dir() else hparams["encoder"]
    layers = None
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
    text = TEXT.format(
        labels=list(hparams["labels"]),
        temperature=temperature,
        trim_db="null" if hparams["trim_db"] is None else hparams["trim_db"],
        frame_average=getattr(front, "frame_average", 1),
        encoder=json.dumps(str(source)),
        layers=json.dumps(layers),
        **{**sizes, "adapter": json.dumps(sizes["adapter"])},
    )
    norm = about["features"].get("speaker_norm")
    text += NORMALISED.format(**norm) if norm else ""
    weights = {name: tensor.contiguous() for name, tensor in classifier.state_dict().items()}
    about = {**about, "classifier": sizes, "temperature": temperature, "code_version": __version__}
    write_folder(folder, save(weights), text, about, trained_card(about))


def export_student(
    folder: str | Path, source: str | Path, weights: bytes, about: Mapping, temperature: float = 1.0
) -> None:
    """Write an adapted student as a recogniser: its source's folder with other weights and another temperature.

    Its model card comes with its results; see `write_card`.

    Parameters
    ----------
    folder : str or pathlib.Path
        Target folder.
    source : str or pathlib.Path
        Folder of the recogniser that the student started from; older ones will do.
    weights : bytes
        The student's, as safetensors.
    about : mapping
        What to say of it beside what is known of the source, of JSON's types.
    temperature : float
        What calibrates its probabilities.

    Raises
    ------
    RecogniserError
        If the source's folder is not whole.

    Example
    -------
    >>> export_student("student", "/nowhere", b"", {})
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.recogniser_files.RecogniserError: /nowhere: no whole recogniser there ...
    """
    known = read_about(source)
    kept = {key: known[key] for key in ("labels", "features", "layer", "classifier", "corpus") if key in known}
    text = (Path(source) / "hyperparams.yaml").read_text(encoding="utf-8")
    text = re.sub(r"(?m)^temperature: .*\n", "", text)
    text = re.sub(r"(?m)^(sample_rate: .*\n)", rf"\g<1>temperature: {temperature}\n", text)
    own = {"adapted_from": recogniser_digest(source), "temperature": temperature, "code_version": __version__}
    write_folder(folder, weights, text, {**kept, **about, **own})


def write_folder(folder: str | Path, weights: bytes, text: str, about: Mapping, card: str | None = None) -> None:
    """Write the files of a recogniser.

    Parameters
    ----------
    folder : str or pathlib.Path
        Target folder.
    weights : bytes
        Safetensors.
    text : str
        YAML.
    about : mapping
        Provenance.
    card : str, optional
        Model card; one that is there stays by default.

    Example
    -------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> write_folder(folder, b"", "labels: [angry]", {})
    >>> sorted(path.name for path in folder.iterdir())
    ['about.json', 'classifier.safetensors', 'custom.py', 'hyperparams.yaml']
    """
    folder = Path(folder)
    atomic_write(folder / "classifier.safetensors", weights)
    atomic_write(folder / "hyperparams.yaml", text)
    atomic_write(folder / "custom.py", INTERFACE)
    if card is not None:
        atomic_write(folder / CARD, card)
    # Last, because its presence tells that the folder is whole.
    atomic_write(folder / "about.json", json.dumps(about, indent=1))


def write_card(folder: str | Path, record: Mapping) -> None:
    """Write the model card of an adapted student, from its results.

    Parameters
    ----------
    folder : str or pathlib.Path
        A folder that `export_student` wrote.
    record : mapping
        The method's `results.json`.

    Raises
    ------
    RecogniserError
        If the folder is not whole.

    Example
    -------
    >>> write_card("/nowhere", {})
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.recogniser_files.RecogniserError: /nowhere: no whole recogniser there ...
    """
    atomic_write(Path(folder) / CARD, adapted_card(read_about(folder), record))


def read_about(folder: str | Path) -> dict:
    """Read what a recogniser's folder says of itself.

    Parameters
    ----------
    folder : str or pathlib.Path
        A folder that `export_recogniser` or `export_student` wrote.

    Returns
    -------
    dict
        With `labels`, `features` and `classifier` at least.

    Raises
    ------
    RecogniserError
        If the folder is not whole.

    Example
    -------
    >>> read_about("/nowhere")
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.recogniser_files.RecogniserError: /nowhere: no whole recogniser there (...). ...
    """
    try:
        about = json.loads((Path(folder) / "about.json").read_text())
        missing = [key for key in ("labels", "features", "classifier") if key not in about]
    except (OSError, ValueError) as error:
        raise RecogniserError(f"{folder}: no whole recogniser there ({error!r}). {GIVE_WHOLE}") from None
    if missing:
        raise RecogniserError(f"{folder}: no whole recogniser there (no {', '.join(missing)}). {GIVE_WHOLE}")
    return about


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
    speechbrain_mifuse.recogniser_files.RecogniserError: /nowhere: no whole recogniser ...
    """
    folder = Path(folder)
    try:
        content = [(folder / name).read_bytes() for name in ("classifier.safetensors", "hyperparams.yaml")]
    except OSError:
        raise RecogniserError(f"{folder}: no whole recogniser there. {GIVE_WHOLE}") from None
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
    speechbrain_mifuse.recogniser_files.RecogniserError: /nowhere: no whole recogniser there (...). ...
    """
    folder = Path(folder)
    about = read_about(folder)
    found = {"labels": about["labels"], **{key: about["features"].get(key) for key in DECISIVE}}
    wanted = {"labels": list(labels), **{key: features.get(key) for key in DECISIVE}}
    differs = difference(found, wanted)
    if differs:
        raise RecogniserError(
            f"{folder}: was trained on something else ({differs}). Pass the same --encoder and --speaker_norm."
        )
    classifier = EmotionClassifier(**about["classifier"])
    load_weights(classifier, folder / "classifier.safetensors")
    return classifier
