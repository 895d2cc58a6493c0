#!/usr/bin/env python3
"""Recipe: source-free adaptation of an emotion classifier with an API teacher (MI-Fuse, arXiv 2509.20706).

Run from the repository's root, or from this folder:

    python recipes/RAVDESS/mifuse/train.py hparams/nemo2rav.yaml --data_folder /path/to/corpora

It prepares manifests, stores frozen encoder frames, trains the source classifier, asks the teacher about the unlabelled
target speech, adapts a student, and scores it on other speakers. Completed steps are skipped; an interrupted run
resumes.
"""

import functools
import math
import sys
from pathlib import Path

import speechbrain as sb
import torch
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.epoch_loop import EpochCounter
from speechbrain.utils.seed import seed_everything

from speechbrain_mifuse.brains.adaptation import LOG_POINTS, AdaptationBrain, MethodState
from speechbrain_mifuse.brains.full_dataset import FullDataset
from speechbrain_mifuse.brains.snapshots import Snapshots
from speechbrain_mifuse.brains.train_log import TrainLog
from speechbrain_mifuse.brains.training import AtomicCheckpointer, fit, require_one_process
from speechbrain_mifuse.corpora.manifest import unlabelled
from speechbrain_mifuse.experiments.adaptation import AdaptationExperiment, adaptation_settings, finish, finished
from speechbrain_mifuse.experiments.features import device_of, open_frame_source, open_reader
from speechbrain_mifuse.experiments.preflight import (
    require_adaptation,
    require_methods_fit,
    require_recordings,
    require_source,
)
from speechbrain_mifuse.experiments.run_report import report, summary
from speechbrain_mifuse.experiments.settings import parse_arguments, read_hparams
from speechbrain_mifuse.experiments.source import prepare_labelled, trained_recogniser
from speechbrain_mifuse.experiments.teacher import ask_teacher, report_answers
from speechbrain_mifuse.features.dataset import encoded_rows, label_index
from speechbrain_mifuse.inference.recognizer_folder import load_classifier
from speechbrain_mifuse.nnet.ema import ema_copy, ema_decay
from speechbrain_mifuse.utils.errors import one_clear_error, writing


def prepare_data(experiment):
    """Write the manifests of the target and of the corpora that classifiers are trained on; refuse what is too little.

    A source recognizer made elsewhere needs no source corpus, and an API no teacher corpus.
    """
    experiment.target.prepare()
    require_methods_fit(experiment)
    if experiment.source_recogniser is None:
        prepare_labelled(experiment.source)
    if experiment.trains_teacher:
        prepare_labelled(experiment.teacher_corpus)


def dataio_prepare(experiment, method, frame_source, answers):
    """Build the adaptation and the test set: frames and the teacher's stored answers, without any label.

    Only upper bounds, which say so by `uses_labels`, are given the reference labels of the adaptation set.
    """

    @sb.utils.data_pipeline.takes("id", "wav")
    @sb.utils.data_pipeline.provides("feats")
    def frames_pipeline(utt_id, wav):
        """Read the stored frames of one utterance."""
        return frame_source.read(utt_id, wav)

    datasets = {}
    for split in ("adapt", "test"):
        manifest = experiment.target.manifests / f"{split}.json"
        rows = encoded_rows(unlabelled(manifest), frame_source.store)
        data = {key: {"wav": row["wav"], **answers.of(key)} for key, row in rows.items()}
        keys = ["id", "feats", "lalm", "lalm_mask"]
        if method.uses_labels and split == "adapt":
            for key, row in encoded_rows(manifest, frame_source.store).items():
                data[key]["reference"] = torch.tensor(label_index(experiment.adaptation["labels"], row, key))
            keys.append("reference")
        datasets[split] = DynamicItemDataset(data, [frames_pipeline], keys)
    return datasets


def make_brain(settings, method, student, n_utterances, folder, run_opts=None):
    """Wire the Brain of one method: the student, its EMA (the classifier teacher), epochs, log and checkpoints."""
    steps_per_epoch = max(n_utterances // settings["batch_size"], 1)
    epoch_counter = EpochCounter(math.ceil(settings["number_of_steps"] / steps_per_epoch))
    number_of_steps = epoch_counter.limit * steps_per_epoch
    for part in method.frozen:
        student.get_submodule(part).requires_grad_(False)
    ema = ema_copy(student, ema_decay(settings["ema_window"], number_of_steps))
    folder.mkdir(parents=True, exist_ok=True)
    # What a method remembers of the adaptation set; "memory" is its name in checkpoints.
    method_state = MethodState(method, device_of(run_opts))
    # Forward pass, targets and loss: `brains/adaptation.py`; what a method is: `adaptation/`.
    brain = AdaptationBrain(
        modules={"student": student},
        opt_class=settings["opt_class"],
        hparams={
            "seed": settings["seed"],
            "method": method,
            "ema": ema,
            "passes": settings["passes"],
            "number_of_steps": number_of_steps,
            "epoch_counter": epoch_counter,
            "log_interval": math.ceil(epoch_counter.limit / LOG_POINTS),
            "train_logger": TrainLog(folder / "train_log.txt"),
        },
        run_opts=run_opts,
        checkpointer=AtomicCheckpointer(
            folder / "save", {"student": student, "ema": ema, "counter": epoch_counter, "memory": method_state}
        ),
    )
    ema.to(brain.device)
    return brain


def adapt(name, settings, datasets, frame_source, source, run_opts=None):
    """Train the student of one method, or find it trained, and predict the test set with it.

    `settings` is what `hparams/base/adaptation.yaml` defines, `source` the folder of the source classifier. The adapted
    classifier lies in `<output_folder>/<name>/recogniser` for `EmotionRecognizer.from_hparams`.
    """
    method, folder = settings["methods"][name], Path(settings["output_folder"]) / name
    snapshots = Snapshots(folder, settings["selection"])
    predictions = finished(folder, method, adaptation_settings(settings, method, frame_source, source, datasets))
    if predictions is not None:
        return predictions
    seed_everything(settings["seed"])
    student = load_classifier(source, settings["labels"], frame_source.fingerprint)
    brain = make_brain(settings, method, student, len(datasets["adapt"]), folder, run_opts)
    frames = {key: row.frames for key, row in frame_source.store.rows.items()}
    sets = {split: FullDataset(dataset, frames, settings["batch_size"]) for split, dataset in datasets.items()}
    brain.attach_datasets(sets["adapt"], sets["test"], snapshots)
    # Before a checkpoint is restored: the method looks at what the source classifier says.
    brain.begin()
    if method.trains:
        # No validation set: without labels nothing could be validated. The last step counts, or a label-free rule.
        fit(brain, datasets["adapt"], name, settings["batch_size"])
    return finish(name, brain, folder, source)


def run(experiment, run_opts=None):
    """Go through the recipe's steps for the chosen methods, one after the other."""
    prepare_data(experiment)
    reader = open_reader(experiment.encoder, run_opts)
    require_source(experiment, reader)
    # Encodes what is not stored yet, then reads stored frames by utterance id.
    frame_source = open_frame_source(experiment.target, experiment.layer, reader)
    require_recordings(experiment, frame_source.store)
    source = experiment.source_recogniser or trained_recogniser(experiment.source, reader, run_opts)
    train_teacher = functools.partial(trained_recogniser, experiment.teacher_corpus, reader, run_opts)
    methods, target = experiment.methods, experiment.target
    answers = ask_teacher(experiment.teacher, methods.values(), target, frame_source.store, train_teacher, run_opts)
    report_answers(answers, experiment.adaptation["temperature"])
    for name, method in methods.items():
        datasets = dataio_prepare(experiment, method, frame_source, answers)
        predictions = adapt(name, experiment.adaptation, datasets, frame_source, source, run_opts)
        # The target's labels, if there are any, are opened here and nowhere before.
        report(name, experiment, answers.teacher, predictions, n_train=len(datasets["adapt"]))


if __name__ == "__main__":
    with one_clear_error():
        hparams_file, run_opts, overrides = parse_arguments(sys.argv[1:])
        require_one_process()
        hparams = read_hparams(hparams_file, overrides)
        experiment = AdaptationExperiment.of(hparams)
        require_adaptation(experiment, run_opts)
        with writing(hparams["output_folder"]):
            sb.create_experiment_directory(hparams["output_folder"], hparams_file, overrides)
        run(experiment, run_opts)
        print(summary(experiment.output_folder, experiment.methods, experiment.adaptation["methods"]))
