"""`locate`: find the ResNet trunk in a model or a state dict, however deep it is nested.

Every dialect is laid over every place that looks like a first block; the architecture that fits
says which ResNet it is. Where nothing fits, the closest attempt is what the error is about.
"""

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn

from lth_plugins.errors import TicketError
from lth_plugins.ticket.arch import ARCHITECTURES, PARTS, STAGES, ResNet, Shape, part_of
from lth_plugins.ticket.averages import averages_among
from lth_plugins.ticket.dialects import COUNTER, DIALECTS, STATISTICS, Dialect, distinct_dialects
from lth_plugins.ticket.keys import (
    State,
    is_slimmed,
    real_prefix,
    segments_of,
    shared_start,
    unwrapped,
)
from lth_plugins.ticket.layout import Layout
from lth_plugins.ticket.signs import signs_of_others

_Widths = Literal["full", "inner", "any"]
"""Which widths may be less than the architecture's: none, those inside blocks, or all."""


def locate(
    state: State | nn.Module,
    parts: Sequence[str] = PARTS,
    archs: Iterable[ResNet] = ARCHITECTURES.values(),
    prefix: str | None = None,
    compacted: bool = False,
    slimmed: bool = False,
) -> Layout:
    """Find the ResNet trunk in a model or a state dict.

    Args:
        state: a model, or what its ``state_dict()`` returns. Of a trunk and its moving average
            (`MOVING_AVERAGES`) a state dict's trained one is taken; in a model both are wanted,
            so that two trunks are an error there. Equal weights under two names are one trunk.
        parts: the parts of the trunk to find, of `PARTS`; at least one stage.
        archs: the architectures it may have, each for images of any number of channels.
        prefix: where the trunk is when there are several: any part of its prefix that no other
            trunk's has (`meant_by`).
        compacted: whether blocks may have fewer channels inside than the architecture has.
        slimmed: whether it may have fewer channels everywhere, as long as they go together; so may
            that of a model, or a state dict, that says that it is slimmed (`is_slimmed`). The
            layout's architecture has its widths.

    Raises:
        TicketError: if no known layout fits (the closest one is shown), or several trunks do.
    """
    entries = _Entries(state)
    archs = tuple(archs)
    slimmed = slimmed or entries.slimmed
    found: dict[str, Layout] = {}
    closest: dict[str, _Attempt] = {}
    for dialect in distinct_dialects():
        trunks = _trunks(dialect, parts, entries)
        for trunk in trunks:
            for arch in filter(dialect.supports, archs):
                widths: _Widths = "any" if slimmed else "inner" if compacted else "full"
                attempt = _Attempt.make(dialect, arch, parts, entries, trunk, trunks, widths)
                if attempt.fits:
                    keys = MappingProxyType(attempt.keys)
                    found.setdefault(trunk, Layout(dialect, attempt.arch, trunk, keys))
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
            wanted = segments_of(view(prefix))
            if not wanted and (fits is not list.__eq__ or segments_of(prefix)):
                continue  # nothing, or nothing but wrappers
            meant = [trunk for trunk in trunks if fits(segments_of(view(trunk)), wanted)]
            if meant:
                return meant
    return []


def _have_two_roles(first: str, second: str) -> bool:
    """Whether two trunks are trained apart, by their names, though their weights are equal yet."""
    segments = {*segments_of(first), *segments_of(second)}
    return {"student", "teacher"} <= segments or bool(averages_among([first, second]))


class _Entries:
    """A state dict's entries: their shapes, and their keys with and without wrappers."""

    def __init__(self, state: State | nn.Module) -> None:
        self._is_model = isinstance(state, nn.Module)
        if isinstance(state, nn.Module):
            state = state.state_dict(keep_vars=True)
        self.slimmed = is_slimmed(state)
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
                prefixes.append(real_prefix(key, head.count(".")))
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
        widths: _Widths,
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
        if widths == "any" and not arch.widths:
            arch = arch.as_wide_as(shapes)
        stem = shapes.get(next(iter(arch.shapes)), ())
        if arch.is_stem(stem):
            arch = arch.reading(stem[1])
        wanted = arch.narrowed(shapes) if widths == "inner" else arch.shapes
        optional: tuple[str, ...] = (COUNTER,)
        if dialect.affine and not any(name.endswith(tuple(STATISTICS)) for name in found):
            optional += tuple(STATISTICS)
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
    """Explain why no trunk was found.

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
    if not signs and all(name.endswith(tuple(STATISTICS)) for name in closest.missing):
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
            {dialect.spell(name, arch): dialect.name for dialect in distinct_dialects()},
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

    A part may live apart from the others: detectron2's C4 models keep res5 in the ROI heads, and
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
            part == "stem" and not arch.is_stem(entries.shapes[entries.under(prefix)[spelled]])
        ):
            continue  # blocks have a conv1, too, of another shape
        shared = shared_start(segments_of(prefix), segments_of(trunk))
        if shared > most:
            nearest, most = [prefix], shared
        elif shared == most and not entries.same(
            entries.under(prefix)[spelled], entries.under(nearest[0])[spelled]
        ):
            nearest.append(prefix)
    return nearest[0] if len(nearest) == 1 else trunk
