"""What a trunk computes of images, as a function of its weights: no framework's model is needed.

It is evaluated: normalisation takes the running statistics.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from lth_plugins.ticket.arch import STAGES, ResNet
from lth_plugins.ticket.keys import State
from lth_plugins.ticket.ticket import Ticket


class Activation(NamedTuple):
    """What the channels of one width are at one place of the network.

    Attributes:
        width: the width, a key of `ResNet.coupled`.
        place: the module whose rectified output it is.
        values: [N, C, H, W].
    """

    width: str
    place: str
    values: Tensor


def activations(ticket: Ticket, images: Tensor) -> Iterator[Activation]:
    """Run images through the trunk of θ, without masks, and yield what follows each ReLU.

    Args:
        ticket: whose weights, architecture and strides.
        images: [N, channels, H, W], as the ticket's input says.
    """
    return _Trunk(ticket.arch, ticket.weights, ticket.meta.stride_in_1x1).run(images)


class _Trunk:
    def __init__(self, arch: ResNet, weights: State, stride_in_1x1: bool) -> None:
        self.arch, self.weights = arch, weights
        self.strided = "conv1" if stride_in_1x1 or not arch.bottleneck else "conv2"

    def run(self, images: Tensor) -> Iterator[Activation]:
        x = images
        stem = [("conv1.0", "conv1.1"), ("conv1.3", "conv1.4"), ("conv1.6", "bn1")]
        for k, (conv, norm) in enumerate(stem if self.arch.deep_stem else [("conv1", "bn1")]):
            x = self._norm(norm, self._conv(conv, x, stride=2 if k == 0 else 1)).relu()
            yield Activation(conv, norm, x)
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        stream = conv  # a stage that has no shortcut convolution adds to what is before it
        for stage, depth in zip(STAGES, self.arch.depths, strict=True):
            stream = stage if stage in self.arch.coupled else stream
            for index in range(depth):
                block, stride = f"{stage}.{index}", 2 if index == 0 and stage != STAGES[0] else 1
                shortcut = self._shortcut(block, x, stride)
                count = 3 if self.arch.bottleneck else 2
                for k in range(1, count + 1):
                    own = stride if f"conv{k}" == self.strided else 1
                    x = self._norm(f"{block}.bn{k}", self._conv(f"{block}.conv{k}", x, own))
                    if k < count:
                        x = x.relu()
                        yield Activation(f"{block}.conv{k}", f"{block}.bn{k}", x)
                x = (x + shortcut).relu()
                yield Activation(stream, block, x)

    def _shortcut(self, block: str, x: Tensor, stride: int) -> Tensor:
        at = 1 if self.arch.avg_down else 0
        if f"{block}.downsample.{at}.weight" not in self.weights:
            return x
        if self.arch.avg_down and stride > 1:
            x = F.avg_pool2d(x, 2, stride, ceil_mode=True, count_include_pad=False)
            stride = 1
        x = self._conv(f"{block}.downsample.{at}", x, stride)
        return self._norm(f"{block}.downsample.{at + 1}", x)

    def _conv(self, name: str, x: Tensor, stride: int) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        groups = x.shape[1] // weight.shape[1]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=groups)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        mean, var, weight, bias = (
            self.weights[f"{name}.{entry}"]
            for entry in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, weight, bias)
