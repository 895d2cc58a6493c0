#!/usr/bin/env python3
"""Recipe: what adapter training is worth (arXiv 2509.23795): arms x folds x seeds, and the table they end in.

Run from the repository's root, or from this folder:

    python recipes/RAVDESS/adapter/train.py hparams/adapter_ravdess.yaml --data_folder /path/to/corpora

For each fold and seed it pretrains the adapters that the arms need, without labels and without the test fold, trains
each arm with labels on the other folds, and scores it on the test fold. What is done already is skipped; a killed run
goes on.
"""

import sys

import speechbrain as sb

from speechbrain_mifuse.brains.training import require_one_process
from speechbrain_mifuse.experiments.adapter_variants import train_arm
from speechbrain_mifuse.experiments.features import EncoderSettings, open_reader
from speechbrain_mifuse.experiments.folds import adapter_run, arm_summary, chosen_parts, fold_front, pretrained_adapter
from speechbrain_mifuse.experiments.preflight import require_comparison, require_folds, require_ready
from speechbrain_mifuse.experiments.settings import parse_arguments, read_hparams
from speechbrain_mifuse.utils.errors import one_clear_error, writing

if __name__ == "__main__":
    with one_clear_error():
        hparams_file, run_opts, overrides = parse_arguments(sys.argv[1:])
        require_one_process()
        hparams = read_hparams(hparams_file, overrides)
        arms = hparams["adapter"]["arms"]
        names, folds, amounts = chosen_parts(hparams, arms)
        require_comparison(hparams, arms)
        require_ready(hparams, names)
        with writing(hparams["output_folder"]):
            sb.create_experiment_directory(hparams["output_folder"], hparams_file, overrides)
        hparams["prepare"]()
        require_folds(hparams, folds)
        reader = open_reader(EncoderSettings.of(hparams), run_opts)
        records = []
        for fold in folds:
            front = fold_front(hparams, fold, reader)
            for seed in hparams["seeds"]:
                needed = dict.fromkeys(arms[name].pretraining for name in names if arms[name].pretraining)
                start = adapter_run(hparams, fold, seed, "all")
                adapters = {one: pretrained_adapter(hparams, start, one, front, run_opts) for one in needed}
                for amount in amounts:
                    run = adapter_run(hparams, fold, seed, amount)
                    records += [train_arm(name, hparams["adapter"], run, front, adapters, run_opts) for name in names]
        print(arm_summary(hparams, records, names, "adapter"))
