"""Dialects: how each framework spells the names of a ResNet's parameters.

A dialect is a small table of substitutions on torchvision's names. `locate` reads one backwards:
given a model's or a checkpoint's keys it finds the dialect, the architecture and the place of the
trunk in it, however deep the trunk is nested. Adding a dialect is adding a row to `DIALECTS`; what
differs from a known dialect by a prefix alone (MoCo, VISSL, solo-learn, …) needs none.
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from lth_plugins.ticket.arch import ARCHITECTURES, PARTS, STAGES, ResNet, Shape, part_of
from lth_plugins.ticket.errors import TicketError

State = Mapping[str, Tensor]

_OPTIONAL = ".num_batches_tracked"  # a counter: FrozenBatchNorm and old checkpoints have none


@dataclass(frozen=True)
class Dialect:
    """One way of naming a ResNet's parameters.

    Attributes:
        name: what users call it.
        rules: (regular expression, replacement) pairs, applied in order to a torchvision name.
        deep_stem_rules: applied before ``rules`` where the stem is deep; None where the framework
            has no deep stem that fits.
    """

    name: str
    rules: tuple[tuple[str, str], ...] = ()
    deep_stem_rules: tuple[tuple[str, str], ...] | None = ()

    def supports(self, arch: ResNet) -> bool:
        return not arch.deep_stem or self.deep_stem_rules is not None

    def spell(self, name: str, arch: ResNet) -> str:
        """The framework's name, without prefix, of a parameter in torchvision's naming."""
        rules = self.rules
        if arch.deep_stem:
            rules = (self.deep_stem_rules or ()) + rules
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        return name

    def table(self, arch: ResNet) -> Mapping[str, str]:
        """The framework's name of every entry of a trunk, by torchvision name."""
        return _table(self, arch)


@functools.cache
def _table(dialect: Dialect, arch: ResNet) -> Mapping[str, str]:
    return MappingProxyType({name: dialect.spell(name, arch) for name in arch.shapes})


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
            Dialect(
                "detectron2",
                rules=(
                    (r"^conv1\.", "stem.conv1."),
                    (r"^bn1\.", "stem.conv1.norm."),
                    (r"^layer1\.", "res2."),
                    (r"^layer2\.", "res3."),
                    (r"^layer3\.", "res4."),
                    (r"^layer4\.", "res5."),
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
                    (r"^layer1\.", "sections.0."),
                    (r"^layer2\.", "sections.1."),
                    (r"^layer3\.", "sections.2."),
                    (r"^layer4\.", "sections.3."),
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
                    (r"^layer1\.", "RCNN_base.4."),
                    (r"^layer2\.", "RCNN_base.5."),
                    (r"^layer3\.", "RCNN_base.6."),
                    (r"^layer4\.", "RCNN_top.0."),
                ),
                deep_stem_rules=None,
            ),
            # nn.Sequential(*resnet.children()), as lightly's examples build their backbones.
            Dialect(
                "sequential",
                rules=(
                    (r"^conv1\.", "0."),
                    (r"^bn1\.", "1."),
                    (r"^layer1\.", "4."),
                    (r"^layer2\.", "5."),
                    (r"^layer3\.", "6."),
                    (r"^layer4\.", "7."),
                ),
            ),
        )
    }
)
ALIASES: Mapping[str, str] = MappingProxyType({"timm": "torchvision"})

MOVING_AVERAGES: tuple[tuple[str, str], ...] = (
    ("encoder_k.", "encoder_q."),  # MoCo v1, v2
    ("momentum_encoder.", "base_encoder."),  # MoCo v3
    ("momentum_backbone.", "backbone."),  # solo-learn
    ("momentum_encoder.", "encoder."),  # solo-learn, before it said backbone
    ("backbone_momentum.", "backbone."),  # lightly's examples
    ("backbone.", "query_backbone."),  # lightly's MoCo benchmark
    ("encoder_k.0.", "encoder_q.0."),  # mmselfsup 0.x
    ("encoder_q.0.", "backbone."),  # the same module under two names, also mmselfsup 0.x
    ("encoder_k.0.", "backbone."),  # mmselfsup as published
    ("encoder_k.module.0.", "backbone."),  # mmselfsup 1.0, mmpretrain
    ("target_net.module.0.", "backbone."),  # their BYOL
)
"""Prefixes under which a state dict holds a second trunk that is not trained, or is the same, and
the prefix of the trained one, which `locate` prefers."""

OTHERS: tuple[tuple[str, str], ...] = (
    (r"\.(main_conv|mixing_conv)\.0\.", "selective kernels (simCLR v2 'sk1')"),
    (r"(^|\.)se(_module)?\.(fc|conv)", "squeeze-and-excitation blocks"),
    (r"(^|\.)(cls_token|pos_embed)$", "a vision transformer"),
    (r"(^|\.)res2_0_branch2a_w$", "Caffe2 blob names, which detectron2 can convert"),
    (r"\.parametrizations\.", "parametrised weights: torch.nn.utils.parametrize can remove them"),
)
"""Patterns of keys that no ticket has, and what they are a sign of, for error messages."""


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
    """

    dialect: Dialect
    arch: ResNet
    prefix: str
    keys: Mapping[str, str]

    def extract(self, state: State) -> dict[str, Tensor]:
        """The trunk's entries of this state dict under torchvision's names (no copies)."""
        return {name: state[key] for name, key in self.keys.items()}


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
            so that two trunks are an error there.
        parts: the parts of the trunk to find, of `PARTS`; at least one stage.
        archs: the architectures it may have.
        prefix: where the trunk is when there are several: the end of its prefix will do.
        compacted: whether blocks may have fewer channels inside than the architecture has.

    Raises:
        TicketError: if no known layout fits (the closest one is shown), or several trunks do.
    """
    is_model = isinstance(state, nn.Module)
    if isinstance(state, nn.Module):
        state = state.state_dict(keep_vars=True)  # to look at: one that leaks is not saved here
    shapes = {key: tuple(v.shape) for key, v in state.items() if isinstance(v, Tensor)}
    archs = tuple(archs)
    found: dict[str, Layout] = {}
    closest: _Attempt | None = None
    for dialect in DIALECTS.values():
        for trunk in _trunks(dialect, parts, shapes):
            if prefix is not None and not meant_by(prefix, [trunk]):
                continue
            for arch in filter(dialect.supports, archs):
                attempt = _Attempt.make(dialect, arch, parts, shapes, trunk, compacted)
                if attempt.fits:
                    keys = MappingProxyType(attempt.keys)
                    found.setdefault(trunk, Layout(dialect, arch, trunk, keys))
                    break
                if closest is None or attempt.likeness > closest.likeness:
                    closest = attempt
    if found:
        chosen = list(found) if is_model else prefer_trained(found)
        if prefix is not None:
            chosen = meant_by(prefix, chosen)
        if len(chosen) > 1:
            raise TicketError(
                f"expected one ResNet trunk, found {len(chosen)}, under "
                f"{', '.join(repr(p) for p in chosen)}: give the submodule, or name the prefix "
                "(--prefix) of the one that is meant"
            )
        return found[chosen[0]]
    raise TicketError(closest.explanation(shapes) if closest else _nothing(shapes, prefix))


def meant_by(prefix: str, trunks: Iterable[str]) -> list[str]:
    """Those of several trunks' whole prefixes that a person means by one.

    It itself, such as "backbone" where there is a "teacher.backbone", too; else all that end in it.
    """
    prefix, trunks = prefix.strip("."), list(trunks)
    same = [trunk for trunk in trunks if trunk.strip(".") == prefix]
    return same or [trunk for trunk in trunks if prefix and f".{trunk}".endswith(f".{prefix}.")]


def prefer_trained(prefixes: Iterable[str]) -> list[str]:
    """These prefixes without those of moving averages of other trunks among them."""
    prefixes = list(prefixes)

    def is_average(prefix: str) -> bool:
        return any(
            f".{prefix}".endswith(f".{average}")
            and prefix.removesuffix(average) + trained in prefixes
            for average, trained in MOVING_AVERAGES
        )

    return [prefix for prefix in prefixes if not is_average(prefix)]


def _nothing(shapes: Mapping[str, Shape], prefix: str | None) -> str:
    where = f" under the prefix {prefix!r}" if prefix is not None else ""
    return (
        "expected a ResNet in one of the known layouts "
        f"({', '.join(DIALECTS)}){where}, found {len(shapes)} entries such as "
        f"{', '.join(list(shapes)[:3]) or 'none'}; none of them is a first block. "
        f"{signs_of_others(shapes)}Is it a ResNet checkpoint?"
    )


def signs_of_others(keys: Iterable[str]) -> str:
    """What else than a plain ResNet the keys are a sign of, as a sentence; "" if nothing."""
    keys = list(keys)
    for pattern, what in OTHERS:
        for key in keys:
            if re.search(pattern, key):
                return f"It has {what}, such as {key}: only plain ResNets can be tickets. "
    return ""


@dataclass(frozen=True)
class _Attempt:
    """One dialect and architecture laid over a state dict, with what does not fit."""

    dialect: Dialect
    arch: ResNet
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
        shapes: Mapping[str, Shape],
        trunk: str,
        compacted: bool,
    ) -> "_Attempt":
        prefixes = _prefixes(dialect, arch, parts, shapes, trunk)
        keys: dict[str, str] = {}
        missing, misshapen, beyond = [], [], []
        spelled = {
            name: prefixes[part_of(name)] + key
            for name, key in dialect.table(arch).items()
            if part_of(name) in parts
        }
        wanted = arch.shapes
        if compacted:
            wanted = arch.narrowed({n: shapes[key] for n, key in spelled.items() if key in shapes})
        for name, key in spelled.items():
            shape = wanted[name]
            if key not in shapes:
                if not name.endswith(_OPTIONAL):
                    missing.append(key)
            elif shapes[key] != shape:
                misshapen.append(f"{key} is {shapes[key]} instead of {shape}")
            else:
                keys[name] = key
        unwanted = [
            (stage, f"{stage}.{depth}.conv1")
            for stage, depth in zip(STAGES, arch.depths, strict=True)
        ]
        if not arch.bottleneck:
            unwanted += [(stage, f"{stage}.0.conv3") for stage in STAGES]
        for stage, name in unwanted:
            if stage in parts:
                key = prefixes[stage] + dialect.spell(f"{name}.weight", arch)
                if key in shapes:
                    beyond.append(key)
        return cls(dialect, arch, keys, missing, misshapen, beyond)

    @property
    def fits(self) -> bool:
        return not (self.missing or self.misshapen or self.beyond)

    @property
    def likeness(self) -> float:
        return (len(self.keys) - len(self.beyond)) / len(self.arch.shapes)

    def explanation(self, shapes: Iterable[str]) -> str:
        parts = [
            f"{len(problems)} {what} (such as {'; '.join(problems[:3])})"
            for what, problems in (
                ("missing", self.missing),
                ("of another shape", self.misshapen),
                ("more than it has", self.beyond),
            )
            if problems
        ]
        return (
            "no known ResNet layout fits; the closest is "
            f"{self.dialect.name} {self.arch.name}, against which there are {', '.join(parts)}. "
            f"{signs_of_others(shapes)}"
            "A trunk needs all four stages, BatchNorm statistics and an unchanged stem"
        )


def _trunks(dialect: Dialect, parts: Sequence[str], shapes: Mapping[str, Shape]) -> list[str]:
    """The prefixes of everything that looks like a first block in this dialect."""
    first = next(stage for stage in STAGES if stage in parts)
    any_arch = next(iter(ARCHITECTURES.values()))  # all spell this name alike
    return _nesting(dialect.spell(f"{first}.0.conv1.weight", any_arch), shapes)


def _prefixes(
    dialect: Dialect, arch: ResNet, parts: Sequence[str], shapes: Mapping[str, Shape], trunk: str
) -> dict[str, str]:
    """Where each part of the trunk under this prefix is nested.

    A stage may live elsewhere than the rest: detectron2's C4 models keep res5 in the ROI heads.
    """
    prefixes = {"stem": trunk}
    for stage in STAGES:
        if stage in parts:
            spelled = dialect.spell(f"{stage}.0.conv1.weight", arch)
            nested = _nesting(spelled, shapes) if trunk + spelled not in shapes else []
            prefixes[stage] = nested[0] if len(nested) == 1 else trunk
    return prefixes


def _nesting(spelled: str, shapes: Mapping[str, Shape]) -> list[str]:
    """Every prefix under which this name occurs."""
    return [
        key[: -len(spelled)]
        for key in shapes
        if key.endswith(spelled) and (len(key) == len(spelled) or key[-len(spelled) - 1] == ".")
    ]


def locate_prunable(keys: Iterable[str], arch: ResNet) -> list[Layout]:
    """Where prunable weights of an architecture are named, even if only some of them are.

    For masks, which may cover some layers only. `Layout.keys` holds what was found.

    Returns:
        One layout for every prefix of the dialect that explains most keys, the one with most
        keys first; nothing if no dialect explains any.
    """
    keys = list(keys)
    best: list[Layout] = []
    most = 0
    for dialect in filter(lambda dialect: dialect.supports(arch), DIALECTS.values()):
        table = dialect.table(arch)
        names = {table[name]: name for name in arch.prunable}
        found: dict[str, dict[str, str]] = {}
        for key in keys:
            for start in (0, *(match.end() for match in re.finditer(r"\.", key))):
                if key[start:] in names:
                    found.setdefault(key[:start], {})[names[key[start:]]] = key
                    break
        covered = sum(len(names) for names in found.values())
        if covered > most:
            most = covered
            ranked = sorted(found.items(), key=lambda item: -len(item[1]))
            best = [Layout(dialect, arch, prefix, names) for prefix, names in ranked]
    return best


def to_torchvision(state: State | nn.Module) -> tuple[ResNet, dict[str, Tensor]]:
    """The architecture of anything `locate` reads, and its trunk in torchvision's names.

    Raises:
        TicketError: as `locate`.
    """
    if isinstance(state, nn.Module):
        state = state.state_dict()
    layout = locate(state)
    return layout.arch, layout.extract(state)


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
    return {n: torch.zeros((), dtype=torch.long) for n in arch.shapes if n.endswith(_OPTIONAL)}
