"""Gradual pruning: from dense to sparse inside one training. What the hosts' hooks share."""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from lth_plugins.errors import ConfigError, TicketError
from lth_plugins.masking.attachment import Attachment, attached
from lth_plugins.pruning import CRITERIA, Losses, Surgeon, prune, prune_and_update
from lth_plugins.pruning.criteria import data_free
from lth_plugins.pruning.search.schedule import CubicSchedule
from lth_plugins.pruning.search.settings import SearchSettings
from lth_plugins.resilience.ranks import from_main, is_main
from lth_plugins.settings import check_settings
from lth_plugins.ticket.locating import locate
from lth_plugins.ticket.masks import Masks, packed, unpacked

logger = logging.getLogger(__name__)


class GradualPruning:
    """Prunes the ticket on a model while a trainer trains it.

    The masks are part of its state: after a run was resumed, they are those of the checkpoint.

    Args:
        target: the sparsity to end with, over all weights that the ticket may prune.
        begin, end, period: see `CubicSchedule`, in iterations.
        criterion: what the weights are ranked by; a name in `CRITERIA`.
        allocation: "global", "layer" or "erk", as ``scope`` of `lth_plugins.prune`. "layer" rounds
            in each layer, so that its target is met to half a weight a layer.
        loss: as of `lth_plugins.prune`, for criteria that need data. Those that update weights,
            such as "cap", move what stays each time.

    Raises:
        ConfigError: if a value is invalid.
    """

    def __init__(
        self,
        target: float,
        begin: int,
        end: int,
        period: int,
        criterion: str = "magnitude",
        allocation: str = "global",
        loss: Losses | None = None,
    ) -> None:
        self.schedule = CubicSchedule(target, begin, end, period)
        check_settings(SearchSettings(criterion=criterion, allocation=allocation))
        if loss is None:
            data_free(criterion)
        self.criterion, self.allocation, self.loss = criterion, allocation, loss
        self._initial: float | None = None

    @property
    def recipe(self) -> dict[str, Any]:
        """What the final masks depend on."""
        chosen = {"criterion": self.criterion, "allocation": self.allocation}
        return {"schedule": "cubic", **asdict(self.schedule), **chosen}

    def start(self, model: nn.Module, iterations: float) -> None:
        """Check that the schedule fits a training of so many iterations; before its first step.

        Raises:
            ConfigError: if it ends later, or the ticket is sparser than the target.
        """
        if self.schedule.end > iterations:
            raise ConfigError(
                f"expected pruning to end within the training's {iterations} iterations, found end "
                f"{self.schedule.end}: the target would not be reached"
            )
        if self._initial is None:
            self._initial = _handle(model).all_masks.sparsity
        if self.schedule.target < self._initial:
            raise ConfigError(
                f"expected a target sparsity of the ticket's {self._initial:.4f} or more, found "
                f"{self.schedule.target}: pruned weights do not come back"
            )

    def after_step(self, model: nn.Module, step: int) -> None:
        """Prune if that is due after so many iterations. Call it before anything is saved."""
        if not self.schedule.is_due(step):
            return
        assert self._initial is not None, "start comes first"
        handle = _handle(model)
        masks = handle.all_masks
        sparsity = self.schedule.sparsity(step, self._initial)
        surplus = masks.kept - (masks.numel - round(sparsity * masks.numel))
        moved: dict[str, Tensor] = {}
        if surplus > 0 and is_main():
            how = (surplus / masks.kept, masks, self.criterion, self.allocation, self.loss)
            if isinstance(CRITERIA[self.criterion], Surgeon):
                masks, state = prune_and_update(model, *how)
                keys = locate(model).keys
                moved = {key: state[key].cpu() for key in (keys.get(n, n) for n in masks)}
            else:
                masks = prune(model, *how)
        # Replicas may differ by a rounding, and must not come to differ by a mask.
        masks, moved = from_main((masks, moved))
        handle.narrow(masks, gradual=self.recipe)
        with torch.no_grad():
            for key, value in moved.items():
                model.get_parameter(key).copy_(value)
        logger.info("Pruned to %.2f %% after %d iterations", 100 * handle.all_masks.density, step)

    def state_dict(self, model: nn.Module) -> dict[str, Any]:
        """What a checkpoint must hold; tensors and plain containers only."""
        masks = _handle(model).all_masks
        bits = {name: packed(mask) for name, mask in masks.items()}
        return {"recipe": self.recipe, "initial": self._initial, "masks": bits}

    def load_state_dict(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Take up a checkpoint's masks.

        Raises:
            TicketError: if it was saved in a training with another schedule, or on another ticket.
        """
        if state["recipe"] != self.recipe:
            raise TicketError(
                f"the checkpoint was pruned by {state['recipe']}, now asked for is {self.recipe}: "
                "resume with the same, or start anew"
            )
        handle = _handle(model)
        shapes = {name: mask.shape for name, mask in handle.all_masks.items()}
        if state["masks"].keys() != shapes.keys():
            raise TicketError(
                "the checkpoint was pruned on another ticket: "
                f"{min(state['masks'].keys() ^ shapes.keys())} is masked in one of the two only. "
                "Resume with the ticket, and the modules, that it was started with"
            )
        masks = {name: unpacked(bits, shapes[name]) for name, bits in state["masks"].items()}
        handle.narrow(Masks(masks), gradual=self.recipe)
        self._initial = state["initial"]


class PruningHook:
    """What a host's hook of gradual pruning is made of, whatever the host calls when.

    Args:
        target, begin, end, period, criterion, allocation: as `GradualPruning`'s.

    Raises:
        ConfigError: if a value is invalid; before training, if the schedule does not fit it.
    """

    def __init__(
        self,
        target: float,
        begin: int,
        end: int,
        period: int,
        criterion: str = "magnitude",
        allocation: str = "global",
    ) -> None:
        self.pruning = GradualPruning(target, begin, end, period, criterion, allocation)


def _handle(model: nn.Module) -> Attachment:
    handle = attached(model)
    if handle is None:
        raise TicketError("gradual pruning found no ticket on the model: start from a dense one")
    return handle
