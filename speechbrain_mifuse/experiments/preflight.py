"""Checks before a run: whatever would stop it late, after hours of computing or a paid question, stops it here.

The functions for one kind of recipe each look at what is outside the settings, before the first file is written;
`require_methods_fit`, `require_recordings` and `require_folds` at the corpora, before anything is encoded, trained, or
asked.
"""

from __future__ import annotations

import json
import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from speechbrain_mifuse.adaptation.selection import known_rule
from speechbrain_mifuse.brains.dual_encoder import POSITIVES
from speechbrain_mifuse.brains.training import require_trainable
from speechbrain_mifuse.corpora.folds import fold_folder
from speechbrain_mifuse.corpora.manifest import read_manifest, unlabelled
from speechbrain_mifuse.evaluation.scoring import labelled
from speechbrain_mifuse.experiments import adapter_variants, comparison, dual_encoder, source
from speechbrain_mifuse.experiments.adaptation import ANSWER_KEYS, AdaptationExperiment
from speechbrain_mifuse.experiments.adaptation import chosen_settings as chosen_adaptation
from speechbrain_mifuse.experiments.features import CorpusSettings
from speechbrain_mifuse.experiments.same_settings import require_unchanged
from speechbrain_mifuse.experiments.settings import known_ones, require_layer
from speechbrain_mifuse.experiments.teacher import AudioTextTeacher
from speechbrain_mifuse.features.dataset import encoded_rows
from speechbrain_mifuse.features.extract import FrameReader
from speechbrain_mifuse.features.store import FeatureStore
from speechbrain_mifuse.features.text_encoder import FrozenTextEncoder
from speechbrain_mifuse.inference.recognizer_folder import RecogniserError, load_classifier, read_about, read_settings
from speechbrain_mifuse.lalm.store import LabelStore, is_loopback
from speechbrain_mifuse.nnet.adapter_files import adapter_digest
from speechbrain_mifuse.report.cases import cases_of
from speechbrain_mifuse.utils.errors import UserError, require_writable
from speechbrain_mifuse.utils.files import cache_folder
from speechbrain_mifuse.zero_shot.captions import read_captions
from speechbrain_mifuse.zero_shot.prompts import read_prompts

# Seconds to wait for a server to accept a connection.
PATIENCE_S = 10


def require_adaptation(experiment: AdaptationExperiment, run_opts: Mapping | None = None) -> None:
    """Make sure that an adaptation recipe can run to its end, as far as that can be known before it begins."""
    classifiers = (experiment.source.classifier, experiment.teacher_corpus.classifier)
    _require_adapters(*(classifier["adapter"] for classifier in classifiers))
    known_rule(experiment.adaptation["selection"])
    require_source(experiment)
    _require_same_adaptation(experiment)
    for classifier in classifiers[0 if experiment.source_recogniser is None else 1 :]:
        _require_same_classifier(classifier)
    require_teacher(experiment, run_opts)
    _require_folders(experiment.output_folder, experiment.target.feature_folder)


def require_classifier(corpus: CorpusSettings, output_folder: str) -> None:
    """Make sure that a classifier recipe can run to its end."""
    _require_adapters(corpus.classifier["adapter"])
    _require_same_classifier(corpus.classifier)
    _require_folders(output_folder, corpus.feature_folder)


def require_comparison(runs: comparison.Comparison, settings: Mapping, adapter_folder: str | None = None) -> None:
    """Make sure that a recipe that compares variants can; `settings` is what its file of `hparams/base` defines."""
    _require_adapters(adapter_folder)
    for name in runs.arms:
        rate = getattr(settings["arms"][name], "learning_rate", None)
        own = {} if rate is None else {"adapter_learning_rate": rate}
        for path in sorted(runs.output_folder.glob(f"fold_*/seed_*/labels_*/{name}/settings.json")):
            _require_same(path, {**settings, **own}, comparison.DECISIVE)
    if "pretrainings" in settings:
        for path in sorted(runs.output_folder.glob("fold_*/seed_*/pretraining_*/settings.json")):
            _require_same(path, settings, adapter_variants.DECISIVE)
    _require_folders(runs.output_folder, runs.feature_folder)


def require_dual_encoder(settings: Mapping, feature_folder: str | None) -> None:
    """Make sure that a dual encoder recipe can run; `settings` is what `hparams/base/dual_encoder.yaml` defines."""
    read_captions(settings["captions"], read_prompts(settings["prompts"]))
    FrozenTextEncoder(settings["text_encoder"])
    known_ones(settings["positives"], POSITIVES, "--dual_encoder positives")
    _require_same(Path(settings["output_folder"]) / "settings.json", settings, dual_encoder.DECISIVE)
    _require_folders(settings["output_folder"], feature_folder)


def _require_folders(output_folder: str | Path, feature_folder: str | None) -> None:
    require_writable(output_folder, "--output_folder")
    require_writable(feature_folder or cache_folder() / "features", "--feature_folder")


def _require_adapters(*folders: str | None) -> None:
    for folder in filter(None, folders):
        adapter_digest(folder)


def _require_same(path: Path, settings: Mapping, keys: Sequence[str]) -> None:
    """Refuse a folder whose work was done with other settings."""
    require_unchanged(path, {key: settings[key] for key in keys})


def _require_same_classifier(classifier: Mapping) -> None:
    _require_same(Path(classifier["output_folder"]) / "settings.json", classifier, source.DECISIVE)


def require_source(experiment: AdaptationExperiment, reader: FrameReader | None = None) -> None:
    """Make sure that the source recognizer, if one is given, can be adapted with these settings."""
    folder = experiment.source_recogniser
    if folder is None:
        return
    about = _whole_recogniser(folder, "--source_recogniser")
    labels, layer = list(experiment.adaptation["labels"]), experiment.layer
    if about["labels"] != labels:
        raise UserError(
            f"--source_recogniser: {folder} knows {', '.join(about['labels'])}, and --labels are {', '.join(labels)}. "
            f'Pass --labels "[{", ".join(about["labels"])}]", or another recognizer.'
        )
    if "layer" in about and about["layer"] != layer:
        raise UserError(
            f"--source_recogniser: {folder} reads layer {about['layer']}, and --layer is {layer}. "
            f"Pass --layer {about['layer']}, or another recognizer."
        )
    if reader is not None:
        features = reader.fingerprint()
        # What speakers' offsets are depends on the recordings; how they are made must be the same.
        features |= {} if experiment.target.norm is None else {"speaker_norm": about["features"].get("speaker_norm")}
        load_classifier(folder, labels, features)


def _whole_recogniser(folder: str | Path, flag: str) -> dict:
    """Load all of a recognizer but its encoder, and give what it says of itself."""
    try:
        about = read_about(folder)
        read_settings(Path(folder) / "hyperparams.yaml")
        load_classifier(folder, about["labels"], about["features"])
    except RecogniserError as error:
        raise UserError(f"{flag}: {error}") from None
    return about


def require_teacher(experiment: AdaptationExperiment, run_opts: Mapping | None = None) -> None:
    """Make sure that the teacher can be asked, if a chosen method needs its answers."""
    teacher = experiment.teacher
    if not experiment.asks_teacher:
        return
    if isinstance(teacher, AudioTextTeacher):
        read_prompts(teacher.teacher_prompts)
        teacher.load(experiment.target.name, run_opts)
        return
    if teacher.recogniser:
        _whole_recogniser(teacher.recogniser, "--teacher")
    elif teacher.serves_classifier:
        require_layer("teacher_layer", experiment.teacher_corpus.classifier["layer"], experiment.encoder.layers)
    store, query = teacher.label_store, teacher.query()
    with LabelStore(store if store.exists() else ":memory:") as answers:
        teacher.client(answers, query)
        asked_before = bool(answers.have(query))
    # Where answers are stored, there may be nothing left to ask.
    if not teacher.serves_classifier and not asked_before:
        require_api(teacher.profile.base_url)


def require_api(base_url: str) -> None:
    """Make sure that an API can be reached and that there is a key for it."""
    if not is_loopback(base_url) and not os.environ.get("OPENAI_API_KEY"):
        raise UserError(f"--lalm_base_url {base_url}: set the environment variable OPENAI_API_KEY to a key of it.")
    address = urllib.parse.urlsplit(base_url)
    if urllib.request.getproxies() and not is_loopback(base_url):
        return  # only the proxy knows
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname, port), PATIENCE_S).close()
    except OSError as error:
        raise UserError(
            f"--lalm_base_url {base_url}: cannot be reached ({error.strerror or error}). Start the server first, or "
            "correct the address."
        ) from None


def _require_same_adaptation(experiment: AdaptationExperiment) -> None:
    """Refuse an output folder that holds what was made with other settings, before anything in it changes."""
    folder, done = experiment.output_folder, []
    for name, method in experiment.methods.items():
        path = folder / name / "settings.json"
        require_unchanged(path, chosen_adaptation(experiment.adaptation, method))
        done += [method] if path.is_file() else []
    # The page shows all methods of the folder, chosen now or not.
    wanted = {"seed": experiment.adaptation["seed"], "labels": list(experiment.adaptation["labels"])}
    for case in cases_of(sorted(folder.glob("*/results.json"))):
        for outcome in (outcome for run in case.runs for outcome in run.outcomes.values()):
            require_unchanged(outcome.folder / "results.json", wanted, outcome.record)
    if done:
        ignored = () if any(method.answers_for for method in done) else ANSWER_KEYS
        values = {key: value for key, value in experiment.decisive.items() if key not in ignored}
        _require_same_values(folder / "hyperparams.yaml", values)


def _require_same_values(path: Path, wanted: Mapping) -> None:
    """Compare with the settings that an earlier run left in its folder; what it does not say is not compared."""
    try:
        before = YAML().load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, YAMLError):
        return
    prepared = before.get("prepare_target") or {}
    before = {**before, **{f"prepare_target: {key}": prepared.get(key) for key in ("splits", "keep", "sentences")}}
    found = {key: getattr(before[key], "value", before[key]) for key in wanted if key in before}
    require_unchanged(path, {key: wanted[key] for key in found}, found)


def require_methods_fit(experiment: AdaptationExperiment) -> None:
    """Refuse a method that uses the target's labels where there are none, and a target with too few recordings."""
    target, manifest = experiment.target, experiment.target.manifests / "adapt.json"
    wanting = [name for name, method in experiment.methods.items() if method.uses_labels]
    if wanting and not labelled(read_manifest(manifest)):
        raise UserError(
            f"--method: {', '.join(wanting)} is trained on the target's labels, and '{target.name}' has none "
            f"({manifest}). Leave it out of --method, or give the recordings labels."
        )
    require_recordings(experiment)


def require_recordings(experiment: AdaptationExperiment, store: FeatureStore | None = None) -> None:
    """Make sure that there is enough to adapt to: of what could be encoded, once `store` is filled."""
    target, methods = experiment.target, experiment.methods
    paths = [unlabelled(target.manifests / f"{split}.json") for split in ("adapt", "test")]
    adapted, tested = (encoded_rows(path, store) for path in paths)
    if any(method.trains for method in methods.values()):
        require_trainable([None] * len(adapted), f"{target.name} ({paths[0]})")
    for name in methods:
        path = experiment.output_folder / name / "predictions.json"
        gone = set(json.loads(path.read_text())) - set(tested) if path.is_file() else set()
        if gone:
            raise UserError(
                f"{path}: holds predictions about {len(gone)} recordings that are not in --data_folder now, such as "
                f"{min(gone)}. Pass another --output_folder, or the recordings of before."
            )


def require_folds(manifests: str | Path, folds: Sequence[int]) -> None:
    """Make sure that every fold has enough to train on."""
    for fold in folds:
        path = fold_folder(manifests, fold) / "train.json"
        require_trainable([row.get("emo") for row in read_manifest(path).values()], str(path), ())
