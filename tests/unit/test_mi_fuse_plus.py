"""The expert on the target's geometry against counting by hand, and the product that it joins."""

import numpy as np
import pytest
import torch

from speechbrain_mifuse.adaptation.geometry import (
    cross_fitted_expert,
    dealt_folds,
    discriminant_scores,
    principal_components,
    with_class_shares,
)
from speechbrain_mifuse.adaptation.method import Outputs, Survey, Teachers
from speechbrain_mifuse.adaptation.mi_fuse import MIFuse
from speechbrain_mifuse.adaptation.mi_fuse_plus import MIFusePlus, PermutedMIFusePlus, ProductFusion

C = 4


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def distributions(*shape, sharpness=2.0):
    return (sharpness * torch.randn(*shape, C)).softmax(-1)


def world(counts=(60, 60, 60, 60), noise=2.0, preference=(0.0, 0.0, 0.0, 0.0)):
    """Classes that lie apart, and two teachers that often err: (truth, survey)."""
    truth = torch.repeat_interleave(torch.arange(C), torch.tensor(counts))
    vectors = 4 * torch.nn.functional.one_hot(truth, 10).float() + torch.randn(len(truth), 10)

    lalm = 2.0 * torch.nn.functional.one_hot(truth, C) + noise * torch.randn(len(truth), C) + torch.tensor(preference)
    classifier = 2.0 * torch.nn.functional.one_hot(truth, C) + noise * torch.randn(len(truth), C)
    outputs = Outputs(vectors, vectors, classifier)
    survey = Survey(
        lalm.softmax(-1).unsqueeze(1),
        torch.ones(len(truth), 1, dtype=torch.bool),
        classifier=lambda: classifier.softmax(-1).unsqueeze(1),
        rows=torch.arange(len(truth)),
        student=lambda: outputs,
    )
    return truth, survey


def fitted(method, survey, times=5):
    method.start(survey)
    for _ in range(times):
        method.refresh(survey)
    return method


def accuracy(probs, truth):
    return float((probs.argmax(1) == truth).float().mean())


# The pure functions.


def test_principal_components_keep_all_distances_when_none_is_left_out():
    vectors = torch.randn(30, 6)
    torch.testing.assert_close(
        torch.pdist(principal_components(vectors, 6)), torch.pdist(vectors), atol=1e-4, rtol=1e-4
    )


def test_principal_components_are_the_leading_eigenvectors_of_the_covariance():
    vectors = torch.randn(50, 6) * torch.tensor([5.0, 3.0, 1.0, 0.5, 0.2, 0.1])
    found = principal_components(vectors, 2).numpy().astype(float)
    values = np.linalg.eigvalsh(np.cov(vectors.numpy().astype(float).T))[::-1]
    assert np.cov(found.T) == pytest.approx(np.diag(values[:2]), rel=1e-3, abs=1e-3)


def test_fewer_utterances_than_components_are_no_trouble():
    assert principal_components(torch.randn(3, 20), 256).shape == (3, 3)


@pytest.mark.parametrize("shares", [[0.25] * 4, [0.4, 0.3, 0.2, 0.1]])
def test_scaled_labels_are_distributions_with_the_wanted_shares(shares):
    labels = with_class_shares(distributions(200), torch.tensor(shares), rounds=50)
    torch.testing.assert_close(labels.sum(1), torch.ones(200))
    torch.testing.assert_close(labels.mean(0), torch.tensor(shares), atol=1e-3, rtol=0)


def test_scaling_to_the_shares_that_labels_have_changes_nothing():
    labels = distributions(100)
    torch.testing.assert_close(with_class_shares(labels, labels.mean(0)), labels, atol=1e-5, rtol=1e-4)


def discriminant_by_hand(vectors, labels, query, shrinkage):
    """One query, in numpy, straight from the definition."""
    vectors, labels, query = (value.numpy().astype(float) for value in (vectors, labels, query))
    means = [np.average(vectors, axis=0, weights=labels[:, c]) for c in range(C)]
    within = np.zeros((vectors.shape[1],) * 2)
    for vector, row in zip(vectors, labels, strict=True):
        for c in range(C):
            within += row[c] * np.outer(vector - means[c], vector - means[c])
    within /= labels.sum()
    within = (1 - shrinkage) * within + shrinkage * np.trace(within) / len(within) * np.eye(len(within))
    inverse = np.linalg.inv(within)
    return [query @ inverse @ mean - mean @ inverse @ mean / 2 for mean in means]


@pytest.mark.parametrize("shrinkage", [0.1, 0.3, 1.0])
def test_the_discriminant_is_that_counted_by_hand(shrinkage):
    vectors, labels, query = torch.randn(40, 5), distributions(40), torch.randn(5)
    found = discriminant_scores(vectors, labels, query[None], shrinkage)[0]
    assert found.tolist() == pytest.approx(discriminant_by_hand(vectors, labels, query, shrinkage), rel=1e-3, abs=1e-3)


def test_equal_vectors_give_finite_scores():
    assert discriminant_scores(torch.ones(10, 3), distributions(10), torch.ones(2, 3)).isfinite().all()


def test_a_class_that_no_label_names_gives_finite_scores():
    labels = torch.nn.functional.one_hot(torch.arange(10) % 3, C).float()
    assert discriminant_scores(torch.randn(10, 3), labels, torch.randn(2, 3)).isfinite().all()


def test_no_utterance_is_judged_by_its_own_label_or_those_of_its_fold():
    vectors, labels, folds = torch.randn(50, 5), distributions(50), torch.arange(50) % 5
    before = cross_fitted_expert(vectors, labels, folds)
    changed = labels.clone()
    changed[folds == 2] = distributions(10)
    after = cross_fitted_expert(vectors, changed, folds)
    assert after[folds == 2].equal(before[folds == 2])
    assert (after[folds != 2] != before[folds != 2]).any(1).all()


# The methods.


def test_a_class_that_the_language_model_always_prefers_is_corrected():
    truth, survey = world(preference=(3.0, 0.0, 0.0, 0.0))
    corrected, plain = ProductFusion(), ProductFusion(prior_correction=False)
    for method in (corrected, plain):
        method.start(survey)
    assert float(plain.lalm(survey)[:, 0].mean()) > 0.6
    assert float(corrected.lalm(survey)[:, 0].mean()) < 0.5
    assert accuracy(corrected.targets(survey), truth) > accuracy(plain.targets(survey), truth) + 0.02


def test_the_products_target_is_that_worked_by_hand():
    lalm, classifier = [0.6, 0.2, 0.1, 0.1], [0.1, 0.3, 0.3, 0.3]
    method, answers = MIFusePlus(), torch.tensor([[lalm]])
    method.state = {"lalm_bias": torch.tensor([2.0, 1.0, 1.0, 1.0]), "expert": torch.tensor([[0.7, 0.1, 0.1, 0.1]])}
    method.state["pseudo_answers"] = torch.tensor(0.0)
    teachers = Teachers(answers, torch.ones(1, 1).bool(), lambda: torch.tensor([[classifier]]), rows=torch.tensor([0]))
    raw = [0.6 / 2 * 0.1 * 0.7, 0.2 * 0.3 * 0.1, 0.1 * 0.3 * 0.1, 0.1 * 0.3 * 0.1]
    assert method.targets(teachers)[0].tolist() == pytest.approx([p / sum(raw) for p in raw], abs=1e-5)


def test_an_utterance_without_an_answer_is_left_to_classifier_and_geometry():
    _, survey = world()
    method = fitted(MIFusePlus(), survey)
    mask = survey.lalm_mask.clone()
    mask[:5] = False
    classifier = survey.classifier()
    targets = method.targets(Teachers(survey.lalm * mask[..., None], mask, lambda: classifier, rows=survey.rows))
    expected = classifier.mean(1)[:5] * method.state["expert"][:5]
    torch.testing.assert_close(targets[:5], expected / expected.sum(1, keepdim=True), atol=1e-5, rtol=1e-3)


def test_geometry_mends_what_both_teachers_get_wrong_and_its_permuted_control_does_not():
    truth, survey = world(noise=3.0)
    product, plus = fitted(ProductFusion(), survey), fitted(MIFusePlus(), survey)
    control = fitted(PermutedMIFusePlus(), survey)
    alone = accuracy(product.targets(survey), truth)
    assert alone < 0.75
    assert accuracy(plus.targets(survey), truth) > alone + 0.15
    assert accuracy(control.targets(survey), truth) < alone + 0.05


def test_the_estimated_shares_follow_a_skewed_target():
    truth, survey = world(counts=(100, 100, 20, 20))
    trusting, equal = fitted(MIFusePlus(share_trust=1.0), survey), fitted(MIFusePlus(share_trust=0.0), survey)
    assert trusting.state["expert"].mean(0)[2:].sum() < equal.state["expert"].mean(0)[2:].sum() - 0.05
    assert accuracy(trusting.targets(survey), truth) > accuracy(equal.targets(survey), truth)


def test_the_expert_that_is_not_recursive_does_not_depend_on_how_often_it_was_fitted():
    _, survey = world()
    settings = {"recursive": False, "share_trust": 0.0}
    once, often = (fitted(MIFusePlus(**settings), survey, times).state["expert"] for times in (1, 6))
    assert once.equal(often)
    assert not fitted(MIFusePlus(share_trust=0.0), survey, 6).state["expert"].equal(often)


def test_a_run_begins_with_an_expert_that_says_nothing_and_folds_that_are_always_the_same():
    _, survey = world()
    first, second = MIFusePlus(), MIFusePlus()
    first.start(survey)
    torch.manual_seed(1)
    second.start(survey)
    assert first.state["expert"].unique().tolist() == [0.25]
    assert first.state["folds"].equal(second.state["folds"])
    assert first.state["folds"].unique().tolist() == [0, 1, 2, 3, 4]


def test_takes_of_one_sentence_share_a_fold():
    torch.manual_seed(0)
    sentences = torch.arange(240) % 30
    vectors = 9 * torch.randn(30, 16)[sentences] + torch.randn(240, 16)
    folds = dealt_folds(vectors, folds=5, together=8)
    assert folds.equal(dealt_folds(vectors, folds=5, together=8)) and len(folds.unique()) == 5
    apart = [len(folds[sentences == sentence].unique()) for sentence in range(30)]
    assert sum(count == 1 for count in apart) >= 27
    assert dealt_folds(vectors, folds=5, together=1).bincount().tolist() == [48] * 5


def test_an_expert_that_has_nothing_to_tell_utterances_apart_by_says_nothing():
    vectors = torch.ones(12, 4)
    folds = dealt_folds(vectors, folds=5, together=8)
    assert cross_fitted_expert(vectors, distributions(12), folds).allclose(torch.tensor(0.25))


def test_single_labels_of_the_language_model_are_evidence_and_no_veto():
    named = torch.nn.functional.one_hot(torch.tensor([[0, 0, 0], [1, 1, 2]]), C).float()
    mask, sure = torch.ones(2, 3, dtype=torch.bool), torch.full((2, 5, C), 0.001)
    sure[:, :, 3] = 0.997
    outputs = Outputs(torch.randn(2, 8), torch.zeros(2, 3), torch.zeros(2, C))
    survey = Survey(named, mask, lambda: sure, rows=torch.arange(2), student=lambda: outputs)
    method = ProductFusion(prior_correction=False)
    method.start(survey)
    # Three times the same word: (3 + 1/4) / 4 for it, 1/16 for each of the others.
    assert method.lalm(survey)[0].tolist() == pytest.approx([13 / 16, 1 / 16, 1 / 16, 1 / 16])
    assert method.targets(survey).argmax(1).tolist() == [3, 3]


def test_distributions_are_multiplied_as_they_are():
    _, survey = world()
    method = ProductFusion(prior_correction=False)
    method.start(survey)
    assert torch.equal(survey.lalm_smoothed(method.state["pseudo_answers"]), survey.lalm_mean)


def test_what_the_teachers_say_together_is_their_product_for_a_method_that_multiplies_them():
    survey = world()[1]
    source = survey.classifier()[:, 0]
    method = MIFusePlus(prior_correction=False)
    method.start(survey)
    product = survey.lalm_mean * source
    torch.testing.assert_close(method.consensus(survey, source), product / product.sum(1, keepdim=True))
    torch.testing.assert_close(MIFuse().consensus(survey, source), (survey.lalm_mean + source) / 2)
