"""What a network costs with some of its channels: operations, or time on this machine."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from lth_plugins.slimming.network import Kept, Layer, Network, Side
from lth_plugins.slimming.tracing import Forward


class Cost(Protocol):
    """The cost of a network of which some channels are left.

    Attributes:
        unit: what is counted, for messages, such as "FLOPs".
    """

    @property
    def unit(self) -> str: ...

    def __call__(self, network: Network, kept: Kept) -> float:
        """The cost; it must not grow when a channel is removed."""
        ...

    def by_layer(self, network: Network, kept: Kept) -> Mapping[str, float]:
        """The cost of each convolution and linear layer, by its name."""
        ...

    def of(self, model: nn.Module, network: Network, forward: Forward) -> "Cost":
        """This cost of a model, for an example; it is called before all that follows."""
        ...

    def corrected(self, model: nn.Module, network: Network, kept: Kept, forward: Forward) -> "Cost":
        """A cost that is right for these channels: itself, where it is."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What `of` and `corrected` have found; plain containers only."""
        ...

    def with_state(self, state: Mapping[str, Any]) -> "Cost":
        """The cost that `state_dict` was called of."""
        ...


@dataclass(frozen=True)
class Flops:
    """Multiply-accumulates of all convolutions and linear layers, which fvcore counts as FLOPs."""

    unit: str = "FLOPs"

    def __call__(self, network: Network, kept: Kept) -> float:
        return sum(self.by_layer(network, kept).values())

    def by_layer(self, network: Network, kept: Kept) -> dict[str, float]:
        shares = shares_of(network, kept)
        return {name: layer.macs * _share(layer, shares) for name, layer in network.layers.items()}

    def of(self, model: nn.Module, network: Network, forward: Forward) -> Cost:
        return self

    def corrected(self, model: nn.Module, network: Network, kept: Kept, forward: Forward) -> Cost:
        return self

    def state_dict(self) -> dict[str, Any]:
        return {}

    def with_state(self, state: Mapping[str, Any]) -> Cost:
        return self


def shares_of(network: Network, kept: Kept) -> dict[tuple[str, Side], float]:
    """The share of its entries that each side of a layer keeps, if it is a member of a group."""
    return {key: float(left.float().mean()) for key, left in network.entries(kept).items()}


def _share(layer: Layer, shares: Mapping[tuple[str, Side], float]) -> float:
    out = shares.get((layer.name, "out"), 1.0)
    return out if layer.depthwise else out * shares.get((layer.name, "in"), 1.0)
