"""One training of a task with Lightning, which resumes bit for bit after a kill.

Lightning has the loop, the devices, AMP, DDP, checkpoints, loggers and progress bars. This module
says what is saved where, and which process writes; `callbacks` say when.
"""

import contextlib
import hashlib
import importlib.util
import logging
import math
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import Callback, Timer, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from lth_plugins.errors import ConfigError, RunError
from lth_plugins.resilience.lock import output_folder
from lth_plugins.resilience.ranks import barrier
from lth_plugins.ticket.keys import State
from lth_plugins.training.callbacks import (
    AtomicCheckpointIO,
    EpochLines,
    SaveLast,
    StopOnSignal,
    write_state,
)
from lth_plugins.training.loader import Splits, TrainLoader, length
from lth_plugins.training.module import Task
from lth_plugins.training.settings import AUTO, Phase, TrainingConfig
from lth_plugins.training.settings import Trainer as TrainerConfig

logger = logging.getLogger(__name__)

LAST = "last.ckpt"


def check_trainer(config: TrainingConfig) -> None:
    """Check what Lightning would only refuse after a training has started.

    Raises:
        RunError: if W&B is asked for and not installed.
        ConfigError: if BatchNorm is to be shared by CPUs, or Lightning refuses ``trainer``.
    """
    if config.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise RunError(
            f"wandb={config.wandb} asks for Weights & Biases, which is not installed: "
            "pip install wandb, or leave wandb out"
        )
    trainer = config.trainer
    if trainer.sync_batchnorm and not _on_gpu(trainer):
        raise ConfigError(
            "trainer.sync_batchnorm=true needs GPUs, because PyTorch's SyncBatchNorm does: "
            "leave it out"
        )
    warnings.filterwarnings("ignore", ".*`srun` command is available.*")
    try:
        pl.Trainer(
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **vars(trainer),
        )
    except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
        raise ConfigError(f"expected settings of Lightning in trainer, found: {error}") from None


def resolve_precision(trainer: TrainerConfig, folder: Path) -> TrainerConfig:
    """Replace ``precision=auto``; a run keeps the precision that it was started with.

    Args:
        trainer: the settings.
        folder: of the run, whose ``config.yaml`` says it; may not exist yet.
    """
    if trainer.precision != AUTO:
        return trainer
    precision = "16-mixed" if _on_gpu(trainer) else "32-true"
    with contextlib.suppress(Exception):  # others say whether it can be read
        stored = OmegaConf.select(OmegaConf.load(folder / "config.yaml"), "trainer.precision")
        precision = stored or precision
    logger.info("precision %s (trainer.precision=auto)", precision)
    return replace(trainer, precision=precision)


def _on_gpu(trainer: TrainerConfig) -> bool:
    return torch.cuda.is_available() and trainer.accelerator in ("auto", "gpu", "cuda")


def fit(
    task: Task, images: Splits, name: str, folder: Path, callbacks: Sequence[Callback] = ()
) -> dict[str, float]:
    """Train a task for its phase's epochs, from its last checkpoint if there is one.

    Args:
        task: what to train, as it starts when there is no checkpoint.
        images: the data.
        name: of this training, for logs ("pretrain", "round_03").
        folder: the run's; checkpoints go to ``checkpoints/NAME`` in it until `delete_checkpoints`,
            curves to ``logs/NAME``.
        callbacks: in addition to those that save and show.

    Returns:
        The metrics of the last epoch, and "seconds" spent over all attempts.
    """
    checkpoint = folder / "checkpoints" / name / LAST
    timer = Timer()
    save_last = SaveLast(checkpoint, task.config.checkpoint_steps)
    trainer = _trainer(
        task,
        _curves(name, folder, task.config.wandb),
        default_root_dir=str(folder),
        max_epochs=task.phase.epochs,
        plugins=[AtomicCheckpointIO()],
        check_val_every_n_epoch=validation_interval(task, images),
        callbacks=[save_last, timer, _progress(name), *callbacks],
    )
    train, val = _loaders(task, trainer, images)
    task.batches = len(train)
    logger.info("%s: %d epochs of %d steps", name, task.phase.epochs, len(train))
    if checkpoint.exists():
        logger.info("%s: resumes from %s", name, checkpoint)
    trainer.fit(task, train, val, ckpt_path=str(checkpoint) if checkpoint.exists() else None)
    _finish_curves(trainer)
    return _measured(task, timer.time_elapsed())


def iterations(config: TrainingConfig, phase: Phase, images: Splits) -> int:
    """The optimizer's steps in a training."""
    batches = len(TrainLoader(images.train, config.batch_size, seed=0))
    return phase.epochs * math.ceil(batches / config.trainer.accumulate_grad_batches)


def validation_interval(task: Task, images: Splits) -> int:
    """Epochs between two validations, the last of which is after the last epoch.

    They are so many that training sees at least as many images as validation: few-shot learning
    would spend hours on the latter. Looking up neighbours among all training images is for the end.
    """
    epochs, (train, val) = task.phase.epochs, (length(images.train), length(images.val))
    intervals = (n for n in range(1, epochs) if epochs % n == 0 and n * train >= val)
    return epochs if task.uses_bank else next(intervals, epochs)


def validate(task: Task, images: Splits, name: str, folder: Path) -> dict[str, float]:
    """The validation metrics of a task as it is, and "seconds"."""
    started = time.monotonic()
    callbacks = [StopOnSignal(), _progress(name)]
    trainer = _trainer(
        task,
        _curves(name, folder, task.config.wandb),
        default_root_dir=str(folder),
        callbacks=callbacks,
        enable_checkpointing=False,
    )
    _, val = _loaders(task, trainer, images)
    trainer.validate(task, val, verbose=False)
    _finish_curves(trainer)
    return _measured(task, time.monotonic() - started)


class Validator:
    """Validates a task again and again, in one process: its state may change between two calls.

    Args:
        task: the task.
        images: the data.
    """

    def __init__(self, task: Task, images: Splits) -> None:
        self.task = task
        self._trainer = _trainer(task, [], progress=False, enable_checkpointing=False)
        _, self._val = _loaders(task, self._trainer, images)

    def __call__(self) -> dict[str, float]:
        """The validation metrics of the task as it is."""
        self._trainer.validate(self.task, self._val, verbose=False)
        return dict(self.task.metrics)


def store(state: State, path: Path) -> None:
    """Write a state dict atomically. One process writes, and all wait until it is there."""
    write_state(state, path)
    barrier()


def is_main() -> bool:
    """Whether this is Lightning's first process, which writes; also before processes meet."""
    return bool(getattr(rank_zero_only, "rank", 0) == 0)


def locked(folder: Path) -> contextlib.AbstractContextManager[None]:
    """`output_folder`, whose lock Lightning's first process holds."""
    return output_folder(folder, main=is_main())


@rank_zero_only
def delete_checkpoints(name: str, folder: Path) -> None:
    """Delete the checkpoints of a training whose result is stored."""
    shutil.rmtree(folder / "checkpoints" / name, ignore_errors=True)
    with contextlib.suppress(OSError):  # another training's may be there
        (folder / "checkpoints").rmdir()


def _measured(task: Task, seconds: float) -> dict[str, float]:
    return {**dict(sorted(task.metrics.items())), "seconds": round(seconds, 2)}


def _progress(name: str) -> Callback:
    return TQDMProgressBar() if sys.stderr.isatty() else EpochLines(name)


def _trainer(
    task: Task, curves: Sequence[Logger], progress: bool = True, **arguments: Any
) -> pl.Trainer:
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    return pl.Trainer(
        logger=curves or False,
        enable_progress_bar=progress and sys.stderr.isatty(),
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # `TrainLoader` shares batches itself
        **vars(task.config.trainer),
        **arguments,
    )


def _curves(name: str, folder: Path, project: str | None) -> list[Logger]:
    known = importlib.util.find_spec("tensorboard") is not None
    kind = TensorBoardLogger if known else CSVLogger
    curves: list[Logger] = [kind(str(folder / "logs"), name=name, version="")]
    if project is not None:
        # The same run when the training is resumed.
        path = str(folder.resolve() / name)
        run: dict[str, Any] = {
            "id": hashlib.sha256(path.encode()).hexdigest()[:16],
            "resume": "allow",
        }
        run |= {"project": project, "group": folder.name, "name": f"{folder.name}/{name}"}
        curves.append(WandbLogger(save_dir=str(folder), **run))
    return curves


def _finish_curves(trainer: pl.Trainer) -> None:
    for curves in trainer.loggers:
        if isinstance(curves, WandbLogger):
            curves.experiment.finish()  # or the next training continues this run


def _loaders(
    task: Task, trainer: pl.Trainer, images: Splits
) -> tuple[TrainLoader, list[DataLoader]]:
    data, rank, world = task.config.data, trainer.global_rank, trainer.world_size
    batch_size = task.config.batch_size
    train = TrainLoader(images.train, batch_size, task.stream, rank, world, data.workers)

    def plain(dataset: Dataset) -> DataLoader:
        shared: Sampler[Any] | None = (
            DistributedSampler(dataset, world, rank, shuffle=False) if world > 1 else None
        )
        return DataLoader(
            dataset,
            batch_size // world,
            sampler=shared,
            num_workers=data.workers,
            pin_memory=torch.cuda.is_available(),
        )

    validated = [images.val]
    if task.uses_bank:
        assert images.bank is not None
        validated.insert(0, images.bank)
    return train, [plain(dataset) for dataset in validated]
