"""The steps of a recipe that scores recordings against texts; each does what is missing and skips what is done."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from speechbrain.utils.distributed import run_on_main

from speechbrain_mifuse.brains.dual_encoder import Source
from speechbrain_mifuse.corpora.folds import fold_folder
from speechbrain_mifuse.corpora.manifest import read_manifest, unlabelled
from speechbrain_mifuse.evaluation.aggregate import bootstrap, signed, unweighted_accuracy
from speechbrain_mifuse.evaluation.results import counts_by_speaker
from speechbrain_mifuse.experiments.choices import known_ones
from speechbrain_mifuse.experiments.dual_encoder import classifier_scores, source_fronts, train_source_classifier
from speechbrain_mifuse.experiments.features import (
    CorpusSettings,
    EncoderSettings,
    device_of,
    open_reader,
    store_frames,
)
from speechbrain_mifuse.experiments.folds import adapter_run, fold_front
from speechbrain_mifuse.experiments.fusion_variants import Amplification, ScoreTable, Specialist
from speechbrain_mifuse.experiments.recipes import load_recipe
from speechbrain_mifuse.experiments.settings import overrides_of, read_hparams
from speechbrain_mifuse.experiments.variants import Run
from speechbrain_mifuse.features.extract import FrameReader
from speechbrain_mifuse.features.front import StoredFrames
from speechbrain_mifuse.report.figures import plot_grid
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.files import atomic_write
from speechbrain_mifuse.utils.texts import markdown
from speechbrain_mifuse.zero_shot.audio_text import AudioTextModel, refuse_known_corpus
from speechbrain_mifuse.zero_shot.own_dual_encoder import load_dual_encoder, open_alm
from speechbrain_mifuse.zero_shot.prompts import PromptSet, read_prompts
from speechbrain_mifuse.zero_shot.scorer import amplification_grid, audit_texts, normalise_scores
from speechbrain_mifuse.zero_shot.window import audit_table, audit_windows, summarise_windows

# The value of --alm that trains our own dual encoder on other corpora than the target.
OWN = "dual_encoder"
# What each number of repeats makes the model hear.
HEARD = "heard.md"
ALM = ("alm", "alm_window", "alm_trust_remote_code")


class Trained:
    """What is trained on the dual encoder's corpora with one seed: the dual encoder, and the plain classifier."""

    def __init__(self, hparams: Mapping, seed: int, run_opts: Mapping | None = None):
        folder = Path(hparams["output_folder"]) / f"dual_encoder_{seed}"
        flags = {key: hparams[key] for key in ("data_folder", "feature_folder") if hparams[key] is not None}
        # The splits do not depend on the seed.
        flags["manifests"] = Path(hparams["output_folder"]) / "dual_encoder_manifests"
        # Its captions must not be the prompts that it is scored with.
        flags |= {
            "prompts": hparams["prompts"],
            "seed": seed,
            "output_folder": folder,
            **dict(hparams["dual_encoder_flags"]),
        }
        self.hparams = read_hparams(hparams["dual_encoder_recipe"], overrides_of(flags))
        refuse_known_corpus(self.hparams["sources"], hparams["source"], "--dual_encoder_recipe")
        self.folder, self.run_opts = folder, run_opts
        self.reader = open_reader(EncoderSettings.of(self.hparams), run_opts)
        self.sources: Mapping[str, Source] = self.hparams["sources"]
        given = (self.hparams["layer"], self.hparams["feature_folder"])
        self.fronts = source_fronts(self.sources, self.reader, *given)

    def dual_encoder(self) -> AudioTextModel:
        """Train or find the dual encoder."""
        recipe = load_recipe("recipes/RAVDESS/dual_encoder/train.py")
        folder = recipe.train_dual_encoder(self.hparams["dual_encoder"], self.sources, self.fronts, self.run_opts)
        return load_dual_encoder(folder).to(device_of(self.run_opts))

    def classifier_table(self, hparams: Mapping) -> ScoreTable:
        """Log-probabilities of the plain classifier for every utterance of the target."""
        given = (self.hparams["dual_encoder"], self.sources, self.fronts, self.folder / "source_classifier")
        brain = train_source_classifier(*given, self.run_opts)
        manifests = [unlabelled(path) for path in target_manifests(hparams)]
        folder = self.hparams["feature_folder"]
        corpus = CorpusSettings(hparams["source"], manifests[0].parent, hparams["prepare"], folder)
        front = StoredFrames(store_frames(corpus, self.reader), self.hparams["layer"])
        values = {key: value for path in manifests for key, value in classifier_scores(brain, front, path).items()}
        weights = json.loads((self.folder / "source_classifier" / "settings.json").read_text())
        return ScoreTable(self.hparams["labels"], values, {"source_classifier": weights})


def target_manifests(hparams: Mapping) -> list[Path]:
    """Give labelled manifests that hold every utterance of the target once."""
    return [fold_folder(hparams["manifests"], 1) / f"{name}.json" for name in ("train", "test")]


def score_tables(
    hparams: Mapping, wanted: Sequence[str], seed: int, run_opts: Mapping | None = None
) -> dict[str, dict[Amplification, ScoreTable]]:
    """Score every utterance of the target for the chosen arms."""
    zero_shot = functools.partial(zero_shot_tables, run_opts=run_opts)
    makers: dict[str, Callable] = {"zero_shot": zero_shot, "source_classifier": classifier_tables}
    if "source_classifier" in wanted and hparams["alm"] != OWN:
        raise UserError(
            "--arm: source_classifier_fused needs the corpora that --alm was trained on, and those of "
            f"'{hparams['alm']}' are not here. Leave the arm out, or pass --alm {OWN}."
        )
    trained = Trained(hparams, seed, run_opts) if wanted and hparams["alm"] == OWN else None
    return {name: makers[name](hparams, trained) for name in wanted}


def zero_shot_tables(
    hparams: Mapping, trained: Trained | None, run_opts: Mapping | None = None
) -> dict[Amplification, ScoreTable]:
    """Cosines of every utterance and class, at each number of repeats."""
    given = [hparams[key] for key in ALM]
    prompts = read_prompts(hparams["prompts"])  # before anything is trained
    model = trained.dual_encoder() if trained else open_alm(*given, device=device_of(run_opts))
    refuse_known_corpus(model.trained_on, hparams["source"], "--alm")
    labels = list(model.classes_known or hparams["labels"])
    manifests = [unlabelled(path) for path in target_manifests(hparams)]
    run_on_main(write_hearing, args=[hparams, model, prompts, labels])
    given = (model, prompts, labels, manifests, hparams["audio_repeats"], hparams["text_repeats"])
    tables = {}
    for part in amplification_grid(*given, hparams["feature_folder"], hparams["source"]):
        pair = (part.audio_repeats, part.text_repeats)
        about = {"model": model.fingerprint(), "prompts": [list(prompts.forms), dict(prompts.words)], "repeats": pair}
        tables[pair] = ScoreTable(labels, dict(zip(part.keys, part.scores, strict=True)), about)
    return tables


def write_hearing(hparams: Mapping, model: AudioTextModel, prompts: PromptSet, labels: Sequence[str]) -> None:
    """Write what each number of repeats makes a model hear and read, to `heard.md` of the output folder."""
    lengths = [row["length"] for path in target_manifests(hparams) for row in read_manifest(unlabelled(path)).values()]
    rate, size = model.sample_rate, model.size
    given = (None if size is None else size / rate, rate, model.policy)
    windows = audit_table(summarise_windows(audit_windows(lengths, hparams["audio_repeats"], *given)))
    texts = audit_table(audit_texts(model, prompts, labels, hparams["text_repeats"]))
    told = "no window: all of every copy is heard" if size is None else f"a window of {given[0]:g} s, {model.policy}"
    text = f"What {markdown(model.name)} hears of {len(lengths)} recordings ({told}), before silence is cut: "
    text += "means and shares."
    text += f"\n\n```\n{windows}\n```\n\nTokens of the prompts:\n\n```\n{texts}\n```\n"
    atomic_write(Path(hparams["output_folder"]) / HEARD, text)


def classifier_tables(hparams: Mapping, trained: Trained) -> dict[Amplification, ScoreTable]:
    """Log-probabilities of the plain classifier; see `Trained.classifier_table`."""
    return {(1, 1): trained.classifier_table(hparams)}


def chosen_specialist(hparams: Mapping) -> tuple[Specialist, dict[str, Path]]:
    """Give the specialist by its name, with the folder of its adapter."""
    specialists = hparams["zsfuse"]["specialists"]
    specialist = specialists[known_ones(hparams["specialist"], specialists, "--specialist")[0]]
    if hparams["adapter_folder"] is None:
        return replace(specialist, pretraining=None), {}
    return specialist, {specialist.pretraining: Path(hparams["adapter_folder"])}


def specialist_front(hparams: Mapping, specialist: Specialist, fold: int, reader: FrameReader):
    """Give what the specialist's classifier reads of a fold."""
    front = fold_front(hparams, fold, reader)
    return front if specialist.front is None else specialist.front(front)


def fusion_run(hparams: Mapping, fold: int, seed: int, labels_per_class: int | str) -> Run:
    """Describe one run of a ZS-Fuse comparison."""
    run = adapter_run({**hparams, "pretrain_on": []}, fold, seed, labels_per_class)
    about = {key: value for key, value in run.about.items() if key != "pretraining_audio"}
    model = (
        "our dual encoder, trained on other corpora with the run's seed" if hparams["alm"] == OWN else hparams["alm"]
    )
    about["scores_from"] = f"{model}; (N, M) chosen on the training folds' labels"
    about["specialist"] = hparams["specialist"]
    return replace(run, about=about)


def amplification_report(hparams: Mapping, tables: Mapping[int, Mapping[Amplification, ScoreTable]]) -> str:
    """Write the whole grid of repeats: zero-shot UA with its difference to (1, 1), as Markdown, JSON and a heat map."""
    folder = Path(hparams["output_folder"])
    rows = {key: row for path in target_manifests(hparams) for key, row in read_manifest(path).items()}
    classes = [label for label in hparams["labels"] if any(row["emo"] == label for row in rows.values())]
    pairs = list(next(iter(tables.values())))
    even = {seed: {pair: standardised(table) for pair, table in found.items()} for seed, found in tables.items()}
    # The same draws of speakers for all: differences are paired.
    raw, evened = (amplified(side, pairs, rows, classes) for side in (tables, even))
    found = dict(zip(pairs, zip(raw, evened, strict=True), strict=True))
    lines = ["| N | M | zero-shot UA % | above the first row | standardised UA % | above the first row |"]
    lines.append("|---" * 6 + "|")
    for pair in pairs:
        sides = zip(found[pair], found[pairs[0]], strict=True)
        cells = [f"{drawn[0]:.1f} | {'' if pair == pairs[0] else above(drawn, first)}" for drawn, first in sides]
        lines.append(f"| {pair[0]} | {pair[1]} | {' | '.join(cells)} |")
    speakers = len({row["speaker"] for row in rows.values()})
    told = f"Mean over {len(tables)} seeds of the model; intervals: bootstrap over {speakers} speakers, paired. N, M: "
    told += "repeats of the audio, of the texts. Standardised: each class's scores over these recordings, no labels."
    known = next(iter(next(iter(tables.values())).values())).labels
    if missed := [label for label in classes if label not in known]:
        told += f" The model does not know {', '.join(map(markdown, missed))}: all of these count as missed."
    text = "\n".join([*lines, "", f"{len(rows)} utterances, {len(hparams['labels'])} classes. {told}", ""])
    if (folder / HEARD).is_file():
        text += f"\n{(folder / HEARD).read_text()}"
    atomic_write(folder / "amplification.md", text)
    figures = [
        {"audio_repeats": n, "text_repeats": m, "UA": sides[0][0] / 100, "standardised_UA": sides[1][0] / 100}
        for (n, m), sides in found.items()
    ]
    atomic_write(folder / "amplification.json", json.dumps(figures, indent=1))
    audio, texts = (sorted({pair[place] for pair in pairs}) for place in (0, 1))
    grid = np.array([[found[n, m][0][0] for m in texts] for n in audio])
    names = [f"N = {n}" for n in audio], [f"M = {m}" for m in texts]
    plot_grid(folder / "amplification.png", grid, *names, f"{hparams['source']}: zero-shot UA %")
    return text


def above(drawn: np.ndarray, first: np.ndarray) -> str:
    """Tell the difference of two accuracies with its paired 95 % interval."""
    return signed(drawn[0] - first[0], *np.percentile(drawn[1:] - first[1:], [2.5, 97.5]))


def standardised(table: ScoreTable) -> ScoreTable:
    """Standardise each class's scores over all utterances of the table, without labels (transductive)."""
    keys = list(table.values)
    scores = table.of(keys)
    return replace(table, values=dict(zip(keys, normalise_scores(scores, scores), strict=True)))


def amplified(
    tables: Mapping[int, Mapping[Amplification, ScoreTable]],
    pairs: Sequence[Amplification],
    rows: Mapping[str, Mapping],
    classes: Sequence[str],
) -> np.ndarray:
    """Zero-shot UA at each number of repeats, and its bootstrap draws over speakers."""
    # Every seed decides about the same utterances, so the mean of their UA is that of their counts together.
    counts = np.stack(
        [sum(counts_by_speaker(by[pair].decisions(classes), rows, classes) for by in tables.values()) for pair in pairs]
    )
    drawn = bootstrap(counts[:, None], np.random.default_rng(0))  # [draws, pairs]
    return 100 * np.column_stack([unweighted_accuracy(counts.sum(1)), drawn.T])
