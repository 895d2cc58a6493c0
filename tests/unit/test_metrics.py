"""Metrics and intervals against counting by hand."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from speechbrain_mifuse.evaluation.metrics import confusion, scores, scores_of, speaker_counts, speaker_interval

C = 4


@pytest.fixture
def predictions():
    """Predicted and reference classes of 200 utterances, some without a prediction."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.randint(0, C, (200,), generator=generator)
    guess = torch.randint(-1, C, (200,), generator=generator)
    right = torch.rand(200, generator=generator) < 0.5
    return torch.where(right, reference, guess), reference


def by_hand(predicted, reference):
    """UA, WA and macro-F1 from pairs, one class at a time."""
    pairs = list(zip(predicted.tolist(), reference.tolist(), strict=True))
    recalls, f1s = [], []
    for c in sorted(set(reference.tolist())):
        hits = sum(p == c == r for p, r in pairs)
        precision = hits / max(sum(p == c for p, _ in pairs), 1)
        recall = hits / sum(r == c for _, r in pairs)
        recalls.append(recall)
        f1s.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    accuracy = sum(p == r for p, r in pairs) / len(pairs)
    return {"UA": sum(recalls) / len(recalls), "WA": accuracy, "macro_F1": sum(f1s) / len(f1s)}


def test_scores_are_those_counted_by_hand(predictions):
    assert scores(*predictions, C) == pytest.approx(by_hand(*predictions))


def test_unweighted_and_weighted_accuracy_differ_when_classes_are_unequal():
    found = scores(torch.zeros(10, dtype=torch.long), torch.tensor([0] * 9 + [1]), 2)
    assert (found["UA"], found["WA"]) == (0.5, 0.9)


def test_a_class_that_does_not_occur_is_left_out_of_the_means():
    predicted, reference = torch.tensor([0, 1, 3]), torch.tensor([0, 1, 1])
    assert scores(predicted, reference, C) == pytest.approx(by_hand(predicted, reference))
    assert scores(predicted, reference, C)["UA"] == 0.75


def test_a_missing_prediction_is_wrong_for_its_class_and_false_for_none():
    counts = confusion(torch.tensor([-1, 0, 1]), torch.tensor([0, 0, 1]), 2)
    assert counts.tolist() == [[1, 0, 1], [0, 1, 0]]
    assert scores_of(counts)["UA"] == 0.75
    assert scores_of(counts)["macro_F1"] == pytest.approx((2 / 3 + 1) / 2)


def test_confusion_has_references_in_rows(predictions):
    predicted, reference = predictions
    counts = confusion(predicted, reference, C)
    assert counts.shape == (C, C + 1) and counts.sum() == 200
    for row in range(C):
        for column in range(C):
            assert counts[row, column] == ((reference == row) & (predicted == column)).sum()
        assert counts[row, C] == ((reference == row) & (predicted == -1)).sum()


def test_counts_of_speakers_add_up_and_are_sorted_by_name(predictions):
    speakers = [f"s{number % 7}" for number in range(200)]
    counts = speaker_counts(*predictions, speakers, C)
    assert counts.sum(0).equal(confusion(*predictions, C))
    own = torch.tensor([speaker == "s3" for speaker in speakers])
    assert counts[3].equal(confusion(predictions[0][own], predictions[1][own], C))


def test_the_interval_is_over_speakers_not_utterances():
    right, wrong = torch.tensor([[50, 0, 0], [0, 50, 0]]), torch.tensor([[0, 50, 0], [50, 0, 0]])
    assert speaker_interval(torch.stack([right, wrong])) == (0.0, 1.0)
    assert speaker_interval(torch.stack([right + wrong] * 2)) == (0.5, 0.5)


def test_of_equal_speakers_the_interval_is_students_over_their_scores():
    hits = [9, 7, 5]
    counts = torch.tensor([[[n, 10 - n, 0], [0, 10, 0]] for n in hits])
    scores = np.array([(n / 10 + 1) / 2 for n in hits])
    half = stats.t.ppf(0.975, 2) * scores.std(ddof=1) / math.sqrt(3)
    assert speaker_interval(counts) == pytest.approx((scores.mean() - half, min(scores.mean() + half, 1)))


def test_one_speaker_tells_nothing_of_others():
    assert speaker_interval(torch.tensor([[[9, 1, 0], [0, 10, 0]]])) == (0.0, 1.0)


def test_a_class_that_nobody_said_takes_no_part():
    both = torch.tensor([[[4, 1, 0, 0], [0, 5, 0, 0], [0, 0, 0, 0]], [[5, 0, 0, 0], [0, 5, 0, 0], [0, 0, 0, 0]]])
    assert speaker_interval(both) == pytest.approx(speaker_interval(both[:, :2][:, :, [0, 1, 3]]))


def test_the_interval_narrows_with_more_speakers_and_holds_the_mean():
    generator = torch.Generator().manual_seed(0)
    hits = torch.randint(5, 16, (40, 2), generator=generator)
    counts = torch.zeros(40, 2, 3, dtype=torch.long)
    counts[:, 0, 0], counts[:, 0, 1] = hits[:, 0], 20 - hits[:, 0]
    counts[:, 1, 1], counts[:, 1, 0] = hits[:, 1], 20 - hits[:, 1]
    (low, high), (few_low, few_high) = speaker_interval(counts), speaker_interval(counts[:6])
    assert low < scores_of(counts.sum(0))["UA"] < high
    assert high - low < 0.6 * (few_high - few_low)


@pytest.mark.parametrize("speakers", [2, 4, 10])
def test_intervals_of_few_speakers_hold_the_truth_about_as_often_as_they_say(speakers):
    rng = np.random.default_rng(0)
    skill = np.clip(rng.normal(0.6, 0.1, (1000, speakers, 2)), 0, 1)
    hits = rng.binomial(20, skill)
    counts = np.zeros((1000, speakers, 2, 3), int)
    for label in range(2):
        counts[..., label, label], counts[..., label, 1 - label] = hits[..., label], 20 - hits[..., label]
    bounds = np.array([speaker_interval(torch.from_numpy(each)) for each in counts])
    held = ((bounds[:, 0] <= 0.6) & (bounds[:, 1] >= 0.6)).mean()
    assert 0.93 < held < 0.97
