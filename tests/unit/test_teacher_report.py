"""The teacher report: its numbers are those that can be counted by hand, and its files are whole."""

import hashlib
import json
import math
import re

import numpy
import pytest
import soundfile
import torch

from speechbrain_mifuse.adaptation.uncertainty import mutual_information
from speechbrain_mifuse.cli.main import main
from speechbrain_mifuse.evaluation.metrics import reliability
from speechbrain_mifuse.lalm.answer import KINDS, Answer, Response
from speechbrain_mifuse.lalm.profile import Price, Tokens
from speechbrain_mifuse.lalm.store import LabelStore, Query, Record, Samples
from speechbrain_mifuse.report.teacher_report import (
    cost_figures,
    reference_of,
    report_store,
    teacher_figures,
    write_teacher_report,
)
from speechbrain_mifuse.utils.audio import content_hash, load_audio
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.files import atomic_write

LABELS = ("angry", "sad")
QUERY = Query("0" * 64, LABELS, "m", "http://127.0.0.1:1/v1", {"temperature": 1.0, "seed": 0}, prompt="Which?")
FILES = {"teacher.json", "teacher.md", "teacher_answers.png", "teacher_uncertainty.png"}


def samples_of(*utterances):
    """Each utterance a list of probabilities of "angry", or the name of a kind without any, or None."""
    codes = {None: -1, "refusal": KINDS.index("refusal"), "invalid": KINDS.index("invalid")}
    kinds = torch.tensor([[codes.get(item, 0) for item in row] for row in utterances], dtype=torch.int8)
    angry = torch.tensor([[item if isinstance(item, float) else 0.0 for item in row] for row in utterances])
    mask = kinds == 0
    return Samples(torch.stack([angry, 1 - angry], -1) * mask[..., None], mask, kinds)


# Teacher's classes: angry, angry, sad, sad, none.
SAMPLES = samples_of([0.9, 0.7], [0.6, "refusal"], [0.2, 0.2], [0.4, "invalid"], ["refusal", None])
REFERENCE = torch.tensor([0, 1, 1, 1, 0])


def test_answers_are_counted_by_kind_and_by_the_teachers_class():
    found = teacher_figures(SAMPLES, LABELS)
    assert (found["utterances"], found["answered"], found["samples"], found["never_asked"]) == (5, 4, 6, 1)
    assert found["kinds"] == {"distribution": 6, "logprobs": 0, "label": 0, "refusal": 2, "invalid": 1}
    angry, sad = found["classes"]["angry"], found["classes"]["sad"]
    assert (angry["predicted"], angry["refusal"], angry["invalid"]) == (2, 0.25, 0.0)
    assert (sad["predicted"], sad["refusal"], sad["invalid"]) == (2, 0.0, 0.25)
    assert found["no_prediction"] == {"utterances": 1, "refusal": 1.0, "invalid": 0.0}
    assert angry["mean_probability"] == pytest.approx((0.8 + 0.6 + 0.2 + 0.4) / 4, abs=1e-6)
    assert "scores" not in found and "source" not in found and "cost" not in found


def test_mutual_information_is_taken_where_there_are_two_samples():
    found = teacher_figures(SAMPLES, LABELS)
    expected = float(mutual_information(SAMPLES.probs[:1])[0])
    assert expected > 0 and found["mutual_information"]["utterances"] == 2
    assert found["mutual_information"]["mean"] == pytest.approx(expected / 2, abs=1e-6)
    assert found["classes"]["sad"]["mutual_information"]["median"] == 0.0
    one = teacher_figures(samples_of([0.9], [0.2]), LABELS)
    assert one["mutual_information"] is None and one["classes"]["angry"]["mutual_information"] is None


def test_scores_against_labels_are_those_counted_by_hand():
    found = teacher_figures(SAMPLES, LABELS, REFERENCE)
    angry, sad = found["classes"]["angry"], found["classes"]["sad"]
    assert (angry["reference"], angry["recall"], angry["precision"]) == (2, 0.5, 0.5)
    assert (sad["reference"], sad["recall"], sad["precision"]) == (3, pytest.approx(2 / 3, abs=1e-6), 1.0)
    assert found["scores"]["WA"] == pytest.approx(3 / 5) and found["scores"]["UA"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert angry["of_reference"] == {"refusal": pytest.approx(1 / 3, abs=1e-6), "invalid": 0.0}
    # Four utterances in bins of their own: stated 0.8, 0.6, 0.2, 0.4 against 1, 0, 0, 0.
    assert angry["calibration"]["error"] == pytest.approx((0.2 + 0.6 + 0.2 + 0.4) / 4, abs=1e-5)
    # Of the class it chooses: 0.8 twice, both right; 0.6 twice, one right.
    assert found["scores"]["calibration"]["error"] == pytest.approx((2 * 0.2 + 2 * 0.1) / 4, abs=1e-5)


def test_a_calibrated_teacher_has_no_error_and_a_boaster_has_its_excess():
    generator = torch.Generator().manual_seed(0)
    stated = torch.rand(20000, generator=generator)
    so = torch.rand(20000, generator=generator) < stated
    assert reliability(stated, so).error < 0.02
    boaster = reliability(torch.full((1000,), 0.99), torch.arange(1000) < 600)
    assert boaster.error == pytest.approx(0.39, abs=1e-5) and boaster.count == [1000]
    edges = reliability(torch.tensor([0.0, 1.0]), torch.tensor([False, True]))
    assert edges.error == 0 and edges.count == [1, 1]
    assert reliability(torch.zeros(0), torch.zeros(0, dtype=torch.bool)).error == 0


def test_agreement_with_the_source_classifier_and_who_is_right_where_they_differ():
    angry = torch.tensor([0.9, 0.1, 0.1, 0.8, 0.7])
    source = torch.stack([angry, 1 - angry], -1)[:, None].expand(5, 4, 2)
    found = teacher_figures(SAMPLES, LABELS, REFERENCE, source)["source"]
    assert found["agreement"] == 0.5 and found["kappa"] == pytest.approx(0.0, abs=1e-6)
    assert found["mutual_information"] == {"mean": 0.0, "median": 0.0, "utterances": 5} and found["passes"] == 4
    assert found["right_where_they_agree"] == 1.0
    assert (found["teacher_right_where_they_differ"], found["source_right_where_they_differ"]) == (0.5, 0.5)
    assert found["scores"]["WA"] == pytest.approx(4 / 5)
    same = teacher_figures(SAMPLES, LABELS, source=source[[0, 0, 1, 1, 0]][:, :1])["source"]
    assert (same["agreement"], same["kappa"], same["mutual_information"]) == (1.0, 1.0, None)


def test_cost_is_tokens_times_price_with_batches_at_half():
    price = Price(2.0, 10.0, 20.0, source="a page, today")
    found = cost_figures(Tokens(1000, 2000, 100), Tokens(1000, 0, 0), 6, price)
    live = (1000 * 2 + 2000 * 10 + 100 * 20) / 1e6
    assert found["cost"] == pytest.approx(live + 0.001) and found["cost_per_1000_samples"] == pytest.approx(
        (live + 0.001) / 6 * 1000, abs=1e-6
    )
    assert found["prices"] == "a page, today" and found["tokens"] == {"text": 1000, "audio": 2000, "output": 100}
    assert "cost" not in cost_figures(Tokens(1), Tokens(), 6, None)


def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 3000


def test_report_writes_table_numbers_and_figures_and_nothing_else(tmp_path):
    source = torch.rand(5, 16, 2).softmax(-1)
    cost = cost_figures(Tokens(1000, 2000, 100), Tokens(), 6, Price(1.0, 1.0, 1.0))
    text = write_teacher_report(tmp_path, SAMPLES, LABELS, "m at here", REFERENCE, source, cost)
    assert {path.name for path in tmp_path.iterdir()} == FILES | {"teacher_calibration.png"}
    assert all(is_png(path) for path in tmp_path.glob("*.png"))
    assert (tmp_path / "teacher.md").read_text() == text and text.startswith("# Teacher: m at here\n")
    for part in ("## Answers", "## What it says", "## Against the labels", "## Beside the source", "## Cost"):
        assert part in text
    assert "| angry | 2 | 50.0 | 50.0 | 35.0 | 33.3 | 0.0 |" in text
    found = json.loads((tmp_path / "teacher.json").read_text())
    assert found["about"] == "m at here" and found["scores"]["WA"] == pytest.approx(0.6)


def test_without_labels_source_and_cost_their_parts_are_left_out(tmp_path):
    text = write_teacher_report(tmp_path, SAMPLES, LABELS, "m")
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert not any(part in text for part in ("the labels", "source classifier", "Cost", "None", "nan"))


@pytest.mark.parametrize("row", [["refusal", "invalid"], [None, None], [1.0, 0.0]])
def test_teachers_that_say_nothing_or_only_single_labels_are_reported_too(tmp_path, row):
    samples = samples_of(row, row)
    text = write_teacher_report(tmp_path, samples, LABELS, "m", torch.tensor([0, 0]), torch.full((2, 3, 2), 0.5))
    assert "nan" not in text and all(is_png(path) for path in tmp_path.glob("*.png"))
    assert math.isfinite(teacher_figures(samples, LABELS, torch.tensor([0, 1]))["scores"]["UA"])


def test_inputs_that_do_not_fit_are_one_clear_error():
    with pytest.raises(UserError, match="no utterance"):
        teacher_figures(Samples(*(tensor[:0] for tensor in SAMPLES)), LABELS)
    with pytest.raises(UserError, match="labels has 2 utterances and the teacher 5"):
        teacher_figures(SAMPLES, LABELS, REFERENCE[:2])
    with pytest.raises(UserError, match="source classifier has 1 utterances"):
        teacher_figures(SAMPLES, LABELS, source=torch.zeros(1, 2, 2))


def test_reference_is_read_from_labelled_rows_alone():
    assert reference_of({"a": {"emo": "sad"}, "b": {"emo": "angry"}}, LABELS).tolist() == [1, 0]
    assert reference_of({"a": {}, "b": {}}, LABELS) is None
    with pytest.raises(UserError):
        reference_of({"a": {"emo": "sad"}, "b": {}}, LABELS)


def digest(name):
    return hashlib.sha256(name.encode()).hexdigest()


@pytest.fixture
def collected(tmp_path):
    """A store of two queries, and a manifest with its unlabelled twin."""
    with LabelStore(tmp_path / "labels.sqlite") as store:
        usage = {"prompt_tokens": 100, "completion_tokens": 10}
        for query in (QUERY, Query("1" * 64, LABELS, "other", "http://127.0.0.1:1/v1", {"temperature": 1})):
            for name, angry in (("t-a", 0.9), ("t-b", 0.2)):
                answer = Answer("distribution", (angry, 1 - angry))
                store.put_many(query, [Record(digest(name), k, name, Response(answer, "{}", k, usage)) for k in (0, 1)])
    rows = {"t-a": {"wav": "a.wav", "speaker": "1"}, "t-b": {"wav": "b.wav", "speaker": "1"}}
    atomic_write(tmp_path / "m" / "corpus.json", '{"data_root": "/toy"}')
    atomic_write(tmp_path / "m" / "adapt_unlabelled.json", json.dumps(rows))
    labelled = {key: {**row, "emo": "angry"} for key, row in rows.items()}
    atomic_write(tmp_path / "m" / "adapt.json", json.dumps(labelled))
    return tmp_path


def test_labels_report_reads_a_store_a_manifest_and_prices(collected, capsys):
    profile = collected / "prices.yaml"
    atomic_write(
        profile,
        "price: {per_million_input_text: 1, per_million_input_audio: 10, per_million_output: 100, source: a page}\n",
    )
    arguments = ["labels", "report", str(collected / "labels.sqlite"), "--output", str(collected / "out")]
    arguments += ["--query", QUERY.digest[:6], "--profile", str(profile)]
    main([*arguments, "--manifest", str(collected / "m" / "adapt_unlabelled.json")])
    shown = capsys.readouterr().out
    assert "## Against the labels" not in shown and "0.0080 USD for the 4 samples of this query" in shown
    main([*arguments, "--manifest", str(collected / "m" / "adapt.json")])
    assert "UA 50.0 %" in capsys.readouterr().out
    assert {path.name for path in (collected / "out").iterdir()} == FILES | {"teacher_calibration.png"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--query", ""], r"--query '' fits 2 of the 2 queries"),
        (["--query", "zz"], r"--query 'zz' fits none of the 2 queries .*m\).*other\)"),
    ],
)
def test_labels_report_asks_which_query_is_meant(collected, capsys, change, message):
    manifest = collected / "m" / "adapt.json"
    arguments = ["labels", "report", str(collected / "labels.sqlite"), "--manifest", str(manifest), "--output", "x"]
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, *change])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_manifest_that_the_store_does_not_know_is_an_error(collected, tmp_path):
    soundfile.write(tmp_path / "c.wav", numpy.ones(1600) / 8, 16000)
    rows = {"t-c": {"wav": str(tmp_path / "c.wav"), "speaker": "1"}}
    atomic_write(collected / "m" / "other.json", json.dumps(rows))
    with LabelStore(collected / "labels.sqlite") as store, pytest.raises(UserError, match="no answer about any"):
        report_store(store, store.queries()[0], collected / "m" / "other.json", tmp_path / "out")


def test_a_recording_known_under_another_id_is_found_by_its_content(tmp_path):
    soundfile.write(tmp_path / "c.wav", numpy.ones(1600) / 8, 16000)
    audio = content_hash(load_audio(tmp_path / "c.wav"))
    atomic_write(tmp_path / "m" / "corpus.json", '{"data_root": "/toy"}')
    rows = {"t-new": {"wav": str(tmp_path / "c.wav"), "speaker": "1"}}
    atomic_write(tmp_path / "m" / "adapt.json", json.dumps(rows))
    with LabelStore(tmp_path / "labels.sqlite") as store:
        store.put_many(QUERY, [Record(audio, 0, "old-id", Response(Answer("label", (1.0, 0.0)), "{}"))])
        summary = store.queries()[0]
        text = report_store(store, summary, tmp_path / "m" / "adapt.json", tmp_path / "out")
    assert "1 utterances, 1 samples wanted of each; 1 utterances have any" in text
