"""How alike masks are: intersection over union, overlap against chance, Hamming distance.

Masks are packed to bits and compared by counting bits: 57 masks of a ResNet-50 take 170 MB and two
seconds. Every measure follows from the number of weights that two masks both keep in a layer.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lth_plugins.errors import TicketError
from lth_plugins.ticket import Masks
from lth_plugins.ticket.arch import Shape, part_of

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Overlaps:
    """What N masks over the same L parameters share.

    Attributes:
        labels: [N], of the masks.
        layers: [L], parameter names in network order.
        numel: [L], weights of each parameter.
        both: [N, N, L], weights of each parameter that both masks keep.
    """

    labels: tuple[str, ...]
    layers: tuple[str, ...]
    numel: NDArray[np.int64]
    both: NDArray[np.int64]

    @cached_property
    def kept(self) -> NDArray[np.int64]:
        """[N, L], weights of each parameter that each mask keeps."""
        return np.einsum("iil->il", self.both)

    def of_stage(self, stage: str) -> "Overlaps":
        """The same, of the parameters of one stage alone (``layer1`` … ``layer4``)."""
        inside = [k for k, name in enumerate(self.layers) if part_of(name) == stage]
        names = tuple(self.layers[k] for k in inside)
        return Overlaps(self.labels, names, self.numel[inside], self.both[..., inside])

    def iou(self) -> Matrix:
        """[N, N], intersection over union of the kept weights; 1 where both keep nothing."""
        both = self.both.sum(-1)
        union = self._sum_of_kept() - both
        return np.divide(both, union, out=np.ones(both.shape), where=union > 0)

    def hamming(self) -> Matrix:
        """[N, N], fraction of the weights that one keeps and the other prunes."""
        return (self._sum_of_kept() - 2 * self.both.sum(-1)) / self.numel.sum()

    def over_chance(self) -> Matrix:
        """[N, N], how many times as many weights both keep as random masks would.

        The random masks have the layer-wise densities of these two: 1 says that nothing is shared
        but the densities. 1, too, where chance gives no weight at all.
        """
        expected = np.einsum("il,jl->ij", self.kept / self.numel, self.kept.astype(float))
        both = self.both.sum(-1)
        return np.divide(both, expected, out=np.ones(both.shape), where=expected > 0)

    def _sum_of_kept(self) -> NDArray[np.int64]:
        kept = self.kept.sum(-1)
        return kept[:, None] + kept[None, :]


@dataclass(frozen=True)
class Packed:
    """Masks as bits: an eighth of the memory, and 64 weights compared at once.

    Attributes:
        shapes: of the parameters, in network order.
        words: [numel / 64, rounded up] of each parameter, the last word filled with zeros.
    """

    shapes: Mapping[str, Shape]
    words: Mapping[str, NDArray[np.uint64]]


def pack(masks: Masks) -> Packed:
    shapes = {name: tuple(mask.shape) for name, mask in masks.items()}
    return Packed(shapes, {name: _words(mask.numpy()) for name, mask in masks.items()})


def _words(mask: NDArray[np.bool_]) -> NDArray[np.uint64]:
    packed = np.packbits(mask.ravel())
    return np.pad(packed, (0, -len(packed) % 8)).view(np.uint64)


def compare(masks: Mapping[str, Packed]) -> Overlaps:
    """Compare masks, each with each, in every parameter.

    Args:
        masks: by label; packed one after another, so that not all lie in memory unpacked.

    Raises:
        TicketError: if there are none, or they are not over the same parameters.
    """
    labels = tuple(masks)
    if not labels:
        raise TicketError("expected masks to compare, found none")
    shapes = masks[labels[0]].shapes
    for label, packed in masks.items():
        if packed.shapes != shapes:
            raise TicketError(
                f"expected masks over the same parameters, found others in {label} than in "
                f"{labels[0]}: compare tickets of one architecture"
            )
    both = np.empty((len(labels), len(labels), len(shapes)), np.int64)
    for layer, name in enumerate(shapes):
        words = np.stack([packed.words[name] for packed in masks.values()])
        for i in range(len(labels)):
            counts = np.bitwise_count(words[i] & words[i:]).sum(-1, dtype=np.uint32)
            both[i, i:, layer] = both[i:, i, layer] = counts
    numel = np.array([math.prod(shape) for shape in shapes.values()])
    return Overlaps(labels, tuple(shapes), numel, both)
