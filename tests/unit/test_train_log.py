"""What trainings write down."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from speechbrain_mifuse.brains import train_log
from speechbrain_mifuse.brains.train_log import TrainLog


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    """Step and value of a curve's points, in the order in which they were written."""
    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return [(event.step, round(event.value, 4)) for event in found.Scalars(tag)]


def write(folder: Path, epochs, value: float) -> TrainLog:
    """Log epochs as one process of a run does."""
    log = TrainLog(folder / "train_log.txt")
    for epoch in epochs:
        log.log_stats({"epoch": epoch}, train_stats={"loss": value + epoch, "codes_used": 7}, verbose=False)
    return log


def test_every_statistic_is_a_curve_over_epochs(tmp_path):
    write(tmp_path, [5, 10], 0.0)
    assert points(tmp_path, "loss/train") == [(5, 5.0), (10, 10.0)]
    assert points(tmp_path, "codes_used/train") == [(5, 7.0), (10, 7.0)]


def test_a_resumed_run_draws_on_where_it_was(tmp_path):
    write(tmp_path, [5, 10], 0.0)
    write(tmp_path, [15], 0.0)
    assert [step for step, _ in points(tmp_path, "loss/train")] == [5, 10, 15]


def test_without_tensorboard_the_text_alone_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(train_log, "TENSORBOARD", False)
    write(tmp_path, [5], 0.0)
    assert [path.name for path in tmp_path.iterdir()] == ["train_log.txt"]
