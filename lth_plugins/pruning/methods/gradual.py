"""Gradual pruning: from dense to sparse inside one training (Zhu & Gupta, arXiv 1710.01878)."""

from dataclasses import dataclass
from typing import ClassVar

from lth_plugins.errors import ConfigError
from lth_plugins.pruning import Losses, Surgeon, prune, prune_and_update
from lth_plugins.pruning.criteria import CRITERIA, data_free
from lth_plugins.pruning.methods.method import Method, Snapshot, Update
from lth_plugins.pruning.search.schedule import CubicSchedule
from lth_plugins.pruning.search.settings import SearchSettings
from lth_plugins.pruning.selection import select
from lth_plugins.settings import check_settings, setting
from lth_plugins.ticket.locating import locate
from lth_plugins.ticket.masks import Masks


@dataclass(frozen=True)
class Gradual(Method):
    """Prunes ever slower, on a cubic schedule. Pruned weights do not come back.

    Attributes:
        target: the sparsity to end with, over all weights that the ticket may prune.
        begin, end, period: see `CubicSchedule`, in iterations.
        criterion: what the weights are ranked by; a name in `CRITERIA`.
        allocation: "global", "layer" or "erk", as ``scope`` of `lth_plugins.prune`. "layer" rounds
            in each layer, so that its target is met to half a weight a layer.
        loss: as of `lth_plugins.prune`, for criteria that need data; in Python alone. Those that
            update weights, such as "cap", move what stays each time.

    Raises:
        ConfigError: if a value is invalid.
    """

    name: ClassVar[str] = "gradual"
    relative: ClassVar[bool] = False

    target: float
    begin: int
    end: int
    period: int
    criterion: str = "magnitude"
    allocation: str = "global"
    loss: Losses | None = setting(None, recipe=False)

    def __post_init__(self) -> None:
        check_settings(SearchSettings(criterion=self.criterion, allocation=self.allocation))
        if self.loss is None:
            data_free(self.criterion)
        self.schedule  # noqa: B018  (checks the others)

    @property
    def schedule(self) -> CubicSchedule:
        """How sparse after how many iterations."""
        return CubicSchedule(self.target, self.begin, self.end, self.period)

    def start(self, now: Snapshot) -> Masks:
        if self.end > now.steps:
            raise ConfigError(
                f"expected pruning to end within the training's {now.steps} iterations, found end "
                f"{self.end}: the target would not be reached"
            )
        if self.target < now.initial:
            raise ConfigError(
                f"expected a target sparsity of the ticket's {now.initial:.4f} or more, found "
                f"{self.target}: pruned weights do not come back"
            )
        return now.masks

    def is_due(self, step: int, steps: float) -> bool:
        return self.schedule.is_due(step)

    def update(self, now: Snapshot) -> Update:
        masks = now.masks
        sparsity = self.schedule.sparsity(now.step, now.initial)
        surplus = masks.kept - (masks.numel - round(sparsity * masks.numel))
        if surplus <= 0:
            return Update(masks)
        fraction, criterion = surplus / masks.kept, CRITERIA[self.criterion]
        how = (fraction, masks, criterion, self.allocation, self.loss)
        if isinstance(criterion, Surgeon):
            masks, state = prune_and_update(now.model, *how)
            keys = locate(now.model).keys
            return Update(masks, {name: state[keys.get(name, name)].cpu() for name in masks})
        if self.loss is not None:
            return Update(prune(now.model, *how))
        scores = criterion(now.weights, None, None)
        return Update(select(scores, masks, fraction, self.allocation))
