"""What masks leave of a network's structure: kernels and channels.

A kernel is the k×k weights between one input and one output channel. Pure functions over masks.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lth_plugins.ticket import Masks
from lth_plugins.ticket.arch import STAGES, ResNet, part_of


@dataclass(frozen=True)
class KernelMap:
    """Every k×k kernel, k > 1, from the input of the network to its output.

    Attributes:
        dead: [kernels], whether all weights of a kernel are pruned; in network order, within a
            convolution by output channel, then input channel.
        starts: index of the first kernel of each stage.
    """

    dead: NDArray[np.bool_]
    starts: Mapping[str, int]


def kernel_map(masks: Masks) -> KernelMap:
    """Which kernels are pruned completely (Chen et al., arXiv 2012.06908, figure 7).

    1×1 convolutions are left out: their kernels are single weights, which the density tells of.
    """
    spatial = {name: mask for name, mask in masks.items() if mask[0, 0].numel() > 1}
    dead = {name: ~mask.flatten(2).any(2).flatten().numpy() for name, mask in spatial.items()}
    sizes = {stage: sum(len(d) for n, d in dead.items() if part_of(n) == stage) for stage in STAGES}
    starts = np.cumsum([0, *sizes.values()])[:-1].tolist()
    return KernelMap(np.concatenate(list(dead.values())), dict(zip(STAGES, starts, strict=True)))


@dataclass(frozen=True)
class DeadChannels:
    """Channels of a convolution of which nothing is left.

    Attributes:
        inputs: input channels that no kept weight reads.
        of_inputs: how many there are.
        outputs: output channels that no kept weight writes.
        of_outputs: how many there are.
    """

    inputs: int
    of_inputs: int
    outputs: int
    of_outputs: int


def dead_channels(masks: Masks, arch: ResNet) -> dict[str, DeadChannels]:
    """Completely dead input and output channels of each prunable convolution, by its name."""
    return {name: _dead(mask, arch) for name, mask in masks.items()}


def _dead(mask: Tensor, arch: ResNet) -> DeadChannels:
    # [groups, outputs of a group, inputs of a group, k * k]; only spatial kernels are grouped.
    groups = arch.groups if mask[0, 0].numel() > 1 else 1
    kept = mask.flatten(2).any(2).unflatten(0, (groups, -1))
    inputs, outputs = ~kept.any(1), ~kept.any(2)
    return DeadChannels(int(inputs.sum()), inputs.numel(), int(outputs.sum()), outputs.numel())
