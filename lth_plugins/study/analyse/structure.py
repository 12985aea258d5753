"""What masks leave of a network's structure: kernels, channels, and the cost of what is left.

A kernel is the k×k weights between one input and one output channel. Pure functions over masks;
only `Counter` builds a model, to count with `fvcore`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from torch import Tensor, nn

from lth_plugins.errors import TicketError
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


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of one picture, and parameters, of the dense network and of the sub-network.

    Attributes:
        flops: as `fvcore` counts them: one for a multiplication and its addition.
        sparse_flops: those of the weights that are kept.
        parameters: of the dense network.
        sparse_parameters: that are kept.
    """

    flops: float
    sparse_flops: float
    parameters: int
    sparse_parameters: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.flops + other.flops,
            self.sparse_flops + other.sparse_flops,
            self.parameters + other.parameters,
            self.sparse_parameters + other.sparse_parameters,
        )


class Counter:
    """Counts the cost of tickets of one architecture, the trunk alone, at one size of picture.

    Args:
        arch: the architecture.
        size: height and width of the picture, pixels.

    Raises:
        TicketError: if fvcore is not installed, or timm, which builds those with a deep stem.
    """

    def __init__(self, arch: ResNet, size: int = 224) -> None:
        self.arch = arch
        self._flops, self._parameters = _count(arch, size)

    def __call__(self, masks: Masks) -> dict[str, Cost]:
        """The cost of each prunable convolution, and that of ``rest``: stem and normalisation.

        A weight of a convolution multiplies once for every output pixel, so a layer's sparse cost
        is its cost times its density.
        """
        masks.check_shapes(self.arch.prunable, self.arch.name)
        costs = {}
        for name, mask in masks.items():
            kept, flops = int(torch.count_nonzero(mask)), self._flops[name]
            costs[name] = Cost(flops, flops * kept / mask.numel(), mask.numel(), kept)
        flops = self._flops[""] - sum(c.flops for c in costs.values())
        parameters = self._parameters - sum(c.parameters for c in costs.values())
        return costs | {"rest": Cost(flops, flops, parameters, parameters)}


def total(costs: Mapping[str, Cost]) -> Cost:
    """The cost of the whole trunk."""
    return sum(costs.values(), Cost(0, 0, 0, 0))


def _count(arch: ResNet, size: int) -> tuple[dict[str, float], int]:
    """FLOPs by the name of the weight ("" for all), and parameters of the dense trunk."""
    try:
        from fvcore.nn import FlopCountAnalysis
    except ImportError:
        raise TicketError("counting FLOPs needs fvcore: pip install fvcore") from None
    model = _trunk(arch)
    counted = FlopCountAnalysis(model, torch.zeros(1, 3, size, size))
    counted.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    by_module = counted.by_module()
    flops = {name: by_module[name.removesuffix(".weight")] for name in arch.prunable}
    return flops | {"": by_module[""]}, sum(p.numel() for p in model.parameters())


def _trunk(arch: ResNet) -> nn.Module:
    if not arch.deep_stem:
        model = torchvision.models.get_model(arch.name, weights=None)
        model.fc = nn.Identity()
        return model.eval()
    try:
        import timm
    except ImportError:
        raise TicketError(f"counting FLOPs of a {arch.name} needs timm: pip install timm") from None
    return timm.create_model(arch.name, num_classes=0).eval()
