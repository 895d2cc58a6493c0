import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from hyperpyyaml import load_hyperpyyaml

from speechbrain_mifuse.experiments.teacher import teacher_of
from speechbrain_mifuse.lalm.answer import Reply
from speechbrain_mifuse.lalm.profile import AUDIO_PARTS, CONSTRAINTS, Price, Profile, Tokens, read_profile
from speechbrain_mifuse.lalm.prompt import ANSWER_FORMS, Prompt
from speechbrain_mifuse.utils.errors import UserError

HPARAMS = Path(__file__).resolve().parents[2] / "hparams"
PROFILES = sorted(path.name for path in (HPARAMS / "lalm").glob("*.yaml"))
LABELS = ("angry", "happy", "neutral", "sad")


def read(name):
    return yaml.safe_load((HPARAMS / "lalm" / name).read_text(encoding="utf-8"))


def pair(tmp_path, include="mifuse_serve", flags=None, name="nemo2rav"):
    """The hyperparameters of a pair whose profile is another file: one word of its YAML changed."""
    folder = tmp_path / "hparams"
    if not folder.exists():
        shutil.copytree(HPARAMS, folder)
    path = folder / f"{name}.yaml"
    text = re.sub(r"!include:lalm/\w+\.yaml", f"!include:lalm/{include}.yaml", path.read_text(encoding="utf-8"))
    path.write_text(text, encoding="utf-8")
    with path.open(encoding="utf-8") as file:
        return load_hyperpyyaml(file, flags or {})


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_can_be_read_asked_with_and_has_the_keys_that_flags_refer_to(name):
    profile = Profile.of(read(name))
    assert {"base_url", "model", "answer_form", "concurrency"} <= set(read(name))
    prompt = Prompt(LABELS, profile.answer_form, audio_part=profile.audio_part, constraint=profile.constraint)
    assert prompt.messages("x") and profile.model


def test_there_is_a_profile_for_each_provider_and_prices_say_that_they_must_be_checked():
    assert {"openai", "gemini", "vllm_qwen_omni", "vllm_qwen2_audio", "sglang", "transformers_serve"} < {
        name.removesuffix(".yaml") for name in PROFILES
    }
    priced = [Profile.of(read(name)) for name in PROFILES if "price" in read(name)]
    assert priced and all("check" in profile.price.source for profile in priced)
    assert all(profile.output_limit(profile.sampling) for profile in priced)


def test_one_include_switches_the_provider_and_flags_override_it(tmp_path):
    ours, sglang = teacher_of(pair(tmp_path)).profile, teacher_of(pair(tmp_path, "sglang")).profile
    assert (ours.base_url, ours.model, ours.audio_part) == (None, "served-classifier", "input_audio")
    assert (sglang.base_url, sglang.audio_part, sglang.constraint) == (
        "http://127.0.0.1:30000/v1",
        "audio_url",
        "regex",
    )
    flags = {"lalm_base_url": "http://127.0.0.1:1/v1", "lalm_model": "m", "lalm_answer_form": "label"}
    given = teacher_of(pair(tmp_path, "sglang", flags)).profile
    assert (given.base_url, given.model, given.answer_form, given.audio_part) == (*flags.values(), "audio_url")


def test_a_local_classifier_in_place_of_a_provider_is_not_bound_by_its_limits(tmp_path):
    hparams = pair(tmp_path, "vllm_qwen2_audio", {"lalm_base_url": None}, "msp2iem")
    profile = teacher_of(hparams).profile
    assert profile.longest_audio is None and profile.base_url is None


@pytest.mark.parametrize("name", ["nemo2rav", "msp2iem"])
def test_the_default_question_has_the_hash_that_stored_answers_bear(tmp_path, name):
    hparams = pair(tmp_path, {"nemo2rav": "mifuse_serve", "msp2iem": "vllm_qwen2_audio"}[name], name=name)
    question = teacher_of(hparams).prompt
    assert question.prompt_hash() == "68b3b57e11f55ed339e6c275f17580176eff3b1c3eacb1634a8d9a406ab6dc49"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"adress": "x"}, "adress"),
        ({"constraint": "grammar"}, "constraint 'grammar' is none of none, structured_outputs"),
        ({"requests_per_minute": 0}, "requests_per_minute"),
        ({"concurrency": None}, "concurrency"),
        ({"timeout": "60"}, "timeout"),
        ({"sampling": [1]}, "sampling"),
        ({"price": {"per_million_output": 1.0}}, "price: per_million_input_text"),
        ({"price": {"per_million_output": -1, "per_million_input_text": 1, "per_million_input_audio": 1}}, "negative"),
    ],
)
def test_a_profile_that_cannot_be_used_is_one_error_that_names_the_key(values, said):
    with pytest.raises(UserError, match=said):
        Profile.of(values)


def test_price_counts_each_kind_of_token():
    assert Price(1.0, 10.0, 100.0).cost(Tokens(1e6, 2e6, 3e6)) == 321.0


@pytest.mark.parametrize("form", ANSWER_FORMS)
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_constraints_allow_exactly_what_the_form_asks_for(constraint, form):
    shape = ANSWER_FORMS[form].shape
    if shape not in CONSTRAINTS[constraint]:
        with pytest.raises(UserError, match="lalm_answer_form"):
            Prompt(LABELS, form, constraint=constraint)
        return
    fields = Prompt(LABELS, form, constraint=constraint).request_options()
    text = json.dumps(fields)
    assert all(label in text for label in LABELS) or constraint == "none"


def test_replies_within_a_constraint_are_read():
    word = Prompt(LABELS, "label", constraint="json_schema")
    assert word.parse(Reply('{"emotion": "happy"}', "stop")).probs == (0, 1, 0, 0)
    pattern = CONSTRAINTS["regex"]["object"](LABELS)["regex"]
    reply = '{"angry": 0.7, "happy": 0.1, "neutral": 0.2, "sad": 0}'
    assert re.fullmatch(pattern, reply) and not re.fullmatch(pattern, reply.replace("0.7", "7"))
    assert Prompt(LABELS, constraint="regex").parse(Reply(reply, "stop")).probs == pytest.approx((0.7, 0.1, 0.2, 0))
    schema = CONSTRAINTS["json_schema"]["object"](LABELS)["response_format"]["json_schema"]["schema"]
    assert schema["required"] == list(LABELS)


def test_the_hash_follows_whatever_is_sent():
    prompts = [Prompt(LABELS, audio_part=part, constraint=bound) for part in AUDIO_PARTS for bound in CONSTRAINTS]
    prompts += [Prompt(LABELS, shuffle_labels=True), Prompt(LABELS, variants=["{labels} {answer}"])]
    prompts += [Prompt(LABELS, variants=["{labels} {answer} "]), Prompt(LABELS[::-1])]
    assert len({prompt.prompt_hash() for prompt in prompts}) == len(prompts)


def test_samples_take_wordings_in_turn_and_label_orders_that_seed_and_index_decide():
    prompt = Prompt(LABELS, "label", variants=["B {labels} {answer}", "C {labels} {answer}"], shuffle_labels=True)
    texts = [prompt.at(k, seed=5).text() for k in range(30)]
    assert texts == [prompt.at(k, seed=5).text() for k in range(30)]
    assert [text[0] for text in texts[:6]] == ["L", "B", "C", "L", "B", "C"]
    assert len({prompt.at(k, 5).order for k in range(30)}) > 12
    assert prompt.at(3, 5).order != prompt.at(3, 6).order or prompt.at(4, 5).order != prompt.at(4, 6).order
    assert all(sorted(prompt.at(k, 5).order) == sorted(LABELS) for k in range(30))


def test_answers_to_shuffled_questions_are_read_in_the_fixed_order():
    prompt = Prompt(LABELS, shuffle_labels=True).at(1, 0)
    assert prompt.order != LABELS
    scores = {label: (index + 1) / 10 for index, label in enumerate(LABELS)}
    reply = Reply(json.dumps({label: scores[label] for label in prompt.order}), "stop")
    assert prompt.parse(reply).probs == pytest.approx((0.1, 0.2, 0.3, 0.4))


def test_a_question_that_varies_is_not_sent_as_it_is():
    with pytest.raises(UserError, match="at"):
        Prompt(LABELS, shuffle_labels=True).messages("x")


@pytest.mark.parametrize("content", ["[" * 5000, "model: &a [x]\ntemplate: *a", "model: !!python/name:os.system"])
def test_a_file_that_is_no_plain_profile_is_one_error_of_one_line(tmp_path, content):
    path = tmp_path / "profile.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=r"--profile .*profile\.yaml: cannot be read: line ") as caught:
        read_profile(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        *("base_url: [x]", "base_url: 5", "model: {a: 1}", "name: 5", "audio_part: [x]", "constraint: {a: 1}"),
        *("answer_form: [x]", "honours_n: 'no'", "honours_seed: 1", "price: 5", "price: [x]"),
    ],
)
def test_a_value_of_another_kind_in_a_profile_is_one_error_naming_the_key(tmp_path, content):
    (tmp_path / "profile.yaml").write_text(content)
    with pytest.raises(UserError, match=f"lalm_profile: {content.split(':')[0]}.* must be "):
        read_profile(tmp_path / "profile.yaml")
