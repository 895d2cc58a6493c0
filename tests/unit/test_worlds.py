"""Simulated worlds: what is drawn depends on names alone, and the confirming half tests nobody whom the other tests."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from speechbrain_mifuse.adaptation.closed_form import ClosedForm
from speechbrain_mifuse.adaptation.references import SourceOnly, ZeroTraining
from speechbrain_mifuse.nnet.classifier import EmotionClassifier

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import worlds

LABELS = ["angry", "happy", "neutral", "sad"]


def recordings(n=400, speakers=10):
    draw = np.random.default_rng(0)
    who = np.array([f"s{i % speakers}" for i in range(n)])
    labels = draw.integers(0, 4, n)
    vectors = torch.randn(n, 16, generator=torch.Generator().manual_seed(0))
    vectors[:, :4] += 3 * torch.nn.functional.one_hot(torch.tensor(labels), 4)
    answers = torch.full((n, 5, 4), 0.1).scatter_(2, torch.tensor(labels)[:, None, None].expand(n, 5, 1), 0.7)
    splits = np.where(np.isin(who, [f"s{i}" for i in range(6)]), "adapt", "test")
    return worlds.Recordings(vectors, answers, labels, who, splits)


def test_the_confirming_half_tests_speakers_whom_the_choosing_half_adapts_to():
    found = recordings()
    (adapt_a, test_a), (adapt_b, test_b) = found.halves("A"), found.halves("B")
    for adapt, test in ((adapt_a, test_a), (adapt_b, test_b)):
        assert set(found.speakers[adapt]).isdisjoint(found.speakers[test])
    assert set(found.speakers[test_b]) < set(found.speakers[adapt_a])
    assert set(found.speakers[test_a]) < set(found.speakers[adapt_b])


def test_every_pair_and_every_class_alone_is_cut_to_both_shares():
    named = worlds.skewed_worlds(LABELS)
    assert len(named) == 1 + 2 * (6 + 4) and named["angry+sad 20%"] == {0: 0.2, 3: 0.2}
    found = recordings()
    adapt, _ = found.halves("A")
    kept = worlds.thinned(found, adapt, named["angry+sad 20%"], worlds.generator("a"))
    before, after = (np.bincount(found.labels[chosen], minlength=4) for chosen in (adapt, kept))
    assert (after[[1, 2]] == before[[1, 2]]).all() and after[0] == round(0.2 * before[0])
    assert (kept == worlds.thinned(found, adapt, named["angry+sad 20%"], worlds.generator("a"))).all()


@pytest.mark.parametrize("number", range(0, 24, 5))
def test_a_natural_world_holds_to_its_limits_and_its_test_set_has_every_class(number):
    found, world = recordings(speakers=20), worlds.natural_worlds()[number]
    adapt, test = worlds.natural(found, world, *found.halves("A"))
    again = worlds.natural(found, world, *found.halves("A"))
    assert (adapt == again[0]).all() and (test == again[1]).all()
    assert len(adapt) <= world["clips"] and set(found.labels[test]) == set(range(4))
    assert set(found.speakers[adapt]).isdisjoint(found.speakers[test])


def test_a_telephone_leaves_length_and_scale_and_nothing_above_its_band():
    wave = np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    heard = worlds.telephone(wave, "a")
    power = np.abs(np.fft.rfft(heard)) ** 2
    assert len(heard) == len(wave) and np.abs(heard).max() < 1
    assert power[4100:].sum() < 0.01 * power.sum()
    assert (heard == worlds.telephone(wave, "a")).all() and (heard != worlds.telephone(wave, "b")).any()


def test_a_method_answers_on_vectors_as_its_class_says():
    found = recordings()
    model = EmotionClassifier(8, 4).eval()
    adapt, test = found.halves("A")
    with torch.no_grad():
        source = model.output(model.hidden_units(model.norm(found.vectors[test]))).softmax(-1)
    assert torch.allclose(worlds.predict(SourceOnly(), model, found, adapt, test), source, atol=1e-6)
    # A shift of the whole test set is taken back, but only by a method that sees the set together.
    far = worlds.Recordings(found.vectors.clone(), found.answers, found.labels, found.speakers, found.splits)
    far.vectors[test] += 3.0
    for test_mean in (False, True):
        method = SourceOnly(target_statistics=True, test_mean=test_mean)
        near, moved = (worlds.predict(method, model, each, adapt, test) for each in (found, far))
        assert torch.allclose(near, moved, atol=1e-4) == test_mean
    # Both read the teacher's answers, which are right; the source is not trained.
    for method in (ZeroTraining(), ClosedForm(), ClosedForm(balance_gate=0.05)):
        assert worlds.accuracy(worlds.predict(method, model, found, adapt, test), found.labels[test]) > 0.95


def test_a_table_compares_within_transfers(tmp_path):
    rows = []
    for number, pair in enumerate([("a", "b"), ("b", "a")]):
        for method, value in (("zero_training", 0.5), ("zero_training_adabn", 0.5), ("g_gate", 0.6 + 0.02 * number)):
            row = dict(family="skew", world="sad 5%", half="B", source=pair[0], target=pair[1], teacher="c")
            rows.append({**row, "method": method, "seed": 1, "UA": value, "n_adapt": 9, "n_test": 9})
    worlds.append(tmp_path / "records.csv", rows)
    text = worlds.tables(tmp_path / "records.csv", tmp_path)
    assert "Half B (confirms)" in text and "| g_gate |" in text and "+11.0 ± 12.7" in text
    assert (tmp_path / "skew.csv").read_text().count("\n") == 7
    assert "g_gate | 61.0 | +11.0 ± 12.7" in (tmp_path / "what_helps.md").read_text()
    assert (tmp_path / "what_helps.png").stat().st_size > 1000
