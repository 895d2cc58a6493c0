"""Checks before a run: whatever would stop it late, after hours of computing or a paid question, stops it here.

`require_ready` looks at what is outside the settings, before the first file is written; `require_data` and
`require_recordings` at the corpora, before anything is encoded, trained, or asked.
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

from speechbrain_mifuse.adaptation.method import AdaptationMethod
from speechbrain_mifuse.adaptation.selection import known_rule
from speechbrain_mifuse.brains.dual_encoder import POSITIVES
from speechbrain_mifuse.brains.training import require_trainable, require_unchanged
from speechbrain_mifuse.corpora.folds import fold_folder
from speechbrain_mifuse.corpora.manifest import read_manifest, unlabelled
from speechbrain_mifuse.evaluation.scoring import labelled
from speechbrain_mifuse.experiments import adapter_variants, comparison
from speechbrain_mifuse.experiments.adaptation import chosen_settings as chosen_adaptation
from speechbrain_mifuse.experiments.dual_encoder import DECISIVE as DUAL_ENCODER_DECISIVE
from speechbrain_mifuse.experiments.features import CorpusSettings, norm_of
from speechbrain_mifuse.experiments.settings import known_ones, require_layer
from speechbrain_mifuse.experiments.source import chosen_settings as chosen_classifier
from speechbrain_mifuse.experiments.source import prepare_labelled
from speechbrain_mifuse.experiments.teacher import TeacherSettings, zero_shot_teacher
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
from speechbrain_mifuse.zero_shot import ZERO_SHOT
from speechbrain_mifuse.zero_shot.captions import read_captions
from speechbrain_mifuse.zero_shot.prompts import read_prompts

# Whose classifiers may be trained here.
ROLES = ("source", "teacher")
# Seconds to wait for a server to accept a connection.
PATIENCE_S = 10
# What decides the target's data and what the teacher says of it, by key of the recipe.
TARGET_KEYS = (
    *("target", "labels", "trim_db", "frame_average", "speaker_norm", "speaker_norm_strength"),
    *("speaker_embedding", "speaker_clusters"),
)
ANSWER_KEYS = (
    *("teacher", "teacher_layer", "teacher_alm", "teacher_prompts", "lalm_base_url", "lalm_model", "lalm_answer_form"),
    *("lalm_samples", "lalm_temperature", "lalm_prompts", "lalm_shuffle_labels"),
)


def require_ready(
    hparams: Mapping,
    names: Sequence[str] = (),
    run_opts: Mapping | None = None,
    teacher_recogniser: Path | None = None,
) -> None:
    """Make sure that a recipe can run to its end, as far as that can be known before it begins."""
    if "speaker_norm" in hparams:
        norm_of(hparams)
    _require_files(hparams)
    if "adaptation" in hparams:
        known_rule(hparams["adaptation"]["selection"])
        require_source(hparams)
    _require_same_settings(hparams, names)
    if "adaptation" in hparams:
        require_teacher(hparams, names, TeacherSettings.of(hparams, teacher_recogniser), run_opts)
    require_writable(hparams["output_folder"], "--output_folder")
    if "feature_folder" in hparams:
        require_writable(hparams["feature_folder"] or cache_folder() / "features", "--feature_folder")


def _require_files(hparams: Mapping) -> None:
    """Refuse adapters, prompts, captions, and names of choices that are read only after encoding."""
    trained = [hparams.get("source_classifier"), hparams.get("teacher_classifier")]
    pretrained = [hparams.get("adapter_folder"), *(options["adapter"] for options in trained if options)]
    for folder in filter(None, pretrained):
        adapter_digest(folder)
    if "pretrain_on" in hparams:
        adapter_variants.pretraining_splits(hparams["pretrain_on"])
    prompts = read_prompts(hparams["prompts"]) if "prompts" in hparams else None
    if "captions" in hparams:
        read_captions(hparams["captions"], prompts)
        FrozenTextEncoder(hparams["text_encoder"])
        known_ones(hparams["dual_encoder"]["positives"], POSITIVES, "--dual_encoder positives")


def require_source(hparams: Mapping, reader: FrameReader | None = None) -> None:
    """Make sure that the source recognizer, if one is given, can be adapted with these settings."""
    folder = hparams["source_recogniser"]
    if folder is None:
        return
    about = _whole_recogniser(folder, "--source_recogniser")
    labels, layer = list(hparams["labels"]), hparams["layer"]
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
        features, norm = reader.fingerprint(), norm_of(hparams)
        # What speakers' offsets are depends on the recordings; how they are made must be the same.
        features |= {} if norm is None else {"speaker_norm": about["features"].get("speaker_norm")}
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


def require_teacher(
    hparams: Mapping, names: Sequence[str], teacher: TeacherSettings, run_opts: Mapping | None = None
) -> None:
    """Make sure that the teacher can be asked, if a chosen method needs its answers."""
    if not any(hparams["adaptation"]["methods"][name].answers_for for name in names):
        return
    if teacher.name == ZERO_SHOT:
        read_prompts(teacher.alm_prompts)
        zero_shot_teacher(teacher, hparams["target"], run_opts)
        return
    if teacher.recogniser:
        _whole_recogniser(teacher.recogniser, "--teacher")
    elif teacher.is_local:
        require_layer(hparams, "teacher_layer")
    store = teacher.label_store
    with LabelStore(store if store.exists() else ":memory:") as answers:
        query = teacher.query(teacher.base_url)
        teacher.client(teacher.base_url, answers, query)
        asked_before = bool(answers.have(query))
    # Where answers are stored, there may be nothing left to ask.
    if not teacher.is_local and not asked_before:
        require_api(teacher.base_url)


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


def _require_same_settings(hparams: Mapping, names: Sequence[str]) -> None:
    """Refuse an output folder that holds what was made with other settings, before anything in it changes."""
    folder = Path(hparams["output_folder"])
    if "adaptation" in hparams:
        methods = hparams["adaptation"]["methods"]
        for name in names:
            settings = chosen_adaptation(hparams["adaptation"], methods[name])
            require_unchanged(folder / name / "settings.json", settings)
        done = [name for name in names if (folder / name / "settings.json").is_file()]
        answered = any(methods[name].answers_for for name in done)
        _require_same_page(folder, hparams)
        if done:
            _require_same_data(hparams, (*TARGET_KEYS, *(ANSWER_KEYS if answered else ())))
    source = hparams.get("source_classifier") if hparams.get("source_recogniser") is None else None
    for options in (source, hparams.get("teacher_classifier")):
        if options is not None:
            require_unchanged(Path(options["output_folder"]) / "settings.json", chosen_classifier(options))
    for kind in ("adapter", "zsfuse"):
        if isinstance(hparams.get(kind), Mapping):
            _require_same_arms(folder, hparams[kind], names)
    if "sources" in hparams:
        options = hparams["dual_encoder"]
        settings = {key: options[key] for key in DUAL_ENCODER_DECISIVE}
        require_unchanged(Path(options["output_folder"]) / "settings.json", settings)


def _require_same_page(folder: Path, hparams: Mapping) -> None:
    """Refuse a folder whose page, which shows all methods in it, would be wrong in the end."""
    for case in cases_of(sorted(folder.glob("*/results.json"))):
        for outcome in (outcome for run in case.runs for outcome in run.outcomes.values()):
            wanted = {"seed": hparams["seed"], "labels": list(hparams["labels"])}
            require_unchanged(outcome.folder / "results.json", wanted, outcome.record)


def _require_same_arms(folder: Path, options: Mapping, names: Sequence[str]) -> None:
    for name in names:
        rate = getattr(options["arms"].get(name), "learning_rate", None)
        own = {} if rate is None else {"adapter_learning_rate": rate}
        for path in sorted(folder.glob(f"fold_*/seed_*/labels_*/{name}/settings.json")):
            require_unchanged(path, comparison.chosen_settings({**options, **own}))
    for path in sorted(folder.glob("fold_*/seed_*/pretraining_*/settings.json")):
        if "pretrainings" in options:
            require_unchanged(path, {key: options[key] for key in adapter_variants.DECISIVE})


def _require_same_data(hparams: Mapping, keys: Sequence[str]) -> None:
    """Compare with the settings that an earlier run left in its folder; what it does not say is not compared."""
    path = Path(hparams["output_folder"]) / "hyperparams.yaml"
    try:
        before = YAML().load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, YAMLError):
        return
    wanted = {key: hparams[key] for key in keys if key in hparams}
    found = {key: getattr(before.get(key), "value", before.get(key)) for key in wanted if key in before}
    prepare = getattr(hparams["prepare_target"], "keywords", {})
    for key in ("splits", "keep"):
        wanted[f"prepare_target: {key}"] = prepare.get(key)
        found[f"prepare_target: {key}"] = (before.get("prepare_target") or {}).get(key)
    require_unchanged(path, wanted, found)


def require_data(hparams: Mapping, names: Sequence[str], reader: FrameReader, teacher: TeacherSettings) -> None:
    """Prepare the corpora that an adaptation recipe trains on, and make sure that all of its data suffice."""
    methods = {name: hparams["adaptation"]["methods"][name] for name in names}
    target = CorpusSettings.target_of(hparams)
    require_labels(methods, target)
    require_source(hparams, reader)
    require_recordings(target, methods, hparams["output_folder"])
    if hparams["source_recogniser"] is None:
        prepare_labelled(CorpusSettings.source_of(hparams))
    asked = any(method.answers_for for method in methods.values())
    if asked and teacher.is_local and teacher.recogniser is None:
        prepare_labelled(CorpusSettings.teacher_of(hparams))


def require_recordings(
    target: CorpusSettings,
    methods: Mapping[str, AdaptationMethod],
    output_folder: str | Path,
    store: FeatureStore | None = None,
) -> None:
    """Make sure that there is enough to adapt to: of what could be encoded, once `store` is filled."""
    paths = [unlabelled(target.manifests / f"{split}.json") for split in ("adapt", "test")]
    adapted, tested = (encoded_rows(path, store) for path in paths)
    if any(method.trains for method in methods.values()):
        require_trainable([None] * len(adapted), f"{target.name} ({paths[0]})")
    for name in methods:
        path = Path(output_folder) / name / "predictions.json"
        gone = set(json.loads(path.read_text())) - set(tested) if path.is_file() else set()
        if gone:
            raise UserError(
                f"{path}: holds predictions about {len(gone)} recordings that are not in --data_folder now, such as "
                f"{min(gone)}. Pass another --output_folder, or the recordings of before."
            )


def require_labels(methods: Mapping[str, AdaptationMethod], target: CorpusSettings) -> None:
    """Refuse a method that uses the target's labels where there are none, before anything long is begun."""
    wanting = [name for name, method in methods.items() if method.uses_labels]
    if not wanting:
        return
    manifest = target.manifests / "adapt.json"
    if not labelled(read_manifest(manifest)):
        raise UserError(
            f"--method: {', '.join(wanting)} is trained on the target's labels, and '{target.name}' has none "
            f"({manifest}). Leave it out of --method, or give the recordings labels."
        )


def require_folds(manifests: str | Path, folds: Sequence[int]) -> None:
    """Make sure that every fold has enough to train on."""
    for fold in folds:
        path = fold_folder(manifests, fold) / "train.json"
        require_trainable([row.get("emo") for row in read_manifest(path).values()], str(path), ())
