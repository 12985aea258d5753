"""`TicketMeta`: what a ticket knows about itself, and `InputSpec`, how its network is fed."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from lth_plugins.errors import TicketError
from lth_plugins.ticket.arch import ARCHITECTURES


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
