#!/usr/bin/env python3
"""Recipe: source-free adaptation of an emotion classifier with an API teacher (MI-Fuse, arXiv 2509.20706).

Run from the repository's root, or from this folder:

    python recipes/RAVDESS/mifuse/train.py hparams/nemo2rav.yaml --data_folder /path/to/corpora

It prepares manifests, stores frozen encoder frames, trains the source classifier, asks the teacher about the unlabelled
target speech, adapts a student, and scores it on other speakers. What is done already is skipped; a killed run goes on.
"""

import sys

import speechbrain as sb
import torch
from speechbrain.dataio.dataset import DynamicItemDataset

from speechbrain_mifuse.brains.adaptation import adapt
from speechbrain_mifuse.brains.training import require_one_process
from speechbrain_mifuse.corpora.manifest import unlabelled
from speechbrain_mifuse.experiments.choices import chosen_methods
from speechbrain_mifuse.experiments.features import open_front, open_reader
from speechbrain_mifuse.experiments.preflight import require_data, require_ready, require_recordings_to_adapt_to
from speechbrain_mifuse.experiments.results import report, summary
from speechbrain_mifuse.experiments.settings import parse_arguments, read_hparams
from speechbrain_mifuse.experiments.source import source_recogniser
from speechbrain_mifuse.experiments.teacher import ask_teacher
from speechbrain_mifuse.features.dataset import encoded_rows, label_index
from speechbrain_mifuse.utils.errors import one_clear_error, writing


def dataio_prepare(hparams, method, front, answers):
    """Build the adaptation and the test set: frames and the teacher's stored answers, without any label.

    Only the upper bound, which says so by `uses_labels`, is given the reference labels of the adaptation set.
    """

    @sb.utils.data_pipeline.takes("id", "wav")
    @sb.utils.data_pipeline.provides("feats")
    def frames_pipeline(utt_id, wav):
        return front.read(utt_id, wav)

    datasets = {}
    for split in ("adapt", "test"):
        manifest = f"{hparams['target_manifests']}/{split}.json"
        rows = encoded_rows(unlabelled(manifest), front.store)
        data = {key: {"wav": row["wav"], **answers.of(key)} for key, row in rows.items()}
        keys = ["id", "feats", "lalm", "lalm_mask"]
        if method.uses_labels and split == "adapt":
            for key, row in encoded_rows(manifest, front.store).items():
                data[key]["reference"] = torch.tensor(label_index(hparams["labels"], row, key))
            keys.append("reference")
        datasets[split] = DynamicItemDataset(data, [frames_pipeline], keys)
    return datasets


if __name__ == "__main__":
    with one_clear_error():
        hparams_file, run_opts, overrides = parse_arguments(sys.argv[1:])
        require_one_process()
        hparams = read_hparams(hparams_file, overrides)
        names = chosen_methods(hparams)
        require_ready(hparams, names, run_opts)
        with writing(hparams["output_folder"]):
            sb.create_experiment_directory(hparams["output_folder"], hparams_file, overrides)
        hparams["prepare_target"]()
        reader = open_reader(hparams, run_opts)
        require_data(hparams, names, reader)
        front = open_front(hparams, "target", hparams["layer"], reader)
        require_recordings_to_adapt_to(hparams, names, front.store)
        source = source_recogniser(hparams, reader, run_opts)
        answers = ask_teacher(hparams, names, front.store, reader, run_opts)
        for name in names:
            datasets = dataio_prepare(hparams, hparams["adaptation"]["methods"][name], front, answers)
            predictions = adapt(name, hparams["adaptation"], datasets, front, source, run_opts)
            report(hparams, name, predictions, len(datasets["adapt"]), answers.teacher)
        print(summary(hparams, names))
