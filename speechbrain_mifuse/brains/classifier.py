"""Supervised training of the emotion classifier, on stored frames or with the encoder."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import speechbrain as sb
import torch
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.distributed import run_on_main
from speechbrain.utils.seed import seed_everything
from torch.nn import functional as F

from speechbrain_mifuse.brains.training import ResumableBrain, WholeCheckpointer, fit, require_trainable, same_settings
from speechbrain_mifuse.evaluation.metrics import scores, speaker_bootstrap
from speechbrain_mifuse.evaluation.results import counts_by_speaker
from speechbrain_mifuse.features.dataset import encoded_rows, frame_batches, label_index
from speechbrain_mifuse.inference.recognizer_folder import export_recogniser
from speechbrain_mifuse.nnet.adapter_files import adapter_digest, load_adapter
from speechbrain_mifuse.nnet.calibration import fit_temperature, mean_nll
from speechbrain_mifuse.nnet.classifier import EmotionClassifier
from speechbrain_mifuse.nnet.model_card import encoder_told
from speechbrain_mifuse.utils.files import atomic_write, file_digest

logger = logging.getLogger(__name__)

# What decides the trained weights, beside the data.
DECISIVE = ("seed", "labels", "batch_size", "learning_rate", "number_of_epochs", "class_balanced", "dropout", "layer")


def class_weights(labels: torch.Tensor, n_classes: int) -> torch.Tensor:
    """Weights that let each class count the same: `N / (C N_c)`."""
    counts = torch.bincount(labels, minlength=n_classes).float()
    return torch.where(counts > 0, len(labels) / (n_classes * counts.clamp(min=1)), 0.0)


class ClassifierBrain(ResumableBrain):
    """Cross-entropy training of `modules.front` and `modules.classifier`.

    Beyond `ResumableBrain`'s, `hparams` must hold `class_weight`: `[C]` or `None`.
    """

    def compute_forward(self, batch, stage):
        """Logits `[batch, C]` of one batch."""
        batch = batch.to(self.device)
        return self.modules.classifier(*self.modules.front(*batch.feats))

    def compute_objectives(self, predictions, batch, stage):
        """Cross-entropy, weighted by class if asked for."""
        weight = self.hparams.class_weight
        return F.cross_entropy(predictions, batch.label, weight=None if weight is None else weight.to(self.device))

    @torch.inference_mode()
    def predict(self, dataset, **loader) -> dict[str, list[float]]:
        """Give class probabilities `[C]` of every utterance by its id."""
        self.modules.eval()
        found = {}
        for batch in self.make_dataloader(dataset, sb.Stage.TEST, ckpt_prefix=None, **loader):
            probs = self.compute_forward(batch, sb.Stage.TEST).softmax(-1).cpu()
            found.update(zip(batch.id, probs.tolist(), strict=True))
        return found


def labelled_dataset(manifest: str | Path, front, labels) -> DynamicItemDataset:
    """Frames and class index of each utterance of a manifest."""
    rows = encoded_rows(manifest, getattr(front, "store", None))
    data = {key: {"wav": row["wav"], "label": label_index(labels, row, key)} for key, row in rows.items()}
    dataset = DynamicItemDataset(data)
    dataset.add_dynamic_item(front.read, takes=["id", "wav"], provides="feats")
    dataset.set_output_keys(["id", "feats", "label"])
    return dataset


def train_classifier(hparams: Mapping, front, run_opts=None) -> Path:
    """Train a classifier, or find it trained, and export it as a recogniser.

    A finished training with the same settings is not repeated; a killed one goes on where it was.

    Parameters
    ----------
    hparams : mapping
        As `hparams/base/classifier.yaml` defines.
    front : StoredFrames or FinetunedEncoder
        Gives the frames.
    run_opts : dict, optional
        SpeechBrain's run options.

    Returns
    -------
    pathlib.Path
        Folder of the recogniser, for `EmotionRecognizer.from_hparams`.

    Raises
    ------
    SettingsError
        If the output folder holds a classifier trained otherwise.
    UserError
        If there are fewer than two recordings to train on, or none of some class.
    """
    folder = Path(hparams["output_folder"])
    recogniser = folder / "recogniser"
    settings = classifier_settings(hparams, front)
    if same_settings(folder / "settings.json", settings) and (recogniser / "about.json").exists():
        logger.info("%s: classifier is trained already, training skipped.", folder)
        return recogniser
    seed_everything(hparams["seed"])
    train = labelled_dataset(hparams["train_manifest"], front, hparams["labels"])
    emotions = [hparams["labels"][row["label"]] for row in train.data.values()]
    require_trainable(emotions, f"{hparams['name']} ({hparams['train_manifest']})", hparams["labels"])
    classifier = starting_classifier(hparams, front)
    brain = make_brain(hparams, front, classifier, train, run_opts)
    fit(brain, train, f"classifier {hparams['name']}", hparams["batch_size"])
    run_on_main(finish, args=[brain, hparams, front, settings, train])
    return recogniser


def finish(brain: ClassifierBrain, hparams: Mapping, front, settings: Mapping, train: DynamicItemDataset) -> None:
    """Score a trained classifier on held-out speakers and export it."""
    validation = validate(brain, hparams, front)
    counts = Counter(hparams["labels"][row["label"]] for row in train.data.values())
    about = {**settings, "corpus": hparams["name"], "counts": dict(sorted(counts.items()))}
    about |= {"encoder": encoder_told(hparams["encoder"]), "validation": validation}
    folder = Path(hparams["output_folder"]) / "recogniser"
    export_recogniser(folder, brain.modules.classifier.cpu(), front, hparams, about, validation["temperature"])


def classifier_settings(hparams: Mapping, front) -> dict:
    """Everything that decides the trained weights."""
    manifest = file_digest(hparams["train_manifest"])
    features = front.fingerprint if hasattr(front, "store") else {"finetuned": hparams["encoder"]}
    adapter = {} if hparams["adapter"] is None else {"adapter": adapter_digest(hparams["adapter"])}
    return {"train_manifest": manifest, "features": features, **chosen_settings(hparams), **adapter}


def chosen_settings(hparams: Mapping) -> dict:
    """Give what a recipe says of the training, the part of `classifier_settings` that is known before it begins."""
    return {name: hparams[name] for name in DECISIVE}


def starting_classifier(hparams: Mapping, front) -> EmotionClassifier:
    """Build the classifier as training starts: random weights, but for a pretrained adapter if one is named."""
    sizes = {"input_size": front.dim, "n_classes": len(hparams["labels"]), "n_layers": front.n_layers}
    if hparams["adapter"] is None:
        return hparams["classifier"](**sizes)
    fingerprint = front.fingerprint if hasattr(front, "store") else {}
    adapter = load_adapter(hparams["adapter"], {**fingerprint, "layer": hparams["layer"]})
    classifier = hparams["classifier"](**sizes, adapter=adapter.sizes)
    classifier.adapter.load_state_dict(adapter.state_dict())
    return classifier


def make_brain(hparams: Mapping, front, classifier, train, run_opts) -> ClassifierBrain:
    """Wire a `ClassifierBrain` with its checkpointer."""
    labels = torch.tensor([row["label"] for row in train.data.values()])
    weight = class_weights(labels, len(hparams["labels"])) if hparams["class_balanced"] else None
    recoverables = {"classifier": classifier, "counter": hparams["epoch_counter"]}
    if list(front.parameters()):  # stored frames have none, and SpeechBrain warns of empty files
        recoverables["front"] = front
    checkpointer = WholeCheckpointer(Path(hparams["output_folder"]) / "save", recoverables)
    return ClassifierBrain(
        modules={"front": front, "classifier": classifier},
        opt_class=hparams["opt_class"],
        hparams={**hparams, "class_weight": weight},
        run_opts=run_opts,
        checkpointer=checkpointer,
    )


def validate(brain: ClassifierBrain, hparams: Mapping, front) -> dict:
    """Score held-out speakers of the training corpus and keep the result beside the classifier."""
    valid = labelled_dataset(hparams["valid_manifest"], front, hparams["labels"])
    by_key = brain.predict(valid, **frame_batches(batch_size=hparams["batch_size"]))
    probs = torch.tensor([by_key[key] for key in valid.data_ids])
    reference = torch.tensor([valid.data[key]["label"] for key in valid.data_ids])
    found = {**scores(probs.argmax(-1), reference, len(hparams["labels"])), "n": len(reference)}
    rows = encoded_rows(hparams["valid_manifest"], getattr(front, "store", None))
    counts = counts_by_speaker(by_key, rows, hparams["labels"])
    found |= {"ci95": list(speaker_bootstrap(counts)), "test_speakers": len(counts)}
    found["counts"] = {label: int((reference == index).sum()) for index, label in enumerate(hparams["labels"])}
    said = F.one_hot(reference, len(hparams["labels"]))
    found["temperature"] = fit_temperature(probs, said)
    found["nll"], found["calibrated_nll"] = mean_nll(probs, said), mean_nll(probs, said, found["temperature"])
    atomic_write(Path(hparams["output_folder"]) / "validation.json", json.dumps(found, indent=1))
    logger.info("%s: held-out speakers of its own corpus: UA %.3f (n = %d)", hparams["name"], found["UA"], found["n"])
    return found
