"""Dialects: how each framework spells the names of a ResNet's parameters.

A dialect is a small table of substitutions on torchvision's names. `locate` reads one backwards:
given a model's or a checkpoint's keys it finds the dialect, the architecture and the place of the
trunk in it, however deep the trunk is nested. Adding a dialect is adding a row to `DIALECTS`; what
differs from a known dialect by a prefix alone (MoCo, VISSL, solo-learn, …), or by the names of
wrappers (`WRAPPERS`), needs none.
"""

import difflib
import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor, nn

from lth_plugins.errors import TicketError
from lth_plugins.ticket.arch import ARCHITECTURES, PARTS, STAGES, ResNet, Shape, part_of

State = Mapping[str, Tensor]

_COUNTER = ".num_batches_tracked"  # FrozenBatchNorm and old checkpoints have none
_STATISTICS = {".running_mean": 0.0, ".running_var": 1.0}  # of a normalisation that is affine only

WRAPPERS = frozenset(
    (
        "module",  # DataParallel, DistributedDataParallel, AveragedModel, DeepSpeed, NNI
        "_orig_mod",  # torch.compile
        "_fsdp_wrapped_module",  # FullyShardedDataParallel
        "_fpw_module",  # its first versions, and fairscale's
        "_checkpoint_wrapped_module",  # activation checkpointing
        "_forward_module",  # Lightning Fabric, DeepSpeed in Lightning
        "_module",  # Opacus
    )
)
"""Names of modules that compute what the one module inside them computes: `locate` overlooks them
anywhere in a key."""


def unwrapped(key: str) -> str:
    """A key or prefix of a state dict without the names of wrappers."""
    return ".".join(segment for segment in key.split(".") if segment not in WRAPPERS)


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

DIALECTS: Mapping[str, Dialect] = MappingProxyType(
    {
        dialect.name: dialect
        for dialect in (
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
                rules=(
                    (r"^(conv1|layer\d.*\.(?:conv\d|downsample\.0))\.weight$", r"\1._layer.weight"),
                ),
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
        )
    }
)
ALIASES: Mapping[str, str] = MappingProxyType({"timm": "torchvision"})

_AVERAGE = "a moving average of it"
_AVERAGED_MODELS = "(?:ema|(?:model|net|state_dict)_ema|ema_(?:model|net)|swa_model|average_model)"

MOVING_AVERAGES: tuple[tuple[str, str, str], ...] = (
    (r"([^.]+)_k", r"\1_q", _AVERAGE),  # MoCo v1, v2: encoder_k
    (r"([^.]+)_k", r"\1", _AVERAGE),  # PixPro
    (r"([^.]+)_m", r"\1", _AVERAGE),  # ALBEF
    (r"key_([^.]+)", r"query_\1", _AVERAGE),
    (r"momentum_([^.]+)", r"base_\1", _AVERAGE),  # MoCo v3
    (r"momentum_([^.]+)", r"\1", _AVERAGE),  # solo-learn
    (r"([^.]+)_momentum", r"\1", _AVERAGE),  # lightly's examples
    (r"target_([^.]+)", r"online_\1", _AVERAGE),  # BYOL
    (r"target_([^.]+)", r"\1", _AVERAGE),
    (r"target", "online", _AVERAGE),
    (r"backbone", "query_backbone", _AVERAGE),  # lightly's MoCo benchmark
    (r"encoder_k\.0", "backbone", _AVERAGE),  # mmselfsup, mmpretrain
    (r"target_net\.0", "backbone", _AVERAGE),  # their BYOL
    (
        "ema_state_dict",
        "state_dict",
        "a moving average of it, or, where mmengine's EMAHook swapped the two while saving, the "
        "weights that it is the average of",
    ),
    (
        "current_model_state",
        "state_dict",
        "the weights that it is the average of: Lightning's WeightAveraging swaps the two while "
        "saving",
    ),
    (r"([^.]+)_ema", r"\1", _AVERAGE),  # timm: state_dict_ema; torchvision: model_ema
    (r"ema_([^.]+)", r"\1", _AVERAGE),
    *(
        (_AVERAGED_MODELS, trained, _AVERAGE)
        for trained in ("model", "state_dict", "model_state_dict", "net", "")
    ),
)
"""Names in a trunk's prefix (regular expressions of whole segments), what stands in their place in
the prefix of a trunk that is preferred, and what the former is to the latter. Wrappers do not
count, and "" is nothing in their place."""

OTHERS: tuple[tuple[str, str], ...] = (
    (
        r"(^|\.)attnpool\.",
        "the attention pooling of CLIP's modified ResNets, whose stem and strides are others, too",
    ),
    (r"(^|\.)stage\d\.\d+\.branches\.", "HRNet's parallel branches"),
    (
        r"^conv2\.weight$|(^|\.)stem\.conv2\.(conv\.)?weight$",
        "a stem of several convolutions with a normalisation each (CLIP's modified ResNets have "
        "one, and some dilated ResNets)",
    ),
    (r"(^|\.)relative_position_bias_table$", "a Swin transformer"),
    (
        r"(^|\.)(cls_token|class_token|pos_embed|pos_embedding)$|(^|\.)blocks\.\d+\.attn\.qkv\.",
        "a vision transformer",
    ),
    (
        r"(^|\.)stages\.\d+\.(blocks\.)?\d+\.(gamma|conv_dw\.weight|dwconv\.weight)$|\.layer_scale$",
        "ConvNeXt's blocks",
    ),
    (r"(^|\.)s1\.b1\.conv1\.conv\.weight$|(^|\.)trunk_output\.block1\.", "a RegNet"),
    (
        r"(^|\.)conv_stem\.weight$|(^|\.)features\.\d+\.(\d+\.)?(block|conv)\.\d+\.\d+\.weight$",
        "inverted residuals (EfficientNet, MobileNet)",
    ),
    (r"\.(main_conv|mixing_conv)\.0\.|\.conv\d\.paths\.\d", "selective kernels (simCLR v2 'sk1')"),
    (r"\.conv2\.(fc[12]|bn[01])\.", "split attention (ResNeSt)"),
    (r"\.convs\.\d+\.weight$", "convolutions in several scales (Res2Net)"),
    (r"(^|\.)se(_module)?\.(fc|conv)", "squeeze-and-excitation blocks"),
    (r"(^|\.)attn\.mlp_(add|scale)\.", "global context blocks"),
    (r"\.conv2(_offset|\.conv_offset(_mask)?)\.weight$", "deformable convolutions"),
    (
        r"(^|\.)stages\.\d+\.blocks\.\d+\.norm3\.weight$|(^|\.)block\d\.unit\d+\.",
        "blocks that normalise first (ResNet v2, BiT)",
    ),
    (r"\.conv\d\.gain$", "normalised weights in the place of normalisation (NF-ResNet)"),
    (r"(^|\.)level\d\.(tree\d|\d+)\.", "DLA's trees"),
    (r"(^|\.)denseblock\d+[._]denselayer\d+", "a DenseNet"),
    (
        r"(^|\.)features\.(3|8|10)\.(weight|squeeze\.weight)$",
        "VGG's, AlexNet's or SqueezeNet's layers",
    ),
    (r"(^|\.)(Mixed_\d\w\.|inception\d\w\.)", "Inception's branches"),
    (r"(^|\.)stage\d\.\d+\.branch[12]\.", "ShuffleNet's branches"),
    (r"_gn_s$", "group normalisation"),
    (
        r"(^|[./])(kernel|kernel:0)$|/weights$",
        "convolutions as TensorFlow and JAX store them (height, width, in, out), to be converted "
        "to PyTorch first",
    ),
    (
        r"(^|[.:])(stage\d+_unit\d+_(conv|bn)\d|\w*resnetv\w+_layers?\d)",
        "MXNet's names, to be converted to PyTorch's first",
    ),
    (r"\.parametrizations\.", "parametrised weights: torch.nn.utils.parametrize can remove them"),
    (
        r"(^|\.)_?flat_param(_\d+)?$",
        "flattened parameters of FullyShardedDataParallel: gather them "
        "(StateDictType.FULL_STATE_DICT)",
    ),
    (r"\.(lora_[AB]|base_layer)\.", "adapters of PEFT: merge_and_unload() merges them"),
    (
        r"(^|\.)_packed_params(\.|$)|\.weight_fake_quant\.",
        "quantised weights, or is prepared for them: take the floating-point model",
    ),
    (r"\.weight_orig$", "weights that torch.nn.utils.prune holds (call its remove first)"),
    (r"\.weight_[guv]$", "weight or spectral normalisation (remove it first)"),
    (r"\.filt$", "the filters of an anti-aliased ResNet"),
)
"""Patterns of keys that no ticket has, and what they are a sign of, for error messages. A pattern
that begins with ^ is also tried on names inside the closest trunk."""


def get_dialect(name: str) -> Dialect:
    """The dialect of this name.

    Raises:
        TicketError: if there is none.
    """
    dialect = DIALECTS.get(ALIASES.get(name, name))
    if dialect is None:
        known = ", ".join(sorted({*DIALECTS, *ALIASES}))
        raise TicketError(f"unknown dialect {name!r}; known are {known}")
    return dialect


@dataclass(frozen=True)
class Layout:
    """Where a trunk was found in a state dict.

    Attributes:
        dialect: the naming it follows.
        arch: the architecture it has.
        prefix: what comes before the dialect's own names; "" at the top.
        keys: torchvision name to the key in the state dict, in network order. Entries that a
            framework may leave out (``num_batches_tracked``) are absent here when they are there.
        left_out: the prefixes of other trunks there, and what each is to this one.
    """

    dialect: Dialect
    arch: ResNet
    prefix: str
    keys: Mapping[str, str]
    left_out: Mapping[str, str] = field(default_factory=dict)

    def extract(self, state: State) -> dict[str, Tensor]:
        """The trunk's entries of this state dict under torchvision's names (no copies).

        Statistics that the source has folded into weight and bias are added: 0 and 1.
        """
        trunk = {name: state[key] for name, key in self.keys.items()}
        for name, shape in self.arch.shapes.items() if self.dialect.affine else ():
            module, _, entry = name.rpartition(".")
            if name not in trunk and f".{entry}" in _STATISTICS and f"{module}.weight" in trunk:
                trunk[name] = torch.full(shape, _STATISTICS[f".{entry}"])
        return trunk

    def modules(self, model: nn.Module) -> dict[str, nn.Module]:
        """The module of a model that holds each entry of the trunk, by torchvision name.

        Found by the entry itself: wrappers (of activation checkpointing) leave their names out of
        a state dict, so that a key need not be a module's name.

        Args:
            model: the model that `locate` was given, or a copy.

        Raises:
            TicketError: if its state dict holds something else than the model's own tensors.
        """
        holders: dict[int, nn.Module] = {}
        for module in model.modules():
            for entry in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                holders.setdefault(id(entry), module)
        state = model.state_dict(keep_vars=True)
        modules: dict[str, nn.Module] = {}
        for name, key in self.keys.items():
            holder = holders.get(id(state[key]))
            if holder is None:
                raise TicketError(
                    f"expected the state dict of the model to hold its own parameters, found a "
                    f"copy at {key}: give the module inside of what makes these"
                )
            modules[name] = holder
        return modules

    def branches(self) -> dict[str, str]:
        """The module's name, in a model, that holds the convolutions of each block, by block."""
        return {
            name.removesuffix(".conv1.weight"): ".".join(
                _segments(key)[: _shared(_segments(key), _segments(self.keys[_second(name)]))]
            )
            for name, key in self.keys.items()
            if name.endswith(".conv1.weight")
        }

    def ignored(self, state: State) -> list[str]:
        """The keys of a state dict that the framework's own loaders leave out, too."""
        pattern = self.dialect.ignored
        return [key for key in state if pattern is not None and re.search(pattern, key)]

    def blocks(self) -> Iterator[str]:
        """What the keys of each block begin with, without wrappers."""
        for name, key in self.keys.items():
            if name.endswith(".conv1.weight"):
                block = name.removesuffix("conv1.weight")
                conv, shortcut = (
                    self.dialect.spell(f"{block}{entry}.weight", self.arch)
                    for entry in ("conv1", "downsample.0")
                )
                shared = re.sub(r"[^._]*$", "", conv[: _shared(conv, shortcut)])
                yield unwrapped(key).removesuffix(conv) + shared


def _second(name: str) -> str:
    """The name of a block's second convolution, by that of its first."""
    return name.replace(".conv1.", ".conv2.")


def locate(
    state: State | nn.Module,
    parts: Sequence[str] = PARTS,
    archs: Iterable[ResNet] = ARCHITECTURES.values(),
    prefix: str | None = None,
    compacted: bool = False,
) -> Layout:
    """Find the ResNet trunk in a model or a state dict.

    Args:
        state: a model, or what its ``state_dict()`` returns. Of a trunk and its moving average
            (`MOVING_AVERAGES`) a state dict's trained one is taken; in a model both are wanted,
            so that two trunks are an error there. Equal weights under two names are one trunk.
        parts: the parts of the trunk to find, of `PARTS`; at least one stage.
        archs: the architectures it may have.
        prefix: where the trunk is when there are several: any part of its prefix that no other
            trunk's has (`meant_by`).
        compacted: whether blocks may have fewer channels inside than the architecture has.

    Raises:
        TicketError: if no known layout fits (the closest one is shown), or several trunks do.
    """
    entries = _Entries(state)
    archs = tuple(archs)
    found: dict[str, Layout] = {}
    closest: dict[str, _Attempt] = {}
    for dialect in DIALECTS.values():
        trunks = _trunks(dialect, parts, entries)
        for trunk in trunks:
            for arch in filter(dialect.supports, archs):
                attempt = _Attempt.make(dialect, arch, parts, entries, trunk, trunks, compacted)
                if attempt.fits:
                    keys = MappingProxyType(attempt.keys)
                    found.setdefault(trunk, Layout(dialect, arch, trunk, keys))
                    break
                if trunk not in closest or attempt.likeness > closest[trunk].likeness:
                    closest[trunk] = attempt
    candidates = {**closest, **found}
    meant = list(candidates) if prefix is None else meant_by(prefix, candidates)
    chosen = [trunk for trunk in meant if trunk in found]
    if not chosen:
        raise TicketError(_explanation([closest[t] for t in meant], entries, prefix, list(found)))
    left_out = dict.fromkeys((trunk for trunk in found if trunk not in chosen), "not asked for")
    if isinstance(state, nn.Module):
        averages = {}
    else:
        averages = averages_among(chosen)
        chosen = [trunk for trunk in chosen if trunk not in averages]
    distinct: list[str] = []
    for trunk in sorted(chosen, key=len):
        if any(
            entries.same_trunk(found[trunk], found[other]) and not _have_two_roles(trunk, other)
            for other in distinct
        ):
            left_out[trunk] = "the same weights"
        else:
            distinct.append(trunk)
    if len(distinct) > 1:
        distinct = [trunk for trunk in found if trunk in distinct]
        raise TicketError(
            f"expected one ResNet trunk, found {len(distinct)}, under "
            f"{', '.join(repr(p) for p in distinct)}: give the submodule, or name the prefix "
            "(--prefix) of the one that is meant"
        )
    return replace(found[distinct[0]], left_out=left_out | averages)


def meant_by(prefix: str, trunks: Iterable[str]) -> list[str]:
    """Those of several trunks' whole prefixes that a person means by one.

    It itself, such as "backbone" where there is a "teacher.backbone", too; else all that end in it;
    else all that have it anywhere, as whole segments. Wrappers may be left out.
    """
    trunks = list(trunks)

    def ends(segments: list[str], wanted: list[str]) -> bool:
        return segments[-len(wanted) :] == wanted

    def has(segments: list[str], wanted: list[str]) -> bool:
        return any(ends(segments[:end], wanted) for end in range(len(wanted), len(segments) + 1))

    for fits in (list.__eq__, ends, has):
        for view in (str, unwrapped):
            wanted = _segments(view(prefix))
            if not wanted and (fits is not list.__eq__ or _segments(prefix)):
                continue  # nothing, or nothing but wrappers
            meant = [trunk for trunk in trunks if fits(_segments(view(trunk)), wanted)]
            if meant:
                return meant
    return []


def _have_two_roles(first: str, second: str) -> bool:
    """Whether two trunks are trained apart, by their names, though their weights are equal yet."""
    segments = {*_segments(first), *_segments(second)}
    return {"student", "teacher"} <= segments or bool(averages_among([first, second]))


def _segments(prefix: str) -> list[str]:
    return [segment for segment in prefix.split(".") if segment]


def _shared(first: Sequence[str], second: Sequence[str]) -> int:
    """How many items two sequences begin with in common."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def prefer_trained(prefixes: Iterable[str]) -> list[str]:
    """These prefixes without those of moving averages of other trunks among them."""
    prefixes = list(prefixes)
    averages = averages_among(prefixes)
    return [prefix for prefix in prefixes if prefix not in averages]


def averages_among(prefixes: Iterable[str]) -> dict[str, str]:
    """Those of these trunks' prefixes that `MOVING_AVERAGES` is about, and what they are."""
    plain = {prefix: _segments(unwrapped(prefix)) for prefix in prefixes}
    averages: dict[str, str] = {}
    for prefix, segments in plain.items():
        others = [other for p, other in plain.items() if p != prefix]
        name = ".".join(segments)
        for pattern, trained, what in MOVING_AVERAGES:
            for match in re.finditer(rf"(?<![^.])(?:{pattern})(?![^.])", name):
                instead = name[: match.start()] + match.expand(trained) + name[match.end() :]
                if _segments(unwrapped(instead)) in others:
                    averages.setdefault(prefix, what)
    return averages


def signs_of_others(keys: Iterable[str]) -> str:
    """What else than a plain ResNet the keys are a sign of, to begin a message; "" if nothing."""
    keys = list(keys)
    for pattern, what in OTHERS:
        for key in keys:
            if re.search(pattern, unwrapped(key)):
                return f"it has {what} ({key}): only plain ResNets can be tickets; "
    return ""


class _Entries:
    """A state dict's entries: their shapes, and their keys with and without wrappers."""

    def __init__(self, state: State | nn.Module) -> None:
        self._is_model = isinstance(state, nn.Module)
        if isinstance(state, nn.Module):
            state = state.state_dict(keep_vars=True)
        self._state = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        self.shapes = {key: tuple(value.shape) for key, value in self._state.items()}
        self._plain = {key: unwrapped(key) for key in self.shapes}
        self._under: dict[str, dict[str, str]] = {}

    def under(self, prefix: str) -> Mapping[str, str]:
        """Everything under a prefix: name without wrappers to key."""
        if prefix not in self._under:
            names: dict[str, str] = {}
            for key in self.shapes:
                if key.startswith(prefix):
                    name = unwrapped(key[len(prefix) :])
                    # A wrapper may have another parameter of this name beside the one it wraps.
                    if name not in names or len(key) < len(names[name]):
                        names[name] = key
            self._under[prefix] = names
        return self._under[prefix]

    def nesting(self, spelled: str) -> list[str]:
        """Every prefix under which this name occurs."""
        prefixes = []
        for key, plain in self._plain.items():
            head = plain.removesuffix(spelled)
            if head != plain and (not head or head.endswith(".")):
                prefixes.append(_real_prefix(key, head.count(".")))
        return list(dict.fromkeys(prefixes))

    def same(self, key: str, other: str) -> bool:
        """Whether two entries are one: in a model the same tensor, in a file the same values."""
        first, second = self._state[key], self._state[other]
        if self._is_model or first.is_meta or second.is_meta:
            return first is second
        return (first.shape, first.dtype, first.device) == (
            second.shape,
            second.dtype,
            second.device,
        ) and torch.equal(first, second)

    def same_trunk(self, first: Layout, second: Layout) -> bool:
        return first.keys.keys() == second.keys.keys() and all(
            self.same(key, second.keys[name]) for name, key in first.keys.items()
        )


def _real_prefix(key: str, count: int) -> str:
    """The first segments of a key, this many besides wrappers, with the wrappers among them."""
    segments = key.split(".")
    end = 0
    while segments[end] in WRAPPERS or count:
        count -= segments[end] not in WRAPPERS
        end += 1
    return "".join(f"{segment}." for segment in segments[:end])


@dataclass(frozen=True)
class _Attempt:
    """One dialect and architecture laid over a state dict, with what does not fit."""

    dialect: Dialect
    arch: ResNet
    trunk: str
    keys: dict[str, str]  # what was found, at its right shape
    missing: list[str]
    misshapen: list[str]
    beyond: list[str]  # blocks or convolutions the architecture does not have

    @classmethod
    def make(
        cls,
        dialect: Dialect,
        arch: ResNet,
        parts: Sequence[str],
        entries: _Entries,
        trunk: str,
        trunks: Sequence[str],
        compacted: bool,
    ) -> "_Attempt":
        prefixes = {
            part: _prefix_of(part, dialect, arch, entries, trunk, trunks)
            for part in PARTS
            if part in parts
        }
        keys: dict[str, str] = {}
        missing, misshapen, beyond = [], [], []
        spelled = {
            name: (prefixes[part_of(name)], key)
            for name, key in dialect.table(arch).items()
            if part_of(name) in parts
        }
        found = {
            name: entries.under(prefix)[key]
            for name, (prefix, key) in spelled.items()
            if key in entries.under(prefix)
        }
        shapes = {name: entries.shapes[key] for name, key in found.items()}
        wanted = arch.narrowed(shapes) if compacted else arch.shapes
        optional: tuple[str, ...] = (_COUNTER,)
        if dialect.affine and not any(name.endswith(tuple(_STATISTICS)) for name in found):
            optional += tuple(_STATISTICS)
        for name, where in spelled.items():
            if name not in found:
                if not name.endswith(optional):
                    missing.append("".join(where))
            elif shapes[name] != wanted[name]:
                misshapen.append(f"{found[name]} is {shapes[name]} instead of {wanted[name]}")
            else:
                keys[name] = found[name]
        unwanted = [
            (stage, f"{stage}.{depth}.conv1")
            for stage, depth in zip(STAGES, arch.depths, strict=True)
        ]
        if not arch.bottleneck:
            unwanted += [(stage, f"{stage}.0.conv3") for stage in STAGES]
        for stage, name in unwanted:
            if stage in parts:
                key = entries.under(prefixes[stage]).get(dialect.spell(f"{name}.weight", arch))
                if key is not None:
                    beyond.append(key)
        return cls(dialect, arch, trunk, keys, missing, misshapen, beyond)

    @property
    def fits(self) -> bool:
        return not (self.missing or self.misshapen or self.beyond)

    @property
    def likeness(self) -> float:
        return (len(self.keys) - len(self.beyond)) / len(self.arch.shapes)


def _explanation(
    attempts: Sequence[_Attempt], entries: _Entries, prefix: str | None, found: Sequence[str]
) -> str:
    """Why there is no trunk, for a person.

    Args:
        attempts: everything under the prefix that looks like a trunk, and does not fit.
        entries: the state dict.
        prefix: the prefix that was asked for.
        found: the prefixes of trunks, which are not under that one.
    """
    where = f" under the prefix {prefix!r}" if prefix is not None else ""
    if not attempts and found:
        return (
            f"expected a ResNet trunk{where}, found {'them' if len(found) > 1 else 'one'} under "
            f"{', '.join(repr(trunk) for trunk in found)}: give one of these, or a part of it that "
            "no other has"
        )
    if not attempts:
        return _nothing(entries.shapes, where)
    closest = max(attempts, key=lambda attempt: attempt.likeness)
    problems = [
        f"{len(those)} {what} (such as {'; '.join(those[:3])})"
        for what, those in (
            ("missing", closest.missing),
            ("of another shape", closest.misshapen),
            ("more than it has", closest.beyond),
        )
        if those
    ]
    signs = signs_of_others([*entries.under(closest.trunk), *entries.shapes])
    if not signs and all(name.endswith(tuple(_STATISTICS)) for name in closest.missing):
        signs = (
            "its normalisation has no running means and variances (GroupNorm, or BatchNorm with "
            "track_running_stats=False): "
            if closest.missing
            else ""
        )
    return (
        f"{signs}no known ResNet layout fits{where}; the closest is "
        f"{closest.dialect.name} {closest.arch.name}, against which there are "
        f"{', '.join(problems)}. "
        "A trunk needs all four stages, BatchNorm statistics and an unchanged stem"
    )


def _nothing(shapes: Mapping[str, Shape], where: str) -> str:
    signs = signs_of_others(shapes)
    arch, share = _by_shapes(shapes)
    if not signs and share > 0.9:
        name = f"{STAGES[0]}.0.conv1.weight"
        found, spelled, dialect = _closest_names(
            [key for key, shape in shapes.items() if shape == arch.shapes[name]],
            {dialect.spell(name, arch): dialect.name for dialect in DIALECTS.values()},
        )
        signs = (
            f"{100 * share:.0f} % of a {arch.name}'s convolutions are there by their shapes, but "
            f"under names that no known layout has: the closest is {dialect}'s, with {spelled} "
            f"where this has {found}. Rename them as torchvision does, such as {name}; "
        )
    return (
        f"{signs}expected a ResNet in one of the known layouts "
        f"({', '.join(DIALECTS)}){where}, found {len(shapes)} entries such as "
        f"{', '.join(list(shapes)[:3]) or 'none'}; none of them is a first block. "
        "Is it a ResNet checkpoint?"
    )


def _by_shapes(shapes: Mapping[str, Shape]) -> tuple[ResNet, float]:
    """The architecture with the largest share of its convolutions there, by their shapes alone."""
    there: Counter[Shape] = Counter(shapes.values())

    def share(arch: ResNet) -> float:
        wanted: Counter[Shape] = Counter(s for s in arch.shapes.values() if len(s) == 4)
        return (wanted & there).total() / wanted.total()

    # Of two that are there whole, the deeper one: it has all that the other has.
    best = max(ARCHITECTURES.values(), key=lambda arch: (share(arch), sum(arch.depths)))
    return best, share(best)


def _closest_names(keys: Sequence[str], names: Mapping[str, str]) -> tuple[str, str, str]:
    """A key, and the name that is most like it with what it is mapped to."""
    _, key, name = max(
        (difflib.SequenceMatcher(None, key, name).ratio(), key, name)
        for key in keys
        for name in names
    )
    return key, name, names[name]


def _trunks(dialect: Dialect, parts: Sequence[str], entries: _Entries) -> list[str]:
    """The prefixes of everything that looks like a first block in this dialect."""
    first = next(stage for stage in STAGES if stage in parts)
    any_arch = next(iter(ARCHITECTURES.values()))  # all spell this name alike
    return entries.nesting(dialect.spell(f"{first}.0.conv1.weight", any_arch))


def _prefix_of(
    part: str,
    dialect: Dialect,
    arch: ResNet,
    entries: _Entries,
    trunk: str,
    trunks: Sequence[str],
) -> str:
    """Where a part of the trunk under this prefix is nested.

    A part may live elsewhere than the rest: detectron2's C4 models keep res5 in the ROI heads, and
    maskrcnn-benchmark has a module for the stem. It is the one next to the trunk then, and not
    another trunk's.
    """
    name = next(iter(arch.shapes)) if part == "stem" else f"{part}.0.conv1.weight"
    spelled = dialect.spell(name, arch)
    if spelled in entries.under(trunk):
        return trunk
    nearest: list[str] = []
    most = -1
    for prefix in entries.nesting(spelled):
        if prefix in trunks or (
            part == "stem" and entries.shapes[entries.under(prefix)[spelled]] != arch.shapes[name]
        ):
            continue  # blocks have a conv1, too, of another shape
        shared = _shared(_segments(prefix), _segments(trunk))
        if shared > most:
            nearest, most = [prefix], shared
        elif shared == most and not entries.same(
            entries.under(prefix)[spelled], entries.under(nearest[0])[spelled]
        ):
            nearest.append(prefix)
    return nearest[0] if len(nearest) == 1 else trunk


def locate_prunable(keys: Iterable[str], arch: ResNet) -> list[Layout]:
    """Where prunable weights of an architecture are named, even if only some of them are.

    For masks, which may cover some layers only. `Layout.keys` holds what was found.

    Returns:
        One layout for every prefix of the dialect that explains most keys, the one with most
        keys first; nothing if no dialect explains any.
    """
    plain = {key: unwrapped(key) for key in keys}
    best: list[Layout] = []
    most = 0
    for dialect in filter(lambda dialect: dialect.supports(arch), DIALECTS.values()):
        table = dialect.table(arch)
        names = {table[name]: name for name in arch.prunable}
        found: dict[str, dict[str, str]] = {}
        for key, whole in plain.items():
            for count, start in enumerate((0, *(m.end() for m in re.finditer(r"\.", whole)))):
                if whole[start:] in names:
                    prefix = _real_prefix(key, count)
                    found.setdefault(prefix, {})[names[whole[start:]]] = key
                    break
        covered = sum(len(names) for names in found.values())
        if covered > most:
            most = covered
            ranked = sorted(found.items(), key=lambda item: -len(item[1]))
            best = [Layout(dialect, arch, prefix, names) for prefix, names in ranked]
    return best


def from_torchvision(
    state: State, arch: ResNet, dialect: str, prefix: str = ""
) -> dict[str, Tensor]:
    """A trunk's state dict in torchvision's names, respelled in another dialect.

    Raises:
        TicketError: if the dialect is unknown or cannot express the architecture.
    """
    target = get_dialect(dialect)
    if not target.supports(arch):
        raise TicketError(
            f"{target.name} has no counterpart of {arch.name}'s deep stem: choose torchvision's, "
            "timm's or mmseg's names"
        )
    return {prefix + target.spell(name, arch): value for name, value in state.items()}


def zero_counters(arch: ResNet) -> dict[str, Tensor]:
    """``num_batches_tracked`` at zero for every normalisation, for sources that leave it out."""
    return {n: torch.zeros((), dtype=torch.long) for n in arch.shapes if n.endswith(_COUNTER)}
