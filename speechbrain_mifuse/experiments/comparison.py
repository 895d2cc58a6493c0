"""Comparisons of arms: classifiers trained alike on the same folds, each scored on speakers that it never heard."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from speechbrain_mifuse import __version__
from speechbrain_mifuse.corpora.folds import fold_folder
from speechbrain_mifuse.evaluation.aggregate import write_csv
from speechbrain_mifuse.evaluation.scoring import evaluate
from speechbrain_mifuse.experiments.features import norm_of
from speechbrain_mifuse.experiments.same_settings import same_settings
from speechbrain_mifuse.experiments.settings import chosen_among, known_ones
from speechbrain_mifuse.features.dataset import encoded_rows, label_index
from speechbrain_mifuse.inference.model_card import encoder_told
from speechbrain_mifuse.report.figures import plot_confusion
from speechbrain_mifuse.report.variant_report import COLUMNS, arm_protocol, arm_table
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.files import atomic_write, file_digest
from speechbrain_mifuse.utils.texts import markdown

# What decides the trained weights, beside arm and data; the same for every arm.
DECISIVE = ("finetuning_steps", "finetuning_batch_size", "finetuning_learning_rate", "adapter_learning_rate")
DECISIVE += ("labels", "class_balanced")


@dataclass(frozen=True)
class Run:
    """One fold with one seed and one amount of labels; `about` is what its records say of all runs."""

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

    def progress_label(self, name: str) -> str:
        """Name an arm of the run on a progress bar."""
        return f"fold {self.fold}, seed {self.seed}, {name}"


@dataclass(frozen=True)
class Comparison:
    """Arms, folds, seeds and amounts of labels that a recipe compares on one corpus."""

    arms: Sequence[str]
    folds: Sequence[int]
    seeds: Sequence[int]
    amounts: Sequence[int | str]
    compare_to: Sequence[str]
    corpus: str
    manifests: Path
    output_folder: Path
    feature_folder: str | None
    about: Mapping

    @classmethod
    def of(cls, hparams: Mapping, arms: Mapping, **about: str) -> Comparison:
        """Read it from a recipe's hparams; `arms` are those that there are, `about` goes into every record."""
        norm, amounts, n_folds = norm_of(hparams), hparams["labels_per_class"], len(hparams["folds"])
        shared = {
            "corpus": hparams["source"],
            "encoder": f"{encoder_told(hparams['encoder'])}, layer {hparams['layer']}, frozen",
            "protocol": f"{n_folds} folds, {hparams['protocol']}, {len(hparams['labels'])} classes",
            "speaker_norm": "none" if norm is None else norm.told(),
        }
        return cls(
            arms=chosen_among(hparams["arm"], arms, "--arm"),
            folds=chosen_among(hparams["fold"], range(1, n_folds + 1), "--fold"),
            seeds=hparams["seeds"],
            amounts=amounts if isinstance(amounts, list) else [amounts],
            compare_to=known_ones(hparams["compare_to"], arms, "--compare_to"),
            corpus=hparams["source"],
            manifests=Path(hparams["manifests"]),
            output_folder=Path(hparams["output_folder"]),
            feature_folder=hparams["feature_folder"],
            about={**shared, **about},
        )

    def run(self, fold: int, seed: int, labels_per_class: int | str = "all") -> Run:
        """Describe one run."""
        folder = self.output_folder / f"fold_{fold}" / f"seed_{seed}"
        return Run(folder, fold_folder(self.manifests, fold), fold, seed, labels_per_class, self.about)

    def summary(self, records: Sequence[Mapping], name: str) -> str:
        """Bring the records together: `results.json`, `results.md` and `<name>.csv` in the output folder."""
        write_csv(self.output_folder / f"{name}.csv", records, COLUMNS)
        atomic_write(self.output_folder / "results.json", json.dumps(list(records), indent=1))
        table = arm_table(records, self.arms, self.compare_to)
        text = f"# {markdown(self.corpus)}\n\n{table.markdown()}\n{markdown(arm_protocol(records))}\n"
        atomic_write(self.output_folder / "results.md", text)
        return text


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
    drawn = [dice.sample(by_label[label], min(per_class, len(by_label[label]))) for label in sorted(by_label)]
    return sorted(key for keys in drawn for key in keys)


def rows_of_fold(run: Run, labels: Sequence[str], store) -> tuple[dict[str, dict], dict[str, dict]]:
    """Give the rows to train on, as many of each class as the run has labels, and those to test on."""
    train, test = (
        {key: {"wav": row["wav"], "label": label_index(labels, row, key)} for key, row in rows.items()}
        for rows in (encoded_rows(path, store) for path in run.splits)
    )
    return {key: train[key] for key in few_labels(train, run.labels_per_class, run.seed)}, test


def shared_settings(settings: Mapping, run: Run, frame_source) -> dict:
    """Everything that decides an arm's result but the arm itself."""
    digests = [file_digest(path) for path in run.splits]
    found = {"manifests": digests, "seed": run.seed, "labels_per_class": run.labels_per_class}
    found |= {key: settings[key] for key in DECISIVE}
    return {**found, "features": {**frame_source.fingerprint, "layer": frame_source.layer}}


def finished(folder: Path, settings: Mapping) -> dict | None:
    """Read the record of an arm that is done already."""
    if same_settings(folder / "settings.json", settings) and (folder / "results.json").exists():
        return json.loads((folder / "results.json").read_text())
    return None


def finish(name: str, brain, settings: Mapping, run: Run, predictions: Mapping, n_train: int, **about) -> dict:
    """Score predictions on the test fold, write `results.json` and `confusion.png`, remove the checkpoints."""
    folder, labels = run.arm_folder(name), list(settings["labels"])
    atomic_write(folder / "predictions.json", json.dumps(predictions))
    scored = evaluate(predictions, run.splits[1], labels)
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
        "steps": brain.optimizer_step,
        "finetuning_steps": settings["finetuning_steps"],
        "selection": "last step of a fixed number, nothing is selected",
        "labels": labels,
        "confusion": counts.tolist(),
        "code_version": __version__,
    }
    title = f"{name}: {record['corpus']}, fold {run.fold}, UA {100 * record['UA']:.1f} %"
    plot_confusion(folder / "confusion.png", counts, labels, title)
    atomic_write(folder / "results.json", json.dumps(record, indent=1))
    shutil.rmtree(folder / "save")
    return record
