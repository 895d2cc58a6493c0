"""The page: it shows what the files say, only what is there, escapes everything, and refers to nothing outside."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from adaptation_support import make_world
from report_support import LABELS, METHODS, Read, tables_of, toy_run, toy_sweep

import speechbrain_mifuse
from speechbrain_mifuse.cli import main as cli
from speechbrain_mifuse.evaluation.aggregate import Comparison, read_records, transfer_table
from speechbrain_mifuse.evaluation.verdict import judge
from speechbrain_mifuse.experiments import run_report, sweep
from speechbrain_mifuse.experiments.adaptation import plane
from speechbrain_mifuse.report.cases import read_cases, read_log
from speechbrain_mifuse.report.figures import Line, curves
from speechbrain_mifuse.report.page import write_report
from speechbrain_mifuse.report.sections import method_reliability
from speechbrain_mifuse.utils.errors import UserError

VERDICT = "Signs without labels"
RUN_TITLES = ["Methods", "Confusion matrices", "Agreement and flips", "Training", "Weights of the teachers"]
RUN_TITLES += ["Calibration", "Speakers", "Before and after"]
HOSTILE = "<script>window.ran=1</script>\"'><img src=x onerror=window.ran=1>{{body}}"


def page_of(folder, **options):
    return write_report(folder, **options).read_text(encoding="utf-8")


def titles(text):
    return re.findall(r"<h2[^>]*>([^<]*)</h2>", text)


def rewrite(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def run(tmp_path):
    return toy_run(tmp_path / "run")


def write_verdict(run, shift=0):
    """What `adapt` leaves: both teachers and the student, who agree unless they are shifted."""
    probs = torch.eye(3).repeat(20, 1) * 0.7 + 0.1
    verdict = judge(probs, probs.roll(1, 1), probs.roll(1 + shift, 1), LABELS)
    (run / "verdict.json").write_text(json.dumps(verdict))
    return verdict


def test_a_run_has_every_section_and_each_begins_with_a_sentence(run):
    write_verdict(run)
    text = page_of(run)
    assert titles(text) == [RUN_TITLES[0], VERDICT, *RUN_TITLES[1:]]
    assert len(re.findall(r"</h2><p>[A-Z][^<]*\.</p>", text)) == len(titles(text))
    for fact in ("speaker-independent", "toy encoder", "last step, no label", "0.0.toy"):
        assert f"<dd>{fact}</dd>" in text


def test_scores_are_those_of_the_result_files(run):
    record = json.loads((run / "mi_fuse" / "results.json").read_text())
    rows = {row[0]: row[1:] for row in tables_of(page_of(run))["Scores on 20 test utterances"]}
    assert list(rows) == ["method", *METHODS]
    expected = [f"{100 * record[score]:.1f}" for score in ("UA", "WA", "macro_F1")]
    assert [rows["mi_fuse"][place] for place in (0, 3, 4)] == expected and rows["mi_fuse"][1] == "25.0 to 85.0"
    rewrite(run / "mi_fuse" / "results.json", UA=0.1234)
    assert tables_of(page_of(run))["Scores on 20 test utterances"][2][:2] == ["mi_fuse", "12.3"]


def test_confusion_and_speakers_are_those_of_the_result_files(run):
    record = json.loads((run / "oracle" / "results.json").read_text())
    tables = tables_of(page_of(run))
    found = tables[f"oracle, UA {100 * record['UA']:.1f} %"]
    counts = [[int(re.match(r"\d+?(?=\d+ %)|\d+", cell)[0]) for cell in row[1:]] for row in found[1:]]
    shares = [f"{n}{100 * n / sum(row):.0f} %" for row in record["confusion"] for n in row[: len(LABELS)]]
    assert [cell for row in found[1:] for cell in row[1:]] == shares and len(counts) == len(LABELS)
    speakers = {row[0]: row[1:] for row in tables["UA % by test speaker"]}
    first = np.array(record["by_speaker"]["s0"])
    assert speakers["oracle"][0] == f"{100 * np.mean(np.diag(first) / first.sum(1)):.0f}"


def write_answers(run, **chosen):
    """Let methods predict these classes for the first utterances; all are right about the others."""
    keys = list(json.loads((run / "manifests" / "target" / "test.json").read_text()))
    truth = [n % 3 for _ in range(4) for n in range(5)]
    for method in METHODS:
        classes = [*chosen[method], *truth[len(chosen[method]) :]]
        answers = {
            key: [0.8 if c == label else 0.1 for c in range(3)] for key, label in zip(keys, classes, strict=True)
        }
        (run / method / "predictions.json").write_text(json.dumps(answers))


def test_flips_and_sides_are_counted_as_by_hand(run):
    # True classes of the first five: 0 1 2 0 1. The student corrects one, spoils one, is wrong in another way once.
    answers = {"source_only": [1, 1, 0, 0, 1], "lalm_zero_shot": [0, 1, 2, 1, 1], "mi_fuse": [0, 0, 1, 0, 1]}
    write_answers(run, **answers, oracle=[0, 1, 2, 0, 1])
    tables = {name: rows for name, rows in tables_of(page_of(run)).items() if "of the test utterances" in name}
    flips, sides = tables.values()
    student = next(row for row in flips if row[0] == "mi_fuse")
    assert student[1:6] == ["85.0", "85.0", "5.0", "5.0", "5.0"]
    # Source and teacher differ on three: the student is once with the teacher, once with the source, once with neither.
    assert "differ in 15.0 %" in list(tables)[1]
    student = next(row for row in sides if row[0] == "mi_fuse")
    assert student[1:] == ["94.1", "33.3", "33.3", "33.3", "33.3", "66.7", "66.7"]


def test_calibration_compares_confidence_with_right_answers(run):
    write_answers(run, source_only=[], lalm_zero_shot=[], mi_fuse=[2, 2, 0, 2, 2], oracle=[])
    (case,) = read_cases(run)
    found = method_reliability(case, "mi_fuse")
    assert found.count == [20] and found.frequency == [0.75] and found.error == pytest.approx(0.05)
    assert "mi_fuse, error 5.0 %" in page_of(run)


def test_a_student_is_as_sure_as_the_recogniser_that_was_exported(run):
    write_answers(run, source_only=[], lalm_zero_shot=[], mi_fuse=[2, 2, 0, 2, 2], oracle=[])
    (run / "mi_fuse" / "recogniser").mkdir()
    (run / "mi_fuse" / "recogniser" / "about.json").write_text('{"temperature": 0.5}')
    (case,) = read_cases(run)
    # 0.8, 0.1, 0.1 squared, and 15 of 20 are right.
    assert method_reliability(case, "mi_fuse").error == pytest.approx(0.64 / 0.66 - 0.75)
    text = page_of(run)
    assert "mi_fuse, error 22.0 %, temperature 0.5" in text and "oracle, error 20.0 %<" in text


def test_a_verdict_is_told_with_its_warnings_and_caveat(run):
    fine = write_verdict(run)
    assert any("source's answers changed" in part for part in Read(page_of(run)).text["p"])
    found = write_verdict(run, shift=1)
    assert fine["warnings"] != found["warnings"]
    page = Read(page_of(run))
    assert all(line in page.text["li"] for line in found["warnings"]) and found["caveat"] in page.text["p"]
    rewrite(run / "verdict.json", warnings=[HOSTILE])
    assert HOSTILE in Read(page_of(run)).text["li"]
    rewrite(run / "verdict.json", warnings=[])
    assert "No warning sign. That is no proof that it helped." in page_of(run)


def test_weights_are_those_of_the_file_and_silence_is_no_uncertainty(run):
    rows = tables_of(page_of(run))["Weights at the end of the run"]
    assert rows[1] == ["mi_fuse", "0.300", "33.3", "0.200", "0.200", "1"]


@pytest.mark.parametrize(
    ("files", "gone"),
    [
        (["train_log.txt", "weighing.json"], ["Weights of the teachers"]),
        (["embeddings.json"], ["Before and after"]),
        (["predictions.json"], ["Agreement and flips", "Calibration"]),
    ],
)
def test_what_is_not_in_the_folder_is_not_on_the_page(run, files, gone):
    for name in files:
        for path in run.glob(f"*/{name}"):
            path.unlink()
    assert titles(page_of(run)) == [title for title in RUN_TITLES if title not in gone]


def test_without_labels_nothing_is_scored_and_the_rest_is_shown(tmp_path):
    text = page_of(toy_run(tmp_path / "run", scored=False))
    assert titles(text) == ["Predictions", *(RUN_TITLES[place] for place in (2, 3, 4, 7))]
    shares = {row[0]: row[1:] for row in tables_of(text)["Share of the predictions in percent"]}
    assert sum(map(float, shares["mi_fuse"])) == pytest.approx(100, abs=0.2)


def test_an_utterance_without_answer_agrees_with_nobody_and_is_not_calibrated(run):
    path = run / "lalm_zero_shot" / "predictions.json"
    answers = json.loads(path.read_text())
    path.write_text(json.dumps(dict(list(answers.items())[:7])))
    rewrite(path.with_name("results.json"), unanswered=13)
    (case,) = read_cases(run)
    assert (case.runs[0].chosen("lalm_zero_shot") == -1).sum() == 13
    agreed = tables_of(page_of(run))["Agreement, and changes of the source's answers, share of the test utterances"]
    assert all(float(row[2]) <= 35 for row in agreed[1:] if row[2])
    assert sum(method_reliability(case, "lalm_zero_shot").count) == 7


def test_hostile_names_are_text(tmp_path):
    labels = (HOSTILE, "happy", "sad")
    folder = toy_run(tmp_path / "run", labels=labels, source=HOSTILE, encoder=HOSTILE, code_version=HOSTILE)
    path = folder / "mi_fuse" / "results.json"
    rewrite(path, method=HOSTILE, by_speaker={HOSTILE: json.loads(path.read_text())["by_speaker"]["s0"]})
    for text in (page_of(folder), page_of(toy_sweep(tmp_path / "s", labels=labels, encoder=HOSTILE))):
        page = Read(text)
        assert len(page.all("script")) == 1 and not page.all("img")
        assert HOSTILE in "".join(page.text["th"]) and HOSTILE in "".join(page.text["dd"])
        assert not [key for _, attributes in page.found for key in attributes if key.startswith("on")]


def test_the_page_is_whole_in_itself_and_well_formed(tmp_path, run):
    for text in (page_of(run), page_of(toy_sweep(tmp_path / "sweep"))):
        page = Read(text)
        assert not {tag for tag, _ in page.found} & {"link", "img", "iframe", "object", "embed", "form", "base"}
        refers = [
            a[key] for _, a in page.found for key in ("src", "href", "xlink:href", "srcset", "action") if key in a
        ]
        assert refers and all(re.fullmatch(r"#s\d+", address) for address in refers)
        assert {address[1:] for address in refers} == {a["id"] for _, a in page.found if "id" in a}
        assert not re.search(r"https?:|//[a-z]|url\(|@import", re.sub(r"\n// .*", "", text))
        assert {"charset": "utf-8"} in page.all("meta") and page.all("html") == [{"lang": "en"}]
        assert any(
            meta.get("name") == "viewport" and "width=device-width" in meta["content"] for meta in page.all("meta")
        )
        assert len(page.all("caption")) == len(page.all("table")) > 0 and len(page.all("h1")) == 1
        assert all("scope" in head for head in page.all("th"))
        drawn = [svg for svg in page.all("svg") if svg.get("aria-hidden") != "true"]
        assert drawn and all(svg["role"] == "img" and svg["aria-label"] for svg in drawn)


def test_a_sweep_shows_the_tables_of_the_sweep_then_each_transfer(tmp_path):
    folder = toy_sweep(tmp_path / "sweep")
    text = page_of(folder)
    expected = ["Transfers", "Heat map", "Paired differences", "Intervals", "Seeds"]
    assert titles(text) == [*expected, "emodb to ravdess", "nemo to ravdess"]
    records = read_records(sorted(folder.glob("*/*/*/results.json")))
    order = [row[0] for row in tables_of(text)["UA % of each transfer"][1:]]
    table = transfer_table(Comparison(records, order))
    shown = [[cell.replace("**", "") for cell in row] for row in table.rows]
    assert tables_of(text)["UA % of each transfer"][1:] == shown
    assert len(re.findall("<details><summary><h2", text)) == 2 and "summed over the seeds" in text


def test_a_method_that_is_not_in_every_run_is_named_and_kept_out_of_the_table(tmp_path):
    folder = toy_sweep(tmp_path / "sweep")
    toy_run(folder / "nemo2ravdess" / "1", methods={"shot": 0.6}, teacher="third")
    text = page_of(folder)
    assert "Not in every run, so shown in the transfers alone: shot." in text
    assert "shot" not in [row[0] for row in tables_of(text)["UA % of each transfer"]]


def test_runs_that_do_not_belong_together_get_no_table_but_the_reason(tmp_path):
    folder = toy_sweep(tmp_path / "sweep")
    for path in folder.glob("nemo2ravdess/2/*/results.json"):
        rewrite(path, encoder="another")
    text = page_of(folder)
    assert titles(text) == ["emodb to ravdess", "nemo to ravdess"]
    assert "No table over the transfers: nemo to ravdess: results of" in text and "other settings" in text


def test_many_speakers_are_summed_up(run):
    for path in run.glob("*/results.json"):
        counts = json.loads(path.read_text())["by_speaker"]["s0"]
        rewrite(path, by_speaker={f"s{n}": counts for n in range(300)})
    head = tables_of(page_of(run))["UA % by test speaker"][0]
    assert head == ["method", "lowest", "lower quarter", "middle", "upper quarter", "highest"]


def test_the_command_writes_where_it_is_told_and_prints_the_path(run, tmp_path, capsys):
    cli.main(["report", str(run)])
    cli.main(["report", str(run), "--output", str(tmp_path / "new" / "page.html")])
    assert capsys.readouterr().out.split() == [str(run / "report.html"), str(tmp_path / "new" / "page.html")]
    assert (run / "report.html").read_bytes() == (tmp_path / "new" / "page.html").read_bytes()
    assert not list(run.glob(".report*"))


@pytest.mark.parametrize("damage", ["", "{", '{"method": "mi_fuse"}'])
def test_a_damaged_or_missing_result_is_one_clear_error_that_names_it(run, damage, capsys):
    (run / "mi_fuse" / "results.json").write_text(damage)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["report", str(run)])
    assert stopped.value.code == 2 and not (run / "report.html").exists()
    error = capsys.readouterr().err
    assert error.startswith("error: ") and str(run / "mi_fuse" / "results.json") in error


def test_a_folder_without_results_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no results of an adaptation below it"):
        write_report(tmp_path)


def test_results_that_are_none_of_an_adaptation_and_copies_of_them_are_passed_over(run):
    record = (run / "mi_fuse" / "results.json").read_text()
    (run / "results.json").write_text(record)
    (run / "mi_fuse" / "save").mkdir()
    (run / "mi_fuse" / "save" / "results.json").write_text('[{"arm": "scratch"}]')
    (case,) = read_cases(run.parent)
    assert case.methods == list(METHODS) and len(case.runs) == 1


def test_a_recipe_leaves_the_same_page_again(run, monkeypatch):
    run_report.summary(run, ["mi_fuse"], list(METHODS))
    first = (run / "report.html").read_bytes()
    run_report.summary(run, ["mi_fuse"], list(METHODS))
    assert (run / "report.html").read_bytes() == first


def test_a_sweep_leaves_the_page_of_its_own_methods(tmp_path):
    folder, methods = toy_sweep(tmp_path / "sweep"), ["source_only", "mi_fuse"]
    paths = [folder / "nemo2ravdess" / seed / method / "results.json" for seed in "12" for method in methods]
    runs = [SimpleNamespace(results=paths)]
    plan = SimpleNamespace(runs=lambda: runs, methods=methods, output=folder, teacher=lambda _: "asked by <hand>")
    sweep.collect(plan, tmp_path / "tables", "toy")
    text = (folder / "toy.html").read_text()
    assert titles(text)[5:] == ["nemo to ravdess"] and "oracle" not in text and "asked by &lt;hand&gt;" in text


def test_the_package_holds_the_templates_of_the_page():
    root = Path(speechbrain_mifuse.__file__).parent
    declared = (root.parent / "pyproject.toml").read_text()
    assert (root / "report" / "templates" / "report.html").is_file()
    assert '"speechbrain_mifuse.report" = ["templates/*"]' in declared


def test_a_log_with_an_epoch_twice_and_a_loss_that_is_no_number_is_drawn():
    log = read_log("epoch: 1 - train loss: 9\nepoch: 2 - train loss: nan\nepoch: 1 - train loss: 3\n")
    assert log["epoch"] == [1, 2] and log["loss"][0] == 3
    drawn = curves("toy", [Line(log["epoch"], log["loss"])], "epoch", "loss")
    assert "nan" not in drawn and "inf" not in drawn


def test_a_curve_that_does_not_vary_has_an_axis_with_numbers():
    drawn = curves("toy", [Line([1, 2], [0.5, 0.5])], "epoch", "loss")
    assert len(re.findall('text-anchor="end"', drawn)) >= 2


def test_figures_of_the_page_take_their_colors_from_its_style_sheet_and_have_no_ids(run):
    text = page_of(run)
    drawn = "".join(re.findall("<svg.*?</svg>", text, re.DOTALL))
    assert not re.search("#[0-9a-f]{3,6}| id=", drawn)
    used = set(re.findall(r"var\((--\w+)\)", drawn))
    assert used and all(text.count(f"{name}:") == 2 for name in used), "one value each in light and dark"


def test_no_module_imports_matplotlib_before_it_draws():
    for path in Path(speechbrain_mifuse.__file__).parent.rglob("*.py"):
        names = re.findall(r"^(?:from|import) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert "matplotlib" not in names, f"{path}: it takes a second, which every recipe would wait for"


def test_an_adaptation_leaves_what_the_page_draws_and_the_same_when_it_goes_on(filled_store, tmp_path, monkeypatch):
    world = make_world(filled_store, tmp_path)
    found = world.adapt("mi_fuse")
    folder = tmp_path / "out" / "mi_fuse"
    moments, weighing = (json.loads((folder / f"{name}.json").read_text()) for name in ("embeddings", "weighing"))
    assert moments["ids"] == list(found) and np.shape(moments["before"]) == np.shape(moments["after"]) == (10, 2)
    assert moments["before"] != moments["after"]
    assert len(weighing["ids"]) == len(weighing["lalm_weight"]) == 20 and weighing["measure"] == "mi"
    assert all(0 < weight < 1 for weight in weighing["lalm_weight"])
    first = {name: (folder / name).read_bytes() for name in ("embeddings.json", "weighing.json", "predictions.json")}
    (folder / "predictions.json").unlink()
    torch.manual_seed(99)
    world.adapt("mi_fuse")
    assert {name: (folder / name).read_bytes() for name in first} == first


def test_methods_without_training_or_weights_leave_neither(filled_store, tmp_path):
    world = make_world(filled_store, tmp_path)
    world.adapt("source_only")
    assert not list((tmp_path / "out" / "source_only").glob("embeddings.json"))
    world.adapt("lalm_sfuda")
    assert not (tmp_path / "out" / "lalm_sfuda" / "weighing.json").exists()


def test_moments_are_projected_as_principal_components_are():
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.randn(30, 8, generator=generator) * torch.arange(1, 9) + shift for shift in (0, 100))
    found = plane(before, after)
    both = torch.cat([before - before.mean(0), after - after.mean(0)]).double()
    singular = torch.linalg.svdvals(both)
    points = torch.tensor(found["before"] + found["after"])
    torch.testing.assert_close(points.norm(dim=0).double(), singular[:2], rtol=1e-3, atol=1e-2)
    assert found["explained"] == pytest.approx((singular**2 / (singular**2).sum())[:2].tolist(), abs=1e-3)


def test_a_page_that_cannot_be_written_is_one_error_naming_the_flag(run, tmp_path):
    (tmp_path / "page.html").mkdir()
    with pytest.raises(UserError, match=r"--output: .*page\.html cannot be written"):
        write_report(run, tmp_path / "page.html")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("predictions.json", None, "does not hold the predictions"),
        ("predictions.json", "{}", "does not hold the predictions"),
        ("predictions.json", "[]", "does not hold the predictions"),
        ("results.json", "[]", "not the result of a method"),
        ("results.json", {"UA": 7}, "not a score: UA"),
        ("results.json", {"UA": "x"}, "not a score: UA"),
        ("results.json", {"by_speaker": {}}, "not a score: by_speaker"),
        ("results.json", {"seed": 99}, "another seed than the methods beside it"),
    ],
)
def test_a_folder_whose_files_do_not_belong_together_gets_no_page_but_one_error(run, name, content, said):
    path = run / "mi_fuse" / name
    if content is None:
        path.unlink()
    elif isinstance(content, dict):
        rewrite(path, **content)
    else:
        path.write_text(content)
    with pytest.raises(UserError, match=f"{re.escape(str(path))}: .*{said}"):
        page_of(run)
    assert not (run / "report.html").exists()
