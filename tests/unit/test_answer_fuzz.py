"""The parser of answers against replies whose right reading is known, and the mistakes that such replies brought up."""

import math
import random
import subprocess
import sys
import time
from pathlib import Path

import answer_fuzz
import pytest

from speechbrain_mifuse.lalm import answer
from speechbrain_mifuse.lalm.answer import MAX_CHARACTERS, Reply, parse_label
from speechbrain_mifuse.lalm.completion import reply_of, responses
from speechbrain_mifuse.lalm.prompt import ANSWER_FORMS, Prompt

LABELS = ("angry", "happy", "neutral", "sad")
CASES = 10_000


def read(form, text, labels=LABELS, **fields):
    return Prompt(labels, form).parse(Reply(text, "stop", **fields))


@pytest.fixture(scope="module")
def tally():
    return answer_fuzz.run(CASES)


def test_no_reply_of_many_crashes_the_parser_or_gives_a_wrong_label(tally):
    assert sum(tally.counts.values()) == CASES and tally.failures == []
    assert not [key for key in tally.counts if key[1] in ("wrong", "crashed")]


def test_a_reply_that_tells_its_label_is_nearly_always_understood(tally):
    assert tally.of("told", "accepted") > 0.9 * (tally.of("told", "accepted") + tally.of("told", "refused"))
    assert tally.of("garbage", "refused") and tally.of("unclear", "refused")


@pytest.mark.parametrize("number", [0, 1, 2, 3, 5, 4001])
def test_a_case_follows_from_its_number_and_seed_alone(number):
    assert repr(answer_fuzz.case(number, 7)) == repr(answer_fuzz.case(number, 7)) != repr(answer_fuzz.case(number, 8))


SABOTAGE = {
    "doubts are passed over": ("_doubt", lambda *_: ""),
    "a text need not fit its first token": ("_chooses", lambda *_: True),
    "inner objects are passed over": ("walk", lambda values: values),
    "unseen characters part words": ("_plain", lambda text: text.casefold()),
    "numbers are taken as they come": ("_normalised", lambda values: tuple(values)),
    "labels are swapped": ("_one_hot", lambda label, labels: answer.Answer("label", (1.0, *[0.0] * (len(labels) - 1)))),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_a_parser_with_a_mistake_is_found_out(monkeypatch, name):
    monkeypatch.setattr(answer, *SABOTAGE[name])
    answer._vocabulary.cache_clear()
    try:
        assert answer_fuzz.run(600).failures
    finally:
        answer._vocabulary.cache_clear()


def test_a_parser_that_raises_is_found_out(monkeypatch):
    monkeypatch.setattr(answer, "json_values", lambda text: 1 / 0)
    tally = answer_fuzz.run(100)
    assert tally.of("told", "crashed") and "ZeroDivisionError" in tally.failures[0]


def test_the_command_prints_a_summary_and_passes():
    script = Path(answer_fuzz.__file__)
    found = subprocess.run([sys.executable, script, "--cases", "60"], capture_output=True, text=True, check=False)
    assert found.returncode == 0 and "60 cases in" in found.stdout and "0 wrong, 0 crashed" in found.stdout


# What the fuzz and a reading of the parser brought up.


@pytest.mark.parametrize(
    "text",
    [
        "un-happy",
        "un\u00adhappy",
        "un\u200bhappy",
        "un\u2011happy",
        "non-happy",
        "happy-free",
        "happy\u0336",
        "joyful's",
        "un\0happy",
        "un\x1chappy",
        "un\ud800happy",
        "un\ufffdhappy",
        "happy\ue000",
    ],
)
def test_a_label_inside_another_word_is_not_named_whatever_joins_the_two(text):
    assert read("label", text).kind == "invalid"


@pytest.mark.parametrize(
    "text",
    [
        "far from happy",
        "hardly happy",
        "anything but happy",
        "isnt happy",
        "isn`t happy",
        "isn´t happy",
        "!happy",
        "unsure, maybe happy",
        "less happy than before",
        "happy: 0%",
        "happy (0.00)",
        "Is the speaker happy?",
        "happy and fearful",
        "happy or bored",
    ],
)
def test_a_label_that_is_negated_doubted_asked_about_or_not_alone_is_not_chosen(text):
    assert read("label", text).kind == "invalid"


@pytest.mark.parametrize("text", ["Happy!", "happy (95%)", "happy, 0.9", "calm, happy", "happy 10/10", "Happy?"])
def test_a_label_with_a_mark_or_a_number_is_still_chosen(text):
    assert read("label", text).probs == (0, 1, 0, 0)


@pytest.mark.parametrize(
    "text",
    ["Sadly, the audio is silent.", "Sadly the file is empty", "I'd happily judge it.", "Happy to listen again."],
)
def test_a_polite_word_is_no_label(text):
    assert read("label", text).kind == "refusal"
    assert read("logprobs", text, top_logprobs=(("sad", -0.1),)).kind == "refusal"


def test_a_code_of_a_corpus_is_a_label_alone_and_a_word_of_another_language_in_a_sentence():
    assert read("label", "ang").probs == (1, 0, 0, 0)
    assert read("label", "Ang boses ay malungkot").kind == read("label", "Das klingt neu").kind == "invalid"
    assert read("label", "It is ang.", ("ang", "hap")).probs == (1, 0)


@pytest.mark.parametrize("text", ["very  sad", "Very\nSad", "very\u00a0sad", "VERY \u200bSAD"])
def test_a_label_of_two_words_is_told_from_the_one_inside_it_whatever_the_blank(text):
    assert read("label", text, ("sad", "very sad")).probs == (0, 1)


@pytest.mark.parametrize("text", ["very, sad", "**very** sad", "sad, very much so", "very-sad"])
def test_a_longer_label_taken_apart_is_not_the_shorter_one(text):
    assert read("label", text, ("sad", "very sad")).kind == "invalid"


def test_labels_that_look_alike_once_normalised_are_never_taken_for_each_other():
    labels = ("sad", "s\u00adad", "happy")
    assert parse_label(Reply("sad"), labels).kind == "invalid"
    assert parse_label(Reply("happy"), labels).probs == (0.0, 0.0, 1.0)


@pytest.mark.parametrize("text", ["ＳＡＤ", "“sad”", "«Sad»", "wu\u0308tend", "sa\u00add"])
def test_other_forms_of_the_same_characters_are_read(text):
    assert read("label", text, ("sad", "wütend")).kind == "label"


@pytest.mark.parametrize(
    "text",
    [
        '{"transcript": "I am so happy", "emotion": "joyless"}',
        '{"transcript": "happy"}',
        '{"emotion": "happy"} - wait, actually angry',
        'It is not {"emotion": "happy"}',
        '{"emotion": "happy", "answer": "uncertain"}',
        '{"not_emotion": "happy"}',
    ],
)
def test_only_what_an_object_says_under_a_key_of_a_choice_is_one_and_nothing_beside_it_may_differ(text):
    assert read("label", text).kind == "invalid"


def test_other_texts_of_an_object_may_name_what_they_like():
    text = '{"transcript": "not sad, bored", "predicted_emotion": "Happiness", "reason": "I hear no anger"}'
    assert read("label", text).probs == (0, 1, 0, 0)


@pytest.mark.parametrize(
    "text",
    [
        '{"first_guess": {"angry": 1}, "final": {"sad": 1}}',
        '{"angry": 1, "details": {"angry": 0.5, "sad": 0.5}}',
        '{"sad": 0.1, "more": [{"angry": 0.9}]}',
        '{"not angry": 0.9, "angry": 0.1}',
        '{"angry (out of 1)": 0.9, "sad": 0.1}',
        '{"angry": "75%", "sad": 25}',
        '{"fearful": 0.9, "sad": 0.1}',
        '{"angry": "1_0", "sad": 1}',
    ],
)
def test_numbers_whose_meaning_is_not_plain_are_no_distribution(text):
    assert read("distribution", text).kind == "invalid"


def test_keys_with_marks_are_the_labels_that_they_hold():
    assert read("distribution", '{"Angry:": 0.75, "**sad**": 0.25}').probs == (0.75, 0, 0, 0.25)


@pytest.mark.parametrize(
    "text",
    [
        'I am sorry, I cannot listen. An example: {"angry": 0.25, "happy": 0.25, "neutral": 0.25, "sad": 0.25}',
        '{"angry": 0.5, "sad": 0.5, "note": "As an AI language model I guess"}',
    ],
)
def test_numbers_beside_words_that_decline_are_a_refusal(text):
    assert read("distribution", text).kind == "refusal"


def test_a_transcript_that_says_sorry_declines_nothing():
    assert read("distribution", '{"sad": 1, "transcript": "sorry, I can\'t believe it"}').probs == (0, 0, 0, 1)


@pytest.mark.parametrize(("text", "kind"), [("angry? no </think>sad", "label"), ("sad, maybe </think> hm", "invalid")])
def test_a_train_of_thought_without_its_beginning_is_left_out(text, kind):
    answer = read("label", text)
    assert answer.kind == kind and answer.probs in (None, (0, 0, 0, 1))


@pytest.mark.parametrize("text", ["neither", "Not happy.", "Happy? No, angry.", "negative"])
def test_first_tokens_of_a_text_that_chooses_nothing_are_no_probabilities(text):
    tokens = (("ne", math.log(0.6)), ("happy", math.log(0.3)))
    assert read("logprobs", text, top_logprobs=tokens).kind == "invalid"


def test_first_tokens_of_a_label_that_is_explained_are_probabilities():
    text = "Sad. The voice is low and slow, it trembles, and there are long pauses between all of the words."
    assert read("logprobs", text, top_logprobs=(("sad", math.log(0.9)),)).kind == "logprobs"


def test_half_a_surrogate_pair_can_be_stored_and_comes_back():
    reply = Reply("sad \ud800", "stop", "\udfff")
    assert Reply.from_json(reply.to_json()) == reply
    assert reply.to_json().encode() and Prompt(LABELS).parse(reply).reason.encode()


ENDLESS = {
    "braces": "{",
    "objects that never end": '{"a":',
    "objects in objects": '{"sad":{"a":[1,',
    "empty objects": "{}",
    "thoughts": "<think>",
    "apostrophes": "n't ",
    "zeros": "0.",
    "accents": "\u0301",
    "unseen characters": "\u200b",
    "characters that stand for many": "\ufdfa",
    "labels": "sad ",
    "hyphens": "sad-",
    "blanks": "\n",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_reply_made_to_take_long_is_read_soon(name):
    for length in (MAX_CHARACTERS - 1, 3 * MAX_CHARACTERS):
        text = (ENDLESS[name] * length)[:length]
        for form in ANSWER_FORMS:
            began = time.process_time()
            assert not read(form, text + "!").is_sample
            assert time.process_time() - began < 2.0


@pytest.mark.parametrize("depth", [100, 800, 3000])
def test_objects_of_any_depth_are_read_or_refused(depth):
    answer = read("distribution", '{"a":' * depth + '{"sad":1}' + "}" * depth)
    assert answer.probs in (None, (0, 0, 0, 1))


CHOICE = {
    "finish_reason": "stop",
    "message": {"content": "sad", "refusal": None},
    "logprobs": {"content": [{"token": "sad", "top_logprobs": [{"token": "sad", "logprob": -0.1}]}]},
}
# What JSON can hold in the place of anything.
ANYTHING = (None, True, 0, -1.5, 1e300, 10**400, "", "sad", "\ud800", [], [None], [5], {}, {"text": 5}, [{"text": [1]}])


def spoilt(value, rng):
    """Put something else in some places of a JSON value."""
    if rng.random() < 0.2:
        return rng.choice(ANYTHING)
    if isinstance(value, dict):
        return {key: spoilt(item, rng) for key, item in value.items()}
    return [spoilt(item, rng) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("form", ANSWER_FORMS)
def test_a_choice_of_any_shape_is_an_answer_or_none_and_can_be_stored(form):
    prompt, kinds = Prompt(LABELS, form), set()
    for number in range(1000):
        choice = spoilt(CHOICE, random.Random(number))
        reply = reply_of(choice)
        found = prompt.parse(reply)
        kinds.add(found.kind)
        assert reply.to_json().encode() and found.reason.encode() is not None
        assert found.probs in (None, (0, 0, 0, 1)), choice
    assert len(kinds) > 2


def test_an_alternative_without_a_number_is_no_certainty():
    position = {"token": "sad", "top_logprobs": [{"token": "angry"}, {"token": "sad", "logprob": -0.1}]}
    reply = reply_of({"message": {"content": "sad"}, "logprobs": {"content": [position]}})
    assert Prompt(LABELS, "logprobs").parse(reply).probs == (0, 0, 0, 1)


@pytest.mark.parametrize("choices", [{"0": {}}, 5, "sad", True])
def test_choices_that_are_no_list_are_no_answers(choices):
    assert responses(Prompt(LABELS), {"choices": choices}) == []


def test_names_of_a_server_can_be_stored_whatever_they_are():
    body = {"choices": [CHOICE], "model": "m\ud800", "system_fingerprint": {"\udfff": 1}}
    (response,) = responses(Prompt(LABELS, "label"), body)
    assert response.served_model.encode() and response.answer.is_sample
    assert response.system_fingerprint == ""
