"""One training of a task with Lightning, which goes on after a kill as if there had been none.

Lightning has the loop, the devices, AMP, DDP, checkpoints, loggers and progress bars. What stands
here is when to save, and what a terminal or a log file gets to see.
"""

import contextlib
import importlib.util
import logging
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, Checkpoint, Timer, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lth_plugins.pretrain.data import Pictures, TrainLoader
from lth_plugins.pretrain.task import Task

logger = logging.getLogger(__name__)

LAST = "last.ckpt"


def fit(task: Task, pictures: Pictures, name: str, folder: Path) -> dict[str, float]:
    """Train a task for its phase's epochs, from its last checkpoint if there is one.

    Args:
        task: what to train, as it starts when there is no checkpoint.
        pictures: the data.
        name: of this training, for logs ("pretrain", "round_03").
        folder: the run's; checkpoints go to ``checkpoints/NAME`` in it until `forget`, curves to
            ``logs/NAME``.

    Returns:
        The metrics of the last epoch, and "seconds" spent over all attempts.
    """
    checkpoint = folder / "checkpoints" / name / LAST
    timer = Timer()
    trainer = _trainer(
        task,
        name,
        folder,
        max_epochs=task.phase.epochs,
        callbacks=[SaveLast(checkpoint, task.config.checkpoint_steps), timer, _progress(name)],
    )
    if checkpoint.exists():
        logger.info("%s: going on from %s", name, checkpoint)
    train, val = _loaders(task, trainer, pictures)
    task.batches = len(train)
    try:
        trainer.fit(task, train, val, ckpt_path=str(checkpoint) if checkpoint.exists() else None)
    except SIGTERMException:  # Lightning's would end the program as if all had gone well
        raise SystemExit(128 + signal.SIGTERM) from None
    return _measured(task, timer.time_elapsed())


def validate(task: Task, pictures: Pictures, name: str, folder: Path) -> dict[str, float]:
    """The validation metrics of a task as it is, and "seconds"."""
    started = time.monotonic()
    trainer = _trainer(task, name, folder, callbacks=[_progress(name)], enable_checkpointing=False)
    _, val = _loaders(task, trainer, pictures)
    trainer.validate(task, val, verbose=False)
    return _measured(task, time.monotonic() - started)


def forget(name: str, folder: Path) -> None:
    """Remove the checkpoints of a training whose result is stored."""
    shutil.rmtree(folder / "checkpoints" / name, ignore_errors=True)
    with contextlib.suppress(OSError):  # another training's may be there
        (folder / "checkpoints").rmdir()


class SaveLast(Checkpoint):
    """Saves one checkpoint, overwritten: after each epoch, every so many steps, and on SIGTERM.

    Args:
        path: of the checkpoint.
        steps: between two checkpoints inside an epoch.
    """

    def __init__(self, path: Path, steps: int) -> None:
        self.path, self.steps = path, steps

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        # After the last batch the epoch is not over: validation and its checkpoint follow.
        due = trainer.received_sigterm or (index + 1) % self.steps == 0
        if due and not trainer.is_last_batch:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.path)


class EpochLines(Callback):
    """One line an epoch, where a progress bar would fill a log file."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # Lightning calls this before the task has its training metrics; validation has been.
        epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        values = {k: v for k, v in trainer.callback_metrics.items() if k.startswith("val_")}
        logger.info("%s: %s, %s", self.name, epoch, describe(values))


def describe(metrics: Mapping[str, Any]) -> str:
    """Metrics in words for one line: "val loss 0.103, val top1 97.2 %"."""
    parts = []
    for name, value in metrics.items():
        shown = f"{100 * float(value):.1f} %" if "top" in name else f"{float(value):.3f}"
        parts.append(f"{name.replace('_', ' ')} {shown}")
    return ", ".join(parts)


def _measured(task: Task, seconds: float) -> dict[str, float]:
    return {**dict(sorted(task.metrics.items())), "seconds": round(seconds, 2)}


def _progress(name: str) -> Callback:
    return TQDMProgressBar() if sys.stderr.isatty() else EpochLines(name)


def _trainer(task: Task, name: str, folder: Path, **arguments: Any) -> pl.Trainer:
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    return pl.Trainer(
        default_root_dir=str(folder),
        logger=_curves(name, folder),
        enable_progress_bar=sys.stderr.isatty(),
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # `TrainLoader` shares batches itself
        **vars(task.config.trainer),
        **arguments,
    )


def _curves(name: str, folder: Path) -> Logger:
    if importlib.util.find_spec("tensorboard") is not None:
        return TensorBoardLogger(str(folder / "logs"), name=name, version="")
    return CSVLogger(str(folder / "logs"), name=name, version="")


def _loaders(
    task: Task, trainer: pl.Trainer, pictures: Pictures
) -> tuple[TrainLoader, list[DataLoader]]:
    data, rank, world = task.config.data, trainer.global_rank, trainer.world_size
    batch_size = task.config.batch_size
    train = TrainLoader(pictures.train, batch_size, task.stream, rank, world, data.workers)

    def plain(dataset: Dataset) -> DataLoader:
        shared = DistributedSampler(dataset, world, rank, shuffle=False) if world > 1 else None
        return DataLoader(
            dataset,
            batch_size // world,
            sampler=shared,
            num_workers=data.workers,
            pin_memory=torch.cuda.is_available(),
        )

    held_out = plain(pictures.val)
    return train, [plain(pictures.bank), held_out] if task.uses_bank else [held_out]
