#!/usr/bin/env python3
"""Recipe: train a dual encoder of speech and text for a target corpus, on captions of other corpora (for ZS-Fuse).

Run from the repository's root, or from this folder:

    python recipes/RAVDESS/dual_encoder/train.py hparams/dual_encoder_ravdess.yaml --data_folder /path/to/corpora

The speech encoder and the text encoder stay frozen. No recording of the target takes part; `about.json` of the model,
in `<output_folder>/model`, names the corpora and the classes that it knows. What is done already is skipped; a killed
run goes on.
"""

import sys

import speechbrain as sb

from speechbrain_mifuse.brains.dual_encoder import train_dual_encoder
from speechbrain_mifuse.brains.training import require_one_process
from speechbrain_mifuse.experiments.features import EncoderSettings, open_reader
from speechbrain_mifuse.experiments.preflight import require_ready
from speechbrain_mifuse.experiments.settings import parse_arguments, read_hparams
from speechbrain_mifuse.experiments.zero_shot_steps import source_fronts
from speechbrain_mifuse.utils.errors import one_clear_error, writing

if __name__ == "__main__":
    with one_clear_error():
        hparams_file, run_opts, overrides = parse_arguments(sys.argv[1:])
        require_one_process()
        hparams = read_hparams(hparams_file, overrides)
        require_ready(hparams)
        with writing(hparams["output_folder"]):
            sb.create_experiment_directory(hparams["output_folder"], hparams_file, overrides)
        fronts = source_fronts(hparams, open_reader(EncoderSettings.of(hparams), run_opts))
        model = train_dual_encoder(hparams["dual_encoder"], hparams["sources"], fronts, run_opts)
        print(model)
