"""The papers' baselines against references written another way, what they remember, and selection without labels."""

import contextlib
import functools
import json
import math

import numpy as np
import pytest
import torch
from adaptation_support import RECIPE, TEST, UTTERANCES, C, distributions, make_world, recipe, some_survey
from safetensors.torch import load_file

from speechbrain_mifuse.adaptation import selection
from speechbrain_mifuse.adaptation.dine import Dine, adaptive_label_smoothing
from speechbrain_mifuse.adaptation.fusion import (
    exponential_weight,
    prior_corrected,
    product_of_experts,
    reciprocal_weight,
)
from speechbrain_mifuse.adaptation.method import AdaptationMethod, Outputs, Teachers
from speechbrain_mifuse.adaptation.mi_fuse import EntropyFusion, MIFuse
from speechbrain_mifuse.adaptation.nrc import Nrc, nearest, neighbourhood
from speechbrain_mifuse.adaptation.prode import Prode, denoised
from speechbrain_mifuse.adaptation.references import LalmSfuda, LalmZeroShot, ZeroTraining
from speechbrain_mifuse.adaptation.shot import Shot, centroid_labels
from speechbrain_mifuse.brains import adaptation as brains
from speechbrain_mifuse.experiments.same_settings import SettingsError
from speechbrain_mifuse.utils.errors import UserError

REMEMBERING = {"shot": "labels", "nrc": "features", "dine": "memory", "prode_style": "source"}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def world(filled_store, tmp_path):
    return make_world(filled_store, tmp_path)


def batch_of(survey, rows):
    """A batch that is some rows of a survey."""
    rows = torch.tensor(rows)
    return Teachers(survey.lalm[rows], survey.lalm_mask[rows], lambda: survey.classifier()[rows], rows=rows)


def h(p):
    return -sum(x * math.log(x) for x in p if x > 0)


def softmax(logits):
    top = max(logits)
    return [math.exp(x - top) / sum(math.exp(y - top) for y in logits) for x in logits]


def information_by_hand(probs):
    mean = [sum(p[c] for p in probs) / len(probs) for c in range(C)]
    return sum(map(h, probs)) / len(probs) - h(mean)


# SHOT.


def centroid_labels_by_hand(hidden, probs):
    """As SHOT describes it, utterance by utterance in NumPy."""
    rows = np.concatenate([hidden, np.ones((len(hidden), 1))], axis=1)
    rows = [row / np.sqrt((row * row).sum()) for row in rows]
    labels, affinity = probs.argmax(1), probs
    for _ in range(2):
        known = sorted(set(labels.tolist()))
        centroids = {c: sum(a[c] * row for a, row in zip(affinity, rows, strict=True)) for c in known}
        cosines = [{c: row @ centre / np.linalg.norm(centre) for c, centre in centroids.items()} for row in rows]
        labels = np.array([max(known, key=found.get) for found in cosines])
        affinity = np.eye(probs.shape[1])[labels]
    return labels


@pytest.mark.parametrize("seed", range(5))
def test_shots_pseudo_labels_are_those_found_one_by_one(seed):
    torch.manual_seed(seed)
    hidden, probs = torch.randn(60, 5).relu(), distributions(60)
    labels = centroid_labels(hidden, probs)
    assert labels.argmax(1).tolist() == centroid_labels_by_hand(hidden.numpy(), probs.numpy()).tolist()
    assert labels.sum(1).tolist() == [1.0] * 60 and labels.max() == 1


def test_shot_gives_no_pseudo_label_of_a_class_that_nobody_is_assigned_to():
    probs = distributions(60)
    probs[:, 2] = 0
    assert not centroid_labels(torch.randn(60, 5).relu(), probs)[:, 2].any()


def test_shot_moves_utterances_to_the_centroid_they_lie_at_and_not_the_class_they_were_predicted():
    hidden = torch.eye(2).repeat_interleave(10, 0) * 5
    probs = torch.tensor([[0.8, 0.2]] * 10 + [[0.2, 0.8]] * 10)
    probs[3], probs[17] = torch.tensor([0.3, 0.7]), torch.tensor([0.6, 0.4])
    assert centroid_labels(hidden, probs).argmax(1).tolist() == [0] * 10 + [1] * 10


def test_shots_loss_is_that_counted_by_hand():
    logits, classes = torch.randn(7, C), torch.randint(0, C, (7,))
    student = Outputs(torch.zeros(7, 8), torch.zeros(7, 3), logits)
    probs = [softmax(row) for row in logits.tolist()]
    pseudo = -sum(math.log(p[c]) for p, c in zip(probs, classes.tolist(), strict=True)) / 7
    expected = 0.3 * pseudo + information_by_hand(probs)
    assert float(Shot().loss(student, torch.eye(C)[classes])) == pytest.approx(expected, abs=1e-5)


def test_shot_gives_each_utterance_of_a_batch_its_own_pseudo_label():
    survey, method = some_survey(), Shot()
    method.refresh(survey)
    expected = centroid_labels(survey.student().hidden, survey.student().probs)
    assert method.targets(batch_of(survey, [7, 2, 11])).equal(expected[[7, 2, 11]])


# NRC.


def neighbourhood_by_hand(features, scores, row, k, kk, weak):
    """As NRC describes it, for one utterance, from the whole matrix of cosines."""
    cosine = np.array(features) @ np.array(features).T
    np.fill_diagonal(cosine, -np.inf)
    ranked = np.argsort(-cosine, axis=1, kind="stable")
    total = np.zeros(scores.shape[1])
    for neighbour in ranked[row, : min(k, len(ranked) - 1)]:
        own = ranked[neighbour, : min(kk, len(ranked) - 1)]
        total += (1.0 if row in own else weak) * scores[neighbour].numpy()
        total += weak * sum(scores[other].numpy() for other in own)
    return total


@pytest.mark.parametrize(("k", "kk"), [(4, 3), (1, 1), (5, 2), (30, 30)])
def test_nrcs_neighbourhood_is_that_found_from_the_whole_matrix(k, kk):
    features = torch.nn.functional.normalize(torch.randn(25, 6), dim=1)
    scores, rows = distributions(25), torch.tensor([3, 24, 0, 11])
    found = neighbourhood(features, scores, rows, k, kk, 0.1)
    expected = [neighbourhood_by_hand(features, scores, int(row), k, kk, 0.1) for row in rows]
    torch.testing.assert_close(found, torch.tensor(np.array(expected), dtype=torch.float32), atol=1e-5, rtol=1e-5)


def test_nrc_compares_in_blocks_what_it_would_compare_at_once():
    bank = torch.nn.functional.normalize(torch.randn(300, 6), dim=1)
    rows = torch.randperm(300)[:100]
    assert nearest(bank, rows, 5, block=7).equal(nearest(bank, rows, 5, block=1000))


def test_an_utterance_is_never_its_own_neighbour_even_among_equal_ones():
    found = nearest(torch.ones(10, 3) / math.sqrt(3), torch.arange(10), 4)
    assert not (found == torch.arange(10).unsqueeze(1)).any()


def test_nrc_updates_its_banks_with_the_batch_before_it_reads_them_and_its_loss_is_that_by_hand():
    survey, method, rows = some_survey(), Nrc(), torch.tensor([1, 5, 8])
    method.start(survey)
    before = {name: bank.clone() for name, bank in method.state.items()}
    student = Outputs(torch.zeros(3, 8), torch.rand(3, 6), torch.randn(3, C))
    loss = float(method.loss(student, method.targets(batch_of(survey, rows.tolist()))))
    features, scores = before["features"], before["scores"]
    features[rows], scores[rows] = torch.nn.functional.normalize(student.hidden, dim=1), student.probs
    assert method.state["features"].equal(features) and method.state["scores"].equal(scores)
    around = [neighbourhood_by_hand(features, scores, int(row), 4, 3, 0.1) for row in rows]
    agreement = np.mean([p @ q for p, q in zip(student.probs.numpy(), around, strict=True)])
    assert loss == pytest.approx(-agreement - h(student.probs.mean(0).tolist()), abs=1e-5)


def test_nrcs_banks_carry_no_gradient():
    survey, method = some_survey(), Nrc()
    method.start(survey)
    hidden, logits = (torch.randn(2, n, requires_grad=True) for n in (6, C))
    method.loss(Outputs(torch.zeros(2, 8), hidden, logits), torch.tensor([0, 1])).backward()
    assert logits.grad.any() and hidden.grad is None
    assert not any(bank.requires_grad for bank in method.state.values())


# DINE.


def test_dine_keeps_the_first_answer_as_it_is_and_shares_out_the_rest():
    probs = distributions(20)
    smoothed = adaptive_label_smoothing(probs)
    for row, found in zip(probs.tolist(), smoothed.tolist(), strict=True):
        top = max(row)
        expected = [x if x == top else (1 - top) / (C - 1) for x in row]
        assert found == pytest.approx(expected, abs=1e-6)


def test_dine_starts_from_the_language_model_and_then_takes_the_student_in():
    survey, method = some_survey(), Dine()
    said = torch.where(survey.lalm_available[:, None], survey.lalm_mean, survey.student().probs)
    memory = adaptive_label_smoothing(said)
    for _ in range(3):
        method.refresh(survey)
        torch.testing.assert_close(method.targets(batch_of(survey, [4, 0])), memory[[4, 0]])
        memory = 0.6 * memory + 0.4 * survey.student().probs


def test_dines_loss_is_that_counted_by_hand():
    vectors, targets, head = torch.randn(6, 8), distributions(6), torch.nn.Linear(8, C)
    student = Outputs(vectors, torch.zeros(6, 3), head(vectors), head)
    torch.manual_seed(3)
    loss = float(Dine().loss(student, targets))
    torch.manual_seed(3)
    share, other = float(torch.distributions.Beta(0.3, 0.3).sample()), torch.randperm(6).tolist()

    def divergence(q, p):
        return sum(x * math.log(x / y) for x, y in zip(q, p, strict=True))

    probs = [softmax(row) for row in student.logits.tolist()]
    expected = sum(map(divergence, targets.tolist(), probs)) / 6 + information_by_hand(probs)
    for n, m in enumerate(other):
        mixture = [share * x + (1 - share) * y for x, y in zip(probs[n], probs[m], strict=True)]
        mixed = softmax(head(share * vectors[n] + (1 - share) * vectors[m]).tolist())
        expected += divergence(mixture, mixed) / 6
    assert loss == pytest.approx(expected, abs=1e-5)


# ProDe.


def test_prode_corrects_the_teacher_by_how_far_the_classifier_has_moved():
    for omega in (1.0, 0.5):
        teacher, current, source = distributions(3, 5)
        logits = [
            [math.log(a) + omega * (math.log(b) - math.log(c)) for a, b, c in zip(*rows, strict=True)]
            for rows in zip(teacher.tolist(), current.tolist(), source.tolist(), strict=True)
        ]
        found = denoised(teacher, current, source, omega, floor=1e-9)
        torch.testing.assert_close(found, torch.tensor([softmax(row) for row in logits]), atol=1e-5, rtol=1e-4)


def test_before_the_first_step_prode_repeats_the_teacher_and_leaves_unanswered_utterances_to_the_classifier():
    survey, method = some_survey(), Prode(floor=1e-9)
    method.start(survey)
    targets = method.targets(batch_of(survey, [4, 0, 5]))
    torch.testing.assert_close(targets[[0, 2]], survey.lalm_mean[[4, 5]], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(targets[1], survey.classifier().mean(1)[0])


def test_prode_compares_each_utterance_with_its_own_place_in_what_the_source_said():
    survey, method = some_survey(), Prode()
    method.start(survey)
    moved = Teachers(survey.lalm[4:6], survey.lalm_mask[4:6], lambda: distributions(2, 16), rows=torch.tensor([4, 5]))
    torch.manual_seed(1)
    found = method.targets(moved)
    torch.manual_seed(1)
    current, source = moved.classifier().mean(1), survey.classifier().mean(1)[4:6]
    torch.testing.assert_close(found, denoised(moved.lalm_mean, current, source, 1.0, 0.01))


def test_a_zero_of_the_teacher_or_the_classifier_stays_finite():
    one_hot = torch.eye(C)
    found = denoised(one_hot, one_hot.flip(0), one_hot.roll(1, 0), omega=3.0, floor=0.01)
    torch.testing.assert_close(found.sum(1), torch.ones(C))


# Entropy in the place of mutual information.


def test_entropy_fusion_weighs_by_the_entropy_of_each_teachers_mean():
    survey = some_survey()
    method = EntropyFusion(weight=functools.partial(exponential_weight, temperature=0.5))
    found = method.targets(batch_of(survey, [1, 4]))
    for row, target in zip((1, 4), found, strict=True):
        lalm, classifier = survey.lalm_mean[row].tolist(), survey.classifier()[row].mean(0).tolist()
        f = [math.exp(-h(p) / math.log(C) / 0.5) for p in (lalm, classifier)]
        expected = [(f[0] * a + f[1] * b) / sum(f) for a, b in zip(lalm, classifier, strict=True)]
        assert target.tolist() == pytest.approx(expected, abs=1e-5)
    assert set(method.statistics) == {"lalm_weight", "lalm_entropy", "classifier_entropy"}


# Without training.


def test_prior_correction_divides_by_the_prior_and_leaves_silence_alone():
    means, prior = distributions(6), distributions(1)[0]
    means[2] = 0
    found = prior_corrected(means, prior)
    for row, corrected in zip(means.tolist(), found.tolist(), strict=True):
        ratio = [p / q for p, q in zip(row, prior.tolist(), strict=True)]
        assert corrected == pytest.approx([x / max(sum(ratio), 1e-30) for x in ratio], abs=1e-6)


def test_a_class_that_a_teacher_never_names_stays_impossible_and_finite():
    found = prior_corrected(torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([0.5, 0.5, 0.0]))
    assert found.tolist() == [[0.5, 0.5, 0.0]]


@pytest.mark.parametrize("exponents", [None, [2.0, 0.5], [torch.rand(8), torch.rand(8)]])
def test_a_product_of_experts_is_the_normalised_product_of_powers(exponents):
    first, second = distributions(8), distributions(8)
    e, f = (torch.as_tensor(x).view(-1, 1) for x in exponents or (1.0, 1.0))
    product = first**e * second**f
    found = product_of_experts([first, second], exponents)
    torch.testing.assert_close(found, product / product.sum(1, keepdim=True), atol=1e-5, rtol=1e-4)


def test_an_expert_without_an_answer_takes_no_part_in_the_product():
    first, second = distributions(2), distributions(2)
    second[0] = 0
    torch.testing.assert_close(product_of_experts([first, second])[0], first[0], atol=1e-6, rtol=1e-5)
    assert product_of_experts([first * 0, second])[0].tolist() == [0.0] * C


def test_zero_training_multiplies_both_teachers_after_dividing_each_by_its_average_on_the_adaptation_set():
    adapt, test, method = some_survey(), some_survey(n=9), ZeroTraining()
    method.start(adapt)
    answered = [row.tolist() for row, said in zip(adapt.lalm_mean, adapt.lalm_available, strict=True) if said]
    lalm_prior = [sum(p[c] for p in answered) / len(answered) for c in range(C)]
    classifier_prior = adapt.classifier().mean((0, 1)).tolist()
    for n, found in enumerate(method.predict(test).tolist()):
        lalm, classifier = test.lalm_mean[n].tolist(), test.classifier()[n].mean(0).tolist()
        product = [p / q for p, q in zip(classifier, classifier_prior, strict=True)]
        if test.lalm_available[n]:
            product = [x * p / q for x, p, q in zip(product, lalm, lalm_prior, strict=True)]
        assert found == pytest.approx([x / sum(product) for x in product], abs=1e-4)


def test_the_language_model_alone_asks_neither_student_nor_classifier():
    survey = some_survey()
    alone = survey.__class__(survey.lalm, survey.lalm_mask, lambda: pytest.fail("asked"), student=lambda: 1 / 0)
    assert LalmZeroShot().predict(alone).equal(survey.lalm_mean)


@pytest.mark.parametrize("name", ["shot", "nrc"])
def test_methods_of_one_model_do_not_ask_a_language_model(name):
    assert recipe("x")["methods"][name].answers_for == ()


# Selection without labels.


def test_soft_neighbourhood_density_is_that_counted_by_hand():
    rows = distributions(7).tolist()
    unit = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in rows]
    total = 0.0
    for n, row in enumerate(unit):
        cosines = [sum(x * y for x, y in zip(row, other, strict=True)) for m, other in enumerate(unit) if m != n]
        total += h(softmax([cosine / 0.05 for cosine in cosines]))
    assert float(selection.soft_neighbourhood_density(torch.tensor(rows))) == pytest.approx(total / 7, abs=1e-5)


def test_soft_neighbourhood_density_is_the_same_in_blocks_and_looks_at_no_more_rows_than_allowed():
    probs = distributions(50)
    whole = selection.soft_neighbourhood_density(probs)
    torch.testing.assert_close(selection.soft_neighbourhood_density(probs, block=7), whole)
    torch.testing.assert_close(
        selection.soft_neighbourhood_density(probs, most=20), selection.soft_neighbourhood_density(probs[::3])
    )


def test_entropy_and_information_are_those_counted_by_hand():
    probs = distributions(9)
    assert float(selection.negative_entropy(probs)) == pytest.approx(-sum(map(h, probs.tolist())) / 9, abs=1e-5)
    assert float(selection.information_maximisation(probs)) == pytest.approx(
        -information_by_hand(probs.tolist()), abs=1e-5
    )


def test_every_criterion_is_a_rule_and_prefers_the_greatest_value_and_of_equal_ones_the_latest():
    assert {*selection.CRITERIA, "last"} == set(selection.RULES)
    snapshots = [
        {"step": n, **dict.fromkeys(selection.CRITERIA, value)} for n, value in enumerate((1.0, 3.0, 3.0, 2.0))
    ]
    assert selection.chosen_snapshot(snapshots, "last")["step"] == 3
    assert {selection.chosen_snapshot(snapshots, name)["step"] for name in selection.CRITERIA} == {2}


def test_an_unknown_rule_is_an_error_before_anything_is_done(world):
    with pytest.raises(UserError, match="'ua' is none of last, snd, information_maximisation, entropy"):
        world.adapt(selection="ua")
    assert not (world.folder / "out").exists()


# The Brain's hooks.


class Spy(AdaptationMethod):
    """Write down when each hook is called."""

    refreshes = 3

    def __init__(self):
        super().__init__()
        self.calls = []

    def start(self, survey):
        assert self.state == {}
        self.calls.append("start")
        self.first = survey.student()

    def refresh(self, survey):
        self.calls.append("refresh")

    def targets(self, teachers):
        self.calls.append(teachers.rows.tolist())
        return teachers.lalm_mean


def test_a_method_is_started_once_refreshed_evenly_and_told_the_rows_of_each_batch(world):
    spy = Spy()
    spy.state = {"left over": torch.ones(1)}
    world.adapt("spy", method=spy, number_of_steps=18)
    assert spy.calls[0] == "start" and spy.calls.count("start") == 1
    refreshes = [n for n, call in enumerate(spy.calls) if call == "refresh"]
    assert refreshes == [1, 8, 15]  # 9 epochs of two steps, every third begins with one
    batches = [call for call in spy.calls if isinstance(call, list)]
    assert len(batches) == 18 and all(len(set(rows)) == 8 for rows in batches)
    assert {row for rows in batches for row in rows} == set(range(20))


def test_a_method_is_refreshed_within_epochs_where_these_are_few(world):
    spy = Spy()
    spy.refreshes = 5
    world.adapt("spy", method=spy, number_of_steps=20, batch_size=2)
    refreshes = [n for n, call in enumerate(spy.calls) if call == "refresh"]
    assert refreshes == [1, 6, 11, 16, 21]  # 2 epochs of ten steps, each fourth step after one


def test_a_survey_is_that_of_the_source_before_the_first_step_in_the_order_of_the_set(world):
    spy = Spy()
    world.adapt("spy", method=spy)
    model = RECIPE.load_classifier(world.source, ("angry", "happy", "neutral", "sad"), world.front.store.fingerprint)
    for n, key in enumerate(UTTERANCES):
        vectors, hidden, logits = model.eval().parts(world.front.read(key, "").float()[None])
        torch.testing.assert_close(spy.first.vectors[n], vectors[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(spy.first.hidden[n], hidden[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(spy.first.logits[n], logits[0], atol=1e-5, rtol=1e-4)


def test_the_rows_of_a_batch_are_those_of_its_utterances(world, monkeypatch):
    seen, teachers = [], brains.AdaptationBrain.teachers
    monkeypatch.setattr(
        brains.AdaptationBrain,
        "teachers",
        lambda brain, batch: seen.append((batch.id, found := teachers(brain, batch))) or found,
    )
    world.adapt()
    keys = list(UTTERANCES)
    assert seen and all([keys[row] for row in found.rows] == list(ids) for ids, found in seen)


def test_frozen_parts_stay_byte_identical_and_the_others_move(world):
    world.adapt("shot")
    before = load_file(world.source / "classifier.safetensors")
    after = load_file(world.folder / "out" / "shot" / "student.safetensors")
    same = {name for name in before if before[name].equal(after[name])}
    assert {"output.weight", "output.bias"} <= same
    assert not same & {"hidden.weight", "pooling.project.weight", "norm.running_mean"}


def test_an_utterance_that_a_method_does_not_answer_is_missing_from_its_predictions(world):
    class Silent(LalmSfuda):
        def predict(self, test):
            return test.student().probs * (test.rows > 3).unsqueeze(1)

    assert set(world.adapt("silent", method=Silent())) == set(list(TEST)[4:])


# Resuming.


class Killed(Exception):
    """Stands for the end of a process."""


@contextlib.contextmanager
def killed_at(monkeypatch, owner, name, call):
    """Let the block end at the given call of a function."""
    original, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, counted)
        yield


def everything(folder):
    """All results of a method but its checkpoints, and the log, which tells of what was done twice."""
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.suffix in (".json", ".safetensors") and "save" not in path.relative_to(folder).parts
    }


@pytest.mark.parametrize("name", REMEMBERING)
def test_a_killed_run_of_a_method_that_remembers_ends_as_an_unbroken_one(name, world, monkeypatch):
    world.adapt(name, "whole", number_of_steps=20)
    with killed_at(monkeypatch, brains.AdaptationBrain, "on_fit_batch_end", 15):
        world.adapt(name, "broken", number_of_steps=20)
    begun, fitted = [], brains.AdaptationBrain.fit_batch
    monkeypatch.setattr(brains.AdaptationBrain, "fit_batch", lambda *args: begun.append(1) or fitted(*args))
    world.adapt(name, "broken", number_of_steps=20)
    assert len(begun) == 8  # from the checkpoint of step 12
    assert everything(world.folder / "broken" / name) == everything(world.folder / "whole" / name)


@pytest.mark.parametrize("rule", ["last", "entropy"])
def test_a_run_killed_between_a_snapshot_and_its_checkpoint_ends_with_the_same_snapshots(rule, world, monkeypatch):
    options = {"number_of_steps": 20, "selection": rule}
    world.adapt("nrc", "whole", **options)
    with killed_at(monkeypatch, RECIPE.AtomicCheckpointer, "save_checkpoint", 3):
        world.adapt("nrc", "broken", **options)
    world.adapt("nrc", "broken", **options)
    assert everything(world.folder / "broken" / "nrc") == everything(world.folder / "whole" / "nrc")


@pytest.mark.parametrize(("name", "remembered"), REMEMBERING.items())
def test_what_a_method_remembers_does_not_reach_the_next_run(name, remembered, world):
    method = recipe("x")["methods"][name]
    world.adapt(name, "first", method=method, number_of_steps=4)
    assert len(method.state[remembered]) == 20
    method.state[remembered] = method.state[remembered] * 0 + 1
    world.adapt(name, "second", method=method, number_of_steps=4)
    assert world.weights(name, "second") == world.weights(name, "first")


# Snapshots.


def snapshots(world, name="lalm_sfuda", out="out"):
    return [json.loads(path.read_text()) for path in sorted((world.folder / out / name / "snapshots").glob("*.json"))]


def test_a_run_keeps_its_criteria_and_predictions_at_five_moments_and_the_last_is_its_answer(world):
    answer = world.adapt("lalm_sfuda", number_of_steps=22)
    found = snapshots(world)
    assert [snapshot["step"] for snapshot in found] == [6, 12, 18, 22]
    assert found[-1]["predictions"] == answer and found[0]["predictions"] != answer
    assert all(set(snapshot) == {"step", "predictions", *selection.CRITERIA} for snapshot in found)


def test_criteria_are_those_of_the_student_on_the_adaptation_set(world):
    world.adapt("lalm_sfuda")
    model = RECIPE.load_classifier(world.source, ("angry", "happy", "neutral", "sad"), world.front.store.fingerprint)
    model.load_state_dict(load_file(world.folder / "out" / "lalm_sfuda" / "student.safetensors"))
    probs = torch.cat(
        [model.eval()(world.front.read(key, "").float()[None]).softmax(-1) for key in UTTERANCES]
    ).detach()
    for name, value in selection.criteria(probs).items():
        assert snapshots(world)[-1][name] == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize("rule", selection.CRITERIA)
def test_a_rule_decides_which_student_is_kept_and_predicts(rule, world, monkeypatch):
    values = {"snd": [1, 3, 2, 0], "information_maximisation": [4, 1, 2, 3], "entropy": [0, 1, 5, 2]}
    calls = []

    def planted(probs):
        calls.append(1)
        return {name: float(found[len(calls) - 1]) for name, found in values.items()}

    monkeypatch.setattr(brains, "criteria", planted)
    answer = world.adapt("lalm_sfuda", number_of_steps=22, selection=rule)
    found = snapshots(world)[values[rule].index(max(values[rule]))]
    assert answer == found["predictions"]
    model = RECIPE.load_classifier(world.source, ("angry", "happy", "neutral", "sad"), world.front.store.fingerprint)
    model.load_state_dict(load_file(world.folder / "out" / "lalm_sfuda" / "student.safetensors"))
    for key in TEST:
        expected = model.eval()(world.front.read(key, "").float()[None]).softmax(-1)[0].tolist()
        assert answer[key] == pytest.approx(expected, abs=1e-5)


def test_looking_at_a_run_does_not_change_it(world, monkeypatch):
    world.adapt("mi_fuse", "watched")
    monkeypatch.setattr(RECIPE, "LOG_POINTS", 1)
    world.adapt("mi_fuse", "left alone")
    assert len(snapshots(world, "mi_fuse", "watched")) == 4 and len(snapshots(world, "mi_fuse", "left alone")) == 1
    assert world.weights(out="watched") == world.weights(out="left alone")


# Settings.


@pytest.mark.parametrize(
    ("name", "other", "said"),
    [
        ("nrc", Nrc(neighbours=7), "method.neighbours: 4 -> 7"),
        ("shot", Shot(pseudo_weight=0.5), "method.pseudo_weight: 0.3 -> 0.5"),
        ("dine", Dine(momentum=0.9), "method.momentum: 0.6 -> 0.9"),
        ("prode_style", Prode(omega=2.0), "method.omega: 1.0 -> 2.0"),
        ("mi_fuse", MIFuse(weight=functools.partial(exponential_weight, temperature=3.0)), "temperature: 0.2 -> 3.0"),
        ("mi_fuse", MIFuse(weight=reciprocal_weight), "reciprocal_weight"),
        ("lalm_sfuda", Prode(), r"method: .*LalmSfuda. -> .*Prode"),
    ],
)
def test_another_parameter_of_a_method_in_the_same_folder_is_an_error_naming_it(name, other, said, world):
    world.adapt(name, number_of_steps=2)
    with pytest.raises(SettingsError, match=said):
        world.adapt(name, method=other, number_of_steps=2)


def test_another_rule_of_selection_in_the_same_folder_is_an_error_naming_it(world):
    world.adapt(number_of_steps=2)
    with pytest.raises(SettingsError, match='selection: "last" -> "snd"'):
        world.adapt(number_of_steps=2, selection="snd")


def test_a_parameter_that_a_method_does_not_have_does_not_concern_it(world, monkeypatch):
    world.adapt("lalm_sfuda", number_of_steps=2)
    monkeypatch.setattr(RECIPE, "make_brain", lambda *_: pytest.fail("adapted again"))
    world.adapt("lalm_sfuda", number_of_steps=2, temperature=0.7)


@pytest.mark.parametrize("name", recipe("x")["methods"])
def test_every_method_describes_all_parameters_of_its_constructor_in_jsons_types(name):
    described = recipe("x")["methods"][name].describe()
    assert json.loads(json.dumps(described)) == described and described["method"].startswith("speechbrain_mifuse.")
