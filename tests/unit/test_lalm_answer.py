import math
import re
import time

import pytest
import real_replies

from speechbrain_mifuse.lalm.answer import Reply, parse_answer, parse_distribution, parse_label, parse_logprobs
from speechbrain_mifuse.lalm.completion import reply_of
from speechbrain_mifuse.lalm.prompt import ANSWER_FORMS, Prompt
from speechbrain_mifuse.utils.errors import UserError

LABELS = ("angry", "happy", "neutral", "sad")


def read(form, text, finish_reason="stop", **fields):
    return Prompt(LABELS, form).parse(Reply(text, finish_reason, **fields))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"angry": 0.5, "happy": 0.25, "neutral": 0.25, "sad": 0}', (0.5, 0.25, 0.25, 0)),
        ('```json\n{"angry": 1, "sad": 1}\n```', (0.5, 0, 0, 0.5)),
        ('Here you go {hope it helps}: {"sad": 0.2} bye', (0, 0, 0, 1)),
        ('{"Anger": "75%", "HAPPINESS ": "25%"}', (0.75, 0.25, 0, 0)),
        ('{"probabilities": {"neutral": 3, "joy": 1}}', (0, 0.25, 0.75, 0)),
        ('{"angry": 2, "confidence": 0.9, "note": "loud"}', (1, 0, 0, 0)),
        ('<think>{"angry": 1}? no</think>{"sad": 1}', (0, 0, 0, 1)),
        ('{"sad": 1}\n{"sad": 2.0}', (0, 0, 0, 1)),
        ('{"angry": 0.25, "happy": 0.25, "neutral": 0.25, "sad": 0.25}', (0.25, 0.25, 0.25, 0.25)),
    ],
)
def test_distribution_is_found_and_normalised(text, expected):
    answer = read("distribution", text)
    assert answer.kind == "distribution"
    assert answer.probs == pytest.approx(expected)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   \n",
        "gibberish",
        "{}",
        "[]",
        "null",
        '{"angry": -0.1, "sad": 1.1}',
        '{"angry": NaN}',
        '{"angry": Infinity, "sad": 1}',
        '{"angry": 1e308, "sad": 1e308, "happy": 1e308}',
        '{"angry": 0, "happy": 0, "neutral": 0, "sad": 0}',
        '{"angry": true}',
        '{"angry": null, "sad": 1}',
        '{"angry": "high"}',
        '{"angry": 0.5, "angry": 0.1}',
        '{"angry": 0.5, "anger": 0.5}',
        '{"angry": 1} or rather {"sad": 1}',
        '{"joyless": 1}',
        '{"angry": 0.7, "hap',
        '{"angry": ' + "9" * 400 + "}",
        "{" * 5000,
        "The speaker is angry.",
        '<think>{"angry": 1}',
    ],
)
def test_unusable_distribution_is_invalid_and_has_no_probabilities(text):
    answer = read("distribution", text)
    assert (answer.kind, answer.probs, answer.is_sample) == ("invalid", None, False)
    assert answer.reason


def test_bare_label_in_place_of_a_distribution_is_kept_as_a_label():
    assert read("distribution", "Sadness.").kind == "label"


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("angry", "angry"),
        (" Angry.\n", "angry"),
        ("**Sad**", "sad"),
        ('"happiness"', "happy"),
        ("Emotion: Neutral", "neutral"),
        ("The speaker sounds sad, very sad.", "sad"),
        ('{"emotion": "anger"}', "angry"),
        ("{'predictedEmotion': 'anger', 'confidence': 0.9,}", "angry"),
        ("Emotion: happy\nConfidence: 90%\nIntensity: 3", "happy"),
        ("<answer>Sad</answer>", "sad"),
        ("<think>happy? sad? no</think>neutral", "neutral"),
    ],
)
def test_label_is_read_as_one_hot(text, label):
    answer = read("label", text)
    assert answer.kind == "label"
    assert answer.probs == tuple(float(other == label) for other in LABELS)


@pytest.mark.parametrize(
    "text",
    [
        "angry or sad",
        "neither",
        "not angry",
        "isn't happy",
        "unhappy",
        "mad",
        "fearful",
        '{"angry": 0.1}',
        '{"angry": 0.7, "hap',
        '[{"label": "sad", "score": 0.05}, {"label": "puzzled", "score": 0.95}]',
        "neutral: 0.05\npuzzled: 0.95",
        "angry " + "because of the loud voice and the tense manner of speaking in this recording, I think",
    ],
)
def test_text_that_does_not_choose_one_label_is_invalid(text):
    answer = read("label", text)
    assert (answer.kind, answer.probs) == ("invalid", None)


@pytest.mark.parametrize("form", ANSWER_FORMS)
@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't identify anger from audio.",
        "I'd be happy to help! Please upload the audio.",
        "As an AI language model I don't have feelings, sad or otherwise.",
        "I am unable to hear audio. Neutral?",
        "I don’t have access to the audio, sad to say.",
    ],
)
def test_refusal_in_words_is_a_refusal_in_every_form(form, text):
    tokens = (("happy", math.log(0.9)),)
    answer = read(form, text, top_logprobs=tokens)
    assert (answer.kind, answer.probs) == ("refusal", None)


@pytest.mark.parametrize("form", ANSWER_FORMS)
@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"finish_reason": "length"}, "invalid"),
        ({"finish_reason": "content_filter"}, "refusal"),
        ({"refusal": "no"}, "refusal"),
    ],
)
def test_cut_off_or_filtered_reply_is_no_sample_whatever_it_says(form, fields, kind):
    for text in ("angry", '{"angry": 1}'):
        answer = read(form, text, **fields, top_logprobs=(("angry", -0.1),))
        assert (answer.kind, answer.probs) == (kind, None)


def test_logprobs_are_renormalised_over_the_labels_and_the_mass_is_kept():
    tokens = (("Ang", math.log(0.4)), (" sad", math.log(0.1)), ("Ġneut", math.log(0.2)), ("the", math.log(0.2)))
    answer = read("logprobs", "Angry", top_logprobs=tokens)
    assert answer.kind == "logprobs"
    assert answer.probs == pytest.approx((4 / 7, 0, 2 / 7, 1 / 7))
    assert answer.label_mass == pytest.approx(0.7)


def test_token_that_begins_two_labels_counts_for_neither():
    reply = Reply("surprised", "stop", None, (("s", math.log(0.5)), ("su", math.log(0.3)), ("sad", math.log(0.1))))
    answer = parse_logprobs(reply, ("sad", "surprised"))
    assert answer.probs == pytest.approx((0.25, 0.75))


@pytest.mark.parametrize(
    "tokens",
    [None, (), (("I", -0.1), ("a", -2.0), ("An", -2.0)), (("angry", -30.0),), (("angry", 0.0), ("sad", 0.0))],
)
def test_logprobs_without_plausible_label_mass_fall_back_to_the_text(tokens):
    assert read("logprobs", "sad", top_logprobs=tokens).kind == "label"
    assert read("logprobs", "hmm", top_logprobs=tokens).kind == "invalid"


def test_probability_zero_and_nan_in_logprobs_are_survived():
    answer = read("logprobs", "sad", top_logprobs=(("sad", -0.5), ("happy", -9999.0), ("angry", float("nan"))))
    assert answer.probs == (0, 0, 0, 1)


def test_labels_that_share_synonyms_do_not_borrow_words():
    assert parse_label(Reply("afraid"), ("fear", "fearful")).kind == "invalid"
    assert parse_label(Reply("fearful"), ("fear", "fearful")).probs == (0, 1)


def test_label_inside_a_longer_label_is_not_named():
    assert parse_label(Reply("I would say very sad"), ("sad", "very sad")).probs == (0, 1)


def test_reply_survives_storage_and_parses_the_same():
    reply = Reply("wütend", "stop", None, (("wü", -0.25),))
    again = Reply.from_json(reply.to_json())
    assert again == reply
    assert parse_answer(again, ("wütend", "froh"), [parse_logprobs]).probs == (1, 0)


def test_first_parser_explains_when_all_fail():
    answer = parse_answer(Reply("hm"), LABELS, [parse_distribution, parse_label])
    assert answer.reason == parse_distribution(Reply("hm"), LABELS).reason


def test_prompt_hash_follows_everything_that_is_sent():
    base = Prompt(LABELS)
    others = [
        Prompt(LABELS[::-1]),
        Prompt(LABELS[:3]),
        Prompt(LABELS, "label"),
        Prompt(LABELS, "logprobs"),
        Prompt(LABELS, template="{labels}? {answer}"),
    ]
    hashes = {prompt.prompt_hash() for prompt in [base, *others]}
    assert len(hashes) == len(others) + 1
    assert Prompt(list(LABELS)).prompt_hash() == base.prompt_hash()
    assert Prompt(list(LABELS)) == base and hash(base) == hash(Prompt(LABELS))


def test_template_with_json_braces_is_left_alone():
    text = Prompt(("a1", "b1"), template='{"x": {labels}} {answer}').text()
    assert text.startswith('{"x": a1, b1} Reply')


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"labels": ["angry"]}, "labels"),
        ({"labels": ["angry", "Angry"]}, "labels"),
        ({"labels": ["angry", " "]}, "labels"),
        ({"labels": LABELS, "answer_form": "essay"}, "essay"),
        ({"labels": LABELS, "template": "{labels}"}, "{answer}"),
    ],
)
def test_unusable_prompt_is_refused_by_name(arguments, named):
    with pytest.raises(UserError, match=named):
        Prompt(**arguments)


@pytest.mark.parametrize("case", real_replies.CASES, ids=lambda case: case.name)
def test_real_reply_has_its_right_reading(case):
    reply = reply_of(case.choice)
    assert Reply.from_json(reply.to_json()) == reply
    answer = Prompt(real_replies.LABELS).parse(reply)
    if len(case.reading) == 2:
        kind, reason = case.reading
        assert (answer.kind, answer.probs) == (kind, None) and re.search(reason, answer.reason)
    else:
        assert answer.kind == "distribution" and answer.probs == pytest.approx(case.reading)


@pytest.mark.parametrize("finish_reason", ["stop", "STOP", "end_turn", None])
@pytest.mark.parametrize("begin, end", real_replies.THOUGHTS.values(), ids=real_replies.THOUGHTS)
def test_label_after_thoughts_is_read(begin, end, finish_reason):
    assert read("label", f"{begin}happy? sad? no{end}neutral", finish_reason).probs == (0, 0, 1, 0)
    assert read("label", f"{begin}happy? sad? no", finish_reason).kind == "invalid"


@pytest.mark.parametrize("finish_reason", ["MAX_TOKENS", "max_tokens", "length", "model_length"])
def test_label_that_was_cut_off_is_no_sample_in_any_form(finish_reason):
    for form in ANSWER_FORMS:
        assert read(form, "angry", finish_reason, top_logprobs=(("angry", -0.1),)).kind == "invalid"


def test_a_megabyte_of_thoughts_is_read_soon():
    began = time.process_time()
    assert read("distribution", f"<think>{'{[“hm, ' * 150_000}</think>{real_replies.OBJECT}").is_sample
    assert not read("distribution", "<think" * 150_000).is_sample
    assert time.process_time() - began < 2
