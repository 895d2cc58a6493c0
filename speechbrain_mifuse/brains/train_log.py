"""What a run writes down while it trains: a text file, and TensorBoard's events where that is installed."""

from __future__ import annotations

import importlib.util
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path

from speechbrain.utils.distributed import main_process_only

# At import it warns that torchvision is missing, which only its loggers of pictures need.
_noisy = logging.getLogger("speechbrain.utils.train_logger")
_noisy.disabled = True
from speechbrain.utils.train_logger import FileTrainLogger  # noqa: E402

from speechbrain_mifuse.utils.errors import writing  # noqa: E402

_noisy.disabled = False

# The package is an extra.
TENSORBOARD = importlib.util.find_spec("tensorboard") is not None


class TrainLog(FileTrainLogger):
    """SpeechBrain's text log, with the curves as TensorBoard's events beside it where that package is installed.

    Parameters
    ----------
    save_file : str or pathlib.Path
        The text file; events go to the folder `tensorboard` beside it.
    precision : int
        Decimals in the text.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "train_log.txt"
    >>> TrainLog(path).log_stats({"epoch": 1}, train_stats={"loss": 0.5})
    >>> print(path.read_text().strip())
    epoch: 1 - train loss: 5.00e-01
    """

    def __init__(self, save_file: str | Path, precision: int = 2):
        super().__init__(save_file, precision)
        # A file for each process, since one that was killed may have left half an event at the end of its own.
        name = f"events.out.tfevents.{time.time_ns()}.{os.getpid()}"
        self.events = Path(save_file).parent / "tensorboard" / name

    @main_process_only
    def log_stats(self, stats_meta, train_stats=None, valid_stats=None, test_stats=None, verbose=True) -> None:
        """Write one line, and one point of each curve."""
        with writing(self.save_file):
            super().log_stats(stats_meta, train_stats, valid_stats, test_stats, verbose)
        if TENSORBOARD:
            stages = {"train": train_stats, "valid": valid_stats, "test": test_stats}
            named = {f"{name}/{stage}": v for stage, stats in stages.items() for name, v in (stats or {}).items()}
            with writing(self.events):
                self._add_event(stats_meta["epoch"], named)

    def _add_event(self, epoch: int, values: Mapping[str, float]) -> None:
        """Add a point to each curve; not by torch's writer, whose thread prints a traceback if the disk is full."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.events.parent.mkdir(parents=True, exist_ok=True)
        points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        events = [] if self.events.exists() else [Event(wall_time=time.time(), file_version="brain.Event:2")]
        events.append(Event(wall_time=time.time(), step=epoch, summary=Summary(value=points)))
        with self.events.open("ab") as file:
            records = RecordWriter(file)
            for event in events:
                records.write(event.SerializeToString())
