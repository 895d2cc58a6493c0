"""A trial of weights by uncertainty: two teachers' fused answers, against the same weights permuted, and equal ones.

    python benchmarks/mi_weighting.py run results/open_transfer --seeds 1-5
    python benchmarks/mi_weighting.py table

No student is trained: what is scored are the fused answers to the test recordings. Form of the answers, their number,
calibration, uncertainty, its scale and the form of the fusion vary; the best of each is chosen in half A and confirmed
in half B (see `worlds.py`), by the lesser of its two gains. Calibration needs no label: both teachers' class
preferences are taken out, and temperatures give both the same mean entropy.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from worlds import HALVES, PAIRS, ROOT, Target, accuracy, append, read

from speechbrain_mifuse.adaptation.fusion import (
    exponential_weight,
    prior_corrected,
    product_of_experts,
    teacher_weights,
)
from speechbrain_mifuse.adaptation.uncertainty import entropy, mutual_information
from speechbrain_mifuse.evaluation.aggregate import Table, write_csv
from speechbrain_mifuse.evaluation.intervals import deviations, margin
from speechbrain_mifuse.experiments.sweep import parse_seeds
from speechbrain_mifuse.utils.errors import one_clear_error
from speechbrain_mifuse.utils.files import atomic_write

COLUMNS = ("half", "source", "target", "seed", "answers", "prior", "calibration", "uncertainty", "scale", "fusion")
COLUMNS += ("UA", "UA_permuted", "UA_equal")
DESIGN = COLUMNS[5:10]
SCALES = {"tau .05": 0.05, "tau .2": 0.2, "tau 1": 1.0, "rank": 0.3}
PERMUTATIONS = 10


def at_entropy(samples: torch.Tensor, wanted: float) -> torch.Tensor:
    """Sharpen or soften samples `[N, K, C]` by one temperature until their means have a given mean entropy."""
    logits, low, high = samples.clamp(min=1e-6).log(), 0.05, 20.0
    for _ in range(40):
        temperature = math.sqrt(low * high)
        softer = float(entropy((logits / temperature).softmax(-1).mean(1)).mean()) < wanted
        low, high = (temperature, high) if softer else (low, temperature)
    return (logits / temperature).softmax(-1)


def uncertainties(samples: torch.Tensor) -> dict[str, torch.Tensor]:
    """Four uncertainties `[N]` of stochastic answers, each in [0, 1]."""
    mean, most = samples.mean(1), math.log(samples.shape[-1])
    top = mean.topk(2, dim=1).values
    return {
        "MI": mutual_information(samples),
        "entropy": entropy(mean) / most,
        "expected entropy": entropy(samples).mean(1) / most,
        "margin": 1 - (top[:, 0] - top[:, 1]),
    }


def fused(fusion: str, means: Sequence[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """Mix two distributions by the first one's weight `[N]`, or multiply them with exponents that add up to 2."""
    if fusion == "product":
        return product_of_experts(means, [2 * weight, 2 * (1 - weight)])
    return weight[:, None] * means[0] + (1 - weight[:, None]) * means[1]


def one_word(samples: torch.Tensor, seed: int) -> torch.Tensor:
    """Draw one label from every sample, as a model that answers in one word does."""
    drawn = torch.multinomial(samples.flatten(0, 1), 1, generator=torch.Generator().manual_seed(seed)).squeeze(1)
    return F.one_hot(drawn, samples.shape[-1]).float().view(samples.shape)


def trials(
    adapt: Sequence[torch.Tensor], test: Sequence[torch.Tensor], labels: np.ndarray, seed: int
) -> Iterator[dict]:
    """Score every design on two teachers' samples `[N, K, C]` of the adaptation and the test set."""
    generator = torch.Generator().manual_seed(seed)
    for prior, calibration in itertools.product(("as is", "corrected"), ("as is", "equal entropy")):
        teachers = list(test)
        if prior == "corrected":
            averages = [samples.mean((0, 1)) for samples in adapt]
            flat = [prior_corrected(samples.flatten(0, 1), a) for samples, a in zip(test, averages, strict=True)]
            teachers = [part.view(samples.shape) for part, samples in zip(flat, test, strict=True)]
        if calibration != "as is":
            wanted = float(sum(entropy(samples.mean(1)).mean() for samples in teachers)) / 2
            teachers = [at_entropy(samples, wanted) for samples in teachers]
        means, unsure = [samples.mean(1) for samples in teachers], [uncertainties(samples) for samples in teachers]
        for name, (scale, tau), fusion in itertools.product(unsure[0], SCALES.items(), ("mixture", "product")):
            values = torch.stack([each[name] for each in unsure], 1)
            if scale == "rank":
                values = values.argsort(0).argsort(0).float() / len(values)
            weight = teacher_weights(exponential_weight(values, tau), torch.ones_like(values).bool())[:, 0]
            permuted = [
                accuracy(fused(fusion, means, weight[torch.randperm(len(weight), generator=generator)]), labels)
                for _ in range(PERMUTATIONS)
            ]
            yield {
                **dict(zip(DESIGN, (prior, calibration, name, scale, fusion), strict=True)),
                "UA": round(accuracy(fused(fusion, means, weight), labels), 4),
                "UA_permuted": round(float(np.mean(permuted)), 4),
                "UA_equal": round(accuracy(fused(fusion, means, torch.full_like(weight, 0.5)), labels), 4),
            }


def run(output: Path, seeds: Sequence[int], records: Path) -> None:
    """Score what is missing in a file of records."""
    done = {(row["half"], row["source"], row["target"], row["seed"]) for row in read(records)}
    for seed, pair in itertools.product(seeds, PAIRS):
        target = Target(pair, seed, output, answers=20)
        recordings = target.recordings("clean")
        for half in HALVES:
            about = {"half": half, "source": target.names["source"], "target": target.names["target"], "seed": seed}
            if tuple(map(str, about.values())) in done:
                continue
            adapt, test = recordings.halves(half)
            torch.manual_seed(seed)
            vectors = recordings.vectors
            normed = (vectors - vectors[adapt].mean(0)) / vectors[adapt].std(0, correction=0).clamp(min=1e-4)
            with torch.no_grad():
                units = target.model.hidden_units(normed).unsqueeze(1).expand(-1, 20, -1)
                source = target.model.output(F.dropout(units, target.model.dropout)).softmax(-1)
            said = recordings.answers
            forms = {f"distributions, K {k}": said[:, :k] for k in (5, 20)}
            forms |= {f"one word, K {k}": one_word(said[:, :k], seed) for k in (5, 20)}
            rows = [
                {**about, "answers": name, **row}
                for name, form in forms.items()
                for row in trials(
                    (form[adapt], source[adapt]), (form[test], source[test]), recordings.labels[test], seed
                )
            ]
            append(records, rows, COLUMNS)


def gain(rows: Sequence[dict], control: str) -> tuple[float, float]:
    """Mean distance to a control over transfers, in points, and half its interval."""
    transfers = sorted({(row["source"], row["target"]) for row in rows})
    apart = [
        100 * np.mean([float(r["UA"]) - float(r[control]) for r in rows if (r["source"], r["target"]) == name])
        for name in transfers
    ]
    return float(np.mean(apart)), float(margin([deviations(np.array(apart))]))


def table(records: Path, folder: Path) -> str:
    """Write of each uncertainty the design that half A chose, with what half B says of it, and their scores."""
    rows, lines, kept = read(records), [], []
    designs: dict[tuple, dict[str, list]] = {}
    for row in rows:
        parts = designs.setdefault((row["answers"], *(row[key] for key in DESIGN)), {"A": [], "B": []})
        parts[row["half"]].append(row)
    controls = ("UA_permuted", "UA_equal")
    for answers, name in dict.fromkeys((key[0], key[3]) for key in designs):
        chosen = [key for key in designs if (key[0], key[3]) == (answers, name)]
        best = max(chosen, key=lambda key: min(gain(designs[key]["A"], control)[0] for control in controls))
        told = ["{:+.1f} ± {:.1f}".format(*gain(designs[best][half], control)) for half in "AB" for control in controls]
        kept += designs[best]["A"] + designs[best]["B"]
        prior, calibration, _, scale, fusion = best[1:]
        lines.append([answers, name, f"prior {prior}, {calibration}, {scale}, {fusion}", *told])
    head = [f"{half}: above {control}" for half in HALVES for control in ("permuted", "equal")]
    text = Table(["answers", "uncertainty", "design chosen in A", *head], lines).markdown()
    write_csv(folder / "mi_weighting.csv", kept, COLUMNS)
    atomic_write(folder / "mi_weighting.md", text)
    return text


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("runs", type=Path, nargs="?", default=ROOT / "results" / "open_transfer", help="of make table")
    parser.add_argument("--seeds", default="1-5", help="as 1-5")
    parser.add_argument("--records", type=Path, default=ROOT / "results" / "mi_weighting.csv", help="file of scores")
    parser.add_argument("--table", type=Path, default=ROOT / "docs" / "results", help="folder of the table")
    chosen = parser.parse_args(arguments)
    with one_clear_error():
        if chosen.action == "run":
            run(chosen.runs, parse_seeds(chosen.seeds), chosen.records)
        print(table(chosen.records, chosen.table))


if __name__ == "__main__":
    main()
