"""The classifier of a corpus: prepared, trained once, and found trained from then on."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.distributed import run_on_main
from torch.nn import functional as F

from speechbrain_mifuse.brains.classifier import ClassifierBrain
from speechbrain_mifuse.brains.training import one_at_a_time, require_trainable, same_settings
from speechbrain_mifuse.corpora.manifest import read_manifest
from speechbrain_mifuse.evaluation.metrics import scores, speaker_interval
from speechbrain_mifuse.evaluation.results import counts_by_speaker
from speechbrain_mifuse.experiments.features import CorpusSettings, open_front
from speechbrain_mifuse.experiments.recipes import load_recipe
from speechbrain_mifuse.features.dataset import frame_batches
from speechbrain_mifuse.features.extract import FrameReader
from speechbrain_mifuse.inference.recognizer_folder import export_recogniser
from speechbrain_mifuse.nnet.adapter_files import adapter_digest
from speechbrain_mifuse.nnet.calibration import fit_temperature, mean_nll
from speechbrain_mifuse.nnet.model_card import encoder_told
from speechbrain_mifuse.utils.files import atomic_write, file_digest

logger = logging.getLogger(__name__)

# What decides the trained weights, beside the data.
DECISIVE = ("seed", "labels", "batch_size", "learning_rate", "number_of_epochs", "class_balanced", "dropout", "layer")


def trained_recogniser(corpus: CorpusSettings, reader: FrameReader, run_opts: Mapping | None = None) -> Path:
    """Store the frames of a prepared corpus and train its classifier; each step is skipped when done."""
    classifier = corpus.classifier
    folder = Path(classifier["output_folder"])
    folder.mkdir(parents=True, exist_ok=True)
    recipe = load_recipe("recipes/RAVDESS/classifier/train.py")
    # Runs side by side may share a source or a teacher: the first trains it, the others wait and find it.
    with one_at_a_time(folder / "lock"):
        return recipe.train_classifier(classifier, open_front(corpus, classifier["layer"], reader), run_opts)


def prepare_labelled(corpus: CorpusSettings) -> None:
    """Prepare the corpus that a classifier is trained on, and make sure that it has an example of each class."""
    classifier = corpus.classifier
    folder = Path(classifier["output_folder"])
    folder.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(folder / "lock"):
        run_on_main(corpus.prepare)
    rows = read_manifest(classifier["train_manifest"]).values()
    where = f"{classifier['name']} ({classifier['train_manifest']})"
    require_trainable([row.get("emo") for row in rows], where, classifier["labels"])


def classifier_settings(settings: Mapping, front) -> dict:
    """Everything that decides the trained weights."""
    manifest = file_digest(settings["train_manifest"])
    features = {"finetuned": settings["encoder"]} if front.store is None else front.fingerprint
    adapter = {} if settings["adapter"] is None else {"adapter": adapter_digest(settings["adapter"])}
    return {"train_manifest": manifest, "features": features, **chosen_settings(settings), **adapter}


def chosen_settings(settings: Mapping) -> dict:
    """Give what a recipe says of the training, the part of `classifier_settings` that is known before it begins."""
    return {name: settings[name] for name in DECISIVE}


def finished(folder: Path, settings: Mapping) -> bool:
    """Tell whether a classifier was trained to its end with these settings."""
    if not (same_settings(folder / "settings.json", settings) and (folder / "recogniser" / "about.json").exists()):
        return False
    logger.info("%s: classifier is trained already, training skipped.", folder)
    return True


def validate(brain: ClassifierBrain, valid: DynamicItemDataset, settings: Mapping) -> dict:
    """Score held-out speakers of the training corpus and keep the result beside the classifier."""
    labels, rows = settings["labels"], valid.data
    by_key = brain.predict(valid, **frame_batches(batch_size=settings["batch_size"]))
    probs = torch.tensor([by_key[key] for key in rows])
    reference = torch.tensor([row["label"] for row in rows.values()])
    found = {**scores(probs.argmax(-1), reference, len(labels)), "n": len(reference)}
    counts = counts_by_speaker(by_key, rows, labels)
    found |= {"ci95": list(speaker_interval(counts)), "test_speakers": len(counts)}
    found["counts"] = {label: int((reference == index).sum()) for index, label in enumerate(labels)}
    said = F.one_hot(reference, len(labels))
    found["temperature"] = fit_temperature(probs, said)
    found["nll"], found["calibrated_nll"] = mean_nll(probs, said), mean_nll(probs, said, found["temperature"])
    atomic_write(Path(settings["output_folder"]) / "validation.json", json.dumps(found, indent=1))
    logger.info("%s: held-out speakers of its own corpus: UA %.3f (n = %d)", settings["name"], found["UA"], found["n"])
    return found


def export_classifier(
    brain: ClassifierBrain,
    front,
    train: DynamicItemDataset,
    settings: Mapping,
    trained_with: Mapping,
    validation: Mapping,
) -> None:
    """Write a trained classifier as a recognizer's folder; `trained_with` is what `classifier_settings` gave."""
    counts = Counter(row["emo"] for row in train.data.values())
    about = {**trained_with, "corpus": settings["name"], "counts": dict(sorted(counts.items()))}
    about |= {"encoder": encoder_told(settings["encoder"]), "validation": validation}
    folder = Path(settings["output_folder"]) / "recogniser"
    export_recogniser(folder, brain.modules.classifier.cpu(), front, settings, about, validation["temperature"])
