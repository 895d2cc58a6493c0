"""What adapter training is worth: classifiers with and without it, trained alike on the same folds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from speechbrain.utils.distributed import run_on_main
from speechbrain.utils.seed import seed_everything

from speechbrain_mifuse.adaptation.method import described
from speechbrain_mifuse.brains.adapter import survey_utterances
from speechbrain_mifuse.corpora.manifest import read_manifest, unlabelled
from speechbrain_mifuse.experiments.variants import Run, fit_and_predict, found_done, shared_settings, write_record
from speechbrain_mifuse.nnet.adapter_classifier import AdapterClassifier
from speechbrain_mifuse.nnet.adapter_files import adapter_digest, load_adapter
from speechbrain_mifuse.report.figures import plot_attention
from speechbrain_mifuse.utils.audio import load_audio, trim_silence


@dataclass(frozen=True)
class Arm:
    """One side of the comparison."""

    classifier: Callable[..., AdapterClassifier] = AdapterClassifier
    adapter: bool = False
    pretraining: str | None = None
    learning_rate: float | None = None


def train_arm(
    name: str, hparams: Mapping, run: Run, front, adapters: Mapping[str, Path], run_opts: Mapping | None = None
) -> dict:
    """Train one arm on a fold's training set, score it on the test set; what is done already is read.

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
    """
    arm, folder = hparams["arms"][name], run.arm_folder(name)
    if arm.learning_rate is not None:
        hparams = {**hparams, "adapter_learning_rate": arm.learning_rate}
    settings = arm_settings(arm, hparams, run, front, adapters)
    if record := found_done(folder, settings):
        return record
    seed_everything(run.seed)
    adapter = starting_adapter(arm, hparams, run, front, adapters)
    classifier = arm.classifier(front.dim, len(hparams["labels"]), adapter)
    brain, predictions, n_train = fit_and_predict(name, hparams, run, front, classifier, run_opts)
    run_on_main(look_inside, args=[folder, classifier.eval(), front, run, name, brain.device])
    told = {"pretraining": arm.pretraining, "adapter_learning_rate": hparams["adapter_learning_rate"]}
    return write_record(folder, name, hparams, run, predictions, n_train, brain.optimizer_step, **told)


def arm_settings(arm: Arm, hparams: Mapping, run: Run, front, adapters: Mapping[str, Path]) -> dict:
    """Everything that decides an arm's result."""
    found = {**shared_settings(hparams, run, front), **described("classifier", arm.classifier)}
    return {**found, **adapter_settings(arm, hparams, adapters)}


def adapter_settings(arm: Arm, hparams: Mapping, adapters: Mapping[str, Path]) -> dict:
    """Everything that decides an arm's adapter as it starts."""
    if not arm.adapter:
        return {}
    digest = None if arm.pretraining is None else adapter_digest(adapters[arm.pretraining])
    return {**described("network", hparams["network"]), "adapter": digest}


def starting_adapter(arm: Arm, hparams: Mapping, run: Run, front, adapters: Mapping[str, Path]):
    """Give an arm's adapter as it starts: none, random, or pretrained."""
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


@torch.inference_mode()
def look_inside(folder: Path, classifier: AdapterClassifier, front, run: Run, name: str, device) -> None:
    """Draw the pooling's attention over one test utterance, where the pooling has any."""
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
