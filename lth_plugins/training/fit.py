"""One training of a task with Lightning, which goes on after a kill as if there had been none.

Lightning has the loop, the devices, AMP, DDP, checkpoints, loggers and progress bars. What stands
here is when to save, who writes where several processes train, and what a terminal or a log file
gets to see.
"""

import contextlib
import hashlib
import importlib.util
import logging
import shutil
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import Callback, Checkpoint, Timer, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from safetensors.torch import save as to_safetensors
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lth_plugins.pretrain.config import AUTO, FindConfig
from lth_plugins.pretrain.config import Trainer as TrainerConfig
from lth_plugins.resilience.atomic import open_atomically, write_atomically
from lth_plugins.resilience.lock import output_folder
from lth_plugins.resilience.ranks import barrier
from lth_plugins.resilience.sigterm import Sigterm, spare_workers
from lth_plugins.ticket import Ticket, TicketError
from lth_plugins.ticket.keys import State
from lth_plugins.training.folders import named_images
from lth_plugins.training.loader import Pictures, TrainLoader
from lth_plugins.training.module import Task

logger = logging.getLogger(__name__)

LAST = "last.ckpt"


def check_trainer(config: FindConfig) -> None:
    """Refuse what Lightning would only miss after a training has started.

    Raises:
        TicketError: if W&B is asked for and not installed, or BatchNorm over several CPUs, or
            Lightning cannot do what ``trainer`` says here.
    """
    if config.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise TicketError(
            f"wandb={config.wandb} asks for Weights & Biases, which is not installed: "
            "pip install wandb, or leave wandb out"
        )
    trainer = config.trainer
    if trainer.sync_batchnorm and not _on_gpu(trainer):
        raise TicketError(
            "trainer.sync_batchnorm=true needs GPUs, because PyTorch's SyncBatchNorm does: "
            "leave it out"
        )
    warnings.filterwarnings("ignore", ".*`srun` command is available.*")  # nobody need use it
    try:
        pl.Trainer(
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **vars(trainer),
        )
    except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
        raise TicketError(f"expected settings of Lightning in trainer, found: {error}") from None


def settled(trainer: TrainerConfig, folder: Path) -> TrainerConfig:
    """The settings with ``precision=auto`` replaced: a run keeps the one it was started with.

    Args:
        trainer: the settings.
        folder: of the run, whose ``config.yaml`` has that; need not be there.
    """
    if trainer.precision != AUTO:
        return trainer
    precision = "16-mixed" if _on_gpu(trainer) else "32-true"
    with contextlib.suppress(Exception):  # whether it can be read is for others to say
        stored = OmegaConf.select(OmegaConf.load(folder / "config.yaml"), "trainer.precision")
        precision = stored or precision
    logger.info("precision %s (trainer.precision=auto)", precision)
    return replace(trainer, precision=precision)


def _on_gpu(trainer: TrainerConfig) -> bool:
    return torch.cuda.is_available() and trainer.accelerator in ("auto", "gpu", "cuda")


def fit(
    task: Task, pictures: Pictures, name: str, folder: Path, callbacks: Sequence[Callback] = ()
) -> dict[str, float]:
    """Train a task for its phase's epochs, from its last checkpoint if there is one.

    Args:
        task: what to train, as it starts when there is no checkpoint.
        pictures: the data.
        name: of this training, for logs ("pretrain", "round_03").
        folder: the run's; checkpoints go to ``checkpoints/NAME`` in it until `forget`, curves to
            ``logs/NAME``.
        callbacks: more than those that save and show.

    Returns:
        The metrics of the last epoch, and "seconds" spent over all attempts.
    """
    checkpoint = folder / "checkpoints" / name / LAST
    timer = Timer()
    save_last = SaveLast(checkpoint, task.config.checkpoint_steps)
    trainer = _trainer(
        task,
        name,
        folder,
        max_epochs=task.phase.epochs,
        plugins=[WholeFiles()],
        # Neighbours are looked up among all training pictures: not after each epoch.
        check_val_every_n_epoch=task.phase.epochs if task.uses_bank else 1,
        callbacks=[save_last, timer, _progress(name), *callbacks],
    )
    train, val = _loaders(task, trainer, pictures)
    task.batches = len(train)
    logger.info("%s: %d epochs of %d steps", name, task.phase.epochs, len(train))
    if checkpoint.exists():
        logger.info("%s: resumes from %s", name, checkpoint)
    with named_images():
        trainer.fit(task, train, val, ckpt_path=str(checkpoint) if checkpoint.exists() else None)
    _finish_curves(trainer)
    return _measured(task, timer.time_elapsed())


def validate(task: Task, pictures: Pictures, name: str, folder: Path) -> dict[str, float]:
    """The validation metrics of a task as it is, and "seconds"."""
    started = time.monotonic()
    callbacks = [ObeySigterm(), _progress(name)]
    trainer = _trainer(task, name, folder, callbacks=callbacks, enable_checkpointing=False)
    _, val = _loaders(task, trainer, pictures)
    with named_images():
        trainer.validate(task, val, verbose=False)
    _finish_curves(trainer)
    return _measured(task, time.monotonic() - started)


def store(state: State, path: Path) -> None:
    """Write a state dict, all or nothing. One process writes, and all go on when it is there."""
    _write(state, path)
    barrier()


def agree(ticket: Ticket) -> None:
    """Check that all processes of a training have the same ticket.

    Raises:
        TicketError: in all of them, if they have not.
    """
    if not dist.is_initialized():
        return
    digests: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(digests, ticket.digest)
    if len(set(digests)) > 1:
        raise TicketError(
            f"the processes have different tickets of round {ticket.meta.round}, with the digests "
            f"{', '.join(digest[:12] for digest in digests)}: they must all see the same folder "
            "and the same files"
        )


def alone_in(folder: Path) -> contextlib.AbstractContextManager[None]:
    """`output_folder`, of which Lightning's first process holds the lock."""
    return output_folder(folder, main=rank_zero_only.rank == 0)


@rank_zero_only
def _write(state: State, path: Path) -> None:
    plain = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    write_atomically(path, to_safetensors(plain))


@rank_zero_only
def forget(name: str, folder: Path) -> None:
    """Remove the checkpoints of a training whose result is stored."""
    shutil.rmtree(folder / "checkpoints" / name, ignore_errors=True)
    with contextlib.suppress(OSError):  # another training's may be there
        (folder / "checkpoints").rmdir()


class ObeySigterm(Callback):
    """On SIGTERM or Ctrl-C, has a validation or a prediction end the program after a batch.

    All processes do so after the same batch. Lightning's own handler talks to the others wherever
    it finds a process, and they wait for each other for ever (Lightning 2.6; its issue 20806); this
    takes its place while there is something to do.
    """

    _sigterm: Sigterm | None = None

    def __init__(self) -> None:
        spare_workers(self)

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._begin()

    def on_validation_batch_end(self, *_: Any) -> None:
        self._end_if_told()

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:  # not in a training
            self._close()

    def on_predict_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._begin()

    def on_predict_batch_end(self, *_: Any) -> None:
        self._end_if_told()

    def on_predict_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._close()

    def on_exception(self, *_: Any) -> None:
        self._close()

    def _begin(self) -> None:
        if self._sigterm is None:
            self._sigterm = Sigterm()
            self._sigterm.in_step = True  # it is asked after every batch

    def _told(self) -> bool:
        return self._sigterm is not None and self._sigterm.heard_by_any()

    def _end_if_told(self, saved: Path | None = None) -> None:
        if self._told():
            assert self._sigterm is not None
            self._sigterm.stop(saved)

    def _close(self) -> None:
        if self._sigterm is not None:
            self._sigterm.close()
            self._sigterm = None


class SaveLast(ObeySigterm, Checkpoint):
    """Saves one checkpoint, overwritten: after each epoch, every so many steps, and on a stop.

    Not between the batches whose gradients are accumulated for a step: no checkpoint has those.

    Args:
        path: of the checkpoint.
        steps: between two checkpoints inside an epoch.
    """

    def __init__(self, path: Path, steps: int) -> None:
        super().__init__()
        self.path, self.steps = path, steps

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._begin()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        batches = trainer.accumulate_grad_batches
        # After the last batch the epoch is not over: validation and its checkpoint follow.
        if (index + 1) % batches or trainer.is_last_batch:
            return
        told = self._told()
        if told or (index + 1) % (self.steps * batches) == 0:
            trainer.save_checkpoint(self.path)
        if told:
            assert self._sigterm is not None
            self._sigterm.stop(self.path)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._end_if_told(self.path)  # after the last batch; all is saved
        self._close()

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.path)


class WholeFiles(TorchCheckpointIO):
    """Checkpoints that are there in whole or not at all.

    Lightning writes a temporary file in the system's folder for these and moves it, which is a
    copy, half of which a kill may leave, where that is another file system.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | PathLike[str], storage_options: Any = None
    ) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_atomically(path) as file:
            torch.save(checkpoint, file)


class SaveEarly(Callback):
    """Saves a task's whole state once, early in its training.

    Args:
        path: of the file.
        part: of all steps, after which to save; at least one step.
    """

    def __init__(self, path: Path, part: float) -> None:
        self.path, self.part = path, part

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        assert isinstance(module, Task)
        step = max(1, round(self.part * module.steps * module.phase.epochs))
        # Lightning calls those that save checkpoints last: what goes on after this step has it.
        # With accumulation several batches follow a step, and BatchNorm moves with each.
        if trainer.global_step == step and not self.path.exists():
            _write(module.state_dict(), self.path)


QUIET_SECONDS = 30.0
"""How long a training says nothing in a log file, if its steps take less."""


class EpochLines(Callback):
    """A line for each epoch and every half minute, where a progress bar would fill a log file."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.said = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if time.monotonic() - self.said >= QUIET_SECONDS:
            self._say(trainer, f"step {index + 1}/{trainer.num_training_batches}")

    def on_validation_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any, **__: Any
    ) -> None:
        if time.monotonic() - self.said >= QUIET_SECONDS:
            self._say(trainer, "validates")

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # Lightning calls this before the task has its training metrics; validation has been.
        values = {k: v for k, v in trainer.callback_metrics.items() if k.startswith("val_")}
        self._say(trainer, describe(values))

    def _say(self, trainer: pl.Trainer, what: str) -> None:
        self.said = time.monotonic()
        training = trainer.state.fn == TrainerFn.FITTING
        epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}" if training else ""
        logger.info("%s: %s", self.name, ", ".join(filter(None, [epoch, what])))


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
        logger=_curves(name, folder, task.config.wandb),
        enable_progress_bar=sys.stderr.isatty(),
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
        # The same run again when the training goes on.
        path = str(folder.resolve() / name)
        run = {"id": hashlib.sha256(path.encode()).hexdigest()[:16], "resume": "allow"}
        run |= {"project": project, "group": folder.name, "name": f"{folder.name}/{name}"}
        curves.append(WandbLogger(save_dir=str(folder), **run))
    return curves


def _finish_curves(trainer: pl.Trainer) -> None:
    for curves in trainer.loggers:
        if isinstance(curves, WandbLogger):
            curves.experiment.finish()  # or the next training goes on in this run


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
