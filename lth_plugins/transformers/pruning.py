"""Gradual pruning in transformers' Trainer."""

from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from lth_plugins.pruning.search.gradual import PruningHook
from lth_plugins.resilience.as_text import from_text, to_text
from lth_plugins.transformers.callbacks import noted


class GradualPruningCallback(PruningHook, TrainerCallback, ExportableState):
    """Prune the ticket on a model while it trains, ever slower (Zhu & Gupta, arXiv 1710.01878).

    It starts from a ticket of any density, such as a dense one. ``trainer_state.json`` of each
    checkpoint holds the masks, and a resumed run restores them. `TicketCallback` writes the final
    ticket.

    Its arguments are those of `lth_plugins.pruning.search.gradual.PruningHook`.
    """

    _model: nn.Module | None = None

    def state(self) -> dict[str, Any]:
        args = {name: value for name, value in self.pruning.recipe.items() if name != "schedule"}
        model = self._model
        pruned = None if model is None else to_text(self.pruning.state_dict(model))
        return {"args": args, "attributes": {"pruned": pruned}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._model = given["model"]
        if text := noted(state, self, "pruned"):
            self.pruning.load_state_dict(given["model"], from_text(text))
        self.pruning.start(given["model"], state.max_steps)
        state.stateful_callbacks[type(self).__name__] = {}  # it is filled when it is saved

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.pruning.after_step(given["model"], state.global_step)
