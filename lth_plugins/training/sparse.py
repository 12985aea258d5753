"""Sparse training with Lightning: a method of `lth_plugins.pruning.methods` as a callback."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, WeightAveraging
from pytorch_lightning.trainer.states import TrainerFn

from lth_plugins.errors import ConfigError
from lth_plugins.masking.loading import is_watched, watch_loading
from lth_plugins.masking.record import roots_in
from lth_plugins.pruning.methods import SparseTraining
from lth_plugins.pruning.methods.training import GradualOptions, check_alone

_STATE = "ticket_pruning"  # in a checkpoint


class SparseTrainingCallback(Callback):
    """Move the masks of a module's ticket while it trains, by a method such as RigL.

    Checkpoints hold the masks, and a resumed run restores them. `TicketCallback` writes the ticket
    that it ends with. Iterations are the trainer's ``global_step``. Not together with Lightning's
    ``WeightAveraging``, whose averages remember what was pruned.

    Its arguments are those of `lth_plugins.SparseTraining`.
    """

    def __init__(self, method: str, **options: Any) -> None:
        self.training = SparseTraining(method, **options)
        self._seen = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for root in roots_in(pl_module):
            if not is_watched(root):  # a checkpoint is loaded before its masks are
                watch_loading(root)

    def on_train_start(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        check_no_averages(self, trainer)
        found = [one for one in trainer.callbacks if isinstance(one, SparseTrainingCallback)]
        check_alone("SparseTrainingCallback", len(found))
        # Not earlier: it sets up the loader, which must have read its checkpoint by then.
        self.training.start(pl_module, trainer.estimated_stepping_batches)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        step = trainer.global_step
        if step != self._seen:  # several batches make a step where gradients accumulate
            self._seen = step
            self.training.after_step(pl_module, step)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[_STATE] = self.training.state_dict(pl_module)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == TrainerFn.FITTING and _STATE in checkpoint:
            self._seen = checkpoint["global_step"]
            self.training.load_state_dict(pl_module, checkpoint[_STATE])


def check_no_averages(callback: Callback, trainer: Any) -> None:
    """Refuse averages of weights beside a callback that removes some of them.

    Raises:
        ConfigError: if there are.
    """
    if any(isinstance(other, WeightAveraging) for other in trainer.callbacks):
        raise ConfigError(
            f"expected {type(callback).__name__} without WeightAveraging, found both: averages of "
            "the weights remember what was removed. Leave out WeightAveraging"
        )


class GradualPruningCallback(GradualOptions, SparseTrainingCallback):
    """Prune the ticket on a module while it trains, ever slower (Zhu & Gupta, arXiv 1710.01878).

    A `SparseTrainingCallback` of the method "gradual". It starts from a ticket of any density, such
    as a dense one.
    """
