"""The steps of a recipe that compares arms over folds and seeds; each does what is missing and skips what is done."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from speechbrain_mifuse.brains.adapter import pretrain
from speechbrain_mifuse.corpora.folds import fold_folder
from speechbrain_mifuse.corpora.manifest import unlabelled
from speechbrain_mifuse.evaluation.aggregate import write_csv
from speechbrain_mifuse.experiments.choices import known_ones
from speechbrain_mifuse.experiments.features import CorpusSettings, norm_of, open_front
from speechbrain_mifuse.experiments.variants import Run
from speechbrain_mifuse.features.dataset import encoded_rows
from speechbrain_mifuse.features.extract import FrameReader, fill_store
from speechbrain_mifuse.features.front import StoredFrames
from speechbrain_mifuse.features.prosody import ProsodyReader
from speechbrain_mifuse.nnet.model_card import encoder_told
from speechbrain_mifuse.report.variant_report import COLUMNS, arm_protocol, arm_table
from speechbrain_mifuse.utils.files import atomic_write
from speechbrain_mifuse.utils.texts import markdown


def chosen_among(value, known: Sequence, flag: str) -> list:
    """Read a flag as `known_ones` does, or as `all` of them."""
    if isinstance(value, str) and value == "all":
        return list(known)
    return known_ones(value, known, flag)


def chosen_parts(hparams: Mapping, arms: Mapping) -> tuple[list[str], list[int], list[int | str]]:
    """Read which part of a comparison is asked for."""
    names = chosen_among(hparams["arm"], list(arms), "--arm")
    folds = chosen_among(hparams["fold"], list(range(1, len(hparams["folds"]) + 1)), "--fold")
    amounts = hparams["labels_per_class"]
    return names, folds, amounts if isinstance(amounts, list) else [amounts]


def fold_front(hparams: Mapping, fold: int, reader: FrameReader) -> StoredFrames:
    """Fill the feature store with a fold's utterances and read frames from it."""
    return open_front(fold_corpus(hparams, fold), hparams["layer"], reader)


def fold_corpus(hparams: Mapping, fold: int) -> CorpusSettings:
    """Read which corpus the folds are of, with the manifests of one of them."""
    return CorpusSettings(
        name=hparams["source"],
        manifests=fold_folder(hparams["manifests"], fold),
        prepare=hparams["prepare"],
        feature_folder=hparams["feature_folder"],
        norm=norm_of(hparams),
    )


def adapter_run(hparams: Mapping, fold: int, seed: int, labels_per_class: int | str) -> Run:
    """Describe one run of an adapter comparison."""
    norm, folds = norm_of(hparams), hparams["folds"]
    about = {
        "corpus": hparams["source"],
        "encoder": f"{encoder_told(hparams['encoder'])}, layer {hparams['layer']}, frozen",
        "protocol": f"{len(folds)} folds, {hparams['protocol']}, {len(hparams['labels'])} classes",
        "speaker_norm": "none" if norm is None else norm.told(),
        "pretraining_audio": "the training folds' audio",
    }
    if "test" in hparams["pretrain_on"]:
        about["pretraining_audio"] = "LEAK: the audio of all folds, the test fold's included"
    folder = Path(hparams["output_folder"]) / f"fold_{fold}" / f"seed_{seed}"
    return Run(folder, fold_folder(hparams["manifests"], fold), fold, seed, labels_per_class, about)


def pretrained_adapter(
    hparams: Mapping, run: Run, name: str, front: StoredFrames, run_opts: Mapping | None = None
) -> Path:
    """Pretrain an adapter on a fold's audio without labels, or find it pretrained."""
    splits = chosen_among(hparams["pretrain_on"], ["train", "test"], "--pretrain_on")
    manifests = [unlabelled(run.manifests / f"{split}.json") for split in splits]
    prosody = functools.partial(stored_prosody, hparams, manifests)
    folder = run.folder / f"pretraining_{name}"
    return pretrain(name, hparams["adapter"], manifests, front, folder, run.seed, prosody, run_opts)


def stored_prosody(hparams: Mapping, manifests: Sequence[Path]) -> dict[str, torch.Tensor]:
    """Prosodic functionals of every utterance of some manifests, from a store that is filled where it lacks any."""
    reader = ProsodyReader(hparams["trim_db"])
    store = fill_store(f"{hparams['source']}-prosody", manifests, reader, hparams["feature_folder"])
    rows = {key for path in manifests for key in encoded_rows(path, store)}
    return {key: torch.from_numpy(store.frames(key)).float().flatten() for key in rows}


def arm_summary(hparams: Mapping, records: Sequence[Mapping], arms: Sequence[str], name: str) -> str:
    """Bring a comparison together: `results.json`, `results.md` and a CSV file in the output folder."""
    folder = Path(hparams["output_folder"])
    write_csv(folder / f"{name}.csv", records, COLUMNS)
    atomic_write(folder / "results.json", json.dumps(list(records), indent=1))
    table = arm_table(records, arms, hparams["compare_to"])
    text = f"# {markdown(hparams['source'])}\n\n{table.markdown()}\n{markdown(arm_protocol(records))}\n"
    atomic_write(folder / "results.md", text)
    return text
