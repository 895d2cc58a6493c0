"""Collection from a server that misbehaves: all is answered or reported, nothing is wrong, nothing leaks."""

import contextlib
import logging
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from chaos_server import LABELS, MODEL, PASSING, ChaosServer, noises, right_label

from speechbrain_mifuse.cli.main import main
from speechbrain_mifuse.lalm.client import LalmClient, LalmError
from speechbrain_mifuse.lalm.collect import collect
from speechbrain_mifuse.lalm.exchange import export
from speechbrain_mifuse.lalm.integrity import check
from speechbrain_mifuse.lalm.profile import Profile
from speechbrain_mifuse.lalm.prompt import Prompt
from speechbrain_mifuse.lalm.store import LabelStore, Query
from speechbrain_mifuse.utils.audio import content_hash

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import collect_faults

KEY = "sk-planted-0123456789"
PROMPT = Prompt(LABELS)
# Faults of the contents, which the parser has to see through; the others are met by asking again at once.
OF_CONTENTS = (
    "cut_off",
    "refuse",
    "refuse_in_words",
    "filter_content",
    "contradict",
    "say_something_else",
    "say_nothing",
)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Pauses between attempts that are as short as the rest of these tests."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("speechbrain_mifuse.lalm.client._FIRST_BACKOFF", 0.002)
    monkeypatch.setattr("speechbrain_mifuse.lalm.client._LONGEST_BACKOFF", 0.01)


@pytest.fixture
def store(tmp_path):
    with LabelStore(tmp_path / "labels.sqlite") as store:
        yield store


def query_of(server):
    return Query.of(PROMPT, MODEL, server.base_url, {"temperature": 1.0, "seed": 0}, "local:chaos")


def run(store, server, count=20, k=3, profile=None, **options):
    limits = {name: options.pop(name) for name in ("timeout", "max_retries") if name in options}
    client = LalmClient(server.base_url, MODEL, profile=profile, **{"timeout": 5, "max_retries": 6, **limits})
    options = {"concurrency": 8, "show_progress": False, "max_attempts": 20, **options}
    return collect(noises(count), PROMPT, client, store, query_of(server), k, **options)


def audios(count):
    return [content_hash(waveform()) for _, waveform in noises(count)]


def stored(store, server):
    return store.have(query_of(server))


def wrong_labels(store, server, count, k=3):
    samples = store.load(query_of(server), audios(count), k)
    right = [[right_label(audio)] * k for audio in audios(count)]
    found = samples.probs.argmax(-1).tolist()
    return sum(samples.mask[i, j].item() and found[i][j] != right[i][j] for i in range(count) for j in range(k))


def accounted(report, store, server, count, k=3):
    """Whether every sample is stored, was refused or unusable, or belongs to an utterance that is reported."""
    failed = {audios(count)[int(utt_id[1:])] for utt_id, _ in report.failed}
    known = stored(store, server) | set(store.rejected(query_of(server)))
    return all(audio in failed or (audio, j) in known for audio in audios(count) for j in range(k))


@pytest.mark.parametrize("honours_n", [True, False])
def test_with_half_of_all_replies_faulty_all_is_answered_or_reported_and_none_is_wrong(store, honours_n):
    profile = Profile(honours_n=honours_n)
    with ChaosServer(PASSING, rate=0.5, slow_seconds=0.01) as server:
        report = run(store, server, count=40, profile=profile)
        assert accounted(report, store, server, 40) and report.stored == len(stored(store, server)) > 60
        assert report.asked == report.stored + report.refused + report.invalid
        for _ in range(12):
            if len(stored(store, server)) < 120:
                assert accounted(run(store, server, count=40, profile=profile), store, server, 40)
        assert len(stored(store, server)) == 120 and wrong_labels(store, server, 40) == 0
        assert len(server.drawn) > 15
        assert server.drawn["answer_right"] < 0.65 * sum(server.drawn.values())
    assert check(store).problems == []


@pytest.mark.parametrize("fault", PASSING)
def test_each_fault_alone_makes_no_wrong_label_and_passes(store, fault):
    with ChaosServer([fault], rate=0.5, slow_seconds=0.01) as server:
        reports = [run(store, server, count=6, k=2) for _ in range(6)]
        assert len(stored(store, server)) == 12 and wrong_labels(store, server, 6, k=2) == 0
        assert server.drawn[fault] > 0
        at_once = fault not in OF_CONTENTS
        assert at_once == (reports[0].stored == 12) and not reports[-1].failed


@pytest.mark.parametrize("fault", OF_CONTENTS)
def test_a_server_that_never_answers_the_question_fills_no_label(store, fault):
    with ChaosServer([fault], rate=1.0) as server:
        with pytest.raises(LalmError, match="none of the first 12 answers can be used"):
            run(store, server, count=6, k=2)
        assert sum(store.rejected(query_of(server)).values()) == 12
        assert not store.load(query_of(server), audios(6), 2).mask.any()


@pytest.mark.parametrize("fault", sorted(set(PASSING) - set(OF_CONTENTS) - {"be_slow", "answer_once"}))
def test_a_server_that_never_gives_a_reply_stops_the_run_with_its_reason(store, fault):
    with ChaosServer([fault], rate=1.0) as server, pytest.raises(LalmError, match="failed requests in a row") as caught:
        run(store, server, count=30, k=2, max_retries=1)
    assert server.base_url in str(caught.value) and len(server.asked) < 60
    assert check(store).problems == []


def test_a_server_that_hangs_on_some_requests_keeps_the_others_from_nothing(store):
    with ChaosServer(["hang"], rate=0.25) as server:
        start = time.monotonic()
        report = run(store, server, count=24, k=1, timeout=0.3, max_retries=4)
        assert len(stored(store, server)) + len(report.failed) == 24 and report.stored >= 22
        assert time.monotonic() - start < 60 and wrong_labels(store, server, 24, k=1) == 0


def test_a_server_that_hangs_cannot_hold_a_run_beyond_its_deadline(store):
    with ChaosServer(["hang"], rate=1.0) as server:
        start = time.monotonic()
        with pytest.raises(LalmError, match=r"--lalm_deadline: the 0\.5 s"):
            run(store, server, deadline=0.5, timeout=60)
        assert time.monotonic() - start < 30
    assert check(store).problems == []


def test_the_deadline_keeps_what_was_answered_and_the_next_run_asks_for_the_rest_alone(store):
    with ChaosServer(latency=0.1) as server:
        with pytest.raises(LalmError, match=r"new samples are stored\. Run again"):
            run(store, server, count=60, concurrency=4, deadline=0.8)
        kept, before = stored(store, server), len(server.asked)
        assert 0 < len(kept) < 180
        server.latency = 0
        run(store, server, count=60)
        assert len(stored(store, server)) == 180 and not kept & set(server.times_asked(before))


def test_a_server_that_goes_midway_is_one_clear_error_and_another_run_goes_on(store):
    with ChaosServer(latency=0.05) as server:
        answered = len(noises(40))
        with contextlib.ExitStack() as stack:
            stack.callback(server.close)
            waveform = noises(40)[20][1]

            def closing():
                server.close()
                return waveform()

            cut = [*noises(40)[:20], ("u20", closing), *noises(40)[21:]]
            client = LalmClient(server.base_url, MODEL, timeout=5, max_retries=1)
            with pytest.raises(LalmError, match="is the server running") as caught:
                collect(cut, PROMPT, client, store, query_of(server), 1, concurrency=4, show_progress=False)
    kept = stored(store, server)
    assert 8 <= len(kept) < answered and f"{len(kept)} new samples are stored" in str(caught.value)
    with ChaosServer() as server:
        run(store, server, count=40, k=1)
        assert len(stored(store, server)) == 40 and not kept & set(server.times_asked())


def test_ctrl_c_ends_a_collection_at_once_and_cleanly(tmp_path):
    path = tmp_path / "labels.sqlite"
    with ChaosServer(latency=0.1) as server:
        process = collect_faults.started(path, server.base_url, 200)
        assert collect_faults.kill_after(0.5, process, server, signal.SIGINT) < 10
        assert process.exitcode == 1
        kept, before = collect_faults.stored_samples(path, server.base_url), len(server.asked)
        collect_faults.require_sound(path)
        assert 0 < len(kept) < 1000
        server.latency = 0
        with LabelStore(path) as store:
            run(store, server, count=200, k=collect_faults.K)
        assert not kept & set(server.times_asked(before))
        collect_faults.completeness(path, server, 200)


@pytest.mark.parametrize(
    ("honours_n", "faults"), [(True, ()), (False, ()), (True, ("answer_once",))], ids=["n", "one_by_one", "n_ignored"]
)
def test_killed_at_random_moments_nothing_is_lost_asked_twice_or_wrong(tmp_path, honours_n, faults):
    profile = Profile(model=MODEL, honours_n=honours_n)
    figures = collect_faults.killed_again_and_again(
        tmp_path / "labels.sqlite", kills=2, count=24, latency=0.03, profile=profile, faults=faults
    )
    assert figures["complete_share"].values == [1.0] and sum(figures["asked_again_of_stored"].values) == 0


def test_a_key_in_the_environment_is_in_no_file_that_a_run_leaves_behind(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    handler = logging.FileHandler(tmp_path / "log.txt")
    logging.getLogger().addHandler(handler)
    levels = {name: logging.getLogger(name).level for name in (None, "openai", "httpx", "httpcore")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.DEBUG)
    try:
        with LabelStore(tmp_path / "labels.sqlite") as store, ChaosServer(PASSING, rate=0.6) as server:
            for _ in range(2):
                with contextlib.suppress(LalmError):
                    run(store, server, max_retries=1, show_progress=True)
            export(store, tmp_path / "labels.jsonl", show_progress=False)
            assert server.keys_seen == {f"Bearer {KEY}"}
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        logging.getLogger().removeHandler(handler)
        handler.close()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"labels.sqlite", "labels.jsonl", "log.txt"} <= {path.name for path in files}
    assert (tmp_path / "log.txt").stat().st_size > 100
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    assert KEY not in "".join(capfd.readouterr()) and KEY in os.environ.values()


def test_a_key_in_the_environment_is_in_no_file_that_the_commands_leave_behind(
    tmp_path, toy_folder, monkeypatch, capfd
):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    with ChaosServer(PASSING, rate=0.3) as server:
        flags = [f"--data_folder={toy_folder}", f"--output_folder={out}", f"--lalm_base_url={server.base_url}"]
        command = ["collect", str(collect_faults.ROOT / "hparams" / "nemo2rav.yaml"), *flags, f"--lalm_model={MODEL}"]
        main([*command, "--dry_run"])
        assert server.asked == []
        main(command)
        with contextlib.suppress(SystemExit):
            main(["probe", "--lalm_base_url", server.base_url, "--lalm_model", MODEL, "--json", "card.json"])
        assert server.keys_seen == {f"Bearer {KEY}"}
    store, unlabelled = str(out / "labels.sqlite"), str(out / "manifests" / "target" / "adapt_unlabelled.json")
    main(["labels", "export", store, "labels.jsonl"])
    main(["labels", "merge", store, "--into", "all.sqlite"])
    main(["labels", "report", store, "--manifest", unlabelled, "--output", "report"])
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    left = {path.name for path in files}
    assert {"labels.sqlite", "labels.jsonl", "all.sqlite", "card.json", "teacher.json", "adapt.json"} <= left
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    assert KEY not in "".join(capfd.readouterr())
