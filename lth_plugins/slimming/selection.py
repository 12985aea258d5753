"""Selection: which channels go, so that the network meets a budget. Pure: scores in, channels out."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lth_plugins.errors import ConfigError
from lth_plugins.slimming.cost import Cost, macs_of
from lth_plugins.slimming.network import Kept, Network

Scores = Mapping[str, Tensor]
"""By group: float, [channels]; the lowest are removed first."""


@dataclass(frozen=True)
class Budget:
    """How much of its cost a network may keep.

    Attributes:
        share: of the cost of the whole network, in (0, 1).
        cost: what is counted.
        multiple: the channels that stay in a group are a multiple of this, as kernels compute
            blocks of channels; 1 for any number.
        least: the share of its channels that each group keeps at least.
    """

    share: float
    cost: Cost
    multiple: int = 8
    least: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(
                f"expected a share of the {self.cost.unit} in (0, 1), such as 0.5, found {self.share}"
            )


def select(network: Network, scores: Scores, kept: Kept, budget: Budget) -> dict[str, Tensor]:
    """Remove the channels of the lowest scores until a network meets its budget.

    All groups are ranked together. Channels that were removed before stay removed.

    Args:
        network: as `trace` returns it.
        scores: of every group, comparable between groups.
        kept: what is left so far.
        budget: what to meet.

    Returns:
        What is left: the most channels, for this ranking, that meet the budget.

    Raises:
        ConfigError: if the least that the groups keep costs more.
    """
    whole = budget.cost(network, network.all_kept())
    goal = budget.share * whole
    if budget.cost(network, kept) <= goal:
        return dict(kept)
    order = torch.cat([scores[name][kept[name]].flatten() for name in network.groups]).sort().values
    low, high = 0, len(order)  # the lowest `low` are too few to remove, the lowest `high` enough
    fewest = _above(network, scores, kept, float("inf"), budget)
    if budget.cost(network, fewest) > goal:
        raise _unreachable(network, fewest, budget, whole)
    while high - low > 1:
        middle = (low + high) // 2
        left = _above(network, scores, kept, float(order[middle]), budget)
        if budget.cost(network, left) <= goal:
            high = middle
        else:
            low = middle
    bound = float(order[high]) if high < len(order) else float("inf")
    return _above(network, scores, kept, bound, budget)


def _above(
    network: Network, scores: Scores, kept: Kept, bound: float, budget: Budget
) -> dict[str, Tensor]:
    """The channels of scores of at least a bound, rounded up to what a group keeps."""
    left = {}
    for name, group in network.groups.items():
        present = int(kept[name].sum())
        wanted = int((kept[name] & (scores[name] >= bound)).sum())
        least = max(1, round(budget.least * group.channels))
        count = -(-max(wanted, least) // budget.multiple) * budget.multiple
        ranked = scores[name].masked_fill(~kept[name], -torch.inf)
        best = ranked.argsort(descending=True, stable=True)[: min(count, present)]
        left[name] = torch.zeros(group.channels, dtype=torch.bool)
        left[name][best] = True
    return left


def _unreachable(network: Network, fewest: Kept, budget: Budget, whole: float) -> ConfigError:
    held = {
        name: macs
        for name, macs in sorted(macs_of(network, fewest).items(), key=lambda item: -item[1])
    }
    total = sum(held.values()) or 1.0
    most = ", ".join(f"{name} ({100 * macs / total:.0f} %)" for name, macs in list(held.items())[:3])
    least = budget.cost(network, fewest) / whole
    return ConfigError(
        f"expected a budget that can be reached, found {budget.share:g} of the {budget.cost.unit}: "
        f"at the least {least:.3f} is left, most of it in {most}. Ask for more, or keep fewer "
        "modules"
    )
