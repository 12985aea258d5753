"""The ResNets that tickets exist for: their parameter names and shapes.

Names are torchvision's; deep stems and average-pooled shortcuts (``resnet50c``, ``resnet50d``),
which torchvision lacks, are named as in timm. Nothing here imports a model library: a ticket can
be read and checked where none is installed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from types import MappingProxyType

Shape = tuple[int, ...]

STAGES = ("layer1", "layer2", "layer3", "layer4")
PARTS = ("stem", *STAGES)
NORM_ENTRIES = ("weight", "bias", "running_mean", "running_var")
"""Of a normalisation, one value a channel each."""

_STAGE_WIDTHS = (64, 128, 256, 512)


def part_of(name: str) -> str:
    """The part of the trunk, one of `PARTS`, that a torchvision name belongs to."""
    head = name.split(".", 1)[0]
    return head if head in STAGES else "stem"


@dataclass(frozen=True)
class Inner:
    """A convolution inside a block: its outputs are read by the block's next one and nothing else.

    Their number may change, and no other width of the network does: residual stream, neck and
    heads stay as they are.

    Attributes:
        conv: the module's name.
        norm: the normalisation between the two.
        reader: the next convolution.
        reader_norm: the normalisation after that.
    """

    conv: str
    norm: str
    reader: str
    reader_norm: str

    @property
    def block(self) -> str:
        return self.conv.rpartition(".")[0]


@dataclass(frozen=True)
class ResNet:
    """A ResNet trunk (stem and four stages, no classifier) as names and shapes.

    Attributes:
        name: torchvision's or timm's name of the architecture.
        bottleneck: whether blocks are bottlenecks (three convolutions) or basic (two).
        depths: blocks in each of the four stages.
        groups: groups of the 3x3 convolution (ResNeXt).
        base_width: width of a group at 64 channels (Wide ResNet, ResNeXt).
        deep_stem: three 3x3 convolutions instead of one 7x7 (ResNet-C and -D, arXiv 1812.01187).
        avg_down: shortcut that pools before its convolution (ResNet-D).
        channels: channels of the images that the stem reads.
    """

    name: str
    bottleneck: bool
    depths: tuple[int, int, int, int]
    groups: int = 1
    base_width: int = 64
    deep_stem: bool = False
    avg_down: bool = False
    channels: int = 3

    @property
    def description(self) -> str:
        """Name and stem in words, for errors about a model that differs in one of them."""
        stem = "a deep stem of three 3x3" if self.deep_stem else "a stem of one 7x7"
        return f"a {self.name} with {stem} convolution{'s' if self.deep_stem else ''}"

    def reading(self, channels: int) -> "ResNet":
        """The same network for images of this many channels; equal calls return one object."""
        return self if channels == self.channels else _reading(self.name, channels)

    def is_stem(self, shape: Shape) -> bool:
        """Whether this is the shape of the first convolution, for images of any channels."""
        outputs, _, *kernel = next(iter(self.shapes.values()))
        return len(shape) == 4 and [shape[0], *shape[2:]] == [outputs, *kernel]

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """Name to shape of every entry of the trunk's state dict, in network order."""
        shapes: dict[str, Shape] = {}

        def conv(name: str, c_out: int, c_in: int, kernel: int, groups: int = 1) -> None:
            shapes[f"{name}.weight"] = (c_out, c_in // groups, kernel, kernel)

        def norm(name: str, channels: int) -> None:
            for entry in NORM_ENTRIES:
                shapes[f"{name}.{entry}"] = (channels,)
            shapes[f"{name}.num_batches_tracked"] = ()

        if self.deep_stem:
            conv("conv1.0", 32, self.channels, 3)
            norm("conv1.1", 32)
            conv("conv1.3", 32, 32, 3)
            norm("conv1.4", 32)
            conv("conv1.6", 64, 32, 3)
        else:
            conv("conv1", 64, self.channels, 7)
        norm("bn1", 64)

        expansion = 4 if self.bottleneck else 1
        c_in = 64
        for stage, depth, planes in zip(STAGES, self.depths, _STAGE_WIDTHS, strict=True):
            width = planes * self.base_width // 64 * self.groups
            c_out = planes * expansion
            for index in range(depth):
                block = f"{stage}.{index}"
                if self.bottleneck:
                    convs = [(width, c_in, 1, 1), (width, width, 3, self.groups)]
                    convs += [(c_out, width, 1, 1)]
                else:
                    convs = [(c_out, c_in, 3, 1), (c_out, c_out, 3, 1)]
                for k, (out, inp, kernel, groups) in enumerate(convs, start=1):
                    conv(f"{block}.conv{k}", out, inp, kernel, groups)
                    norm(f"{block}.bn{k}", out)
                if index == 0 and (stage != "layer1" or c_in != c_out):
                    at = 1 if self.avg_down else 0
                    conv(f"{block}.downsample.{at}", c_out, c_in, 1)
                    norm(f"{block}.downsample.{at + 1}", c_out)
                c_in = c_out
        return MappingProxyType(shapes)

    def narrowed(self, found: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """`shapes`, but with as few channels inside blocks as these have, which may be any."""
        shapes = dict(self.shapes)
        for inner in self.inner if self.groups == 1 else ():
            conv, reader = f"{inner.conv}.weight", f"{inner.reader}.weight"
            full, *others = shapes[conv]
            width = max(1, min((full, *found.get(conv, ())[:1])))
            shapes[conv] = (width, *others)
            outputs, _, *kernel = shapes[reader]
            shapes[reader] = (outputs, width, *kernel)
            for entry in NORM_ENTRIES:
                shapes[f"{inner.norm}.{entry}"] = (width,)
        return shapes

    @cached_property
    def prunable(self) -> Mapping[str, Shape]:
        """Every convolution weight of the four stages: what IMP may prune.

        The stem and all normalisation are never pruned (Chen et al., arXiv 2012.06908, section 3).
        """
        return MappingProxyType(
            {n: s for n, s in self.shapes.items() if n.startswith("layer") and len(s) == 4}
        )

    @cached_property
    def inner(self) -> tuple[Inner, ...]:
        """The convolutions whose outputs stay inside their block, in network order."""
        return tuple(
            Inner(*(f"{stage}.{i}.{name}" for name in (f"conv{k}", f"bn{k}", *after)))
            for stage, depth in zip(STAGES, self.depths, strict=True)
            for i in range(depth)
            for k in range(1, 3 if self.bottleneck else 2)
            for after in [(f"conv{k + 1}", f"bn{k + 1}")]
        )


def _table() -> dict[str, ResNet]:
    archs = []
    for depth, bottleneck, depths in (
        (18, False, (2, 2, 2, 2)),
        (34, False, (3, 4, 6, 3)),
        (50, True, (3, 4, 6, 3)),
        (101, True, (3, 4, 23, 3)),
        (152, True, (3, 8, 36, 3)),
    ):
        name = f"resnet{depth}"
        archs += [
            ResNet(name, bottleneck, depths),
            ResNet(f"{name}c", bottleneck, depths, deep_stem=True),
            ResNet(f"{name}d", bottleneck, depths, deep_stem=True, avg_down=True),
        ]
    archs += [
        ResNet("wide_resnet50_2", True, (3, 4, 6, 3), base_width=128),
        ResNet("wide_resnet101_2", True, (3, 4, 23, 3), base_width=128),
        ResNet("resnext50_32x4d", True, (3, 4, 6, 3), groups=32, base_width=4),
        ResNet("resnext101_32x8d", True, (3, 4, 23, 3), groups=32, base_width=8),
    ]
    return {arch.name: arch for arch in archs}


ARCHITECTURES: Mapping[str, ResNet] = MappingProxyType(_table())
"""Every architecture by name, for images of three channels; `ResNet.reading` has the others."""


@cache
def _reading(name: str, channels: int) -> ResNet:
    arch = ARCHITECTURES[name]
    return arch if channels == arch.channels else replace(arch, channels=channels)
