"""Lottery Pools: trained tickets of neighbouring rounds, interpolated to a better one.

Yin et al., arXiv 2208.10842. IMP leaves a series of trained networks that are close to each other.
What lies between two of them, pruned again, can be better than either, at no cost of inference.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from lth_plugins.errors import TicketError
from lth_plugins.pruning import prune
from lth_plugins.pruning.search.search import TRAINED_FROM
from lth_plugins.ticket.ticket import Ticket

COEFFICIENTS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""The weights of a neighbour that are tried."""


@dataclass(frozen=True)
class Member:
    """A trained network: a ticket, and what was trained beside its trunk.

    Attributes:
        ticket: of `trained_path`.
        head: the state of the task's head, by name.
    """

    ticket: Ticket
    head: Mapping[str, Tensor]


@dataclass(frozen=True)
class Pool:
    """What `pool` comes to.

    Attributes:
        member: the best network.
        before, after: the metric of the ticket as it was, and of ``member``.
        used: the neighbours that it is made of, with their coefficients, in order.
        evaluations: how many networks were measured.
    """

    member: Member
    before: float
    after: float
    used: Sequence[tuple[Ticket, float]]
    evaluations: int


Measure = Callable[[Member], tuple[Member, float]]
"""Re-estimates BatchNorm's statistics of a network, and gives it with its metric, higher better."""


def pool(base: Member, before: float, neighbours: Sequence[Member], measure: Measure) -> Pool:
    """Improve a trained ticket by interpolation with its neighbours, greedily.

    The neighbours are tried one after another, those of the nearest rounds first. Of all
    coefficients the best is taken, if it is better than all so far. Each network on the way is
    pruned, by global magnitude, to as many weights as ``base`` keeps.

    Args:
        base: the ticket, whose density stays.
        before: its metric.
        neighbours: other trained tickets of its search.
        measure: what is to improve.

    Raises:
        TicketError: before anything is measured, if the tickets do not belong together.
    """
    check_pool([base.ticket, *(neighbour.ticket for neighbour in neighbours)])
    k = base.ticket.meta.round
    best, after = base, before
    used: list[tuple[Ticket, float]] = []
    evaluations = 1
    for neighbour in sorted(neighbours, key=lambda member: abs(member.ticket.meta.round - k)):
        start, chosen = best, None
        for coefficient in COEFFICIENTS:
            found, metric = measure(interpolated(start, neighbour, coefficient, base.ticket))
            evaluations += 1
            if metric > after:
                best, after, chosen = found, metric, coefficient
        if chosen is not None:
            used.append((neighbour.ticket, chosen))
    recipe = [{"round": t.meta.round, "ticket": t.digest, "coefficient": c} for t, c in used]
    if used:
        meta = replace(
            base.ticket.meta,
            parent=base.ticket.digest,
            recipe={**base.ticket.meta.recipe, "pooled": recipe},
        )
        best = replace(best, ticket=replace(best.ticket, meta=meta))
    return Pool(best, before, after, used, evaluations)


def interpolated(one: Member, other: Member, coefficient: float, like: Ticket) -> Member:
    """The network between two, with so much of the other, as sparse as a ticket."""
    trunk = _between(one.ticket.sparse_weights(), other.ticket.sparse_weights(), coefficient)
    masks = one.ticket.masks | other.ticket.masks
    masks = prune(trunk, 1 - like.masks.kept / masks.kept, masks)
    head = _between(one.head, other.head, coefficient)
    return Member(Ticket(masks, trunk, like.meta), head)


def _between(
    one: Mapping[str, Tensor], other: Mapping[str, Tensor], coefficient: float
) -> dict[str, Tensor]:
    return {
        name: value.lerp(other[name], coefficient) if value.is_floating_point() else value
        for name, value in one.items()
    }


def check_pool(tickets: Sequence[Ticket]) -> None:
    """Check that these are trained tickets of one search, each once.

    Raises:
        TicketError: naming the first that is not.
    """
    base = tickets[0]
    for ticket in tickets:
        if ticket.arch != base.arch:
            raise TicketError(
                f"expected tickets of one width to interpolate, found a {base.arch.title} and a "
                f"{ticket.arch.title}: their weights have no counterparts in each other"
            )
        origin = ticket.meta.recipe.get(TRAINED_FROM)
        if origin is None:
            raise TicketError(
                f"expected trained tickets, found {ticket!r}, which is rewound to θ or from "
                "elsewhere: find tickets with keep=trained, and give their round_KK.trained.ticket"
            )
        if origin != base.meta.recipe[TRAINED_FROM]:
            raise TicketError(
                f"expected tickets that were trained from one θ, found {base!r} and {ticket!r}, of "
                "two searches: what lies between them is no trained network"
            )
    if len({ticket.digest for ticket in tickets}) < len(tickets):
        raise TicketError("expected each ticket of the pool once, found one twice: leave it out")
