#!/usr/bin/env python3
"""Recipe: train an emotion classifier with labels and export it as a recognizer.

Run from the repository's root, or from this folder:

    python recipes/RAVDESS/classifier/train.py hparams/classifier_ravdess.yaml --data_folder /path/to/corpora

The recognizer in `<output_folder>/classifier/recogniser` is what `speechbrain-mifuse predict` and `serve` load, and
what `--source_recogniser` of the adaptation recipes takes. Those recipes call `train_classifier` for a source or a
teacher of their own.
"""

import sys
from pathlib import Path

import speechbrain as sb
import torch
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.distributed import if_main_process, run_on_main
from speechbrain.utils.seed import seed_everything

from speechbrain_mifuse.brains.classifier import ClassifierBrain, class_weights
from speechbrain_mifuse.brains.training import (
    AtomicCheckpointer,
    fit,
    join_processes,
    require_one_process,
    require_trainable,
)
from speechbrain_mifuse.experiments.features import (
    CorpusSettings,
    EncoderSettings,
    finetuned_frame_source,
    open_frame_source,
    open_reader,
)
from speechbrain_mifuse.experiments.preflight import require_classifier
from speechbrain_mifuse.experiments.same_settings import completed
from speechbrain_mifuse.experiments.settings import known_ones, parse_arguments, read_hparams
from speechbrain_mifuse.experiments.source import (
    classifier_settings,
    export_classifier,
    prepare_labelled,
    validate,
)
from speechbrain_mifuse.features.dataset import encoded_rows, label_index
from speechbrain_mifuse.nnet.adapter_files import load_adapter
from speechbrain_mifuse.utils.errors import one_clear_error, writing


def dataio_prepare(settings, frame_source):
    """Build the training and the validation set: frames (or waveforms to be encoded) and class indices."""

    @sb.utils.data_pipeline.takes("id", "wav")
    @sb.utils.data_pipeline.provides("feats")
    def frames_pipeline(utt_id, wav):
        """Give the frames of one utterance, or its waveform where the encoder is trained too."""
        return frame_source.read(utt_id, wav)

    datasets = {}
    for split, manifest in (("train", settings["train_manifest"]), ("valid", settings["valid_manifest"])):
        rows = encoded_rows(manifest, frame_source.store)
        data = {key: {**row, "label": label_index(settings["labels"], row, key)} for key, row in rows.items()}
        datasets[split] = DynamicItemDataset(data, [frames_pipeline], ["id", "feats", "label"])
    return datasets


def make_classifier(settings, frame_source):
    """Build the classifier with random weights; its adapter, if one is named, is a pretrained one."""
    sizes = {"input_size": frame_source.dim, "n_classes": len(settings["labels"]), "n_layers": frame_source.n_layers}
    if settings["adapter"] is None:
        return settings["classifier"](**sizes)
    fingerprint = {} if frame_source.store is None else frame_source.fingerprint
    adapter = load_adapter(settings["adapter"], {**fingerprint, "layer": settings["layer"]})
    classifier = settings["classifier"](**sizes, adapter=adapter.sizes)
    classifier.adapter.load_state_dict(adapter.state_dict())
    return classifier


def make_brain(settings, frame_source, classifier, train, run_opts=None):
    """Wire the Brain: the classifier (and the encoder, if it is trained too), optimizer, log and checkpoints."""
    labels = torch.tensor([row["label"] for row in train.data.values()])
    weight = class_weights(labels, len(settings["labels"])) if settings["class_balanced"] else None
    recoverables = {"classifier": classifier, "counter": settings["epoch_counter"]}
    if list(frame_source.parameters()):  # stored frames have none, and SpeechBrain warns of empty files
        recoverables["front"] = frame_source
    return ClassifierBrain(
        modules={"front": frame_source, "classifier": classifier},
        opt_class=settings["opt_class"],
        hparams={
            "seed": settings["seed"],
            "class_weight": weight,
            "epoch_counter": settings["epoch_counter"],
            "log_interval": settings["log_interval"],
            "train_logger": settings["train_logger"],
        },
        run_opts=run_opts,
        checkpointer=AtomicCheckpointer(Path(settings["output_folder"]) / "save", recoverables),
    )


def evaluate_and_export(brain, frame_source, datasets, settings, trained_with):
    """Score held-out speakers and write the recognizer."""
    validation = validate(brain, datasets["valid"], settings)
    export_classifier(brain, frame_source, datasets["train"], settings, trained_with, validation)


def train_classifier(settings, frame_source, run_opts=None):
    """Train a classifier, or find it trained, and give the folder of its recognizer.

    `settings` is what `hparams/base/classifier.yaml` defines; `frame_source` gives frames. The number of epochs is
    fixed and the last one counts. An interrupted training resumes.
    """
    folder, trained_with = Path(settings["output_folder"]), classifier_settings(settings, frame_source)
    if completed(
        folder, trained_with, "recogniser/about.json", what="classifier is trained already, training skipped."
    ):
        return folder / "recogniser"
    seed_everything(settings["seed"])
    datasets = dataio_prepare(settings, frame_source)
    emotions = [row["emo"] for row in datasets["train"].data.values()]
    require_trainable(emotions, f"{settings['name']} ({settings['train_manifest']})", settings["labels"])
    classifier = make_classifier(settings, frame_source)
    brain = make_brain(settings, frame_source, classifier, datasets["train"], run_opts)
    fit(brain, datasets["train"], f"classifier {settings['name']}", settings["batch_size"])
    run_on_main(evaluate_and_export, args=[brain, frame_source, datasets, settings, trained_with])
    return folder / "recogniser"


def make_frame_source(hparams, corpus, run_opts):
    """Say what the classifier reads: stored frames of a frozen encoder, or an encoder that is trained with it."""
    known_ones(hparams["features"], ("stored", "finetune"), "--features")
    if hparams["features"] == "finetune":
        return finetuned_frame_source(hparams["encoder"], hparams["trim_db"], corpus.norm)
    return open_frame_source(corpus, hparams["layer"], open_reader(EncoderSettings.of(hparams), run_opts))


if __name__ == "__main__":
    with one_clear_error():
        hparams_file, run_opts, overrides = parse_arguments(sys.argv[1:])
        hparams = read_hparams(hparams_file, overrides)
        if hparams["features"] == "finetune":
            join_processes(run_opts)
        else:
            require_one_process()
        corpus = CorpusSettings.source_of(hparams)
        require_classifier(corpus, hparams["output_folder"])
        with writing(hparams["output_folder"]):
            sb.create_experiment_directory(hparams["output_folder"], hparams_file, overrides)
        prepare_labelled(corpus)
        frame_source = make_frame_source(hparams, corpus, run_opts)
        recogniser = train_classifier(hparams["source_classifier"], frame_source, run_opts)
        if if_main_process():
            print(recogniser)
