"""Multiply-adds and parameters of a network and of what its masks keep, counted with `fvcore`."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lth_plugins.deploy.onnx import untrained
from lth_plugins.errors import RunError
from lth_plugins.ticket import Masks
from lth_plugins.ticket.arch import ResNet


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of one image, and parameters, of the dense network and of the sub-network.

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
    """Counts the cost of tickets of one architecture, the trunk alone, at one size of image.

    Args:
        arch: the architecture.
        size: height and width of the image, pixels.

    Raises:
        RunError: if fvcore is not installed, or timm, which builds those with a deep stem.
    """

    def __init__(self, arch: ResNet, size: int = 224) -> None:
        self.arch = arch
        self._flops, self._parameters = _count(arch, size)

    def __call__(self, masks: Masks) -> dict[str, Cost]:
        """The cost of each prunable convolution, and of stem and normalisation: ``outside``.

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
        return costs | {"outside": Cost(flops, flops, parameters, parameters)}


def total(costs: Mapping[str, Cost]) -> Cost:
    """The cost of the whole trunk."""
    return sum(costs.values(), Cost(0, 0, 0, 0))


def _count(arch: ResNet, size: int) -> tuple[dict[str, float], int]:
    """FLOPs by the name of the weight ("" for all), and parameters of the dense trunk."""
    try:
        from fvcore.nn import FlopCountAnalysis
    except ImportError:
        raise RunError("counting FLOPs needs fvcore: pip install fvcore") from None
    model = untrained(arch)
    counted = FlopCountAnalysis(model, torch.zeros(1, 3, size, size))
    counted.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    by_module = counted.by_module()
    flops = {name: by_module[name.removesuffix(".weight")] for name in arch.prunable}
    return flops | {"": by_module[""]}, sum(p.numel() for p in model.parameters())
