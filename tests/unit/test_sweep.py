"""The sweep: runs side by side within a bound, resumed, reported, stopped; commands for arrays; tables at the end."""

import csv
import json
import os
import re
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from speechbrain_mifuse.cli import main as cli
from speechbrain_mifuse.experiments import sweep
from speechbrain_mifuse.utils.errors import UserError

METHODS = ["source_only", "shot", "mi_fuse", "oracle"]
# What a recipe does, as far as the sweep can see: it reads flags, takes a while, writes results, notes when.
SCRIPT = """
import json, os, pathlib, subprocess, sys, time
flags = dict(word[2:].split("=", 1) for word in sys.argv[2:])
folder, seed, began = pathlib.Path(flags["output_folder"]), int(flags["seed"]), time.time()
pair = pathlib.Path(sys.argv[1]).stem
notes = pathlib.Path(os.environ["NOTES"])
threads = {k: v for k, v in os.environ.items() if k.endswith("_THREADS") or k.startswith(("OMP", "MIFUSE"))}
note = {"pair": pair, "seed": seed, "flags": flags, "env": threads, "pid": os.getpid(), "began": began}
(notes / f"{pair}-{seed}-{os.getpid()}.began").write_text(json.dumps(note))
child = subprocess.Popen(["sleep", flags.get("takes", "0.2")])
(notes / f"{pair}-{seed}.child").write_text(str(child.pid))
child.wait()
if flags.get("fails") == f"{pair}/{seed}":
    sys.exit("error: the toy broke")
for place, method in enumerate(flags["method"].strip("[]").split(", ")):
    hits = place + 1 + seed % 2
    counts = {"s1": [[hits, 9 - hits, 0], [0, 5, 0]], "s2": [[4, 1, 0], [1, 4, 0]]}
    result = dict(method=method, source=pair[0], target=pair[2], teacher="c", seed=seed, encoder="toy", protocol="p",
        selection="last step", n_train=7, n_test=24, labels=["x", "y"], UA=0.5, WA=0.5, macro_F1=0.5, by_speaker=counts,
        test_speakers=2, diversity_weight=1.0, temperature=0.2, steps=5, code_version="1",
        snapshots=[{"step": s, "UA": 0.5 + s / 10, "snd": float(s)} for s in (1, 2)])
    (folder / method).mkdir(parents=True, exist_ok=True)
    (folder / method / "results.json").write_text(json.dumps(result))
(notes / f"{pair}-{seed}-{os.getpid()}.ended").write_text(json.dumps({**note, "ended": time.time()}))
"""


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A repository with a toy recipe and two pairs, as the current folder."""
    root = tmp_path / "a repository"
    methods = "methods:\n" + "".join(f"    {name}: !new:no.such.Class\n" for name in METHODS)
    pair = "# python recipes/T/m/train.py hparams/\n"
    pair += "teacher: c\nencoder: toy\nlabel_store: x\nteacher_folder: y\nlalm_base_url: null\nlalm_samples: 5\n"
    pair += "takes: 0.2\nfails: null\nnote: null\nlearning_rate: 0.1\nteacher_alm: null\n"
    files = {
        "recipes/T/m/train.py": SCRIPT,
        "hparams/base/adaptation.yaml": methods,
        "hparams/a2b.yaml": pair + "source: a\ntarget: b\nadaptation: !include:base/adaptation.yaml\n",
        "hparams/b2a.yaml": pair + "source: b\ntarget: a\nadaptation: !include:base/adaptation.yaml\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (tmp_path / "notes").mkdir()
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    monkeypatch.chdir(root)
    return root


def notes_folder():
    return Path(os.environ["NOTES"])


def notes(kind):
    return [json.loads(path.read_text()) for path in notes_folder().glob(f"*.{kind}")]


def go(*arguments):
    cli.main(["sweep", *arguments])


def status(*arguments):
    with pytest.raises(SystemExit) as stopped:
        go(*arguments)
    return stopped.value.code


def overlap(runs):
    return [sum(other["began"] <= run["began"] < other["ended"] for other in runs) for run in runs]


def test_every_pair_and_seed_is_run_once_with_all_methods_on_one_thread_and_shares_its_teacher(tree, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    go("a2b", "b2a", "--seeds", "1,3", "--jobs", "4", "--", "--takes=0", "--encoder=big")
    runs = notes("ended")
    assert sorted((run["pair"], run["seed"]) for run in runs) == [("a2b", 1), ("a2b", 3), ("b2a", 1), ("b2a", 3)]
    output = tree / "results" / "sweep"
    for run in runs:
        flags, env = run["flags"], run["env"]
        assert flags["method"] == "[source_only, shot, mi_fuse, oracle]"
        assert flags["output_folder"] == str(output / run["pair"] / str(run["seed"])) and flags["encoder"] == "big"
        assert flags["label_store"] == str(output / run["pair"] / "labels.sqlite")
        assert (env["OMP_NUM_THREADS"], env["MKL_NUM_THREADS"], env["OMP_WAIT_POLICY"]) == ("1", "1", "passive")
    assert len({run["flags"]["teacher_folder"] for run in runs}) == 1


def test_no_more_runs_than_jobs_at_a_time_and_the_first_of_a_pair_before_its_others(tree):
    go("a2b", "b2a", "--seeds", "1-3", "--jobs", "2")
    runs = notes("ended")
    assert len(runs) == 6 and max(overlap(runs)) == 2
    for pair in ("a2b", "b2a"):
        first, *others = sorted((run for run in runs if run["pair"] == pair), key=lambda run: run["seed"])
        assert all(first["ended"] <= other["began"] for other in others)


def test_what_is_done_starts_no_process_and_what_is_missing_or_changed_runs_again(tree):
    arguments = ["a2b", "--seeds", "1-2", "--jobs", "2", "--", "--takes=0"]
    go(*arguments)
    assert len(notes("began")) == 2
    go(*arguments)
    assert len(notes("began")) == 2
    (tree / "results" / "sweep" / "a2b" / "2" / "mi_fuse" / "results.json").unlink()
    go(*arguments)
    assert [run["seed"] for run in notes("began")].count(2) == 2 and len(notes("began")) == 3
    (tree / "recipes" / "T" / "m" / "train.py").write_text(SCRIPT + "# another version\n")
    go(*arguments)
    assert len(notes("began")) == 5
    go("a2b", "--seeds", "1-2", "--", "--takes=0", "--learning_rate=1")
    assert len(notes("began")) == 7


def test_a_sweep_says_how_long_it_took(tree, capsys):
    go("a2b", "--seeds", "1-2", "--jobs", "2", "--", "--takes=0")
    assert re.search(r"^2 runs in \d+\.\d minutes, 2 at a time\.$", capsys.readouterr().err, re.MULTILINE)


def test_a_comment_in_the_yaml_runs_nothing_again_and_a_value_does(tree):
    path = tree / "hparams" / "a2b.yaml"
    text = path.read_text()
    for addition, began in (("", 1), ("# a comment\n", 1), ("more: 1\n", 2)):
        path.write_text(text + addition)
        go("a2b", "--seeds", "1", "--", "--takes=0")
        assert len(notes("began")) == began


def test_a_failed_run_stops_no_other_writes_no_table_and_is_told_with_its_log(tree, capsys):
    arguments = ["a2b", "b2a", "--seeds", "1-2", "--jobs", "2", "--", "--takes=0"]
    assert status(*arguments, "--fails=a2b/1") == 2
    error = capsys.readouterr().err
    log = tree / "results" / "sweep" / "a2b" / "1.log"
    assert "1 of 4 runs failed" in error and f"a2b, seed 1: status 1; {log}" in error and "the toy broke" in error
    assert "Traceback" not in error and "the toy broke" in log.read_text()
    assert len(notes("ended")) == 3 and not list((tree / "results").rglob("sweep.md"))
    go(*arguments)
    assert (tree / "results" / "sweep" / "sweep.md").exists()


def interrupt(number):
    """Send this process a signal as soon as two runs have children."""
    while len(children := [text for path in notes_folder().glob("*.child") if (text := path.read_text())]) < 2:
        time.sleep(0.02)
    os.kill(os.getpid(), number)
    return children


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_the_runs_and_all_they_started_and_says_how_to_go_on(number, tree, capsys):
    handlers = [signal.getsignal(heeded) for heeded in (signal.SIGINT, signal.SIGTERM)]
    with ThreadPoolExecutor(1) as other_thread:
        children = other_thread.submit(interrupt, number)
        assert status("a2b", "b2a", "--jobs", "2", "--", "--takes=60") == 130
    error = capsys.readouterr().err
    assert "stopped; 0 of 10 runs are done. The same command goes on from here." in error and "Traceback" not in error
    for pid in [*map(int, children.result()), *(run["pid"] for run in notes("began"))]:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert [signal.getsignal(heeded) for heeded in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_run_that_heeds_no_interrupt_is_killed(tree, monkeypatch):
    monkeypatch.setattr(sweep, "GRACE_S", 0.2)
    script = tree / "recipes" / "T" / "m" / "train.py"
    script.write_text("import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n" + SCRIPT)
    with ThreadPoolExecutor(1) as other_thread:
        other_thread.submit(interrupt, signal.SIGINT)
        assert status("a2b", "b2a", "--jobs", "2", "--", "--takes=60") == 130
    assert len(notes("began")) == 2
    for run in notes("began"):
        with pytest.raises(ProcessLookupError):
            os.kill(run["pid"], 0)


def test_every_line_of_the_commands_file_runs_as_written_and_collect_then_writes_the_tables(tree, capsys, tmp_path):
    arguments = ["a2b", "b2a", "--seeds", "1-2", "--name", "array"]
    flags = ["--", "--takes=0", "--note=two words & 'quotes'"]
    go(*arguments, "--commands", "lines.txt", *flags)
    assert "Run lines 1-2 before 3-4" in capsys.readouterr().out and not notes("began")
    assert status(*arguments, "--collect", *flags) == 2
    assert "16 of 16 results are missing" in capsys.readouterr().err
    for number, line in enumerate((tree / "lines.txt").read_text().splitlines(), 1):
        assert line.startswith("OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OMP_WAIT_POLICY=passive ")
        job = f'bash -c "$(sed -n "${{SLURM_ARRAY_TASK_ID}}p" \'{tree / "lines.txt"}\')"'
        subprocess.run(
            ["bash", "-c", job], check=True, cwd=tmp_path, env={**os.environ, "SLURM_ARRAY_TASK_ID": str(number)}
        )
        assert len(notes("ended")) == number
    assert {run["flags"]["note"] for run in notes("ended")} == {"two words & 'quotes'"}
    go(*arguments, "--collect", "--table", "tables", *flags)
    assert len(notes("ended")) == 4
    with (tree / "tables" / "array.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 16


def test_the_sweep_ends_in_tables_and_figures_of_the_chosen_methods(tree, capsys):
    go("a2b", "--seeds", "1-2", "--methods", "oracle,shot,source_only", "--name", "t", "--", "--takes=0")
    folder = tree / "results" / "t"
    assert capsys.readouterr().out.strip() == (folder / "t.md").read_text().strip()
    written = {path.name for path in folder.glob("t*.*")}
    assert written == {"t.csv", "t.md", "t.tex", "t.png", "t.html", "t_seeds.md", "t_transfers.png", "t_selection.md"}
    with (folder / "t.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["source", "target", "teacher", "method", "seed", "UA", "WA", "macro_F1", "n_test"]
    assert [row[3:5] for row in rows[1:]] == [[m, s] for m in ("source_only", "shot", "oracle") for s in ("1", "2")]
    text = (folder / "t.md").read_text()
    assert "above shot, best baseline" in text and "5 stochastic answers each" in text and "c behind" not in text


def test_tables_of_an_audio_text_teacher_say_that_it_is_one_and_which(tree):
    flags = ["--teacher=dual_encoder", "--teacher_alm=somewhere", "--takes=0"]
    go("a2b", "--seeds", "1", "--methods", "source_only,shot", "--", *flags)
    output = tree / "results" / "sweep"
    path = output / "a2b" / "1" / "shot" / "results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "teacher_model": {"weights": "c0ffee"}}))
    plan = sweep.make_plan(tree, ["a2b"], output, [1], ["source_only", "shot"], flags)
    text = sweep.collect(plan, tree / "t", "t")
    told = "an audio-text model on this machine (weights c0ffee), 5 stochastic answers each (prompts drawn at random)"
    assert told in text and "HTTP" not in text
    assert "an audio-text model on this machine, 5 stochastic answers" in plan.teacher()


def test_the_teacher_is_shared_by_pairs_that_agree_in_all_that_decides_it(tree):
    plan = sweep.make_plan(tree, ["a2b", "b2a"], "out", [1])
    same = {plan.teacher_folder(recipe) for recipe in plan.recipes}
    other = sweep.make_plan(tree, ["a2b"], "out", [1], flags=["--encoder", "big"])
    assert len(same) == 1 and other.teacher_folder(other.recipes[0]) not in same
    unrelated = sweep.make_plan(tree, ["a2b"], "out", [1], flags=["--learning_rate=1"])
    assert unrelated.teacher_folder(unrelated.recipes[0]) in same
    own = sweep.make_plan(tree, ["a2b"], "out", [1], flags=["--teacher_folder=mine", "--label_store=ours"])
    command = own.runs()[0].command
    assert sum("--teacher_folder" in word for word in command) == sum("--label_store" in word for word in command) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a2mars"], "a2mars: no recipe"),
        (["a2b", "--methods", "shot,tea"], "--methods: tea is none of the methods of a2b: source_only, shot"),
        (["a2b", "--seeds", "5-1"], "--seeds: '5-1' holds no seed"),
        (["a2b", "--jobs", "0"], "argument --jobs: '0' is no number of at least 1"),
        (["a2b", "--commands", "f", "--collect"], "not allowed with argument"),
        (["a2b", "--", "--seed", "3"], "--seed: the sweep gives this flag to each run; use --seeds"),
        (["a2b", "--baselines", "tea", "--seeds", "1", "--", "--takes=0"], "--baselines: tea is none of the methods"),
    ],
)
def test_a_command_line_that_does_not_fit_is_one_clear_error(arguments, said, tree, capsys):
    assert status(*arguments) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_names_that_would_be_refused_at_the_end_are_refused_before_anything_runs(tree):
    for arguments in (["--baselines", "tea"], ["--figure_methods", "tea"]):
        assert status("a2b", "--seeds", "1", *arguments, "--", "--takes=0") == 2
    assert not notes("began")


def test_more_jobs_than_cores_are_warned_of(tree, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "usable_cores", lambda: 2)
    for jobs, threads, warned in ((2, 1, False), (2, 2, True)):
        go("a2b", "--seeds", "1", "--jobs", str(jobs), "--threads", str(threads), "--", "--takes=0")
        assert ("warning: " in capsys.readouterr().err) == warned


@pytest.mark.parametrize(("key", "value"), [("encoder", "another"), ("target_copy", "not the published release")])
def test_results_of_other_settings_are_not_put_beside_each_other(key, value, tree):
    go("a2b", "--seeds", "1", "--", "--takes=0")
    plan = sweep.make_plan(tree, ["a2b"], tree / "results" / "sweep", [1])
    path = tree / "results" / "sweep" / "a2b" / "1" / "shot" / "results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UserError, match=rf"a to b: results of .* shot, seed 1 were got under other settings \({key}\)"):
        sweep.collect(plan, tree, "t")


def test_a_table_says_that_a_target_is_not_the_whole_release(tree):
    go("a2b", "--seeds", "1", "--methods", "source_only,shot", "--", "--takes=0")
    plan = sweep.make_plan(tree, ["a2b"], tree / "results" / "sweep", [1], ["source_only", "shot"])
    for path in (tree / "results" / "sweep" / "a2b").rglob("results.json"):
        told = {"target_copy": "not the published release (78 of 5531 utterances)"}
        path.write_text(json.dumps({**json.loads(path.read_text()), **told}))
    assert "b: not the published release (78 of 5531 utterances)." in sweep.collect(plan, tree / "t", "t")
