#!/usr/bin/env python3
"""Recipe: train an emotion classifier with labels and export it as a recogniser.

Run from the repository's root, or from this folder:

    python recipes/RAVDESS/classifier/train.py hparams/classifier_ravdess.yaml --data_folder /path/to/corpora

The recogniser in `<output_folder>/classifier/recogniser` is what `speechbrain-mifuse predict` and `serve` load, and
what `--source_recogniser` of the adaptation recipes takes.
"""

import sys

import speechbrain as sb
from speechbrain.utils.distributed import if_main_process

from speechbrain_mifuse.brains.classifier import train_classifier
from speechbrain_mifuse.brains.training import join_processes, require_one_process
from speechbrain_mifuse.experiments.features import (
    CorpusSettings,
    EncoderSettings,
    finetuned_front,
    open_front,
    open_reader,
)
from speechbrain_mifuse.experiments.preflight import require_ready
from speechbrain_mifuse.experiments.settings import known_ones, parse_arguments, read_hparams
from speechbrain_mifuse.experiments.source import prepare_labelled
from speechbrain_mifuse.utils.errors import one_clear_error, writing

if __name__ == "__main__":
    with one_clear_error():
        hparams_file, run_opts, overrides = parse_arguments(sys.argv[1:])
        hparams = read_hparams(hparams_file, overrides)
        if hparams["features"] == "finetune":
            join_processes(run_opts)
        else:
            require_one_process()
        require_ready(hparams)
        with writing(hparams["output_folder"]):
            sb.create_experiment_directory(hparams["output_folder"], hparams_file, overrides)
        corpus = CorpusSettings.source_of(hparams)
        prepare_labelled(corpus)
        known_ones(hparams["features"], ("stored", "finetune"), "--features")
        if hparams["features"] == "finetune":
            front = finetuned_front(hparams["encoder"], hparams["trim_db"], corpus.norm)
        else:
            front = open_front(corpus, hparams["layer"], open_reader(EncoderSettings.of(hparams), run_opts))
        recogniser = train_classifier(hparams["source_classifier"], front, run_opts)
        if if_main_process():
            print(recogniser)
