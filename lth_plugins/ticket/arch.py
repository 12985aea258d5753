"""The ResNets that tickets exist for: their parameter names and shapes.

Names are torchvision's; deep stems and average-pooled shortcuts (``resnet50c``, ``resnet50d``),
which torchvision lacks, are named as in timm. Nothing here imports a model library: a ticket can
be read and checked where none is installed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
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
        widths: of a slimmed trunk, how many channels are left where there are fewer than the
            architecture has, by name: that of a stage for its residual stream, that of the
            convolution in the stem and inside blocks.
    """

    name: str
    bottleneck: bool
    depths: tuple[int, int, int, int]
    groups: int = 1
    base_width: int = 64
    deep_stem: bool = False
    avg_down: bool = False
    channels: int = 3
    widths: tuple[tuple[str, int], ...] = ()

    @property
    def title(self) -> str:
        """The name, and whether it is slimmed."""
        return f"slimmed {self.name}" if self.widths else self.name

    @property
    def description(self) -> str:
        """Name and stem in words, for errors about a model that differs in one of them."""
        stem = "a deep stem of three 3x3" if self.deep_stem else "a stem of one 7x7"
        return f"a {self.title} with {stem} convolution{'s' if self.deep_stem else ''}"

    def reading(self, channels: int) -> "ResNet":
        """The same network for images of this many channels."""
        return self if channels == self.channels else variant(self, channels, self.widths)

    def is_stem(self, shape: Shape) -> bool:
        """Whether this is the shape of the first convolution, for images of any channels."""
        outputs, _, *kernel = next(iter(self.shapes.values()))
        return len(shape) == 4 and [shape[0], *shape[2:]] == [outputs, *kernel]

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """Name to shape of every entry of the trunk's state dict, in network order."""
        shapes: dict[str, Shape] = {}
        left = dict(self.widths)

        def conv(name: str, c_out: int, c_in: int, kernel: int, groups: int = 1) -> None:
            shapes[f"{name}.weight"] = (c_out, c_in // groups, kernel, kernel)

        def norm(name: str, channels: int) -> None:
            for entry in NORM_ENTRIES:
                shapes[f"{name}.{entry}"] = (channels,)
            shapes[f"{name}.num_batches_tracked"] = ()

        if self.deep_stem:
            first, second = (left.get(f"conv1.{at}", 32) for at in (0, 3))
            c_in = left.get("conv1.6", 64)
            conv("conv1.0", first, self.channels, 3)
            norm("conv1.1", first)
            conv("conv1.3", second, first, 3)
            norm("conv1.4", second)
            conv("conv1.6", c_in, second, 3)
        else:
            c_in = left.get("conv1", 64)
            conv("conv1", c_in, self.channels, 7)
        norm("bn1", c_in)

        expansion = 4 if self.bottleneck else 1
        for stage, depth, planes in zip(STAGES, self.depths, _STAGE_WIDTHS, strict=True):
            width = planes * self.base_width // 64 * self.groups
            has_shortcut = self.bottleneck or stage != "layer1"
            c_out = left.get(stage, planes * expansion) if has_shortcut else c_in
            for index in range(depth):
                block = f"{stage}.{index}"
                if self.bottleneck:
                    one, two = (left.get(f"{block}.conv{k}", width) for k in (1, 2))
                    convs = [(one, c_in, 1, 1), (two, one, 3, self.groups), (c_out, two, 1, 1)]
                else:
                    inside = left.get(f"{block}.conv1", planes)
                    convs = [(inside, c_in, 3, 1), (c_out, inside, 3, 1)]
                for k, (out, inp, kernel, groups) in enumerate(convs, start=1):
                    conv(f"{block}.conv{k}", out, inp, kernel, groups)
                    norm(f"{block}.bn{k}", out)
                if index == 0 and has_shortcut:
                    at = 1 if self.avg_down else 0
                    conv(f"{block}.downsample.{at}", c_out, c_in, 1)
                    norm(f"{block}.downsample.{at + 1}", c_out)
                c_in = c_out
        return MappingProxyType(shapes)

    @cached_property
    def _writers(self) -> Mapping[str, str]:
        """Of every width that may change, the convolution that first writes these channels."""
        last = "conv3" if self.bottleneck else "conv2"
        stem = ("conv1.0", "conv1.3", "conv1.6") if self.deep_stem else ("conv1",)
        stages = STAGES if self.bottleneck else STAGES[1:]  # else layer1 adds to the stem's
        inside = [inner.conv for inner in self.inner] if self.groups == 1 else []
        return {
            **{conv: conv for conv in (*stem, *inside)},
            **{stage: f"{stage}.0.{last}" for stage in stages},
        }

    def slimmed(self, widths: Mapping[str, int]) -> "ResNet":
        """This architecture with fewer channels; those that are not named have the full width.

        Raises:
            ValueError: if there is no such width, or it is not between 1 and the full one.
        """
        whole = replace(self, widths=())
        for name, width in widths.items():
            writer = self._writers.get(name)
            full = whole.shapes[f"{writer}.weight"][0] if writer else 0
            if type(width) is not int or not 1 <= width <= full:
                raise ValueError(f"{name!r:.60} of {width!r:.60} channels in a {self.name}")
        narrower = (
            (name, widths[name])
            for name, writer in self._writers.items()
            if name in widths and widths[name] < whole.shapes[f"{writer}.weight"][0]
        )
        return replace(self, widths=tuple(narrower))

    def as_wide_as(self, found: Mapping[str, Shape]) -> "ResNet":
        """This architecture with the widths that these shapes begin to have; others may differ."""
        keys = {name: f"{writer}.weight" for name, writer in self._writers.items()}
        return self.slimmed(
            {
                name: max(1, min(self.shapes[key][0], *found[key][:1]))
                for name, key in keys.items()
                if found.get(key)
            }
        )

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
    def coupled(self) -> Mapping[str, Mapping[str, int]]:
        """Of each width that may change, the axis of its channels, by entry of the trunk.

        A network computes the same when the channels of one width are permuted in all these entries
        together. Widths are in the order in which the network writes them.
        """
        found = {}
        for name, writer in self._writers.items():
            width = self.shapes[f"{writer}.weight"][0]
            others = tuple(pair for pair in self.widths if pair[0] != name)
            wider = replace(self, widths=((name, width + 1), *others)).shapes
            found[name] = {
                entry: [a == b for a, b in zip(shape, wider[entry], strict=True)].index(False)
                for entry, shape in self.shapes.items()
                if shape != wider[entry]
            }
        order = list(self.shapes)
        return dict(sorted(found.items(), key=lambda item: order.index(next(iter(item[1])))))

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
"""Every architecture by name, of full width and for images of three channels; `variant` has the
others."""


@lru_cache(maxsize=64)
def variant(arch: ResNet, channels: int, widths: tuple[tuple[str, int], ...]) -> ResNet:
    """An architecture for images of this many channels, with these widths; of equal ones the same,
    as its shapes take a while.

    Raises:
        ValueError: if it has no such width.
    """
    return replace(arch, channels=channels).slimmed(dict(widths))
