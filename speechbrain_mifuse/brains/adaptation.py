"""Source-free adaptation: one Brain for every method; what a method is, its object in `adaptation/` says.

Nothing in this module opens a label of the target, but for those methods that declare `uses_labels`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Mapping
from dataclasses import replace

import speechbrain as sb
import torch
from speechbrain.utils.checkpoints import mark_as_loader, mark_as_saver, register_checkpoint_hooks

from speechbrain_mifuse.adaptation.fusion import prior_corrected
from speechbrain_mifuse.adaptation.method import AdaptationMethod, Outputs, Survey, Teachers
from speechbrain_mifuse.adaptation.selection import criteria
from speechbrain_mifuse.brains.full_dataset import FullDataset
from speechbrain_mifuse.brains.snapshots import Snapshots
from speechbrain_mifuse.brains.training import ResumableBrain

logger = logging.getLogger(__name__)

# Lines of the log, checkpoints and snapshots per run, at most.
LOG_POINTS = 5


@register_checkpoint_hooks
class MethodState:
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
    """Source-free adaptation of a student with two teachers: a language model's stored answers and the student's EMA.

    Batches give `id`, `feats`, `lalm` (answers, `[K, C]` probabilities each) and `lalm_mask` (`[K]`, true where there
    is an answer). `attach_datasets` gives it the full sets, which some methods and all snapshots need.

    Parameters
    ----------
    modules : dict
        `student`, an `EmotionClassifier`.
    hparams : dict
        Those of `ResumableBrain`, and `method` (an `AdaptationMethod`), `number_of_steps` (of the run), `passes` (K_S,
        Monte-Carlo dropout passes of the classifier teacher) and `ema` (from `ema_copy` of the student).
    **options
        See `speechbrain.Brain`.

    Example
    -------
    >>> from speechbrain.dataio.batch import PaddedBatch
    >>> from speechbrain_mifuse.adaptation.mi_fuse import MIFuse
    >>> from speechbrain_mifuse.nnet.classifier import EmotionClassifier
    >>> from speechbrain_mifuse.nnet.ema import ema_copy
    >>> student = EmotionClassifier(8, 2)
    >>> hparams = {"method": MIFuse(), "passes": 4, "ema": ema_copy(student, 0.9)}
    >>> brain = AdaptationBrain(modules={"student": student}, hparams=hparams)
    >>> brain.statistics = {}
    >>> answers = {"lalm": torch.tensor([[0.9, 0.1]] * 3), "lalm_mask": torch.tensor([True, True, False])}
    >>> rows = [{"id": key, "feats": torch.randn(5, 8), **answers} for key in "ab"]
    >>> batch = PaddedBatch(rows, padded_keys=["feats"])
    >>> outputs = brain.compute_forward(batch, sb.Stage.TRAIN)
    >>> outputs.probs.shape, brain.compute_objectives(outputs, batch, sb.Stage.TRAIN).requires_grad
    (torch.Size([2, 2]), True)
    """

    positions: Mapping[str, int] | None = None
    adaptation: Survey | None = None
    # Before training: the student's probabilities of the adaptation set, and its hidden units of the test set.
    untrained: tuple[torch.Tensor, torch.Tensor] | None = None
    refresh_steps: int | None = None
    snapshots: Snapshots | None = None

    def attach_datasets(self, adaptation: FullDataset, test: FullDataset, snapshots: Snapshots) -> None:
        """Attach the sets that go beyond a batch.

        Parameters
        ----------
        adaptation, test : FullDataset
            The two sets.
        snapshots : Snapshots
            Where those of the run go.
        """
        self.positions, self.snapshots = adaptation.positions, snapshots
        self.adaptation, self.test = self.survey(adaptation), self.survey(test)
        self.test_keys = test.keys

    def survey(self, whole: FullDataset) -> Survey:
        """Collect what teachers and student say of a full set, each when it is asked."""
        return Survey(
            whole.lalm.to(self.device),
            whole.lalm_mask.to(self.device),
            classifier=lambda: whole.gather(lambda batch: [self.classifier_samples(batch.to(self.device))])[0],
            rows=torch.arange(len(whole.keys), device=self.device),
            student=functools.partial(self.student_of_set, whole),
            reference=None if whole.reference is None else whole.reference.to(self.device),
        )

    def student_of_set(self, whole: FullDataset) -> Outputs:
        """Let the student go through a set in evaluation mode, and restore its mode."""
        training = self.modules.training
        self.modules.eval()
        found = whole.gather(lambda batch: self.modules.student.parts(*batch.to(self.device).feats))
        self.modules.train(training)
        student = self.modules.student
        head = functools.partial(student.head, stochastic=False)
        return Outputs(*found, head=head, templates=student.output.weight.detach())

    def teachers(self, batch) -> Teachers:
        """Collect what the language model and the EMA classifier say of a batch."""
        classifier = functools.partial(self.classifier_samples, batch)
        rows = None
        if self.positions is not None:
            rows = torch.tensor([self.positions[key] for key in batch.id], device=self.device)
        reference = getattr(batch, "reference", None)
        prior = None if self.adaptation is None else self.adaptation.lalm_prior
        return Teachers(batch.lalm, batch.lalm_mask, classifier, reference, rows, prior)

    @torch.no_grad()
    def classifier_samples(self, batch) -> torch.Tensor:
        """Monte-Carlo dropout predictions `[B, K_S, C]` of the EMA classifier."""
        frames, lengths = batch.feats
        return self.hparams.ema.module.stochastic_logits(frames, lengths, self.hparams.passes).softmax(-1)

    def begin(self) -> None:
        """Let the method forget what it may know of another run and look at the adaptation set, with its options."""
        torch.manual_seed(self.hparams.seed)
        method = self.hparams.method
        method.state = {}
        if method.target_statistics:
            vectors = self.adaptation.student().vectors
            for model in (self.modules.student, self.hparams.ema.module):
                model.renormalize(vectors)
        if method.prior_correction and "adapt" in method.answers_for:
            prior = self.adaptation.lalm_average(0.0)
            self.adaptation, self.test = (replace(known, lalm_prior=prior) for known in (self.adaptation, self.test))
        method.start(self.adaptation)
        if method.trains:
            self.untrained = self.adaptation.student().probs, self.test.student().hidden

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

    def on_log_point(self, epoch: int) -> None:
        """Keep a snapshot, if the sets are known to the Brain; see `ResumableBrain.on_log_point`."""
        if self.snapshots is None:
            return
        found = {"step": self.optimizer_step, **criteria(self.adaptation.student().probs)}
        self.snapshots.keep({**found, "predictions": self.predictions()}, self.modules.student)

    @contextlib.contextmanager
    def recentred(self):
        """Move the test set's mean onto the adaptation set's for a while, where the method asks for that."""
        if not self.hparams.method.test_mean:
            yield
            return
        apart = self.test.student().vectors.mean(0) - self.adaptation.student().vectors.mean(0)
        norms = [model.norm for model in (self.modules.student, self.hparams.ema.module)]
        means = [norm.running_mean.clone() for norm in norms]
        for norm in norms:
            norm.running_mean += (norm.running_var + norm.eps).sqrt() * apart
        try:
            yield
        finally:
            for norm, mean in zip(norms, means, strict=True):
                norm.running_mean.copy_(mean)

    @torch.no_grad()
    def predictions(self) -> dict[str, list[float]]:
        """Answers to the test utterances.

        Returns
        -------
        dict of str to list of float
            `[C]` by utterance id; an utterance without an answer is missing.
        """
        method = self.hparams.method
        with self.recentred():
            probs = method.predict(self.test)
        if method.corrects_answers:
            probs = prior_corrected(probs, method.predict(self.adaptation).mean(0))
        answered = (probs.sum(-1) > 0).tolist()
        rows = zip(self.test_keys, probs.tolist(), answered, strict=True)
        return {key: row for key, row, said in rows if said}

    @torch.no_grad()
    def teacher_weights(self) -> dict:
        """Weights of the two teachers for each utterance of the adaptation set, as `MIFuse` computes them now.

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
        found = {"measure": method.measure, "ids": list(self.positions), "lalm_weight": rounded(weights)}
        found["lalm"] = [value if said else None for value, said in zip(rounded(lalm), answered, strict=True)]
        return {**found, "classifier": rounded(classifier)}


def rounded(values: torch.Tensor) -> list[float]:
    """Numbers for a file that is looked at, not computed with."""
    return [round(value, 5) for value in values.tolist()]
