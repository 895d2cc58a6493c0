"""What the Brains of this package share: exact resumption, sparse logging, settings kept beside results."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import speechbrain as sb
import torch
from speechbrain.utils.checkpoints import Checkpointer
from speechbrain.utils.distributed import ddp_barrier, if_main_process
from speechbrain.utils.epoch_loop import EpochCounter

from speechbrain_mifuse.corpora.manifest import atomic_write
from speechbrain_mifuse.errors import UserError
from speechbrain_mifuse.features.dataset import frame_batches
from speechbrain_mifuse.features.store import difference
from speechbrain_mifuse.progress import progress, quiet

logger = logging.getLogger(__name__)

# Set in a checkpoint's folder when all of it is on disk.
WHOLE = "whole"

# Loggers of SpeechBrain that tell of each epoch and checkpoint: here an epoch lasts a moment.
EVERY_EPOCH = ("speechbrain.utils.epoch_loop", "speechbrain.utils.checkpoints")


class SettingsError(UserError):
    """A folder holds work that was done with other settings."""


class WholeCheckpointer(Checkpointer):
    """A checkpointer that never loads a checkpoint whose writing was cut off.

    SpeechBrain writes a checkpoint's meta file first, so a run that is killed while it saves leaves one that looks
    whole. Here a mark is set last, and only what bears it counts.

    Example
    -------
    >>> import tempfile
    >>> checkpointer = WholeCheckpointer(tempfile.mkdtemp(), {"layer": torch.nn.Linear(1, 1)})
    >>> saved = checkpointer.save_checkpoint()
    >>> (saved.path / WHOLE).unlink()
    >>> checkpointer.list_checkpoints()
    []
    """

    def save_checkpoint(self, *args, **kwargs):
        """Save as SpeechBrain does, then mark the checkpoint as whole."""
        saved = super().save_checkpoint(*args, **kwargs)
        if saved is not None:
            (saved.path / WHOLE).touch()
        # All processes look for checkpoints next: one that missed the mark would wait for the others forever.
        ddp_barrier()
        return saved

    def list_checkpoints(self):
        """List the checkpoints that were written to the end."""
        return [found for found in super().list_checkpoints() if (found.path / WHOLE).exists()]


class ResumableBrain(sb.Brain):
    """A Brain whose killed run ends with the same weights as an unbroken one.

    Randomness is seeded anew from the seed and the epoch, so an epoch does not depend on how the ones before it were
    reached. `hparams` must hold `seed`, `epoch_counter`, `train_logger` and `log_interval` (epochs between two lines
    of the log, and between two checkpoints).

    Example
    -------
    >>> issubclass(ResumableBrain, sb.Brain)
    True
    """

    def on_fit_start(self):
        """Restore the last checkpoint, saying so."""
        super().on_fit_start()
        done = self.hparams.epoch_counter.current
        if done:
            logger.info("going on after epoch %d of %d", done, self.hparams.epoch_counter.limit)

    def on_stage_start(self, stage, epoch=None):
        """Seed the epoch and start its statistics."""
        if stage == sb.Stage.TRAIN:
            torch.manual_seed(self.hparams.seed * 100003 + epoch)
        self.statistics = {}

    def count(self, **values: float) -> None:
        """Add values of one batch to the means that the log shows.

        Parameters
        ----------
        **values : float
            Statistics by name.
        """
        for name, value in values.items():
            total, batches = self.statistics.get(name, (0.0, 0))
            self.statistics[name] = (total + float(value), batches + 1)

    def on_log_point(self, epoch: int) -> None:
        """Do what belongs before a line of the log and a checkpoint; nothing by default.

        Parameters
        ----------
        epoch : int
            The one that ends.
        """

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Log and save a checkpoint every `log_interval` epochs and at the last one."""
        if stage != sb.Stage.TRAIN:
            return
        last = epoch == self.hparams.epoch_counter.limit
        if epoch % self.hparams.log_interval and not last:
            return
        self.on_log_point(epoch)
        means = {name: total / batches for name, (total, batches) in self.statistics.items()}
        self.hparams.train_logger.log_stats({"epoch": epoch}, train_stats={"loss": stage_loss, **means})
        self.checkpointer.save_and_keep_only(meta={"epoch": epoch}, num_to_keep=1)


def same_settings(path: str | Path, settings: Mapping) -> bool:
    """Tell whether a folder's finished or begun work was done with these settings.

    Parameters
    ----------
    path : str or pathlib.Path
        Settings file; written when missing.
    settings : mapping
        Everything that decides the outcome, of JSON's types.

    Returns
    -------
    bool
        True if the file was there with equal content, False if it was just written.

    Raises
    ------
    SettingsError
        If it differs; the message says in what.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "settings.json"
    >>> same_settings(path, {"seed": 1}), same_settings(path, {"seed": 1})
    (False, True)
    >>> same_settings(path, {"seed": 2})
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.brains.training.SettingsError: ... other settings (seed: found 1, wanted 2). ...
    """
    path, settings = Path(path), json.loads(json.dumps(settings))
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        atomic_write(path, json.dumps(settings, indent=1))
        return False
    except ValueError as error:
        raise SettingsError(f"{path}: damaged ({error}). Delete the folder {path.parent}.") from None
    differs = difference(found, settings)
    if differs:
        raise SettingsError(
            f"{path.parent} was made with other settings ({differs}). Pass another --output_folder, or delete it."
        )
    return True


def watched(counter: EpochCounter, bar):
    """Epochs of a counter, shown on one bar (SpeechBrain's own draws one per epoch, and here epochs last a moment).

    Parameters
    ----------
    counter : EpochCounter
        May be restored from a checkpoint between this call and the first epoch.
    bar : tqdm.tqdm
        Updated after each epoch.

    Yields
    ------
    int
        Epoch.

    Example
    -------
    >>> from tqdm import tqdm
    >>> with tqdm(total=2, disable=True) as bar:
    ...     list(watched(EpochCounter(2), bar))
    [1, 2]
    """
    for epoch in counter:
        yield epoch
        bar.update(epoch - bar.n)


def fit(brain: sb.Brain, train, told: str, batch_size: int | None = None) -> None:
    """Train until the Brain's epoch counter ends; a killed run goes on from its last checkpoint.

    Parameters
    ----------
    brain : sb.Brain
        The Brain, with `epoch_counter` among its hparams.
    train : DynamicItemDataset or DataLoader
        The training set, or a loader that makes its own batches.
    told : str
        For the progress bar.
    batch_size : int, optional
        Utterances in a batch of a training set; all, when there are fewer.

    Example
    -------
    >>> fit.__name__  # runs in `recipes/RAVDESS/mifuse/train.py`
    'fit'
    """
    loader = {}
    if batch_size is not None:
        # A small last batch would make the diversity term, a statistic of the batch, mean something else.
        loader = frame_batches(batch_size=min(batch_size, len(train)), shuffle=True, drop_last=True)
    counter, hidden = brain.hparams.epoch_counter, not if_main_process()
    with quiet(*EVERY_EPOCH), progress(total=counter.limit, desc=told, unit="epoch", disable=hidden) as bar:
        brain.fit(watched(counter, bar), train, train_loader_kwargs=loader)
