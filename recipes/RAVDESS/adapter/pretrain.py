#!/usr/bin/env python3
"""Recipe: pretrain adapters without labels on the frames of a frozen encoder (arXiv 2509.23795).

Run from the repository's root, or from this folder:

    python recipes/RAVDESS/adapter/pretrain.py hparams/adapter_ravdess.yaml --data_folder /path/to/corpora --fold 1

It trains one adapter for each fold and seed that the flags name, on the audio of the other folds. `train.py` trains
those that it needs by the same functions. Completed steps are skipped; an interrupted run resumes.
"""

import functools
import math
import sys
from dataclasses import replace

import speechbrain as sb
import torch
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.nnet.schedulers import WarmCoolDecayLRSchedule
from speechbrain.utils.epoch_loop import EpochCounter
from speechbrain.utils.seed import seed_everything

from speechbrain_mifuse.brains.adapter import AdapterBrain, History, LengthBatches
from speechbrain_mifuse.brains.train_log import TrainLog
from speechbrain_mifuse.brains.training import AtomicCheckpointer, fit, require_one_process
from speechbrain_mifuse.corpora.manifest import unlabelled
from speechbrain_mifuse.experiments.adapter_variants import (
    finish_pretraining,
    pretraining_audio,
    pretraining_settings,
    pretraining_splits,
    stored_prosody,
    survey_utterances,
)
from speechbrain_mifuse.experiments.comparison import Comparison
from speechbrain_mifuse.experiments.features import CorpusSettings, EncoderSettings, open_frame_source, open_reader
from speechbrain_mifuse.experiments.preflight import require_comparison
from speechbrain_mifuse.experiments.same_settings import completed
from speechbrain_mifuse.experiments.settings import chosen_among, parse_arguments, read_hparams
from speechbrain_mifuse.features.dataset import encoded_rows, frame_batches
from speechbrain_mifuse.nnet.adapter_objectives import AdapterPretraining
from speechbrain_mifuse.nnet.ema import ema_copy, linear_decay
from speechbrain_mifuse.utils.errors import UserError, one_clear_error, writing
from speechbrain_mifuse.utils.model_folder import ABOUT

# Maximum number of checkpoints of a run: each holds the weights, the teacher and the optimizer.
MAX_CHECKPOINTS = 10


def dataio_prepare(manifests, frame_source, targets, layers):
    """Build the training set: frames of the adapter's input and of `layers`, target vectors, and no label."""

    @sb.utils.data_pipeline.takes("id", "wav")
    @sb.utils.data_pipeline.provides("feats")
    def frames_pipeline(utt_id, wav):
        """Read the frames of one utterance, and those of the layers that objectives want."""
        frames = frame_source.read(utt_id, wav)
        others = [torch.from_numpy(frame_source.store.frames(utt_id, layer)) for layer in layers]
        return torch.stack([frames, *others], dim=1) if others else frames

    rows = {key: row for path in manifests for key, row in encoded_rows(path, frame_source.store).items()}
    labelled = next((key for key, row in rows.items() if "emo" in row), None)
    if labelled is not None:
        raise UserError(
            f"'{labelled}' comes with a label. Adapter training takes the manifests named *_unlabelled.json."
        )
    data = {key: {"wav": row["wav"], **{name: of[key] for name, of in targets.items()}} for key, row in rows.items()}
    return DynamicItemDataset(data, [frames_pipeline], ["id", "feats", *targets])


def make_student(name, settings, manifests, frame_source, prosody):
    """Build the adapter with its objectives; give the target vectors that some of them derive from the corpus."""
    survey, mean, deviation = survey_utterances(manifests, frame_source, prosody)
    objectives = {key: make() for key, make in settings["pretrainings"][name].items()}
    prepared = {key: objective.prepare(survey) for key, objective in objectives.items()}
    adapter = settings["network"](input_size=frame_source.dim)
    adapter.standardise_by(mean, deviation)
    adapter.set_dropout(settings["pretraining_dropout"])
    for objective in objectives.values():
        objective.build(frame_source.dim, adapter.output_size)
    return AdapterPretraining(adapter, objectives), {key: of for key, of in prepared.items() if of is not None}


def make_brain(settings, student, targets, lengths, folder, seed, run_opts=None):
    """Wire the Brain: the student, its EMA (the teacher), batches of similar length, epochs, log and checkpoints."""
    batches = LengthBatches(lengths, settings["frames_per_batch"], seed)
    epoch_counter = EpochCounter(math.ceil(settings["number_of_steps"] / len(batches)))
    steps = epoch_counter.limit * len(batches)
    warmup = max(1, round(settings["warmup"] * steps))
    ema = ema_copy(student.adapter, linear_decay(settings["ema_start"], settings["ema_end"], steps))
    history = History()
    folder.mkdir(parents=True, exist_ok=True)
    brain = AdapterBrain(
        modules={"student": student},
        opt_class=settings["opt_class"],
        hparams={
            "seed": seed,
            "ema": ema,
            "batches": batches,
            "vectors": sorted(targets),
            "schedule": WarmCoolDecayLRSchedule(settings["learning_rate"], warmup, steps - warmup, steps),
            "mask_share": settings["mask_share"],
            "mask_width": settings["mask_width"],
            "epoch_counter": epoch_counter,
            "log_interval": math.ceil(epoch_counter.limit / MAX_CHECKPOINTS),
            "history": history,
            "train_logger": TrainLog(folder / "train_log.txt"),
        },
        run_opts=run_opts,
        checkpointer=AtomicCheckpointer(
            folder / "save", {"student": student, "ema": ema, "counter": epoch_counter, "history": history}
        ),
    )
    ema.to(brain.device)
    return brain


def pretrain(name, settings, manifests, frame_source, folder, seed, prosody, run_opts=None):
    """Pretrain the adapter that `settings["pretrainings"]` defines under `name`, unless it is; give its folder.

    `settings` is what `hparams/base/adapter.yaml` defines; `prosody` gives prosodic functionals by utterance id, should
    an objective want them.
    """
    if name not in settings["pretrainings"]:
        raise UserError(f"pretraining '{name}' is none of {', '.join(settings['pretrainings'])}.")
    decisive = pretraining_settings(name, settings, manifests, frame_source, seed)
    if completed(folder, decisive, f"adapter/{ABOUT}", what="adapter is pretrained already, skipped."):
        return folder / "adapter"
    seed_everything(seed)
    student, targets = make_student(name, settings, manifests, frame_source, prosody)
    layers = sorted({layer for objective in student.objectives.values() for layer in objective.layers})
    train = dataio_prepare(manifests, frame_source, targets, layers)
    lengths = [frame_source.store.rows[key].frames for key in train.data_ids]
    brain = make_brain(settings, student, targets, lengths, folder, seed, run_opts)
    batches = frame_batches(batch_sampler=brain.hparams.batches)
    loader = brain.make_dataloader(train, sb.Stage.TEST, ckpt_prefix=None, **batches)
    fit(brain, loader, f"pretrain {name}")
    return finish_pretraining(brain, folder, {**decisive, "utterances": len(train)})


def pretrain_on_fold(name, hparams, run, frame_source, run_opts=None):
    """Pretrain an adapter on the audio of the training folds, and of the test fold if `pretrain_on` says so."""
    splits = pretraining_splits(hparams["pretrain_on"])
    manifests = [unlabelled(run.manifests / f"{split}.json") for split in splits]
    of_corpus = (hparams["source"], manifests, hparams["trim_db"], hparams["feature_folder"])
    prosody = functools.partial(stored_prosody, *of_corpus)
    folder = run.folder / f"pretraining_{name}"
    return pretrain(name, hparams["adapter"], manifests, frame_source, folder, run.seed, prosody, run_opts)


if __name__ == "__main__":
    with one_clear_error():
        hparams_file, run_opts, overrides = parse_arguments(sys.argv[1:])
        require_one_process()
        hparams = read_hparams(hparams_file, overrides)
        audio = pretraining_audio(hparams["pretrain_on"])
        comparison = Comparison.of(hparams, hparams["adapter"]["arms"], pretraining_audio=audio)
        names = chosen_among(hparams["pretraining"], hparams["adapter"]["pretrainings"], "--pretraining")
        require_comparison(replace(comparison, arms=()), hparams["adapter"])
        with writing(hparams["output_folder"]):
            sb.create_experiment_directory(hparams["output_folder"], hparams_file, overrides)
        hparams["prepare"]()
        reader = open_reader(EncoderSettings.of(hparams), run_opts)
        for fold in comparison.folds:
            frame_source = open_frame_source(CorpusSettings.fold_of(hparams, fold), hparams["layer"], reader)
            for seed in comparison.seeds:
                for name in names:
                    print(pretrain_on_fold(name, hparams, comparison.run(fold, seed), frame_source, run_opts))
