#!/usr/bin/env python3
"""Recipe: train a dual encoder of speech and text for a target corpus, on captions of other corpora (for ZS-Fuse).

Run from the repository's root, or from this folder:

    python recipes/RAVDESS/dual_encoder/train.py hparams/dual_encoder_ravdess.yaml --data_folder /path/to/corpora

The speech encoder and the text encoder stay frozen. No recording of the target takes part; `about.json` of the model,
in `<output_folder>/model`, names the corpora and the classes that it knows. Completed steps are skipped; an
interrupted run resumes. The ZS-Fuse recipe calls `train_dual_encoder` for each of its seeds.
"""

import sys
from pathlib import Path

import speechbrain as sb
import torch
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.seed import seed_everything

from speechbrain_mifuse.brains.classifier import class_weights
from speechbrain_mifuse.brains.dual_encoder import POSITIVES, Captioner, DualEncoderBrain
from speechbrain_mifuse.brains.training import AtomicCheckpointer, fit, require_one_process
from speechbrain_mifuse.experiments.dual_encoder import (
    check_sources,
    dual_encoder_settings,
    frame_sources_of,
    trained_on,
    validate,
)
from speechbrain_mifuse.experiments.features import EncoderSettings, open_reader
from speechbrain_mifuse.experiments.preflight import require_dual_encoder
from speechbrain_mifuse.experiments.same_settings import completed
from speechbrain_mifuse.experiments.settings import known_ones, parse_arguments, read_hparams
from speechbrain_mifuse.features.dataset import encoded_rows, label_index
from speechbrain_mifuse.features.text_encoder import FrozenTextEncoder
from speechbrain_mifuse.nnet.dual_encoder import frame_statistics
from speechbrain_mifuse.utils.errors import one_clear_error, writing
from speechbrain_mifuse.utils.model_folder import ABOUT
from speechbrain_mifuse.utils.progress import progress
from speechbrain_mifuse.zero_shot.captions import read_captions
from speechbrain_mifuse.zero_shot.own_dual_encoder import DualEncoderModel, export_dual_encoder
from speechbrain_mifuse.zero_shot.prompts import read_prompts


def dataio_prepare(settings, sources, frame_sources, captions):
    """Build the training set, of which frames are pooled once, and list the captions that fit each utterance."""
    data, fitting = {}, {}
    for name, source in sources.items():
        rows = encoded_rows(source.manifest("train"), frame_sources[name].store)
        texts = {}
        for key, row in progress(rows.items(), desc=f"pool {name}", unit="clip"):
            label = label_index(settings["labels"], row, key)
            kind = (row["emo"], source.gender_of(row))
            if kind not in texts:
                texts[kind] = tuple(captions.texts(*kind))
            fitting[key] = texts[kind]
            frames = frame_sources[name].read(key, row["wav"]).float().unsqueeze(0)
            data[key] = {"pooled": frame_statistics(frames)[0], "label": label, "source": name}
    return DynamicItemDataset(data, output_keys=["id", "pooled", "label"]), fitting


def make_brain(settings, train, captioner, run_opts=None):
    """Wire the Brain: the projections of both sides, optimizer, log and checkpoints."""
    (positives,) = known_ones(settings["positives"], POSITIVES, "--dual_encoder positives")
    pooled = torch.stack([row["pooled"] for row in train.data.values()])
    labels = torch.tensor([row["label"] for row in train.data.values()])
    network = settings["network"](audio_size=pooled.shape[1] // 2, text_size=captioner.vectors.shape[1])
    network.standardise_by(pooled)
    weight = class_weights(labels, len(settings["labels"]))
    return DualEncoderBrain(
        modules={"dual_encoder": network},
        opt_class=settings["opt_class"],
        hparams={
            "seed": settings["seed"],
            "captioner": captioner,
            "class_weight": weight if settings["class_balanced"] else torch.ones_like(weight),
            "groups": POSITIVES[positives],
            "epoch_counter": settings["epoch_counter"],
            "log_interval": settings["log_interval"],
            "train_logger": settings["train_logger"],
        },
        run_opts=run_opts,
        checkpointer=AtomicCheckpointer(
            Path(settings["output_folder"]) / "save", {"dual_encoder": network, "counter": settings["epoch_counter"]}
        ),
    )


def train_dual_encoder(settings, sources, frame_sources, run_opts=None):
    """Train a dual encoder, or find it trained, and give its folder, for `load_dual_encoder`.

    `settings` is what `hparams/base/dual_encoder.yaml` defines; `sources` are the corpora and `frame_sources` their
    frames. The number of epochs is fixed and the last one counts; held-out speakers of the sources only report.
    """
    check_sources(settings["target"], sources, frame_sources)
    folder = Path(settings["output_folder"])
    prompts = read_prompts(settings["prompts"])
    captions = read_captions(settings["captions"], prompts)
    text_encoder = FrozenTextEncoder(settings["text_encoder"])
    trained_with = dual_encoder_settings(settings, sources, frame_sources, captions, text_encoder)
    if completed(folder, trained_with, f"model/{ABOUT}", what="dual encoder is trained already, training skipped."):
        return folder / "model"
    seed_everything(settings["seed"])
    train, fitting = dataio_prepare(settings, sources, frame_sources, captions)
    captioner = Captioner(fitting, text_encoder, settings["seed"])
    brain = make_brain(settings, train, captioner, run_opts)
    fit(brain, train, "dual encoder", settings["batch_size"])
    about = {**trained_with, **trained_on(settings["labels"], train.data, sources, brain)}
    model = DualEncoderModel(brain.modules.dual_encoder.cpu(), about, text_encoder)
    validation = validate(model, prompts, sources, frame_sources, folder)
    export_dual_encoder(folder / "model", model.network, {**about, "validation": validation})
    return folder / "model"


if __name__ == "__main__":
    with one_clear_error():
        hparams_file, run_opts, overrides = parse_arguments(sys.argv[1:])
        require_one_process()
        hparams = read_hparams(hparams_file, overrides)
        require_dual_encoder(hparams["dual_encoder"], hparams["feature_folder"])
        with writing(hparams["output_folder"]):
            sb.create_experiment_directory(hparams["output_folder"], hparams_file, overrides)
        reader = open_reader(EncoderSettings.of(hparams), run_opts)
        frame_sources = frame_sources_of(hparams["sources"], reader, hparams["layer"], hparams["feature_folder"])
        print(train_dual_encoder(hparams["dual_encoder"], hparams["sources"], frame_sources, run_opts))
