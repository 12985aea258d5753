"""Which ticket a configuration means: the options that all hosts share, read once."""

import os
from os import PathLike

from lth_plugins.errors import TicketError, UnknownWeights
from lth_plugins.ticket.ticket import Ticket


def resolve(
    ref: str | PathLike[str],
    weights: str | PathLike[str] | None = None,
    reverse: bool = False,
    random: bool = False,
    seed: int = 0,
    rest: bool = True,
    weights_option: str = "the weights option",
) -> Ticket:
    """The ticket that a framework's config describes: the options that all plug-ins share.

    Args:
        ref: the ticket: a path, a catalog name or ``hf://owner/repo[/file][@sha256:…]``.
        weights: another ticket whose θ to use. A file holds only surviving weights, so ``reverse``
            and ``random`` need the dense ticket it was pruned from here.
        reverse: (1 - m, θ), what the ticket left out.
        random: a random mask with the ticket's layer-wise densities.
        seed: of the random mask.
        rest: False leaves out what the ticket prunes outside the trunk, in the model it was found
            in: for another model.
        weights_option: what ``weights`` is called where it was given, for messages.

    Raises:
        TicketError: if a ticket cannot be read, the two do not fit, or the options contradict.
    """
    if reverse and random:
        raise TicketError("expected at most one of reverse and random, found both: choose one")
    ticket = Ticket.load(ref)
    if not rest:
        ticket = ticket.without_outside()
    given, option = ref, "reverse" if reverse else "random" if random else "weights"
    try:
        if weights is not None:
            other, given = Ticket.load(weights), weights
            ticket = ticket.with_weights(other)
        return ticket.reversed() if reverse else ticket.shuffled(seed) if random else ticket
    except UnknownWeights as error:
        raise UnknownWeights(
            f"{option} keeps weights that {os.fspath(given)} does not hold, because a ticket file "
            "stores only surviving weights: name the dense ticket it was pruned from, of a search "
            f"its round_00.ticket, as {weights_option}"
        ) from error
