"""Tickets of slimmed models: the masks of a ticket in the widths that its trunk has left."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lth_plugins.errors import TicketError
from lth_plugins.masking.attachment import Attachment, attach, attached
from lth_plugins.masking.loading import start_anew
from lth_plugins.slimming.channels import tensors_of
from lth_plugins.slimming.network import Kept, Network, Side
from lth_plugins.ticket.arch import ARCHITECTURES
from lth_plugins.ticket.keys import State
from lth_plugins.ticket.locating import locate
from lth_plugins.ticket.masks import Masks
from lth_plugins.ticket.outside import Outside
from lth_plugins.ticket.ticket import Ticket
from lth_plugins.ticket.trunk import read_trunk

logger = logging.getLogger(__name__)

SLIM_TICKET = "slim.ticket"
"""What hosts call the ticket of the narrower model, beside its checkpoint."""


def check_carries(model: nn.Module) -> None:
    """Check that the ticket on a model can be that of the narrower one, too.

    Raises:
        TicketError: if a pruned weight is not zero; if the ticket is sparse, and the model lacks a
            stage of the trunk that it is of.
    """
    handle = attached(model)
    if handle is None:
        return
    handle.verify()
    if handle.all_masks.density < 1 and handle.absent_stages:
        raise TicketError(
            "expected a whole trunk under a sparse ticket to slim, found one without its last "
            "stages: a ticket is of the whole trunk, and what it prunes would be trained. Slim "
            "with the dense ticket, or a model that is built with all stages"
        )


def carry_ticket(model: nn.Module, small: nn.Module, network: Network, kept: Kept) -> None:
    """Attach the ticket of a model to the narrower one, if it has one: the same zeros.

    The dense ticket of a part of a trunk has no zeros, and is left.

    Args:
        model: with the channels that are not kept.
        small: the one without them; its state dict says that it is slimmed.
        network, kept: as `channels.narrow`'s.
    """
    handle = attached(model)
    if handle is None or handle.absent_stages:
        return
    masks = _narrow_masks(model, handle, network, kept)
    weights = read_trunk(small, archs=[ARCHITECTURES[handle.meta.arch]])
    outside = {name: mask for name, mask in masks.items() if name not in handle.masks}
    ticket = Ticket(
        Masks({name: mask for name, mask in masks.items() if name not in outside}),
        weights.weights,
        replace(handle.meta, widths=dict(weights.arch.widths)),
        outside=Outside(Masks(outside), small.state_dict()),
    )
    attach(small, ticket)
    start_anew(small)


def fits(ticket: Ticket | None, state: State, use: str) -> bool:
    """Whether a ticket is one of a slimmed state dict's trunk, and goes on the model.

    A dense ticket of the full width, which was on the model before it was slimmed, does not: the
    slimmed model is trained without one. A warning says so if it has zeros.

    Args:
        ticket: which the configuration names; None if there is none.
        state: of the slimmed model.
        use: how the host names a ticket, for the message.

    Raises:
        TicketError: if it is sparse, or slimmed, and of another trunk.
    """
    if ticket is not None:
        found = locate(state, archs=[ARCHITECTURES[ticket.meta.arch]]).arch
        if found == ticket.arch:
            return True
        if ticket.arch.widths or ticket.all_masks.density < 1:
            what = "other widths" if ticket.arch.widths else "the full width"
            raise TicketError(
                f"expected a ticket in the widths of the slimmed checkpoint, found {ticket!r}, of "
                f"{what}: name the {SLIM_TICKET} beside the checkpoint ({use}), or a ticket that "
                "was found from it"
            )
        logger.info("%r is of the full width, and not attached to the slimmed model", ticket)
    zeros = sum(int((value == 0).sum()) for value in state.values() if value.dim() > 1)
    if zeros:
        logger.warning(
            "The %s zeros of the slimmed checkpoint are trained like other weights: name the %s "
            "beside it to keep them (%s)",
            *(f"{zeros:,}", SLIM_TICKET, use),
        )
    return False


def save_ticket(small: nn.Module, folder: Path, **changes: Any) -> None:
    """Write the ticket on a slimmed model, if it has one, to `SLIM_TICKET` in a folder.

    Args:
        small: the model.
        folder: where to write.
        changes: as `Attachment.ticket`'s.
    """
    handle = attached(small)
    if handle is not None:
        logger.info("Wrote the ticket to %s", handle.ticket(**changes).save(folder / SLIM_TICKET))


def _narrow_masks(
    model: nn.Module, handle: Attachment, network: Network, kept: Kept
) -> dict[str, Tensor]:
    """The masks of what is left, by their names."""
    keys = locate(model, archs=[handle.meta.network]).keys
    entries, narrow = network.entries(kept), {}
    sides: tuple[Side, ...] = ("out", "in")
    for name, mask in handle.all_masks.items():
        path = keys.get(name, name).removesuffix(".weight")
        for side in sides:
            if (path, side) in entries:
                dim = dict(tensors_of(model.get_submodule(path), side))["weight"]
                mask = mask.index_select(dim, entries[path, side].nonzero().flatten())
        narrow[name] = mask
    return narrow
