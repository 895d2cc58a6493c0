"""What adapter training is worth: pretrainings without labels, and classifiers with and without them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from speechbrain_mifuse.adaptation.method import described
from speechbrain_mifuse.brains.adapter import AdapterBrain
from speechbrain_mifuse.corpora.manifest import read_manifest, unlabelled
from speechbrain_mifuse.experiments.comparison import Run, shared_settings
from speechbrain_mifuse.experiments.settings import chosen_among
from speechbrain_mifuse.features.dataset import encoded_rows
from speechbrain_mifuse.features.extract import fill_store
from speechbrain_mifuse.features.prosody import ProsodyReader
from speechbrain_mifuse.nnet.adapter_classifier import AdapterClassifier
from speechbrain_mifuse.nnet.adapter_files import adapter_digest, export_adapter, load_adapter
from speechbrain_mifuse.nnet.adapter_objectives import UtteranceSurvey
from speechbrain_mifuse.report.figures import plot_attention, plot_codebook, plot_layer_weights
from speechbrain_mifuse.utils.audio import load_audio, trim_silence
from speechbrain_mifuse.utils.files import file_digest

# What decides the pretrained weights, beside network, objectives and data.
DECISIVE = (
    *("number_of_steps", "frames_per_batch", "learning_rate", "warmup", "mask_share", "mask_width"),
    *("ema_start", "ema_end", "pretraining_dropout"),
)


@dataclass(frozen=True)
class Arm:
    """One side of the comparison."""

    classifier: Callable[..., AdapterClassifier] = AdapterClassifier
    adapter: bool = False
    pretraining: str | None = None
    learning_rate: float | None = None


def pretraining_settings(
    name: str, settings: Mapping, manifests: Sequence[str | Path], frame_source, seed: int
) -> dict:
    """Everything that decides the pretrained weights."""
    objectives = {}
    for key, objective in settings["pretrainings"][name].items():
        objectives |= described(key, objective)
    return {
        "pretraining": name,
        "seed": seed,
        "manifests": [file_digest(path) for path in manifests],
        "features": {**frame_source.fingerprint, "layer": frame_source.layer},
        "network": described("network", settings["network"]),
        "objectives": objectives,
        **{key: settings[key] for key in DECISIVE},
    }


def pretraining_splits(pretrain_on: str | Sequence[str]) -> list[str]:
    """Read the flag that names the parts of a fold whose audio adapters are pretrained on."""
    return chosen_among(pretrain_on, ["train", "test"], "--pretrain_on")


def pretraining_audio(pretrain_on: str | Sequence[str]) -> str:
    """Say in the records whose audio the adapters were pretrained on."""
    if "test" in pretraining_splits(pretrain_on):
        return "LEAK: the audio of all folds, the test fold's included"
    return "the training folds' audio"


def survey_utterances(
    manifests: Sequence[str | Path], frame_source, prosody: Callable[[], Mapping[str, torch.Tensor]]
) -> tuple[UtteranceSurvey, torch.Tensor, torch.Tensor]:
    """Go through a pretraining set once: statistics of each utterance, mean and deviation of all frames."""
    rows = {key: row for path in manifests for key, row in encoded_rows(path, frame_source.store).items()}
    means, squares, counts = [], [], []
    for key, row in rows.items():
        frames = frame_source.read(key, row["wav"]).float()
        means.append(frames.mean(0))
        squares.append(frames.square().mean(0))
        counts.append(len(frames))
    means, squares = torch.stack(means).double(), torch.stack(squares).double()
    share = (torch.tensor(counts).double() / sum(counts)).unsqueeze(1)
    mean = (share * means).sum(0)
    deviation = ((share * squares).sum(0) - mean.square()).clamp(min=0).sqrt()
    spread = (squares - means.square()).clamp(min=0).sqrt()
    statistics = torch.cat([means, spread], dim=1).float()
    speakers = [row["speaker"] for row in rows.values()]

    def functionals() -> torch.Tensor:
        found = prosody()
        return torch.stack([found[key] for key in rows])

    return UtteranceSurvey(list(rows), statistics, speakers, functionals), mean.float(), deviation.float()


def stored_prosody(
    corpus: str, manifests: Sequence[Path], trim_db: float | None, feature_folder: str | None
) -> dict[str, torch.Tensor]:
    """Prosodic functionals of every utterance of some manifests, from a store that is filled where it lacks any."""
    store = fill_store(f"{corpus}-prosody", manifests, ProsodyReader(trim_db), feature_folder)
    rows = {key for path in manifests for key in encoded_rows(path, store)}
    return {key: torch.from_numpy(store.frames(key)).float().flatten() for key in rows}


def finish_pretraining(brain: AdapterBrain, folder: Path, trained_with: Mapping) -> Path:
    """Write the figures of a pretraining and the adapter, and remove the checkpoints, which are ten times its size."""
    rows = brain.hparams.history.rows
    plot_codebook(folder / "codebook.png", rows)
    plot_layer_weights(folder / "layer_weights.png", rows)
    about = {**trained_with, "epochs": len(rows), "steps": brain.optimizer_step, "last_epoch": rows[-1]}
    export_adapter(folder / "adapter", brain.modules.student.adapter, trained_with["features"], about)
    shutil.rmtree(folder / "save")
    return folder / "adapter"


def arm_settings(arm: Arm, settings: Mapping, run: Run, frame_source, adapters: Mapping[str, Path]) -> dict:
    """Everything that decides an arm's result."""
    found = {**shared_settings(settings, run, frame_source), **described("classifier", arm.classifier)}
    return {**found, **adapter_settings(arm, settings, adapters)}


def adapter_settings(arm: Arm, settings: Mapping, adapters: Mapping[str, Path]) -> dict:
    """Everything that decides an arm's adapter as it starts."""
    if not arm.adapter:
        return {}
    digest = None if arm.pretraining is None else adapter_digest(adapters[arm.pretraining])
    return {**described("network", settings["network"]), "adapter": digest}


def starting_adapter(arm: Arm, settings: Mapping, run: Run, frame_source, adapters: Mapping[str, Path]):
    """Give an arm's adapter as it starts: none, random, or pretrained."""
    if not arm.adapter:
        return None
    adapter = settings["network"](input_size=frame_source.dim)
    if arm.pretraining is not None:
        pretrained = load_adapter(adapters[arm.pretraining], {**frame_source.fingerprint, "layer": frame_source.layer})
        adapter.load_state_dict(pretrained.state_dict())
        return adapter
    _, mean, deviation = survey_utterances([unlabelled(run.splits[0])], frame_source, prosody=dict)
    adapter.standardise_by(mean, deviation)
    return adapter


@torch.inference_mode()
def show_attention(name: str, classifier: AdapterClassifier, frame_source, run: Run) -> None:
    """Draw the pooling's attention over one test utterance, where the pooling has any."""
    if not hasattr(classifier.pooling, "attention"):
        return
    rows, device = read_manifest(run.splits[1]), next(classifier.parameters()).device
    # The longest recording shows most, and which one it is does not depend on the arm.
    key = max(
        (key for key in rows if key in frame_source.store), key=lambda key: (frame_source.store.rows[key].frames, key)
    )
    frames, lengths = (
        frame_source.read(key, rows[key]["wav"]).float().unsqueeze(0).to(device),
        torch.ones(1, device=device),
    )
    attention = classifier.pooling.attention(classifier.adapted(frames, lengths), lengths)[0].cpu()
    rate = frame_source.store.fingerprint["sample_rate"]
    wave = trim_silence(load_audio(rows[key]["wav"], rate), frame_source.store.fingerprint["trim_db"])
    path = run.arm_folder(name) / "attention.png"
    plot_attention(path, wave, attention, rate, f"{name}: {key}, {rows[key]['emo']}")
