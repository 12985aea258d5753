"""Checkpoints of other frameworks to tickets and back. `checkpoints` reads the files."""

import json
import logging
import math
import os
import re
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from lth_plugins.errors import (
    ConfigError,
    LthError,
    TicketError,
    enough_memory,
    printable,
)
from lth_plugins.ticket.arch import ResNet, part_of
from lth_plugins.ticket.averages import prefer_trained
from lth_plugins.ticket.file import holds_ticket
from lth_plugins.ticket.foreign.checkpoints import Entries, read_checkpoint
from lth_plugins.ticket.keys import State, some
from lth_plugins.ticket.layout import Layout, locate_prunable
from lth_plugins.ticket.locating import meant_by
from lth_plugins.ticket.masked_state import check_has_masks, outside_keys, split_masks
from lth_plugins.ticket.masks import Masks
from lth_plugins.ticket.meta import IMAGENET, UNIT_RANGE, InputSpec, TicketMeta
from lth_plugins.ticket.ticket import Ticket
from lth_plugins.ticket.trunk import read_trunk

logger = logging.getLogger(__name__)

ZEROS = "zeros"
"""For the masks of `from_checkpoint`: those of the weights that are exactly zero."""

_MENTION = 1000
"""Exact zeros are mentioned from one in this many weights: fewer come of rounding."""

_ANTI_ALIASED = r"resnet[a-z]*(blur|aa)\d|anti-?_?alias"
"""What timm calls, among others, anti-aliased ResNets, whose parameters are a plain one's."""


@enough_memory()
def from_checkpoint(
    path: str | PathLike[str],
    source: str = "unknown",
    input: InputSpec | None = None,
    *,
    masks: Path | str | None = None,
    weights: str | PathLike[str] | None = None,
    prefix: str | None = None,
    stride_in_1x1: bool = False,
    skip_objects: bool = False,
) -> Ticket:
    """A ticket of a checkpoint in any known dialect.

    Masks that the checkpoint brings along (``*_mask`` entries, as ``torch.nn.utils.prune`` writes
    them) are kept; layers without one are kept whole. Without any, the ticket is dense. Masks of
    the stem or of heads are left out; those of normalisation and biases are applied to them.

    Args:
        path: a file that `read_checkpoint` reads.
        source: the pre-training it comes from.
        input: the input that its network was trained on; by default `default_input`.
        masks: a file of masks, under their parameters' names with or without ``_mask``, or under
            their modules'; or `ZEROS`: what is exactly zero among the prunable weights is pruned.
        weights: a file with θ, of which then only the masks come from ``path``.
        prefix: which trunk of ``path``, if it holds several.
        stride_in_1x1: whether bottlenecks have their stride in the first 1x1 convolution.
        skip_objects: see `read_checkpoint`.

    Raises:
        TicketError: if a file cannot be read safely, no known layout fits, or there are no masks
            where some are asked for.
    """
    path = Path(path)
    weights = None if weights is None else Path(weights)
    if weights is not None and isinstance(masks, Path):
        raise ConfigError(
            "expected one of a file of masks and a file of weights, found both: give the weights "
            "as the checkpoint and the masks as --mask"
        )
    if os.path.isfile(path) and holds_ticket(path):  # for path.is_file() a name may be too long
        raise TicketError(
            f"expected a checkpoint of another framework, found a ticket at {path}: use it as it is"
        )
    entries = read_checkpoint(path, skip_objects)
    own_masks, own = split_masks(entries)
    theta = entries if weights is None else read_checkpoint(weights, skip_objects)

    def unused(found: State) -> State:
        """Those masks in the checkpoint that were not applied already."""
        return {key: mask for key, mask in found.items() if key not in read.masked}

    try:
        if theta.slimmed:
            raise TicketError(
                "it is the checkpoint of a slimmed model, whose ticket was written beside it: give "
                "slim.ticket where a ticket is named. In Python, Ticket.dense(state_dict) makes one"
            )
        if weights is None and own_masks and not own:
            raise TicketError(
                "expected weights, found only masks: give the pre-trained weights they were found "
                "in as --weights"
            )
        read = read_trunk(theta, prefix if weights is None else None, apply_masks=False)
        layout, arch, trunk = read.layout, read.arch, read.weights
        report_choice(layout, theta)
        if layout.dialect.note and input is None:
            logger.warning("%s", layout.dialect.note)
        if masks == ZEROS:
            origin = "exact zeros"
            plain = theta is entries and not own_masks
            zeros = trunk if plain else read_trunk(entries, prefix, [arch]).weights
            chosen = _masks_of_zeros(zeros, arch)
        else:
            found, origin = _given_masks(entries, masks, weights, skip_objects, arch)
            of_pruner = any(f"{key}_mask" in theta for key in layout.keys.values())
            if not found or (of_pruner and masks is None and weights is None):
                check_has_masks(theta, layout)
            if not found:
                _report_left_out(unused(own_masks), layout.prefix, set())
            elif weights is None and masks is None:
                found = unused(found)
            near = layout.prefix if prefix is None else prefix
            chosen = _spelled(found, arch, near) if found else Masks.ones(arch.prunable)
        _report_outside(theta, layout)
        _report_look_alikes(path if weights is None else weights, theta)
        recipe = {"imported": layout.dialect.name, "prefix": layout.prefix, "masks": origin}
        spec = default_input(source, layout, trunk) if input is None else input
        meta = TicketMeta(
            arch.name, source, _round(chosen), spec, recipe, stride_in_1x1=stride_in_1x1
        )
        return Ticket(chosen, trunk, meta, _known(chosen, trunk))
    except LthError as error:
        lost = ", ".join(theta.left_out)
        hint = f". Left out were {lost}: if weights are in there, save model.state_dict()"
        raise TicketError(
            f"{path} cannot be made a ticket: {error}{hint if lost else ''}"
        ) from error


def _given_masks(
    entries: Entries,
    file: Path | str | None,
    weights: Path | None,
    skip_objects: bool,
    arch: ResNet,
) -> tuple[State, str]:
    """The masks to use, by their weights' keys, and where they are from."""
    own_masks, own = split_masks(entries)
    if isinstance(file, Path):
        if own_masks:
            logger.warning("Left out the checkpoint's own masks: those of %s are used", file)
        entries = read_checkpoint(file, skip_objects)
        _check_masks_read(entries, arch)
        return split_masks(entries)[0] or entries, "of a file"
    if file is not None:
        raise ConfigError(f"expected masks to be a Path or {ZEROS!r}, found {file!r}")
    _check_masks_read(entries, arch)
    # Where θ is another file's, this one is here for its masks, whatever they are called.
    if weights is not None:
        return own_masks or own, "in the checkpoint"
    if locate_prunable(own_masks, arch) or locate_prunable(_by_module(own_masks), arch):
        return own_masks, "in the checkpoint"
    shapes = set(arch.prunable.values())
    strange = [
        key
        for key, mask in own_masks.items()
        if key not in own and tuple(mask.shape) in shapes and bool((mask == mask.bool()).all())
    ]
    if strange:
        raise TicketError(
            f"expected masks of {arch.name}'s convolutions, found {len(strange)} of other names "
            f"such as {strange[0]}: name them as their parameters, or give another file of masks "
            "(--mask)"
        )
    return {}, "none: dense"


def _check_masks_read(entries: Entries, arch: ResNet) -> None:
    """Refuse masks that could not be read.

    Raises:
        TicketError: naming the first.
    """
    for key, what in entries.unread.items():
        named = [names for names in split_masks({key: torch.empty(0)}) if names]
        if "mask" in key or any(locate_prunable(names, arch) for names in named):
            raise TicketError(f"expected masks to be plain tensors by name, found {key}: {what}")


def _report_outside(state: State, layout: Layout) -> None:
    """Log what a file holds outside the trunk."""
    left_out = outside_keys(state, layout)
    if left_out:
        logger.info(
            "Left out %s: outside the trunk, such as heads, another trunk or an optimizer's state; "
            "a ticket is of the trunk alone",
            some(left_out),
        )


def _report_look_alikes(path: Path, entries: Entries) -> None:
    """Warn where names say that the network is another one than the parameters look like."""
    words = [*entries.words, *path.resolve().parts[-6:]]
    try:
        beside = path.with_name("config.json")  # the hub keeps timm's models so
        if beside.stat().st_size < 1 << 16:
            words.append(str(json.loads(beside.read_bytes()).get("architecture")))
    except (OSError, ValueError, AttributeError, RecursionError):
        pass
    for word in words:
        if re.search(_ANTI_ALIASED, word, re.IGNORECASE):
            logger.warning(
                "%s is what anti-aliased ResNets are called, which have the same parameters as "
                "plain ones and compute something else: it was read as a plain one. If it is "
                "anti-aliased, the ticket's features are wrong, and no file can show that",
                printable(word),
            )
            return


def default_input(source: str, layout: Layout, trunk: State) -> InputSpec:
    """Return the input that a checkpoint's network was most likely trained on.

    Google's simCLR took RGB in [0, 1] without normalisation. Its conversions to PyTorch show
    by their names (v2), or by BatchNorm counters at zero: the weights were copied, not trained in
    PyTorch. Every other network of three channels most likely had ImageNet's mean and standard
    deviation.

    Raises:
        TicketError: if it has other than three channels.
    """
    if layout.arch.channels != 3:
        raise TicketError(
            f"expected the input of a network that reads {layout.arch.channels} channels to be "
            "stated, found none: its file does not hold it. Import it with --bands NAMES --mean "
            "VALUES --std VALUES (tools/ticket.py import, docs/import.md)"
        )
    counters = [value for name, value in trunk.items() if name.endswith("num_batches_tracked")]
    copied = bool(counters) and not any(bool(value) for value in counters)
    google = layout.dialect.name == "simclrv2" or (source.startswith("simclr") and copied)
    return UNIT_RANGE if google else IMAGENET


def report_choice(layout: Layout, state: State) -> None:
    """Log which of several trunks is read, what is left out of it, and what is from elsewhere."""
    elsewhere = {
        part_of(name): key
        for name, key in layout.keys.items()
        if not key.startswith(layout.prefix) and name.endswith("weight")
    }
    for part, key in elsewhere.items():
        logger.warning("Read the %s of the trunk from elsewhere: %s", part, printable(key))
    ignored = layout.ignored(state)
    if ignored:
        logger.warning(
            "Left out %d entries such as %s, as the loaders of %s files do",
            *(len(ignored), printable(ignored[0]), layout.dialect.name),
        )
    if layout.left_out:
        others = "; ".join(f"{name} ({what})" for name, what in layout.left_out.items())
        logger.warning(
            "Read the trunk under %s, and left out %s: --prefix chooses another",
            *(printable(layout.prefix) or "no prefix", printable(others)),
        )


def _masks_of_zeros(trunk: State, arch: ResNet) -> Masks:
    masks = Masks({name: trunk[name] != 0 for name in arch.prunable})
    if masks.kept == masks.numel:
        raise TicketError(
            f"expected exact zeros among the {masks.numel:,} prunable weights, found none: the "
            "checkpoint is dense, or its masks are in another file (--mask FILE)"
        )
    return masks


def _spelled(found: State, arch: ResNet, near: str) -> Masks:
    """Masks by any dialect's names under torchvision's, complete.

    Args:
        found: the masks.
        arch: the architecture.
        near: the prefix that is wanted where masks sit under several.
    """
    layouts = locate_prunable(found, arch)
    if not layouts:  # by module
        by_module = _by_module(found)
        layouts = locate_prunable(by_module, arch)
        found = by_module if layouts else found
    if not layouts:
        raise TicketError(
            f"expected masks of {arch.name}'s convolutions, found {len(found)} entries such as "
            f"{', '.join(list(found)[:3]) or 'none'}: give a file of masks"
        )
    most = [layout for layout in layouts if len(layout.keys) == len(layouts[0].keys)]
    prefixes = [layout.prefix for layout in most]
    wanted = meant_by(near, prefixes) or prefer_trained(prefixes)
    candidates = [layout for layout in most if layout.prefix in wanted]
    layout = candidates[0]
    for candidate in candidates:
        _check_shapes(found, candidate)
    if not all(_same_masks(found, layout, other) for other in candidates[1:]):
        raise TicketError(
            f"expected one set of masks, found {len(candidates)} that differ, under "
            f"{', '.join(repr(candidate.prefix) for candidate in candidates)}: name the "
            "prefix (--prefix) of the one that is meant"
        )
    _report_left_out(found, layout.prefix, set(layout.keys.values()))
    whole = {name: torch.ones(shape) for name, shape in arch.prunable.items()}
    return Masks(whole | {name: found[key] for name, key in layout.keys.items()})


def _by_module(masks: State) -> dict[str, Tensor]:
    """Masks by their modules' names, under those of the modules' weights."""
    return {f"{key}.weight": mask for key, mask in masks.items()}


def _check_shapes(found: State, layout: Layout) -> None:
    """Before anything is computed: a file may call a single number a tensor of any shape."""
    for name, key in layout.keys.items():
        shape, expected = tuple(found[key].shape), layout.arch.prunable[name]
        if shape != expected:
            raise TicketError(
                f"the mask {key} has shape {shape}, but the parameter of {layout.arch.name} has "
                f"{expected}: was the mask found on another architecture?"
            )


def _same_masks(found: State, first: Layout, second: Layout) -> bool:
    return first.keys.keys() == second.keys.keys() and all(
        torch.equal(found[key] != 0, found[second.keys[name]] != 0)
        for name, key in first.keys.items()
    )


def _report_left_out(found: State, prefix: str, used: set[str]) -> None:
    for key, mask in found.items():
        if re.search(r"\._(in|out)put_\d*_?$", key):
            continue  # of features, which NNI derives from those of weights
        # A single number that is expanded to a shape is not counted.
        spread = mask.numel() * mask.itemsize > mask.untyped_storage().nbytes()
        if key.startswith(prefix) and key not in used and not spread:
            pruned = int((mask == 0).sum())
            if pruned:
                logger.warning(
                    "Left out the mask of %s, which prunes %s of %s weights: tickets prune the "
                    "convolutions of the four stages only, so this parameter is kept whole",
                    *(printable(key), f"{pruned:,}", f"{mask.numel():,}"),
                )


def _round(masks: Masks) -> int:
    """The round k of an IMP that keeps 0.8^k, if the density is one of these; else 0."""
    k = round(math.log(masks.density) / math.log(0.8)) if masks.kept else 0
    return k if math.isclose(masks.density, 0.8**k, rel_tol=1e-4) else 0


def _known(masks: Masks, trunk: State) -> Masks | None:
    """Where θ is known: at the survivors, if every pruned weight is zero; else everywhere.

    A checkpoint with such zeros was saved after pruning: they are masked weights, not θ.
    """
    pruned = masks.numel - masks.kept
    if pruned:
        dense = any(bool(trunk[name][~mask].any()) for name, mask in masks.items())
        return None if dense else masks
    zeros = sum(int((trunk[name] == 0).sum()) for name in masks)
    if zeros * _MENTION >= masks.numel:
        logger.warning(
            "%s of the %s prunable weights are exactly zero: --mask zeros counts them as pruned",
            *(f"{zeros:,}", f"{masks.numel:,}"),
        )
    return None
