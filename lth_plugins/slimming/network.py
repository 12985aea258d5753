"""What slimming knows of a network: its layers, and the groups of channels that go together.

All modules are named as in the model. `tracing` makes a `Network`; everything else reads it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Side = Literal["out", "in"]
"""Of a layer: the dimension of its weight that makes its outputs, or that reads its inputs."""

Kept = Mapping[str, Tensor]
"""By group: boolean, [channels], True where the channel stays."""


@dataclass(frozen=True)
class Member:
    """One side of a layer whose entries belong to the channels of a group.

    Attributes:
        module: its name.
        side: which dimension; "out" for a normalisation and a depthwise convolution.
        size: how many entries that dimension has, of this group and of others.
        at: int64, [channels, n]: the n entries that belong to each channel. There are several
            where a map is flattened before a linear layer.
    """

    module: str
    side: Side
    size: int
    at: Tensor


@dataclass(frozen=True)
class Group:
    """Channels that several layers write and read, so that each is removed from all of them.

    Attributes:
        name: the module that writes them first.
        channels: how many there are.
        members: all sides that have entries for them.
    """

    name: str
    channels: int
    members: tuple[Member, ...]

    @cached_property
    def writers(self) -> tuple[Member, ...]:
        """The sides that make the channels, and the normalisations on the way."""
        return tuple(member for member in self.members if member.side == "out")

    @cached_property
    def readers(self) -> tuple[Member, ...]:
        """The sides that read the channels."""
        return tuple(member for member in self.members if member.side == "in")


@dataclass(frozen=True)
class Layer:
    """A convolution or a linear layer.

    Attributes:
        name: the module's.
        macs: multiply-accumulates for the example, summed over all calls.
        activations: the elements of its outputs for the example, summed over all calls.
        depthwise: whether each output channel reads the input channel of its number alone.
    """

    name: str
    macs: float
    activations: float
    depthwise: bool


@dataclass(frozen=True)
class Network:
    """The groups and layers of a model, for one example input.

    Attributes:
        groups: by name; those whose channels may be removed.
        held: why the output channels of other layers stay, by the layer's name.
        layers: all convolutions and linear layers that the example reaches, by name.
    """

    groups: Mapping[str, Group]
    held: Mapping[str, str]
    layers: Mapping[str, Layer]

    def all_kept(self) -> dict[str, Tensor]:
        """Every channel of every group."""
        return {n: torch.ones(g.channels, dtype=torch.bool) for n, g in self.groups.items()}

    def entries(self, kept: Kept) -> dict[tuple[str, Side], Tensor]:
        """Which entries of each member's dimension stay; boolean, [size]."""
        left: dict[tuple[str, Side], Tensor] = {}
        for name, member in self.members():
            key = (member.module, member.side)
            entries = left.setdefault(key, torch.ones(member.size, dtype=torch.bool))
            entries[member.at[~kept[name]].flatten()] = False
        return left

    def members(self) -> Iterator[tuple[str, Member]]:
        """All members of all groups, each with its group's name."""
        return ((name, member) for name, group in self.groups.items() for member in group.members)
