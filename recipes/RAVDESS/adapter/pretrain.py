#!/usr/bin/env python3
"""Recipe: pretrain adapters without labels on the frames of a frozen encoder (arXiv 2509.23795).

Run from the repository's root, or from this folder:

    python recipes/RAVDESS/adapter/pretrain.py hparams/adapter_ravdess.yaml --data_folder /path/to/corpora --fold 1

One adapter for each fold and seed that the flags name, on the audio of the other folds. `train.py` does the same for
those that it lacks.
"""

import sys

import speechbrain as sb

from speechbrain_mifuse.brains.training import require_one_process
from speechbrain_mifuse.experiments.features import EncoderSettings, open_reader
from speechbrain_mifuse.experiments.folds import adapter_run, chosen_among, fold_front, pretrained_adapter
from speechbrain_mifuse.experiments.preflight import require_ready
from speechbrain_mifuse.experiments.settings import parse_arguments, read_hparams
from speechbrain_mifuse.utils.errors import one_clear_error, writing

if __name__ == "__main__":
    with one_clear_error():
        hparams_file, run_opts, overrides = parse_arguments(sys.argv[1:])
        require_one_process()
        hparams = read_hparams(hparams_file, overrides)
        numbers = list(range(1, len(hparams["folds"]) + 1))
        folds = chosen_among(hparams["fold"], numbers, "--fold")
        names = chosen_among(hparams["pretraining"], list(hparams["adapter"]["pretrainings"]), "--pretraining")
        require_ready(hparams)
        with writing(hparams["output_folder"]):
            sb.create_experiment_directory(hparams["output_folder"], hparams_file, overrides)
        hparams["prepare"]()
        reader = open_reader(EncoderSettings.of(hparams), run_opts)
        for fold in folds:
            front = fold_front(hparams, fold, reader)
            for seed in hparams["seeds"]:
                run = adapter_run(hparams, fold, seed, "all")
                for name in names:
                    adapter = pretrained_adapter(hparams, run, name, front, run_opts)
                    print(adapter)
