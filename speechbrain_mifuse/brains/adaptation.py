"""Source-free adaptation: one Brain for every method; what a method is, its object in `adaptation/` says.

Nothing in this module opens a label of the target, but for the one method that declares `uses_labels`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors.torch
import speechbrain as sb
import torch
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.checkpoints import mark_as_loader, mark_as_saver, register_checkpoint_hooks
from speechbrain.utils.distributed import main_process_only, run_on_main
from speechbrain.utils.epoch_loop import EpochCounter
from speechbrain.utils.seed import seed_everything

from speechbrain_mifuse.adaptation.method import AdaptationMethod, Outputs, Survey, Teachers
from speechbrain_mifuse.adaptation.mi_fuse import MIFuse
from speechbrain_mifuse.adaptation.selection import criteria
from speechbrain_mifuse.brains.snapshots import Snapshots
from speechbrain_mifuse.brains.train_log import TrainLog
from speechbrain_mifuse.brains.training import ResumableBrain, WholeCheckpointer, fit, same_settings
from speechbrain_mifuse.brains.whole_set import WholeSet
from speechbrain_mifuse.inference.recognizer_folder import export_student, load_classifier, recogniser_digest
from speechbrain_mifuse.nnet.calibration import fit_temperature
from speechbrain_mifuse.nnet.ema import ema_copy, ema_decay
from speechbrain_mifuse.utils.files import atomic_write

logger = logging.getLogger(__name__)

# Lines of the log, checkpoints and snapshots per run, at most.
LOG_POINTS = 5
# What decides the adapted weights, beside method and data.
DECISIVE = ("seed", "number_of_steps", "batch_size", "learning_rate", "ema_window", "passes", "selection", "layer")


@register_checkpoint_hooks
class Memory:
    """A method's `state`, for the checkpointer."""

    def __init__(self, method: AdaptationMethod, device: str):
        self.method, self.device = method, device

    @mark_as_saver
    def save(self, path):
        """Write the state."""
        torch.save(self.method.state, path)

    @mark_as_loader
    def load(self, path, end_of_epoch):
        """Read the state."""
        self.method.state = torch.load(path, map_location=self.device, weights_only=True)


class AdaptationBrain(ResumableBrain):
    """Train `modules.student` towards the targets of one method.

    Beyond `ResumableBrain`'s, `hparams` must hold `method` (an `AdaptationMethod`), `number_of_steps` (of the run),
    `passes` (K_S, Monte-Carlo dropout passes of the classifier teacher) and `ema` (from `ema_copy`). `look_at` gives it
    the whole sets, without which there are neither `rows` nor snapshots.
    """

    places: Mapping[str, int] | None = None
    refresh_steps: int | None = None

    def look_at(self, adaptation: WholeSet, test: WholeSet, snapshots: Snapshots) -> None:
        """Show the Brain what lies beyond a batch.

        Parameters
        ----------
        adaptation, test : WholeSet
            The two sets.
        snapshots : Snapshots
            Where those of the run go.
        """
        self.places, self.snapshots = adaptation.places, snapshots
        self.adaptation, self.test = self.survey(adaptation), self.survey(test)
        self.test_keys = test.keys

    def survey(self, whole: WholeSet) -> Survey:
        """Say what teachers and student think of a whole set, each when it is asked."""
        return Survey(
            whole.lalm.to(self.device),
            whole.lalm_mask.to(self.device),
            classifier=lambda: whole.gather(lambda batch: [self.classifier_samples(batch.to(self.device))])[0],
            rows=torch.arange(len(whole.keys), device=self.device),
            student=functools.partial(self.student_of_set, whole),
        )

    def student_of_set(self, whole: WholeSet) -> Outputs:
        """Let the student go through a set in evaluation mode, and restore its mode."""
        training = self.modules.training
        self.modules.eval()
        found = whole.gather(lambda batch: self.modules.student.parts(*batch.to(self.device).feats))
        self.modules.train(training)
        return Outputs(*found, head=functools.partial(self.modules.student.head, stochastic=False))

    def teachers(self, batch) -> Teachers:
        """Collect what the language model and the EMA classifier say of a batch."""
        classifier = functools.partial(self.classifier_samples, batch)
        rows = None
        if self.places is not None:
            rows = torch.tensor([self.places[key] for key in batch.id], device=self.device)
        return Teachers(batch.lalm, batch.lalm_mask, classifier, getattr(batch, "reference", None), rows)

    @torch.no_grad()
    def classifier_samples(self, batch) -> torch.Tensor:
        """Monte-Carlo dropout predictions `[B, K_S, C]` of the EMA classifier."""
        frames, lengths = batch.feats
        return self.hparams.ema.module.stochastic_logits(frames, lengths, self.hparams.passes).softmax(-1)

    def begin(self) -> None:
        """Let the method forget what it may know of another run and look at the adaptation set."""
        torch.manual_seed(self.hparams.seed)
        self.hparams.method.state = {}
        self.hparams.method.start(self.adaptation)

    def on_stage_start(self, stage, epoch=None):
        """Seed the epoch; let the method look at the adaptation set anew when it is time."""
        super().on_stage_start(stage, epoch)
        method, epochs = self.hparams.method, self.hparams.epoch_counter.limit
        self.refresh_steps = None
        if stage != sb.Stage.TRAIN or not method.refreshes:
            return
        if 2 * epochs < method.refreshes:
            # A large corpus is gone through a few times only: then within epochs, too.
            self.refresh_steps = max(1, round(self.hparams.number_of_steps / method.refreshes))
        elif (epoch - 1) % max(1, round(epochs / method.refreshes)) == 0:
            method.refresh(self.adaptation)

    def fit_batch(self, batch):
        """Train one step; let the method look at the adaptation set anew when it is time."""
        if self.refresh_steps and self.optimizer_step % self.refresh_steps == 0:
            self.hparams.method.refresh(self.adaptation)
        return super().fit_batch(batch)

    def compute_forward(self, batch, stage):
        """Give the student's `Outputs`; the method's targets are left in `batch.targets`."""
        batch = batch.to(self.device)
        # Before the student keeps its activations for the backward pass, so that both use the same memory in turn:
        # at these sizes, fresh memory costs as much as the arithmetic.
        batch.targets = self.hparams.method.targets(self.teachers(batch))
        student = self.modules.student
        return Outputs(*student.parts(*batch.feats), head=functools.partial(student.head, stochastic=student.training))

    def compute_objectives(self, predictions, batch, stage):
        """Loss of the method, with its statistics counted for the log."""
        method = self.hparams.method
        loss = method.loss(predictions, batch.targets)
        self.count(**method.statistics)
        return loss

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """Let the classifier teacher follow the student."""
        if should_step:
            self.hparams.ema.update_parameters(self.modules.student)

    @main_process_only
    def on_log_point(self, epoch: int) -> None:
        """Keep a snapshot; see `ResumableBrain.on_log_point`."""
        found = {"step": self.optimizer_step, **criteria(self.adaptation.student().probs)}
        self.snapshots.keep({**found, "predictions": self.predictions()}, self.modules.student)

    @torch.no_grad()
    def predictions(self) -> dict[str, list[float]]:
        """Answers to the test utterances.

        Returns
        -------
        dict of str to list of float
            `[C]` by utterance id; an utterance without an answer is missing.
        """
        probs = self.hparams.method.predict(self.test)
        answered = (probs.sum(-1) > 0).tolist()
        rows = zip(self.test_keys, probs.tolist(), answered, strict=True)
        return {key: row for key, row, said in rows if said}

    @torch.no_grad()
    def weighing(self) -> dict:
        """Say what `MIFuse` makes of each utterance of the adaptation set, with the EMA teacher as it is now.

        Returns
        -------
        dict
            `ids`, and in their order `lalm_weight`, `lalm` and `classifier` (uncertainties); `measure` names the
            uncertainty. An utterance that the language model did not answer has `None` for its uncertainty.
        """
        method, survey = self.hparams.method, self.adaptation
        torch.manual_seed(self.hparams.seed)
        classifier = method.uncertainty(survey.classifier())
        lalm = method.uncertainty(survey.lalm, survey.lalm_mask)
        weights = method.weights(lalm, classifier, survey.lalm_available)[:, 0]
        answered = survey.lalm_available.tolist()
        found = {"measure": method.measure, "ids": list(self.places), "lalm_weight": rounded(weights)}
        found["lalm"] = [value if said else None for value, said in zip(rounded(lalm), answered, strict=True)]
        return {**found, "classifier": rounded(classifier)}


def adapt(
    name: str,
    hparams: Mapping,
    datasets: Mapping[str, DynamicItemDataset],
    front,
    recogniser: str | Path,
    run_opts: Mapping | None = None,
) -> dict[str, list[float]]:
    """Run one method to its end, or find it ended, and predict the test utterances.

    A student that was trained is exported to `<output_folder>/<method>/recogniser`.

    Parameters
    ----------
    name : str
        A key of `hparams["methods"]`.
    hparams : mapping
        As the recipe's YAML defines.
    datasets : mapping of str to DynamicItemDataset
        `adapt` gives `id, feats, lalm, lalm_mask` (and `reference` for a method with `uses_labels`); `test` the same.
    front : StoredFrames
        Gives the frames.
    recogniser : str or pathlib.Path
        Folder of the source recogniser.
    run_opts : mapping, optional
        SpeechBrain's run options.

    Returns
    -------
    dict of str to list of float
        Probabilities `[C]` by utterance id; an utterance that the predictor has no answer to is missing.
    """
    method: AdaptationMethod = hparams["methods"][name]
    folder = Path(hparams["output_folder"]) / name
    predictions, snapshots = folder / "predictions.json", Snapshots(folder, hparams["selection"])
    settings = adaptation_settings(hparams, method, front, recogniser)
    settings["data"] = fingerprint_answers(datasets, method.answers_for)
    exported = not method.trains or (folder / "recogniser" / "about.json").exists()
    if same_settings(folder / "settings.json", settings) and predictions.exists() and exported:
        logger.info("%s: done already, skipped.", folder)
        return json.loads(predictions.read_text())
    seed_everything(hparams["seed"])
    student = load_classifier(recogniser, hparams["labels"], front.fingerprint)
    brain = make_brain(method, hparams, student, len(datasets["adapt"]), folder, run_opts)
    frames = {key: row.frames for key, row in front.store.rows.items()}
    sets = {split: WholeSet(dataset, frames, hparams["batch_size"]) for split, dataset in datasets.items()}
    brain.look_at(sets["adapt"], sets["test"], snapshots)
    brain.begin()
    if not method.trains:
        return run_on_main(answer, args=[brain, folder])
    before = brain.adaptation.student().probs, brain.test.student().hidden
    fit(brain, datasets["adapt"], name, hparams["batch_size"])
    return run_on_main(finish, args=[name, brain, folder, recogniser, *before])


def answer(brain: AdaptationBrain, folder: Path) -> dict[str, list[float]]:
    """Write what a method that trains nothing predicts."""
    found = brain.predictions()
    atomic_write(folder / "predictions.json", json.dumps(found))
    return found


def finish(
    name: str, brain: AdaptationBrain, folder: Path, recogniser: str | Path, source: torch.Tensor, hidden: torch.Tensor
) -> dict[str, list[float]]:
    """Export the preferred student and write what it predicts."""
    method, snapshots = brain.hparams.method, brain.snapshots
    weights = snapshots.weights.read_bytes()
    atomic_write(folder / "student.safetensors", weights)
    brain.modules.student.load_state_dict(safetensors.torch.load(weights))
    temperature = label_free_temperature(method, brain.adaptation, source)
    about = {"method": name, "temperature_fitted_to": method.consensus_told}
    export_student(folder / "recogniser", recogniser, weights, about, temperature)
    embeddings = {"ids": brain.test_keys, **plane(hidden, brain.test.student().hidden)}
    atomic_write(folder / "embeddings.json", json.dumps(embeddings))
    if isinstance(method, MIFuse):
        atomic_write(folder / "weighing.json", json.dumps(brain.weighing()))
    found = snapshots.chosen()["predictions"]
    atomic_write(folder / "predictions.json", json.dumps(found))
    return found


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


def rounded(values: torch.Tensor) -> list[float]:
    """Numbers for a file that is looked at, not computed with."""
    return [round(value, 5) for value in values.tolist()]


def adaptation_settings(hparams: Mapping, method: AdaptationMethod, front, recogniser: str | Path) -> dict:
    """Everything but the data that decides the adapted weights."""
    chosen = chosen_settings(hparams, method)
    return {**chosen, "features": front.fingerprint, "source": recogniser_digest(recogniser)}


def chosen_settings(hparams: Mapping, method: AdaptationMethod) -> dict:
    """Give what a recipe says of the training, the part of `adaptation_settings` that is known before it begins."""
    return {**{name: hparams[name] for name in DECISIVE}, **method.describe()}


def fingerprint_answers(datasets: Mapping[str, DynamicItemDataset], answers_for: Sequence[str]) -> str:
    """Hash of which utterances a run sees, what the language model said of them, and of labels where they are given."""
    digest = hashlib.sha256()
    for name in sorted(datasets):
        for key, row in sorted(datasets[name].data.items()):
            digest.update(f"{name} {key} {int(row.get('reference', -1))}".encode())
            if name in answers_for:
                digest.update(row["lalm"].numpy().tobytes() + row["lalm_mask"].numpy().tobytes())
    return digest.hexdigest()


def make_brain(method, hparams: Mapping, student, utterances: int, folder: Path, run_opts) -> AdaptationBrain:
    """Wire an `AdaptationBrain` with its EMA teacher, epoch counter, log and checkpointer."""
    steps_per_epoch = max(utterances // hparams["batch_size"], 1)
    epochs = math.ceil(hparams["number_of_steps"] / steps_per_epoch)
    for part in method.frozen:
        student.get_submodule(part).requires_grad_(False)
    number_of_steps = epochs * steps_per_epoch
    ema = ema_copy(student, ema_decay(hparams["ema_window"], number_of_steps))
    counter = EpochCounter(epochs)
    folder.mkdir(parents=True, exist_ok=True)
    own = {
        "seed": hparams["seed"],
        "method": method,
        "number_of_steps": number_of_steps,
        "passes": hparams["passes"],
        "ema": ema,
        "epoch_counter": counter,
        "log_interval": math.ceil(epochs / LOG_POINTS),
        "train_logger": TrainLog(folder / "train_log.txt"),
    }
    brain = AdaptationBrain(
        modules={"student": student},
        opt_class=hparams["opt_class"],
        hparams=own,
        run_opts={**(run_opts or {}), "noprogressbar": True},
        checkpointer=WholeCheckpointer(folder / "save", {"student": student, "ema": ema, "counter": counter}),
    )
    brain.checkpointer.add_recoverable("memory", Memory(method, brain.device))
    ema.to(brain.device)
    return brain
