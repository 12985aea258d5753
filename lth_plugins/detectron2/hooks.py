"""Hooks for detectron2's trainers. A model with a ticket needs none of them to stay masked."""

import logging
from os import PathLike
from pathlib import Path
from typing import Any

from detectron2.engine import HookBase
from detectron2.engine.hooks import PeriodicCheckpointer
from detectron2.utils import comm

from lth_plugins.attach import Attachment, attached
from lth_plugins.ticket import TicketError

logger = logging.getLogger(__name__)


class TicketHook(HookBase):
    """Watch over the ticket of a model, and write the fine-tuned ticket when training ends.

    - Before training it logs the ticket's density.
    - Every ``period`` iterations and after the last one it verifies that every pruned weight is
      zero. A leak stops the run, naming the parameter, and the older checkpoints stay.
    - After a training that came to its end, the main process writes the masks and the weights
      the model has then to ``path``.

    It must come before ``PeriodicCheckpointer``, so that nothing leaked is ever saved, and says so
    if it does not: put it first in ``build_hooks``::

        def build_hooks(self):
            hook = TicketHook(self.cfg.SOLVER.CHECKPOINT_PERIOD, "output/final.ticket")
            return [hook, *super().build_hooks()]

    Args:
        period: the checkpointer's, in iterations.
        path: where to write the fine-tuned ticket; None does not.
        meta: fields of `TicketMeta` to set in it, such as ``source="voc"``.
    """

    def __init__(self, period: int, path: str | PathLike[str] | None = None, **meta: Any) -> None:
        self._period = period
        self._path = path
        self._meta = meta

    def before_train(self) -> None:
        # A trainer does not offer the order of its hooks otherwise.
        for hook in self.trainer._hooks:
            if hook is self:
                break
            if isinstance(hook, PeriodicCheckpointer):
                raise TicketError(
                    "expected TicketHook before PeriodicCheckpointer, found it after: put it "
                    "first in build_hooks, or it sees a leak only once that is saved"
                )
        masks = self._attachment().masks
        logger.info(
            "Ticket: %s of %s prunable weights, density %.2f %%",
            *(f"{masks.kept:,}", f"{masks.numel:,}", 100 * masks.density),
        )

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self._period == 0 or done >= self.trainer.max_iter:
            attachment = self._attachment()
            attachment.verify()
            self.trainer.storage.put_scalar(
                "ticket_density", attachment.masks.density, smoothing_hint=False
            )

    def after_train(self) -> None:
        # It is also called after an exception; iter is max_iter only if there was none.
        if self.trainer.iter < self.trainer.max_iter or self._path is None:
            return
        if comm.is_main_process():
            path = self._attachment().ticket(**self._meta).save(Path(self._path))
            logger.info("Wrote the fine-tuned ticket to %s", path)

    def _attachment(self) -> Attachment:
        attachment = attached(self.trainer.model)
        if attachment is None:
            raise TicketError(
                "expected a ticket on the model, found none: set MODEL.BACKBONE.NAME to one of "
                "the build_ticket_… backbones, or wrap the model in with_ticket"
            )
        return attachment
