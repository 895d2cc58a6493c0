"""The short form of the fuzzer of model folders."""

from folder_fuzz import fuzz


def test_no_damaged_folder_of_many_runs_code_or_fails_otherwise_than_in_one_error():
    outcomes = fuzz(cases=60, seed=1)
    assert set(outcomes) == {"used", "refused"}
