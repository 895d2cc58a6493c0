"""What adapter training is worth: classifiers with and without it, trained alike on the same folds."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.epoch_loop import EpochCounter
from speechbrain.utils.seed import seed_everything
from speechbrain.utils.train_logger import FileTrainLogger

from speechbrain_mifuse import __version__
from speechbrain_mifuse.adaptation.method import described
from speechbrain_mifuse.audio import load_audio, trim_silence
from speechbrain_mifuse.brains.adapter import survey_utterances
from speechbrain_mifuse.brains.classifier import ClassifierBrain, class_weights, labelled_dataset
from speechbrain_mifuse.brains.training import WholeCheckpointer, fit, same_settings
from speechbrain_mifuse.corpora.manifest import atomic_write, read_manifest, unlabelled
from speechbrain_mifuse.errors import UserError
from speechbrain_mifuse.evaluation.adapter_plots import plot_attention
from speechbrain_mifuse.evaluation.plots import plot_confusion
from speechbrain_mifuse.evaluation.results import evaluate
from speechbrain_mifuse.features.dataset import frame_batches
from speechbrain_mifuse.nnet.adapter_classifier import AdapterClassifier
from speechbrain_mifuse.nnet.adapter_files import adapter_digest, load_adapter

logger = logging.getLogger(__name__)

# Lines of the log and checkpoints of a run, at most.
LOG_POINTS = 3
# What decides the trained weights, beside arm and data; the same for every arm.
DECISIVE = ("finetuning_steps", "finetuning_batch_size", "finetuning_learning_rate", "adapter_learning_rate")


@dataclass(frozen=True)
class Arm:
    """One side of the comparison.

    Parameters
    ----------
    classifier : callable
        `AdapterClassifier` with what this arm sets.
    adapter : bool
        Whether there is a WAP-Transformer before the pooling.
    pretraining : str, optional
        A key of `pretrainings`: where its weights come from; random ones by default.

    Example
    -------
    >>> Arm(AdapterClassifier, adapter=True, pretraining="paper").pretraining
    'paper'
    """

    classifier: Callable[..., AdapterClassifier] = AdapterClassifier
    adapter: bool = False
    pretraining: str | None = None


@dataclass(frozen=True)
class Run:
    """One fold with one seed and one amount of labels.

    Parameters
    ----------
    folder : pathlib.Path
        Output folder of fold and seed; arms go below it.
    manifests : pathlib.Path
        Folder of the fold's `train.json` and `test.json`.
    fold, seed : int
        Number of the fold, from 1; training seed.
    labels_per_class : int or str
        How many labelled utterances of each class are trained on, or `all`.
    about : mapping
        What every record of the run shall say.

    Example
    -------
    >>> Run(Path("out"), Path("manifests/fold_1"), 1, 1, 20).arm_folder("scratch").as_posix()
    'out/labels_20/scratch'
    """

    folder: Path
    manifests: Path
    fold: int
    seed: int
    labels_per_class: int | str = "all"
    about: Mapping = field(default_factory=dict)

    def arm_folder(self, name: str) -> Path:
        """Where an arm's results go.

        Parameters
        ----------
        name : str
            The arm.

        Returns
        -------
        pathlib.Path
            Its folder.
        """
        return self.folder / f"labels_{self.labels_per_class}" / name


class FinetuningBrain(ClassifierBrain):
    """`ClassifierBrain` with a learning rate of its own for the adapter.

    `hparams` must also hold `adapter_learning_rate`.

    Example
    -------
    >>> issubclass(FinetuningBrain, ClassifierBrain)
    True
    """

    def init_optimizers(self):
        """Group the parameters: adapter, then the rest; see `sb.Brain.init_optimizers`."""
        named = [item for item in self.modules.named_parameters() if item[1].requires_grad]
        adapter = [value for name, value in named if ".adapter." in name]
        rest = [value for name, value in named if ".adapter." not in name]
        # SpeechBrain clips the gradient of the first group alone: the adapter's, where there is one.
        groups = [{"params": adapter, "lr": self.hparams.adapter_learning_rate}] if adapter else []
        self.optimizer = self.opt_class([*groups, {"params": rest}])
        self.optimizers_dict = {"opt_class": self.optimizer}
        self.checkpointer.add_recoverable("optimizer", self.optimizer)


def few_labels(rows: Mapping[str, Mapping], per_class: int | str, seed: int) -> list[str]:
    """Draw the same number of labelled utterances of every class; the draw depends on ids and seed alone.

    Parameters
    ----------
    rows : mapping of str to mapping
        Each with its `label`.
    per_class : int or str
        How many of each class, or `all`; a class with fewer gives all it has.
    seed : int
        Of the draw.

    Returns
    -------
    list of str
        Utterance ids, sorted.

    Raises
    ------
    UserError
        If it is neither a positive number nor `all`.

    Example
    -------
    >>> rows = {f"t-{number}": {"label": number % 2} for number in range(10)}
    >>> chosen = few_labels(rows, 2, seed=1)
    >>> [sum(rows[key]["label"] == label for key in chosen) for label in (0, 1)]
    [2, 2]
    """
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
    """Draw without replacement, all when there are too few.

    Parameters
    ----------
    keys : sequence of str
        What to draw from.
    count : int
        How many.
    dice : random.Random
        Source of chance.

    Returns
    -------
    list of str
        Drawn ones.

    Example
    -------
    >>> sample_of(["a"], 3, random.Random(0))
    ['a']
    """
    return dice.sample(keys, min(count, len(keys)))


def train_arm(
    name: str, hparams: Mapping, run: Run, front, adapters: Mapping[str, Path], run_opts: Mapping | None = None
) -> dict:
    """Train one arm on a fold's training set, score it on the test set; what is done already is read.

    The number of steps is fixed and the last one counts: nothing is selected, least of all on the test fold.

    Parameters
    ----------
    name : str
        A key of `hparams["arms"]`.
    hparams : mapping
        As `hparams/base/adapter.yaml` defines.
    run : Run
        Fold, seed, labels.
    front : StoredFrames
        Reads the frames.
    adapters : mapping of str to pathlib.Path
        Folder of each pretrained adapter, by its pretraining.
    run_opts : mapping, optional
        SpeechBrain's run options.

    Returns
    -------
    dict
        The record, as written to `results.json`.

    Raises
    ------
    SettingsError
        If the folder holds a result got otherwise.

    Example
    -------
    >>> train_arm.__name__  # runs in `recipes/RAVDESS/adapter/train.py`
    'train_arm'
    """
    arm, folder = hparams["arms"][name], run.arm_folder(name)
    settings = arm_settings(arm, hparams, run, front, adapters)
    if same_settings(folder / "settings.json", settings) and (folder / "results.json").exists():
        return json.loads((folder / "results.json").read_text())
    seed_everything(run.seed)
    train = labelled_dataset(run.manifests / "train.json", front, hparams["labels"])
    keep_only(train, few_labels(train.data, run.labels_per_class, run.seed))
    adapter = starting_adapter(arm, hparams, run, front, adapters)
    classifier = arm.classifier(front.dim, len(hparams["labels"]), adapter)
    brain = make_brain(hparams, run, folder, front, classifier, train, run_opts)
    fit(brain, train, f"fold {run.fold}, seed {run.seed}, {name}", hparams["finetuning_batch_size"])
    test = labelled_dataset(run.manifests / "test.json", front, hparams["labels"])
    predictions = brain.predict(test, **frame_batches(batch_size=hparams["finetuning_batch_size"]))
    atomic_write(folder / "predictions.json", json.dumps(predictions))
    look_inside(folder, classifier.eval(), front, run, name, brain.device)
    record = write_record(folder, name, hparams, run, predictions, len(train), brain.optimizer_step)
    shutil.rmtree(folder / "save")
    return record


def keep_only(dataset: DynamicItemDataset, keys: Sequence[str]) -> None:
    """Leave some utterances in a dataset.

    Parameters
    ----------
    dataset : DynamicItemDataset
        Changed in place.
    keys : sequence of str
        Ids that stay, in the order they get.

    Example
    -------
    >>> dataset = DynamicItemDataset({"t-a": {}, "t-b": {}})
    >>> keep_only(dataset, ["t-b"])
    >>> len(dataset)
    1
    """
    dataset.data = {key: dataset.data[key] for key in keys}
    dataset.data_ids = list(keys)


def arm_settings(arm: Arm, hparams: Mapping, run: Run, front, adapters: Mapping[str, Path]) -> dict:
    """Everything that decides an arm's result.

    Parameters
    ----------
    arm : Arm
        The arm.
    hparams, run, front, adapters
        As for `train_arm`.

    Returns
    -------
    dict
        Of JSON's types.

    Example
    -------
    >>> arm_settings(Arm(), {}, Run(Path(), Path("/nowhere"), 1, 1), None, {})
    Traceback (most recent call last):
    ...
    FileNotFoundError: ...
    """
    digests = [hashlib.sha256((run.manifests / f"{name}.json").read_bytes()).hexdigest() for name in ("train", "test")]
    found = {"manifests": digests, "seed": run.seed, "labels_per_class": run.labels_per_class}
    found |= described("classifier", arm.classifier)
    found |= {key: hparams[key] for key in (*DECISIVE, "labels", "class_balanced")}
    found["features"] = {**front.fingerprint, "layer": front.layer}
    if arm.adapter:
        found |= described("network", hparams["network"])
        found["adapter"] = None if arm.pretraining is None else adapter_digest(adapters[arm.pretraining])
    return found


def starting_adapter(arm: Arm, hparams: Mapping, run: Run, front, adapters: Mapping[str, Path]):
    """Give an arm's adapter as it starts: none, random, or pretrained.

    Parameters
    ----------
    arm, hparams, run, front, adapters
        As for `arm_settings`.

    Returns
    -------
    WAPTransformer or None
        A random one standardises its input by the frames of the same training fold, as a pretrained one does.

    Example
    -------
    >>> starting_adapter(Arm(), {}, None, None, {}) is None
    True
    """
    if not arm.adapter:
        return None
    adapter = hparams["network"](input_size=front.dim)
    if arm.pretraining is not None:
        pretrained = load_adapter(adapters[arm.pretraining], {**front.fingerprint, "layer": front.layer})
        adapter.load_state_dict(pretrained.state_dict())
        return adapter
    _, mean, deviation = survey_utterances([unlabelled(run.manifests / "train.json")], front, prosody=dict)
    adapter.standardise_by(mean, deviation)
    return adapter


def make_brain(hparams: Mapping, run: Run, folder: Path, front, classifier, train, run_opts) -> FinetuningBrain:
    """Wire a `FinetuningBrain`.

    Parameters
    ----------
    hparams, run, front, run_opts
        As for `train_arm`.
    folder : pathlib.Path
        The arm's.
    classifier : AdapterClassifier
        To be trained.
    train : DynamicItemDataset
        What it is trained on.

    Returns
    -------
    FinetuningBrain
        Ready to fit.

    Example
    -------
    >>> make_brain.__name__  # runs in `recipes/RAVDESS/adapter/train.py`
    'make_brain'
    """
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
        "train_logger": FileTrainLogger(folder / "train_log.txt"),
    }
    recoverables = {"classifier": classifier, "counter": counter}
    return FinetuningBrain(
        modules={"front": front, "classifier": classifier},
        opt_class=hparams["finetuning_opt_class"],
        hparams=own,
        run_opts={**(run_opts or {}), "noprogressbar": True},
        checkpointer=WholeCheckpointer(folder / "save", recoverables),
    )


@torch.inference_mode()
def look_inside(folder: Path, classifier: AdapterClassifier, front, run: Run, name: str, device) -> None:
    """Draw the pooling's attention over one test utterance, where the pooling has any.

    Parameters
    ----------
    folder : pathlib.Path
        The arm's.
    classifier : AdapterClassifier
        Trained, in evaluation mode.
    front, run, name
        As for `train_arm`.
    device : torch.device
        Of the classifier.

    Example
    -------
    >>> look_inside.__name__  # runs in `recipes/RAVDESS/adapter/train.py`
    'look_inside'
    """
    if not hasattr(classifier.pooling, "attention"):
        return
    rows = read_manifest(run.manifests / "test.json")
    # The longest recording shows most, and which one it is does not depend on the arm.
    key = max((key for key in rows if key in front.store), key=lambda key: (front.store.rows[key].frames, key))
    frames = front.read(key, rows[key]["wav"]).float().unsqueeze(0).to(device)
    lengths = torch.ones(1, device=device)
    attention = classifier.pooling.attention(classifier.adapted(frames, lengths), lengths)[0].cpu()
    rate = front.store.fingerprint["sample_rate"]
    wave = trim_silence(load_audio(rows[key]["wav"], rate), front.store.fingerprint["trim_db"])
    plot_attention(folder / "attention.png", wave, attention, rate, f"{name}: {key}, {rows[key]['emo']}")


def write_record(
    folder: Path, name: str, hparams: Mapping, run: Run, predictions: Mapping, n_train: int, steps: int
) -> dict:
    """Score predictions on the test fold and write `results.json` and `confusion.png`.

    Parameters
    ----------
    folder : pathlib.Path
        The arm's.
    name, hparams, run
        As for `train_arm`.
    predictions : mapping
        Probabilities `[C]` by utterance id.
    n_train : int
        Labelled utterances trained on.
    steps : int
        Optimiser steps.

    Returns
    -------
    dict
        The record; fractions in [0, 1].

    Example
    -------
    >>> write_record.__name__  # runs in `recipes/RAVDESS/adapter/train.py`
    'write_record'
    """
    scored = evaluate(predictions, run.manifests / "test.json", hparams["labels"])
    counts, arm = scored.pop("counts"), hparams["arms"][name]
    record = {
        "arm": name,
        "fold": run.fold,
        "seed": run.seed,
        "labels_per_class": run.labels_per_class,
        "pretraining": arm.pretraining,
        **run.about,
        **scored,
        "n_train": n_train,
        "steps": steps,
        "selection": "last step of a fixed number, nothing is selected",
        "labels": list(hparams["labels"]),
        "confusion": counts.tolist(),
        "code_version": __version__,
    }
    title = f"{name}: {record['corpus']}, fold {run.fold}, UA {100 * record['UA']:.1f} %"
    plot_confusion(folder / "confusion.png", counts, hparams["labels"], title)
    atomic_write(folder / "results.json", json.dumps(record, indent=1))
    return record
