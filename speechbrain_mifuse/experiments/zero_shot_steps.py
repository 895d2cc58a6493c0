"""The steps of a recipe that scores recordings against texts; each does what is missing and skips what is done."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from speechbrain_mifuse.brains.dual_encoder import Source
from speechbrain_mifuse.corpora.manifest import read_manifest, unlabelled
from speechbrain_mifuse.evaluation.aggregate import bootstrap, signed
from speechbrain_mifuse.evaluation.metrics import unweighted_accuracy
from speechbrain_mifuse.evaluation.scoring import counts_by_speaker
from speechbrain_mifuse.experiments.dual_encoder import classifier_scores, frame_sources_of, train_source_classifier
from speechbrain_mifuse.experiments.features import (
    CorpusSettings,
    EncoderSettings,
    device_of,
    open_reader,
    store_frames,
)
from speechbrain_mifuse.experiments.fusion_variants import Amplification, ScoreTable
from speechbrain_mifuse.experiments.recipes import load_recipe
from speechbrain_mifuse.experiments.settings import overrides_of, read_hparams
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


@dataclass(frozen=True)
class ScoringSettings:
    """Which recordings are scored, by which audio-text model, with which prompts and numbers of repeats."""

    target: CorpusSettings
    labels: Sequence[str]
    alm: str
    alm_window: str
    alm_trust_remote_code: bool
    prompts: PromptSet
    audio_repeats: Sequence[int]
    text_repeats: Sequence[int]
    output_folder: Path
    # Where --alm is `OWN`: the recipe of the dual encoder, with its flags.
    dual_encoder_recipe: str
    dual_encoder_flags: Mapping

    @classmethod
    def of(cls, hparams: Mapping) -> ScoringSettings:
        """Read them from a recipe's hparams."""
        flags = {key: hparams[key] for key in ("data_folder", "feature_folder") if hparams[key] is not None}
        # Its captions must not be the prompts that it is scored with.
        flags |= {"prompts": hparams["prompts"], **dict(hparams["dual_encoder_flags"])}
        return cls(
            target=CorpusSettings.fold_of(hparams, 1),  # every fold has all utterances
            labels=hparams["labels"],
            alm=hparams["alm"],
            alm_window=hparams["alm_window"],
            alm_trust_remote_code=hparams["alm_trust_remote_code"],
            prompts=read_prompts(hparams["prompts"]),
            audio_repeats=hparams["audio_repeats"],
            text_repeats=hparams["text_repeats"],
            output_folder=Path(hparams["output_folder"]),
            dual_encoder_recipe=hparams["dual_encoder_recipe"],
            dual_encoder_flags=flags,
        )

    @property
    def manifests(self) -> list[Path]:
        """Labelled manifests that hold every utterance of the target once."""
        return [self.target.manifests / "train.json", self.target.manifests / "test.json"]

    @property
    def description(self) -> str:
        """Where the scores come from, for the records."""
        own = "our dual encoder, trained on other corpora with the run's seed"
        return f"{own if self.alm == OWN else self.alm}; (N, M) chosen on the training folds' labels"


class Trained:
    """What is trained on the dual encoder's corpora with one seed: the dual encoder, and the plain classifier."""

    def __init__(self, settings: ScoringSettings, seed: int, run_opts: Mapping | None = None):
        folder = settings.output_folder / f"dual_encoder_{seed}"
        # The splits do not depend on the seed.
        manifests = settings.output_folder / "dual_encoder_manifests"
        flags = {"manifests": manifests, "seed": seed, "output_folder": folder, **settings.dual_encoder_flags}
        self.hparams = read_hparams(settings.dual_encoder_recipe, overrides_of(flags))
        refuse_known_corpus(self.hparams["sources"], settings.target.name, "--dual_encoder_recipe")
        self.folder, self.run_opts = folder, run_opts
        self.reader = open_reader(EncoderSettings.of(self.hparams), run_opts)
        self.sources: Mapping[str, Source] = self.hparams["sources"]
        given = (self.hparams["layer"], self.hparams["feature_folder"])
        self.frame_sources = frame_sources_of(self.sources, self.reader, *given)

    def dual_encoder(self) -> AudioTextModel:
        """Train or find the dual encoder."""
        recipe = load_recipe("recipes/RAVDESS/dual_encoder/train.py")
        folder = recipe.train_dual_encoder(
            self.hparams["dual_encoder"], self.sources, self.frame_sources, self.run_opts
        )
        return load_dual_encoder(folder).to(device_of(self.run_opts))

    def classifier_table(self, settings: ScoringSettings) -> ScoreTable:
        """Log-probabilities of the plain classifier for every utterance of the target."""
        given = (self.hparams["dual_encoder"], self.sources, self.frame_sources, self.folder / "source_classifier")
        brain = train_source_classifier(*given, self.run_opts)
        target = replace(settings.target, feature_folder=self.hparams["feature_folder"])
        frame_source = StoredFrames(store_frames(target, self.reader), self.hparams["layer"])
        tables = [classifier_scores(brain, frame_source, unlabelled(path)) for path in settings.manifests]
        values = {key: value for table in tables for key, value in table.items()}
        weights = json.loads((self.folder / "source_classifier" / "settings.json").read_text())
        return ScoreTable(self.hparams["labels"], values, {"source_classifier": weights})


def score_tables(
    settings: ScoringSettings, wanted: Collection[str], seed: int, run_opts: Mapping | None = None
) -> dict[str, dict[Amplification, ScoreTable]]:
    """Score every utterance of the target for the chosen arms: `zero_shot`, and `source_classifier` if wanted."""
    if "source_classifier" in wanted and settings.alm != OWN:
        raise UserError(
            "--arm: source_classifier_fused needs the corpora that --alm was trained on, and those of "
            f"'{settings.alm}' are not here. Leave the arm out, or pass --alm {OWN}."
        )
    trained = Trained(settings, seed, run_opts) if settings.alm == OWN else None
    tables = {"zero_shot": zero_shot_tables(settings, trained, run_opts)}
    if trained and "source_classifier" in wanted:
        tables["source_classifier"] = {(1, 1): trained.classifier_table(settings)}
    return tables


def zero_shot_tables(
    settings: ScoringSettings, trained: Trained | None, run_opts: Mapping | None = None
) -> dict[Amplification, ScoreTable]:
    """Cosines of every utterance and class, at each number of repeats."""
    prompts = settings.prompts
    if trained:
        model = trained.dual_encoder()
    else:
        given = (settings.alm, settings.alm_window, settings.alm_trust_remote_code)
        model = open_alm(*given, device=device_of(run_opts))
    target = settings.target
    refuse_known_corpus(model.trained_on, target.name, "--alm")
    labels = list(model.classes_known or settings.labels)
    manifests = [unlabelled(path) for path in settings.manifests]
    write_hearing(settings, manifests, model, prompts, labels)
    repeats = (settings.audio_repeats, settings.text_repeats)
    tables = {}
    for part in amplification_grid(model, prompts, labels, manifests, *repeats, target.feature_folder, target.name):
        pair = (part.audio_repeats, part.text_repeats)
        about = {"model": model.fingerprint(), "prompts": [list(prompts.forms), dict(prompts.words)], "repeats": pair}
        tables[pair] = ScoreTable(labels, dict(zip(part.keys, part.scores, strict=True)), about)
    return tables


def write_hearing(
    settings: ScoringSettings,
    manifests: Sequence[Path],
    model: AudioTextModel,
    prompts: PromptSet,
    labels: Sequence[str],
) -> None:
    """Write what each number of repeats makes a model hear and read, to `heard.md` of the output folder."""
    lengths = [row["length"] for path in manifests for row in read_manifest(path).values()]
    rate, size = model.sample_rate, model.size
    given = (None if size is None else size / rate, rate, model.policy)
    windows = audit_table(summarise_windows(audit_windows(lengths, settings.audio_repeats, *given)))
    texts = audit_table(audit_texts(model, prompts, labels, settings.text_repeats))
    hearing = "no window: all of every copy is heard" if size is None else f"a window of {given[0]:g} s, {model.policy}"
    text = f"What {markdown(model.name)} hears of {len(lengths)} recordings ({hearing}), before silence is cut: "
    text += "means and shares."
    text += f"\n\n```\n{windows}\n```\n\nTokens of the prompts:\n\n```\n{texts}\n```\n"
    atomic_write(settings.output_folder / HEARD, text)


def amplification_report(settings: ScoringSettings, tables: Mapping[int, Mapping[Amplification, ScoreTable]]) -> str:
    """Write the whole grid of repeats: zero-shot UA with its difference to (1, 1), as Markdown, JSON and a heat map."""
    folder = settings.output_folder
    rows = {key: row for path in settings.manifests for key, row in read_manifest(path).items()}
    classes = [label for label in settings.labels if any(row["emo"] == label for row in rows.values())]
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
    notes = f"Mean over {len(tables)} seeds of the model; intervals: bootstrap over {speakers} speakers, paired. N, M: "
    notes += "repeats of the audio, of the texts. Standardised: each class's scores over these recordings, no labels."
    known = next(iter(next(iter(tables.values())).values())).labels
    if missed := [label for label in classes if label not in known]:
        notes += f" The model does not know {', '.join(map(markdown, missed))}: all of these count as missed."
    text = "\n".join([*lines, "", f"{len(rows)} utterances, {len(settings.labels)} classes. {notes}", ""])
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
    plot_grid(folder / "amplification.png", grid, *names, f"{settings.target.name}: zero-shot UA %")
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
    return 100 * np.column_stack([unweighted_accuracy(counts.sum(1)).numpy(), drawn.T])
