"""Ticket: a channel is worth what IMP has left of it."""

import torch
from torch import Tensor, nn

from lth_plugins.errors import TicketError
from lth_plugins.masking.attachment import attached
from lth_plugins.slimming.importance.importance import Weights, by_channel, weights_of
from lth_plugins.slimming.importance.magnitude import Magnitude
from lth_plugins.slimming.network import Group, Network
from lth_plugins.ticket.locating import locate


class TicketDensity(Weights):
    """The share of a channel's weights that the attached ticket keeps (refill, arXiv 2202.04736).

    IMP ranked all weights together, so that densities compare between layers. Channels of equal
    density, and those of layers without a mask, which have the mean density, are ranked by their
    magnitude.

    Raises:
        TicketError: if no ticket is attached to the model, or it is dense.
    """

    def start(self, model: nn.Module, network: Network) -> None:
        handle = attached(model)
        if handle is None or handle.all_masks.density == 1:
            raise TicketError(
                "importance 'ticket' ranks channels by what a ticket leaves of them: expected a "
                f"sparse ticket on the model, found {'none' if handle is None else 'a dense one'}"
            )
        super().start(model, network)
        keys = locate(model).keys
        self._masks = {keys.get(n, n): mask for n, mask in handle.all_masks.items()}
        self._mean = handle.all_masks.density

    @torch.no_grad()
    def scores(self) -> dict[str, Tensor]:
        magnitude = Magnitude()
        magnitude.start(self.model, self.network)
        ranks = magnitude.scores()
        # Magnitudes are relative to 1, so a thousandth decides only where densities are equal.
        return {
            name: self._density(group) + 1e-3 * self._mean * ranks[name]
            for name, group in self.network.groups.items()
        }

    def _density(self, group: Group) -> Tensor:
        kept = torch.zeros(group.channels, dtype=torch.float64)
        of = torch.zeros(group.channels, dtype=torch.float64)
        for name, _, dim, member in weights_of(self.model, group):
            if (mask := self._masks.get(name)) is not None:
                kept += by_channel(mask, dim, member)
                of += by_channel(torch.ones_like(mask), dim, member)
        return torch.where(of > 0, kept / of.clamp(min=1), self._mean)
