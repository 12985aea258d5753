"""`TicketMeta`: what a ticket knows about itself; `InputSpec`: the input its network expects."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lth_plugins.errors import TicketError
from lth_plugins.ticket.arch import ARCHITECTURES, ResNet, variant

COLOURS = ("RGB", "BGR")
"""The orders of channels that photographs are read in; every other format is one of bands."""

MOST_CHANNELS = 1024
"""Of an image; hyperspectral sensors have some hundreds."""

_EIGHT_BITS = 255.0


@dataclass(frozen=True)
class InputSpec:
    """The input a network expects: ``(pixel / scale - mean) / std``.

    Attributes:
        format: the channels in their order: "RGB" or "BGR"; or bands, as their names
            ("B4,B3,B2,B8", "grey") or as their number ("13 bands").
        mean: per channel, in the order of ``format``.
        std: per channel, in the order of ``format``.
        scale: what pixels are divided by first: 255 for images of 8 bits, so that mean and std are
            of pixels in [0, 1]; 1 where they are of the values as a sensor's files hold them.

    Raises:
        TicketError: if there is not one finite number for each channel, or a std or the scale is
            not positive.
    """

    format: str = "RGB"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    scale: float = _EIGHT_BITS

    def __post_init__(self) -> None:
        count = self.channels_of(self.format)
        for name in ("mean", "std"):
            given = getattr(self, name)
            values = _numbers(given)
            if len(values) != count or (name == "std" and min(values) <= 0):
                raise TicketError(
                    f"expected input.{name} to be {'three' if count == 3 else count} "
                    f"{'positive ' * (name == 'std')}number{'s' * (count > 1)}, one for each "
                    f"channel of {self.format!r:.60}, found {given!r:.60}"
                )
            object.__setattr__(self, name, values)
        scale = _numbers([self.scale])
        if not scale or scale[0] <= 0:
            raise TicketError(
                f"expected input.scale to be a positive number, found {self.scale!r:.60}"
            )
        object.__setattr__(self, "scale", scale[0])

    @property
    def channels(self) -> int:
        """How many channels an image has."""
        return len(self.mean)

    @staticmethod
    def channels_of(format: Any) -> int:
        """How many channels a format names.

        Raises:
            TicketError: if it names none, or more than `MOST_CHANNELS`.
        """
        if format in COLOURS:
            return 3
        names = format.split(",") if isinstance(format, str) and format.isprintable() else []
        counted = re.fullmatch(r"0*(\d+) bands?", names[0]) if len(names) == 1 else None
        count = int(counted[1][:9]) if counted else len(names)
        unnamed = any(not name or name != name.strip() for name in names)
        if unnamed or not 1 <= count <= MOST_CHANNELS:
            raise TicketError(
                "expected input.format to be 'RGB', 'BGR', the names of bands with commas between "
                f"them ('B4,B3,B2,B8') or their number ('13 bands'), found {format!r:.60}"
            )
        return count

    @property
    def label(self) -> str:
        """The channels in a few words, for messages: "13 channels (B1,B2,B3, …)"."""
        names = self.format if len(self.format) <= 40 else f"{self.format:.36} …"
        return f"{self.channels} channel{'s' * (self.channels > 1)} ({names})"

    @property
    def is_photograph(self) -> bool:
        """Whether images are RGB or BGR, of 8 bits."""
        return self.format in COLOURS and self.scale == _EIGHT_BITS

    @property
    def mean_255(self) -> tuple[float, ...]:
        """The mean for pixels before `scale`: in [0, 255] for images of 8 bits, as detectron2 and
        mmseg configs state it."""
        return tuple(round(self.scale * v, 6) for v in self.mean)

    @property
    def std_255(self) -> tuple[float, ...]:
        """The standard deviation for pixels before `scale`."""
        return tuple(round(self.scale * v, 6) for v in self.std)

    @property
    def of_unit_range(self) -> "InputSpec":
        """The same input for pixels that are divided by 255, as torchvision's and timm's are."""
        if self.scale == _EIGHT_BITS:
            return self
        factor = self.scale / _EIGHT_BITS
        mean, std = (tuple(factor * v for v in values) for values in (self.mean, self.std))
        return InputSpec(self.format, mean, std)

    def to_dict(self) -> dict[str, Any]:
        """The input as plain JSON types; the scale of 8 bits is not stated."""
        spelled = {"format": self.format, "mean": list(self.mean), "std": list(self.std)}
        return spelled | ({"scale": self.scale} if self.scale != _EIGHT_BITS else {})


def _numbers(given: Any) -> tuple[float, ...]:
    """Finite numbers, as many as there are given; none where one of them is something else."""
    try:
        values = tuple(float(v) for v in given)
    except (TypeError, ValueError, OverflowError):
        return ()
    return values if all(map(math.isfinite, values)) else ()


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
    def network(self) -> ResNet:
        """The architecture, for images of the input's channels, with the widths."""
        whole = ARCHITECTURES[self.arch]
        if not self.widths:
            return whole.reading(self.input.channels)
        return variant(whole, self.input.channels, tuple(self.widths.items()))

    def to_dict(self) -> dict[str, Any]:
        """The description as plain JSON types: what a file stores, and a digest is taken of."""
        stated = {
            entry.name: getattr(self, entry.name)
            for entry in fields(self)
            if entry.name in _FIRST or getattr(self, entry.name)
        }
        return {**stated, "input": self.input.to_dict(), "recipe": dict(self.recipe)}

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
