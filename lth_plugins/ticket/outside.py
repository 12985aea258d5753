"""`Outside`: what a ticket prunes outside the trunk, in the neck and heads of one host's model.

Sparsity is counted over the trunk alone; this is kept beside it, under the names that the host's
whole model has for it. Biases, normalisation and what is not pruned are no part of a ticket.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lth_plugins.errors import TicketError, UnknownWeights
from lth_plugins.ticket.arch import Shape
from lth_plugins.ticket.masks import Masks
from lth_plugins.ticket.shapes import check_outside_shapes


@dataclass(frozen=True, eq=False)
class Outside:
    """Masks and weights of convolutions and linear layers outside the trunk; empty by default.

    Attributes:
        masks: by the name of the parameter in the host's whole model, which ends in ``.weight``.
        weights: likewise; copied, as float32 on the CPU.
        known: as `Ticket.known`.

    Raises:
        TicketError: if a weight is missing, misshapen or not finite, or there are too many.
    """

    masks: Masks = field(default_factory=lambda: Masks({}))
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    known: Masks | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        masks = self.masks if isinstance(self.masks, Masks) else Masks(self.masks)
        object.__setattr__(self, "masks", masks)
        check_outside_shapes(self.shapes)
        weights = {name: self._checked(name) for name in masks}
        object.__setattr__(self, "weights", MappingProxyType(weights))
        if self.known is not None and not masks.issubset(self.known):
            raise UnknownWeights(
                "these masks keep weights outside the trunk that the ticket does not know: a "
                "ticket file stores only surviving weights. Give it all of θ first"
            )

    def _checked(self, name: str) -> Tensor:
        value = self.weights.get(name)
        if value is None or value.shape != self.masks[name].shape:
            raise TicketError(
                f"expected a weight of shape {tuple(self.masks[name].shape)} for {name}, found "
                f"{'none' if value is None else tuple(value.shape)}: give the state dict of the "
                "whole model that the ticket was found in, or ticket.without_outside()"
            )
        value = value.detach().to(device="cpu", dtype=torch.float32, copy=True).contiguous()
        if not bool(torch.isfinite(value).all()):
            raise TicketError(f"{name} holds a weight that is not finite")
        return value

    @classmethod
    def dense(cls, shapes: Mapping[str, Shape], state: Mapping[str, Tensor]) -> "Outside":
        """All masks one over these parameters of a state dict."""
        return cls(Masks.ones(shapes), state)

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: tuple(mask.shape) for name, mask in self.masks.items()}

    def with_masks(self, masks: Masks) -> "Outside":
        """Other masks over these weights."""
        if {name: tuple(mask.shape) for name, mask in masks.items()} != self.shapes:
            raise TicketError(
                f"expected masks of the {len(self.masks)} parameters outside the trunk that this "
                f"ticket prunes, or of none of them, found {len(masks)}, or other shapes"
            )
        return replace(self, masks=Masks({name: masks[name] for name in self.masks}))

    def with_weights(self, other: "Outside") -> "Outside":
        """These masks over another's weights."""
        known = other.known and Masks({n: other.known[n] for n in self.masks if n in other.known})
        return Outside(self.masks, other.weights, known)

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        # It may ride on a model that is copied, and a mapping proxy cannot be.
        return Outside, (self.masks, dict(self.weights), self.known)

    def __bool__(self) -> bool:
        return len(self.masks) > 0
