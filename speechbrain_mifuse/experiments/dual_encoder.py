"""A dual encoder's training: its sources, what decides its weights, and what it is scored by.

Its control is a plain classifier of the same corpora, trained as long, as fast and on as much at a time.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.epoch_loop import EpochCounter
from speechbrain.utils.seed import seed_everything

from speechbrain_mifuse.adaptation.method import described
from speechbrain_mifuse.brains.classifier import ClassifierBrain
from speechbrain_mifuse.brains.dual_encoder import Source
from speechbrain_mifuse.brains.train_log import TrainLog
from speechbrain_mifuse.brains.training import fit
from speechbrain_mifuse.evaluation.metrics import scores
from speechbrain_mifuse.experiments.features import CorpusSettings, store_frames
from speechbrain_mifuse.experiments.recipes import load_recipe
from speechbrain_mifuse.experiments.same_settings import same_settings
from speechbrain_mifuse.features.dataset import encoded_rows, frame_batches, label_index
from speechbrain_mifuse.features.extract import FrameReader
from speechbrain_mifuse.features.front import StoredFrames
from speechbrain_mifuse.nnet.classifier import EmotionClassifier
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.files import atomic_write, file_digest
from speechbrain_mifuse.utils.model_folder import load_all_weights
from speechbrain_mifuse.zero_shot.captions import CaptionSet
from speechbrain_mifuse.zero_shot.own_dual_encoder import DualEncoderModel, refuse_other_frames
from speechbrain_mifuse.zero_shot.prompts import PromptSet
from speechbrain_mifuse.zero_shot.scorer import class_vectors, zero_shot_predictions, zero_shot_scores

logger = logging.getLogger(__name__)

# What decides the trained weights, beside data, texts and network.
SHARED = ("seed", "target", "labels", "batch_size", "learning_rate", "weight_decay", "number_of_epochs")
DECISIVE = (*SHARED, "class_balanced", "positives", "layer")


def frame_sources_of(
    sources: Mapping[str, Source], reader: FrameReader, layer: int, feature_folder: str | None
) -> dict[str, StoredFrames]:
    """Prepare the corpora that a dual encoder is trained on and store their frames."""
    frame_sources = {}
    for name, source in sources.items():
        source.prepare()
        corpus = CorpusSettings(name, Path(source.manifests), source.prepare, feature_folder)
        frame_sources[name] = StoredFrames(store_frames(corpus, reader), layer)
    return frame_sources


def check_sources(target: str, sources: Mapping[str, Source], frame_sources: Mapping) -> None:
    """Make sure that the target is no source and that all sources' frames are alike."""
    if not sources:
        raise UserError("sources: there is none. Name at least one corpus.")
    if target in sources:
        raise UserError(
            f"sources: '{target}' is the target, and zero-shot scores of a model that was trained on it are none. "
            "Name other corpora."
        )
    first = next(iter(sources))
    for name in sources:
        refuse_other_frames(
            f"sources: {name}, beside {first}", *(frames_of(frame_sources[key]) for key in (first, name))
        )


def frames_of(frame_source) -> dict:
    """Fingerprint of the frames that a frame_source gives, with their layer."""
    return {**frame_source.fingerprint, "layer": frame_source.layer}


def dual_encoder_settings(
    settings: Mapping, sources: Mapping[str, Source], frame_sources: Mapping, captions: CaptionSet, text_encoder
) -> dict:
    """Everything that decides the trained weights."""
    manifests = {name: file_digest(source.manifest("train")) for name, source in sources.items()}
    genders = {name: described("gender", source.gender)["gender"] for name, source in sources.items()}
    texts = {"forms": captions.forms, "people": captions.people, "words": captions.words}
    text = {**text_encoder.fingerprint(), "source": text_encoder.source, "max_tokens": text_encoder.max_tokens}
    return {
        "manifests": manifests,
        "genders": genders,
        "encoder": settings["encoder"],
        "features": frames_of(next(iter(frame_sources.values()))),
        "text_encoder": text,
        "captions": texts,
        "network": described("network", settings["network"]),
        **{name: settings[name] for name in DECISIVE},
    }


def trained_on(labels: Sequence[str], data: Mapping[str, Mapping], sources: Mapping, brain) -> dict:
    """Say what a dual encoder was trained on and which classes it therefore knows."""
    counts = {name: Counter(labels[row["label"]] for row in data.values() if row["source"] == name) for name in sources}
    return {
        "classes_known": [label for label in labels if any(found[label] for found in counts.values())],
        "trained_on": {name: dict(sorted(found.items())) for name, found in counts.items()},
        "captions_seen": len(brain.hparams.captioner.texts),
        "steps": brain.optimizer_step,
        "scale": brain.modules.dual_encoder.scale.item(),
        "selection": "last epoch of a fixed number, nothing is selected",
    }


def validate(
    model: DualEncoderModel, prompts: PromptSet, sources: Mapping[str, Source], frame_sources: Mapping, folder: Path
) -> dict:
    """Score held-out speakers of each source by prompts, as a target is scored: its classes alone, M = N = 1."""
    found = {}
    for name, source in sources.items():
        rows = encoded_rows(source.manifest("valid"), frame_sources[name].store)
        occurring = {row["emo"] for row in rows.values()}
        labels = [label for label in model.classes_known if label in occurring]
        rows = {key: row for key, row in rows.items() if row["emo"] in labels}
        classes = class_vectors(model, prompts, labels, text_repeats=1)
        predicted = zero_shot_predictions(zero_shot_scores(model, frame_sources[name].store, list(rows), classes))
        reference = torch.tensor([label_index(labels, row, key) for key, row in rows.items()])
        result = scores(predicted, reference, len(labels))
        found[name] = {**result, "n": len(reference), "labels": labels}
        values = (name, result["UA"], len(labels), len(reference))
        logger.info("%s, held-out speakers, prompts never trained on: UA %.3f (%d classes, n = %d)", *values)
    atomic_write(folder / "validation.json", json.dumps(found, indent=1))
    return found


def source_dataset(labels, sources: Mapping[str, Source], frame_sources: Mapping) -> DynamicItemDataset:
    """Give frames and class index of every training utterance of several corpora."""
    data = {
        key: {"wav": row["wav"], "label": label_index(labels, row, key), "source": name}
        for name, source in sources.items()
        for key, row in encoded_rows(source.manifest("train"), frame_sources[name].store).items()
    }
    dataset = DynamicItemDataset(data)
    dataset.add_dynamic_item(
        lambda utt_id, wav, source: frame_sources[source].read(utt_id, wav),
        takes=["id", "wav", "source"],
        provides="feats",
    )
    dataset.set_output_keys(["id", "feats", "label"])
    return dataset


def train_source_classifier(
    settings: Mapping, sources: Mapping[str, Source], frame_sources: Mapping, folder: Path, run_opts=None
) -> ClassifierBrain:
    """Train a classifier on the corpora of a dual encoder, as long and as fast, or load it trained."""
    frame_source, weights = next(iter(frame_sources.values())), folder / "classifier.safetensors"
    digests = {name: file_digest(source.manifest("train")) for name, source in sources.items()}
    decisive = {"manifests": digests, "features": frames_of(frame_source), **{name: settings[name] for name in SHARED}}
    trained = same_settings(folder / "settings.json", decisive) and weights.exists()
    seed_everything(settings["seed"])
    train = source_dataset(settings["labels"], sources, frame_sources)
    classifier = EmotionClassifier(frame_source.dim, len(settings["labels"]))
    own = {
        "seed": settings["seed"],
        "labels": settings["labels"],
        "output_folder": folder,
        "class_balanced": True,
        "opt_class": settings["opt_class"],
        "epoch_counter": EpochCounter(settings["number_of_epochs"]),
        "log_interval": settings["log_interval"],
        "train_logger": TrainLog(folder / "train_log.txt"),
    }
    recipe = load_recipe("recipes/RAVDESS/classifier/train.py")
    brain = recipe.make_brain(own, frame_source, classifier, train, run_opts)
    if trained:
        load_all_weights(classifier, weights, UserError, "Delete it: it is trained again.")
    else:
        fit(brain, train, "source classifier", settings["batch_size"])
        atomic_write(weights, save({name: value.contiguous() for name, value in classifier.state_dict().items()}))
    return brain


def classifier_scores(brain: ClassifierBrain, frame_source, manifest: str | Path) -> dict[str, torch.Tensor]:
    """Log-probabilities of the classifier's classes, which stand in the place of cosines."""
    rows = encoded_rows(manifest, frame_source.store)
    dataset = DynamicItemDataset({key: {"wav": row["wav"]} for key, row in rows.items()})
    dataset.add_dynamic_item(frame_source.read, takes=["id", "wav"], provides="feats")
    dataset.set_output_keys(["id", "feats"])
    probs = brain.predict(dataset, **frame_batches(batch_size=256))
    return {key: torch.tensor(values).clamp(min=1e-8).log() for key, values in probs.items()}
