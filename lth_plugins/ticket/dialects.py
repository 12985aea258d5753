"""Dialects: how each framework spells the names of a ResNet's parameters.

A dialect is a small table of substitutions on torchvision's names; `locating` reads one backwards.
What differs from a known dialect by a prefix alone (MoCo, VISSL, solo-learn, …), or by the names of
wrappers (`keys.WRAPPERS`), needs no dialect of its own. Another package adds one with
``DIALECTS.register(name, Dialect(name, …))`` or an entry point of the group
``lth_plugins.dialects``; `locate` then finds its models and checkpoints.
"""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from lth_plugins.errors import TicketError
from lth_plugins.registry import Registry
from lth_plugins.ticket.arch import ResNet
from lth_plugins.ticket.keys import State

COUNTER = ".num_batches_tracked"  # FrozenBatchNorm and old checkpoints have none
STATISTICS = {".running_mean": 0.0, ".running_var": 1.0}  # of a normalisation that is affine only

Rule = tuple[str, str | Callable[[re.Match[str]], str]]


def _numbered(template: str, *shifts: int) -> Callable[[re.Match[str]], str]:
    """A replacement that counts from another start: a match's groups, each plus its shift."""

    def replacement(match: re.Match[str]) -> str:
        return template.format(*(int(n) + by for n, by in zip(match.groups(), shifts, strict=True)))

    return replacement


@dataclass(frozen=True)
class Dialect:
    """One way of naming a ResNet's parameters.

    Attributes:
        name: what users call it.
        rules: (regular expression, replacement) pairs, applied in order to a torchvision name.
        deep_stem_rules: applied before ``rules`` where the stem is deep; None where the framework
            has no deep stem that fits.
        avg_down_rules: applied before them where shortcuts pool (ResNet-D).
        affine: whether its files may leave out the statistics of every normalisation: those are
            folded into weight and bias then, as a mean of 0 and a variance of 1.
        ignored: a pattern of keys that the framework's own loaders leave out of its files.
        note: what neither names nor shapes of its files show, as a sentence for who imports one.
    """

    name: str
    rules: tuple[Rule, ...] = ()
    deep_stem_rules: tuple[Rule, ...] | None = ()
    avg_down_rules: tuple[Rule, ...] = ()
    affine: bool = False
    ignored: str | None = None
    note: str = ""

    def supports(self, arch: ResNet) -> bool:
        return not arch.deep_stem or self.deep_stem_rules is not None

    def spell(self, name: str, arch: ResNet) -> str:
        """The framework's name, without prefix, of a parameter in torchvision's naming."""
        rules = self.rules
        if arch.deep_stem:
            rules = (self.deep_stem_rules or ()) + rules
        if arch.avg_down:
            rules = self.avg_down_rules + rules
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        return name

    def table(self, arch: ResNet) -> Mapping[str, str]:
        """The framework's name of every entry of a trunk, by torchvision name."""
        return _table(self, arch)


@functools.cache
def _table(dialect: Dialect, arch: ResNet) -> Mapping[str, str]:
    return MappingProxyType({name: dialect.spell(name, arch) for name in arch.shapes})


_MMPRETRAIN_STEM = (
    (r"^conv1\.0\.", "stem.0.conv."),
    (r"^conv1\.1\.", "stem.0.bn."),
    (r"^conv1\.3\.", "stem.1.conv."),
    (r"^conv1\.4\.", "stem.1.bn."),
    (r"^conv1\.6\.", "stem.2.conv."),
    (r"^bn1\.", "stem.2.bn."),
)

DIALECTS: Registry[Dialect] = Registry("dialect", "lth_plugins.dialects")
"""Every dialect by its name; timm's is torchvision's, under another one."""

for _dialect in (
    # timm agrees with torchvision on every name torchvision has. So do MoCo v1 to v3,
    # the simCLR conversion of tonylins, solo-learn, VISSL and open_lth, under a prefix.
    Dialect("torchvision"),
    Dialect(
        "mmseg",
        deep_stem_rules=(
            (r"^bn1\.", "stem.7."),
            (r"^conv1\.(\d)\.", r"stem.\1."),
        ),
    ),
    # mmcls, mmpretrain and mmpose pool in a shortcut only where it has a stride.
    Dialect(
        "mmpretrain",
        deep_stem_rules=_MMPRETRAIN_STEM,
        avg_down_rules=(
            (r"^(layer1\.0\.downsample)\.1\.", r"\1.0."),
            (r"^(layer1\.0\.downsample)\.2\.", r"\1.1."),
        ),
    ),
    # The same stem over mmseg's shortcuts.
    Dialect("mmpretrain-stem", deep_stem_rules=_MMPRETRAIN_STEM),
    # mmaction2: every convolution is a ConvModule.
    Dialect(
        "mmaction",
        rules=(
            (r"^conv1\.", "conv1.conv."),
            (r"^bn1\.", "conv1.bn."),
            (r"(\.conv\d)\.", r"\1.conv."),
            (r"\.bn(\d)\.", r".conv\1.bn."),
            (r"\.downsample\.0\.", ".downsample.conv."),
            (r"\.downsample\.1\.", ".downsample.bn."),
        ),
        deep_stem_rules=None,
    ),
    # Hugging Face transformers: ResNet, and RT-DETR's ResNet-D.
    Dialect(
        "transformers",
        rules=(
            (r"^conv1\.", "embedder.embedder.convolution."),
            (r"^bn1\.", "embedder.embedder.normalization."),
            (r"^layer(\d)\.", _numbered("encoder.stages.{}.layers.", -1)),
            (r"\.conv(\d)\.", _numbered(".layer.{}.convolution.", -1)),
            (r"\.bn(\d)\.", _numbered(".layer.{}.normalization.", -1)),
            (r"\.downsample\.0\.", ".shortcut.convolution."),
            (r"\.downsample\.1\.", ".shortcut.normalization."),
        ),
        deep_stem_rules=(
            (r"^conv1\.0\.", "embedder.embedder.0.convolution."),
            (r"^conv1\.1\.", "embedder.embedder.0.normalization."),
            (r"^conv1\.3\.", "embedder.embedder.1.convolution."),
            (r"^conv1\.4\.", "embedder.embedder.1.normalization."),
            (r"^conv1\.6\.", "embedder.embedder.2.convolution."),
            (r"^bn1\.", "embedder.embedder.2.normalization."),
        ),
        avg_down_rules=(
            (r"^(layer1\..*)\.downsample\.1\.", r"\1.shortcut.convolution."),
            (r"^(layer1\..*)\.downsample\.2\.", r"\1.shortcut.normalization."),
            (r"\.downsample\.1\.", ".shortcut.1.convolution."),
            (r"\.downsample\.2\.", ".shortcut.1.normalization."),
        ),
    ),
    # NVIDIA's DeepLearningExamples, and YOLACT.
    Dialect(
        "layers",
        rules=((r"^layer(\d)\.", _numbered("layers.{}.", -1)),),
        deep_stem_rules=None,
    ),
    # Segmentation code that puts the stem into an nn.Sequential of its own.
    Dialect(
        "layer0",
        rules=((r"^conv1\.", "layer0.0."), (r"^bn1\.", "layer0.1.")),
        deep_stem_rules=None,
    ),
    Dialect(
        "pycls",
        rules=(
            (r"^conv1\.", "stem.conv."),
            (r"^bn1\.", "stem.bn."),
            (r"^layer(\d)\.(\d+)\.", _numbered("s{}.b{}.f.", 0, 1)),
            (r"\.conv1\.", ".a."),
            (r"\.bn1\.", ".a_bn."),
            (r"\.conv2\.", ".b."),
            (r"\.bn2\.", ".b_bn."),
            (r"\.conv3\.", ".c."),
            (r"\.bn3\.", ".c_bn."),
            (r"\.f\.downsample\.0\.", ".proj."),
            (r"\.f\.downsample\.1\.", ".bn."),
        ),
        deep_stem_rules=None,
    ),
    # Caffe2 blobs: MSRA's R-50.pkl and the models of the first Detectron, as detectron2
    # reads them. Their AffineChannel is a normalisation without statistics.
    Dialect(
        "caffe2",
        rules=(
            (r"^bn1\.", "res_conv1_bn."),
            (r"^layer(\d)\.(\d+)\.", _numbered("res{}_{}_", 1, 0)),
            (r"_conv1\.", "_branch2a."),
            (r"_bn1\.", "_branch2a_bn."),
            (r"_conv2\.", "_branch2b."),
            (r"_bn2\.", "_branch2b_bn."),
            (r"_conv3\.", "_branch2c."),
            (r"_bn3\.", "_branch2c_bn."),
            (r"_downsample\.0\.", "_branch1."),
            (r"_downsample\.1\.", "_branch1_bn."),
            (r"_bn\.weight$", "_bn_s"),
            (r"_bn\.bias$", "_bn_b"),
            (r"_bn\.running_mean$", "_bn_rm"),
            (r"_bn\.running_var$", "_bn_riv"),
            (r"\.weight$", "_w"),
        ),
        deep_stem_rules=None,
        affine=True,
        ignored=r"_momentum$|(^|\.)(conv1|res\d_\d+_branch\d[abc]?)_b$",
        note="Caffe2 models of MSRA and Detectron take BGR pixels, and have the stride of "
        "a ResNet-50 and deeper in the first 1x1 convolution (a ResNeXt's is in the 3x3): "
        "--pixels caffe says so",
    ),
    Dialect(
        "detectron2",
        rules=(
            (r"^conv1\.", "stem.conv1."),
            (r"^bn1\.", "stem.conv1.norm."),
            (r"^layer(\d)\.", _numbered("res{}.", 1)),
            (r"\.bn(\d)\.", r".conv\1.norm."),
            (r"\.downsample\.0\.", ".shortcut."),
            (r"\.downsample\.1\.", ".shortcut.norm."),
        ),
        deep_stem_rules=None,
    ),
    # Google's simCLR v2 as converted by Separius/SimCLRv2-Pytorch.
    Dialect(
        "simclrv2",
        rules=(
            (r"^conv1\.", "net.0.0."),
            (r"^bn1\.", "net.0.1.0."),
            (r"^layer(\d)\.(\d+)\.", r"net.\1.blocks.\2."),
            (r"\.conv1\.", ".net.0."),
            (r"\.bn1\.", ".net.1.0."),
            (r"\.conv2\.", ".net.2."),
            (r"\.bn2\.", ".net.3.0."),
            (r"\.conv3\.", ".net.4."),
            (r"\.bn3\.", ".net.5.0."),
            (r"\.downsample\.0\.", ".projection.shortcut."),
            (r"\.downsample\.1\.", ".projection.bn.0."),
        ),
        deep_stem_rules=None,
    ),
    Dialect(
        "sparseml",
        rules=(
            (r"^conv1\.", "input.conv."),
            (r"^bn1\.", "input.bn."),
            (r"^layer(\d)\.", _numbered("sections.{}.", -1)),
            (r"\.downsample\.0\.", ".identity.conv."),
            (r"\.downsample\.1\.", ".identity.bn."),
        ),
        deep_stem_rules=None,
    ),
    # AC/DC and WoodFisher while pruning: every convolution is inside a wrapper.
    Dialect(
        "acdc",
        rules=((r"^(conv1|layer\d.*\.(?:conv\d|downsample\.0))\.weight$", r"\1._layer.weight"),),
        deep_stem_rules=None,
    ),
    # RigL's TensorFlow models as converted for arXiv 2111.13445.
    Dialect(
        "rigl",
        rules=(
            (r"^conv1\.", "initial_conv.conv."),
            (r"^bn1\.", "initial_conv.bn."),
            (r"^(layer\d)\.", r"\1.block."),
            (r"\.conv(\d)\.", r".conv\1.conv."),
            (r"\.bn(\d)\.", r".conv\1.bn."),
            (r"\.downsample\.0\.", ".shortcut.conv."),
            (r"\.downsample\.1\.", ".shortcut.bn."),
        ),
        deep_stem_rules=None,
    ),
    # The VOC tickets of arXiv 2012.04643; layer4 is the head of the detector.
    Dialect(
        "faster-rcnn.pytorch",
        rules=(
            (r"^conv1\.", "RCNN_base.0."),
            (r"^bn1\.", "RCNN_base.1."),
            (r"^layer4\.", "RCNN_top.0."),
            (r"^layer(\d)\.", _numbered("RCNN_base.{}.", 3)),
        ),
        deep_stem_rules=None,
    ),
    # nn.Sequential(*resnet.children()), as lightly's examples build their backbones.
    Dialect(
        "sequential",
        rules=(
            (r"^conv1\.", "0."),
            (r"^bn1\.", "1."),
            (r"^layer(\d)\.", _numbered("{}.", 3)),
        ),
    ),
):
    DIALECTS.register(_dialect.name, _dialect)
DIALECTS.register("timm", DIALECTS["torchvision"])


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
        raise TicketError(
            f"{target.name} has no counterpart of {arch.name}'s deep stem: choose torchvision's, "
            "timm's or mmseg's names"
        )
    return {prefix + target.spell(name, arch): value for name, value in state.items()}


def zero_counters(arch: ResNet) -> dict[str, Tensor]:
    """``num_batches_tracked`` at zero for every normalisation, for sources that leave it out."""
    return {n: torch.zeros((), dtype=torch.long) for n in arch.shapes if n.endswith(COUNTER)}
