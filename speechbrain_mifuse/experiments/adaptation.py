"""Settings of an adaptation recipe, and what surrounds the training of one method."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from speechbrain.dataio.dataset import DynamicItemDataset

from speechbrain_mifuse.adaptation.method import AdaptationMethod, Survey
from speechbrain_mifuse.adaptation.mi_fuse import MIFuse
from speechbrain_mifuse.brains.adaptation import AdaptationBrain
from speechbrain_mifuse.experiments.features import CorpusSettings, EncoderSettings
from speechbrain_mifuse.experiments.same_settings import completed
from speechbrain_mifuse.experiments.settings import chosen_methods
from speechbrain_mifuse.experiments.teacher import ApiTeacher, AudioTextTeacher, teacher_of
from speechbrain_mifuse.inference.recognizer_folder import export_student, recogniser_digest
from speechbrain_mifuse.nnet.calibration import fit_temperature
from speechbrain_mifuse.utils.files import atomic_write

# What decides the adapted weights, beside method and data.
DECISIVE = ("seed", "number_of_steps", "batch_size", "learning_rate", "ema_window", "passes", "selection", "layer")
# Keys of the recipe that decide the target's data, and what the teacher says of it.
TARGET_KEYS = (
    *("target", "labels", "trim_db", "frame_average", "speaker_norm", "speaker_norm_strength"),
    *("speaker_embedding", "speaker_clusters"),
)
ANSWER_KEYS = (
    *("teacher", "teacher_layer", "teacher_alm", "teacher_prompts", "lalm_base_url", "lalm_model", "lalm_answer_form"),
    *("lalm_samples", "lalm_temperature", "lalm_prompts", "lalm_shuffle_labels"),
)


@dataclass(frozen=True)
class AdaptationExperiment:
    """What an adaptation recipe reads from its YAML file and its flags.

    `methods` are the chosen ones by their names, `adaptation` is what `hparams/base/adaptation.yaml` defines, and
    `decisive` holds what an earlier run in the same folder must agree in.
    """

    target: CorpusSettings
    source: CorpusSettings
    teacher_corpus: CorpusSettings
    encoder: EncoderSettings
    teacher: ApiTeacher | AudioTextTeacher
    methods: Mapping[str, AdaptationMethod]
    adaptation: Mapping
    layer: int | None
    source_recogniser: str | None
    output_folder: Path
    decisive: Mapping

    @classmethod
    def of(
        cls, hparams: Mapping, names: Sequence[str] | None = None, teacher_recogniser: Path | None = None
    ) -> AdaptationExperiment:
        """Read them from a recipe's hparams; `names` are methods in place of those that `--method` chooses."""
        known, options = hparams["adaptation"]["methods"], getattr(hparams["prepare_target"], "keywords", {})
        decisive = {key: hparams[key] for key in (*TARGET_KEYS, *ANSWER_KEYS)}
        decisive |= {f"prepare_target: {key}": options.get(key) for key in ("splits", "keep", "sentences")}
        return cls(
            target=CorpusSettings.target_of(hparams),
            source=CorpusSettings.source_of(hparams),
            teacher_corpus=CorpusSettings.teacher_of(hparams),
            encoder=EncoderSettings.of(hparams),
            teacher=teacher_of(hparams, teacher_recogniser),
            methods={name: known[name] for name in names or chosen_methods(hparams)},
            adaptation=hparams["adaptation"],
            layer=hparams["layer"],
            source_recogniser=hparams["source_recogniser"],
            output_folder=Path(hparams["output_folder"]),
            decisive=decisive,
        )

    @property
    def asks_teacher(self) -> bool:
        """Whether a chosen method needs the teacher's answers."""
        return any(method.answers_for for method in self.methods.values())

    @property
    def trains_teacher(self) -> bool:
        """Whether the teacher is a classifier that is trained here and served on this machine."""
        return self.asks_teacher and self.teacher.serves_classifier and self.teacher.recogniser is None


def chosen_settings(settings: Mapping, method: AdaptationMethod) -> dict:
    """Give what a recipe says of the training, the part of `adaptation_settings` that is known before it begins."""
    return {**{name: settings[name] for name in DECISIVE}, **method.describe()}


def adaptation_settings(
    settings: Mapping,
    method: AdaptationMethod,
    frame_source,
    source: str | Path,
    datasets: Mapping[str, DynamicItemDataset],
) -> dict:
    """Everything that decides the adapted weights."""
    return {
        **chosen_settings(settings, method),
        "features": frame_source.fingerprint,
        "source": recogniser_digest(source),
        "data": fingerprint_answers(datasets, method.answers_for),
    }


def fingerprint_answers(datasets: Mapping[str, DynamicItemDataset], answers_for: Sequence[str]) -> str:
    """Hash of which utterances a run sees, what the language model said of them, and of labels where they are given."""
    digest = hashlib.sha256()
    for name in sorted(datasets):
        for key, row in sorted(datasets[name].data.items()):
            digest.update(f"{name} {key} {int(row.get('reference', -1))}".encode())
            if name in answers_for:
                digest.update(row["lalm"].numpy().tobytes() + row["lalm_mask"].numpy().tobytes())
    return digest.hexdigest()


def finished(folder: Path, method: AdaptationMethod, settings: Mapping) -> dict[str, list[float]] | None:
    """Give the predictions of a method that ran to its end with these settings; none if it did not."""
    files = ["predictions.json", *(["recogniser/about.json"] if method.trains else [])]
    if not completed(folder, settings, *files, what="done already, skipped."):
        return None
    return json.loads((folder / "predictions.json").read_text())


def finish(name: str, brain: AdaptationBrain, folder: Path, source: str | Path) -> dict[str, list[float]]:
    """Export the preferred student, if one was trained, and write what the method predicts."""
    if brain.hparams.method.trains:
        _keep_student(name, brain, folder, source)
        found = brain.snapshots.chosen()["predictions"]
    else:
        found = brain.predictions()
    atomic_write(folder / "predictions.json", json.dumps(found))
    return found


def _keep_student(name: str, brain: AdaptationBrain, folder: Path, source: str | Path) -> None:
    """Export a trained student, and write what figures are made of."""
    method, (probs, hidden) = brain.hparams.method, brain.untrained
    weights = brain.snapshots.weights.read_bytes()
    atomic_write(folder / "student.safetensors", weights)
    brain.modules.student.load_state_dict(safetensors.torch.load(weights))
    temperature = label_free_temperature(method, brain.adaptation, probs)
    about = {"method": name, "temperature_fitted_to": method.consensus_told}
    export_student(folder / "recogniser", source, weights, about, temperature)
    embeddings = {"ids": brain.test_keys, **plane(hidden, brain.test.student().hidden)}
    atomic_write(folder / "embeddings.json", json.dumps(embeddings))
    if isinstance(method, MIFuse):
        atomic_write(folder / "weighing.json", json.dumps(brain.teacher_weights()))


def label_free_temperature(method: AdaptationMethod, survey: Survey, source: torch.Tensor) -> float:
    """Temperature at which the student comes nearest to what its two teachers say together."""
    answered = survey.lalm_available
    if "adapt" not in method.answers_for or not answered.any():
        return 1.0
    teachers = method.consensus(survey, source)[answered]
    return fit_temperature(survey.student().probs[answered].cpu(), teachers.cpu())


def plane(before: torch.Tensor, after: torch.Tensor) -> dict:
    """Project vectors of two moments on the two directions in which all of them together differ most."""
    both = torch.cat([before - before.mean(0), after - after.mean(0)]).double().cpu()
    variances, directions = torch.linalg.eigh(both.T @ both)
    directions = directions[:, [-1, -2]]
    directions = directions * directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
    points = (both @ directions).round(decimals=3) + 0.0
    explained = (variances[[-1, -2]] / variances.sum().clamp(min=1e-12)).round(decimals=4) + 0.0
    return {
        "before": points[: len(before)].tolist(),
        "after": points[len(before) :].tolist(),
        "explained": explained.tolist(),
    }
