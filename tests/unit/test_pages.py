"""Text that ends in pages, tables, figures and on terminals, with attacks in it; and names that look like flags."""

import csv
import io
import json
import logging
import os
import subprocess
import sys

import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from report_support import toy_run
from toy_corpora import utterance, write_wav

from speechbrain_mifuse.cli.recognizer import as_csv
from speechbrain_mifuse.corpora.tables import read_table
from speechbrain_mifuse.evaluation.aggregate import COLUMNS, Table, write_csv
from speechbrain_mifuse.evaluation.scoring import side_by_side
from speechbrain_mifuse.evaluation.verdict import verdict_text
from speechbrain_mifuse.inference.model_card import adapted_card, dual_encoder_card, trained_card
from speechbrain_mifuse.lalm.store import Samples
from speechbrain_mifuse.nnet.adapter_files import adapter_card
from speechbrain_mifuse.report.figures import plot_confusion
from speechbrain_mifuse.report.page import write_report
from speechbrain_mifuse.report.teacher_report import write_teacher_report
from speechbrain_mifuse.utils.command_line import file_arguments
from speechbrain_mifuse.utils.errors import UserError, one_clear_error
from speechbrain_mifuse.utils.texts import code_span, csv_text, csv_value, markdown, shown

MARKUP = [
    *("<script>alert(1)</script>", "[x](javascript:alert(1))", "![x](http://127.0.0.1/x.png)", "<!-- a", "&lt;b&gt;"),
    *("a|b", "a | b\n|---|---|", "`code`", "a``b`", "**bold**", "__bold__", "_a_ *b*", "~~gone~~", "$x^2$", "a\\"),
    *("---", "- item", "+ item", "# head", "1. one", "2) two", "> quoted", "===", "```\nfence", "\n---\nlicense: mine"),
    *("<http://127.0.0.1>", "[a]: http://127.0.0.1", "\\[x](y)", "\\<b>", "    indented", "\ttab", "a  \nb", "* * *"),
    *("\x1b[2J\x1b]0;title\x07", "\u202egnp.wav", "a\r\nb", "\udcff", "{title}", "{0}", "%s"),
]
FORMULAS = ["=1+1", "+1+1", "-1+1", "@SUM(A1)", "\tx", "\rx", "=cmd|' /C calc'!A0", "'=1", "''=1", "＝1", "-x.wav", "-"]
NAMES = [*FORMULAS, "a,b", 'a"b', "a\nb", "a\rb", "a;b", "'tis.wav", "-5", "+1e3", "-.5", "1", "--csv=x", "", "'"]


def tokens(text):
    """What a reader of Markdown makes of a page, without the text in it."""
    parser = MarkdownIt("gfm-like", {"html": True, "linkify": False})
    found = []
    for token in parser.parse(text):
        inline = [child.type for child in token.children or () if child.type != "text"]
        found += [token.type, token.tag, *inline]
    return found


def cards(name):
    about = {"labels": [name, "sad"], "corpus": name, "encoder": name, "counts": {name: 3}, "code_version": name}
    about |= {"validation": {"UA": 0.5, "WA": 0.5, "n": 99}, "temperature": 2.0, "temperature_fitted_to": name}
    record = dict.fromkeys(("source", "target", "teacher", "method", "encoder", "protocol", "selection"), name)
    record |= {"n_train": 9, "n_test": 99, "seed": 1, "UA": 0.5, "WA": 0.5, "warnings": [name]}
    own = {"classes_known": [name], "trained_on": [name], "text_encoder": {"source": name}}
    return [trained_card(about), adapted_card(about, record), adapter_card(about), dual_encoder_card({**about, **own})]


def result_pages(name, folder):
    record = dict.fromkeys(("source", "target", "teacher", "encoder", "protocol", "selection", "code_version"), name)
    record |= {"method": name, "UA": None, "n_train": 9, "n_test": 9, "seed": 1}
    (folder / "m").mkdir(exist_ok=True)
    (folder / "m" / "results.json").write_text(json.dumps(record))
    agreement = dict.fromkeys(("student_source", "student_teacher", "source_teacher"), 0.5)
    figures = {"recordings": 9, "answered_by_teacher": 1.0, "changed": 0.5, "agreement": agreement}
    figures["class_shares"] = {who: {name: 0.5, "sad": 0.5} for who in ("student", "source", "teacher")}
    samples = Samples(torch.ones(1, 1, 2) / 2, torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.int8))
    return [
        side_by_side(folder, ["m"]),
        verdict_text({"figures": figures, "warnings": [name], "caveat": "None."}),
        Table(["method", name], [[name, "**58.7** ± 0.4"]]).markdown(),
        write_teacher_report(folder, samples, [name, "sad"], name),
    ]


@pytest.mark.parametrize("name", MARKUP)
def test_a_name_with_markup_changes_no_model_card_and_stays_out_of_its_front_matter(name):
    for card, harmless in zip(cards(name), cards("name"), strict=True):
        _, front, body = card.split("---\n", 2)
        assert yaml.safe_load(front) == yaml.safe_load(harmless.split("---\n")[1])
        assert tokens(body) == tokens(harmless.split("---\n", 2)[2])


@pytest.fixture(scope="module")
def harmless_pages(tmp_path_factory):
    return result_pages("name", tmp_path_factory.mktemp("harmless"))


# Each draws figures: every third name is tried by default.
DRAWN = [name for name in MARKUP if name.isprintable() or name.isascii()]
DRAWN = [pytest.param(name, marks=[] if place % 3 == 0 else pytest.mark.long) for place, name in enumerate(DRAWN)]


@pytest.mark.parametrize("name", DRAWN)
def test_a_name_with_markup_changes_no_page_of_results(name, harmless_pages, tmp_path):
    for page, harmless in zip(result_pages(name, tmp_path), harmless_pages, strict=True):
        assert tokens(page) == tokens(harmless)


@pytest.mark.parametrize("name", MARKUP)
def test_escaped_text_is_read_as_the_text_that_it_was(name):
    parser = MarkdownIt("gfm-like", {"linkify": False})
    for written in (markdown(name), code_span(name)):
        (inline,) = [token for token in parser.parse(f"- {written}") if token.type == "inline"]
        assert "".join(child.content for child in inline.children).strip() == shown(name).strip()


def test_names_of_our_own_are_not_changed():
    for name in ("mi_fuse", "facebook/hubert-base-ls960", "Whisper tiny.en (English)", "+2.0 (-0.5 to +4.2)", "a - b"):
        assert markdown(name) == name


def test_a_page_of_html_holds_no_markup_and_no_control_sequence_of_a_name(tmp_path):
    folder = toy_run(tmp_path, labels=('"><b>\x07', "happy", "sad"), encoder="<i>\x1b[2J\u202e")
    page = write_report(folder).read_text()
    assert "<dd>&lt;i&gt;\\x1b[2J\\u202e</dd>" in page and "&#34;&gt;&lt;b&gt;\\x07" in page
    assert not set("\x07\x1b\u202e") & set(page) and "<b>" not in page and "<i>" not in page


def test_a_table_in_latex_holds_no_command_of_a_name():
    text = Table([r"\input{x}"], [[r"a_b & c^d $e$ ~f {g} #h %i"], ["**58.7** ± 0.4"]]).latex()
    assert r"\textbackslash{}input\{x\}" in text and r"a\_b \& c\textasciicircum{}d \$e\$" in text
    assert r"\textbf{58.7} $\pm$ 0.4" in text


def test_a_name_with_dollar_signs_is_drawn_as_it_is(tmp_path):
    plot_confusion(tmp_path / "a.png", torch.ones(2, 3, dtype=torch.int64), ["$\\frac{$", "$x"], "$\\undefined$")
    assert (tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["\ud800", "a\udcff.wav", "\x00", "\x1b[2J", "\u202e"])
def test_a_name_that_no_font_takes_is_drawn_as_its_code(name, tmp_path):
    plot_confusion(tmp_path / "a.png", torch.ones(2, 3, dtype=torch.int64), [name, "sad"], name)
    code = shown(name)
    plot_confusion(tmp_path / "b.png", torch.ones(2, 3, dtype=torch.int64), [code, "sad"], code)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


# CSV.


@pytest.mark.parametrize("name", FORMULAS)
def test_no_text_of_a_table_is_a_formula_and_numbers_stay_numbers(name, tmp_path):
    write_csv(tmp_path / "t.csv", [dict.fromkeys(COLUMNS, name) | {"UA": -0.5, "seed": -3}])
    (row,) = csv.DictReader(io.StringIO((tmp_path / "t.csv").read_bytes().decode(), newline=""))
    assert row["method"][0] == "'" and (row["UA"], row["seed"]) == ("-0.5000", "-3")
    one = type("Recognition", (), {"path": name, "timeline": None, "seconds": 1.0, "error": None})
    one.label, one.probs = name, torch.tensor([0.25, 0.75])
    one.__getitem__ = lambda self, part: (self.path, self.label, self.probs, None)[part]
    for row in csv.reader(io.StringIO(as_csv([name, "sad"], [one()]), newline="")):
        assert all(cell[0] == "'" or cell.replace(".", "").isalnum() for cell in row)


def test_every_text_comes_back_from_a_table_as_it_was(tmp_path):
    for name in NAMES:
        ((cell, number),) = csv.reader(io.StringIO(csv_text([[name, -0.5]]), newline=""))
        assert (csv_value(cell), number) == (name, "-0.5")
    for name in (name for name in NAMES if name.strip() == name and name):
        (tmp_path / "labels.csv").write_text(csv_text([["file", "emo"], [name, "sad"]]), newline="")
        assert read_table(tmp_path / "labels.csv", {"file": (), "emo": ()}) == [
            (2 + name.count("\n") + name.count("\r"), {"file": name, "emo": "sad"})
        ]


# The terminal.


def test_nothing_that_a_program_prints_or_logs_commands_a_terminal(capsys, caplog):
    caplog.set_level(logging.WARNING)
    with pytest.raises(SystemExit), one_clear_error():
        print("a\x1b[2J\tb\n\u202ec\udcff")
        logging.getLogger("any").warning("%s", "d\x1b[2J")
        raise UserError("e\x1b[2J\nerror: f")
    shown_text = capsys.readouterr()
    assert shown_text.out == "a\\x1b[2J\tb\n\\u202ec\\udcff\n"
    assert shown_text.err.splitlines()[-1] == "error: e\\x1b[2J\\nerror: f"
    assert caplog.messages == ["d\\x1b[2J"]
    print("after\x1b[0m")
    assert capsys.readouterr().out == "after\x1b[0m\n"


@pytest.mark.parametrize("match", ["", "no such recipe"])
def test_a_full_disk_behind_standard_output_is_one_line(match):
    command = [sys.executable, "-m", "speechbrain_mifuse", "recipes", "--match", match]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: --match" if match else "error: standard output: cannot be written (No space")


def test_a_terminal_without_utf_8_is_enough():
    code = "from speechbrain_mifuse.utils.errors import one_clear_error\nwith one_clear_error(): print('żółw')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "\\u017c\\xf3\\u0142w\n")


# Names that look like flags.


def test_an_existing_file_is_a_file_whatever_it_begins_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [
        "-x.wav",
        "--csv=out.wav",
        "--x.wav",
        "-1.wav",
        "-h.wav",
        "--source=a,b\n'\".wav",
        os.fsdecode(b"-\xff.wav"),
    ]
    for name in names:
        (tmp_path / name).touch()
    assert file_arguments(names) == [f"./{name}" for name in names]
    assert file_arguments(["--csv", "a.csv", "-0.5", "-1e-3", "-h", "-", "--", "-x.wav"])[-2:] == ["--", "-x.wav"]


@pytest.mark.parametrize("word", ["-x.wav", "--x.wav", "-h.wav", "-\n.wav"])
def test_what_is_neither_flag_nor_file_is_one_error_that_says_what_to_write(word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"neither a flag nor an existing file. For a file write \./-"):
        file_arguments([word])


@pytest.mark.parametrize("word", ["--csv", "-h"])
def test_what_is_both_flag_and_file_is_one_error_and_nothing_is_guessed(word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / word).touch()
    with pytest.raises(UserError, match=rf"{word}: a flag, and a file in this folder. For the file write \./{word}"):
        file_arguments([word])


COMMANDS = [
    *(["predict", "-x", "--source", "r"], ["predict", "a.wav", "--source", "-x"], ["serve", "-x"]),
    *(["adapt", "--source", "r", "--teacher", "t", "-x"], ["report", "-x"], ["collect", "-x"], ["extract", "-x"]),
    *(["labels", "show", "-x"], ["labels", "check", "-x"], ["labels", "export", "-x", "a.jsonl"]),
    *(["labels", "import", "-x", "--into", "s"], ["labels", "merge", "-x", "--into", "s"], ["batch", "poll", "-x"]),
    *(["labels", "report", "-x", "--manifest", "m", "--output", "o"], ["probe", "--profile", "-x"]),
    ["sweep", "nemo2rav", "--collect", "--output", "-x"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_says_what_to_write_for_a_file_that_begins_with_a_dash(words, tmp_path, monkeypatch, capsys):
    from speechbrain_mifuse.cli.main import main

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: -x: neither a flag nor an existing file. For a file write ./-x\n"


def test_recordings_of_any_name_are_recognised_and_come_back_from_the_table(tmp_path, monkeypatch, capsys, recogniser):
    from speechbrain_mifuse.cli.main import main

    names = ["-x.wav", "--csv=out.wav", "=1+1.wav", "a,b.wav", 'a"b.wav', "a\nb.wav", "2024.wav", "-5"]
    for number, name in enumerate(names):
        write_wav(tmp_path / name, utterance("sad", 0, number)) if name != "-5" else None
    (tmp_path / os.fsdecode(b"\xff.wav")).write_bytes((tmp_path / "2024.wav").read_bytes())
    names = [name for name in names if name != "-5"]
    monkeypatch.chdir(tmp_path)
    given = [*names, os.fsdecode(b"\xff.wav")]
    main(["predict", *given, "--source", str(recogniser), "--csv", "found.csv"])
    assert "its name is no text" in capsys.readouterr().err
    rows = list(csv.DictReader(io.StringIO((tmp_path / "found.csv").read_text(), newline="")))
    found = [os.path.normpath(csv_value(row["file"])) for row in rows]
    assert found == names and not any(row["file"][0] in "=+-@" for row in rows)
    main(["predict", *given, "--source", str(recogniser)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(given) and all(line.isprintable() or "\t" in line for line in lines)
    main(["predict", *given, "--source", str(recogniser), "--json", "found.json"])
    content = json.loads((tmp_path / "found.json").read_text())
    assert [os.path.normpath(one["file"]) for one in content["recordings"]] == names
    assert [os.path.basename(name) for name in content["unreadable"]] == [os.fsdecode(b"\xff.wav")]


@pytest.fixture
def recogniser(toy_encoder, tmp_path_factory):
    """Folder of a recogniser with random weights."""
    import types

    from speechbrain_mifuse.features.encoder import FrozenEncoder
    from speechbrain_mifuse.inference.recognizer_folder import export_recogniser
    from speechbrain_mifuse.nnet.classifier import EmotionClassifier

    front = types.SimpleNamespace(
        dim=FrozenEncoder(toy_encoder, [1]).dim, n_layers=1, layer=1, store=types.SimpleNamespace(layers=[1])
    )
    hparams = {"labels": ["angry", "sad"], "encoder": str(toy_encoder), "trim_db": 40.0}
    folder = tmp_path_factory.mktemp("recogniser")
    about = {"labels": hparams["labels"], "features": {}}
    export_recogniser(folder, EmotionClassifier(front.dim, 2), front, hparams, about, temperature=2.0)
    return folder
