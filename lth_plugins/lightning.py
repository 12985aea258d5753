"""Tickets in Lightning: callbacks that watch over a ticket on a user's own `LightningModule`.

Attach the ticket to the module, or to a part of it, in its ``__init__``; the trainer and the module
stay as they are.
"""

import logging
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any

if find_spec("pytorch_lightning") is None:
    raise ModuleNotFoundError(
        "lth_plugins.lightning needs pytorch_lightning: pip install 'pytorch-lightning>=2.6'",
        name="pytorch_lightning",
    )

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.trainer.states import TrainerFn

from lth_plugins.errors import ConfigError, RunError, TicketError
from lth_plugins.masking.attachment import Attachment, attached
from lth_plugins.masking.hosting import (
    describe,
    require_ticket,
    verify_everywhere,
    warn_if_untested,
)
from lth_plugins.masking.loading import is_watched, watch_loading
from lth_plugins.masking.record import roots_in
from lth_plugins.slimming.gradual import SlimmingHook
from lth_plugins.slimming.options import check_alone
from lth_plugins.slimming.tracing import Forward
from lth_plugins.training.sparse import (
    GradualPruningCallback,
    SparseTrainingCallback,
    check_no_averages,
)

__all__ = [
    "GradualPruningCallback",
    "SlimmingCallback",
    "SparseTrainingCallback",
    "TicketCallback",
]

warn_if_untested("pytorch-lightning", "2.6", "2.6")

logger = logging.getLogger(__name__)


class TicketCallback(Callback):
    """Watch over the ticket of a module, and write the fine-tuned ticket when training ends.

    - Before training it verifies that all of the ticket is attached, and logs its density.
    - A checkpoint of another ticket's run is refused, before any of it is loaded.
    - Before any checkpoint is written, all processes verify that every pruned weight is zero. A
      leak stops the run, naming the parameter, and the older checkpoints stay.
    - After a complete training the first process writes the final masks and weights.

    Args:
        path: where to write the fine-tuned ticket; by default ``final.ticket`` in the trainer's
            ``default_root_dir``.
        allow_other_checkpoint: load checkpoints of other tickets, too, with a warning.
        meta: fields of `TicketMeta` to set in it, such as ``source="voc"``.
    """

    def __init__(
        self,
        path: str | PathLike[str] | None = None,
        allow_other_checkpoint: bool = False,
        **meta: Any,
    ) -> None:
        self._path, self._allow, self._meta = path, allow_other_checkpoint, meta

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for root in roots_in(pl_module):
            if not is_watched(root):  # a plug-in that built it knows its input, too
                watch_loading(root, allow_other_checkpoint=self._allow)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        handle = _handle(pl_module)
        handle.ticket(**self._meta)  # what cannot be written at the end is refused now
        if self._path is not None and Path(self._path).is_dir():
            raise RunError(
                f"expected the path of a file for the fine-tuned ticket, found the folder "
                f"{self._path}: write TicketCallback('{Path(self._path, 'final.ticket')}')"
            )
        logger.info(describe(handle))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        verify_everywhere(_handle(pl_module))

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # A module that attaches its ticket in configure_model loads before it is watched.
        unwatched = any(not is_watched(root) for root in roots_in(pl_module))
        handle = attached(pl_module)
        zeroed = 0 if handle is None else handle.zeroed_by_load
        if zeroed and unwatched and not self._allow:
            raise TicketError(
                "expected a checkpoint that was trained with this ticket, found one of which its "
                f"masks zero {zeroed:,} weights: name the ticket that it was trained with, or "
                "write TicketCallback(allow_other_checkpoint=True)"
            )

    def on_train_end(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        handle = _handle(pl_module)
        verify_everywhere(handle)
        if trainer.is_global_zero and not trainer.fast_dev_run:
            path = Path(self._path or Path(trainer.default_root_dir, "final.ticket"))
            path.parent.mkdir(parents=True, exist_ok=True)
            logger.info("Wrote the fine-tuned ticket to %s", handle.ticket(**self._meta).save(path))


class SlimmingCallback(SlimmingHook, Callback):
    """Remove channels of the whole module while it trains, until its budget is met.

    After training the first process writes the narrower module's state dict to ``slim.pth``, and
    its ticket, in the widths of its trunk, to ``slim.ticket``. Checkpoints hold which channels are
    left, and a resumed run restores them. Iterations are the trainer's ``global_step``. Not
    together with Lightning's ``WeightAveraging``, nor with several optimizers.

    Args:
        forward: runs the module on an example on its device, such as
            ``lambda module: module.net(images.to(module.device))``; of the size that FLOPs and
            latency are for.
        folder: where to write; by default the trainer's ``default_root_dir``.
        settings: as `lth_plugins.slimming.gradual.SlimmingHook`'s, such as ``flops=0.5``.
    """

    def __init__(
        self,
        forward: Forward,
        folder: str | PathLike[str] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self._forward, self._folder = forward, folder
        self._stored: dict[str, Any] | None = None

    def on_train_start(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        check_no_averages(self, trainer)
        moves = (c for c in trainer.callbacks if isinstance(c, SparseTrainingCallback))
        check_alone(next((type(callback).__name__ for callback in moves), None))
        if len(trainer.optimizers) != 1:
            raise ConfigError(
                "expected a module with one optimizer for SlimmingCallback, found "
                f"{len(trainer.optimizers)}: use lth.slim before the training"
            )
        steps = trainer.global_step, trainer.estimated_stepping_batches
        self.end_within(steps[1])
        if self._stored is not None:
            self.slimming.load_state_dict(self._stored)
        self.slimming.start(pl_module, trainer.optimizers[0], self._forward, *steps)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        if trainer.global_step != self.slimming.done:  # as in SparseTrainingCallback
            self.slimming.after_step(pl_module, trainer.global_step)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["slimming"] = self.slimming.state_dict()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == TrainerFn.FITTING and "slimming" in checkpoint:
            self._stored = checkpoint["slimming"]  # taken up once the schedule is known

    def on_train_end(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:
            folder = Path(self._folder or trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self.slimming.write(pl_module, folder)


def _handle(module: pl.LightningModule) -> Attachment:
    return require_ticket(
        module,
        "expected a ticket on the module, found none: write lth_plugins.attach(self.model, "
        "lth_plugins.Ticket.load(…)) in its __init__",
    )
