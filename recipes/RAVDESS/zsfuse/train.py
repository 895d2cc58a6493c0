#!/usr/bin/env python3
"""Recipe: zero-shot scores of an audio-text model, fused late with a specialist (ZS-Fuse, arXiv 2603.23057).

Run from the repository's root, or from this folder:

    python recipes/RAVDESS/zsfuse/train.py hparams/zsfuse_ravdess.yaml --data_folder /path/to/corpora

It trains the dual encoder on other corpora (or loads the audio-text model that `--alm` names), scores every recording
at every number of repeats, and trains each arm on the labels of each fold. Completed steps are skipped; an interrupted
run resumes.
"""

import sys

import speechbrain as sb
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.seed import seed_everything

from speechbrain_mifuse.brains.finetuning import FusionBrain, finetuning_hparams
from speechbrain_mifuse.brains.training import AtomicCheckpointer, fit, require_one_process
from speechbrain_mifuse.experiments.adapter_variants import starting_adapter
from speechbrain_mifuse.experiments.comparison import Comparison, finish, finished, rows_of_fold
from speechbrain_mifuse.experiments.features import CorpusSettings, EncoderSettings, open_frame_source, open_reader
from speechbrain_mifuse.experiments.fusion_variants import (
    chosen_amplification,
    chosen_specialist,
    fusion_settings,
    prepared,
)
from speechbrain_mifuse.experiments.preflight import require_comparison, require_folds
from speechbrain_mifuse.experiments.settings import parse_arguments, read_hparams
from speechbrain_mifuse.experiments.zero_shot_steps import ScoringSettings, amplification_report, score_tables
from speechbrain_mifuse.features.dataset import frame_batches
from speechbrain_mifuse.utils.errors import one_clear_error, writing


def dataio_prepare(labels, run, frame_source, table):
    """Build the training set, with as many labels of each class as the run has, and the test set of a fold."""

    @sb.utils.data_pipeline.takes("id", "wav")
    @sb.utils.data_pipeline.provides("feats")
    def frames_pipeline(utt_id, wav):
        """Read the stored frames of one utterance."""
        return frame_source.read(utt_id, wav)

    @sb.utils.data_pipeline.takes("id")
    @sb.utils.data_pipeline.provides("scores")
    def scores_pipeline(utt_id):
        """Look up the scores of one utterance."""
        return table.of([utt_id])[0]

    items, keys = [frames_pipeline, scores_pipeline], ["id", "feats", "label", "scores"]
    return [DynamicItemDataset(data, items, keys) for data in rows_of_fold(run, labels, frame_source.store)]


def make_brain(settings, run, folder, frame_source, classifier, train, run_opts=None):
    """Wire the Brain of an arm: specialist and fusion, epochs, log and checkpoints."""
    brain_hparams = finetuning_hparams(settings, train, run.seed, folder)
    return FusionBrain(
        modules={"front": frame_source, "classifier": classifier},
        opt_class=settings["finetuning_opt_class"],
        hparams=brain_hparams,
        run_opts=run_opts,
        checkpointer=AtomicCheckpointer(
            folder / "save", {"classifier": classifier, "counter": brain_hparams["epoch_counter"]}
        ),
    )


def train_arm(name, settings, specialist, run, frame_source, tables, adapters, run_opts=None):
    """Train one arm on a fold's training set and score it on the test set, unless it is done; give its record.

    `settings` is what `hparams/base/zsfuse.yaml` defines; `tables` holds the scores of every utterance by their name,
    then by the repeats of audio and text; `adapters` the folder of the specialist's adapter, if one was pretrained.
    """
    arm, folder, labels = settings["arms"][name], run.arm_folder(name), settings["labels"]
    repeats = chosen_amplification(tables[arm.scores], run, labels)
    table = prepared(arm, tables[arm.scores][repeats], run)
    record = finished(folder, fusion_settings(arm, specialist, settings, run, frame_source, table, adapters))
    if record is not None:
        return record
    seed_everything(run.seed)
    adapter = starting_adapter(specialist, settings, run, frame_source, adapters)
    pooled = specialist.classifier(frame_source.dim, len(labels), adapter)
    classifier = arm.classifier(pooled, table.classes_among(labels), len(labels))
    train, test = dataio_prepare(labels, run, frame_source, table)
    brain = make_brain(settings, run, folder, frame_source, classifier, train, run_opts)
    fit(brain, train, run.progress_label(name), settings["finetuning_batch_size"])
    predictions = brain.predict(test, **frame_batches(batch_size=settings["finetuning_batch_size"]))
    about = {"audio_repeats": repeats[0], "text_repeats": repeats[1], "score_labels": list(table.labels)}
    return finish(name, brain, settings, run, predictions, len(train), **about)


if __name__ == "__main__":
    with one_clear_error():
        hparams_file, run_opts, overrides = parse_arguments(sys.argv[1:])
        require_one_process()
        hparams = read_hparams(hparams_file, overrides)
        settings, scoring = hparams["zsfuse"], ScoringSettings.of(hparams)
        about = {"scores_from": scoring.description, "specialist": hparams["specialist"]}
        comparison = Comparison.of(hparams, settings["arms"], **about)
        specialist, adapters = chosen_specialist(
            hparams["specialist"], settings["specialists"], hparams["adapter_folder"]
        )
        require_comparison(comparison, settings, hparams["adapter_folder"])
        with writing(hparams["output_folder"]):
            sb.create_experiment_directory(hparams["output_folder"], hparams_file, overrides)
        hparams["prepare"]()
        require_folds(hparams["manifests"], comparison.folds)
        scores = dict.fromkeys(["zero_shot", *(settings["arms"][name].scores for name in comparison.arms)])
        tables = {seed: score_tables(scoring, scores, seed, run_opts) for seed in comparison.seeds}
        reader = open_reader(EncoderSettings.of(hparams), run_opts)
        records = []
        for fold in comparison.folds:
            frame_source = open_frame_source(CorpusSettings.fold_of(hparams, fold), hparams["layer"], reader)
            if specialist.front is not None:
                frame_source = specialist.front(frame_source)
            for seed in comparison.seeds:
                for amount in comparison.amounts:
                    run = comparison.run(fold, seed, amount)
                    given = (settings, specialist, run, frame_source, tables[seed], adapters, run_opts)
                    records += [train_arm(name, *given) for name in comparison.arms]
        print(amplification_report(scoring, {seed: by_name["zero_shot"] for seed, by_name in tables.items()}))
        print(comparison.summary(records, "zsfuse"))
