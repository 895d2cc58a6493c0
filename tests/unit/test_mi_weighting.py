"""The trial of weights by uncertainty: its two controls, and what it scores."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import mi_weighting

from speechbrain_mifuse.adaptation.uncertainty import entropy


def teacher(labels, sure, generator):
    """A teacher that is right where it is sure, and says anything, unsurely, elsewhere."""
    right = 6.0 * torch.nn.functional.one_hot(labels, 4)
    noise = torch.randn(len(labels), 5, 4, generator=generator)
    return torch.where(sure[:, None, None], right[:, None] + 0.1 * noise, 3 * noise).softmax(-1)


def test_where_uncertainty_says_who_is_right_the_weights_beat_both_controls():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    sure = torch.rand(400, generator=generator) < 0.5
    teachers = [teacher(labels, sure, generator), teacher(labels, ~sure, generator)]
    rows = list(mi_weighting.trials(teachers, teachers, labels.numpy(), seed=1))
    assert len(rows) == 2 * 2 * 4 * 4 * 2
    found = next(
        row for row in rows if (row["uncertainty"], row["scale"], row["fusion"]) == ("MI", "tau .05", "mixture")
    )
    assert found["UA"] > 0.95 and found["UA"] > found["UA_permuted"] + 0.1 and found["UA"] >= found["UA_equal"]


def test_temperatures_give_the_entropy_that_is_asked_for():
    samples = torch.randn(50, 5, 4, generator=torch.Generator().manual_seed(0)).softmax(-1)
    for wanted in (1.15, 1.35):
        assert abs(float(entropy(mi_weighting.at_entropy(samples, wanted).mean(1)).mean()) - wanted) < 0.01


def test_the_table_shows_what_half_a_chose_with_what_half_b_says(tmp_path):
    rows = []
    for half, source, better in ((h, s, b) for h in "AB" for s in "xy" for b in (0, 1)):
        gain = 0.1 * better if half == "A" else -0.1 * better
        row = dict(half=half, source=source, target="t", seed=1, answers="a", prior="as is", calibration="as is")
        row |= dict(uncertainty="MI", scale="rank", fusion=("mixture", "product")[better])
        rows.append(row | dict(UA=0.5 + gain, UA_permuted=0.5, UA_equal=0.5))
    mi_weighting.append(tmp_path / "records.csv", rows, mi_weighting.COLUMNS)
    text = mi_weighting.table(tmp_path / "records.csv", tmp_path)
    assert "rank, product | +10.0" in text and "-10.0 ± 0.0" in text
    assert len((tmp_path / "mi_weighting.csv").read_text().splitlines()) == 5
