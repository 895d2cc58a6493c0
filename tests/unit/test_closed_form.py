"""The closed form of mi_fuse_plus: what it needs, what it does not, and its control."""

import pytest
import torch
from adaptation_support import C, distributions, make_world, some_survey
from torch.nn import functional as F

from speechbrain_mifuse.adaptation.closed_form import ClosedForm, PermutedClosedForm
from speechbrain_mifuse.adaptation.fusion import prior_corrected, product_of_experts
from speechbrain_mifuse.adaptation.geometry import cross_fitted_expert, dealt_folds, discriminant_scores
from speechbrain_mifuse.adaptation.method import Outputs, Survey


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def clustered(n=200, right=0.55):
    """Classes that lie well apart, and two teachers that are each right about half of the time."""
    reference = torch.arange(n) % C
    vectors = 6 * F.one_hot(reference, 8).float() + torch.randn(n, 8)

    def teacher():
        told = torch.where(torch.rand(n) < right, reference, torch.randint(0, C, (n,)))
        return 0.6 * F.one_hot(told, C) + 0.4 * distributions(n, sharpness=1.0)

    lalm, source = teacher(), teacher()
    outputs = Outputs(vectors, vectors, source.log())
    answered = torch.ones(n, 1, dtype=torch.bool)
    return Survey(lalm.unsqueeze(1), answered, classifier=lambda: 1 / 0, student=lambda: outputs), reference


def accuracy(method, survey, reference):
    method.start(survey)
    return float((method.predict(survey).argmax(1) == reference).float().mean())


def test_the_closed_form_mends_what_both_teachers_get_wrong_and_its_permuted_control_does_not():
    survey, reference = clustered()
    teachers = product_of_experts([survey.lalm_mean, survey.student().probs])
    alone = float((teachers.argmax(1) == reference).float().mean())
    assert alone < 0.85
    assert accuracy(ClosedForm(together=1), survey, reference) > 0.98
    assert accuracy(PermutedClosedForm(together=1), survey, reference) < alone + 0.05


def test_the_closed_form_draws_no_random_number_and_asks_for_no_dropout():
    survey, _ = clustered()  # whose classifier samples are an error
    answers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        method = ClosedForm()
        method.start(survey)
        answers.append(method.predict(survey))
        assert torch.get_rng_state().equal(state)
    assert answers[0].equal(answers[1])


def test_the_closed_form_moves_no_weight_of_the_classifier_but_its_statistics_and_takes_no_gradient(
    filled_store, tmp_path, monkeypatch
):
    world = make_world(filled_store, tmp_path)
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_: 1 / 0)
    first = world.adapt("g_closed_form")
    second = world.adapt("g_closed_form", out="again", seed=7)
    assert first == second and len(first) == 10
    assert not (tmp_path / "out" / "g_closed_form" / "student.safetensors").exists()


def test_without_the_language_model_its_answers_change_nothing_and_are_not_asked_for():
    survey, _ = clustered()
    other = Survey(survey.lalm.flip(0), survey.lalm_mask, classifier=lambda: None, student=survey.student)
    answers = []
    for said in (survey, other):
        method = ClosedForm(answers=())
        method.start(said)
        answers.append(method.predict(said))
    assert answers[0].equal(answers[1]) and ClosedForm(answers=()).answers_for == ()
    assert ClosedForm().answers_for == ("adapt", "test")


def test_asked_about_the_adaptation_set_alone_it_needs_no_answer_for_a_test_recording():
    survey, reference = clustered()
    method = ClosedForm(answers=["adapt"], together=1)
    method.start(survey)
    silent = torch.zeros_like(survey.lalm)
    test = Survey(silent, silent.bool().any(2), classifier=lambda: None, student=survey.student)
    assert method.predict(test).equal(method.predict(survey))
    assert float((method.predict(test).argmax(1) == reference).float().mean()) > 0.98


def test_one_round_is_the_discriminant_of_the_corrected_product_worked_step_by_step():
    survey = some_survey(n=40)
    source, lalm = survey.student().probs, survey.lalm_mean
    method = ClosedForm(rounds=1, share_trust=0.0, components=3, together=1)
    method.start(survey)
    method_labels = product_of_experts(
        [prior_corrected(source, source.mean(0)), prior_corrected(lalm, survey.lalm_average(0.0))]
    )
    for _ in range(200):
        method_labels = method_labels / method_labels.mean(0) / C
        method_labels = method_labels / method_labels.sum(1, keepdim=True)
    space = method.space(survey.student().vectors)
    expert = discriminant_scores(space, method_labels, space).softmax(-1)
    expected = product_of_experts(
        [expert, prior_corrected(source, source.mean(0)), prior_corrected(lalm, survey.lalm_average(0.0))]
    )
    assert torch.allclose(method.predict(survey), expected, atol=1e-3)


def test_a_second_round_takes_in_what_the_first_expert_said_of_the_others():
    survey, _ = clustered()
    one, two = (ClosedForm(rounds=n, share_trust=0.0, together=1) for n in (1, 2))
    for method in (one, two):
        method.start(survey)
    space, source = one.space(survey.student().vectors), survey.student().probs
    labels = one.fused(space, survey, source)
    expert = cross_fitted_expert(space, labels, dealt_folds(space, 5, 1))
    # At equal shares the fused labels of the second round are those of the first times G, before they are scaled.
    again = product_of_experts([*one.teachers(survey, source, torch.full((C,), 1 / C)), expert])
    assert (again.argmax(1) == two.fused(space, survey, source).argmax(1)).float().mean() > 0.97


@pytest.mark.parametrize("kept, like", [(1.0, 10), (0.1, 1)])
def test_the_gate_goes_on_where_classes_look_balanced_and_stops_after_one_round_where_they_do_not(kept, like):
    survey, reference = clustered(n=400, right=0.75)
    chosen = (reference < 2) | (torch.arange(len(reference)) % 10 < 10 * kept)
    outputs = Outputs(*(part[chosen] for part in (survey.student().vectors,) * 2), survey.student().logits[chosen])
    skewed = Survey(survey.lalm[chosen], survey.lalm_mask[chosen], classifier=lambda: None, student=lambda: outputs)
    answers = []
    for method in (ClosedForm(balance_gate=0.05), ClosedForm(rounds=like)):
        method.start(skewed)
        answers.append(method.predict(skewed))
    assert answers[0].equal(answers[1])


def test_the_mean_of_the_test_set_moves_while_a_method_answers_and_no_longer(filled_store, tmp_path):
    world = make_world(filled_store, tmp_path)
    plain = world.adapt("g_once")
    moved = world.adapt("g_once_test_mean")
    assert plain.keys() == moved.keys() and plain != moved
    method = ClosedForm(rounds=1, test_mean=True)
    assert method.traits()["transductive"] == "yes" and ClosedForm().traits()["transductive"] == "no"
    assert method.describe()["method.test_mean"] is True and "method.test_mean" not in ClosedForm().describe()


def test_a_set_smaller_than_its_folds_and_components_is_no_trouble():
    survey = some_survey(n=3)
    method = ClosedForm()
    method.start(survey)
    assert method.predict(survey).isfinite().all()
