#!/usr/bin/env python3
"""Recipe: what adapter training is worth (arXiv 2509.23795): arms x folds x seeds, and the table they end in.

Run from the repository's root, or from this folder:

    python recipes/RAVDESS/adapter/train.py hparams/adapter_ravdess.yaml --data_folder /path/to/corpora

For each fold and seed it pretrains the adapters that the arms need, without labels and without the test fold
(`pretrain.py`), trains each arm with labels on the other folds, and scores it on the test fold. Completed steps are
skipped; an interrupted run resumes.
"""

import sys

import speechbrain as sb
from pretrain import pretrain_on_fold
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.seed import seed_everything

from speechbrain_mifuse.brains.finetuning import FinetuningBrain, finetuning_hparams
from speechbrain_mifuse.brains.training import AtomicCheckpointer, fit, require_one_process
from speechbrain_mifuse.experiments.adapter_variants import (
    arm_settings,
    pretraining_audio,
    show_attention,
    starting_adapter,
)
from speechbrain_mifuse.experiments.comparison import Comparison, finish, finished, rows_of_fold
from speechbrain_mifuse.experiments.features import CorpusSettings, EncoderSettings, open_frame_source, open_reader
from speechbrain_mifuse.experiments.preflight import require_comparison, require_folds
from speechbrain_mifuse.experiments.settings import parse_arguments, read_hparams
from speechbrain_mifuse.features.dataset import frame_batches
from speechbrain_mifuse.utils.errors import one_clear_error, writing


def dataio_prepare(labels, run, frame_source):
    """Build the training set, with as many labels of each class as the run has, and the test set of a fold."""

    @sb.utils.data_pipeline.takes("id", "wav")
    @sb.utils.data_pipeline.provides("feats")
    def frames_pipeline(utt_id, wav):
        """Read the stored frames of one utterance."""
        return frame_source.read(utt_id, wav)

    keys = ["id", "feats", "label"]
    return [DynamicItemDataset(data, [frames_pipeline], keys) for data in rows_of_fold(run, labels, frame_source.store)]


def make_brain(settings, run, folder, frame_source, classifier, train, run_opts=None):
    """Wire the Brain of an arm: adapter and classifier with a learning rate each, epochs, log and checkpoints."""
    brain_hparams = finetuning_hparams(settings, train, run.seed, folder)
    return FinetuningBrain(
        modules={"front": frame_source, "classifier": classifier},
        opt_class=settings["finetuning_opt_class"],
        hparams=brain_hparams,
        run_opts=run_opts,
        checkpointer=AtomicCheckpointer(
            folder / "save", {"classifier": classifier, "counter": brain_hparams["epoch_counter"]}
        ),
    )


def train_arm(name, settings, run, frame_source, adapters, run_opts=None):
    """Train one arm on a fold's training set and score it on the test set, unless it is done; give its record.

    `settings` is what `hparams/base/adapter.yaml` defines, `adapters` the folder of each pretrained adapter.
    """
    arm, folder = settings["arms"][name], run.arm_folder(name)
    if arm.learning_rate is not None:
        settings = {**settings, "adapter_learning_rate": arm.learning_rate}
    record = finished(folder, arm_settings(arm, settings, run, frame_source, adapters))
    if record is not None:
        return record
    seed_everything(run.seed)
    adapter = starting_adapter(arm, settings, run, frame_source, adapters)
    classifier = arm.classifier(frame_source.dim, len(settings["labels"]), adapter)
    train, test = dataio_prepare(settings["labels"], run, frame_source)
    brain = make_brain(settings, run, folder, frame_source, classifier, train, run_opts)
    fit(brain, train, run.progress_label(name), settings["finetuning_batch_size"])
    predictions = brain.predict(test, **frame_batches(batch_size=settings["finetuning_batch_size"]))
    show_attention(name, classifier.eval(), frame_source, run)
    about = {"pretraining": arm.pretraining, "adapter_learning_rate": settings["adapter_learning_rate"]}
    return finish(name, brain, settings, run, predictions, len(train), **about)


if __name__ == "__main__":
    with one_clear_error():
        hparams_file, run_opts, overrides = parse_arguments(sys.argv[1:])
        require_one_process()
        hparams = read_hparams(hparams_file, overrides)
        arms = hparams["adapter"]["arms"]
        comparison = Comparison.of(hparams, arms, pretraining_audio=pretraining_audio(hparams["pretrain_on"]))
        require_comparison(comparison, hparams["adapter"])
        with writing(hparams["output_folder"]):
            sb.create_experiment_directory(hparams["output_folder"], hparams_file, overrides)
        hparams["prepare"]()
        require_folds(hparams["manifests"], comparison.folds)
        reader = open_reader(EncoderSettings.of(hparams), run_opts)
        needed = dict.fromkeys(arms[name].pretraining for name in comparison.arms if arms[name].pretraining)
        records = []
        for fold in comparison.folds:
            frame_source = open_frame_source(CorpusSettings.fold_of(hparams, fold), hparams["layer"], reader)
            for seed in comparison.seeds:
                run = comparison.run(fold, seed)
                adapters = {name: pretrain_on_fold(name, hparams, run, frame_source, run_opts) for name in needed}
                for amount in comparison.amounts:
                    run = comparison.run(fold, seed, amount)
                    given = (hparams["adapter"], run, frame_source, adapters, run_opts)
                    records += [train_arm(name, *given) for name in comparison.arms]
        print(comparison.summary(records, "adapter"))
