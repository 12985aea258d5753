"""`Ticket` (m, θ): masks, weights and their description. `file` knows how one is stored."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lth_plugins.errors import TicketError, UnknownWeights
from lth_plugins.ticket.arch import ARCHITECTURES, ResNet
from lth_plugins.ticket.catalog import TicketCatalog
from lth_plugins.ticket.counts import Counts
from lth_plugins.ticket.dialects import zero_counters
from lth_plugins.ticket.keys import State
from lth_plugins.ticket.masks import Masks
from lth_plugins.ticket.meta import IMAGENET, InputSpec, TicketMeta
from lth_plugins.ticket.outside import Outside
from lth_plugins.ticket.trunk import read_trunk

if TYPE_CHECKING:
    from lth_plugins.ticket.file import Array, Content


def _tensors(arrays: "Mapping[str, Array]") -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _arrays(tensors: Mapping[str, Tensor]) -> "dict[str, Array]":
    return {name: tensor.numpy() for name, tensor in tensors.items()}


class _Owned(dict[str, Tensor]):
    """A trunk's weights that a `Ticket` takes ownership of; it does not copy them."""


@dataclass(frozen=True, eq=False)
class Ticket:
    """A ticket (m, θ): masks over the prunable weights of a ResNet trunk, and the weights.

    Args:
        masks: one mask for every prunable weight, by torchvision name.
        weights: the trunk's state dict, BN statistics included, in any known dialect; a classifier
            in it is left out. Copied, to the CPU, in float32.
        meta: where it comes from.
        known: where θ is known. A ticket that was read from a file knows only its surviving
            weights; everything is known by default.
        outside: what is pruned outside the trunk, in the neck and heads of one host's model.
            Sparsity and density do not count it.

    Raises:
        TicketError: if masks, weights and architecture do not belong together, or a weight is not
            finite.
    """

    masks: Masks
    weights: Mapping[str, Tensor]
    meta: TicketMeta
    known: Masks | None = field(default=None, repr=False)
    outside: Outside = field(default_factory=Outside)

    def __post_init__(self) -> None:
        masks = self.masks if isinstance(self.masks, Masks) else Masks(self.masks)
        object.__setattr__(self, "masks", masks)
        masks.check_shapes(self.arch.prunable, self.arch.name)
        object.__setattr__(self, "weights", MappingProxyType(self._checked_weights()))
        if self.known is not None and not masks.issubset(self.known):
            raise UnknownWeights(
                "these masks keep weights that the ticket does not know: a ticket file stores "
                "only surviving weights. Give it all of θ first, for example "
                "ticket.with_weights(dense), where dense is the dense ticket it was pruned from"
            )
        both = self.arch.shapes.keys() & self.outside.masks.keys()
        if both:
            raise TicketError(f"{min(both)} is in the trunk, and cannot be outside it as well")

    def _checked_weights(self) -> dict[str, Tensor]:
        if set(self.weights) == set(self.arch.shapes):
            found = self.arch
            state: State = self.weights
            stem = tuple(state[next(iter(found.shapes))].shape)
            if found.is_stem(stem):
                self._check_channels(stem[1])
            wrong = [n for n, s in found.shapes.items() if tuple(state[n].shape) != s]
            if wrong:
                raise TicketError(
                    f"{wrong[0]} has shape {tuple(state[wrong[0]].shape)}, "
                    f"expected {found.shapes[wrong[0]]} in {found.name}"
                )
        else:
            trunk = read_trunk(self.weights, archs=(self.arch, *ARCHITECTURES.values()))
            found, state = trunk.arch, trunk.weights
            if found == self.arch.reading(found.channels):
                self._check_channels(found.channels)
        if found != self.arch.reading(found.channels):
            raise TicketError(
                f"the ticket's description says {self.arch.title}, but the weights are a "
                f"{found.title}'s: name that architecture, or give the other weights"
            )
        weights = {}
        counters = zero_counters(found)
        copy = not isinstance(self.weights, _Owned)
        for name in found.shapes:
            value = state[name] if name in state else counters[name]
            value = value.detach()
            if not name.endswith("num_batches_tracked"):
                value = value.to(device="cpu", dtype=torch.float32, copy=copy).contiguous()
                # The sum is four times as fast, and finite unless a weight is not, or it overflows.
                if not bool(torch.isfinite(value.sum()) or torch.isfinite(value).all()):
                    raise TicketError(
                        f"{name} holds a weight that is not finite: its training has "
                        "diverged. Take an earlier checkpoint, or a copy that is whole"
                    )
            else:
                value = value.to(device="cpu", dtype=torch.long, copy=copy)
            weights[name] = value
        return weights

    def _check_channels(self, found: int) -> None:
        """Refuse weights for images of other channels than the description's input has."""
        spec = self.meta.input
        if found != spec.channels:
            raise TicketError(
                f"expected weights that read {spec.label}, as the ticket's input says, found a "
                f"stem that reads {found}: give the input that they were trained on, such as "
                f"input=InputSpec('{found} bands', mean=…, std=…)"
            )

    @classmethod
    def dense(
        cls,
        model_or_state: nn.Module | State,
        source: str = "unknown",
        input: InputSpec = IMAGENET,
        recipe: Mapping[str, Any] | None = None,
    ) -> "Ticket":
        """Round 0: all masks one over the weights of a model or state dict in any known dialect.

        Weights that masks in the state dict prune are zeros then, which train.

        Raises:
            TicketError: if no known layout fits, the trunk holds more than a plain ResNet's, reads
                other channels than the input has, or has no weights yet (on the meta device).
        """
        trunk = read_trunk(model_or_state)
        for name, value in trunk.weights.items():
            if value.is_meta:
                raise TicketError(
                    f"expected weights, found {trunk.layout.keys.get(name, name)} without data, on "
                    "the meta device: load the model's weights first"
                )
        meta = TicketMeta(
            *(trunk.arch.name, source, 0, input, recipe or {}),
            stride_in_1x1=bool(trunk.stride_in_1x1),
            widths=dict(trunk.arch.widths),
        )
        return cls(Masks.ones(trunk.arch.prunable), trunk.weights, meta)

    @classmethod
    def load(cls, ref: str | PathLike[str]) -> "Ticket":
        """Read a ticket: a path, a name in the `TicketCatalog`, or
        ``hf://owner/repo[/file][@sha256:…]``.

        Raises:
            TicketError: if there is none, it is damaged, or it is not the one that is pinned.
        """
        from lth_plugins.ticket.file import read  # whose packages only files need

        source = TicketCatalog.find(ref)
        if not isinstance(source, Path):
            return source()
        content = read(source)
        masks, outside_masks = (
            Masks.adopt(_tensors(arrays)) for arrays in (content.masks, content.outside_masks)
        )
        outside = Outside(outside_masks, _tensors(content.outside_weights), outside_masks)
        weights = _Owned(_tensors(content.weights))
        ticket = cls(masks, weights, content.meta, masks, outside)
        ticket.__dict__["digest"] = content.digest  # just checked: spares computing it again
        return ticket

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the ticket to a file, atomically, and return its path.

        Only surviving weights are stored: a ticket is as small as it is sparse.

        Raises:
            RunError: if the folder cannot be written to; an older file is still intact then.
        """
        from lth_plugins.ticket.file import write

        write(self.content, Path(path))
        return Path(path)

    @property
    def arch(self) -> ResNet:
        return self.meta.network

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable weights that is pruned."""
        return self.masks.sparsity

    @property
    def density(self) -> float:
        """Fraction of the prunable weights that is kept."""
        return self.masks.density

    @property
    def all_masks(self) -> Masks:
        """The masks of the trunk and of what is `outside` it."""
        return Masks({**self.masks, **self.outside.masks}) if self.outside else self.masks

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content: description, masks, surviving weights, stem and normalisation."""
        return self.content.digest

    @property
    def content(self) -> "Content":
        """The parts, as a file stores them; the digest is known if it is here."""
        from lth_plugins.ticket.file import Content

        outside = self.outside
        content = Content(
            *(self.meta, _arrays(self.masks), _arrays(self.weights)),
            *(_arrays(outside.masks), _arrays(outside.weights)),
        )
        if "digest" in self.__dict__:
            content.__dict__["digest"] = self.digest
        return content

    @property
    def counts(self) -> Counts:
        """How many weights of the trunk are kept, by parameter."""
        return self.masks.counts

    @property
    def outside_counts(self) -> Counts:
        """How many weights outside the trunk are kept, by parameter."""
        return self.outside.masks.counts

    def sparse_weights(self) -> dict[str, Tensor]:
        """A copy of the trunk's state dict with every pruned weight at zero."""
        return {
            name: value.masked_fill(~self.masks[name], 0) if name in self.masks else value.clone()
            for name, value in self.weights.items()
        }

    def with_weights(self, weights: "State | Ticket") -> "Ticket":
        """These masks over other weights: (m, θ').

        Args:
            weights: a trunk's state dict in any known dialect (of a ticket with an
                `outside`, that of the whole model), or a ticket whose θ and input to use. One
                that prunes nothing outside the trunk leaves this one's outside as it is.

        Raises:
            TicketError: if the weights do not fit the architecture, or a ticket given does not
                know all the weights these masks keep.
        """
        meta = replace(self.meta, parent=self.digest)
        if not isinstance(weights, Ticket):
            outside = Outside(self.outside.masks, weights)
            return Ticket(self.masks, weights, meta, outside=outside)
        meta = replace(
            meta,
            input=weights.meta.input,
            stride_in_1x1=weights.meta.stride_in_1x1,
            recipe={**meta.recipe, "weights": weights.digest},
        )
        outside = self.outside.with_weights(weights.outside) if weights.outside else self.outside
        return Ticket(self.masks, weights.weights, meta, weights.known, outside)

    def with_masks(self, masks: Masks, recipe: Mapping[str, Any]) -> "Ticket":
        """Other masks over these weights: (m', θ), with ``recipe`` added to the description.

        Args:
            masks: of the trunk, and of the `outside` unless that is to keep its own.
            recipe: how they were made.

        Raises:
            TicketError: if the masks keep a weight this ticket does not know.
        """
        meta = replace(self.meta, parent=self.digest, recipe={**self.meta.recipe, **recipe})
        others = {n: mask for n, mask in masks.items() if self.outside and n not in self.masks}
        trunk = Masks({name: mask for name, mask in masks.items() if name not in others})
        outside = self.outside.with_masks(Masks(others)) if others else self.outside
        return replace(self, masks=trunk, meta=meta, outside=outside)

    def without_outside(self) -> "Ticket":
        """The trunk alone, for another host or task."""
        return replace(self, outside=Outside()) if self.outside else self

    def reversed(self) -> "Ticket":
        """What the ticket left out: (1 - m, θ).

        Raises:
            TicketError: if the pruned weights are not known, as in a ticket read from a file.
        """
        return self.with_masks(~self.all_masks, {"masks": "reversed"})

    def shuffled(self, seed: int) -> "Ticket":
        """A random ticket of the same layer-wise densities: (random m, θ).

        Raises:
            TicketError: if the pruned weights are not known, as in a ticket read from a file.
        """
        masks = self.all_masks.shuffled(seed)
        return self.with_masks(masks, {"masks": "random", "masks_seed": seed})

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        # timm keeps what a model was made of on it, to be copied; a mapping proxy cannot be.
        return Ticket, (self.masks, dict(self.weights), self.meta, self.known, self.outside)

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, Ticket) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        meta = self.meta
        dense = self.masks.kept == self.masks.numel
        # A sparse model from elsewhere has no round, and round 0 would say that it is dense.
        found = f"round {meta.round}, " if dense or meta.round > 0 else ""
        return (
            f"Ticket({self.arch.title}, {meta.source}, {found}"
            f"{100 * self.sparsity:.2f} % sparse, {self.digest[:12]})"
        )
