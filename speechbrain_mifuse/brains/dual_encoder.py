"""Contrastive training of a dual encoder on captions of labelled corpora, never of the target.

Its control is a plain classifier of the same corpora, trained as long, as fast and on as much at a time.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.epoch_loop import EpochCounter
from speechbrain.utils.seed import seed_everything

from speechbrain_mifuse.adaptation.method import described
from speechbrain_mifuse.brains.classifier import ClassifierBrain, class_weights
from speechbrain_mifuse.brains.train_log import TrainLog
from speechbrain_mifuse.brains.training import ResumableBrain, WholeCheckpointer, fit, same_settings
from speechbrain_mifuse.evaluation.metrics import scores
from speechbrain_mifuse.features.dataset import encoded_rows, frame_batches, label_index
from speechbrain_mifuse.features.text_encoder import FrozenTextEncoder
from speechbrain_mifuse.nnet.classifier import EmotionClassifier
from speechbrain_mifuse.nnet.dual_encoder import contrastive_loss, frame_statistics
from speechbrain_mifuse.nnet.model_folder import ABOUT, load_all_weights
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.files import atomic_write, file_digest
from speechbrain_mifuse.utils.progress import progress
from speechbrain_mifuse.zero_shot.captions import CaptionSet, draw_caption, read_captions
from speechbrain_mifuse.zero_shot.own_dual_encoder import (
    DualEncoderModel,
    export_dual_encoder,
    refuse_other_frames,
)
from speechbrain_mifuse.zero_shot.prompts import PromptSet, read_prompts
from speechbrain_mifuse.zero_shot.scorer import class_vectors, zero_shot_predictions, zero_shot_scores

logger = logging.getLogger(__name__)

# What decides the trained weights, beside data, texts and network.
SHARED = ("seed", "target", "labels", "batch_size", "learning_rate", "weight_decay", "number_of_epochs")
DECISIVE = (*SHARED, "class_balanced", "positives", "layer")


@dataclass(frozen=True)
class Source:
    """A labelled corpus that a dual encoder is trained on."""

    prepare: Callable[[], None]
    manifests: str
    gender: Callable[[str], str | None] | None = None

    def manifest(self, split: str) -> Path:
        """Path of a split."""
        return Path(self.manifests) / f"{split}.json"

    def gender_of(self, row: Mapping) -> str | None:
        """Gender of an utterance's speaker."""
        return self.gender(row["speaker"]) if self.gender and row.get("speaker_known", True) else None


class Captioner:
    """The captions of a training set, embedded once, and which of them each utterance gets in an epoch."""

    def __init__(self, fitting: Mapping[str, Sequence[str]], encode: Callable, seed: int):
        self.texts = list(dict.fromkeys(text for texts in fitting.values() for text in texts))
        place = {text: number for number, text in enumerate(self.texts)}
        # Utterances of one label and gender share a list.
        places = {texts: [place[text] for text in texts] for texts in {tuple(some) for some in fitting.values()}}
        self.fitting = {key: places[tuple(texts)] for key, texts in fitting.items()}
        self.vectors, self.seed = encode(self.texts), seed

    def draw(self, keys: Sequence[str], epoch: int) -> torch.Tensor:
        """Draw a caption for each utterance."""
        fitting = [self.fitting[key] for key in keys]
        drawn = [some[draw_caption(len(some), self.seed, epoch, key)] for key, some in zip(keys, fitting, strict=True)]
        return torch.tensor(drawn)


# Which pairs of a batch are positives of each other: number of the group by place of the caption and class index.
POSITIVES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "caption": lambda captions, labels: captions,
    "label": lambda captions, labels: labels,
}


class DualEncoderBrain(ResumableBrain):
    """Contrastive training of `modules.dual_encoder`.

    Beyond `ResumableBrain`'s, `hparams` must hold `captioner`, `class_weight` (`[C]`) and `groups` (a value of
    `POSITIVES`). Batches give `id`, `pooled` (as `frame_statistics` gives) and `label`.
    """

    def compute_forward(self, batch, stage):
        """Vectors of both sides, scale, and the captions drawn."""
        batch = batch.to(self.device)
        captioner = self.hparams.captioner
        drawn = captioner.draw(batch.id, self.epoch)
        return *self.modules.dual_encoder(batch.pooled, captioner.vectors[drawn].to(self.device)), drawn

    def compute_objectives(self, predictions, batch, stage):
        """Contrastive loss."""
        audio, text, scale, drawn = predictions
        groups = self.hparams.groups(drawn.to(self.device), batch.label)
        self.count(scale=scale.detach())
        return contrastive_loss(audio, text, groups, scale, self.hparams.class_weight.to(self.device)[batch.label])

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """Keep the temperature within its bounds."""
        if should_step:
            self.modules.dual_encoder.clamp_scale()


def train_dual_encoder(hparams: Mapping, sources: Mapping[str, Source], fronts: Mapping, run_opts=None) -> Path:
    """Train a dual encoder, or find it trained, and export it; give its folder, for `load_dual_encoder`.

    The number of epochs is fixed and the last one counts; the held-out speakers of the sources only report. A finished
    training with the same settings is not repeated; an interrupted one resumes.
    """
    check_sources(hparams["target"], sources, fronts)
    folder = Path(hparams["output_folder"])
    prompts = read_prompts(hparams["prompts"])
    captions = read_captions(hparams["captions"], prompts)
    text_encoder = FrozenTextEncoder(hparams["text_encoder"])
    settings = dual_encoder_settings(hparams, sources, fronts, captions, text_encoder)
    if same_settings(folder / "settings.json", settings) and (folder / "model" / ABOUT).exists():
        logger.info("%s: dual encoder is trained already, training skipped.", folder)
        return folder / "model"
    seed_everything(hparams["seed"])
    data, fitting = training_set(hparams["labels"], sources, fronts, captions)
    brain = make_brain(hparams, data, Captioner(fitting, text_encoder, hparams["seed"]), run_opts)
    train = DynamicItemDataset(data, output_keys=["id", "pooled", "label"])
    fit(brain, train, "dual encoder", hparams["batch_size"])
    about = {**settings, **trained_on(hparams["labels"], data, sources, brain)}
    model = DualEncoderModel(brain.modules.dual_encoder.cpu(), about, text_encoder)
    finish(folder, model, about, prompts, sources, fronts)
    return folder / "model"


def finish(folder: Path, model: DualEncoderModel, about: Mapping, prompts, sources: Mapping, fronts: Mapping) -> None:
    """Score a trained dual encoder on the held-out speakers of its sources and export it."""
    validation = validate(model, prompts, sources, fronts)
    atomic_write(folder / "validation.json", json.dumps(validation, indent=1))
    export_dual_encoder(folder / "model", model.network, {**about, "validation": validation})


def check_sources(target: str, sources: Mapping[str, Source], fronts: Mapping) -> None:
    """Make sure that the target is no source and that all sources' frames are alike."""
    if not sources:
        raise UserError("sources: there is none. Name at least one corpus.")
    if target in sources:
        raise UserError(
            f"sources: '{target}' is the target, and zero-shot scores of a model that was trained on it are none. "
            "Name other corpora."
        )
    first = next(iter(sources))
    for name in sources:
        refuse_other_frames(f"sources: {name}, beside {first}", *(frames_of(fronts[key]) for key in (first, name)))


def frames_of(front) -> dict:
    """Fingerprint of the frames that a front gives, with their layer."""
    return {**front.fingerprint, "layer": front.layer}


def dual_encoder_settings(
    hparams: Mapping, sources: Mapping[str, Source], fronts: Mapping, captions: CaptionSet, text_encoder
) -> dict:
    """Everything that decides the trained weights."""
    manifests = {name: file_digest(source.manifest("train")) for name, source in sources.items()}
    genders = {name: described("gender", source.gender)["gender"] for name, source in sources.items()}
    texts = {"forms": captions.forms, "people": captions.people, "words": captions.words}
    text = {**text_encoder.fingerprint(), "source": text_encoder.source, "max_tokens": text_encoder.max_tokens}
    return {
        "manifests": manifests,
        "genders": genders,
        "encoder": hparams["encoder"],
        "features": frames_of(next(iter(fronts.values()))),
        "text_encoder": text,
        "captions": texts,
        "network": described("network", hparams["network"]),
        **{name: hparams[name] for name in DECISIVE},
    }


def training_set(
    labels: Sequence[str], sources: Mapping[str, Source], fronts: Mapping, captions: CaptionSet
) -> tuple[dict[str, dict], dict[str, tuple[str, ...]]]:
    """Pool the frames of every training utterance, and say which captions fit it."""
    data, fitting = {}, {}
    for name, source in sources.items():
        rows = encoded_rows(source.manifest("train"), fronts[name].store)
        texts = {}
        for key, row in progress(rows.items(), desc=f"pool {name}", unit="clip"):
            kind = (row.get("emo"), source.gender_of(row))
            label = label_index(labels, row, key)
            if kind not in texts:
                texts[kind] = tuple(captions.texts(*kind))
            fitting[key] = texts[kind]
            frames = fronts[name].read(key, row["wav"]).float().unsqueeze(0)
            data[key] = {"pooled": frame_statistics(frames)[0], "label": label, "source": name}
    return data, fitting


def make_brain(hparams: Mapping, data: Mapping[str, Mapping], captioner: Captioner, run_opts) -> DualEncoderBrain:
    """Wire a `DualEncoderBrain` with its network and checkpointer."""
    if hparams["positives"] not in POSITIVES:
        raise UserError(f"--positives: '{hparams['positives']}' is none of {', '.join(POSITIVES)}.")
    pooled = torch.stack([row["pooled"] for row in data.values()])
    labels = torch.tensor([row["label"] for row in data.values()])
    network = hparams["network"](audio_size=pooled.shape[1] // 2, text_size=captioner.vectors.shape[1])
    network.standardise_by(pooled)
    weight = class_weights(labels, len(hparams["labels"]))
    weight = weight if hparams["class_balanced"] else torch.ones_like(weight)
    groups = POSITIVES[hparams["positives"]]
    recoverables = {"dual_encoder": network, "counter": hparams["epoch_counter"]}
    return DualEncoderBrain(
        modules={"dual_encoder": network},
        opt_class=hparams["opt_class"],
        hparams={**hparams, "captioner": captioner, "class_weight": weight, "groups": groups},
        run_opts=run_opts,
        checkpointer=WholeCheckpointer(Path(hparams["output_folder"]) / "save", recoverables),
    )


def trained_on(labels: Sequence[str], data: Mapping[str, Mapping], sources: Mapping, brain) -> dict:
    """Say what a dual encoder was trained on and which classes it therefore knows."""
    counts = {name: Counter(labels[row["label"]] for row in data.values() if row["source"] == name) for name in sources}
    return {
        "classes_known": [label for label in labels if any(found[label] for found in counts.values())],
        "trained_on": {name: dict(sorted(found.items())) for name, found in counts.items()},
        "captions_seen": len(brain.hparams.captioner.texts),
        "steps": brain.optimizer_step,
        "scale": brain.modules.dual_encoder.scale.item(),
        "selection": "last epoch of a fixed number, nothing is selected",
    }


def validate(model: DualEncoderModel, prompts: PromptSet, sources: Mapping[str, Source], fronts: Mapping) -> dict:
    """Score held-out speakers of each source by prompts, as a target is scored: its classes alone, M = N = 1."""
    found = {}
    for name, source in sources.items():
        rows = encoded_rows(source.manifest("valid"), fronts[name].store)
        occurring = {row["emo"] for row in rows.values()}
        labels = [label for label in model.classes_known if label in occurring]
        rows = {key: row for key, row in rows.items() if row["emo"] in labels}
        classes = class_vectors(model, prompts, labels, text_repeats=1)
        predicted = zero_shot_predictions(zero_shot_scores(model, fronts[name].store, list(rows), classes))
        reference = torch.tensor([label_index(labels, row, key) for key, row in rows.items()])
        told = scores(predicted, reference, len(labels))
        found[name] = {**told, "n": len(reference), "labels": labels}
        told = (name, told["UA"], len(labels), len(reference))
        logger.info("%s, held-out speakers, prompts never trained on: UA %.3f (%d classes, n = %d)", *told)
    return found


def source_dataset(labels, sources: Mapping[str, Source], fronts: Mapping) -> DynamicItemDataset:
    """Give frames and class index of every training utterance of several corpora."""
    data = {
        key: {"wav": row["wav"], "label": label_index(labels, row, key), "source": name}
        for name, source in sources.items()
        for key, row in encoded_rows(source.manifest("train"), fronts[name].store).items()
    }
    dataset = DynamicItemDataset(data)
    dataset.add_dynamic_item(
        lambda utt_id, wav, source: fronts[source].read(utt_id, wav), takes=["id", "wav", "source"], provides="feats"
    )
    dataset.set_output_keys(["id", "feats", "label"])
    return dataset


def train_source_classifier(
    hparams: Mapping, sources: Mapping[str, Source], fronts: Mapping, folder: str | Path, run_opts=None
) -> ClassifierBrain:
    """Train a classifier on the corpora of a dual encoder, as long and as fast, or load it trained."""
    folder, front = Path(folder), next(iter(fronts.values()))
    digests = {name: file_digest(source.manifest("train")) for name, source in sources.items()}
    settings = {"manifests": digests, "features": frames_of(front), **{name: hparams[name] for name in SHARED}}
    weights = folder / "classifier.safetensors"
    trained = same_settings(folder / "settings.json", settings) and weights.exists()
    seed_everything(hparams["seed"])
    train = source_dataset(hparams["labels"], sources, fronts)
    classifier = EmotionClassifier(front.dim, len(hparams["labels"]))
    found = torch.tensor([row["label"] for row in train.data.values()])
    own = {
        "seed": hparams["seed"],
        "class_weight": class_weights(found, len(hparams["labels"])),
        "epoch_counter": EpochCounter(hparams["number_of_epochs"]),
        "log_interval": hparams["log_interval"],
        "train_logger": TrainLog(folder / "train_log.txt"),
    }
    brain = ClassifierBrain(
        modules={"front": front, "classifier": classifier},
        opt_class=hparams["opt_class"],
        hparams=own,
        run_opts=run_opts,
        checkpointer=WholeCheckpointer(folder / "save", {"classifier": classifier, "counter": own["epoch_counter"]}),
    )
    if trained:
        load_all_weights(classifier, weights, UserError, "Delete it: it is trained again.")
    else:
        fit(brain, train, "source classifier", hparams["batch_size"])
        trained = {name: value.contiguous() for name, value in classifier.state_dict().items()}
        atomic_write(weights, save(trained))
    return brain


def classifier_scores(brain: ClassifierBrain, front, manifest: str | Path) -> dict[str, torch.Tensor]:
    """Log-probabilities of the classifier's classes, which stand in the place of cosines."""
    rows = encoded_rows(manifest, front.store)
    dataset = DynamicItemDataset({key: {"wav": row["wav"]} for key, row in rows.items()})
    dataset.add_dynamic_item(front.read, takes=["id", "wav"], provides="feats")
    dataset.set_output_keys(["id", "feats"])
    probs = brain.predict(dataset, **frame_batches(batch_size=256))
    return {key: torch.tensor(values).clamp(min=1e-8).log() for key, values in probs.items()}
