"""The folder of a recogniser: written, read as data, checked, built."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from speechbrain.utils.fetching import fetch
from speechbrain.utils.parameter_transfer import Pretrainer

from speechbrain_mifuse import __version__
from speechbrain_mifuse.features.encoder import FrozenEncoder
from speechbrain_mifuse.features.store import difference
from speechbrain_mifuse.inference.model_card import adapted_card, trained_card
from speechbrain_mifuse.nnet.classifier import EmotionClassifier
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.files import atomic_write
from speechbrain_mifuse.utils.model_folder import (
    ABOUT,
    CARD,
    SAME_FRAMES,
    SETTINGS,
    ModelFolder,
    object_yaml,
    pretrainer_yaml,
)
from speechbrain_mifuse.utils.schemas import (
    TAGS,
    ClassifierSizes,
    RecognizerAbout,
    RecognizerSettings,
    checked,
    plain_yaml,
)

HEAD = """# An emotion recogniser; load it with speechbrain_mifuse.inference.EmotionRecognizer.from_hparams.
pretrained_path: .
labels: {labels}
sample_rate: 16000
temperature: {temperature}
trim_db: {trim_db}
frame_average: {frame_average}
"""
MODULES = """modules:
    encoder: !ref <encoder>
    classifier: !ref <classifier>
"""
NORMALISED = """# Trained on frames from which each speaker's offset was subtracted. A recording comes without a speaker
# here, so its offset is 0.
speaker_norm: {name}
"""
# What SpeechBrain's `foreign_class` looks for beside the YAML.
INTERFACE = '''"""Lets SpeechBrain's `foreign_class` load this folder, where speechbrain-mifuse is installed."""

from speechbrain_mifuse.inference import EmotionRecognizer as CustomInterface  # noqa: F401
'''

EXPORT_AGAIN = "Export the recogniser again."
# For a YAML that is not that of an exported recogniser.
NOT_EXPORTED = "Get the folder anew, or export it again. If it is a program that you trust, pass trust_code=True to "
NOT_EXPORTED += "from_hparams, which runs it."
WEIGHTS = "classifier.safetensors"
# Samples of the clip that a loaded recogniser is tried out with.
TRIED_SAMPLES = 8000
# Keys of the YAML that mean something; the others only wire its parts for SpeechBrain.
SETTING_NAMES = [key for key, field in RecognizerSettings.model_fields.items() if not field.exclude]


class RecogniserError(UserError):
    """A recogniser's folder that is not whole, or does not fit what is asked of it."""


RECOGNIZER = ModelFolder(
    "recogniser",
    WEIGHTS,
    RecognizerAbout,
    RecogniserError,
    "Train it again, or give a whole folder as a recipe exports it; one on a hub is downloaded first.",
    EXPORT_AGAIN,
    identity=(WEIGHTS, SETTINGS),
    more={"custom.py": INTERFACE},
)
# SHA-256 over the weights and the YAML of a recogniser.
recogniser_digest = RECOGNIZER.digest
# The hook that its YAML names.
load_weights = RECOGNIZER.load_weights


def read_settings(path: str | Path) -> RecognizerSettings:
    """Read the YAML of a recogniser as plain data: nothing that it names is run."""
    try:
        content = plain_yaml(path, TAGS)
    except ValueError as error:
        raise RecogniserError(f"{path}: {error}. {NOT_EXPORTED}") from None
    return checked(RecognizerSettings, content, path, RecogniserError, NOT_EXPORTED)


def open_recogniser(
    source: str | Path,
    overrides: Mapping | None = None,
    overrides_must_match: bool = True,
    hparams_file: str = SETTINGS,
    download_only: bool = False,
    **fetching,
) -> dict | None:
    """Build the parts of a recogniser from its folder or hub repository, of which no code is run."""
    path = _fetched(hparams_file, source, **fetching)
    settings = read_settings(path)
    _refuse_disagreement(path, settings, source, **fetching)
    changes = dict(overrides or {})
    more = {} if overrides_must_match else {key: changes.pop(key) for key in {*changes} - {*SETTING_NAMES}}
    settings = _changed(settings, {"pretrained_path": str(source), **own_encoder(source)}, changes)
    weights = _fetched(WEIGHTS, settings.pretrained_path, **fetching)
    if download_only:
        return None
    classifier = _classifier(settings.classifier, weights)
    modules = {"encoder": _open_encoder(source, settings), "classifier": classifier}
    _try_out(source, **modules)
    return {**more, **settings.model_dump(), **modules, "modules": modules, "savedir": fetching.get("savedir")}


def _fetched(name: str, source: str | Path, **fetching) -> Path:
    """Fetch a file of a recogniser as SpeechBrain does."""
    try:
        return Path(fetch(name, str(source), **fetching))
    except Exception as error:  # the clients of hubs share no class of errors
        reason = " ".join(str(error).split())
        raise RecogniserError(
            f"{source}: no folder of a recogniser, and no repository of a hub that can be read ({name}: {reason})."
        ) from error


def _refuse_disagreement(path: Path, settings: RecognizerSettings, source: str | Path, **fetching) -> None:
    """Make sure that `about.json`, if there is one, describes the same classifier as the YAML."""
    try:
        about_path = _fetched(ABOUT, source, **fetching)
    except RecogniserError:
        return
    about = RECOGNIZER.checked_about(about_path)
    differs = difference(*({key: getattr(each, key) for key in ("labels", "classifier")} for each in (settings, about)))
    if differs:
        raise RecogniserError(f"{path}: differs from {about_path} ({differs}). {NOT_EXPORTED}")


def _changed(settings: RecognizerSettings, own: Mapping, overrides: Mapping) -> RecognizerSettings:
    """Change settings first to where the parts lie now, then to what the user wants."""
    values = settings.model_dump()
    for changes in (own, overrides):
        for key, value in changes.items():
            inner = isinstance(value, Mapping) and isinstance(values.get(key), Mapping)
            values[key] = {**values[key], **value} if inner else value
    advice = f"Settings of a recogniser: {', '.join(SETTING_NAMES)}."
    return checked(RecognizerSettings, values, "overrides", RecogniserError, advice)


def _open_encoder(source: str | Path, settings: RecognizerSettings) -> FrozenEncoder:
    """Load the encoder of a recogniser and make sure that its classifier takes its frames."""
    name_it = "say where the encoder is: overrides={'encoder': {'source': FOLDER_OR_HUB_ID}}."
    try:
        encoder = FrozenEncoder(settings.encoder.source, settings.encoder.layers)
    except Exception as error:  # a damaged folder can raise anything in transformers
        raise RecogniserError(
            f"{source}: cannot be loaded ({' '.join(str(error).split())[:1000]}). Bring the whole folder, with "
            f"`encoder` if it had one, or {name_it}"
        ) from error
    given = {"input_size": encoder.dim, "n_layers": len(encoder.layers), "sample_rate": encoder.sample_rate}
    wanted = {**settings.classifier.model_dump(), "sample_rate": settings.sample_rate}
    differs = difference(given, {key: wanted[key] for key in given})
    if differs:
        raise RecogniserError(
            f"{source}: the encoder '{settings.encoder.source}' does not fit the classifier ({differs}). "
            f"Bring the encoder that it was trained with, or {name_it}"
        )
    return encoder


def _try_out(source: str | Path, encoder: FrozenEncoder, classifier: EmotionClassifier) -> None:
    """Make sure that the parts answer to a short clip: settings and weights may be valid one by one only."""
    training = classifier.training
    try:
        with torch.no_grad():
            frames = encoder(torch.linspace(-0.5, 0.5, TRIED_SAMPLES))
            classifier.eval()
            logits = classifier.head(classifier.embed(frames.unsqueeze(0)), stochastic=False)
        if not logits.isfinite().all():
            raise ValueError("its answers are not finite numbers")
    except Exception as error:  # what torch makes of parts that do not fit together
        reason = " ".join(str(error).split())[:500]
        raise RecogniserError(f"{source}: the encoder and classifier do not work ({reason}). {EXPORT_AGAIN}") from error
    finally:
        classifier.train(training)


def _classifier(sizes: ClassifierSizes, path: str | Path) -> EmotionClassifier:
    return RECOGNIZER.build(lambda: EmotionClassifier(**sizes.model_dump()), path)


def own_encoder(source: str | Path) -> dict:
    """Say where the encoder of a recogniser is, if it lies in its folder; its YAML names where it was exported to."""
    encoder = Path(source) / "encoder"
    return {"encoder": {"source": str(encoder.resolve())}} if encoder.is_dir() else {}


class FolderPretrainer(Pretrainer):
    """SpeechBrain's `Pretrainer`, which finds weights beside the YAML wherever the process runs."""

    def collect_files(self, default_source=None, **options):
        """Fetch the weights; see SpeechBrain's `Pretrainer.collect_files`."""
        if isinstance(default_source, str | Path):
            self.paths = {
                name: f"{default_source}/{path[2:]}" if str(path).startswith("./") else path
                for name, path in self.paths.items()
            }
        return super().collect_files(default_source, **options)


def export_recogniser(
    folder: str | Path, classifier, front, settings: Mapping, about: Mapping, temperature: float = 1.0
) -> None:
    """Write a recognizer: weights, the YAML that builds it, what it was trained on, a model card.

    Parameters
    ----------
    folder : str or pathlib.Path
        Made if missing.
    classifier : EmotionClassifier
        Trained.
    front : StoredFrames or FinetunedEncoder
        Where its frames came from, see `features.front`; an encoder that was trained along is exported too.
    hparams : mapping
        With `encoder`, `labels` and `trim_db`.
    about : mapping
        Provenance, of JSON's types, with `labels` and `features`.
    temperature : float
        Of the probabilities, see `nnet.calibration.fit_temperature`.
    """
    folder = Path(folder)
    # Absolute, because a recogniser is loaded from other folders than it was trained in.
    source = str(Path(settings["encoder"]).resolve()) if Path(settings["encoder"]).is_dir() else settings["encoder"]
    layers = None
    if hasattr(front, "export"):
        source = str((folder / "encoder").resolve())
        front.export(source)
    else:
        layers = front.store.layers if front.layer is None else [front.layer]
    sizes = {
        "input_size": front.dim,
        "n_classes": len(settings["labels"]),
        "hidden_size": classifier.hidden.out_features,
        "dropout": classifier.dropout,
        "n_layers": front.n_layers,
        "attention_size": classifier.pooling.project.out_features,
        "adapter": None if classifier.adapter is None else classifier.adapter.sizes,
    }
    norm = about["features"].get("speaker_norm")
    text = settings_text(
        settings["labels"], source, layers, sizes, settings["trim_db"], getattr(front, "frame_average", 1), temperature
    )
    text += NORMALISED.format(**norm) if norm else ""
    about = {**about, "classifier": sizes, "temperature": temperature, "code_version": __version__}
    RECOGNIZER.write(folder, classifier.state_dict(), text, about, trained_card(about))


def settings_text(
    labels: Sequence[str],
    encoder: str,
    layers: Sequence[int] | None,
    sizes: Mapping,
    trim_db: float | None,
    frame_average: int = 1,
    temperature: float = 1.0,
) -> str:
    """Write the YAML of a recogniser."""
    shown = "null" if trim_db is None else trim_db
    text = HEAD.format(labels=list(labels), temperature=temperature, trim_db=shown, frame_average=frame_average)
    parts = {"source": encoder, "layers": layers}
    text += object_yaml("encoder", "speechbrain_mifuse.features.encoder.FrozenEncoder", parts)
    text += object_yaml("classifier", "speechbrain_mifuse.nnet.classifier.EmotionClassifier", sizes) + MODULES
    hook, built = "speechbrain_mifuse.inference.load_weights", "speechbrain_mifuse.inference.FolderPretrainer"
    return text + pretrainer_yaml("classifier", "<pretrained_path>/classifier.safetensors", hook, built)


def export_student(
    folder: str | Path, source: str | Path, weights: bytes, about: Mapping, temperature: float = 1.0
) -> None:
    """Write an adapted student as a recogniser: its source's folder with other weights and another temperature."""
    known = read_about(source)
    # Its text is taken over, hence must be that of a recogniser and of nothing else.
    read_settings(Path(source) / SETTINGS)
    kept = {key: known[key] for key in ("labels", "features", "layer", "classifier", "corpus") if key in known}
    text = (Path(source) / SETTINGS).read_text(encoding="utf-8")
    text = re.sub(r"(?m)^temperature: .*\n", "", text)
    text = re.sub(r"(?m)^(sample_rate: .*\n)", rf"\g<1>temperature: {temperature}\n", text)
    own = {"adapted_from": recogniser_digest(source), "temperature": temperature, "code_version": __version__}
    RECOGNIZER.write(folder, weights, text, {**kept, **about, **own})


def write_card(folder: str | Path, record: Mapping) -> None:
    """Write the model card of an adapted student, from its results."""
    atomic_write(Path(folder) / CARD, adapted_card(read_about(folder), record))


def read_about(folder: str | Path) -> dict:
    """Read what a recognizer's folder says of itself: the checked content of `about.json`."""
    return RECOGNIZER.about(folder).model_dump(exclude_unset=True)


def load_classifier(folder: str | Path, labels: Sequence[str], features: Mapping) -> EmotionClassifier:
    """Build the classifier of a recognizer without its encoder, for frames that are stored already.

    Parameters
    ----------
    folder : str or pathlib.Path
        A folder that `export_recogniser` wrote.
    labels : sequence of str
        Classes that it must have, in this order.
    features : mapping
        Fingerprint of the frames that it is to read.

    Returns
    -------
    EmotionClassifier
        With its weights.

    Raises
    ------
    RecogniserError
        If the folder is not complete, or the classifier was trained on other labels or frames.
    """
    about = RECOGNIZER.about(folder)
    found = {"labels": about.labels, **{key: about.features.get(key) for key in SAME_FRAMES}}
    wanted = {"labels": list(labels), **{key: features.get(key) for key in SAME_FRAMES}}
    differs = difference(found, wanted)
    if differs:
        raise RecogniserError(
            f"{folder}: was trained on something else ({differs}). Pass the same --encoder and --speaker_norm."
        )
    return _classifier(about.classifier, Path(folder) / WEIGHTS)
