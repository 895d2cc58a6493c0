#!/usr/bin/env python3
"""Recipe: zero-shot scores of an audio-text model, fused late with a specialist (ZS-Fuse, arXiv 2603.23057).

Run from the repository's root, or from this folder:

    python recipes/RAVDESS/zsfuse/train.py hparams/zsfuse_ravdess.yaml --data_folder /path/to/corpora

It trains the dual encoder on other corpora (or loads the audio-text model that `--alm` names), scores every recording
at every number of repeats, and trains each arm on the labels of each fold. What is done is skipped.
"""

import sys

import speechbrain as sb

from speechbrain_mifuse.brains.training import require_one_process
from speechbrain_mifuse.experiments.features import EncoderSettings, open_reader
from speechbrain_mifuse.experiments.folds import arm_summary, chosen_parts
from speechbrain_mifuse.experiments.fusion_variants import train_fusion_arm
from speechbrain_mifuse.experiments.preflight import require_comparison, require_folds, require_ready
from speechbrain_mifuse.experiments.settings import parse_arguments, read_hparams
from speechbrain_mifuse.experiments.zero_shot_steps import (
    amplification_report,
    chosen_specialist,
    fusion_run,
    score_tables,
    specialist_front,
)
from speechbrain_mifuse.utils.errors import one_clear_error, writing

if __name__ == "__main__":
    with one_clear_error():
        hparams_file, run_opts, overrides = parse_arguments(sys.argv[1:])
        require_one_process()
        hparams = read_hparams(hparams_file, overrides)
        arms = hparams["zsfuse"]["arms"]
        names, folds, amounts = chosen_parts(hparams, arms)
        specialist, adapters = chosen_specialist(hparams)
        require_comparison(hparams, arms)
        require_ready(hparams, names)
        with writing(hparams["output_folder"]):
            sb.create_experiment_directory(hparams["output_folder"], hparams_file, overrides)
        hparams["prepare"]()
        require_folds(hparams, folds)
        wanted = list(dict.fromkeys(["zero_shot", *(arms[name].scores for name in names)]))
        tables = {seed: score_tables(hparams, wanted, seed, run_opts) for seed in hparams["seeds"]}
        reader = open_reader(EncoderSettings.of(hparams), run_opts)
        options = {**hparams["zsfuse"], "specialist": specialist}
        records = []
        for fold in folds:
            front = specialist_front(hparams, specialist, fold, reader)
            for seed in hparams["seeds"]:
                for amount in amounts:
                    run = fusion_run(hparams, fold, seed, amount)
                    given = (options, run, front, tables[seed], adapters, run_opts)
                    records += [train_fusion_arm(name, *given) for name in names]
        print(amplification_report(hparams, {seed: found["zero_shot"] for seed, found in tables.items()}))
        print(arm_summary(hparams, records, names, "zsfuse"))
