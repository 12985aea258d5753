"""Callbacks that prune, or slim, while transformers' Trainer trains."""

import base64
import io
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from lth_plugins.pruning.search.gradual import PruningHook
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


def to_text(state: Mapping[str, Any]) -> str:
    """Tensors and plain containers as text, for ``trainer_state.json``."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return base64.b64encode(zlib.compress(buffer.getvalue())).decode()


def from_text(text: str) -> dict[str, Any]:
    """The inverse of `to_text`; runs no code of the file."""
    content = zlib.decompress(base64.b64decode(text))
    loaded: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True)
    return loaded
