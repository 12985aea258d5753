"""`TicketMeta`: what a ticket knows about itself; `InputSpec`: the input its network expects."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lth_plugins.errors import TicketError
from lth_plugins.ticket.arch import ARCHITECTURES, ResNet, slimmed


@dataclass(frozen=True)
class InputSpec:
    """The input a network expects: ``(pixel - mean) / std`` with pixels in [0, 1].

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


IMAGENET = InputSpec()
UNIT_RANGE = InputSpec(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
"""RGB in [0, 1] without normalisation: Google's simCLR weights."""


def _kind(kind: type | tuple[type, ...], words: str) -> Mapping[str, Any]:
    """The type that a field has, and what a message calls it. A file holds nothing else."""
    return {"kind": kind, "words": words}


_FIRST = frozenset(("arch", "source", "round", "input", "recipe", "parent", "stride_in_1x1"))
"""The fields that every ticket states. One that was added later is stated only where it is not
empty, so that the digests and bytes of older tickets stay."""


@dataclass(frozen=True)
class TicketMeta:
    """Where a ticket comes from, and the input that its network expects.

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
        widths: of a slimmed trunk, as `ResNet.widths`.
    """

    arch: str = field(metadata=_kind(str, "a name"))
    source: str = field(default="unknown", metadata=_kind(str, "text"))
    round: int = field(default=0, metadata=_kind(int, "a whole number"))
    input: InputSpec = field(default=IMAGENET, metadata=_kind(InputSpec, "an InputSpec"))
    recipe: Mapping[str, Any] = field(default_factory=dict, metadata=_kind(Mapping, "a mapping"))
    parent: str | None = field(default=None, metadata=_kind((str, type(None)), "a digest or None"))
    stride_in_1x1: bool = field(default=False, metadata=_kind(bool, "True or False"))
    widths: Mapping[str, int] = field(
        default_factory=dict, metadata=_kind(Mapping, "a mapping of names to numbers")
    )

    def __post_init__(self) -> None:
        for entry in fields(self):
            if not isinstance(getattr(self, entry.name), entry.metadata["kind"]):
                raise TicketError(
                    f"expected {entry.name} of a ticket's description to be "
                    f"{entry.metadata['words']}, found {getattr(self, entry.name)!r:.60}"
                )
        if self.arch not in ARCHITECTURES:
            raise TicketError(
                f"unknown architecture {self.arch!r}; known are {', '.join(ARCHITECTURES)}"
            )
        try:
            widths = ARCHITECTURES[self.arch].slimmed(self.widths).widths
            object.__setattr__(self, "widths", dict(widths))
        except ValueError as error:
            raise TicketError(
                f"expected widths of a slimmed trunk, found {error}: the description is damaged"
            ) from None
        for name in ("source", "parent"):
            text = getattr(self, name)
            if text is not None and not text.isprintable():
                raise TicketError(f"expected {name} to be one line of text, found {text!r:.60}")
        try:
            frozen = json.loads(json.dumps(dict(self.recipe), sort_keys=True, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise TicketError(f"the recipe must be JSON-serialisable: {error}") from None
        object.__setattr__(self, "recipe", frozen)

    @property
    def resnet(self) -> ResNet:
        """The architecture, with the widths."""
        whole = ARCHITECTURES[self.arch]
        return slimmed(whole, tuple(self.widths.items())) if self.widths else whole

    def to_dict(self) -> dict[str, Any]:
        """The description as plain JSON types: what a file stores, and a digest is taken of."""
        stated = {
            entry.name: getattr(self, entry.name)
            for entry in fields(self)
            if entry.name in _FIRST or getattr(self, entry.name)
        }
        spec = self.input
        spelled = {"format": spec.format, "mean": list(spec.mean), "std": list(spec.std)}
        return {**stated, "input": spelled, "recipe": dict(self.recipe)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "TicketMeta":
        """The inverse of `to_dict`; what is not stated has its default.

        Raises:
            TicketError: if a field is unknown, missing or of the wrong type.
        """
        known = {entry.name for entry in fields(cls)}
        if not isinstance(data, Mapping) or not set(data) >= _FIRST:
            raise TicketError(
                f"expected the fields {', '.join(sorted(_FIRST))} in a ticket's description"
            )
        if unknown := set(data) - known:
            raise TicketError(
                f"unknown field {min(unknown)!r:.60} in a ticket's description: a newer release "
                "wrote it, so upgrade lth_plugins"
            )
        try:
            spec = InputSpec(**data["input"])
        except TypeError as error:  # no mapping, too
            raise TicketError(f"the ticket's input description is invalid: {error}") from None
        return cls(**{**data, "input": spec})
