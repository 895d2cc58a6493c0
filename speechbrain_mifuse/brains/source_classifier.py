"""A plain classifier of several labelled corpora: the control for what a dual encoder learns without texts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.epoch_loop import EpochCounter
from speechbrain.utils.seed import seed_everything

from speechbrain_mifuse.brains.classifier import ClassifierBrain, class_weights
from speechbrain_mifuse.brains.dual_encoder import Source, frames_of
from speechbrain_mifuse.brains.train_log import TrainLog
from speechbrain_mifuse.brains.training import WholeCheckpointer, fit, same_settings
from speechbrain_mifuse.features.dataset import encoded_rows, frame_batches, label_index
from speechbrain_mifuse.nnet.classifier import EmotionClassifier
from speechbrain_mifuse.nnet.weights import load_all_weights
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.files import atomic_write, file_digest

# Of `hparams/base/dual_encoder.yaml`: the classifier is trained as long, as fast and on as much at a time.
DECISIVE = ("seed", "target", "labels", "batch_size", "learning_rate", "weight_decay", "number_of_epochs")


def source_dataset(labels, sources: Mapping[str, Source], fronts: Mapping) -> DynamicItemDataset:
    """Frames and class index of every training utterance of several corpora."""
    data = {
        key: {"wav": row["wav"], "label": label_index(labels, row, key), "source": name}
        for name, source in sources.items()
        for key, row in encoded_rows(source.manifest("train"), fronts[name].store).items()
    }
    dataset = DynamicItemDataset(data)
    dataset.add_dynamic_item(
        lambda utt_id, wav, source: fronts[source].read(utt_id, wav), takes=["id", "wav", "source"], provides="feats"
    )
    dataset.set_output_keys(["id", "feats", "label"])
    return dataset


def train_source_classifier(
    hparams: Mapping, sources: Mapping[str, Source], fronts: Mapping, folder: str | Path, run_opts=None
) -> ClassifierBrain:
    """Train a classifier on the corpora of a dual encoder, or load it trained.

    Parameters
    ----------
    hparams : mapping
        As `hparams/base/dual_encoder.yaml` defines: epochs, batch size and optimiser are those of the dual encoder.
    sources, fronts
        As for `train_dual_encoder`.
    folder : str or pathlib.Path
        Where it goes.
    run_opts : dict, optional
        SpeechBrain's run options.

    Returns
    -------
    ClassifierBrain
        Ready to predict.

    Raises
    ------
    SettingsError
        If the folder holds one that was trained otherwise.
    """
    folder, front = Path(folder), next(iter(fronts.values()))
    digests = {name: file_digest(source.manifest("train")) for name, source in sources.items()}
    settings = {"manifests": digests, "features": frames_of(front), **{name: hparams[name] for name in DECISIVE}}
    weights = folder / "classifier.safetensors"
    trained = same_settings(folder / "settings.json", settings) and weights.exists()
    seed_everything(hparams["seed"])
    train = source_dataset(hparams["labels"], sources, fronts)
    classifier = EmotionClassifier(front.dim, len(hparams["labels"]))
    found = torch.tensor([row["label"] for row in train.data.values()])
    own = {
        "seed": hparams["seed"],
        "class_weight": class_weights(found, len(hparams["labels"])),
        "epoch_counter": EpochCounter(hparams["number_of_epochs"]),
        "log_interval": hparams["log_interval"],
        "train_logger": TrainLog(folder / "train_log.txt"),
    }
    brain = ClassifierBrain(
        modules={"front": front, "classifier": classifier},
        opt_class=hparams["opt_class"],
        hparams=own,
        run_opts=run_opts,
        checkpointer=WholeCheckpointer(folder / "save", {"classifier": classifier, "counter": own["epoch_counter"]}),
    )
    if trained:
        load_all_weights(classifier, weights, UserError, "Delete it: it is trained again.")
    else:
        fit(brain, train, "source classifier", hparams["batch_size"])
        trained = {name: value.contiguous() for name, value in classifier.state_dict().items()}
        atomic_write(weights, save(trained))
    return brain


def classifier_scores(brain: ClassifierBrain, front, manifest: str | Path) -> dict[str, torch.Tensor]:
    """Log-probabilities of the classifier's classes, which stand in the place of cosines."""
    rows = encoded_rows(manifest, front.store)
    dataset = DynamicItemDataset({key: {"wav": row["wav"]} for key, row in rows.items()})
    dataset.add_dynamic_item(front.read, takes=["id", "wav"], provides="feats")
    dataset.set_output_keys(["id", "feats"])
    probs = brain.predict(dataset, **frame_batches(batch_size=256))
    return {key: torch.tensor(values).clamp(min=1e-8).log() for key, values in probs.items()}
