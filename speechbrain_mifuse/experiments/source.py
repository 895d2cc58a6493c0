"""The classifier of a corpus: prepared, trained once, and found trained from then on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from speechbrain.utils.distributed import run_on_main

from speechbrain_mifuse.brains.classifier import train_classifier
from speechbrain_mifuse.brains.training import one_at_a_time, require_trainable
from speechbrain_mifuse.corpora.manifest import read_manifest
from speechbrain_mifuse.experiments.features import CorpusSettings, open_front
from speechbrain_mifuse.features.extract import FrameReader


def trained_recogniser(corpus: CorpusSettings, reader: FrameReader, run_opts: Mapping | None = None) -> Path:
    """Store the frames of a prepared corpus and train its classifier; each step is skipped when done."""
    classifier = corpus.classifier
    folder = Path(classifier["output_folder"])
    folder.mkdir(parents=True, exist_ok=True)
    # Runs side by side may share a source or a teacher: the first trains it, the others wait and find it.
    with one_at_a_time(folder / "lock"):
        return train_classifier(classifier, open_front(corpus, classifier["layer"], reader), run_opts)


def prepare_labelled(corpus: CorpusSettings) -> None:
    """Prepare the corpus that a classifier is trained on, and make sure that it has an example of each class."""
    classifier = corpus.classifier
    folder = Path(classifier["output_folder"])
    folder.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(folder / "lock"):
        run_on_main(corpus.prepare)
    rows = read_manifest(classifier["train_manifest"]).values()
    where = f"{classifier['name']} ({classifier['train_manifest']})"
    require_trainable([row.get("emo") for row in rows], where, classifier["labels"])
