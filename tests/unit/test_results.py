"""From predictions to files: what is missing counts as wrong, fractions stay fractions, the table holds them all."""

import json

import pytest
import torch

from speechbrain_mifuse import __version__
from speechbrain_mifuse.corpora.manifest import CorpusError, atomic_write
from speechbrain_mifuse.evaluation.metrics import scores
from speechbrain_mifuse.evaluation.plots import plot_confusion
from speechbrain_mifuse.evaluation.results import FIELDS, evaluate, side_by_side, write_results

LABELS = ("angry", "happy", "sad")
EMOTIONS = ["angry", "angry", "happy", "happy", "sad", "sad", "sad", "angry"]
ABOUT = {
    "source": "nemo",
    "target": "ravdess",
    "teacher": "emodb",
    "seed": 3,
    "encoder": "toy",
    "protocol": "by speaker",
    "selection": "last step",
    "n_train": 9,
}


@pytest.fixture
def manifest(tmp_path):
    rows = {f"t-{n}": {"wav": f"{n}.wav", "speaker": f"s{n % 3}", "emo": emo} for n, emo in enumerate(EMOTIONS)}
    atomic_write(tmp_path / "m" / "corpus.json", '{"data_root": "/toy"}')
    atomic_write(tmp_path / "m" / "test.json", json.dumps(rows))
    return tmp_path / "m" / "test.json"


def towards(*classes):
    return {f"t-{n}": [0.8 if c == chosen else 0.1 for c in range(3)] for n, chosen in enumerate(classes)}


def test_scores_are_those_of_the_most_likely_class(manifest):
    predicted = [0, 1, 1, 1, 2, 0, 2, 0]
    found = evaluate(towards(*predicted), manifest, LABELS)
    reference = torch.tensor([LABELS.index(emo) for emo in EMOTIONS])
    expected = scores(torch.tensor(predicted), reference, 3)
    assert {key: found[key] for key in expected} == expected
    assert (found["n_test"], found["test_speakers"], found["unanswered"]) == (8, 3, 0)
    assert 0 <= found["ci95"][0] <= found["UA"] <= found["ci95"][1] <= 1


def test_an_utterance_without_prediction_counts_as_wrong(manifest):
    predictions = towards(0, 0, 1, 1, 2, 2, 2, 0)
    del predictions["t-4"]
    found = evaluate(predictions, manifest, LABELS)
    assert (found["WA"], found["unanswered"], found["n_test"]) == (7 / 8, 1, 8)
    assert found["counts"][2].tolist() == [0, 0, 2, 1]


def test_a_prediction_of_an_utterance_that_is_not_in_the_manifest_counts_for_nothing(manifest):
    predictions = towards(0, 0, 1, 1, 2, 2, 2, 0)
    assert evaluate({**predictions, "t-99": [1.0, 0.0, 0.0]}, manifest, LABELS)["n_test"] == 8


def test_the_order_of_predictions_does_not_matter(manifest):
    predictions = towards(0, 1, 1, 1, 2, 0, 2, 0)
    turned = dict(reversed(predictions.items()))
    first, second = (evaluate(p, manifest, LABELS) for p in (predictions, turned))
    assert first.pop("counts").equal(second.pop("counts")) and first == second


def test_the_order_of_labels_decides_the_class(manifest):
    turned = evaluate(towards(2, 2, 1, 1, 0, 0, 0, 2), manifest, LABELS[::-1])
    assert turned["UA"] == 1.0


def test_an_unknown_label_is_an_error_naming_utterance_and_label(manifest):
    with pytest.raises(CorpusError, match="'t-4' has the label 'sad', which is none of angry, happy"):
        evaluate(towards(0, 0, 1, 1, 0, 0, 0, 0), manifest, LABELS[:2])


def test_a_missing_manifest_is_an_error_naming_it(tmp_path):
    atomic_write(tmp_path / "corpus.json", '{"data_root": "/toy"}')
    with pytest.raises(CorpusError, match=r"test.json: not found"):
        evaluate({}, tmp_path / "test.json", LABELS)


def test_results_hold_every_field_in_order_and_fractions(manifest, tmp_path):
    scored = evaluate(towards(0, 1, 1, 1, 2, 0, 2, 0), manifest, LABELS)
    written = write_results(tmp_path / "mi_fuse", scored, LABELS, method="mi_fuse", **ABOUT)
    found = json.loads((tmp_path / "mi_fuse" / "results.json").read_text())
    assert found == written
    assert tuple(found)[: len(FIELDS)] == FIELDS
    assert {key: found[key] for key in ABOUT} == ABOUT
    assert found["code_version"] == __version__ and found["labels"] == list(LABELS)
    assert (found["UA"], found["WA"]) == (scored["UA"], scored["WA"]) and 0 <= found["macro_F1"] <= 1
    assert sum(map(sum, found["confusion"])) == 8


@pytest.mark.parametrize("field", [field for field in FIELDS if field != "n_test"])
def test_results_without_a_field_are_refused(field, manifest, tmp_path):
    scored = evaluate(towards(0, 1, 1, 1, 2, 0, 2, 0), manifest, LABELS)
    about = {**ABOUT, "method": "mi_fuse"}
    del about[field]
    with pytest.raises(KeyError, match=field):
        write_results(tmp_path, scored, LABELS, **about)


def test_the_confusion_figure_is_a_png_with_a_column_more_for_missing_answers(tmp_path):
    plot_confusion(tmp_path / "a.png", torch.tensor([[3, 1, 0], [0, 2, 0]]), ["angry", "sad"], "toy")
    plot_confusion(tmp_path / "b.png", torch.tensor([[3, 1, 1], [0, 2, 0]]), ["angry", "sad"], "toy")
    sizes = []
    for name in ("a", "b"):
        content = (tmp_path / f"{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG")
        sizes.append(int.from_bytes(content[16:20], "big"))
    assert sizes[0] < sizes[1]


def test_the_table_shows_every_method_that_has_results_in_the_order_asked(manifest, tmp_path):
    for method, predicted in (("oracle", (0, 0, 1, 1, 2, 2, 2, 0)), ("mi_fuse", (0, 1, 1, 1, 2, 0, 2, 0))):
        scored = evaluate(towards(*predicted), manifest, LABELS)
        write_results(tmp_path / method, scored, LABELS, method=method, **ABOUT)
    text = side_by_side(tmp_path, ["source_only", "mi_fuse", "oracle"])
    assert (tmp_path / "results.md").read_text() == text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["method", "mi_fuse", "oracle"]
    assert rows[2] == ["oracle", "100.0", "100.0 to 100.0", "100.0", "100.0"]
    assert rows[1][1] == "77.8" and rows[1][3] == "75.0"
    assert all(said in text for said in ("nemo to ravdess", "by speaker", "last step", "3 test speakers", __version__))


def test_no_results_give_no_table(tmp_path):
    assert side_by_side(tmp_path, ["mi_fuse"]) == ""
    assert not (tmp_path / "results.md").exists()
