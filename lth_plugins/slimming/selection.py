"""Selection: which channels go, so that a network meets a budget."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lth_plugins.errors import ConfigError
from lth_plugins.slimming.cost import Cost, Flops
from lth_plugins.slimming.latency import Latency
from lth_plugins.slimming.network import Kept, Network
from lth_plugins.slimming.tracing import Forward

logger = logging.getLogger(__name__)

Scores = Mapping[str, Tensor]
"""By group: float, [channels]; the lowest are removed first."""

ROUNDS = 4
"""How often a cost is corrected at the most."""

TOLERANCE = 0.05
"""How far a network may be off its budget without a warning."""


@dataclass(frozen=True)
class Budget:
    """How much of its cost a network may keep.

    Attributes:
        share: of the cost of the whole network, in (0, 1).
        cost: what is counted.
        multiple: the channels that stay in a group are a multiple of this, as kernels compute
            blocks of channels (of 16 with AVX-512), and several at once (`_width`); 1 for any
            number.
        least: the share of its channels that each group keeps at least.
    """

    share: float
    cost: Cost
    multiple: int = 16
    least: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(
                f"expected a share of the {self.cost.unit} to keep, in (0, 1), such as 0.5, found "
                f"{self.share}"
            )


def budget_of(flops: float | None, latency: float | None) -> Budget:
    """The budget of a user.

    Args:
        flops, latency: the share of the model's FLOPs, or of its time of inference, to keep; in
            (0, 1), and exactly one of them.

    Raises:
        ConfigError: if a value is invalid, or there are none or two.
    """
    if flops is not None and latency is None:
        return Budget(flops, Flops())
    if latency is not None and flops is None:
        return Budget(latency, Latency())
    raise ConfigError(
        "expected a share of the FLOPs or of the time of inference (latency) to keep, found "
        f"{'neither' if flops is None else f'both, {flops:g} and {latency:g}'}: give one of them"
    )


def settle(
    model: nn.Module,
    network: Network,
    scores: Scores,
    kept: Kept,
    budget: Budget,
    forward: Forward,
) -> dict[str, Tensor]:
    """`select`, and again where the cost turns out to be another than was expected.

    A warning tells by how much the budget is missed, if it is.

    Args:
        model: whose network it is; it is copied, and run where a cost is measured.
        network, scores, kept, budget: as `select`'s.
        forward: as `Cost.of`'s.

    Raises:
        ConfigError: as `select`.
    """
    left = select(network, scores, kept, budget)
    for _ in range(ROUNDS):
        cost = budget.cost.corrected(model, network, left, forward)
        if cost is budget.cost:
            break
        budget = replace(budget, cost=cost)
        try:
            left = select(network, scores, kept, budget)
        except ConfigError as error:  # as it seemed that it can be reached, a model was trained
            logger.warning("%s", error)
            break
    share = budget.cost(network, left) / budget.cost(network, network.all_kept())
    if abs(share - budget.share) > TOLERANCE * budget.share:
        logger.warning(
            "Asked for was %.3f of the %s, and %.3f is left: no selection in steps of %d channels "
            "was found that is nearer",
            *(budget.share, budget.cost.unit, share, budget.multiple),
        )
    return left


def select(network: Network, scores: Scores, kept: Kept, budget: Budget) -> dict[str, Tensor]:
    """Remove the channels of the lowest scores until a network meets its budget.

    All groups are ranked together. Channels that were removed before stay removed, and groups of
    which nothing is known, as all their scores are 0, stay as they are: stages that are frozen have
    no gradients.

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
    if not network.groups:
        raise _unreachable(network, kept, budget, whole)
    ranks, high = _ranks(network, scores, kept)
    low = 0
    fewest = _without(network, ranks, kept, high, budget)
    if budget.cost(network, fewest) > goal:
        raise _unreachable(network, fewest, budget, whole)
    while high - low > 1:  # without the `low` lowest it costs too much, without the `high` not
        middle = (low + high) // 2
        left = _without(network, ranks, kept, middle, budget)
        if budget.cost(network, left) <= goal:
            high = middle
        else:
            low = middle
    return _without(network, ranks, kept, high, budget)


def _ranks(network: Network, scores: Scores, kept: Kept) -> tuple[dict[str, Tensor], int]:
    """The place of each channel that is left among all of them, the lowest score first.

    Of equal scores the first is the lower: a ranking has no ties. Unknown ones come last.

    Returns:
        The places by group, -1 where a channel is removed; and how many channels are known.

    Raises:
        ConfigError: if a score is not a number.
    """
    groups = [scores[name][kept[name]].double() for name in network.groups]
    left = torch.cat(groups)
    if not bool(left.isfinite().all()) or not bool(left.any()):
        found = "only zeros" if bool(left.isfinite().all()) else "some that are no numbers"
        raise ConfigError(
            f"expected scores that tell channels apart, found {found}: an importance that ranks by "
            "gradients (taylor, fisher) needs a loss, and one that is a number"
        )
    unknown = torch.cat([(group == 0).all().expand(len(group)) for group in groups])
    order = torch.where(unknown, left.max() + 1, left).argsort(stable=True)
    places = torch.empty(len(left), dtype=torch.long)
    places[order] = torch.arange(len(left))
    ranks, start = {}, 0
    for name, group in network.groups.items():
        ranks[name] = torch.full((group.channels,), -1)
        count = int(kept[name].sum())
        ranks[name][kept[name]] = places[start : start + count]
        start += count
    return ranks, int((~unknown).sum())


def _without(
    network: Network, ranks: Mapping[str, Tensor], kept: Kept, lowest: int, budget: Budget
) -> dict[str, Tensor]:
    """What is left without the lowest so many channels, but for what each group keeps."""
    left = {}
    for name, group in network.groups.items():
        wanted = max(int((ranks[name] >= lowest).sum()), round(budget.least * group.channels), 1)
        most = min(_width(wanted, budget.multiple), int(kept[name].sum()))
        best = ranks[name].argsort(descending=True)[:most]
        left[name] = torch.zeros(group.channels, dtype=torch.bool)
        left[name][best] = True
    return left


def _width(channels: int, block: int) -> int:
    """The next number of channels that is whole blocks, and that kernels compute well.

    oneDNN computes two to five blocks of outputs at once, if that divides their number: with 7, 11
    or 13 blocks of 16 a convolution takes a third longer per operation.
    """
    blocks = -(-channels // block)
    while block > 1 and blocks > 5 and all(blocks % several for several in (2, 3, 5)):
        blocks += 1
    return blocks * block


def _unreachable(network: Network, fewest: Kept, budget: Budget, whole: float) -> ConfigError:
    costs = budget.cost.by_layer(network, fewest)
    total = sum(costs.values())
    largest = sorted(costs, key=lambda name: -costs[name])[:3]
    most = ", ".join(f"{name} ({100 * costs[name] / total:.0f} %)" for name in largest)
    least = budget.cost(network, fewest) / whole
    return ConfigError(
        f"expected a budget that can be reached, found {budget.share:g} of the {budget.cost.unit}: "
        f"at the least {least:.3f} is left, most of it in {most}. Ask for more, keep fewer "
        "modules, or freeze fewer stages"
    )
