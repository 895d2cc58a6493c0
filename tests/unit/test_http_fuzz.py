"""The short form of the fuzzer of HTTP."""

from http_fuzz import fuzz_replies, fuzz_requests


def test_no_damaged_reply_of_many_fails_otherwise_than_in_one_error(monkeypatch):
    monkeypatch.setattr("speechbrain_mifuse.lalm.client._FIRST_BACKOFF", 0.001)
    outcomes = fuzz_replies(cases=150, seed=1)
    assert outcomes["distribution"] and outcomes["error"]


def test_after_many_damaged_requests_the_server_answers_what_is_in_order():
    statuses = fuzz_requests(cases=30, seed=1)
    assert 400 in statuses and 500 not in statuses
