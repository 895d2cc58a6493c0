"""`speechbrain-mifuse predict`: lines, tables, what cannot be read, status; and what `serve` shares with it."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import soundfile
import torch
from toy_corpora import LABELS, utterance, write_wav

from speechbrain_mifuse.cli.main import main
from speechbrain_mifuse.features.encoder import FrozenEncoder
from speechbrain_mifuse.inference.recognizer import EmotionRecognizer
from speechbrain_mifuse.inference.recognizer_folder import export_recogniser
from speechbrain_mifuse.nnet.classifier import EmotionClassifier
from speechbrain_mifuse.utils.audio import load_audio


@pytest.fixture(scope="module")
def folder(toy_encoder, tmp_path_factory):
    """Folder of a recogniser with random weights."""
    torch.manual_seed(3)
    store = types.SimpleNamespace(layers=[1])
    front = types.SimpleNamespace(dim=FrozenEncoder(toy_encoder, [1]).dim, n_layers=1, layer=1, store=store)
    hparams = {"labels": LABELS, "encoder": str(toy_encoder), "trim_db": 40.0}
    path = tmp_path_factory.mktemp("recogniser")
    about = {"labels": LABELS, "features": {}}
    export_recogniser(path, EmotionClassifier(front.dim, len(LABELS)), front, hparams, about, temperature=2.0)
    return path


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    root = tmp_path_factory.mktemp("recordings")
    for emo in LABELS:
        write_wav(root / "below" / f"{emo}.wav", utterance(emo, 0, 0))
    (root / "broken.wav").write_text("no audio")
    return root


@pytest.fixture
def predict(folder, capsys):
    """Run the command: (status, lines on standard output, standard error)."""

    def run(*arguments):
        status = 0
        try:
            main(["predict", "--source", str(folder), *map(str, arguments)])
        except SystemExit as stopped:
            status = stopped.code
        shown = capsys.readouterr()
        return status, shown.out.splitlines(), shown.err

    return run


def test_a_folder_is_printed_file_by_file_and_what_cannot_be_read_says_why(predict, recordings, folder):
    status, lines, _ = predict(recordings)
    rows = [line.split("\t") for line in lines]
    assert status == 0 and [row[0] for row in rows] == [str(p) for p in sorted(recordings.rglob("*.wav"))]
    recogniser = EmotionRecognizer.from_hparams(folder)
    for path, label, told in rows[:4]:
        expected, probs = recogniser.predict_file(path)
        assert label == expected and float(told) == pytest.approx(float(probs.max()), abs=1e-3)
    assert rows[4][1] == "none" and "broken.wav: cannot be read" in rows[4][2]


def test_files_and_folders_may_be_mixed_and_each_recording_is_answered_once(predict, recordings):
    _, lines, _ = predict(recordings / "below" / "sad.wav", recordings / "below")
    assert [line.split("\t")[0].rsplit("/")[-1] for line in lines] == [
        "sad.wav",
        "angry.wav",
        "happy.wav",
        "neutral.wav",
    ]


def test_a_table_holds_all_probabilities_and_names_nothing_that_cannot_be_read(predict, recordings, tmp_path):
    path = tmp_path / "found.csv"
    status, lines, told = predict(recordings, "--csv", path)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert status == 0 and lines == [] and len(rows) == 4
    assert "left out: " in told and "broken.wav" in told and "4 of 5 recordings" in told and "recognise" in told
    for row in rows:
        probs = [float(row[label]) for label in LABELS]
        assert sum(probs) == pytest.approx(1, abs=1e-3) and row["label"] == LABELS[probs.index(max(probs))]
        assert float(row["probability"]) == max(probs) and float(row["start"]) == 0
        assert float(row["end"]) == pytest.approx(len(load_audio(row["file"])) / 16000, abs=0.01)


def test_json_holds_answers_and_the_reasons_of_what_could_not_be_read(predict, recordings, tmp_path):
    path = tmp_path / "found.json"
    status, _, _ = predict(recordings, "--json", path, "--abstain_below", "0.99")
    found = json.loads(path.read_text())
    assert status == 0 and found["labels"] == list(LABELS)
    assert [one["label"] for one in found["recordings"]] == [None] * 4
    assert list(found["recordings"][0]["probabilities"]) == list(LABELS)
    assert list(found["unreadable"]) == [str(recordings / "broken.wav")]


def test_a_table_is_replaced_as_a_whole_or_not_at_all(predict, recordings, tmp_path, monkeypatch):
    path = tmp_path / "found.csv"
    path.write_text("before")
    monkeypatch.setattr(EmotionRecognizer, "classify_files", lambda *_, **__: (1 / 0 for _ in range(1)))
    with pytest.raises(ZeroDivisionError):
        predict(recordings, "--csv", path)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    monkeypatch.setattr(EmotionRecognizer, "from_hparams", lambda *_, **__: pytest.fail("loaded"))


@pytest.mark.parametrize("flag", ["--csv", "--json"])
@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("a_folder", "is no file"),
        ("a_file/found", "cannot be written there"),
        ("/proc/found", "cannot be written there"),
        ("/dev/null", "is no file"),
    ],
)
def test_a_table_that_cannot_be_written_is_one_error_before_anything_is_loaded(
    predict, recordings, tmp_path, nothing_is_loaded, flag, target, told
):
    (tmp_path / "a_folder").mkdir()
    (tmp_path / "a_file").write_text("before")
    status, _, shown = predict(recordings, flag, tmp_path / target)
    assert status == 2 and shown.startswith(f"error: {flag}: {tmp_path / target} {told}") and shown.count("\n") == 1
    assert (tmp_path / "a_file").read_text() == "before"


def stop_after(count, monkeypatch, sent=signal.SIGINT):
    """Let Ctrl-C come after some answers."""
    plain = EmotionRecognizer.classify_files

    def stopped(*arguments, **options):
        for place, one in enumerate(plain(*arguments, **options)):
            if place == count:
                os.kill(os.getpid(), sent)
                time.sleep(10)
            yield one

    monkeypatch.setattr(EmotionRecognizer, "classify_files", stopped)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_leaves_the_rows_that_there_are_and_says_how_many_are_missing(
    sent, predict, recordings, tmp_path, monkeypatch
):
    stop_after(2, monkeypatch, sent)
    status, _, told = predict(recordings, "--csv", tmp_path / "new" / "found.csv")
    with (tmp_path / "new" / "found.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 2
    assert status == 130 and "2 of 5 recordings" in told and "stopped: 3 of 5 recordings are missing" in told
    status, lines, told = predict(recordings)
    assert status == 130 and len(lines) == 2 and "stopped: 3 of 5 recordings are missing" in told


def test_ctrl_c_before_the_first_answer_leaves_an_earlier_table(predict, recordings, tmp_path, monkeypatch):
    (tmp_path / "found.csv").write_text("before")
    stop_after(0, monkeypatch)
    status, _, told = predict(recordings, "--csv", tmp_path / "found.csv")
    assert status == 130 and "5 of 5 recordings are missing" in told
    assert (tmp_path / "found.csv").read_text() == "before"


@pytest.mark.parametrize(
    "command",
    [
        ["predict", "--source", "hub/id", "a.wav"],
        ["serve", "hub/id"],
        ["adapt", "--source", "hub/id", "--teacher", "b", "c"],
    ],
)
def test_a_hub_id_is_answered_with_what_is_expected_in_its_place(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(command)
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and told.startswith("error: hub/id: no folder of a recogniser here. Name a local")
    assert "downloaded first" in told and "Train it again" not in told


def test_a_server_answers_on_the_device_and_at_the_precision_that_it_is_told(folder, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        main(["serve", str(folder), "--device", "cuda:99"])
    assert "error: --device: cuda:99 cannot be used here" in capsys.readouterr().err
    served = []
    monkeypatch.setattr(
        "speechbrain_mifuse.inference.server.serve_until_stopped",
        lambda server, _: served.append(server) or server.close(),
    )
    main(["serve", str(folder), "--port", "0", "--device", "cpu", "--precision", "bf16"])
    recogniser = served[0].recogniser
    assert recogniser.device == "cpu" and recogniser.precision == "bf16"


def test_an_answer_below_the_threshold_is_printed_as_unsure(predict, recordings):
    _, lines, _ = predict(recordings / "below", "--abstain_below", "0.99")
    assert {line.split("\t")[1] for line in lines} == {"unsure"}


def test_one_channel_is_used_where_it_is_named_and_recordings_without_it_are_left_out(predict, recordings, tmp_path):
    left, right = (load_audio(recordings / "below" / "sad.wav").numpy(), np.zeros(100))
    both = np.stack([left, np.resize(right, len(left))], axis=1)
    soundfile.write(tmp_path / "stereo.wav", both, 16000)
    soundfile.write(tmp_path / "mono.wav", left, 16000)
    status, lines, _ = predict(tmp_path / "mono.wav", tmp_path / "stereo.wav", "--channel", "1")
    answers = [line.split("\t", 1)[1] for line in lines]
    assert status == 0 and answers[0] == answers[1] and not answers[0].startswith("unsure")
    status, lines, _ = predict(tmp_path / "mono.wav", tmp_path / "stereo.wav", "--channel", "2")
    assert status == 0 and "has no channel 2" in lines[0] and lines[1].endswith("unsure\t0.000")


def test_windows_give_a_line_for_each_stretch_of_time(predict, recordings, tmp_path):
    long = write_wav(tmp_path / "long.wav", torch.cat([load_audio(recordings / "below" / "sad.wav")] * 6).numpy())
    _, lines, _ = predict(long, "--window_s", "0.5", "--hop_s", "0.25")
    rows = [line.split("\t") for line in lines]
    assert rows[0][1] == "0.00" and float(rows[-1][2]) == pytest.approx(len(load_audio(long)) / 16000, abs=0.01)
    assert [row[1] for row in rows[1:]] == [row[2] for row in rows[:-1]] and all(row[3] in LABELS for row in rows)
    predict(long, "--window_s", "0.5", "--hop_s", "0.25", "--json", tmp_path / "found.json")
    segments = json.loads((tmp_path / "found.json").read_text())["recordings"][0]["segments"]
    assert [f"{part['start']:.2f}" for part in segments] == [row[1] for row in rows]


@pytest.mark.parametrize("table", [[], ["--csv", "FILE"]])
def test_the_status_is_1_when_nothing_could_be_read(predict, recordings, tmp_path, table):
    table = [str(tmp_path / "found.csv") if part == "FILE" else part for part in table]
    assert predict(recordings / "broken.wav", tmp_path / "missing.wav", *table)[0] == 1


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--device", "cuda:99"], "--device: cuda:99 cannot be used here"),
        (["--abstain_below", "2"], "--abstain_below: 2.0 is no probability"),
        (["--channel", "0"], "--channel: 0 must be 1 or more"),
        (["--window_s", "-1"], "window_s: -1.0 is no length"),
        (["--window_s", "1", "--hop_s", "2"], "hop_s: 2.0 must be"),
    ],
)
def test_a_flag_that_cannot_be_used_is_one_error_that_names_it(predict, recordings, flags, named):
    status, _, told = predict(recordings, *flags)
    assert status == 2 and f"error: {named}" in told


def test_a_folder_without_recordings_is_one_error(predict, tmp_path):
    status, _, told = predict(tmp_path)
    assert status == 2 and f"error: {tmp_path}: holds no recording" in told


def test_a_moved_recogniser_without_its_card_still_answers(folder, recordings, tmp_path, capsys):
    moved = shutil.copytree(folder, tmp_path / "moved")
    (moved / "README.md").unlink()
    main(["predict", "--source", str(moved), str(recordings / "below" / "sad.wav")])
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize("command", ["predict", "adapt"])
def test_help_of_the_command_loads_no_torch(command):
    code = f"import sys; from speechbrain_mifuse.cli.main import main\ntry: main(['{command}', '--help'])\n"
    code += "except SystemExit: pass\nassert not {'torch', 'numpy', 'speechbrain'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.DEVNULL).returncode == 0
