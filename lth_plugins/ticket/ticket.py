"""``Ticket`` (m, θ) and what it knows about itself. No I/O: `file` reads and writes tickets."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lth_plugins.ticket.arch import ARCHITECTURES, ResNet
from lth_plugins.ticket.dialects import State, zero_counters
from lth_plugins.ticket.errors import TicketError, UnknownWeights
from lth_plugins.ticket.masks import Masks
from lth_plugins.ticket.rest import Rest
from lth_plugins.ticket.trunk import read_trunk, to_torchvision


@dataclass(frozen=True)
class InputSpec:
    """What the network wants to be fed: ``(pixel - mean) / std`` with pixels in [0, 1].

    Attributes:
        format: order of the channels, "RGB" or "BGR".
        mean: per channel, in the order of ``format``.
        std: per channel, in the order of ``format``.
    """

    format: str = "RGB"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            given = getattr(self, name)
            try:
                values = tuple(float(v) for v in given)
            except (TypeError, ValueError, OverflowError):
                values = ()
            finite = len(values) == 3 and all(map(math.isfinite, values))
            if not finite or (name == "std" and min(values) <= 0):
                raise TicketError(
                    f"expected input.{name} to be three {'positive ' * (name == 'std')}numbers, "
                    f"found {given!r:.60}"
                )
            object.__setattr__(self, name, values)
        if self.format not in ("RGB", "BGR"):
            raise TicketError(f"expected input.format to be 'RGB' or 'BGR', found {self.format!r}")

    @property
    def mean_255(self) -> tuple[float, ...]:
        """The mean for pixels in [0, 255], as detectron2 and mmseg configs state it."""
        return tuple(round(255 * v, 6) for v in self.mean)

    @property
    def std_255(self) -> tuple[float, ...]:
        """The standard deviation for pixels in [0, 255]."""
        return tuple(round(255 * v, 6) for v in self.std)

    def is_fed(self, format: str, mean: Sequence[float], std: Sequence[float]) -> bool:
        """Whether pixels in [0, 255] prepared like this are what the network wants.

        Args:
            format: order of the channels.
            mean: per channel, for pixels in [0, 255]; equal to a hundredth of a grey level.
            std: likewise.
        """
        found, wanted = (*mean, *std), self.mean_255 + self.std_255
        return (
            format == self.format
            and len(found) == len(wanted)
            and all(math.isclose(a, b, abs_tol=0.01) for a, b in zip(found, wanted, strict=True))
        )


IMAGENET = InputSpec()
UNIT_RANGE = InputSpec(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
"""RGB in [0, 1] without normalisation: Google's simCLR weights."""


@dataclass(frozen=True)
class TicketMeta:
    """Where a ticket comes from and how to feed it.

    Attributes:
        arch: the architecture, by torchvision's or timm's name; one of `arch.ARCHITECTURES`.
        source: the pre-training it was found in ("imagenet", "moco", "simclr", a task, …).
        round: how often it was pruned, k; 0 is dense, or sparse from elsewhere.
        input: channel order and normalisation the weights were trained with.
        recipe: how it was made: JSON-serialisable, no times or paths, so that the same run gives
            the same file.
        parent: digest of the ticket it was made from.
        stride_in_1x1: whether a bottleneck's stride sits in its first 1x1 convolution (Caffe and
            the original ResNet) instead of in the 3x3 (torchvision). Shapes cannot show it.
    """

    arch: str
    source: str = "unknown"
    round: int = 0
    input: InputSpec = IMAGENET
    recipe: Mapping[str, Any] = field(default_factory=dict)
    parent: str | None = None
    stride_in_1x1: bool = False

    def __post_init__(self) -> None:
        for name, (kind, words) in _KINDS.items():
            if not isinstance(getattr(self, name), kind):
                raise TicketError(
                    f"expected {name} of a ticket's description to be {words}, found "
                    f"{getattr(self, name)!r:.60}"
                )
        if self.arch not in ARCHITECTURES:
            raise TicketError(
                f"unknown architecture {self.arch!r}; known are {', '.join(ARCHITECTURES)}"
            )
        for name in ("source", "parent"):
            text = getattr(self, name)
            if text is not None and not text.isprintable():
                raise TicketError(f"expected {name} to be one line of text, found {text!r:.60}")
        try:
            frozen = json.loads(json.dumps(dict(self.recipe), sort_keys=True, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise TicketError(f"the recipe must be JSON-serialisable: {error}") from None
        object.__setattr__(self, "recipe", frozen)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        spec = self.input
        return {
            "arch": self.arch,
            "source": self.source,
            "round": self.round,
            "input": {"format": spec.format, "mean": list(spec.mean), "std": list(spec.std)},
            "recipe": dict(self.recipe),
            "parent": self.parent,
            "stride_in_1x1": self.stride_in_1x1,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "TicketMeta":
        """The inverse of `to_dict`.

        Raises:
            TicketError: if a field is unknown, missing or of the wrong type.
        """
        if not isinstance(data, Mapping) or set(data) != set(_KINDS):
            raise TicketError(f"expected the fields {', '.join(_KINDS)} in a ticket's description")
        try:
            spec = InputSpec(**data["input"])
        except TypeError as error:  # no mapping, too
            raise TicketError(f"the ticket's input description is not one: {error}") from None
        return cls(**{**data, "input": spec})


# A file holds nothing else, so that what can be written can be read.
_KINDS: Mapping[str, tuple[type | tuple[type, ...], str]] = MappingProxyType(
    {
        "arch": (str, "a name"),
        "source": (str, "text"),
        "round": (int, "a whole number"),
        "input": (InputSpec, "an InputSpec"),
        "recipe": (Mapping, "a mapping"),
        "parent": ((str, type(None)), "a digest or None"),
        "stride_in_1x1": (bool, "True or False"),
    }
)


class Owned(dict[str, Tensor]):
    """A trunk's weights, as a `Ticket` has them, that nobody else has: it need not copy them."""


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
        rest: what is pruned outside the trunk, in the neck and heads of one host's model. Sparsity
            and density do not count it.

    Raises:
        TicketError: if masks, weights and architecture do not belong together, or a weight is not
            finite.
    """

    masks: Masks
    weights: Mapping[str, Tensor]
    meta: TicketMeta
    known: Masks | None = field(default=None, repr=False)
    rest: Rest = field(default_factory=Rest)

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
        both = self.arch.shapes.keys() & self.rest.masks.keys()
        if both:
            raise TicketError(f"{min(both)} is in the trunk, and cannot be outside it as well")

    def _checked_weights(self) -> dict[str, Tensor]:
        if set(self.weights) == set(self.arch.shapes):
            found = self.arch
            state: State = self.weights
            wrong = [n for n, s in found.shapes.items() if tuple(state[n].shape) != s]
            if wrong:
                raise TicketError(
                    f"{wrong[0]} has shape {tuple(state[wrong[0]].shape)}, "
                    f"expected {found.shapes[wrong[0]]} in {found.name}"
                )
        else:
            found, state = to_torchvision(self.weights)
        if found is not self.arch:
            raise TicketError(
                f"the ticket's description says {self.arch.name}, but the weights are a "
                f"{found.name}'s: name that architecture, or give the other weights"
            )
        weights = {}
        counters = zero_counters(found)
        copy = not isinstance(self.weights, Owned)
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
            TicketError: if no known layout fits, the trunk holds more than a plain ResNet's, or it
                has no weights yet (on the meta device).
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
        )
        return cls(Masks.ones(trunk.arch.prunable), trunk.weights, meta)

    @classmethod
    def load(cls, ref: str | PathLike[str]) -> "Ticket":
        """Read a ticket: a path, a name in the `TicketCatalog`, or
        ``hf://owner/repo[/file][@sha256:…]``.

        Raises:
            TicketError: if there is none, it is damaged, or it is not the one that is pinned.
        """
        from lth_plugins.ticket.catalog import TicketCatalog

        return TicketCatalog.load(ref)

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the ticket to a file, all or nothing, and return its path.

        Only surviving weights are stored: a ticket is as small as it is sparse.

        Raises:
            TicketError: if the folder cannot be written to; an older file is still intact then.
        """
        from lth_plugins.ticket.file import write

        return write(self, Path(path))

    @property
    def arch(self) -> ResNet:
        return ARCHITECTURES[self.meta.arch]

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
        """The masks of the trunk and of the `rest`, which names no parameter of the trunk."""
        return Masks({**self.masks, **self.rest.masks}) if self.rest else self.masks

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content: description, masks, surviving weights, stem and normalisation."""
        from lth_plugins.ticket.file import digest

        return digest(self)

    def sparse_weights(self) -> dict[str, Tensor]:
        """A copy of the trunk's state dict with every pruned weight at zero."""
        return {
            name: value.masked_fill(~self.masks[name], 0) if name in self.masks else value.clone()
            for name, value in self.weights.items()
        }

    def with_weights(self, weights: "State | Ticket") -> "Ticket":
        """These masks over other weights: (m, θ').

        Args:
            weights: a trunk's state dict in any known dialect (of a ticket with a `rest`, that of
                the whole model), or a ticket whose θ to take; the result is fed as that ticket is.
                One without a rest leaves this one's as it is.

        Raises:
            TicketError: if the weights do not fit the architecture, or a ticket given does not
                know all the weights these masks keep.
        """
        meta = replace(self.meta, parent=self.digest)
        if not isinstance(weights, Ticket):
            rest = Rest(self.rest.masks, weights)
            return Ticket(self.masks, weights, meta, rest=rest)
        meta = replace(
            meta,
            input=weights.meta.input,
            stride_in_1x1=weights.meta.stride_in_1x1,
            recipe={**meta.recipe, "weights": weights.digest},
        )
        rest = self.rest.with_weights(weights.rest) if weights.rest else self.rest
        return Ticket(self.masks, weights.weights, meta, weights.known, rest)

    def with_masks(self, masks: Masks, recipe: Mapping[str, Any]) -> "Ticket":
        """Other masks over these weights: (m', θ), with ``recipe`` added to the description.

        Args:
            masks: of the trunk, and of the `rest` unless that is to keep its own.
            recipe: how they were made.

        Raises:
            TicketError: if the masks keep a weight this ticket does not know.
        """
        meta = replace(self.meta, parent=self.digest, recipe={**self.meta.recipe, **recipe})
        others = {n: mask for n, mask in masks.items() if self.rest and n not in self.masks}
        trunk = Masks({name: mask for name, mask in masks.items() if name not in others})
        rest = self.rest.with_masks(Masks(others)) if others else self.rest
        return replace(self, masks=trunk, meta=meta, rest=rest)

    def without_rest(self) -> "Ticket":
        """The trunk alone, for another host or task."""
        return replace(self, rest=Rest()) if self.rest else self

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
        return Ticket, (self.masks, dict(self.weights), self.meta, self.known, self.rest)

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
            f"Ticket({meta.arch}, {meta.source}, {found}"
            f"{100 * self.sparsity:.2f} % sparse, {self.digest[:12]})"
        )
