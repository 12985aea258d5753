"""Early-bird tickets: a round's training stops once the mask it will be pruned to is found.

You et al., "Drawing Early-Bird Tickets" (arXiv 1909.11957), section 3: after each epoch draw the
mask, and stop when it has hardly changed over the last five epochs.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from lth_plugins.pretrain.config import EARLY_BIRD_MEMORY
from lth_plugins.ticket import Masks
from lth_plugins.ticket.keys import State
from lth_plugins.ticket.masks import packed, unpacked
from lth_plugins.training.module import Task

NEAR = 0.1
"""The Hamming distance below which a mask is as good as found."""


class EarlyBird(Callback):
    """Stops a training when pruning after any of the last epochs would give nearly the same mask.

    The Hamming distance is the fraction that differs of the entries that can: those of the weights
    that are trained. (Over all weights it would be below any bound in a sparse ticket.)

    Args:
        masks: those of the ticket in training.
        draw: the masks that pruning a trunk's state dict gives.

    Attributes:
        epochs: that were trained so far.
        distances: of the present mask to those of the last epochs, the oldest first.
    """

    def __init__(self, masks: Masks, draw: Callable[[State], Masks]) -> None:
        self.masks, self.draw = masks, draw
        self.epochs = 0
        self.distances: list[float] = []
        self._last: deque[Tensor] = deque(maxlen=EARLY_BIRD_MEMORY)

    @property
    def found(self) -> bool:
        """Whether the mask is within the bound of all that are remembered."""
        return len(self.distances) == EARLY_BIRD_MEMORY and max(self.distances) < NEAR

    def see(self, state: State) -> None:
        """Draw the mask of the trunk as it is after one more epoch."""
        drawn = self.draw(state)
        mask = torch.cat([drawn[name][mask] for name, mask in self.masks.items()])
        self.distances = [float((mask != last).float().mean()) for last in self._last]
        self._last.append(mask)
        self.epochs += 1

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        trainer.should_stop = self.found  # killed between the last checkpoint and the end

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, Task)
        self.see(module.trunk.state_dict())
        trainer.should_stop = self.found

    def state_dict(self) -> dict[str, Any]:
        bits = [packed(mask) for mask in self._last]
        return {"epochs": self.epochs, "distances": self.distances, "last": bits}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epochs, self.distances = state["epochs"], list(state["distances"])
        masks = (unpacked(bits, (self.masks.kept,)) for bits in state["last"])
        self._last = deque(masks, maxlen=EARLY_BIRD_MEMORY)
