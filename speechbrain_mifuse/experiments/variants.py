"""Arms of a comparison: classifiers trained alike on the same folds, each scored on speakers it never heard."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.distributed import main_process_only, run_on_main
from speechbrain.utils.epoch_loop import EpochCounter

from speechbrain_mifuse import __version__
from speechbrain_mifuse.brains.classifier import class_weights, labelled_dataset
from speechbrain_mifuse.brains.finetuning import FinetuningBrain
from speechbrain_mifuse.brains.train_log import TrainLog
from speechbrain_mifuse.brains.training import WholeCheckpointer, fit, same_settings
from speechbrain_mifuse.evaluation.results import evaluate
from speechbrain_mifuse.features.dataset import frame_batches
from speechbrain_mifuse.report.figures import plot_confusion
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.files import atomic_write, file_digest

# Lines of the log and checkpoints of a run, at most.
LOG_POINTS = 3
# What decides the trained weights, beside arm and data; the same for every arm.
DECISIVE = ("finetuning_steps", "finetuning_batch_size", "finetuning_learning_rate", "adapter_learning_rate")


@dataclass(frozen=True)
class Run:
    """One fold with one seed and one amount of labels."""

    folder: Path
    manifests: Path
    fold: int
    seed: int
    labels_per_class: int | str = "all"
    about: Mapping = field(default_factory=dict)

    @property
    def splits(self) -> tuple[Path, Path]:
        """Manifests of the training and of the test set."""
        return self.manifests / "train.json", self.manifests / "test.json"

    def arm_folder(self, name: str) -> Path:
        """Where an arm's results go."""
        return self.folder / f"labels_{self.labels_per_class}" / name


def few_labels(rows: Mapping[str, Mapping], per_class: int | str, seed: int) -> list[str]:
    """Draw the same number of labelled utterances of every class; the draw depends on ids and seed alone."""
    if per_class == "all":
        return sorted(rows)
    if not isinstance(per_class, int) or per_class < 1:
        raise UserError(f"--labels_per_class: {per_class} is neither 'all' nor a positive number.")
    by_label: dict[int, list[str]] = {}
    for key in sorted(rows):
        by_label.setdefault(rows[key]["label"], []).append(key)
    dice = random.Random(seed)
    return sorted(key for label in sorted(by_label) for key in sample_of(by_label[label], per_class, dice))


def sample_of(keys: Sequence[str], count: int, dice: random.Random) -> list[str]:
    """Draw without replacement, all when there are too few."""
    return dice.sample(keys, min(count, len(keys)))


def keep_only(dataset: DynamicItemDataset, keys: Sequence[str]) -> None:
    """Leave some utterances in a dataset."""
    dataset.data = {key: dataset.data[key] for key in keys}
    dataset.data_ids = list(keys)


def shared_settings(hparams: Mapping, run: Run, front) -> dict:
    """Everything that decides an arm's result but the arm itself."""
    digests = [file_digest(path) for path in run.splits]
    found = {"manifests": digests, "seed": run.seed, "labels_per_class": run.labels_per_class}
    return {**found, **chosen_settings(hparams), "features": {**front.fingerprint, "layer": front.layer}}


def chosen_settings(hparams: Mapping) -> dict:
    """Give what a recipe says of the training, the part of `shared_settings` that is known before it begins."""
    return {key: hparams[key] for key in (*DECISIVE, "labels", "class_balanced")}


def found_done(folder: Path, settings: Mapping) -> dict | None:
    """Read the record of an arm that is done already."""
    if same_settings(folder / "settings.json", settings) and (folder / "results.json").exists():
        return json.loads((folder / "results.json").read_text())
    return None


def fit_and_predict(
    name: str,
    hparams: Mapping,
    run: Run,
    front,
    classifier,
    run_opts: Mapping | None = None,
    columns: Mapping[str, Mapping] | None = None,
    kind: type[FinetuningBrain] = FinetuningBrain,
) -> tuple[FinetuningBrain, dict[str, list[float]], int]:
    """Train a classifier on a fold's training set and predict its test set."""
    train, test = (with_columns(labelled_dataset(path, front, hparams["labels"]), columns or {}) for path in run.splits)
    keep_only(train, few_labels(train.data, run.labels_per_class, run.seed))
    folder, size = run.arm_folder(name), hparams["finetuning_batch_size"]
    brain = make_brain(hparams, run, folder, front, classifier, train, run_opts, kind)
    fit(brain, train, f"fold {run.fold}, seed {run.seed}, {name}", size)
    predictions = brain.predict(test, **frame_batches(batch_size=size))
    run_on_main(atomic_write, args=[folder / "predictions.json", json.dumps(predictions)])
    return brain, predictions, len(train)


def with_columns(dataset: DynamicItemDataset, columns: Mapping[str, Mapping]) -> DynamicItemDataset:
    """Add a value for each utterance to a dataset."""
    for name, values in columns.items():
        dataset.add_dynamic_item(values.__getitem__, takes="id", provides=name)
    dataset.set_output_keys([*dataset.pipeline.output_mapping, *columns])
    return dataset


def make_brain(
    hparams: Mapping, run: Run, folder: Path, front, classifier, train, run_opts, kind: type[FinetuningBrain]
) -> FinetuningBrain:
    """Wire a `FinetuningBrain`."""
    steps_per_epoch = max(len(train) // min(hparams["finetuning_batch_size"], len(train)), 1)
    epochs = math.ceil(hparams["finetuning_steps"] / steps_per_epoch)
    counter = EpochCounter(epochs)
    labels = torch.tensor([row["label"] for row in train.data.values()])
    folder.mkdir(parents=True, exist_ok=True)
    own = {
        "seed": run.seed,
        "class_weight": class_weights(labels, len(hparams["labels"])) if hparams["class_balanced"] else None,
        "adapter_learning_rate": hparams["adapter_learning_rate"],
        "epoch_counter": counter,
        "log_interval": math.ceil(epochs / LOG_POINTS),
        "train_logger": TrainLog(folder / "train_log.txt"),
    }
    recoverables = {"classifier": classifier, "counter": counter}
    return kind(
        modules={"front": front, "classifier": classifier},
        opt_class=hparams["finetuning_opt_class"],
        hparams=own,
        run_opts={**(run_opts or {}), "noprogressbar": True},
        checkpointer=WholeCheckpointer(folder / "save", recoverables),
    )


@main_process_only
def write_record(
    folder: Path, name: str, hparams: Mapping, run: Run, predictions: Mapping, n_train: int, steps: int, **about
) -> dict:
    """Score predictions on the test fold, write `results.json` and `confusion.png`, remove the checkpoints."""
    scored = evaluate(predictions, run.manifests / "test.json", hparams["labels"])
    counts = scored.pop("counts")
    record = {
        "arm": name,
        "fold": run.fold,
        "seed": run.seed,
        "labels_per_class": run.labels_per_class,
        **about,
        **run.about,
        **scored,
        "n_train": n_train,
        "steps": steps,
        "finetuning_steps": hparams["finetuning_steps"],
        "selection": "last step of a fixed number, nothing is selected",
        "labels": list(hparams["labels"]),
        "confusion": counts.tolist(),
        "code_version": __version__,
    }
    title = f"{name}: {record['corpus']}, fold {run.fold}, UA {100 * record['UA']:.1f} %"
    plot_confusion(folder / "confusion.png", counts, hparams["labels"], title)
    atomic_write(folder / "results.json", json.dumps(record, indent=1))
    shutil.rmtree(folder / "save")
    return record
