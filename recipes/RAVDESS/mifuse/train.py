#!/usr/bin/env python3
"""Recipe: source-free adaptation of an emotion classifier with an API teacher (MI-Fuse, arXiv 2509.20706).

Run from the repository's root, or from this folder:

    python recipes/RAVDESS/mifuse/train.py hparams/nemo2rav.yaml --data_folder /path/to/corpora

It prepares manifests, stores frozen encoder frames, trains the source classifier, asks the teacher about the unlabelled
target speech, adapts a student, and scores it on other speakers. What is done already is skipped; a killed run goes on.
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

from speechbrain_mifuse.brains.adaptation import LOG_POINTS, AdaptationBrain, Memory
from speechbrain_mifuse.brains.snapshots import Snapshots
from speechbrain_mifuse.brains.train_log import TrainLog
from speechbrain_mifuse.brains.training import WholeCheckpointer, fit, require_one_process
from speechbrain_mifuse.brains.whole_set import WholeSet
from speechbrain_mifuse.corpora.manifest import unlabelled
from speechbrain_mifuse.experiments.adaptation import adaptation_settings, finish, finished
from speechbrain_mifuse.experiments.features import CorpusSettings, EncoderSettings, device_of, open_front, open_reader
from speechbrain_mifuse.experiments.preflight import require_data, require_ready, require_recordings
from speechbrain_mifuse.experiments.results import report, source_name, summary
from speechbrain_mifuse.experiments.settings import chosen_methods, parse_arguments, read_hparams
from speechbrain_mifuse.experiments.source import trained_recogniser
from speechbrain_mifuse.experiments.teacher import TeacherSettings, ask_teacher, report_answers
from speechbrain_mifuse.features.dataset import encoded_rows, label_index
from speechbrain_mifuse.inference.recognizer_folder import load_classifier
from speechbrain_mifuse.nnet.ema import ema_copy, ema_decay
from speechbrain_mifuse.utils.errors import one_clear_error, writing


def dataio_prepare(hparams, method, front, answers):
    """Build the adaptation and the test set: frames and the teacher's stored answers, without any label.

    Only upper bounds, which say so by `uses_labels`, are given the reference labels of the adaptation set.
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


def make_brain(settings, method, student, n_utterances, folder, run_opts=None):
    """Wire the Brain of one method: the student, its EMA (the classifier teacher), epochs, log and checkpoints."""
    steps_per_epoch = max(n_utterances // settings["batch_size"], 1)
    epoch_counter = EpochCounter(math.ceil(settings["number_of_steps"] / steps_per_epoch))
    number_of_steps = epoch_counter.limit * steps_per_epoch
    for part in method.frozen:
        student.get_submodule(part).requires_grad_(False)
    ema = ema_copy(student, ema_decay(settings["ema_window"], number_of_steps))
    folder.mkdir(parents=True, exist_ok=True)
    memory = Memory(method, device_of(run_opts))
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
        checkpointer=WholeCheckpointer(
            folder / "save", {"student": student, "ema": ema, "counter": epoch_counter, "memory": memory}
        ),
    )
    ema.to(brain.device)
    return brain


def adapt(name, settings, datasets, front, source, run_opts=None):
    """Train the student of one method, or find it trained, and predict the test set with it.

    `settings` is what `hparams/base/adaptation.yaml` defines, `source` the folder of the source classifier. The adapted
    classifier lies in `<output_folder>/<name>/recogniser` for `EmotionRecognizer.from_hparams`.
    """
    method, folder = settings["methods"][name], Path(settings["output_folder"]) / name
    snapshots = Snapshots(folder, settings["selection"])
    predictions = finished(folder, method, adaptation_settings(settings, method, front, source, datasets))
    if predictions is not None:
        return predictions
    seed_everything(settings["seed"])
    student = load_classifier(source, settings["labels"], front.fingerprint)
    brain = make_brain(settings, method, student, len(datasets["adapt"]), folder, run_opts)
    frames = {key: row.frames for key, row in front.store.rows.items()}
    sets = {split: WholeSet(dataset, frames, settings["batch_size"]) for split, dataset in datasets.items()}
    brain.look_at(sets["adapt"], sets["test"], snapshots)
    # Before a checkpoint is restored: the method looks at what the source classifier says.
    brain.begin()
    if method.trains:
        # No validation set: without labels nothing could be validated. The last step counts, or a label-free rule.
        fit(brain, datasets["adapt"], name, settings["batch_size"])
    return finish(name, brain, folder, source)


def run(hparams, names, run_opts=None, teacher_recogniser=None):
    """Go through the recipe's steps for some methods, one after the other."""
    target, teacher = CorpusSettings.target_of(hparams), TeacherSettings.of(hparams, teacher_recogniser)
    methods = {name: hparams["adaptation"]["methods"][name] for name in names}
    target.prepare()
    reader = open_reader(EncoderSettings.of(hparams), run_opts)
    require_data(hparams, names, reader, teacher)
    # Reads stored frames by utterance id, and says by its fingerprint what they are.
    front = open_front(target, hparams["layer"], reader)
    require_recordings(target, methods, hparams["output_folder"], front.store)
    source = hparams["source_recogniser"] or trained_recogniser(CorpusSettings.source_of(hparams), reader, run_opts)
    train_teacher = functools.partial(trained_recogniser, CorpusSettings.teacher_of(hparams), reader, run_opts)
    answers = ask_teacher(teacher, methods.values(), target, front.store, train_teacher, run_opts)
    report_answers(answers, hparams["adaptation"]["temperature"])
    for name, method in methods.items():
        datasets = dataio_prepare(hparams, method, front, answers)
        predictions = adapt(name, hparams["adaptation"], datasets, front, source, run_opts)
        # The target's labels, if there are any, are opened here and nowhere before.
        told = {"teacher": teacher.told(), "teacher_model": answers.teacher, "encoder": hparams["encoder"]}
        told["source"] = source_name(hparams["source"], hparams["source_recogniser"])
        report(name, hparams["adaptation"], target, predictions, len(datasets["adapt"]), **told)


if __name__ == "__main__":
    with one_clear_error():
        hparams_file, run_opts, overrides = parse_arguments(sys.argv[1:])
        require_one_process()
        hparams = read_hparams(hparams_file, overrides)
        names = chosen_methods(hparams)
        require_ready(hparams, names, run_opts)
        with writing(hparams["output_folder"]):
            sb.create_experiment_directory(hparams["output_folder"], hparams_file, overrides)
        run(hparams, names, run_opts)
        print(summary(hparams["output_folder"], names, list(hparams["adaptation"]["methods"])))
