"""Sparse training in transformers' Trainer."""

from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from lth_plugins.pruning.methods import SparseTraining
from lth_plugins.pruning.methods.training import GradualOptions
from lth_plugins.resilience.as_text import from_text, to_text
from lth_plugins.transformers.callbacks import noted


class SparseTrainingCallback(TrainerCallback, ExportableState):
    """Move the masks of the ticket on a model while it trains, by a method such as RigL.

    ``trainer_state.json`` of each checkpoint holds the masks, and a resumed run restores them.
    `TicketCallback` writes the final ticket.

    Its arguments are those of `lth_plugins.SparseTraining`.
    """

    _model: nn.Module | None = None

    def __init__(self, method: str, **options: Any) -> None:
        self.training = SparseTraining(method, **options)

    def state(self) -> dict[str, Any]:
        model = self._model
        pruned = None if model is None else to_text(self.training.state_dict(model))
        return {"args": self._args, "attributes": {"pruned": pruned}}

    @property
    def _args(self) -> dict[str, Any]:
        return {"method": self.training.method.name, **self.training.method.recipe}

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._model = given["model"]
        if text := noted(state, self, "pruned"):
            self.training.load_state_dict(given["model"], from_text(text))
        self.training.start(given["model"], state.max_steps)
        state.stateful_callbacks[type(self).__name__] = {}  # it is filled when it is saved

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.training.after_step(given["model"], state.global_step)


class GradualPruningCallback(GradualOptions, SparseTrainingCallback):
    """Prune the ticket on a model while it trains, ever slower (Zhu & Gupta, arXiv 1710.01878).

    A `SparseTrainingCallback` of the method "gradual". It starts from a ticket of any density, such
    as a dense one.
    """

    @property
    def _args(self) -> dict[str, Any]:
        return self.training.method.recipe
