"""What a recipe writes and prints at its end."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from speechbrain_mifuse.adaptation.selection import chosen_snapshot, known_rule
from speechbrain_mifuse.brains.snapshots import Snapshots
from speechbrain_mifuse.corpora.manifest import (
    ABOUT,
    known_speakers,
    read_about,
    read_manifest,
    recordings_without_speaker,
    unlabelled,
)
from speechbrain_mifuse.evaluation.scoring import evaluate, score_snapshots, side_by_side
from speechbrain_mifuse.experiments.adaptation import AdaptationExperiment
from speechbrain_mifuse.inference.model_card import encoder_told
from speechbrain_mifuse.inference.recognizer_folder import read_about as read_recogniser
from speechbrain_mifuse.inference.recognizer_folder import write_card
from speechbrain_mifuse.report.page import write_report
from speechbrain_mifuse.report.result_files import write_results
from speechbrain_mifuse.utils.files import atomic_write

logger = logging.getLogger(__name__)

TOLD_SENTENCES = {"apart": "the others", "same": "the same ones"}


def report(
    name: str, experiment: AdaptationExperiment, teacher_model: Mapping | None, predictions: Mapping, n_train: int
) -> None:
    """Score one method's predictions and write its results; here the target's labels are opened, if there are any."""
    method, target, adaptation = experiment.methods[name], experiment.target, experiment.adaptation
    rule, labels = adaptation["selection"], adaptation["labels"]
    folder, test = experiment.output_folder / name, target.manifests / "test.json"
    scored = evaluate(predictions, test, labels)
    if scored["UA"] is None:
        logger.warning("%s has no labels, nothing is scored: see %s.", test, folder / "predictions.json")
    snapshots = Snapshots(folder, rule).saved()
    record = write_results(
        folder,
        scored,
        labels,
        method=name,
        source=source_name(experiment.source.name, experiment.source_recogniser),
        target=target.name,
        teacher=experiment.teacher.display_name,
        teacher_model=teacher_model,
        seed=adaptation["seed"],
        encoder=f"{encoder_told(experiment.encoder.source)}, layer {experiment.layer}, frozen",
        protocol=protocol(labels, target.manifests, target.norm),
        target_copy=copy_description(read_about(target.manifests / ABOUT)) or None,
        speaker_norm="none" if target.norm is None else target.norm.told(),
        selection=known_rule(rule)[1],
        n_train=n_train if method.uses_adaptation_set else 0,
        diversity_weight=adaptation["diversity_weight"],
        temperature=adaptation["temperature"],
        traits=method.traits(),
        steps=chosen_snapshot(snapshots, rule)["step"] if snapshots else 0,
        snapshots=score_snapshots(snapshots, test, labels),
    )
    if method.trains:
        write_card(folder / "recogniser", record)


def source_name(corpus: str, recogniser: str | None) -> str:
    """Say what the source recognizer was trained on."""
    return corpus if recogniser is None else corpus_of(recogniser, read_recogniser(recogniser))


def corpus_of(folder: str | Path, about: Mapping) -> str:
    """Name what a recognizer was trained on."""
    # Not as an expression: the name becomes a value in YAML.
    return about.get("corpus", Path(folder).resolve().parent.name.lstrip("!("))


def copy_description(about: Mapping) -> str:
    """Say in what a target differs from the whole published corpus, as far as is known."""
    differences, check = [], about.get("release_check") or {"matches": True}
    if not check["matches"]:
        usable = check["total_found"] - check.get("unusable", 0)
        differences.append(f"not the published release ({usable} of {check['total_expected']} utterances)")
    kept = ", ".join(f"{100 * share:g} % of {label}" for label, share in (about.get("keep") or {}).items())
    if sentences := about.get("sentences"):
        differences.append(f"half of the sentences to test, {TOLD_SENTENCES[sentences]} to adapt")
    return ", ".join([*differences, *([f"of the adaptation set only {kept} kept"] if kept else [])])


def protocol(labels: Sequence[str], manifests: Path, norm=None) -> str:
    """Say how the target was split, how many of its speakers are known, and what was done with them."""
    paths = [unlabelled(manifests / f"{split}.json") for split in ("adapt", "test")]
    splits = [read_manifest(path) for path in paths]
    adapt, test = (known_speakers(rows) for rows in splits)
    rows = {**splits[0], **splits[1]}
    without = recordings_without_speaker(rows)
    if adapt & test or len(rows) < len(splits[0]) + len(splits[1]):
        text = f"adapted and predicted on the same speakers, {len(labels)} classes, {len(adapt | test)} speakers"
    else:
        text = f"speaker-independent{' as far as speakers are known' if without else ''}, {len(labels)} classes, "
        text += f"{len(adapt)} speakers to adapt, {len(test)} others to test"
    text += f", {without} of {len(rows)} recordings without a known speaker" if without else ""
    return text if norm is None else f"{text}; speaker_norm {norm.told()}"


def summary(output_folder: str | Path, names: Sequence[str], order: Sequence[str]) -> str:
    """Bring the results of a run together: `results.json`, `results.md` and `report.html` in the output folder."""
    folder = Path(output_folder)
    records = [json.loads((folder / name / "results.json").read_text()) for name in names]
    atomic_write(folder / "results.json", json.dumps(records if len(records) > 1 else records[0], indent=1))
    write_report(folder, results=folder.glob("*/results.json"))
    return side_by_side(folder, order)
