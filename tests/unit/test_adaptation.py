"""The equations of MI-Fuse against counting by hand, every method's targets, and the Brain that trains towards them."""

import dataclasses
import math

import pytest
import torch
from adaptation_support import (
    LABELS,
    RECIPE,
    TEST,
    UTTERANCES,
    C,
    distributions,
    make_world,
    recipe,
    some_survey,
    trained_methods,
)
from safetensors.torch import load_file
from torch.nn import functional as F

from speechbrain_mifuse.adaptation.fusion import (
    diversity,
    exponential_weight,
    fused_label,
    reciprocal_weight,
    soft_cross_entropy,
    teacher_weights,
)
from speechbrain_mifuse.adaptation.method import AdaptationMethod, Outputs, Teachers
from speechbrain_mifuse.adaptation.mi_fuse import EntropyFusion, MeanFusion, MIFuse, PermutedMIFuse
from speechbrain_mifuse.adaptation.references import LalmSfuda
from speechbrain_mifuse.adaptation.uncertainty import entropy, masked_mean, mutual_information
from speechbrain_mifuse.brains import adaptation as brains
from speechbrain_mifuse.experiments.same_settings import SettingsError
from speechbrain_mifuse.features import front
from speechbrain_mifuse.inference.recognizer_folder import load_classifier
from speechbrain_mifuse.nnet.classifier import EmotionClassifier


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def some_teachers():
    """Teachers of a batch in which every third utterance is unanswered and the others lack some answers."""
    survey = some_survey()
    return Teachers(survey.lalm, survey.lalm_mask, survey.classifier, torch.arange(12) % C, survey.rows)


# Mutual information.


def mi_by_hand(samples):
    """MI / log C of a list of distributions, in Python floats."""

    def h(p):
        return -sum(x * math.log(x) for x in p if x > 0)

    mean = [sum(p[c] for p in samples) / len(samples) for c in range(C)]
    return (h(mean) - sum(map(h, samples)) / len(samples)) / math.log(C)


def test_mutual_information_is_that_counted_by_hand():
    samples = distributions(50, 5)
    expected = torch.tensor([mi_by_hand(rows) for rows in samples.double().tolist()])
    torch.testing.assert_close(mutual_information(samples), expected.float(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("sharpness", [0.1, 3.0, 300.0])
def test_mutual_information_lies_between_0_and_1(sharpness):
    found = mutual_information(distributions(500, 7, sharpness=sharpness))
    assert (found >= 0).all() and (found <= 1 + 1e-6).all()


def test_mutual_information_reaches_1_when_certain_samples_name_every_class_equally_often():
    torch.testing.assert_close(mutual_information(torch.eye(C)[None]), torch.ones(1))


def test_equal_samples_have_no_mutual_information_however_unsure_they_are():
    samples = distributions(50, 1).expand(-1, 5, -1)
    torch.testing.assert_close(mutual_information(samples), torch.zeros(50), atol=1e-6, rtol=0)


def test_one_hot_samples_have_the_entropy_of_their_mean():
    samples = torch.eye(C)[torch.randint(0, C, (50, 5))]
    torch.testing.assert_close(mutual_information(samples), entropy(samples.mean(1)) / math.log(C))
    assert mutual_information(samples).max() > 0.5


def test_answers_that_are_no_samples_do_not_count():
    samples, mask = distributions(50, 6), torch.rand(50, 6) < 0.5
    mask[:, 0] = True
    alone = [mutual_information(rows[kept][None]) for rows, kept in zip(samples, mask, strict=True)]
    torch.testing.assert_close(mutual_information(samples, mask), torch.cat(alone), atol=1e-6, rtol=1e-5)


def test_fewer_than_two_samples_give_no_mutual_information():
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3] = True
    torch.testing.assert_close(mutual_information(distributions(2, 5), mask), torch.zeros(2), atol=1e-6, rtol=0)


def test_the_mean_of_no_sample_is_zero():
    mask = torch.tensor([[False, False], [True, False]])
    samples = distributions(2, 2)
    assert masked_mean(samples, mask)[0].tolist() == [0.0] * C
    torch.testing.assert_close(masked_mean(samples, mask)[1], samples[1, 0])


# Weights and the fused label.


@pytest.mark.parametrize("method", [MIFuse(), MIFuse(weight=reciprocal_weight)])
def test_a_single_answer_is_not_trusted_more_for_lack_of_another(method):
    answers, mask = distributions(2, 5), torch.ones(2, 5, dtype=torch.bool)
    mask[1, 1:] = False
    passes = distributions(2, 16)
    found = method.targets(Teachers(answers, mask, lambda: passes))
    torch.testing.assert_close(found[1], (answers[1, 0] + passes[1].mean(0)) / 2)
    alone = Teachers(answers[:, :1], mask[:, :1], lambda: passes)
    torch.testing.assert_close(method.targets(alone), (answers[:, 0] + passes.mean(1)) / 2)


@pytest.mark.parametrize("f", [exponential_weight, reciprocal_weight])
def test_weights_follow_the_paper_and_add_up_to_one(f):
    mi = torch.rand(100, 2)
    weights = teacher_weights(f(mi), torch.ones(100, 2, dtype=torch.bool))
    torch.testing.assert_close(weights, f(mi) / f(mi).sum(1, keepdim=True))
    torch.testing.assert_close(weights.sum(1), torch.ones(100))
    assert ((weights[:, 0] > weights[:, 1]) == (mi[:, 0] < mi[:, 1])).all()


@pytest.mark.parametrize(("mi", "tau"), [(0.3, 0.2), (0.7, 1.0)])
def test_the_exponential_weight_is_exp_of_minus_mi_over_tau(mi, tau):
    assert float(exponential_weight(torch.tensor(mi), tau)) == pytest.approx(math.exp(-mi / tau))


@pytest.mark.parametrize(("mi", "epsilon"), [(0.3, 0.01), (0.0, 0.5)])
def test_the_reciprocal_weight_is_one_over_mi_plus_epsilon(mi, epsilon):
    assert float(reciprocal_weight(torch.tensor(mi), epsilon)) == pytest.approx(1 / (mi + epsilon))


def test_a_teacher_without_samples_is_dropped_however_certain_it_looks():
    reliability = torch.tensor([[1.0, 1e-30], [1.0, 0.0], [0.2, 0.9]])
    weights = teacher_weights(reliability, torch.tensor([[False, True], [False, True], [True, False]]))
    assert weights.tolist() == [[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]


def test_no_teacher_at_all_has_no_weight():
    assert teacher_weights(torch.ones(1, 2), torch.tensor([[False, False]])).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("tau", [1e-2, 1e-3, 1e-6])
def test_a_tiny_temperature_neither_loses_both_teachers_nor_prefers_the_unsure_one(tau):
    mi = torch.tensor([[0.9, 0.5], [1.0, 1.0], [0.0, 1.0]])
    weights = teacher_weights(exponential_weight(mi, tau), torch.ones(3, 2, dtype=torch.bool))
    torch.testing.assert_close(weights.sum(1), torch.ones(3))
    assert weights[0, 1] >= weights[0, 0]
    assert weights[1].tolist() == [0.5, 0.5] and weights[2, 0] > 0.999


def test_the_fused_label_is_the_weighted_mixture():
    means = torch.tensor([[[0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]]])
    expected = [0.8 * 0.7 + 0.05, 0.8 * 0.1 + 0.05, 0.8 * 0.1 + 0.05, 0.8 * 0.1 + 0.05]
    assert fused_label(means, torch.tensor([[0.8, 0.2]]))[0].tolist() == pytest.approx(expected)


def test_mi_fuse_is_the_example_worked_by_hand():
    lalm = [[0.9, 0.1, 0.0, 0.0], [0.1, 0.9, 0.0, 0.0]]
    classifier = [[0.6, 0.2, 0.1, 0.1], [0.5, 0.3, 0.1, 0.1], [0.7, 0.1, 0.1, 0.1]]
    mask = torch.tensor([[True, True, False]])
    samples = torch.tensor([[*lalm, [0.0, 0.0, 0.0, 1.0]]])
    f_lalm, f_classifier = math.exp(-mi_by_hand(lalm) / 0.5), math.exp(-mi_by_hand(classifier) / 0.5)
    w = f_lalm / (f_lalm + f_classifier)
    expected = [w * p + (1 - w) * q for p, q in zip([0.5, 0.5, 0, 0], [0.6, 0.2, 0.1, 0.1], strict=True)]
    method = MIFuse(weight=lambda mi: exponential_weight(mi, 0.5))
    found = method.targets(Teachers(samples, mask, lambda: torch.tensor([classifier])))
    assert found[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert method.statistics["lalm_weight"] == pytest.approx(w, abs=1e-6)
    assert method.statistics["lalm_mi"] == pytest.approx(mi_by_hand(lalm), abs=1e-6)


# The student's losses.


def test_soft_cross_entropy_is_that_of_torch():
    logits, targets = torch.randn(20, C), distributions(20)
    torch.testing.assert_close(soft_cross_entropy(logits, targets), F.cross_entropy(logits, targets))


def test_utterances_without_a_target_carry_neither_loss_nor_gradient():
    logits, targets = torch.randn(20, C, requires_grad=True), distributions(20)
    targets[5:15] = 0
    loss = soft_cross_entropy(logits, targets)
    answered = [*range(5), *range(15, 20)]
    torch.testing.assert_close(loss, F.cross_entropy(logits[answered], targets[answered]))
    loss.backward()
    assert not logits.grad[5:15].any() and logits.grad[answered].any()


def test_a_batch_without_any_target_has_no_loss():
    assert float(soft_cross_entropy(torch.randn(3, C), torch.zeros(3, C))) == 0.0


def test_diversity_is_least_when_classes_are_used_equally_and_zero_when_one_is():
    even, collapsed = 100 * torch.eye(C), 100 * torch.eye(C)[:1].expand(8, -1)
    assert float(diversity(even)) == pytest.approx(-math.log(C))
    assert float(diversity(torch.zeros(3, C))) == pytest.approx(-math.log(C))
    assert float(diversity(collapsed)) == pytest.approx(0.0, abs=1e-6)
    assert all(-math.log(C) <= float(diversity(3 * torch.randn(5, C))) <= 0 for _ in range(50))


def test_descending_the_diversity_term_evens_the_classes_out():
    logits = torch.tensor([[2.0, 0.0, 0.0, 0.0]]).repeat(8, 1).requires_grad_()
    for _ in range(200):
        diversity(logits).backward()
        with torch.no_grad():
            logits -= 8 * logits.grad
        logits.grad = None
    torch.testing.assert_close(logits.softmax(-1).mean(0), torch.full((C,), 1 / C), atol=0.01, rtol=0)


def test_the_loss_adds_diversity_at_its_weight():
    logits, targets = torch.randn(6, C), distributions(6)
    expected = F.cross_entropy(logits, targets) + 0.3 * diversity(logits)
    student = Outputs(torch.zeros(6, 8), torch.zeros(6, 3), logits)
    torch.testing.assert_close(AdaptationMethod(diversity_weight=0.3).loss(student, targets), expected)


# Methods.


# Rows of a bank, labels of the confident half, and weighted labels: each has a test of its own.
OTHER_TARGETS = ("nrc", "self_training", "oracle_balanced")


@pytest.mark.parametrize("name", [name for name in trained_methods() if name not in OTHER_TARGETS])
def test_targets_are_distributions_or_zero_where_nobody_answered(name):
    teachers, method = some_teachers(), recipe("x")["methods"][name]
    survey = dataclasses.replace(some_survey(), **{k: getattr(teachers, k) for k in ("lalm", "lalm_mask")})
    method.start(survey)
    method.refresh(survey)
    targets = method.targets(teachers)
    assert targets.shape == (12, C) and (targets >= 0).all()
    silent = ~teachers.lalm_available if name.startswith("lalm_sfuda") else torch.zeros(12, dtype=torch.bool)
    torch.testing.assert_close(targets.sum(-1), (~silent).float())


def test_methods_that_train_nothing_have_no_targets():
    silent = [method for method in recipe("x")["methods"].values() if not method.trains]
    assert len(silent) >= 3
    for method in silent:
        with pytest.raises(NotImplementedError):
            method.targets(some_teachers())


def test_only_upper_bounds_use_labels():
    using = [name for name, method in recipe("x")["methods"].items() if method.uses_labels]
    assert using == ["oracle_lda", "oracle_balanced", "oracle"]


@pytest.mark.parametrize("method", [MIFuse(), EntropyFusion(), MeanFusion(), LalmSfuda()])
def test_targets_do_not_depend_on_the_labels(method):
    first, second = (Teachers(t.lalm, t.lalm_mask, t.classifier, None) for t in [some_teachers()] * 2)
    labelled = Teachers(first.lalm, first.lalm_mask, first.classifier, torch.randint(0, C, (12,)))
    assert method.targets(labelled).equal(method.targets(second))


def test_the_language_model_alone_does_not_ask_the_classifier():
    teachers = some_teachers()
    alone = Teachers(teachers.lalm, teachers.lalm_mask, lambda: pytest.fail("the classifier was asked"))
    torch.testing.assert_close(LalmSfuda().targets(alone), alone.lalm_mean)


@pytest.mark.parametrize("name", ["mi_fuse", "mi_fuse_permuted", "mean_fusion", "entropy_fusion"])
def test_an_unanswered_utterance_is_left_to_the_classifier(name):
    teachers = some_teachers()
    targets = recipe("x")["methods"][name].targets(teachers)
    torch.testing.assert_close(targets[::3], teachers.classifier().mean(1)[::3])


def test_mean_fusion_gives_both_teachers_half():
    teachers = some_teachers()
    answered = teachers.lalm_available
    expected = (teachers.lalm_mean + teachers.classifier().mean(1)) / 2
    torch.testing.assert_close(MeanFusion().targets(teachers)[answered], expected[answered])


def test_the_permuted_control_deals_the_same_weights_to_other_answered_utterances():
    lalm_mi, classifier_mi, available = torch.rand(40), torch.rand(40), torch.rand(40) < 0.7
    plain = MIFuse().weights(lalm_mi, classifier_mi, available)
    dealt = PermutedMIFuse().weights(lalm_mi, classifier_mi, available)
    assert dealt[~available].equal(plain[~available])
    assert sorted(dealt[available].tolist()) == sorted(plain[available].tolist())
    assert (dealt[available] != plain[available]).any(1).sum() > 15
    assert sorted(dealt.tolist()) == sorted(plain.tolist())


def test_the_temperature_of_the_yaml_reaches_the_fusion():
    teachers = some_teachers()
    found = recipe("x", temperature=0.7)["methods"]["mi_fuse"].targets(teachers)
    expected = MIFuse(weight=lambda mi: exponential_weight(mi, 0.7)).targets(teachers)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, MIFuse().targets(teachers))


# The EMA teacher.


def test_the_moving_average_is_the_recursion_from_the_source_with_its_buffers():
    student, alpha = EmotionClassifier(3, C, hidden_size=5), 0.9
    student.norm.running_mean.normal_()
    source = {name: value.clone() for name, value in student.state_dict().items()}
    teacher = RECIPE.ema_copy(student, alpha)
    expected = {name: value.double() for name, value in source.items() if value.is_floating_point()}
    for _ in range(5):
        with torch.no_grad():
            for value in student.state_dict().values():
                if value.is_floating_point():
                    value.add_(torch.randn_like(value))
        teacher.update_parameters(student)
        now = student.state_dict()
        expected = {name: alpha * value + (1 - alpha) * now[name] for name, value in expected.items()}
    found = teacher.module.state_dict()
    assert {"norm.running_mean", "norm.running_var", "hidden.weight"} <= set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.float(), atol=1e-5, rtol=1e-5)


def test_the_moving_average_is_not_trained_and_stays_in_evaluation_mode():
    teacher = RECIPE.ema_copy(EmotionClassifier(3, C).train(), 0.9)
    assert not teacher.module.training and not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize(("window", "steps", "alpha"), [(0.5, 200, 0.99), (1.0, 1000, 0.999), (0.5, 1, 0.0)])
def test_the_decay_is_a_window_that_is_a_share_of_the_run(window, steps, alpha):
    assert RECIPE.ema_decay(window, steps) == pytest.approx(alpha)


# Stored frames that stay in memory.


def test_frames_read_twice_are_mapped_once_and_stay_those_of_the_store(world, monkeypatch):
    mapped, frames = [], world.front.store.frames
    monkeypatch.setattr(world.front.store, "frames", lambda *args: mapped.append(args[0]) or frames(*args))
    for _ in range(2):
        for key in UTTERANCES:
            assert world.front.read(key, "").numpy().tobytes() == frames(key, 1).tobytes()
    assert mapped == list(UTTERANCES)


def test_no_more_frames_stay_in_memory_than_allowed(world, monkeypatch):
    monkeypatch.setattr(front, "KEPT_BYTES", 500)
    reader = front.StoredFrames(world.front.store, layer=1)
    for key in [*UTTERANCES, *UTTERANCES]:
        assert reader.read(key, "").numpy().tobytes() == world.front.store.frames(key, 1).tobytes()
    assert 400 < sum(frames.nbytes for frames in reader.kept.values()) <= 500


# The Brain.


@pytest.fixture
def world(filled_store, tmp_path):
    return make_world(filled_store, tmp_path)


def test_the_classifier_teacher_starts_as_the_source_and_follows_each_step_of_the_student(world, monkeypatch):
    made, states = [], []
    make, step = RECIPE.make_brain, brains.AdaptationBrain.on_fit_batch_end

    def recorded(brain, *args):
        step(brain, *args)
        states.append({name: value.clone() for name, value in brain.modules.student.state_dict().items()})

    monkeypatch.setattr(RECIPE, "make_brain", lambda *args: made.append(make(*args)) or made[-1])
    monkeypatch.setattr(brains.AdaptationBrain, "on_fit_batch_end", recorded)
    world.adapt()
    assert len(states) == 8
    alpha = RECIPE.ema_decay(0.5, 8)
    expected = load_file(world.source / "classifier.safetensors")
    for state in states:
        expected = {name: alpha * value + (1 - alpha) * state[name] for name, value in expected.items()}
    found = made[0].hparams.ema.module.state_dict()
    for name in ("pooling.project.weight", "norm.running_mean", "norm.running_var", "hidden.weight", "output.bias"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4)
        assert not found[name].allclose(states[-1][name], atol=1e-4)


def test_the_classifier_teacher_draws_all_passes_of_a_batch_at_once_with_dropout_and_without_gradient(
    world, monkeypatch
):
    drawn, plain = [], EmotionClassifier.stochastic_logits

    def counted(model, frames, lengths, passes):
        logits = plain(model, frames, lengths, passes)
        drawn.append((model.training, logits.requires_grad, tuple(logits.shape), len(logits[0].unique(dim=0))))
        return logits

    monkeypatch.setattr(EmotionClassifier, "stochastic_logits", counted)
    world.adapt(passes=6)
    assert drawn[:8] == [(False, False, (8, 6, C), 6)] * 8
    # In the end once through the 20 utterances, to tell of their weights.
    assert [found[:3] for found in drawn[8:]] == [(False, False, (size, 6, C)) for size in (8, 8, 4)]


def test_only_methods_that_use_the_classifier_teacher_pay_for_it(world, monkeypatch):
    monkeypatch.setattr(EmotionClassifier, "stochastic_logits", lambda *_: pytest.fail("stochastic passes were drawn"))
    world.adapt("lalm_sfuda")
    assert world.weights("lalm_sfuda")


def test_adapting_learns_what_the_teacher_knows(world):
    before = world.adapt("source_only")
    after = world.adapt("lalm_sfuda", number_of_steps=60)
    right = {
        name: sum(max(range(C), key=p[key].__getitem__) == c for key, c in TEST.items())
        for name, p in (("before", before), ("after", after))
    }
    assert right["after"] == len(TEST) > right["before"]


def test_the_same_seed_gives_the_same_student_whatever_happened_before(world):
    world.adapt(out="a")
    torch.rand(17)
    world.adapt("mean_fusion", out="b")
    world.adapt(out="b")
    assert world.weights(out="a") == world.weights(out="b")


def test_another_seed_gives_another_student(world):
    world.adapt(out="a")
    world.adapt(out="b", seed=2)
    assert world.weights(out="a") != world.weights(out="b")


def test_every_trained_method_gives_another_student(world):
    names = [name for name in trained_methods() if not name.startswith("oracle")]
    for name in names:
        world.adapt(name)
    assert len({world.weights(name) for name in names}) == len(names) >= 9


def test_the_source_is_not_touched(world):
    before = {path: path.read_bytes() for path in world.source.iterdir()}
    world.adapt()
    assert {path: path.read_bytes() for path in world.source.iterdir()} == before


def test_source_only_predicts_with_the_source_as_it_came(world):
    found = world.adapt("source_only")
    model = load_classifier(world.source, LABELS, world.front.store.fingerprint).eval()
    for key in TEST:
        expected = model(world.front.read(key, "").float()[None]).softmax(-1)[0]
        assert found[key] == pytest.approx(expected.tolist(), abs=1e-5)
    assert not (world.folder / "out" / "source_only" / "student.safetensors").exists()


def test_the_language_model_predicts_the_mean_of_its_answers_and_nothing_where_it_gave_none(world):
    silent, partly = list(TEST)[:2]
    world.answers[silent] = (torch.zeros(3, C), torch.zeros(3, dtype=torch.bool))
    probs = world.answers[partly][0].clone()
    probs[2] = 0
    world.answers[partly] = (probs, torch.tensor([True, True, False]))
    found = world.adapt("lalm_zero_shot")
    assert set(found) == set(TEST) - {silent}
    assert found[partly] == pytest.approx(probs[:2].mean(0).tolist())


def test_a_finished_adaptation_is_not_done_again(world, monkeypatch):
    first = world.adapt()
    monkeypatch.setattr(RECIPE, "make_brain", lambda *_: pytest.fail("adapted again"))
    assert world.adapt() == first


@pytest.mark.parametrize("changed", ["learning_rate", "passes", "ema_window", "temperature", "diversity_weight"])
def test_other_settings_in_the_same_folder_are_an_error_naming_the_setting(world, changed):
    world.adapt()
    with pytest.raises(SettingsError, match=rf"{changed}: \S+ -> (0.25|7)\b"):
        world.adapt(**{changed: 0.25 if changed != "passes" else 7})


def test_other_answers_in_the_same_folder_are_an_error(world):
    world.adapt()
    key = next(iter(UTTERANCES))
    world.answers[key] = (world.answers[key][0].flip(-1), world.answers[key][1])
    with pytest.raises(SettingsError, match="the recordings to adapt to, or the teacher's answers about them, changed"):
        world.adapt()


def test_a_damaged_settings_file_is_an_error_naming_it(world):
    world.adapt()
    (world.folder / "out" / "mi_fuse" / "settings.json").write_text("{")
    with pytest.raises(SettingsError, match=r"settings.json: damaged"):
        world.adapt()


def test_another_source_in_the_same_folder_is_an_error(world):
    world.adapt()
    path = world.source / "classifier.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(SettingsError, match="the source recognizer changed"):
        world.adapt()


def test_a_batch_larger_than_the_set_is_the_whole_set(world):
    world.adapt(batch_size=64, number_of_steps=3)
    log = (world.folder / "out" / "mi_fuse" / "train_log.txt").read_text()
    assert log.splitlines()[-1].startswith("epoch: 3 ")
