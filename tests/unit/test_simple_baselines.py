"""Options that every method has, and baselines that train nothing or little: each does what its name says, no more."""

import inspect

import pytest
import torch
from adaptation_support import TEST, UTTERANCES, C, distributions, make_world, recipe, some_survey
from speechbrain.dataio.dataset import DynamicItemDataset
from torch.nn import functional as F

from speechbrain_mifuse.adaptation.at_test_time import Lame, T3a, Tent
from speechbrain_mifuse.adaptation.dine import Dine, adaptive_label_smoothing
from speechbrain_mifuse.adaptation.fusion import information, prior_corrected
from speechbrain_mifuse.adaptation.geometry import discriminant_scores
from speechbrain_mifuse.adaptation.method import Outputs, Survey, Teachers
from speechbrain_mifuse.adaptation.references import LalmSfuda, LalmZeroShot, Oracle, OracleDiscriminant, SourceOnly
from speechbrain_mifuse.adaptation.self_training import SelfTraining, confident_labels
from speechbrain_mifuse.inference.recognizer_folder import load_classifier

METHODS = recipe("x")["methods"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def world(filled_store, tmp_path):
    return make_world(filled_store, tmp_path)


def source_outputs(world, split):
    """What the source classifier makes of a set, worked out without the Brain."""
    dataset = world.datasets()[split]
    source = load_classifier(world.source, ["angry", "happy", "neutral", "sad"], world.front.fingerprint).eval()
    with torch.no_grad():
        rows = [
            source.parts(dataset[place]["feats"].unsqueeze(0).float(), torch.ones(1)) for place in range(len(dataset))
        ]
    return source, torch.cat([vectors for vectors, _, _ in rows])


def table(predictions, keys):
    return torch.tensor([predictions[key] for key in keys])


# Target statistics.


def test_target_statistics_are_mean_and_deviation_of_the_adaptation_set_and_change_nothing_else(world):
    source, adapt = source_outputs(world, "adapt")
    _, test = source_outputs(world, "test")
    vectors = (test - adapt.mean(0)) / (adapt.var(0, unbiased=False) + 1e-9).sqrt()
    with torch.no_grad():
        expected = source.head(vectors, stochastic=False).softmax(-1)
    found = table(world.adapt("source_adabn"), TEST)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, table(world.adapt("source_only"), TEST), atol=1e-3)


@pytest.mark.parametrize(
    "name", ["mi_fuse", "shot", "nrc", "dine", "prode_style", "lalm_sfuda", "mi_fuse_plus", "oracle"]
)
def test_every_method_can_begin_with_the_targets_statistics(name):
    made = type(METHODS[name])(target_statistics=True)
    assert made.traits()["statistics"] == "target" and METHODS[name].traits()["statistics"] == "source to target"
    assert made.describe()["method.target_statistics"] is True


def test_a_student_with_target_statistics_starts_from_them_and_so_does_its_teacher(world):
    seen = {}

    class Looks(LalmSfuda):
        def start(self, survey):
            seen.update(vectors=survey.student().vectors, classifier=survey.classifier().mean(1))

    world.adapt("looks", method=Looks(target_statistics=True), number_of_steps=2)
    torch.testing.assert_close(seen["vectors"].mean(0), torch.zeros(seen["vectors"].shape[1]), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        seen["vectors"].std(0, unbiased=False), torch.ones(seen["vectors"].shape[1]), atol=0.01, rtol=0
    )


@pytest.mark.parametrize("name", METHODS)
def test_an_option_that_is_not_chosen_leaves_no_trace_in_what_decides_a_run(name):
    method = METHODS[name]
    described, defaults = method.describe(), inspect.signature(type(method)).parameters
    for option in ("target_statistics", "prior_correction"):
        if option not in defaults and not getattr(method, option):
            assert f"method.{option}" not in described
    assert set(method.traits()) == {"training", "asked", "statistics", "prior_correction", "transductive"}


# Prior correction.


def test_prior_correction_divides_the_language_models_mean_wherever_it_is_read(world):
    seen = []

    class Looks(LalmSfuda):
        def targets(self, teachers):
            seen.append((teachers.rows, teachers.lalm_mean))
            return super().targets(teachers)

    world.adapt("looks", method=Looks(prior_correction=True), number_of_steps=2)
    means = torch.stack([world.answers[key][0].mean(0) for key in UTTERANCES])
    for rows, found in seen:
        torch.testing.assert_close(found, prior_corrected(means[rows], means.mean(0)))


def test_a_method_that_asks_nobody_has_its_own_answers_corrected_by_their_average_on_the_adaptation_set(world):
    keeps = {}

    class Looks(SourceOnly):
        def predict(self, test):
            keeps[len(test.rows)] = super().predict(test)
            return keeps[len(test.rows)]

    found = table(world.adapt("looks", method=Looks(prior_correction=True)), TEST)
    adapt, test = keeps[len(UTTERANCES)], keeps[len(TEST)]
    torch.testing.assert_close(found, prior_corrected(test, adapt.mean(0)))


def test_the_language_model_alone_is_corrected_by_what_it_says_of_the_adaptation_set(world):
    assert LalmZeroShot().answers_for == ("test",)
    assert LalmZeroShot(prior_correction=True).answers_for == ("adapt", "test")
    found = table(world.adapt("lalm_zero_shot_prior"), TEST)
    prior = torch.stack([world.answers[key][0].mean(0) for key in UTTERANCES]).mean(0)
    expected = prior_corrected(torch.stack([world.answers[key][0].mean(0) for key in TEST]), prior)
    torch.testing.assert_close(found, expected)


# Test-time adaptation.


def survey_with_head(n=40):
    survey = some_survey(n=n)
    outputs = survey.student()
    outputs = Outputs(
        outputs.vectors, outputs.hidden, outputs.head(outputs.vectors).detach(), outputs.head, torch.randn(C, 6)
    )
    return Survey(survey.lalm, survey.lalm_mask, survey.classifier, rows=survey.rows, student=lambda: outputs)


def test_tent_lowers_entropy_by_scale_and_shift_of_the_normalization_and_leaves_every_weight_as_it_was():
    survey, method = survey_with_head(), Tent(steps=30, learning_rate=0.01)
    head = survey.student().head
    before = {name: value.clone() for name, value in head.state_dict().items()}
    method.start(survey)
    assert all(value.equal(before[name]) for name, value in head.state_dict().items())
    assert all(parameter.grad is None for parameter in head.parameters())
    assert set(method.state) == {"scale", "shift"} and not method.state["scale"].requires_grad
    unsure = [torch.special.entr(p).sum(1).mean() for p in (survey.student().probs, method.predict(survey))]
    assert unsure[1] < unsure[0]


def test_tent_of_no_steps_is_the_classifier_itself():
    survey, method = survey_with_head(), Tent(steps=0)
    method.start(survey)
    torch.testing.assert_close(method.predict(survey), survey.student().probs)


def test_t3a_without_supports_is_the_normalized_output_layer_and_with_them_the_mean_of_the_surest():
    survey = survey_with_head()
    student = survey.student()
    bare = T3a(supports=0)
    bare.start(survey)
    torch.testing.assert_close(bare.state["means"], F.normalize(student.templates, dim=1))
    method = T3a(supports=2)
    method.start(survey)
    unsure = torch.special.entr(student.probs).sum(1)
    for label in range(C):
        rows = [row for row in unsure.argsort().tolist() if int(student.probs[row].argmax()) == label][:2]
        vectors = [student.templates[label], *(student.hidden[row] for row in rows)]
        mean = sum(vector / vector.norm() for vector in vectors)
        torch.testing.assert_close(method.state["means"][label], mean / mean.norm())


def test_lame_without_neighbours_in_agreement_keeps_the_prediction_and_gives_in_to_a_dense_neighbourhood():
    groups = torch.eye(2).repeat_interleave(6, 0) + 0.01 * torch.rand(12, 2)
    logits = torch.tensor([[2.0, 0.0]] * 5 + [[0.0, 0.4]] + [[0.0, 2.0]] * 6)
    silent = torch.zeros(12, 1, 2)
    outputs = Outputs(groups, groups, logits)
    survey = Survey(silent, silent.bool().any(2), lambda: None, student=lambda: outputs)
    assert outputs.probs.argmax(1).tolist() == [0] * 5 + [1] * 7
    assert Lame().predict(survey).argmax(1).tolist() == [0] * 6 + [1] * 6
    assert Lame().transductive and not Tent().transductive and not T3a().transductive


@pytest.mark.parametrize("name", ["source_adabn", "source_adabn_prior", "tent", "t3a", "lame", "g_no_api"])
def test_methods_without_an_api_do_not_ask_it(name):
    assert METHODS[name].answers_for == () and not METHODS[name].trains and not METHODS[name].uses_labels


@pytest.mark.parametrize("name", ["tent", "t3a", "lame", "source_adabn_prior", "zero_training_adabn", "g_no_api"])
def test_what_trains_nothing_leaves_no_student_and_answers_every_test_recording(name, world):
    assert set(world.adapt(name)) == set(TEST)
    assert not (world.folder / "out" / name / "student.safetensors").exists()


# DINE's two black boxes, and self-training.


def test_dine_of_both_black_boxes_starts_from_their_mean_where_both_answered():
    survey, method = some_survey(), Dine(both=True)
    method.refresh(survey)
    said, available = survey.student().probs, survey.lalm_available
    expected = torch.where(available.unsqueeze(1), (survey.lalm_mean + said) / 2, said)
    torch.testing.assert_close(method.state["memory"], adaptive_label_smoothing(expected))


def test_dines_second_stage_is_mutual_information_alone_and_comes_last():
    survey, method = some_survey(), Dine(second_stage=0.3)
    student, targets = survey.student(), distributions(12)
    told = []
    for _ in range(method.refreshes):
        method.refresh(survey)
        told.append(bool(method.loss(student, targets) == information(student.logits)))
    assert told == [False] * 7 + [True] * 3


def test_self_training_starts_from_both_teachers_and_then_trusts_the_student():
    survey, method = some_survey(), SelfTraining()
    method.start(survey)
    method.refresh(survey)
    first = method.state["labels"]
    assert first.equal(confident_labels(super(SelfTraining, method).predict(survey), 0.5))
    method.refresh(survey)
    assert method.state["labels"].equal(confident_labels(survey.student().probs, 0.5)) and not method.state[
        "labels"
    ].equal(first)


def test_the_most_confident_of_each_predicted_class_are_kept_whatever_the_others_are():
    probs = distributions(60)
    labels = confident_labels(probs, 0.5)
    for label in range(C):
        rows = torch.nonzero(probs.argmax(1) == label).flatten()
        kept = labels[rows].sum(1) > 0
        assert int(kept.sum()) == -(-len(rows) // 2)
        assert not len(rows[~kept]) or probs[rows[kept], label].min() >= probs[rows[~kept], label].max()


# Upper bounds.


def with_labels(world):
    """Datasets as the recipe gives them to a method that uses labels."""
    made = world.datasets()
    rows = {key: {**row, "reference": torch.tensor(UTTERANCES[key])} for key, row in made["adapt"].data.items()}
    adapt = DynamicItemDataset(rows)
    adapt.add_dynamic_item(world.front.read, takes=["id", "wav"], provides="feats")
    adapt.set_output_keys(["id", "feats", "lalm", "lalm_mask", "reference"])
    return {**made, "adapt": adapt}


def test_a_balanced_oracle_weighs_each_class_alike():
    survey = some_survey(n=8)
    reference = torch.tensor([0, 0, 0, 0, 0, 0, 1, 2])
    labelled = Survey(survey.lalm, survey.lalm_mask, survey.classifier, reference, survey.rows, student=survey.student)
    method = Oracle(class_balanced=True)
    method.start(labelled)
    targets = method.targets(Teachers(survey.lalm, survey.lalm_mask, survey.classifier, reference, survey.rows))
    torch.testing.assert_close(targets.sum(0), torch.tensor([2.0, 2.0, 2.0, 0.0]))


def test_the_supervised_discriminant_is_that_of_the_whole_space():
    survey = some_survey(n=40)
    reference = torch.arange(40) % C
    labelled = Survey(survey.lalm, survey.lalm_mask, survey.classifier, reference, survey.rows, student=survey.student)
    method = OracleDiscriminant()
    method.start(labelled)
    vectors = survey.student().vectors
    expected = discriminant_scores(vectors, F.one_hot(reference, C).float(), vectors).softmax(-1)
    torch.testing.assert_close(method.predict(labelled), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["oracle_lda", "oracle_balanced"])
def test_an_upper_bound_is_given_labels_and_no_other_method_finds_any(name, world, monkeypatch):
    datasets = with_labels(world)
    monkeypatch.setattr(world, "datasets", lambda: datasets)
    assert set(world.adapt(name)) == set(TEST)
    seen = []

    class Looks(SourceOnly):
        def start(self, survey):
            seen.append(survey.reference)

    monkeypatch.undo()
    world.adapt("looks", method=Looks())
    assert seen == [None]


# Names.


def test_an_earlier_name_still_works_and_a_hint_names_the_current_one(capsys):
    from speechbrain_mifuse.experiments.settings import chosen_methods

    adaptation = {"methods": {"prode_style": None, "shot": None}, "renamed": {"prode": "prode_style"}}
    assert chosen_methods({"method": ["prode", "shot"], "adaptation": adaptation}) == ["prode_style", "shot"]
    assert "'prode' is now called 'prode_style'" in capsys.readouterr().err
    assert chosen_methods({"method": "shot", "adaptation": adaptation}) == ["shot"]
    assert capsys.readouterr().err == ""
