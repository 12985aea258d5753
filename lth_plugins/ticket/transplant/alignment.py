"""Aligning two networks: a network's channels have no order, so masks of two seeds have none, too.

A mask found in one network fits another once its channels are permuted as the other's are (arXiv
2505.05143), and the likeness of two masks is that of the permuted ones.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lth_plugins.errors import TicketError
from lth_plugins.ticket.arch import ResNet
from lth_plugins.ticket.keys import State
from lth_plugins.ticket.masks import Masks
from lth_plugins.ticket.meta import COLOURS
from lth_plugins.ticket.ticket import Ticket
from lth_plugins.ticket.transplant.matching import (
    Match,
    match_activations,
    match_weights,
    permuted_by,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Alignment:
    """The orders in which the channels of a source network are those of a target.

    Attributes:
        arch: of both networks.
        match: the order of each width, and how alike the networks are.
        between: the digests of the two networks' tickets, source and target.
    """

    arch: ResNet
    match: Match
    between: tuple[str, str]

    @property
    def moved(self) -> float:
        """The fraction of the channels that change places."""
        places = [(order != order.sort().values).float() for order in self.match.orders.values()]
        return float(sum(p.sum() for p in places) / sum(len(p) for p in places))

    def permuted(self, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks, or weights, of the source's trunk with their channels in the target's order.

        A network of permuted weights computes the same, its last features in the target's order.

        Raises:
            TicketError: if one has another shape than the architecture.
        """
        for name, value in entries.items():
            if tuple(value.shape) != self.arch.shapes.get(name):
                raise TicketError(
                    f"expected {name} of a {self.arch.title}, which was aligned, found "
                    f"{tuple(value.shape)}: align with the network that it is of"
                )
        return permuted_by(self.match.orders, self.arch.coupled, entries)

    def masks(self, masks: Masks) -> Masks:
        """Masks of the source, in the target's order."""
        return Masks.adopt(self.permuted(masks))

    @property
    def recipe(self) -> dict[str, Any]:
        """What the description of an aligned ticket adds to the recipe."""
        source, target = self.between
        return {"aligned": {"by": self.match.by, "source": source, "target": target}}


def align(source: Ticket, target: Ticket, images: tuple[Tensor, Tensor] | None = None) -> Alignment:
    """Find the order in which the channels of one network are those of another.

    What counts is θ: give dense tickets, whose masks came of it. Of a ticket that was read from a
    file, weights that it prunes are zeros. `scipy` assigns.

    Args:
        source: the network to permute.
        target: the network that keeps its order.
        images: the same for both, [N, channels, H, W] each, normalised as either's input says; the
            channels are then matched by activations. None matches weights.

    Raises:
        TicketError: if the networks are not of one architecture, its channels have no order of
            their own (ResNeXt), or weights are matched that read other bands.
        RunError: if there are too few images, or scipy is not installed.
    """
    arch = target.arch
    if source.arch != arch:
        raise TicketError(
            "expected two networks of one architecture and one width to align, found "
            f"{_described(source.arch)} and {_described(arch)}: their channels cannot be matched"
        )
    if arch.groups > 1:
        raise TicketError(
            f"the channels of a {arch.name} cannot be aligned: its 3x3 convolutions have "
            f"{arch.groups} groups, which keep channels together"
        )
    for ticket in (source, target):
        if ticket.known is not None and ticket.known.density < 1:
            logger.info(
                "Of %r only the surviving weights are known, and aligned: dense tickets say more",
                ticket,
            )
    if images is None:
        match = match_weights(_read_as(target, source), target.weights, arch)
    else:
        shapes = [tuple(batch.shape) for batch in images]
        if shapes[0] != shapes[1] or len(shapes[0]) != 4 or shapes[0][1] != arch.channels:
            raise TicketError(
                f"expected the same images for both networks, [N, {arch.channels}, height, width], "
                f"found {shapes[0]} and {shapes[1]}"
            )
        match = match_activations(source, target, images, arch)
    return Alignment(arch, match, (source.digest, target.digest))


def _read_as(target: Ticket, source: Ticket) -> State:
    """The weights of a network as those that read images with the channels of another's."""
    formats = [ticket.meta.input.format for ticket in (source, target)]
    if formats[0] == formats[1]:
        return source.weights
    if not set(formats) <= set(COLOURS):
        raise TicketError(
            "expected two networks that read the same channels in the same order to compare their "
            f"weights, found {source.meta.input.label} and {target.meta.input.label}: give images, "
            "to compare activations"
        )
    stem = next(iter(source.arch.shapes))
    return {**source.weights, stem: source.weights[stem].flip(1)}


def _described(arch: ResNet) -> str:
    return f"{arch.description} for {arch.channels} channels"
