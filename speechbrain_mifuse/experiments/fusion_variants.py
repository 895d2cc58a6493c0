"""What zero-shot scores are worth to a specialist: classifiers with and without them, trained alike."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from speechbrain_mifuse.adaptation.method import described
from speechbrain_mifuse.corpora.manifest import read_manifest, unlabelled
from speechbrain_mifuse.evaluation.metrics import scores_of
from speechbrain_mifuse.evaluation.scoring import counts_by_speaker
from speechbrain_mifuse.experiments.adapter_variants import Arm, adapter_settings
from speechbrain_mifuse.experiments.comparison import Run, few_labels, shared_settings
from speechbrain_mifuse.experiments.settings import known_ones
from speechbrain_mifuse.features.dataset import label_index
from speechbrain_mifuse.nnet.late_fusion import LateFusion
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.zero_shot.scorer import normalise_scores

# Numbers of repeats of the audio and of the text.
Amplification = tuple[int, int]


@dataclass(frozen=True)
class ScoreTable:
    """Scores of every utterance of a corpus by one model."""

    labels: Sequence[str]
    values: Mapping[str, torch.Tensor]
    about: Mapping = field(default_factory=dict)

    def of(self, keys: Sequence[str]) -> torch.Tensor:
        """Stack the scores of some utterances."""
        missing = [key for key in keys if key not in self.values]
        if missing:
            raise UserError(f"{len(missing)} utterances have no scores, as {missing[0]}. Score the corpus again.")
        return torch.stack([self.values[key] for key in keys])

    def classes_among(self, classes: Sequence[str]) -> list[int | None]:
        """Find what each score is for."""
        places = {label: place for place, label in enumerate(classes)}
        return [places.get(label) for label in self.labels]

    def decisions(self, classes: Sequence[str]) -> dict[str, torch.Tensor]:
        """Arrange the scores as predictions of classes, which the highest score decides."""
        found = self.classes_among(classes)
        of = [score for score, place in enumerate(found) if place is not None]
        into = [found[score] for score in of]
        if not of:
            return {}
        scores = torch.full((len(self.values), len(classes)), float("-inf"))
        scores[:, into] = torch.stack(list(self.values.values()))[:, of]
        return dict(zip(self.values, scores, strict=True))


@dataclass(frozen=True)
class Specialist(Arm):
    """The foundation model's side: what is pooled to the vector that scores are fused with."""

    front: Callable | None = None


@dataclass(frozen=True)
class FusionArm:
    """One side of the comparison."""

    classifier: Callable[..., torch.nn.Module] = LateFusion
    scores: str = "zero_shot"
    permuted: bool = False
    standardised: bool = False


def chosen_specialist(
    name: str, specialists: Mapping[str, Specialist], adapter_folder: str | None
) -> tuple[Specialist, dict[str, Path]]:
    """Give the specialist by its name, with the folder of its adapter."""
    specialist = specialists[known_ones(name, specialists, "--specialist")[0]]
    if adapter_folder is None:
        return replace(specialist, pretraining=None), {}
    return specialist, {specialist.pretraining: Path(adapter_folder)}


def chosen_amplification(grid: Mapping[Amplification, ScoreTable], run: Run, labels: Sequence[str]) -> Amplification:
    """Choose the numbers of repeats whose zero-shot scores are best on the run's own labelled utterances."""
    if len(grid) == 1:
        return next(iter(grid))
    rows, scored = read_manifest(run.splits[0]), next(iter(grid.values())).values
    numbered = {key: {"label": label_index(labels, row, key)} for key, row in rows.items() if key in scored}
    given = {key: rows[key] for key in few_labels(numbered, run.labels_per_class, run.seed)}
    classes = [label for label in labels if any(row["emo"] == label for row in given.values())]
    found = {}
    for pair, table in grid.items():
        counts = counts_by_speaker(table.decisions(classes), given, classes)
        found[pair] = scores_of(counts.sum(0))["UA"]
    return min(found, key=lambda pair: (-found[pair], pair[0] + pair[1], pair))


def dealt(table: ScoreTable, splits: Sequence[Sequence[str]], seed: int) -> ScoreTable:
    """Deal every utterance the scores of another one of its split."""
    dice, values = random.Random(seed), {}
    for keys in splits:
        order = sorted(keys)
        values.update(zip(order, (table.values[key] for key in dice.sample(order, len(order))), strict=True))
    return ScoreTable(table.labels, values, {**table.about, "dealt": seed})


def prepared(arm: FusionArm, table: ScoreTable, run: Run) -> ScoreTable:
    """Give an arm's scores as it reads them."""
    if not (arm.standardised or arm.permuted):
        return table
    splits = [[key for key in read_manifest(unlabelled(path)) if key in table.values] for path in run.splits]
    if arm.standardised:
        keys = list(table.values)
        values = normalise_scores(table.of(keys), table.of(splits[0]))
        by = {"standardised_by": hashlib.sha256("".join(sorted(splits[0])).encode()).hexdigest()}
        table = ScoreTable(table.labels, dict(zip(keys, values, strict=True)), {**table.about, **by})
    return dealt(table, splits, run.seed) if arm.permuted else table


def fusion_settings(
    arm: FusionArm,
    specialist: Specialist,
    settings: Mapping,
    run: Run,
    frame_source,
    table: ScoreTable,
    adapters: Mapping[str, Path],
) -> dict:
    """Everything that decides an arm's result."""
    found = {**shared_settings(settings, run, frame_source), **described("classifier", arm.classifier)}
    found |= described("specialist", specialist.classifier)
    found |= adapter_settings(specialist, settings, adapters)
    digest = hashlib.sha256(json.dumps([table.about, list(table.labels)], sort_keys=True).encode()).hexdigest()[:16]
    return {**found, "scores": digest}
