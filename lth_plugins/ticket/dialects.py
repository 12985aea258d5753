"""Dialects: how each framework spells the names of a ResNet's parameters.

A dialect is a row: how it calls the parts of a ResNet that torchvision calls ``conv1``,
``layer1.0.bn2``, ``layer1.0.downsample.0`` and so on. `locating` reads a row backwards. What
differs from a known dialect by a prefix alone (MoCo, VISSL, solo-learn, …), or by the names of
wrappers (`keys.WRAPPERS`), needs no row. Another package adds a dialect with
``DIALECTS.register(name, Dialect(name, …))`` or an entry point of the group
``lth_plugins.dialects``; `locate` then finds its models and checkpoints.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from lth_plugins.errors import TicketError
from lth_plugins.registry import Registry
from lth_plugins.ticket.arch import NORM_ENTRIES, ResNet
from lth_plugins.ticket.keys import State

COUNTER = ".num_batches_tracked"  # FrozenBatchNorm and old checkpoints have none
STATISTICS = {".running_mean": 0.0, ".running_var": 1.0}  # of a normalisation that is affine only

Pair = tuple[str, str]
"""The names of a convolution and of the normalisation that follows it."""


@dataclass(frozen=True)
class Dialect:
    """One way of naming a ResNet's parameters; by default torchvision's and timm's.

    Attributes:
        name: what users call it.
        stem: the stem of one convolution.
        deep_stem: the three pairs of a deep stem (ResNet-C and -D), in one tuple; None where the
            framework has no deep stem that fits.
        after_stem: the modules between the stem and the stages, without parameters in a plain
            ResNet.
        block: what the names of a block begin with, by its stage (1 to 4) and its number there.
        conv: the names of a block's convolutions, by their number from 1; of its normalisations
            likewise ``norm``.
        shortcut: a shortcut's.
        pooling_shortcut: one that pools (ResNet-D).
        first_pooling_shortcut: that of the first stage there, which need not pool; None for the
            same names.
        conv_entry: what follows the name of a convolution for its weight.
        norm_entries: what follows that of a normalisation, for each of `NORM_ENTRIES`.
        affine: whether its files may leave out the statistics of every normalisation: those are
            folded into weight and bias then, as a mean of 0 and a variance of 1.
        ignored: a pattern of keys that the framework's own loaders leave out of its files.
        note: what neither names nor shapes of its files show, as a sentence for users who import
            one.
    """

    name: str
    stem: Pair = ("conv1", "bn1")
    deep_stem: tuple[str, ...] | None = (
        "conv1.0",
        "conv1.1",
        "conv1.3",
        "conv1.4",
        "conv1.6",
        "bn1",
    )
    after_stem: tuple[str, ...] = ("relu", "prelu", "act", "act1", "maxpool")
    block: Callable[[int, int], str] = lambda stage, block: f"layer{stage}.{block}."
    conv: Callable[[int], str] = lambda k: f"conv{k}"
    norm: Callable[[int], str] = lambda k: f"bn{k}"
    shortcut: Pair = ("downsample.0", "downsample.1")
    pooling_shortcut: Pair = ("downsample.1", "downsample.2")
    first_pooling_shortcut: Pair | None = None
    conv_entry: str = ".weight"
    norm_entries: tuple[str, ...] = tuple(f".{entry}" for entry in NORM_ENTRIES)
    affine: bool = False
    ignored: str | None = None
    note: str = ""

    def supports(self, arch: ResNet) -> bool:
        return not arch.deep_stem or self.deep_stem is not None

    def spell(self, name: str, arch: ResNet) -> str:
        """The framework's name, without prefix, of a parameter in torchvision's naming."""
        module, _, entry = name.rpartition(".")
        if not module.startswith("layer"):
            parts = (self.deep_stem or ()) if arch.deep_stem else self.stem
            ours = _TORCHVISION.deep_stem if arch.deep_stem else _TORCHVISION.stem
            at = (ours or ()).index(module)
            return parts[at] + self._entry(entry, is_norm=at % 2 == 1)
        stage, number, kind, *index = module.split(".")
        k = int((index or [kind[-1]])[0])
        if kind == "downsample":
            is_norm = k == (2 if arch.avg_down else 1)
            spelled = self._shortcut(stage, arch)[is_norm]
        else:
            is_norm = kind.startswith("bn")
            spelled = (self.norm if is_norm else self.conv)(k)
        return self.block(int(stage[-1]), int(number)) + spelled + self._entry(entry, is_norm)

    def _shortcut(self, stage: str, arch: ResNet) -> Pair:
        if not arch.avg_down:
            return self.shortcut
        return (stage == "layer1" and self.first_pooling_shortcut) or self.pooling_shortcut

    def _entry(self, entry: str, is_norm: bool) -> str:
        if not is_norm:
            return self.conv_entry
        known = dict(zip(NORM_ENTRIES, self.norm_entries, strict=True))
        return known.get(entry, f".{entry}")  # the counter has one name everywhere

    def table(self, arch: ResNet) -> Mapping[str, str]:
        """The framework's name of every entry of a trunk, by torchvision name."""
        return _table(self, arch)


@functools.cache
def _table(dialect: Dialect, arch: ResNet) -> Mapping[str, str]:
    return MappingProxyType({name: dialect.spell(name, arch) for name in arch.shapes})


# timm agrees with torchvision on every name torchvision has. So do MoCo v1 to v3, the simCLR
# conversion of tonylins, solo-learn, VISSL and open_lth, under a prefix.
_TORCHVISION = Dialect("torchvision")
_MMPRETRAIN_STEM = tuple(f"stem.{at}.{what}" for at in range(3) for what in ("conv", "bn"))
_TRANSFORMERS_STEM = tuple(
    f"embedder.embedder.{at}.{what}" for at in range(3) for what in ("convolution", "normalization")
)

DIALECTS: Registry[Dialect] = Registry("dialect", "lth_plugins.dialects")
"""Every dialect by its name; timm's is torchvision's, under another one."""

for _dialect in (
    _TORCHVISION,
    Dialect("mmseg", deep_stem=tuple(f"stem.{at}" for at in (0, 1, 3, 4, 6, 7))),
    # mmcls, mmpretrain and mmpose pool in a shortcut only where it has a stride.
    Dialect(
        "mmpretrain",
        deep_stem=_MMPRETRAIN_STEM,
        first_pooling_shortcut=("downsample.0", "downsample.1"),
    ),
    Dialect("mmpretrain-stem", deep_stem=_MMPRETRAIN_STEM),  # over mmseg's shortcuts
    # mmaction2: every convolution is a ConvModule.
    Dialect(
        "mmaction",
        stem=("conv1.conv", "conv1.bn"),
        deep_stem=None,
        conv=lambda k: f"conv{k}.conv",
        norm=lambda k: f"conv{k}.bn",
        shortcut=("downsample.conv", "downsample.bn"),
    ),
    # Hugging Face transformers: ResNet, and RT-DETR's ResNet-D.
    Dialect(
        "transformers",
        stem=("embedder.embedder.convolution", "embedder.embedder.normalization"),
        deep_stem=_TRANSFORMERS_STEM,
        block=lambda stage, block: f"encoder.stages.{stage - 1}.layers.{block}.",
        conv=lambda k: f"layer.{k - 1}.convolution",
        norm=lambda k: f"layer.{k - 1}.normalization",
        shortcut=("shortcut.convolution", "shortcut.normalization"),
        pooling_shortcut=("shortcut.1.convolution", "shortcut.1.normalization"),
        first_pooling_shortcut=("shortcut.convolution", "shortcut.normalization"),
    ),
    # NVIDIA's DeepLearningExamples, and YOLACT.
    Dialect("layers", deep_stem=None, block=lambda stage, block: f"layers.{stage - 1}.{block}."),
    # Segmentation code that puts the stem into an nn.Sequential of its own.
    Dialect("layer0", stem=("layer0.0", "layer0.1"), deep_stem=None),
    Dialect(
        "pycls",
        stem=("stem.conv", "stem.bn"),
        deep_stem=None,
        block=lambda stage, block: f"s{stage}.b{block + 1}.",
        conv=lambda k: f"f.{'abc'[k - 1]}",
        norm=lambda k: f"f.{'abc'[k - 1]}_bn",
        shortcut=("proj", "bn"),
    ),
    # Caffe2 blobs: MSRA's R-50.pkl and the models of the first Detectron, as detectron2 reads
    # them. Their AffineChannel is a normalisation without statistics.
    Dialect(
        "caffe2",
        stem=("conv1", "res_conv1_bn"),
        deep_stem=None,
        block=lambda stage, block: f"res{stage + 1}_{block}_",
        conv=lambda k: f"branch2{'abc'[k - 1]}",
        norm=lambda k: f"branch2{'abc'[k - 1]}_bn",
        shortcut=("branch1", "branch1_bn"),
        conv_entry="_w",
        norm_entries=("_s", "_b", "_rm", "_riv"),
        affine=True,
        ignored=r"_momentum$|(^|\.)(conv1|res\d_\d+_branch\d[abc]?)_b$",
        note="Caffe2 models of MSRA and Detectron expect BGR pixels, and have the stride of a "
        "ResNet-50 and deeper in the first 1x1 convolution (a ResNeXt's is in the 3x3): "
        "--pixels caffe says so",
    ),
    Dialect(
        "detectron2",
        stem=("stem.conv1", "stem.conv1.norm"),
        deep_stem=None,
        block=lambda stage, block: f"res{stage + 1}.{block}.",
        norm=lambda k: f"conv{k}.norm",
        shortcut=("shortcut", "shortcut.norm"),
    ),
    # Google's simCLR v2 as converted by Separius/SimCLRv2-Pytorch.
    Dialect(
        "simclrv2",
        stem=("net.0.0", "net.0.1.0"),
        deep_stem=None,
        block=lambda stage, block: f"net.{stage}.blocks.{block}.",
        conv=lambda k: f"net.{2 * k - 2}",
        norm=lambda k: f"net.{2 * k - 1}.0",
        shortcut=("projection.shortcut", "projection.bn.0"),
    ),
    Dialect(
        "sparseml",
        stem=("input.conv", "input.bn"),
        deep_stem=None,
        block=lambda stage, block: f"sections.{stage - 1}.{block}.",
        shortcut=("identity.conv", "identity.bn"),
    ),
    # AC/DC and WoodFisher while pruning: every convolution is inside a wrapper.
    Dialect("acdc", deep_stem=None, conv_entry="._layer.weight"),
    # RigL's TensorFlow models as converted for arXiv 2111.13445.
    Dialect(
        "rigl",
        stem=("initial_conv.conv", "initial_conv.bn"),
        deep_stem=None,
        block=lambda stage, block: f"layer{stage}.block.{block}.",
        conv=lambda k: f"conv{k}.conv",
        norm=lambda k: f"conv{k}.bn",
        shortcut=("shortcut.conv", "shortcut.bn"),
    ),
    # The VOC tickets of arXiv 2012.04643; layer4 is the head of the detector.
    Dialect(
        "faster-rcnn.pytorch",
        stem=("RCNN_base.0", "RCNN_base.1"),
        deep_stem=None,
        block=lambda stage, block: (
            f"RCNN_top.0.{block}." if stage == 4 else f"RCNN_base.{stage + 3}.{block}."
        ),
    ),
    # nn.Sequential(*resnet.children()), as lightly's examples build their backbones.
    Dialect(
        "sequential",
        stem=("0", "1"),
        deep_stem=("0.0", "0.1", "0.3", "0.4", "0.6", "1"),
        after_stem=("2", "3"),
        block=lambda stage, block: f"{stage + 3}.{block}.",
    ),
):
    DIALECTS.register(_dialect.name, _dialect)
DIALECTS.register("timm", _TORCHVISION)


def distinct_dialects() -> list[Dialect]:
    """Every dialect once, also where it has two names."""
    return list(dict.fromkeys(DIALECTS.values()))


def from_torchvision(
    state: State, arch: ResNet, dialect: str, prefix: str = ""
) -> dict[str, Tensor]:
    """A trunk's state dict in torchvision's names, respelled in another dialect.

    Raises:
        TicketError: if the dialect is unknown or cannot express the architecture.
    """
    target = DIALECTS[dialect]
    if not target.supports(arch):
        able = ", ".join(name for name, other in DIALECTS.items() if other.supports(arch))
        raise TicketError(
            f"{target.name} has no counterpart of {arch.name}'s deep stem: choose one of {able}"
        )
    return {prefix + target.spell(name, arch): value for name, value in state.items()}


def zero_counters(arch: ResNet) -> dict[str, Tensor]:
    """``num_batches_tracked`` at zero for every normalisation, for sources that leave it out."""
    return {n: torch.zeros((), dtype=torch.long) for n in arch.shapes if n.endswith(COUNTER)}
