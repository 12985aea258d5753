"""Tickets disturbed a little or a lot: how sensitive is a metric to the mask, and to the weights?

Each function returns another ticket, whose description says what was changed. The mask
of one ticket over the weights of another is `Ticket.with_weights`, and all mask entries of a layer
shuffled is `Ticket.shuffled` (Chen et al., arXiv 2012.06908, section 4).
"""

from dataclasses import replace

import torch
from torch import Tensor

from lth_plugins.errors import ConfigError
from lth_plugins.ticket.masks import Masks
from lth_plugins.ticket.ticket import Ticket


def swapped(ticket: Ticket, fraction: float, seed: int) -> Ticket:
    """Mask entries swapped inside their layer; every layer keeps its density.

    A random ``fraction`` of each layer's entries, kept and pruned alike, change places among
    themselves: 0 leaves the masks, and 1 is as random as `Ticket.shuffled`. The masks of the same
    seed and a smaller fraction are not a stage on the way to those of a larger one.

    Args:
        ticket: must know the weights that the new masks keep.
        fraction: in [0, 1].
        seed: the same one gives the same masks.

    Raises:
        ConfigError: if the fraction is invalid.
        TicketError: if the ticket does not know a weight that the new masks keep, as one that was
            read from a file.
    """
    if not 0 <= fraction <= 1:
        raise ConfigError(f"expected a fraction of mask entries in [0, 1], found {fraction}")
    generator = torch.Generator().manual_seed(seed)
    masks = {name: _swap(mask, fraction, generator) for name, mask in ticket.masks.items()}
    return ticket.with_masks(Masks(masks), {"swap": fraction, "swap_seed": seed})


def _swap(mask: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    moved = torch.randperm(mask.numel(), generator=generator)[: round(fraction * mask.numel())]
    places = moved[torch.randperm(len(moved), generator=generator)]
    swapped = mask.flatten().clone()
    swapped[places] = mask.flatten()[moved]
    return swapped.view_as(mask)


def unmasked(ticket: Ticket) -> Ticket:
    """Round 0 of the ticket's weights: all masks one, where what it prunes starts at zero.

    It stands for the dense network where only its architecture counts, as in a training from
    scratch, and the dense ticket is not at hand. What is pruned outside the trunk is left out.
    """
    meta = ticket.meta
    recipe = {**meta.recipe, "masks": "none"}
    return Ticket(
        Masks.ones(ticket.arch.prunable),
        ticket.sparse_weights(),
        replace(meta, round=0, parent=ticket.digest, recipe=recipe),
    )


def noisy(ticket: Ticket, strength: float, seed: int) -> Ticket:
    """Gaussian noise on the kept weights of every prunable layer; the masks stay.

    Args:
        ticket: the ticket.
        strength: standard deviation of the noise, relative to that of the layer's kept weights.
        seed: the same one gives the same noise, scaled.

    Raises:
        ConfigError: if the strength is negative or not finite.
    """
    if not 0 <= strength < float("inf"):
        raise ConfigError(f"expected a finite strength of at least 0, found {strength}")
    generator = torch.Generator().manual_seed(seed)
    weights = dict(ticket.weights)
    for name, mask in ticket.masks.items():
        kept = weights[name][mask]
        # A layer with a single weight, or none, has no spread to be relative to.
        spread = kept.std() if len(kept) > 1 else torch.zeros(())
        noise = torch.randn(len(kept), generator=generator) * (strength * spread)
        weights[name] = weights[name].masked_scatter(mask, kept + noise)
    recipe = {**ticket.meta.recipe, "noise": strength, "noise_seed": seed}
    meta = replace(ticket.meta, parent=ticket.digest, recipe=recipe)
    return replace(ticket, weights=weights, meta=meta)
