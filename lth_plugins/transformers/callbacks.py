"""Callbacks for transformers' Trainer. A masked model needs none of them to stay masked."""

import logging
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from lth_plugins.masking.attachment import Attachment
from lth_plugins.masking.hosting import (
    can_be_written,
    describe,
    require_ticket,
    verify_everywhere,
)
from lth_plugins.masking.loading import check_trained_with, trained_with
from lth_plugins.resilience.sigterm import Sigterm, spare_workers
from lth_plugins.ticket import Ticket

logger = logging.getLogger(__name__)


class TicketCallback(TrainerCallback, ExportableState):
    """Watch over the ticket of a model, and write the fine-tuned ticket when training ends.

    - Before training it verifies that all of the ticket is attached, and logs its density.
    - Before a checkpoint is written, all processes verify that every pruned weight is zero. A leak
      stops the run with the parameter's name, and the older checkpoints stay.
    - ``trainer_state.json`` notes which masks a checkpoint was trained with. A run is not resumed
      with another ticket.
    - After training it writes the final masks and weights to ``final.ticket`` in the output folder,
      where ``trainer.save_model()`` puts the model.

    Args:
        source: what ``final.ticket`` names as its source; the class of the model by default.
    """

    def __init__(self, source: str | None = None) -> None:
        self.source = source
        self._model: nn.Module | None = None

    def state(self) -> dict[str, Any]:
        masks = [] if self._model is None else trained_with(self._model)
        return {"args": {"source": self.source}, "attributes": {"masks": masks}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._model = given["model"]
        handle = attachment_of(given["model"])
        handle.verify()
        self._writes = can_be_written(handle)
        if self._writes:
            self._ticket(handle)  # what cannot be written at the end is refused now
        if masks := noted(state, self, "masks"):
            check_trained_with(given["model"], masks)
        state.stateful_callbacks[type(self).__name__] = self.state()
        logger.info(describe(handle))

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if control.should_save or control.should_evaluate:
            verify_everywhere(attachment_of(given["model"]))

    on_epoch_end = on_step_end

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        handle = attachment_of(given["model"])
        verify_everywhere(handle)
        if self._writes and state.is_world_process_zero:
            path = self._ticket(handle).save(Path(args.output_dir, "final.ticket"))
            logger.info("Wrote the fine-tuned ticket to %s", path)

    def _ticket(self, handle: Attachment) -> Ticket:
        return handle.ticket(source=self.source or type(self._model).__name__)


class StopCallback(TrainerCallback):
    """On SIGTERM or Ctrl-C end the step, save a checkpoint, and exit with code 143 or 130.

    For scripts that are preempted: started again with ``--resume_from_checkpoint`` they resume
    there. An evaluation that is due after the step is done first. Put it before `TicketCallback`.
    """

    def __init__(self) -> None:
        self._sigterm: Sigterm | None = None
        spare_workers(self)  # accelerate may start them before it calls a callback

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._sigterm = Sigterm()

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self._sigterm is not None and self._sigterm.asked():
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self._sigterm is not None:
            self._sigterm.stop_if_asked(lambda: last_checkpoint(args.output_dir))

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self._sigterm is not None:
            self._sigterm.close()


def attachment_of(model: nn.Module) -> Attachment:
    """The ticket on a model that is to be trained.

    Raises:
        TicketError: if there is none.
    """
    return require_ticket(
        model,
        "expected a ticket on the model, found none: call lt.attach_ticket(model, image_processor, "
        "ticket) before the Trainer is made, or in its model_init",
    )


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, in which the Trainer writes its own state last."""
    found = (path.parent for path in Path(folder).glob("checkpoint-*/trainer_state.json"))
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def noted(state: Any, callback: TrainerCallback, attribute: str) -> Any:
    """What the checkpoint that a training resumes from notes of a callback; None where nothing."""
    entry = state.stateful_callbacks.get(type(callback).__name__) if state.global_step else None
    entry = entry[0] if isinstance(entry, list) else entry
    return (entry or {}).get("attributes", {}).get(attribute)
