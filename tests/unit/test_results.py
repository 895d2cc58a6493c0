"""From predictions to files: what is missing counts as wrong, fractions stay fractions, the table holds them all."""

import json
import math
import re

import numpy as np
import pytest
import torch
from scipy import stats

from speechbrain_mifuse import __version__
from speechbrain_mifuse.corpora.manifest import CorpusError
from speechbrain_mifuse.evaluation.aggregate import (
    Comparison,
    bootstrap,
    difference_table,
    interval_table,
    protocol,
    read_records,
    seed_table,
    trait_table,
    transfer_table,
)
from speechbrain_mifuse.evaluation.metrics import scores, scores_of
from speechbrain_mifuse.evaluation.results import evaluate, side_by_side
from speechbrain_mifuse.report.figures import plot_confusion, plot_heatmap, plot_transfers
from speechbrain_mifuse.report.results import FIELDS, write_results
from speechbrain_mifuse.report.selection_report import selection_table, spearman
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.files import atomic_write

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
    first = (tmp_path / "a.png").read_bytes()
    plot_confusion(tmp_path / "a.png", torch.tensor([[1, 3, 0], [2, 0, 0]]), ["angry", "sad"], "another")
    assert (tmp_path / "a.png").read_bytes() != first
    plot_confusion(tmp_path / "a.png", torch.tensor([[3, 1, 0], [0, 2, 0]]), ["angry", "sad"], "toy")
    assert (tmp_path / "a.png").read_bytes() == first, "nothing is left of the matrix before"


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


def result(method, seed, hits, source="a", target="b", **changes):
    """Result of two speakers with five clips of each of two classes; `hits` of each speaker's first class are right."""
    counts = {f"s{n}": [[right, 5 - right, 0], [0, 5, 0]] for n, right in enumerate(hits)}
    about = {"source": source, "target": target, "teacher": "c", "method": method, "seed": seed, "encoder": "toy"}
    about |= {"by_speaker": counts, "n_train": 7, "n_test": 20, "test_speakers": 2, "labels": ["x", "y"], "steps": 5}
    about |= {"selection": "last step", "diversity_weight": 1.0, "temperature": 0.2, "code_version": "1"}
    return about | {"UA": 0.5, "WA": 0.5, "macro_F1": 0.5} | changes


# UA %: half of the first class's recall, plus half of the second's, which is 100.
HITS = {"oracle": (5, 5), "mi_fuse": (4, 4), "shot": (1, 3), "nrc": (3, 3), "source_only": (1, 1)}


@pytest.fixture
def comparison():
    records = [result(m, s, hits, *t) for m, hits in HITS.items() for s in (2, 1) for t in (("a", "b"), ("b", "a"))]
    return Comparison(records, list(HITS))


def test_bounds_stand_at_the_ends_and_means_are_counted_by_hand(comparison):
    assert comparison.methods == ["source_only", "mi_fuse", "shot", "nrc", "oracle"]
    assert comparison.transfers == ["b to a", "a to b"] and comparison.seeds == [1, 2]
    assert comparison.means.tolist() == pytest.approx([60, 90, 70, 80, 100])


def test_the_share_of_the_way_from_source_to_oracle_is_that_of_the_means(comparison):
    assert [comparison.gap_closed(m) for m in comparison.methods] == pytest.approx([0, 75, 25, 50, 100])
    without = Comparison([r for r in comparison.records if r["method"] != "oracle"], comparison.methods[:-1])
    assert without.gap_closed("mi_fuse") is None and "way to oracle" not in transfer_table(without).markdown()


def test_the_best_baseline_is_the_highest_that_is_neither_ours_nor_a_bound(comparison):
    assert comparison.best_baseline == "nrc"
    head, ours = (
        difference_table(comparison, ["source_only"]).head,
        difference_table(comparison, ["source_only"]).rows[1],
    )
    assert head[2:] == ["above source_only", "over transfers", "above nrc, best baseline", "over transfers"]
    assert ours[0] == "mi_fuse" and ours[2].startswith("+30.0 (") and ours[4].startswith("+10.0 (")


def test_the_highest_without_labels_is_bold_and_the_bound_with_labels_is_not(comparison):
    rows = {row[0]: row for row in transfer_table(comparison).rows}
    assert rows["mi_fuse"][1] == "**90.0** ± 0.0" and rows["mi_fuse"][3] == "**90.0**"
    assert not any("**" in cell for name, row in rows.items() if name != "mi_fuse" for cell in row)


def test_latex_shows_the_numbers_of_markdown(comparison):
    for table in (transfer_table(comparison), difference_table(comparison, ["shot"])):
        latex = table.latex()
        numbers = [re.findall(r"\d+(?:\.\d+)?", text) for text in (table.markdown(), latex)]
        assert numbers[0] == numbers[1] and len(numbers[0]) > 20
        assert latex.count(r" \\") == 1 + len(table.rows) and r"source\_only" in latex
        assert all(latex.count(rule) == 1 for rule in (r"\toprule", r"\midrule", r"\bottomrule"))
    assert r"$+$10.0" in latex and r"\textbf{90.0} $\pm$ 0.0" in transfer_table(comparison).latex()


def test_the_table_of_seeds_has_a_row_for_each_and_their_average():
    records = [
        result("shot", seed, (hits, hits), *t) for seed, hits in ((1, 1), (2, 3)) for t in (("a", "b"), ("b", "a"))
    ]
    assert seed_table(Comparison(records, ["shot"])).rows == [
        ["shot", "1", "60.0", "60.0", "60.0"],
        ["", "2", "80.0", "80.0", "80.0"],
        ["", "mean ± sd", *["**70.0** ± 14.1"] * 3],
    ]


def test_bootstrap_gives_what_a_loop_over_draws_gives():
    rng = np.random.default_rng(3)
    counts = rng.integers(0, 4, (3, 4, 5, 2, 3))
    counts[:, :, 0, 1] = 0  # a speaker without the second class
    found = bootstrap(counts, np.random.default_rng(7), draws=50)
    generator = np.random.default_rng(7)
    seeds = generator.multinomial(4, np.full(4, 1 / 4), 50)
    speakers = generator.multinomial(5, np.full(5, 1 / 5), 50)
    for draw in range(50):
        picked = counts[:, np.repeat(range(4), seeds[draw])][:, :, np.repeat(range(5), speakers[draw])].sum(2)
        expected = [np.mean([scores_of(torch.tensor(run))["UA"] for run in runs]) for runs in picked]
        assert found[draw] == pytest.approx(expected)


def t_half(values, weight=1.0):
    """Half-width of Student's interval of a mean, by the textbook."""
    values = weight * np.array(values)
    return stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))


def test_an_interval_is_students_over_the_speakers_of_its_transfer_and_differences_are_paired(comparison):
    row = comparison.methods.index("shot")
    low, high = comparison.intervals[:, 0, row]
    half = t_half([60, 80])
    assert (low, high) == pytest.approx((max(70 - half, 0), min(70 + half, 100)))
    # Both methods lose on the same speaker: their difference does not vary though each of them does.
    records = [result(m, 1, hits) for m, hits in {"shot": (1, 3), "mi_fuse": (2, 4)}.items()]
    assert Comparison(records, ["shot", "mi_fuse"]).difference("mi_fuse", "shot") == pytest.approx((10, 10, 10))


def test_transfers_to_one_corpus_share_their_speakers_and_those_to_another_do_not():
    same = [result("shot", 1, hits, source, "b") for source, hits in (("a", (1, 3, 5)), ("d", (1, 3, 5)))]
    apart = [result("shot", 1, hits, "a", target) for target, hits in (("b", (1, 3, 5)), ("c", (1, 3, 5)))]
    scores = [60, 80, 100]
    one, two = (Comparison(records, ["shot"]).mean_intervals[:, 0] for records in (same, apart))
    assert one == pytest.approx((max(80 - t_half(scores), 0), 100))
    # Two groups of three: the variance halves, and the degrees of freedom are those of both.
    half = stats.t.ppf(0.975, 4) * np.std(scores, ddof=1) / math.sqrt(6)
    assert two[0] == pytest.approx(80 - half)


def test_seeds_widen_an_interval_and_one_seed_alone_does_not():
    records = [result("shot", seed, hits) for seed, hits in ((1, (1, 1)), (2, (3, 3)), (3, (5, 5)))]
    low = Comparison(records, ["shot"]).mean_intervals[0, 0]
    # Speakers do not differ, seeds do; all degrees of freedom are the seeds'.
    assert low == pytest.approx(max(80 - t_half([60, 80, 100]), 0))
    assert Comparison(records[:1], ["shot"]).mean_intervals[:, 0] == pytest.approx((60, 60))


def test_a_difference_over_transfers_is_students_over_their_means():
    hits = {"shot": ((1, 1), (2, 2), (3, 3)), "mi_fuse": ((2, 2), (4, 4), (4, 4))}
    records = [result(m, 1, h, "a", t) for m, each in hits.items() for t, h in zip("bcd", each, strict=True)]
    found = Comparison(records, list(hits)).difference_over_transfers("mi_fuse", "shot")
    half = t_half([10, 20, 10])
    assert found == pytest.approx((40 / 3, 40 / 3 - half, 40 / 3 + half))
    table = difference_table(Comparison(records, list(hits)), ["shot"])
    assert table.head == ["difference of mean UA", "mean", "above shot, best baseline", "over transfers"]


def test_one_speaker_gives_no_interval():
    records = [result(m, 1, hits) for m, hits in {"shot": (1,), "mi_fuse": (2,)}.items()]
    found = Comparison(records, ["shot", "mi_fuse"])
    assert found.mean_intervals[:, 0].tolist() == [0, 100]
    assert difference_table(found, ["shot"]).rows[1][2] == "+10.0 (interval unknown)"


def test_intervals_name_their_clusters(comparison):
    assert transfer_table(comparison).head[4] == "95 % interval (4 speakers, 2 seeds)"
    assert interval_table(comparison).head[1] == "b to a (2 speakers)"
    assert "a 2, b 2) and 2 seeds" in protocol(comparison)


def test_the_way_to_the_oracle_is_told_from_both_floors():
    hits = {"source_only": (1, 1), "source_adabn": (3, 3), "shot": (4, 4), "oracle": (5, 5)}
    table = transfer_table(Comparison([result(m, 1, h) for m, h in hits.items()], list(hits)))
    assert table.head[-2:] == ["of the way to oracle", "from source_adabn"]
    assert [row[-2:] for row in table.rows][2] == ["75 %", "50 %"]


def test_what_a_method_was_given_stands_in_a_table_where_it_is_known():
    traits = {"training": "no", "asked": "no", "statistics": "target", "prior_correction": "no", "transductive": "no"}
    known = Comparison([result("shot", 1, (1, 1), traits=traits)], ["shot"])
    assert trait_table(known).rows == [["shot", "no", "no", "target", "no", "no"]]
    assert trait_table(Comparison([result("shot", 1, (1, 1))], ["shot"])) is None


def test_upper_bounds_and_forms_of_our_own_are_no_rivals():
    hits = {"source_only": (1, 1), "shot": (2, 2), "g_once": (4, 4), "oracle_lda": (5, 5), "oracle": (5, 5)}
    found = Comparison([result(m, 1, h) for m, h in hits.items()], list(hits))
    assert found.best_baseline == "shot"
    assert [row[0] for row in transfer_table(found).rows if "**" in row[1]] == ["g_once"]


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([result("shot", 1, (1, 1)), result("nrc", 2, (1, 1))], "no result of shot, seed 2; nrc, seed 1"),
        ([result("shot", 1, (1, 1)), result("nrc", 1, (1, 1)), result("nrc", 1, (2, 2))], "two results of nrc"),
        ([result("shot", 1, (1, 1)), result("nrc", 1, (1, 1), temperature=1.0)], r"other settings \(temperature\)"),
        ([result("shot", 1, (1, 1)), result("nrc", 1, (1, 1), steps=9)], r"other settings \(steps\)"),
        ([result("shot", 1, (1, 1)), result("nrc", 1, (1, 1, 1))], r"other settings \(test speakers\)"),
    ],
)
def test_results_that_do_not_belong_together_are_refused(records, said):
    with pytest.raises(UserError, match=f"a to b: .*{said}"):
        Comparison(records, ["shot", "nrc"]).means  # noqa: B018


def test_transfers_that_differ_in_the_teacher_alone_are_told_apart():
    records = [result("shot", 1, (1, 1)), result("shot", 1, (3, 3), teacher="d")]
    found = Comparison(records, ["shot"])
    assert found.transfers == ["a to b (teacher c)", "a to b (teacher d)"] and found.means.tolist() == [70]


def test_damaged_and_missing_results_are_errors_naming_the_file(tmp_path):
    with pytest.raises(UserError, match=r"1 of 1 results are missing; the first is .*a\.json"):
        read_records([tmp_path / "a.json"])
    for text in ("{", "[]", '{"UA": 1}'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(UserError, match=r"a\.json: no whole result of one method"):
            read_records([tmp_path / "a.json"])
    (tmp_path / "a.json").write_text('{"UA": null}')
    with pytest.raises(UserError, match=r"a\.json: its test set has no labels"):
        read_records([tmp_path / "a.json"])


def test_the_figures_grow_with_methods_and_transfers_and_hold_a_handful_at_most(comparison, tmp_path):
    few = Comparison([r for r in comparison.records if r["method"] == "shot" and r["target"] == "b"], ["shot"])
    sizes = {}
    for name, shown in (("few", few), ("all", comparison)):
        plot_heatmap(tmp_path / f"{name}.png", shown)
        plot_transfers(tmp_path / f"{name}_t.png", shown, shown.methods)
        for path in (f"{name}.png", f"{name}_t.png"):
            content = (tmp_path / path).read_bytes()
            assert content.startswith(b"\x89PNG")
            sizes[path] = (int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big"))
    assert all(a > b for a, b in zip(sizes["all.png"], sizes["few.png"], strict=True))
    assert sizes["all_t.png"][0] > sizes["few_t.png"][0]
    with pytest.raises(UserError, match=r"--figure_methods: name 8 methods at most, out of source_only.*; given: tea"):
        plot_transfers(tmp_path / "a.png", comparison, ["tea"])


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3], [10, 20, 30], 1.0),
        ([1, 2, 3], [9, 4, 1], -1.0),
        ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 0.8),  # 1 - 6 * 4 / (5 * 24)
        ([1, 2, 2, 3], [1, 2, 3, 4], 4.5 / math.sqrt(4.5 * 5.0)),  # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4
        ([1, 2, math.nan, 3], [1, 2, 0, 3], 1.0),
        ([1, 1, 1], [1, 2, 3], math.nan),
        ([1, 2, 3], [5, 5, 5], math.nan),
        ([1], [1], math.nan),
        ([], [], math.nan),
    ],
)
def test_rank_correlation_is_that_counted_by_hand(first, second, expected):
    assert spearman(first, second) == pytest.approx(expected, nan_ok=True)
    assert spearman(second, first) == pytest.approx(expected, nan_ok=True)


def snapshots(accuracies, **criteria):
    return [
        {"step": 10 * n, "UA": ua, **{name: values[n] for name, values in criteria.items()}}
        for n, ua in enumerate(accuracies)
    ]


def test_the_report_on_selection_is_that_counted_by_hand():
    rises, falls = [0.4, 0.6, 0.5], [0.7, 0.5, 0.6]
    records = [
        result("shot", 1, (1, 1), snapshots=snapshots(rises, good=rises, flat=[1, 1, 1])[::-1]),
        result("shot", 2, (1, 1), snapshots=snapshots(falls, good=falls, flat=[1, 1, 1])),
        result("oracle", 1, (1, 1), snapshots=snapshots([0.9, 0.9, 0.9], good=[0, 0, 0], flat=[1, 2, 3])),
        result("source_only", 1, (1, 1)),
    ]
    lines = selection_table(records).splitlines()
    assert lines[2:6] == [
        "| good | +1.00 (2) | +1.00 (1) | 65.0 | +10.0 | +0.0 |",
        "| flat | none | none | 55.0 | +0.0 | -10.0 |",
        "| last step |  |  | 55.0 |  | -10.0 |",
        "| best snapshot (needs labels) |  |  | 65.0 | +10.0 |  |",
    ]
    assert lines[-1].endswith("Runs: 2; methods: 1; snapshots of a run: 3 to 3.")


def test_runs_without_snapshots_give_no_report_on_selection():
    assert selection_table([result("shot", 1, (1, 1)), result("nrc", 1, (1, 1), snapshots=[])]) == ""
