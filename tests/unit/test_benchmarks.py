"""The benchmarks run, and their JSON has the form that others read; no test looks at a time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
LONG = ("million", "collect_faults")
RATIOS = {
    "adapter": {"encoder_inside_ratio"},
    "closed_form": {"student_ratio"},
    "collect": {"ideal_ratio", "cpu_ms_per_call", "resident_growth_mb"},
    "collect_faults": set(),
    "epoch": {"hubert_base_ratio", "whisper_tiny_ratio"},
    "extraction": {"bare_encoder_ratio", "touched_ratio"},
    "label_store": {"jsonl_ratio", "files_ratio"},
    "million": {"first_step_s", "rss_mb", "growth_ratio"},
    "mifuse_step": {"step_ratio"},
    "memory": {"rss_ratio"},
    "recipe_form": {"recipe_total_ratio", "recipe_epoch_ratio"},
    "recognise": {"bare_encoder_ratio", "real_time_ratio"},
    "serve": {"callers_1_ratio", "callers_8_ratio", "callers_32_ratio"},
    "zero_shot": {"one_at_a_time_ratio", "texts_every_time_ratio"},
}
# What may be zero or less: growth, accuracy on a few clips of noise, and what a collection under faults must not lose,
# ask again, or get wrong.
MAY_BE_NONE = {"growth_mb", "asked_again_of_stored", "asked_again_per_kill", "lost_replies_per_kill", "wrong"}
MAY_BE_NONE |= {f"{side}_accuracy" for side in ("stored", "stored_unaveraged", "recipe", "hdf5")}
MAY_BE_NONE |= {"rss_growth_mb", "descriptor_growth", "reply_to_disk_ms", "resident_growth_mb", "cpu_ms_per_call"}


@pytest.fixture
def main(monkeypatch, no_corpora):
    """Entry point of `run.py`, in this process, where torch is imported already."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from run import main

    return main


def test_list_names_every_benchmark_without_loading_torch():
    elsewhere = {"faults"}  # `tests/recipes/test_faults.py` runs its short form
    code = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import run; run.main(['--list'])\n"
    code += "assert 'torch' not in sys.modules"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert {line.split()[0] for line in shown.splitlines()} == set(RATIOS) | elsewhere


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in LONG else []) for name in RATIOS]
)
def test_json_holds_machine_and_figures_and_the_table_shows_them(name, main, tmp_path, capsys):
    path = tmp_path / "figures.json"
    main([name, "--quick", "--json", str(path)])
    found = json.loads(path.read_text())
    assert set(found) == {"name", "machine", "data", "figures", "spread"}
    assert found["name"] == name and {"cpu", "cores", "torch", "python"} <= set(found["machine"])
    assert RATIOS[name] <= set(found["figures"])
    shown = capsys.readouterr().out
    for figure, median in found["figures"].items():
        least, greatest = found["spread"][figure]
        assert least <= median <= greatest and f"| {figure} |" in shown
        assert median > 0 or figure in MAY_BE_NONE


@pytest.mark.parametrize("arguments", [["no_such_benchmark"], []])
def test_a_command_line_that_names_no_benchmark_is_refused(arguments, main):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


def test_clips_are_speech_where_there_is_some_and_few_are_the_first_of_all(main, monkeypatch, toy_folder, tmp_path):
    from clips import write_manifests

    monkeypatch.setenv("MIFUSE_CORPORA", str(toy_folder))
    kind, manifests = write_manifests(tmp_path, {12, 5}, (1.0, 2.0))
    rows = json.loads(manifests[12].read_text())
    assert kind == "nemo" and len(rows) == 12 and all(Path(row["wav"]).exists() for row in rows.values())
    assert list(json.loads(manifests[5].read_text())) == list(rows)[:5]


def test_turns_alternate_and_ratios_are_taken_turn_by_turn(main):
    from measure import ratio, take_turns

    calls = []

    def side(name, values):
        return lambda: calls.append(name) or values.pop(0)

    found = take_turns({"a": side("a", [9.0, 2.0, 8.0]), "b": side("b", [9.0, 1.0, 2.0])}, turns=2, desc="test")
    assert calls == ["a", "b"] * 3 and found == {"a": [2.0, 8.0], "b": [1.0, 2.0]}
    assert ratio(found["a"], found["b"]).values == [2.0, 4.0]
