"""What the Brains of this package share: exact resumption, complete checkpoints, sparse logging."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import speechbrain as sb
import torch
from filelock import FileLock, Timeout
from speechbrain.dataio.sampler import ReproducibleRandomSampler
from speechbrain.utils.checkpoints import CKPT_PREFIX, METAFNAME, Checkpoint, Checkpointer
from speechbrain.utils.distributed import (
    ddp_all_reduce,
    ddp_barrier,
    ddp_init_group,
    if_main_process,
    is_distributed_initialized,
    main_process_only,
)
from speechbrain.utils.epoch_loop import EpochCounter
from torch.distributed import ReduceOp
from torch.nn.parallel import DistributedDataParallel

from speechbrain_mifuse.features.dataset import frame_batches
from speechbrain_mifuse.utils.errors import UserError, writing
from speechbrain_mifuse.utils.files import atomic_write
from speechbrain_mifuse.utils.progress import progress, quiet
from speechbrain_mifuse.utils.texts import one_line

logger = logging.getLogger(__name__)

# Set in a checkpoint's folder when all of it is on disk; holds the checksums of its files (none in older ones).
WHOLE = "whole"
# Loggers of SpeechBrain that tell of each epoch and checkpoint: here an epoch lasts a moment.
EVERY_EPOCH = ("speechbrain.utils.epoch_loop", "speechbrain.utils.checkpoints")


class CheckpointError(UserError):
    """A checkpoint that is damaged, or cannot be written."""


def file_crc(path: Path) -> int:
    """CRC-32 of a file, once it is on the disk."""
    found = 0
    with path.open("rb") as file:
        with contextlib.suppress(OSError):  # what is no file on a disk cannot be brought there
            os.fsync(file.fileno())
        while piece := file.read(1 << 20):
            found = zlib.crc32(piece, found)
    return found


class AtomicCheckpointer(Checkpointer):
    """A checkpointer that never loads a checkpoint whose writing was cut off, or that has changed on the disk.

    Parameters
    ----------
    *given, **options
        See `speechbrain.utils.checkpoints.Checkpointer`.

    Raises
    ------
    CheckpointError
        If a checkpoint to be loaded has changed, or none can be written.

    Example
    -------
    >>> import tempfile
    >>> checkpointer = AtomicCheckpointer(tempfile.mkdtemp(), {"line": torch.nn.Linear(1, 1)})
    >>> path = checkpointer.save_checkpoint().path
    >>> _ = (path / "line.ckpt").write_bytes(b"damaged")
    >>> checkpointer.recover_if_possible()
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.brains.training.CheckpointError: ...line.ckpt: damaged, its checksum differs. Delete ...
    """

    def save_checkpoint(self, meta: Mapping | None = None, **options) -> Checkpoint | None:
        """Save as SpeechBrain does, then mark the checkpoint as whole."""
        # The newest checkpoint is kept and loaded; a clock may have been set back since the one before.
        now = max([time.time(), *(found.meta["unixtime"] + 0.001 for found in self.list_checkpoints())])
        self._remove_torn()
        try:
            saved = super().save_checkpoint(meta={"unixtime": now, **(meta or {})}, **options)
            if saved is not None:
                sums = {path.name: file_crc(path) for path in sorted(saved.path.iterdir())}
                atomic_write(saved.path / WHOLE, json.dumps(sums))
        except (OSError, RuntimeError) as error:  # torch's own writer does not say which
            self._remove_torn()
            remedy = "Is the disk full or read-only? Run again then: training goes on from the checkpoint before."
            raise CheckpointError(f"{self.checkpoints_dir}: no checkpoint can be written ({error}). {remedy}") from None
        # All processes look for checkpoints next: one that missed the mark would wait for the others forever.
        ddp_barrier()
        return saved

    def save_and_keep_only(self, **options) -> None:
        """Save and delete as SpeechBrain does, at a cost that does not grow with the number of earlier checkpoints."""
        # SpeechBrain adds a key to the list that is its default value: it lists the folder twice more in each call.
        super().save_and_keep_only(**{"importance_keys": [], **options})

    def list_checkpoints(self) -> list[Checkpoint]:
        """List the checkpoints that were written to the end."""
        whole = [folder for folder in self._list_checkpoint_dirs() if (folder / WHOLE).exists()]
        for folder in whole:
            require_intact(folder, (METAFNAME,))
        return self._construct_checkpoint_objects(whole)

    def load_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Load as SpeechBrain does, after a look at the checksums."""
        require_intact(checkpoint.path)
        super().load_checkpoint(checkpoint)

    @main_process_only
    def _remove_torn(self) -> None:
        """Remove what a kill left of a checkpoint that was being written or deleted."""
        whole = {found.path for found in self.list_checkpoints()}
        for folder in self.checkpoints_dir.glob(f"{CKPT_PREFIX}*"):
            if folder not in whole:
                shutil.rmtree(folder, ignore_errors=True)


def require_intact(folder: Path, names: tuple[str, ...] | None = None) -> None:
    """Compare the files of a checkpoint with the checksums that its mark holds."""
    remedy = f"Delete {folder} and run again: what it held is trained anew."
    try:
        text = (folder / WHOLE).read_text()
        # An older mark is empty: it tells that the checkpoint is whole, and no more.
        sums = dict(json.loads(text)) if text else {}
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / WHOLE}: damaged ({error}). {remedy}") from None
    for name, wanted in sums.items():
        if names is not None and name not in names:
            continue
        try:
            found = file_crc(folder / name)
        except (OSError, ValueError):
            found = None
        if found != wanted:
            raise CheckpointError(f"{folder / name}: damaged, its checksum differs. {remedy}")


def process_count() -> int:
    """Count the processes that train together."""
    return torch.distributed.get_world_size() if is_distributed_initialized() else 1


def require_one_process() -> None:
    """Refuse several processes of `torchrun` where a small network is trained on stored frames."""
    count = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if count > 1:
        raise UserError(
            f"torchrun started {count} processes, and this recipe trains small networks on stored frames, which one "
            "process does. Start it with python. To use more cores or machines, run pairs, methods or seeds side by "
            "side (speechbrain-mifuse sweep) and encode recordings in parts (speechbrain-mifuse extract --shard). Only "
            "the classifier recipe with --features finetune trains in several processes."
        )


def join_processes(run_opts: Mapping) -> None:
    """Join the processes of `torchrun` as SpeechBrain's recipes do; what is in the way is one clear error."""
    try:
        ddp_init_group(run_opts)
    except ValueError as error:
        raise UserError(
            f"--distributed_backend {run_opts['distributed_backend']}: {one_line(error)} Start as many processes as "
            "there are GPUs, or pass --distributed_backend gloo --device cpu."
        ) from None


def _mean_over_processes(value: float, device: str) -> float:
    if process_count() == 1:
        return value
    return ddp_all_reduce(torch.tensor(value, device=device), ReduceOp.SUM).item() / process_count()


class ResumableBrain(sb.Brain):
    """A Brain whose interrupted run ends, once resumed, with the same weights as an uninterrupted one.

    Randomness is seeded anew from the seed and the epoch, so an epoch does not depend on how the ones before it were
    reached.

    Parameters
    ----------
    *args, **options
        See `speechbrain.Brain`. `hparams` must hold `seed`, `epoch_counter`, `train_logger` and `log_interval` (epochs
        between two lines of the log, and between two checkpoints); a checkpointer is needed.

    Example
    -------
    >>> import functools, tempfile
    >>> from speechbrain.utils.train_logger import FileTrainLogger
    >>> class Regression(ResumableBrain):
    ...     def compute_forward(self, batch, stage):
    ...         return self.modules.line(batch)
    ...     def compute_objectives(self, predictions, batch, stage):
    ...         return predictions.square().mean()
    >>> folder, counter, line = Path(tempfile.mkdtemp()), EpochCounter(3), torch.nn.Linear(2, 1)
    >>> logger = FileTrainLogger(folder / "train_log.txt")
    >>> brain = Regression(
    ...     modules={"line": line},
    ...     opt_class=functools.partial(torch.optim.SGD, lr=0.1),
    ...     hparams={"seed": 1, "epoch_counter": counter, "log_interval": 2, "train_logger": logger},
    ...     checkpointer=AtomicCheckpointer(folder / "save", {"line": line, "counter": counter}),
    ... )
    >>> fit(brain, torch.utils.data.DataLoader(torch.ones(4, 2)), "regression")
    >>> [text.split(" - ")[0] for text in (folder / "train_log.txt").read_text().splitlines()]
    ['epoch: 2', 'epoch: 3']
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        # SpeechBrain takes the single process of `torchrun --nproc_per_node=1` for a distributed run.
        self.distributed_launch = process_count() > 1

    def _wrap_distributed(self):
        """Wrap the trained modules in DDP as SpeechBrain does, and on CPUs too."""
        if not self.distributed_launch:
            return
        # Encoders drop layers at random and have parameters that take no part, such as an unused mask embedding.
        self.find_unused_parameters = True
        if self.device_type != "cpu":
            super()._wrap_distributed()
            return
        # SpeechBrain makes SyncBatchNorm of BatchNorm, and that does not run on a CPU.
        for name, module in self.modules.items():
            if any(parameter.requires_grad for parameter in module.parameters()):
                self.modules[name] = DistributedDataParallel(module, find_unused_parameters=True)

    def on_fit_start(self):
        """Restore the last checkpoint, saying so."""
        super().on_fit_start()
        done = self.hparams.epoch_counter.current
        if done:
            logger.info("going on after epoch %d of %d", done, self.hparams.epoch_counter.limit)

    def on_stage_start(self, stage, epoch=None):
        """Seed the epoch and start its statistics."""
        self.epoch, self.statistics = epoch, {}
        if stage == sb.Stage.TRAIN:
            # Processes draw different dropout masks; beyond 2^50 they meet no other seed and epoch.
            rank = torch.distributed.get_rank() if self.distributed_launch else 0
            torch.manual_seed(self.hparams.seed * 100003 + epoch + (rank << 50))

    def count(self, **values: float) -> None:
        """Add values of one batch to the means that the log shows."""
        for name, value in values.items():
            total, batches = self.statistics.get(name, (0.0, 0))
            self.statistics[name] = (total + float(value), batches + 1)

    def on_log_point(self, epoch: int) -> None:
        """Do what belongs before a line of the log and a checkpoint; nothing by default."""

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Log and save a checkpoint every `log_interval` epochs and at the last one."""
        if stage != sb.Stage.TRAIN:
            return
        last = epoch == self.hparams.epoch_counter.limit
        if epoch % self.hparams.log_interval and not last:
            return
        self.on_log_point(epoch)
        means = {name: total / batches for name, (total, batches) in self.statistics.items()}
        stats = {"loss": _mean_over_processes(stage_loss, self.device), **means}
        self.hparams.train_logger.log_stats({"epoch": epoch}, train_stats=stats)
        self.save_epoch(epoch)

    def save_epoch(self, epoch: int) -> None:
        """Save a checkpoint at the end of an epoch, and delete the one before."""
        # SpeechBrain resets these only later: a resumed epoch would continue this one's count and mean loss.
        self.step, self.avg_train_loss = 0, 0.0
        self.checkpointer.save_and_keep_only(meta={"epoch": epoch}, num_to_keep=1)


def require_trainable(emotions: Sequence[str | None], where: str, labels: Sequence[str] | None = None) -> None:
    """Refuse a training set from which nothing can be learned."""
    if len(emotions) < 2:
        raise UserError(
            f"{where}: {len(emotions)} usable recording, and training needs two different ones at least. Add "
            "recordings; skipped.json and the log name those that cannot be used."
        )
    if labels is None:
        return
    missing = [label for label in labels if label not in emotions]
    if missing:
        names = ", ".join(map(repr, missing))
        raise UserError(f"{where}: no recording of {names} to train on. Add some, or leave it out of --labels.")
    if len(set(emotions)) < 2:
        raise UserError(f"{where}: all recordings are of one class, {emotions[0]!r}. Training needs two at least.")


def watched(counter: EpochCounter, bar):
    """Epochs of a counter, shown on one bar (SpeechBrain's own draws one per epoch, and here epochs last a moment)."""
    for epoch in counter:
        yield epoch
        bar.update(epoch - bar.n)


@contextlib.contextmanager
def exclusive_lock(path: str | Path, doing: str = "is at it"):
    """Hold a lock that other runs respect; say so before waiting for it."""
    lock = FileLock(path)
    try:
        if if_main_process():
            try:
                lock.acquire(timeout=0)
            except Timeout:
                logger.info("%s: another run %s, waiting for its end.", path, doing)
                lock.acquire()
        ddp_barrier()
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def training_lock(folder: Path):
    """Let one run at a time train in a folder: two would delete each other's checkpoints."""
    with contextlib.ExitStack() as held:
        with writing(folder):
            held.enter_context(exclusive_lock(folder.with_name(f"{folder.name}.lock"), "trains there"))
            # The other run may have removed its checkpoints when it was done.
            folder.mkdir(exist_ok=True)
        yield


def fit(brain: sb.Brain, train, description: str, batch_size: int | None = None) -> None:
    """Train until the Brain's epoch counter ends; an interrupted run resumes from its last checkpoint.

    Parameters
    ----------
    brain : ResumableBrain
        What is trained; its class has an example.
    train : DynamicItemDataset or DataLoader
        A training set, or a loader that makes batches of its own.
    description : str
        Names the training on the progress bar and in errors.
    batch_size : int, optional
        Recordings in a batch of all processes together (the whole set, if it is smaller); none for a loader.

    Raises
    ------
    UserError
        If there are fewer than two recordings, or the processes cannot share a batch.
    CheckpointError
        If a checkpoint is damaged, or cannot be written.

    Example
    -------
    >>> fit(sb.Brain(hparams={"epoch_counter": EpochCounter(1)}), ["one recording"], "toy", batch_size=8)
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.utils.errors.UserError: toy: 1 usable recording, and training needs two different ones at ...
    """
    loader = {} if batch_size is None else _loader_options(train, description, batch_size)
    counter, hidden = brain.hparams.epoch_counter, not if_main_process()
    with contextlib.ExitStack() as around:
        if brain.checkpointer is not None:
            around.enter_context(training_lock(brain.checkpointer.checkpoints_dir))
        around.enter_context(quiet(*EVERY_EPOCH))
        bar = around.enter_context(progress(total=counter.limit, desc=description, unit="epoch", disable=hidden))
        brain.fit(watched(counter, bar), train, progressbar=False, train_loader_kwargs=loader)
    # What comes next is done by one process, and in DDP a forward pass would wait for the others.
    for name, module in brain.modules.items():
        if isinstance(module, DistributedDataParallel):
            brain.modules[name] = module.module


def _loader_options(train, description: str, batch_size: int) -> dict:
    """Say how a training set is drawn: shuffled by the seed, in batches that several processes share."""
    require_trainable([None] * len(train), description)
    processes = process_count()
    # A small last batch would make the diversity term, a statistic of the batch, mean something else.
    options = frame_batches(batch_size=min(batch_size, len(train)) // processes, drop_last=True)
    if processes == 1:
        return {**options, "shuffle": True}
    if batch_size % processes or options["batch_size"] < 2:
        raise UserError(
            f"--batch_size {batch_size}: is shared by {processes} processes, and each needs two of the {len(train)} "
            f"recordings at a time. Pass a multiple of {processes}, or start fewer processes."
        )
    # SpeechBrain deals what this sampler gives, so together the processes have the batches of a single one.
    return {**options, "sampler": ReproducibleRandomSampler(train, seed=os.environ["SB_GLOBAL_SEED"])}
