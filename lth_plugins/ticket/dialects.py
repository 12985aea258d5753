"""Dialects: how each framework spells the names of a ResNet's parameters.

A dialect is a small table of substitutions on torchvision's names. `locate` reads one backwards:
given a model's or a checkpoint's keys it finds the dialect, the architecture and the place of the
trunk in it, however deep the trunk is nested. Adding a dialect is adding a row to `DIALECTS`.
"""

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
        prefixes: where the trunk sits when a state dict holds several, the wanted one first.
    """

    name: str
    rules: tuple[tuple[str, str], ...] = ()
    deep_stem_rules: tuple[tuple[str, str], ...] | None = ()
    prefixes: tuple[str, ...] = ()

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


DIALECTS: Mapping[str, Dialect] = MappingProxyType(
    {
        dialect.name: dialect
        for dialect in (
            # timm agrees with torchvision on every name torchvision has.
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
        )
    }
)
ALIASES: Mapping[str, str] = MappingProxyType(
    {"timm": "torchvision", "mmdet": "mmseg", "mmpretrain": "mmseg"}
)


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
        keys: torchvision name to the key in the state dict, in network order. Entries that a
            framework may leave out (``num_batches_tracked``) are absent here when they are there.
    """

    dialect: Dialect
    arch: ResNet
    keys: Mapping[str, str]

    def extract(self, state: State) -> dict[str, Tensor]:
        """The trunk's entries of this state dict under torchvision's names (no copies)."""
        return {name: state[key] for name, key in self.keys.items()}


def locate(
    state: State | nn.Module,
    parts: Sequence[str] = PARTS,
    archs: Iterable[ResNet] = ARCHITECTURES.values(),
) -> Layout:
    """Find the ResNet trunk in a model or a state dict.

    Args:
        state: a model, or what its ``state_dict()`` returns.
        parts: the parts of the trunk to find, of `PARTS`; at least one stage.
        archs: the architectures it may have.

    Raises:
        TicketError: if no known layout fits (the closest one is shown), or several trunks do.
    """
    if isinstance(state, nn.Module):
        state = state.state_dict()
    shapes = {key: tuple(v.shape) for key, v in state.items() if isinstance(v, Tensor)}
    closest: _Attempt | None = None
    for dialect in DIALECTS.values():
        for arch in archs:
            attempt = dialect.supports(arch) and _Attempt.make(dialect, arch, parts, shapes)
            if not attempt:
                continue
            if attempt.fits:
                return Layout(dialect, arch, MappingProxyType(attempt.keys))
            if closest is None or attempt.likeness > closest.likeness:
                closest = attempt
    if closest is None:
        raise TicketError(
            "expected a ResNet in one of the known layouts "
            f"({', '.join(DIALECTS)}), found {len(shapes)} entries such as "
            f"{', '.join(list(shapes)[:3]) or 'none'}; none of them is a first block. "
            "Is it a ResNet checkpoint?"
        )
    raise TicketError(closest.explanation())


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
        cls, dialect: Dialect, arch: ResNet, parts: Sequence[str], shapes: Mapping[str, Shape]
    ) -> "_Attempt | None":
        """None if not even a first block is there."""
        prefixes = _prefixes(dialect, arch, parts, shapes)
        if prefixes is None:
            return None
        keys: dict[str, str] = {}
        missing, misshapen, beyond = [], [], []
        for name, shape in arch.shapes.items():
            if part_of(name) not in parts:
                continue
            key = prefixes[part_of(name)] + dialect.spell(name, arch)
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

    def explanation(self) -> str:
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
            "A trunk needs all four stages, BatchNorm statistics and an unchanged stem"
        )


def _prefixes(
    dialect: Dialect, arch: ResNet, parts: Sequence[str], shapes: Mapping[str, Shape]
) -> dict[str, str] | None:
    """Where each part is nested; None if there is no first block in this dialect.

    A stage may live elsewhere than the rest: detectron2's C4 models keep res5 in the ROI heads.
    """
    stages = [stage for stage in STAGES if stage in parts]
    nested = {
        stage: _nesting(dialect.spell(f"{stage}.0.conv1.weight", arch), shapes) for stage in stages
    }
    trunks = nested[stages[0]]
    if not trunks:
        return None
    if len(trunks) > 1:
        preferred = [prefix for prefix in dialect.prefixes if prefix in trunks]
        if not preferred:
            raise TicketError(
                f"expected one ResNet trunk, found {len(trunks)}, under "
                f"{', '.join(repr(p) for p in trunks)}: give the submodule, or the part of the "
                "state dict, that is meant"
            )
        trunks = preferred
    prefixes = {stage: p[0] if len(p) == 1 else trunks[0] for stage, p in nested.items()}
    return {"stem": trunks[0], **prefixes}


def _nesting(spelled: str, shapes: Mapping[str, Shape]) -> list[str]:
    """Every prefix under which this name occurs."""
    return [
        key[: -len(spelled)]
        for key in shapes
        if key.endswith(spelled) and (len(key) == len(spelled) or key[-len(spelled) - 1] == ".")
    ]


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
        raise TicketError(f"{target.name} has no counterpart of {arch.name}'s deep stem")
    return {prefix + target.spell(name, arch): value for name, value in state.items()}


def zero_counters(arch: ResNet) -> dict[str, Tensor]:
    """``num_batches_tracked`` at zero for every normalisation, for sources that leave it out."""
    return {n: torch.zeros((), dtype=torch.long) for n in arch.shapes if n.endswith(_OPTIONAL)}
