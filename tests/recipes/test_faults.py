"""Recipes killed at random moments and begun twice at once, in the short form of `benchmarks/run.py faults`."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
KILLS = {"mifuse": 1, "adapter": 1}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Corpora, encoder, and the runs that were killed so far."""
    sys.path.append(str(BENCHMARKS))
    import faults

    scratch = tmp_path_factory.mktemp("faults")
    return faults, faults.Bench(scratch, scratch / "kept" / "runs.jsonl")


@pytest.mark.parametrize(
    ("recipe", "kills"),
    [("mifuse", KILLS["mifuse"]), pytest.param("adapter", KILLS["adapter"], marks=pytest.mark.long)],
)
def test_killed_at_random_moments_the_same_command_ends_with_the_same_weights_and_tables(bench, recipe, kills):
    _, runs = bench
    runs.kill_and_repeat(recipe, kills)
    records = [record for record in runs.records if record["recipe"] == recipe]
    assert sum(len(record["kills"]) for record in records) >= kills
    assert [(record["status"], record["differing"], record["error"]) for record in records] == [(0, [], "")] * len(
        records
    )
    left = runs.unbroken(recipe).left
    weights = [name for name in left if name.endswith(".safetensors")]
    assert len(weights) >= {"mifuse": 5, "adapter": 1}[recipe] and any(name.endswith(".json") for name in left)


@pytest.mark.long
def test_begun_twice_at_once_in_one_folder_both_are_right_or_one_is_refused_in_one_line(bench):
    _, runs = bench
    runs.side_by_side("mifuse", 1)
    (record,) = [record for record in runs.records if "statuses" in record]
    assert record["right"], record


def test_a_benchmark_that_is_stopped_goes_on_with_what_it_has(bench, tmp_path):
    faults, runs = bench
    again = faults.Bench(tmp_path, runs.kept)
    assert again.records == runs.records and len(again.records) >= 1
    again.kill_and_repeat("mifuse", KILLS["mifuse"])
    assert again.records == runs.records


def test_figures_count_kills_by_stage_and_what_ended_otherwise(bench):
    faults, _ = bench
    again = {"encoded": 3, "steps": 0, "answers": 0}
    good = {"recipe": "mifuse", "kills": ["export"], "status": 0, "differing": [], "weight_difference": 0.0}
    good |= {"again": again, "share_again": 0.1, "unbroken_seconds": 4.0}
    bad = {**good, "kills": ["export", "collection"], "differing": ["out/results.json"], "weight_difference": 0.5}
    failed = {**good, "status": 2}
    pair = {"recipe": "mifuse", "statuses": [0, 0], "right": True}
    found = {name: figure.values for name, figure in faults.figures([good, bad, failed, pair]).items()}
    assert (found["export_kills"], found["export_equal"]) == ([3], [1])
    assert (found["collection_kills"], found["collection_equal"]) == ([1], [0])
    assert found["largest_weight_difference"] == [0.5] and found["encoded_again"] == [3, 3, 3]
    assert (found["side_by_side"], found["side_by_side_right"]) == ([1], [1])
    assert faults.told([good, bad, failed, pair]).startswith("4 kills of 3 runs") and json.dumps(found)
