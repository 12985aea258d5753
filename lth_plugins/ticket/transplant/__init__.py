"""Transplants: the masks of one network over the weights of another, (m, θ').

Of two networks of one depth the channels can be aligned first (`alignment`); for another depth
blocks are replicated or dropped (`blocks`).
"""

from dataclasses import replace
from typing import Any

from lth_plugins.errors import ConfigError, TicketError, unknown
from lth_plugins.ticket.ticket import Ticket
from lth_plugins.ticket.transplant.alignment import Alignment, align
from lth_plugins.ticket.transplant.blocks import ORDERS, of_depth

__all__ = ["ORDERS", "Alignment", "align", "transplant"]


def transplant(
    ticket: Ticket, onto: Ticket, alignment: Alignment | None = None, blocks: str | None = None
) -> Ticket:
    """Lay the masks of a ticket over the weights of another network.

    Args:
        ticket: whose masks.
        onto: whose θ and input: a dense ticket, as a rule.
        alignment: of a network like the ticket's (``source``) with one like ``onto``: its channels
            are put in that order.
        blocks: for a network of another depth, how blocks are replicated or dropped: a key of
            `ORDERS`.

    Returns:
        (m', θ'), whose recipe says how it was made.

    Raises:
        TicketError: if the networks differ in more than their depth, the ticket prunes weights
            outside the trunk that do not fit, or ``onto`` does not know all weights that are kept.
        ConfigError: if the options contradict the networks.
    """
    _check_family(ticket, onto)
    depths = (ticket.arch.depths, onto.arch.depths)
    if blocks is not None and blocks not in ORDERS:
        raise unknown("order of blocks", blocks, ORDERS)
    if depths[0] != depths[1] and blocks is None:
        raise ConfigError(
            f"expected how to make {_words(depths[1])} blocks of {_words(depths[0])}, found "
            f"nothing: give {' or '.join(ORDERS)}"
        )
    if depths[0] == depths[1] and blocks is not None:
        raise ConfigError(
            f"expected a network of another depth to {blocks} blocks for, found {onto!r}, which "
            f"has as many as {ticket!r}: leave it out"
        )
    if blocks is None and alignment is None:
        return ticket.with_weights(onto)
    if blocks is not None and alignment is not None:
        raise ConfigError(
            "expected networks of one depth to align, found others: replicate or drop blocks "
            "without aligning"
        )
    if ticket.outside:
        raise TicketError(
            f"expected masks of the trunk alone to permute or to replicate, found {ticket!r}, "
            "which also prunes weights outside it, in the order of its own channels: take "
            "ticket.without_outside()"
        )
    masks, how = ticket.masks, dict[str, Any]()
    if alignment is not None:
        masks, how = alignment.masks(masks), alignment.recipe
    if blocks is not None:
        masks, how = of_depth(masks, ticket.arch, onto.arch, blocks), {"blocks": blocks}
    meta = replace(
        onto.meta,
        source=ticket.meta.source,
        round=ticket.meta.round,
        recipe={**ticket.meta.recipe, "weights": onto.digest, **how},
        parent=ticket.digest,
    )
    return Ticket(masks, onto.weights, meta, onto.known)


def _check_family(ticket: Ticket, onto: Ticket) -> None:
    """Raise ``TicketError`` unless two networks differ in their depth at most."""
    first, second = (
        replace(t.arch, name="", depths=onto.arch.depths, channels=3) for t in (ticket, onto)
    )
    slimmed = ticket.arch.widths and ticket.arch.depths != onto.arch.depths
    if first != second or slimmed:
        raise TicketError(
            "expected the weights of a network that differs from the ticket's in its depth at "
            f"most, and not in stem, blocks or widths, found {onto.arch.description} for the masks "
            f"of {ticket.arch.description}: give another network"
        )


def _words(depths: tuple[int, ...]) -> str:
    return "-".join(str(depth) for depth in depths)
