"""Lightning callbacks of a training: when it saves, how it stops, and what a log file shows."""

import logging
import time
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_only
from safetensors.torch import save as to_safetensors

from lth_plugins import progress
from lth_plugins.progress import Pace
from lth_plugins.resilience.atomic import open_atomically, write_atomically
from lth_plugins.resilience.sigterm import Saved, Sigterm, spare_workers
from lth_plugins.ticket.keys import State
from lth_plugins.training.module import Task

logger = logging.getLogger(__name__)


class StopOnSignal(Callback):
    """Ends the program after a batch of a validation or a prediction, on SIGTERM or Ctrl-C.

    All processes end after the same batch. It replaces Lightning's own handler meanwhile, which
    talks to the other processes wherever it finds one, so that they wait for each other for ever
    (Lightning 2.6; its issue 20806).
    """

    _sigterm: Sigterm | None = None

    def __init__(self) -> None:
        spare_workers(self)

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._begin()

    def on_validation_batch_end(self, *_: Any) -> None:
        self._stop_if_asked()

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:  # not in a training
            self._close()

    def on_predict_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._begin()

    def on_predict_batch_end(self, *_: Any) -> None:
        self._stop_if_asked()

    def on_predict_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._close()

    def on_exception(self, *_: Any) -> None:
        self._close()

    def _begin(self) -> None:
        if self._sigterm is None:
            self._sigterm = Sigterm()

    def _stop_if_asked(self, save: Callable[[], Saved] = lambda: None) -> None:
        if self._sigterm is not None:
            self._sigterm.stop_if_asked(save)

    def _close(self) -> None:
        if self._sigterm is not None:
            self._sigterm.close()
            self._sigterm = None


class SaveLast(StopOnSignal, Checkpoint):
    """Saves one checkpoint, overwritten: after each epoch, every so many steps, and on a signal.

    It saves between steps only: no checkpoint holds the gradients that batches accumulate for one.

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

        def save() -> Path:
            trainer.save_checkpoint(self.path)
            return self.path

        if (index + 1) % (self.steps * batches) == 0:
            save()
        self._stop_if_asked(save)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._stop_if_asked(lambda: self.path)  # after the last batch; all is saved
        self._close()

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.path)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically.

    Lightning writes a temporary file in the system's folder for these and moves it. Across file
    systems a move is a copy, and a kill may leave half of it.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | PathLike[str], storage_options: Any = None
    ) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_atomically(path) as file:
            torch.save(checkpoint, file)


@rank_zero_only
def write_state(state: State, path: Path) -> None:
    """Write a state dict atomically, on the first process."""
    plain = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    write_atomically(path, to_safetensors(plain))


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
        # Lightning calls callbacks that save checkpoints last, so a run that resumes after this
        # step has the file. With accumulation several batches follow a step, and each moves
        # BatchNorm: the first of them counts.
        if trainer.global_step == step and not self.path.exists():
            write_state(module.state_dict(), self.path)


class EpochLines(Callback):
    """Logs a line per epoch and every few seconds, where a progress bar would fill a log file."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.said = time.monotonic()
        self.pace: Pace | None = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        batches, epochs = int(trainer.num_training_batches), trainer.max_epochs or 1
        made = trainer.current_epoch * batches + index + 1
        if self.pace is None:
            self.pace = Pace(made, epochs * batches)
        if time.monotonic() - self.said >= progress.QUIET_SECONDS:
            known = ("val_top1", "val_knn_top1")  # of the epoch before
            values = {k: v for k, v in trainer.callback_metrics.items() if k in known}
            self._say(trainer, ", ".join(filter(None, [self.pace.after(made), describe(values)])))

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any
    ) -> None:
        if time.monotonic() - self.said >= progress.QUIET_SECONDS:
            self._say(trainer, "validates")

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # Lightning calls this after the validation, and before the task has its training metrics.
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
