"""Hooks for detectron2's trainers. A model with a ticket needs none of them to stay masked."""

import logging
from os import PathLike
from pathlib import Path
from typing import Any

from detectron2.engine import HookBase
from detectron2.engine.hooks import PeriodicCheckpointer
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lth_plugins.masking.attachment import Attachment
from lth_plugins.masking.hosting import (
    can_be_written,
    describe,
    require_ticket,
    verify_everywhere,
)
from lth_plugins.progress import Ticker
from lth_plugins.pruning.methods import SparseTraining
from lth_plugins.pruning.methods.training import GradualOptions, check_alone
from lth_plugins.ticket import TicketError

logger = logging.getLogger(__name__)


class TicketHook(HookBase):
    """Watch over the ticket of a model, and write the fine-tuned ticket when training ends.

    - Before training it verifies that all of the ticket is attached, and logs its density.
    - Before any checkpoint of the trainer is written, it verifies that every
      pruned weight is zero. A leak stops the run, naming the parameter, and the older checkpoints
      stay.
    - Every ``period`` iterations and after the last one all processes verify, not only the one
      that saves, and ``ticket_density`` is logged.
    - After a complete training the main process writes the final masks and weights to ``path``.

    It must come before ``PeriodicCheckpointer``, so that a leak stops all processes at once: put it
    first in ``build_hooks``::

        def build_hooks(self):
            hook = TicketHook(self.cfg.SOLVER.CHECKPOINT_PERIOD, "output/final.ticket")
            return [hook, *super().build_hooks()]

    Args:
        period: the checkpointer's, in iterations.
        path: where to write the fine-tuned ticket; None does not.
        meta: fields of `TicketMeta` to set in it, such as ``source="voc"``.
    """

    def __init__(self, period: int, path: str | PathLike[str] | None = None, **meta: Any) -> None:
        self._period, self._path, self._meta = period, path, meta

    def before_train(self) -> None:
        check_order(self, "lets one process alone see a leak, while it saves")
        handle = attachment_of(self.trainer.model)
        handle.verify()
        if self._path is not None and not can_be_written(handle):
            self._path = None
        logger.info(describe(handle))

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self._period == 0 or done >= self.trainer.max_iter:
            handle = attachment_of(self.trainer.model)
            verify_everywhere(handle)
            density = handle.masks.density
            self.trainer.storage.put_scalar("ticket_density", density, smoothing_hint=False)

    def state_dict(self) -> dict[str, Any]:
        """Nothing; but a checkpointer asks all hooks for their state before it opens the file."""
        attachment_of(self.trainer.model).verify()
        return {}

    def after_train(self) -> None:
        # It is also called after an exception; iter is max_iter only if there was none.
        complete = self.trainer.iter >= self.trainer.max_iter
        if complete and self._path is not None and comm.is_main_process():
            ticket = attachment_of(self.trainer.model).ticket(**self._meta)
            logger.info("Wrote the fine-tuned ticket to %s", ticket.save(Path(self._path)))


class ProgressHook(HookBase):
    """Logs what a training is about to do, and every few seconds how far it is.

    detectron2 says how far every 20 iterations.

    Args:
        intends: what the first line is.
    """

    def __init__(self, intends: str) -> None:
        self._intends = intends

    def before_train(self) -> None:
        logger.info(self._intends)
        self._ticker = Ticker(logger.info, self.trainer.start_iter, self.trainer.max_iter)

    def after_step(self) -> None:
        self._ticker.after(self.trainer.iter + 1)


def attachment_of(model: nn.Module) -> Attachment:
    """The ticket on a model that is to be trained.

    Raises:
        TicketError: if there is none.
    """
    return require_ticket(
        model,
        "expected a ticket on the model, found none, so that MODEL.TICKET would do nothing: "
        "set MODEL.BACKBONE.NAME to one of the build_ticket_… backbones. A builder of your own "
        "calls lth_plugins.detectron2.build_ticket_resnet_backbone where it calls detectron2's "
        "build_resnet_backbone; a LazyConfig wraps the model in with_ticket",
    )


class SparseTrainingHook(HookBase):
    """Move the masks of the ticket on the model while it trains, by a method such as RigL.

    It must come before ``PeriodicCheckpointer``. Checkpoints hold the masks, and a resumed run
    restores them. `TicketHook` writes the ticket it ends with::

        def build_hooks(self):
            sparse = SparseTrainingHook("rigl", sparsity=0.9, delta_t=100)
            return [TicketHook(5000, "output/final.ticket"), sparse, *super().build_hooks()]

    Its arguments are those of `lth_plugins.SparseTraining`.
    """

    def __init__(self, method: str, **options: Any) -> None:
        self.training = SparseTraining(method, **options)

    def before_train(self) -> None:
        check_order(self, "moves masks after they are saved")
        hooks = self.trainer._hooks
        check_alone("SparseTrainingHook", sum(isinstance(h, SparseTrainingHook) for h in hooks))
        self.training.start(model_of(self), self.trainer.max_iter)

    def after_step(self) -> None:
        self.training.after_step(model_of(self), self.trainer.iter + 1)

    def state_dict(self) -> dict[str, Any]:
        return self.training.state_dict(model_of(self))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.training.load_state_dict(model_of(self), state_dict)


class GradualPruningHook(GradualOptions, SparseTrainingHook):
    """Prune the ticket on the model while it trains, ever slower (Zhu & Gupta, arXiv 1710.01878).

    A `SparseTrainingHook` of the method "gradual". It starts from a ticket of any density, such as
    a dense one::

        def build_hooks(self):
            pruning = GradualPruningHook(target=0.9, begin=1000, end=60000, period=500)
            return [TicketHook(5000, "output/final.ticket"), pruning, *super().build_hooks()]
    """


def model_of(hook: HookBase) -> Any:
    """The model that a hook's trainer trains, without the wrapper of distributed training."""
    model = hook.trainer.model
    return model.module if isinstance(model, DistributedDataParallel) else model


def check_order(hook: HookBase, otherwise: str) -> None:
    """Check that a hook comes before the one that saves, which otherwise does what is said.

    Raises:
        TicketError: if it does not.
    """
    # A trainer does not offer the order of its hooks otherwise.
    for other in hook.trainer._hooks:
        if other is hook:
            break
        if isinstance(other, PeriodicCheckpointer):
            raise TicketError(
                f"expected {type(hook).__name__} before PeriodicCheckpointer, found it after: put "
                f"it first in build_hooks, or it {otherwise}"
            )
