"""Simulated worlds: skewed classes, few clips, speakers in one mood, a telephone; every method beside its baselines.

    python benchmarks/worlds.py run results/open_transfer --seeds 1-5
    python benchmarks/worlds.py table

The target's labels and speakers decide which recordings are in a world, and they score; no method sees them. Worlds on
the recipes' own test speakers choose designs. Worlds on other test speakers confirm them: those were adaptation
speakers in the recipes. `run` reads the sources and teachers that `make table` trained and continues where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import csv
import functools
import hashlib
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.signal import butter, resample_poly, sosfiltfilt
from torch.nn import functional as F

from speechbrain_mifuse.adaptation.fusion import prior_corrected
from speechbrain_mifuse.adaptation.method import AdaptationMethod, Outputs, Survey
from speechbrain_mifuse.corpora.manifest import read_manifest
from speechbrain_mifuse.evaluation.aggregate import Table, write_csv
from speechbrain_mifuse.evaluation.intervals import deviations, margin
from speechbrain_mifuse.evaluation.metrics import scores
from speechbrain_mifuse.experiments.features import CorpusSettings, EncoderSettings, open_frame_source, open_reader
from speechbrain_mifuse.experiments.settings import load_hparams
from speechbrain_mifuse.experiments.sweep import make_plan, parse_seeds
from speechbrain_mifuse.features.dataset import pad_frames
from speechbrain_mifuse.inference.recognizer_folder import load_classifier
from speechbrain_mifuse.nnet.classifier import EmotionClassifier
from speechbrain_mifuse.utils.audio import load_audio
from speechbrain_mifuse.utils.errors import UserError, one_clear_error
from speechbrain_mifuse.utils.files import atomic_write
from speechbrain_mifuse.utils.progress import progress

ROOT = Path(__file__).resolve().parent.parent
PAIRS = ("emodb2rav", "nemo2rav", "rav2nemo", "emodb2nemo", "rav2emodb", "nemo2emodb")
METHODS = (
    *("source_only", "source_adabn", "source_adabn_prior", "zero_training", "zero_training_adabn"),
    *("g_no_api", "g_closed_form", "g_closed_form_permuted", "g_gate", "g_once"),
    *("zero_training_test_mean", "g_once_test_mean"),
)
RECORDS = ROOT / "results" / "worlds.csv"
COLUMNS = ("family", "world", "half", "source", "target", "teacher", "method", "seed", "UA", "n_adapt", "n_test")
HALVES = {"A": "chooses", "B": "confirms"}
ANSWERS = 5


def generator(*key) -> np.random.Generator:
    """Random numbers that depend on a name alone."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little"))


@dataclass(frozen=True)
class Recordings:
    """A target's recordings: what methods may see (vectors, answers), and what makes worlds and scores them."""

    vectors: torch.Tensor  # [N, 2 D], pooled by the source's classifier, not normalized
    answers: torch.Tensor  # [N, K, C]
    labels: np.ndarray
    speakers: np.ndarray
    splits: np.ndarray

    def halves(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Positions that adapt and that test; in split B the first of the recipe's adaptation speakers test."""
        adapting, testing = (sorted(set(self.speakers[self.splits == name])) for name in ("adapt", "test"))
        held_out = np.isin(self.speakers, testing if split == "A" else adapting[: len(testing)])
        return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def skewed_worlds(labels: Sequence[str]) -> dict[str, dict[int, float]]:
    """All pairs of classes, and each class alone, cut to 20 % and to 5 % of the adaptation set."""
    worlds: dict[str, dict[int, float]] = {"balanced": {}}
    for share in (0.2, 0.05):
        chosen = [*itertools.combinations(range(len(labels)), 2), *((one,) for one in range(len(labels)))]
        for classes in chosen:
            worlds[f"{'+'.join(labels[one] for one in classes)} {share:.0%}"] = dict.fromkeys(classes, share)
    return worlds


def thinned(recordings: Recordings, chosen: np.ndarray, shares: Mapping[int, float], draw) -> np.ndarray:
    """Keep a share of some classes, at random."""
    kept = []
    for label in range(4):
        found = draw.permutation(chosen[recordings.labels[chosen] == label])
        kept.append(found[: max(round(shares.get(label, 1.0) * len(found)), 1)])
    return np.sort(np.concatenate(kept)) if shares else chosen


def natural_worlds(count: int = 24) -> list[dict]:
    """Few clips, few of a speaker, speakers of mostly one class, skew, often at test too, a telephone."""
    draw = generator("natural", 1)
    return [
        {
            "number": number,
            "clips": int(draw.choice([50, 100, 200, 400])),
            "per_speaker": int(draw.choice([8, 20, 60])),
            "mood": float(draw.choice([0, 0.5, 0.8])),
            "alpha": float(draw.choice([0.5, 1.0, 3.0, 100.0])),
            "test_mood": bool(draw.random() < 0.5),
            "test_alpha": float(draw.choice([1.0, 3.0, 100.0])),
            "channel": str(draw.choice(["clean", "clean", "telephone"])),
        }
        for number in range(count)
    ]


def sampled(recordings: Recordings, chosen: np.ndarray, draw, *, clips, alpha, mood, per_speaker, floor) -> np.ndarray:
    """Draw clips one by one: a speaker's classes are its own mood's and the world's; `floor` of each class at least."""
    labels, speakers = recordings.labels, recordings.speakers
    shares = draw.dirichlet([alpha] * 4) * 0.9 + 0.025
    shares /= shares.sum()
    own = {speaker: draw.choice(4, p=shares) for speaker in sorted(set(speakers[chosen]))}
    wanted = [mood * (labels[i] == own[speakers[i]]) + (1 - mood) * shares[labels[i]] for i in chosen]
    weight = np.array(wanted) / [max((labels[chosen] == labels[i]).mean(), 1e-6) for i in chosen]
    order = chosen[np.argsort(-np.log(np.maximum(draw.random(len(chosen)), 1e-12)) / np.maximum(weight, 1e-9))]
    taken: dict[str, int] = {}
    kept = []
    for i in order:
        if taken.get(speakers[i], 0) < per_speaker and len(kept) < clips:
            kept.append(i)
            taken[speakers[i]] = taken.get(speakers[i], 0) + 1
    for label in range(4):
        missing = floor - sum(labels[i] == label for i in kept)
        if missing > 0:
            kept += [i for i in draw.permutation(chosen[labels[chosen] == label]) if i not in set(kept)][:missing]
    return np.sort(np.array(kept))


def natural(
    recordings: Recordings, world: Mapping, adapt: np.ndarray, test: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Draw adaptation and test set of a natural world."""
    draw = generator("draw", world["number"], len(adapt))
    # Of three to six speakers, 8 clips each would be no set to adapt to.
    least = (60, 80) if len(set(recordings.speakers[adapt])) <= 6 else (0, 0)
    adapting = {"clips": world["clips"], "alpha": world["alpha"], "mood": world["mood"], "floor": 0}
    testing = {"clips": 10**6, "alpha": world["test_alpha"], "mood": world["mood"] * world["test_mood"], "floor": 5}
    per_speaker = world["per_speaker"]
    return (
        sampled(recordings, adapt, draw, **adapting, per_speaker=max(per_speaker, least[0])),
        sampled(recordings, test, draw, **testing, per_speaker=max(2 * per_speaker, least[1])),
    )


def telephone(wave: np.ndarray, key: str) -> np.ndarray:
    """Band of 300 to 3,400 Hz at 8 kHz, noise at 10 to 20 dB, mu-law of 8 bits; 16 kHz in and out."""
    draw = generator(key)
    narrow = sosfiltfilt(butter(4, [300, 3400], "band", fs=8000, output="sos"), resample_poly(wave.astype(float), 1, 2))
    spectrum = np.fft.rfft(draw.standard_normal(len(narrow)))
    spectrum[1:] /= np.arange(1, len(spectrum)) ** 0.35
    noise = np.fft.irfft(spectrum, len(narrow))
    noise *= narrow.std() / max(noise.std(), 1e-9) * 10 ** (-draw.uniform(10, 20) / 20)
    noisy = narrow + noise
    noisy *= 0.5 / max(np.abs(noisy).max(), 1e-9)
    coded = np.round(np.sign(noisy) * np.log1p(255 * np.abs(noisy)) / np.log(256) * 127) / 127
    return resample_poly(np.sign(coded) * (256 ** np.abs(coded) - 1) / 255, 2, 1).astype(np.float32)


class Target:
    """The recordings of one transfer and seed, with its source classifier."""

    # The frames by telephone, of all targets: they do not depend on source and seed.
    encoded: ClassVar[dict[str, torch.Tensor]] = {}

    def __init__(self, pair: str, seed: int, output: Path, answers: int = ANSWERS):
        plan = make_plan(ROOT, [pair], output, [seed])
        run = plan.runs()[0]
        flags = [f"--seed={seed}", f"--output_folder={run.folder}"]
        hparams, run_opts = load_hparams(plan.recipes[0].hparams, flags)
        self.pair, self.seed, self.names = pair, seed, {key: hparams[key] for key in ("source", "target", "teacher")}
        self.labels, self.methods = hparams["labels"], hparams["adaptation"]["methods"]
        self.corpus, self.layers = CorpusSettings.target_of(hparams), (hparams["layer"], hparams["teacher_layer"])
        self.corpus.prepare()
        self.reader = open_reader(EncoderSettings.of(hparams), run_opts)
        self.answers, self.known = answers, {}
        self.rows = {split: read_manifest(f"{hparams['target_manifests']}/{split}.json") for split in ("adapt", "test")}
        source = open_frame_source(self.corpus, self.layers[0], self.reader)
        sources = (run.folder / "source" / "recogniser", plan.teacher_folder(plan.recipes[0]) / "recogniser")
        if not all(folder.is_dir() for folder in sources):
            raise UserError(f"{run.folder}: no trained source or teacher. Run `make table` first.")
        self.model, self.teacher = (load_classifier(f, self.labels, source.fingerprint).eval() for f in sources)

    def recordings(self, channel: str) -> Recordings:
        """Pool the frames, clean or by telephone, and draw the teacher's answers on them, as its server would."""
        if channel not in self.known:
            self.known[channel] = self._recordings(channel)
        return self.known[channel]

    def _recordings(self, channel: str) -> Recordings:
        ids = {key: row for part in self.rows.values() for key, row in part.items()}
        torch.manual_seed(0)
        pool, answer = self.model.pooling, functools.partial(self.teacher.stochastic_logits, passes=self.answers)
        vectors, answers = [], []
        for keys in batched(list(ids), 64):
            for layer, function, found in zip(self.layers, (pool, answer), (vectors, answers), strict=True):
                with torch.no_grad():
                    found.append(function(*pad_frames(self.frames(keys, ids, layer, channel))))
        return Recordings(
            torch.cat(vectors),
            torch.cat(answers).softmax(-1),
            np.array([self.labels.index(row["emo"]) for row in ids.values()]),
            np.array([row["speaker"] for row in ids.values()]),
            np.array([split for split, part in self.rows.items() for _ in part]),
        )

    def frames(self, keys: Sequence[str], rows: Mapping, layer: int, channel: str) -> list[torch.Tensor]:
        """Frames of some recordings, `[frames, D]` each."""
        source = open_frame_source(self.corpus, layer, self.reader)
        if channel == "clean":
            return [source.read(key, rows[key]["wav"]) for key in keys]
        return [self.by_telephone(key, rows[key]["wav"])[source.place] for key in keys]

    def by_telephone(self, key: str, wav: str) -> torch.Tensor:
        """Encode one recording as it comes from a telephone: `[layers, frames, D]`."""
        if key not in self.encoded:
            wave = telephone(load_audio(wav, 16000).numpy(), key)
            self.encoded[key] = self.reader.encode(torch.from_numpy(wave)).half()
        return self.encoded[key]


def batched(items: Sequence, size: int) -> Iterator[Sequence]:
    """Cut a sequence into parts."""
    return (items[start : start + size] for start in range(0, len(items), size))


def predict(
    method: AdaptationMethod, model: EmotionClassifier, recordings: Recordings, adapt: np.ndarray, test: np.ndarray
) -> torch.Tensor:
    """Answer for a test set with a method that trains nothing, `[N, C]`, as `AdaptationBrain` does."""
    model = copy.deepcopy(model)

    @torch.no_grad()
    def student(vectors: torch.Tensor) -> Outputs:
        normed = model.norm(vectors)
        head = functools.partial(model.head, stochastic=False)
        return Outputs(normed, model.hidden_units(normed), head(normed), head, model.output.weight.detach())

    @torch.no_grad()
    def passes(vectors: torch.Tensor) -> torch.Tensor:
        units = model.hidden_units(model.norm(vectors)).unsqueeze(1).expand(-1, 16, -1)
        return model.output(F.dropout(units, model.dropout)).softmax(-1)

    def survey(chosen: np.ndarray, prior: torch.Tensor | None = None) -> Survey:
        vectors, answers = recordings.vectors[chosen], recordings.answers[chosen]
        if method.test_mean and chosen is test:
            vectors = vectors - vectors.mean(0) + recordings.vectors[adapt].mean(0)
        return Survey(
            answers,
            torch.ones(answers.shape[:2], dtype=torch.bool),
            classifier=functools.partial(passes, vectors),
            rows=torch.arange(len(chosen)),
            lalm_prior=prior,
            student=functools.partial(student, vectors),
        )

    if method.target_statistics:
        model.renormalize(survey(adapt).student().vectors)
    asks = method.prior_correction and "adapt" in method.answers_for
    prior = survey(adapt).lalm_average(0.0) if asks else None
    method.state = {}
    method.start(survey(adapt, prior))
    answers = method.predict(survey(test, prior))
    return (
        prior_corrected(answers, method.predict(survey(adapt, prior)).mean(0)) if method.corrects_answers else answers
    )


def accuracy(answers: torch.Tensor, labels: np.ndarray) -> float:
    """Unweighted accuracy of answers `[N, C]`."""
    return scores(answers.argmax(1), torch.from_numpy(labels), answers.shape[1])["UA"]


def worlds_of(target: Target, family: str, half: str, seeds: Sequence[int]) -> Iterator[tuple]:
    """Worlds of one half in which this target's seed is due: each world has one seed, in turn; balance has all."""
    if family == "skew":
        for number, (name, shares) in enumerate(skewed_worlds(target.labels).items()):
            if name == "balanced" or seeds[number % len(seeds)] == target.seed:
                recordings = target.recordings("clean")
                adapt, test = recordings.halves(half)
                yield name, recordings, thinned(recordings, adapt, shares, generator(half, target.pair, name)), test
        return
    for world in natural_worlds():
        parity = "AB".index(half)
        if world["number"] % 2 == parity and seeds[world["number"] // 2 % len(seeds)] == target.seed:
            recordings = target.recordings(world["channel"])
            yield str(world["number"]), recordings, *natural(recordings, world, *recordings.halves(half))


def run(output: Path, seeds: Sequence[int], methods: Sequence[str], families: Sequence[str], records: Path) -> None:
    """Score what is missing in a file of records."""
    done = {tuple(row[key] for key in COLUMNS[:8]) for row in read(records)}
    for seed, pair in progress(list(itertools.product(seeds, PAIRS)), desc="worlds", unit="target"):
        target = Target(pair, seed, output)
        for family, half in itertools.product(families, HALVES):
            for name, recordings, adapt, test in worlds_of(target, family, half, seeds):
                about = {"family": family, "world": name, "half": half, **target.names, "seed": seed}
                rows = []
                for method in methods:
                    row = {**about, "method": method, "n_adapt": len(adapt), "n_test": len(test)}
                    if tuple(str(row[key]) for key in COLUMNS[:8]) not in done:
                        answers = predict(target.methods[method], target.model, recordings, adapt, test)
                        rows.append({**row, "UA": round(accuracy(answers, recordings.labels[test]), 4)})
                append(records, rows)


def read(path: Path) -> list[dict]:
    """Read the records; none if there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, rows: Sequence[Mapping], columns: Sequence[str] = COLUMNS) -> None:
    """Add rows to the file, with a header if it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerows(rows)


GROUPS = {
    "skew": {
        "balanced": lambda world: world == "balanced",
        "two classes at 20 %": lambda world: "+" in world and world.endswith(" 20%"),
        "two at 5 %": lambda world: "+" in world and world.endswith(" 5%"),
        "one at 20 %": lambda world: "+" not in world and world.endswith(" 20%"),
        "one at 5 %": lambda world: "+" not in world and world.endswith(" 5%"),
    },
    "natural": {
        "all": lambda world: True,
        "to 100 clips": lambda world: natural_worlds()[int(world)]["clips"] <= 100,
        "200 or 400": lambda world: natural_worlds()[int(world)]["clips"] > 100,
        "clean": lambda world: natural_worlds()[int(world)]["channel"] == "clean",
        "telephone": lambda world: natural_worlds()[int(world)]["channel"] == "telephone",
    },
}
BASELINES = ("zero_training", "zero_training_adabn")


def by_transfer(rows: Sequence[Mapping], method: str) -> np.ndarray:
    """Mean UA % of a method in each transfer, over worlds and seeds."""
    chosen = [row for row in rows if row["method"] == method]
    transfers = sorted({(row["source"], row["target"]) for row in chosen})
    values = {
        name: [float(row["UA"]) for row in chosen if (row["source"], row["target"]) == name] for name in transfers
    }
    return np.array([100 * np.mean(values[name]) for name in transfers])


def world_table(rows: Sequence[Mapping], family: str, half: str) -> Table:
    """Mean UA of every method in each group of worlds, and how far it is above the baselines in all of them."""
    rows = [row for row in rows if row["family"] == family and row["half"] == half]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    baselines = [method for method in BASELINES if method in methods]
    groups = {name: [row for row in rows if fits(row["world"])] for name, fits in GROUPS[family].items()}
    lines = []
    for method in methods:
        cells = [f"{by_transfer(found, method).mean():.1f}" if found else "" for found in groups.values()]
        for baseline in baselines:
            # Balance is no skew: the differences are over the others.
            counted = [row for row in rows if row["world"] != "balanced"]
            gain = by_transfer(counted, method) - by_transfer(counted, baseline)
            cells.append(f"{gain.mean():+.1f} ± {margin([deviations(gain)]):.1f}" if method != baseline else "")
        lines.append([method, *cells])
    return Table(["mean UA %", *groups, *(f"above {baseline}" for baseline in baselines)], lines)


# What the short table and the figure show of the confirming half.
SUMMARY = {
    "balanced": lambda row: row["world"] == "balanced",
    "skewed": lambda row: row["family"] == "skew" and row["world"] != "balanced",
    "natural": lambda row: row["family"] == "natural",
}
SHOWN = ("zero_training", "g_closed_form", "g_gate", "g_once", "zero_training_test_mean", "g_once_test_mean")


def gains(rows: Sequence[Mapping], method: str, baseline: str) -> tuple[float, float]:
    """How far a method is above another, and half its interval over transfers."""
    apart = by_transfer(rows, method) - by_transfer(rows, baseline)
    return float(apart.mean()), float(margin([deviations(apart)]))


def summary_table(rows: Sequence[Mapping]) -> Table:
    """Mean UA in the three kinds of worlds, and the distance to the source and teacher multiplied."""
    groups = {name: [row for row in rows if fits(row)] for name, fits in SUMMARY.items()}
    groups = {name: found for name, found in groups.items() if found}
    baseline, lines = "zero_training_adabn", []
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for found in groups.values():
            gain, half = gains(found, method, baseline)
            told = "" if method == baseline else f"{gain:+.1f} ± {half:.1f}"
            cells += [f"{by_transfer(found, method).mean():.1f}", told]
        lines.append([method, *cells])
    head = [cell for name in groups for cell in (name, f"above {baseline}")]
    return Table(["mean UA %", *head], lines)


def draw(path: Path, rows: Sequence[Mapping]) -> None:
    """Draw the distance of a few methods to the source and teacher multiplied, in the three kinds of worlds."""
    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    axes, drawn = figure.add_subplot(), set()
    for index, method in enumerate(SHOWN):
        for place, fits in enumerate(SUMMARY.values()):
            found = [row for row in rows if fits(row)]
            if any(row["method"] == method for row in found):
                gain, half = gains(found, method, "zero_training_adabn")
                label = None if method in drawn else method
                drawn.add(method)
                x = place + (index - len(SHOWN) / 2 + 0.5) * 0.13
                axes.errorbar(x, gain, half, fmt="os^Dv*"[index], color=f"C{index}", label=label)
    axes.axhline(0, color="0.5", linewidth=1)
    axes.set_xticks(range(len(SUMMARY)), SUMMARY)
    axes.set_ylabel("UA points above zero_training_adabn")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    atomic_write(path, buffer.getvalue())


ABOUT = """The mean over worlds of each transfer, then over six transfers; ± is half a 95 % interval by Student's t over
the six transfers. Worlds are simulated: the target's labels and speakers decide which recordings are in them, and they
score. Half A, on the recipes' test speakers, chose what is tried; half B, on speakers who adapt in the recipes,
confirms it. Each world has one seed of {seeds}, in turn; balance has all. The API teacher is a classifier of the third
corpus on another layer of the same encoder, and no language model."""


def tables(records: Path, folder: Path) -> str:
    """Write a table of each family."""
    rows, texts = read(records), []
    for family in GROUPS:
        chosen = [row for row in rows if row["family"] == family]
        if not chosen:
            continue
        write_csv(folder / f"{family}.csv", chosen, COLUMNS)
        parts = []
        for half, role in HALVES.items():
            if any(row["half"] == half for row in chosen):
                parts += [f"Half {half} ({role}):", "", world_table(chosen, family, half).markdown()]
        seeds = ", ".join(sorted({row["seed"] for row in chosen}))
        texts.append("\n".join([*parts, ABOUT.format(seeds=seeds), ""]))
        atomic_write(folder / f"worlds_{family}.md", texts[-1])
    confirming = [row for row in rows if row["half"] == "B"]
    if confirming:
        atomic_write(folder / "what_helps.md", summary_table(confirming).markdown())
        draw(folder / "what_helps.png", confirming)
    return "\n".join(texts)


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("runs", type=Path, nargs="?", default=ROOT / "results" / "open_transfer", help="of make table")
    parser.add_argument("--seeds", default="1-5", help="as 1-5")
    parser.add_argument("--methods", default=",".join(METHODS), help="methods of the recipes that train nothing")
    parser.add_argument("--families", default=",".join(GROUPS), help="skew, natural or both")
    parser.add_argument("--records", type=Path, default=RECORDS, help="file of scores, continued")
    parser.add_argument("--table", type=Path, default=ROOT / "docs" / "results", help="folder of the tables")
    chosen = parser.parse_args(arguments)
    with one_clear_error():
        if chosen.action == "run":
            methods, families = chosen.methods.split(","), chosen.families.split(",")
            run(chosen.runs, parse_seeds(chosen.seeds), methods, families, chosen.records)
        print(tables(chosen.records, chosen.table))


if __name__ == "__main__":
    main()
