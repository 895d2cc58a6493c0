"""From the records of a comparison of arms to a table with intervals and paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from speechbrain_mifuse.evaluation.aggregate import Table, bootstrap, many, signed
from speechbrain_mifuse.evaluation.metrics import unweighted_accuracy
from speechbrain_mifuse.utils.errors import UserError

COLUMNS = ("corpus", "fold", "seed", "labels_per_class", "arm", "UA", "WA", "macro_F1")
# What all records of a table must agree in.
SHARED = ("corpus", "encoder", "speaker_norm", "protocol", "pretraining_audio", "scores_from", "labels")
SHARED += ("finetuning_steps",)
# What is said of a record that has it.
SENTENCES = {
    "pretraining_audio": "Adapters pretrained, without labels, on {}.",
    "scores_from": "Scores: {}.",
}


def _conditions(records: Sequence[Mapping]) -> dict[tuple[str, str], list[Mapping]]:
    """Group records by corpus and amount of labels."""
    found: dict[tuple[str, str], list[Mapping]] = {}
    for record in records:
        found.setdefault((record["corpus"], str(record["labels_per_class"])), []).append(record)
    return found


def pooled_counts(records: Sequence[Mapping], arms: Sequence[str]) -> np.ndarray:
    """Arrange the confusion counts of one condition; each speaker is in the test set of one fold."""
    place = {(record["arm"], record["seed"], record["fold"]): record for record in records}
    seeds = sorted({record["seed"] for record in records})
    folds = sorted({record["fold"] for record in records})
    missing = [key for arm in arms for seed in seeds for fold in folds if (key := (arm, seed, fold)) not in place]
    if missing:
        raise UserError(f"no result of arm {missing[0][0]}, seed {missing[0][1]}, fold {missing[0][2]}. Run it.")
    for record in records:
        differs = [key for key in SHARED if record.get(key) != records[0].get(key)]
        if differs:
            raise UserError(f"{record['arm']}, fold {record['fold']} was got under other settings ({differs}).")
    return np.array(
        [
            [[counts for fold in folds for counts in place[arm, seed, fold]["by_speaker"].values()] for seed in seeds]
            for arm in arms
        ]
    )


def arm_table(records: Sequence[Mapping], arms: Sequence[str], baselines: Sequence[str]) -> Table:
    """UA of each arm: over all folds' test speakers, mean ± standard deviation over seeds, interval, differences."""
    others = [name for name in baselines if name in arms]
    head = ["corpus", "labels per class", "arm", "UA %", "95 % interval", "mean of folds", "WA %", "macro-F1 %"]
    rows = []
    for (corpus, labels), found in _conditions(records).items():
        counts = pooled_counts(found, arms)
        accuracy = 100 * unweighted_accuracy(counts.sum(2)).numpy()  # [arms, seeds]
        drawn = 100 * bootstrap(counts, np.random.default_rng(0))  # [draws, arms]
        for place, name in enumerate(arms):
            own = [record for record in found if record["arm"] == name]
            low, high = np.percentile(drawn[:, place], [2.5, 97.5])
            spread = accuracy[place].std(ddof=1) if accuracy.shape[1] > 1 else 0.0
            means = [f"{100 * np.mean([record[key] for record in own]):.1f}" for key in ("UA", "WA", "macro_F1")]
            cells = [f"{accuracy[place].mean():.1f} ± {spread:.1f}", f"{low:.1f} to {high:.1f}", *means]
            for other in others:
                against = arms.index(other)
                cells.append("" if place == against else _paired(accuracy, drawn, place, against))
            rows.append([corpus, labels, name, *cells])
    return Table([*head, *(f"above {name}" for name in others)], rows)


def _paired(accuracy: np.ndarray, drawn: np.ndarray, place: int, against: int) -> str:
    """Difference of two arms with its paired 95 % interval."""
    low, high = np.percentile(drawn[:, place] - drawn[:, against], [2.5, 97.5])
    return signed(accuracy[place].mean() - accuracy[against].mean(), low, high)


def arm_protocol(records: Sequence[Mapping]) -> str:
    """Say how the table was made, from the records themselves."""
    first = records[0]
    tests = {(record.get("corpus"), record["fold"]): record["test_speakers"] for record in records}
    seeds = len({record["seed"] for record in records})
    norm = first["speaker_norm"]
    unknown = [label for label in first.get("labels", ()) if label not in first.get("score_labels", first["labels"])]
    parts = [
        f"UA over the test speakers of all folds ({many(len(tests), 'fold')}, "
        f"{many(sum(tests.values()), 'speaker')}), mean ± standard deviation over {many(seeds, 'seed')}.",
        f"Protocol: {first['protocol']}.",
        f"Encoder: {first['encoder']}.",
        *(text.format(first[key]) for key, text in SENTENCES.items() if first.get(key)),
        f"No score for {', '.join(unknown)}: what gives them does not know these classes." if unknown else "",
        f"Speaker normalisation: {norm}." if norm != "none" else "",
        f"Fine-tuning: {_steps(records)} steps; {first['selection']}.",
        "Intervals and paired differences: bootstrap over test speakers and seeds.",
        f"Code {first['code_version']}.",
    ]
    return " ".join(part for part in parts if part)


def _steps(records: Sequence[Mapping]) -> str:
    """Say how many optimiser steps were made: an epoch that was begun is finished, so folds may differ by some."""
    made = sorted({record["steps"] for record in records})
    return f"{made[0]}" if len(made) == 1 else f"{made[0]} to {made[-1]}"
