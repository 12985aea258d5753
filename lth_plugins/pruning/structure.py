"""Structure: masks whose zeros a processor can skip, made of a ticket's by refilling.

Chen et al., "Coarsening the Granularity: Towards Structurally Sparse Lottery Tickets" (arXiv
2202.04736): rank channels by the magnitude that the IMP mask left in them, fill the best ones up
completely, and prune the others completely. Each structure is a frozen dataclass that makes masks
of a ticket. What a network's masks have of structure, `lth_plugins.study.structure` measures, and
`lth_plugins.compact` turns dead channels into speed.
"""

import logging
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from lth_plugins.errors import ConfigError, TicketError, unknown
from lth_plugins.pruning.selection import select
from lth_plugins.registry import Registry
from lth_plugins.ticket.arch import Inner, ResNet
from lth_plugins.ticket.masks import Masks
from lth_plugins.ticket.ticket import Ticket

logger = logging.getLogger(__name__)

SCOPES = ("global", "layer")


class Structure(Protocol):
    """Makes structured masks of a ticket's.

    Attributes:
        kind: its name in `STRUCTURES`.
    """

    kind: ClassVar[str]

    def __call__(self, ticket: Ticket) -> Masks:
        """Masks of the trunk, which may keep weights that the ticket prunes.

        Raises:
            TicketError: if the architecture cannot have this structure.
        """
        ...


@dataclass(frozen=True)
class Channels:
    """Whole output channels of the convolutions inside blocks: what `lth_plugins.compact` removes.

    A channel goes with the weights that write it and those that read it, so that the weights kept
    are those of the narrower network. How many channels each convolution keeps is as its density in
    the ticket, scaled until the budget is met; which, is by the magnitude that the ticket left of
    the weights that write them. Shortcuts, whose outputs the residual stream needs, keep the masks
    they have.

    Attributes:
        scope: "layer" fills each block up to what the ticket left in it, as the paper does each
            convolution; "global" scales all blocks alike until all together are filled.
        density: of the blocks' convolutions, before the surplus; None for the ticket's own. With a
            dense ticket this is L1 channel pruning, without a ticket's help, and every convolution
            keeps the same share.
        surplus: weights kept beyond that, as a fraction of it: refill+ of the paper.
        minimum: channels that every convolution keeps, whatever the budget.
        multiple: the number of channels kept is rounded to a multiple of this, such as 8 or 16.
    """

    kind: ClassVar[str] = "channel"

    scope: str = "layer"
    density: float | None = None
    surplus: float = 0.0
    minimum: int = 1
    multiple: int = 1

    def __post_init__(self) -> None:
        _check_budget(self.scope, self.density, self.surplus)
        for name in ("minimum", "multiple"):
            if getattr(self, name) < 1:
                raise ConfigError(f"expected {name} to be 1 or more, found {getattr(self, name)}")

    def __call__(self, ticket: Ticket) -> Masks:
        arch = ticket.arch
        if arch.groups > 1:
            raise TicketError(
                f"the channels of a {arch.name} cannot be pruned: its 3x3 convolutions have "
                f"{arch.groups} groups, which would become uneven. Kernels and N:M can"
            )
        blocks: dict[str, list[Inner]] = {}
        for inner in arch.inner:
            blocks.setdefault(inner.block, []).append(inner)
        groups = [list(arch.inner)] if self.scope == "global" else list(blocks.values())
        counts: dict[str, int] = {}
        forced: list[Inner] = []
        for inside in groups:
            counts |= self._counts(inside, ticket)
            if _weights(counts, inside, arch) > self._budget(inside, ticket):
                forced += inside
        if forced:
            self._report(forced, counts, ticket)
        kept = {name: _best(self._worth(ticket, name), count) for name, count in counts.items()}
        return channel_masks(ticket.masks, arch, kept)

    def _worth(self, ticket: Ticket, conv: str) -> Tensor:
        """What the output channels of a convolution are ranked by."""
        return _left(ticket, f"{conv}.weight").sum(1)

    def _counts(self, inside: Sequence[Inner], ticket: Ticket) -> dict[str, int]:
        """How many channels each of these convolutions keeps: as many as the budget has."""
        names = [inner.conv for inner in inside]
        masks = [ticket.masks[f"{name}.weight"] for name in names]
        widths = torch.tensor([len(mask) for mask in masks])
        # A channel that an earlier round has pruned stays away.
        alive = torch.tensor([int(mask.flatten(1).any(1).sum()) for mask in masks])
        most = (alive // self.multiple * self.multiple).clamp(min=self._least).minimum(widths)
        # A convolution's i-th channel comes in when the scale reaches i / (density * width).
        scales = [
            torch.arange(1, len(mask) + 1) / (len(mask) * mask.float().mean()) for mask in masks
        ]
        owners = torch.arange(len(names)).repeat_interleave(widths)
        ranked = owners[torch.cat(scales).argsort(stable=True)]

        def counts(best: int) -> dict[str, int]:
            found = torch.bincount(ranked[:best], minlength=len(names))
            whole = self.multiple * (found / self.multiple).round().long()
            kept = whole.clamp(min=self._least).minimum(most)
            return dict(zip(names, kept.tolist(), strict=True))

        def cost(best: int) -> int:
            return _weights(counts(best), inside, ticket.arch)

        budget = self._budget(inside, ticket)
        # The last that fits; the minimum where none does.
        return counts(max(bisect_right(range(len(ranked) + 1), budget, key=cost) - 1, 0))

    @property
    def _least(self) -> int:
        """The minimum as a whole multiple."""
        return self.multiple * math.ceil(self.minimum / self.multiple)

    def _budget(self, inside: Sequence[Inner], ticket: Ticket) -> int:
        return _budget(ticket.masks, _convolutions(inside), self.density, self.surplus)

    def _report(self, forced: Sequence[Inner], counts: Mapping[str, int], ticket: Ticket) -> None:
        logger.warning(
            "%d of %d convolutions keep the minimum of %d channels, or all they have: %s. Their "
            "blocks keep %d weights, the budget has %d",
            *(len(forced), len(counts), self._least, ", ".join(inner.conv for inner in forced)),
            *(_weights(counts, forced, ticket.arch), self._budget(forced, ticket)),
        )


@dataclass(frozen=True)
class L1Channels(Channels):
    """As many channels of each convolution as `Channels` keeps, but those with the largest weights.

    L1 channel pruning (Li et al., arXiv 1608.08710), at the cost of refilling to the multiply-add:
    is a ticket of any use in telling which channels to keep? Its masks say only how many.
    """

    kind: ClassVar[str] = "channel_l1"

    def _worth(self, ticket: Ticket, conv: str) -> Tensor:
        return ticket.weights[f"{conv}.weight"].abs().flatten(1).sum(1)


@dataclass(frozen=True)
class Kernels:
    """Whole k×k kernels, k > 1, ranked by the magnitude that the ticket left in them.

    1×1 convolutions keep the masks they have: each of their weights is a kernel. Every other one
    keeps a kernel at least, whatever the budget.

    Attributes:
        scope: "layer" fills each convolution up to what the ticket left in it; "global" ranks the
            kernels of all convolutions together.
        density: as that of `Channels`, of the convolutions with k > 1.
        surplus: as that of `Channels`.
    """

    kind: ClassVar[str] = "kernel"

    scope: str = "layer"
    density: float | None = None
    surplus: float = 0.0

    def __post_init__(self) -> None:
        _check_budget(self.scope, self.density, self.surplus)

    def __call__(self, ticket: Ticket) -> Masks:
        spatial = [name for name, mask in ticket.masks.items() if mask[0, 0].numel() > 1]
        masks = dict(ticket.masks)
        emptied = []
        for names in [spatial] if self.scope == "global" else [[name] for name in spatial]:
            budget = _budget(ticket.masks, names, self.density, self.surplus)
            kernel = ticket.masks[names[0]].shape[2:]  # 3x3 in all that a trunk prunes
            lefts = {name: _left(ticket, name) for name in names}
            worth = {n: left.unflatten(1, (-1, kernel.numel())).sum(2) for n, left in lefts.items()}
            whole = Masks.ones({name: tuple(left.shape) for name, left in worth.items()})
            fraction = 1 - min(budget // kernel.numel() / whole.numel, 1)
            for name, kept in select(worth, whole, fraction, "global").items():
                if not kept.any():
                    emptied.append(name)
                    kept = _best(worth[name].flatten(), 1).view_as(kept)
                masks[name] = kept[:, :, None, None].expand_as(masks[name])
        if emptied:
            logger.warning(
                "%d of %d convolutions keep one kernel, for which the budget has no room: %s",
                *(len(emptied), len(spatial), ", ".join(emptied)),
            )
        return Masks(masks)


@dataclass(frozen=True)
class NM:
    """N of M consecutive input channels, at each output channel and place of a kernel.

    2:4 is what sparse tensor cores multiply (Mishra et al., arXiv 2104.08378). The N weights of
    the largest magnitude are kept, those that the ticket keeps before all others, so that every
    prunable convolution has the density N/M whatever the ticket's.

    Attributes:
        n: kept.
        m: of how many.
    """

    kind: ClassVar[str] = "nm"

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.n <= self.m:
            raise ConfigError(f"expected N:M with 0 < N <= M, found {self.n}:{self.m}")

    def __call__(self, ticket: Ticket) -> Masks:
        return self.masks(ticket.masks, ticket.weights)

    def masks(self, masks: Masks, weights: Mapping[str, Tensor]) -> Masks:
        """The masks of these weights, which keep those of ``masks`` before all others.

        Raises:
            TicketError: if M does not divide the input channels of a layer.
        """
        found = {}
        for name, mask in masks.items():
            if mask.shape[1] % self.m:
                raise TicketError(
                    f"{self.n}:{self.m} needs input channels in multiples of {self.m}, found "
                    f"{mask.shape[1]} (of a group) in {name}"
                )
            size = weights[name].abs()
            worth = torch.where(mask, size, -1 / (1 + size))  # below 0, the larger the better
            found[name] = self._best(worth.unflatten(1, (-1, self.m))).flatten(1, 2)
        return Masks(found)

    def _best(self, worth: Tensor) -> Tensor:
        """Which are among the N best along dimension 2; of equal ones the last."""
        ahead = torch.zeros_like(worth, dtype=torch.uint8)
        for i in range(self.m):
            other = worth[:, :, i : i + 1]
            ahead += other > worth
            ahead[:, :, :i] += other == worth[:, :, :i]
        return ahead < self.n


STRUCTURES: Registry[type[Channels] | type[Kernels] | type[NM]] = Registry("structure")
for _structure in (Channels, L1Channels, Kernels, NM):
    STRUCTURES.register(_structure.kind, _structure)


def make_structure(kind: str, **options: Any) -> Structure:
    """The structure of this kind.

    Args:
        kind: a name in `STRUCTURES`.
        options: its attributes; None stands for the default.

    Raises:
        ConfigError: if there is no such kind, or it has no such option.
    """
    structure = STRUCTURES[kind]
    given = {name: value for name, value in options.items() if value is not None}
    known = [field.name for field in fields(structure)]
    for name in given:
        if name not in known:
            raise ConfigError(f"structure {kind!r} has no {name}; it has {', '.join(known)}")
    return structure(**given)


@dataclass
class Refill:
    """What each round of a search refills its masks to, as configurations have it.

    ``kind`` is a name in `STRUCTURES`, and None leaves the masks as they are; what follows are
    attributes of that structure, of which None is the default.
    """

    kind: str | None = None
    scope: str | None = None
    surplus: float | None = None
    minimum: int | None = None  # of channel
    multiple: int | None = None  # of channel

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Refill":
        """From a host's configuration, where "" and 0 are None."""
        return cls(**{name: value or None for name, value in options.items()})

    def make(self) -> Structure | None:
        """The structure, if there is any.

        Raises:
            ConfigError: if there is no such structure, or rounds cannot have it.
        """
        options = dict(vars(self))
        kind = options.pop("kind")
        if kind == "nm":
            raise ConfigError(
                "structure.kind=nm keeps N of M weights in every round, so that rounds would not "
                "get sparser: find tickets without it, and then tools/ticket.py structure --kind nm"
            )
        if kind is None:
            given = [f"structure.{name}" for name, value in options.items() if value is not None]
            if given:
                raise ConfigError(f"{', '.join(given)} needs structure.kind: channel or kernel")
            return None
        return make_structure(kind, **options)


def structured(ticket: Ticket, structure: Structure) -> Ticket:
    """The ticket with structured masks: (m', θ), an ordinary ticket.

    Args:
        ticket: must know all of θ, as `Ticket.with_weights` of the round-0 ticket makes it: what
            refilling keeps, the ticket may have pruned.
        structure: the structure.

    Raises:
        TicketError: if the architecture cannot have it, or θ is not known.
    """
    return ticket.with_masks(structure(ticket), {"structure": describe(structure)})


def describe(structure: Structure) -> dict[str, Any]:
    """A structure as plain JSON types, for recipes."""
    return {"kind": structure.kind, **asdict(structure)}  # type: ignore[call-overload]


def channel_masks(masks: Masks, arch: ResNet, kept: Mapping[str, Tensor]) -> Masks:
    """The masks of a network with only these channels inside its blocks.

    Args:
        masks: of all prunable weights; those outside blocks' inner convolutions stay.
        arch: the architecture.
        kept: boolean, [output channels], by the name of every module in ``arch.inner``.

    Returns:
        Masks that keep every weight between kept channels, and none other inside blocks.
    """
    result = dict(masks)
    writers = {inner.reader: inner.conv for inner in arch.inner}
    for name in _convolutions(arch.inner):
        conv = name.removesuffix(".weight")
        mask = torch.ones_like(masks[name])
        if conv in kept:
            mask &= kept[conv][:, None, None, None]
        if conv in writers:
            mask &= kept[writers[conv]][None, :, None, None]
        result[name] = mask
    return Masks(result)


def _convolutions(inside: Iterable[Inner]) -> list[str]:
    """The weights that write or read the channels of these convolutions."""
    pairs = ((f"{inner.conv}.weight", f"{inner.reader}.weight") for inner in inside)
    return list(dict.fromkeys(name for pair in pairs for name in pair))


def _weights(counts: Mapping[str, int], inside: Sequence[Inner], arch: ResNet) -> int:
    """How many weights write or read these channels, so many of each convolution."""
    writers = {inner.reader: inner.conv for inner in inside}
    total = 0
    for name in _convolutions(inside):
        conv = name.removesuffix(".weight")
        outputs, inputs, *kernel = arch.prunable[name]
        inputs = counts[writers[conv]] if conv in writers else inputs
        total += counts.get(conv, outputs) * inputs * math.prod(kernel)
    return total


def _left(ticket: Ticket, name: str) -> Tensor:
    """The magnitudes that the mask leaves of a weight: [output channels, all others]."""
    return (ticket.weights[name].abs() * ticket.masks[name]).flatten(1)


def _best(worth: Tensor, count: int) -> Tensor:
    """Which are the most worth; of equal ones the last, as `select` prunes the first."""
    kept = torch.zeros(len(worth), dtype=torch.bool)
    kept[worth.argsort(stable=True)[len(worth) - count :]] = True
    return kept


def _budget(masks: Masks, names: Sequence[str], density: float | None, surplus: float) -> int:
    """How many of these weights to keep."""
    if density is None:
        kept = sum(int(masks[name].count_nonzero()) for name in names)
    else:
        kept = round(density * sum(masks[name].numel() for name in names))
    return round(kept * (1 + surplus))


def _check_budget(scope: str, density: float | None, surplus: float) -> None:
    if scope not in SCOPES:
        raise unknown("scope", scope, SCOPES)
    if density is not None and not 0 < density <= 1:
        raise ConfigError(f"expected a density of more than 0 and at most 1, found {density}")
    if not 0 <= surplus < math.inf:
        raise ConfigError(f"expected a surplus of 0 or more, found {surplus}")
