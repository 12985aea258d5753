"""Small networks for tests of transplants: narrow ones, and copies in another order."""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

import lth_plugins as lth
from lth_plugins.ticket.arch import ARCHITECTURES
from lth_plugins.ticket.transplant import Alignment
from lth_plugins.ticket.transplant.matching import Match

NARROW = 8  # channels of each width, so that an alignment takes a tenth of a second


def network(name: str, seed: int, width: int = NARROW, **meta: object) -> lth.Ticket:
    """A narrow network of random weights, whose channels are not alike."""
    widths = dict.fromkeys(ARCHITECTURES[name].coupled, width)
    described = lth.TicketMeta(name, f"seed {seed}", widths=widths, **meta)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for entry, shape in described.network.shapes.items():
        value = torch.randn(shape, generator=generator)
        if len(shape) == 4:
            value -= value.mean((1, 2, 3), keepdim=True)  # or many channels would be dead
            value /= math.prod(shape[1:]) ** 0.5
        positive = len(shape) == 1 and entry.endswith(("weight", "running_var"))
        weights[entry] = 0.3 * value.abs() + 0.5 if positive else value
        if entry.endswith("bias"):
            weights[entry] = value.abs() + 3
    return lth.Ticket(lth.Masks.ones(described.network.prunable), weights, described)


def shuffled(ticket: lth.Ticket, seed: int = 0) -> tuple[lth.Ticket, Mapping[str, Tensor]]:
    """A copy of a network that computes the same with its channels in another order; the order."""
    generator = torch.Generator().manual_seed(seed)
    orders = {
        width: torch.randperm(ticket.arch.shapes[entry][axis], generator=generator)
        for width, axes in ticket.arch.coupled.items()
        for entry, axis in list(axes.items())[:1]
    }
    permuted = Alignment(ticket.arch, Match(orders, "hand", 0, 1), ("", "")).permuted(
        ticket.weights
    )
    return replace(ticket, weights=permuted), orders
