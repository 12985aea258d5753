"""What a network costs with some of its channels: operations, or time on this machine."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from lth_plugins.slimming.network import Kept, Layer, Network, Side


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


@dataclass(frozen=True)
class Flops:
    """Multiply-accumulates of all convolutions and linear layers, which fvcore counts as FLOPs."""

    unit: str = "FLOPs"

    def __call__(self, network: Network, kept: Kept) -> float:
        return sum(macs_of(network, kept).values())


def macs_of(network: Network, kept: Kept) -> dict[str, float]:
    """The multiply-accumulates of each layer, by its name."""
    shares = {key: float(left.float().mean()) for key, left in network.entries(kept).items()}
    return {name: layer.macs * _share(layer, shares) for name, layer in network.layers.items()}


def _share(layer: Layer, shares: Mapping[tuple[str, Side], float]) -> float:
    out = shares.get((layer.name, "out"), 1.0)
    return out if layer.depthwise else out * shares.get((layer.name, "in"), 1.0)
