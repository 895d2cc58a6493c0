"""The command `speechbrain-mifuse extract`: frames of a recipe's corpora, before it trains and on as many machines."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from speechbrain_mifuse.utils.errors import UserError, stopped_by_ctrl_c

if TYPE_CHECKING:
    from speechbrain_mifuse.experiments.features import CorpusSettings


def add_extract(commands) -> None:
    """Add the command `extract`."""
    extract = commands.add_parser(
        "extract",
        help="encode the recordings that a recipe needs, on one machine or a part on each of several",
        usage="%(prog)s YAML [--shard I/N] [FLAGS OF THE RECIPE]",
        description="Prepares the corpora of a recipe and stores the frames that its encoder makes of them, as the "
        "recipe would before it trains. With --shard 2/4 it encodes the second of four parts; the machines share "
        "--output_folder and --feature_folder, and whoever fills the store next, the recipe or this command without "
        "--shard, brings the parts together. What is stored is not encoded again; the same command goes on after a "
        "stop.",
        allow_abbrev=False,
    )
    extract.add_argument("yaml", type=Path, metavar="YAML", help="of the recipe, as hparams/nemo2rav.yaml; comes first")
    extract.add_argument("--shard", metavar="I/N", help="encode only the I-th of N parts")
    extract.set_defaults(run=run_extract, recipe_flags=True)


def wanted_corpora(hparams: Mapping) -> Iterator[CorpusSettings]:
    """List the corpora whose frames a recipe stores: not where something trained takes the place of a corpus."""
    from speechbrain_mifuse.experiments.features import CorpusSettings
    from speechbrain_mifuse.experiments.teacher import teacher_of

    if "prepare_target" in hparams:
        yield CorpusSettings.target_of(hparams)
    if "prepare_source" in hparams and hparams.get("source_recogniser") is None:
        yield CorpusSettings.source_of(hparams)
    if "prepare_teacher" in hparams and teacher_of(hparams).serves_classifier:
        yield CorpusSettings.teacher_of(hparams)
    for name, source in hparams.get("sources", {}).items():
        yield CorpusSettings(name, Path(source.manifests), source.prepare, hparams["feature_folder"])
    if "prepare" in hparams:  # every fold has all utterances, and all folds share a store
        yield CorpusSettings.fold_of(hparams, 1)


def run_extract(options: argparse.Namespace) -> None:
    """Store the frames that a recipe needs, or a part of them."""
    if not options.yaml.is_file():
        raise UserError(f"{options.yaml}: no such file. The recipe's YAML file comes first, as hparams/nemo2rav.yaml")
    from speechbrain_mifuse.experiments.features import EncoderSettings, open_reader
    from speechbrain_mifuse.experiments.settings import load_hparams
    from speechbrain_mifuse.features.shards import Shard

    shard = None if options.shard is None else Shard.parse(options.shard)
    hparams, run_opts = load_hparams(options.yaml, options.flags)
    corpora = list(wanted_corpora(hparams))
    if not corpora or hparams.get("features", "stored") != "stored":
        raise UserError(f"{options.yaml}: this recipe stores no frames, so there is nothing to extract.")
    with stopped_by_ctrl_c():
        reader = open_reader(EncoderSettings.of(hparams), run_opts)
        for corpus in corpora:
            print(extracted(corpus, reader, shard), flush=True)


def extracted(corpus: CorpusSettings, reader, shard=None) -> str:
    """Prepare a corpus and fill its store."""
    from speechbrain_mifuse.brains.training import exclusive_lock
    from speechbrain_mifuse.features.extract import fill_store

    corpus.manifests.parent.mkdir(parents=True, exist_ok=True)
    # Machines that begin together must not prepare at the same time; the second finds it done.
    with exclusive_lock(f"{corpus.manifests}.lock"):
        corpus.prepare()
    manifests = sorted(corpus.manifests.glob("*_unlabelled.json"))
    store = fill_store(corpus.name, manifests, reader, corpus.feature_folder, shard)
    return f"{corpus.name}: {len(store.rows)} utterances in {store.folder}"
