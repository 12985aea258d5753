"""Checkpoints of other frameworks to tickets and back. `checkpoints` reads the files."""

import logging
import math
import pickle
import re
from collections.abc import Callable, Mapping
from io import BytesIO
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lth_plugins.ticket.arch import ResNet, part_of
from lth_plugins.ticket.checkpoints import read_checkpoint
from lth_plugins.ticket.dialects import (
    Layout,
    State,
    from_torchvision,
    locate,
    locate_prunable,
    meant_by,
    prefer_trained,
    signs_of_others,
)
from lth_plugins.ticket.errors import TicketError, enough_memory, printable
from lth_plugins.ticket.file import replace_file
from lth_plugins.ticket.masks import Masks
from lth_plugins.ticket.ticket import IMAGENET, UNIT_RANGE, InputSpec, Ticket, TicketMeta

logger = logging.getLogger(__name__)

ZEROS = "zeros"
"""For the masks of `from_checkpoint`: those of the weights that are exactly zero."""

_ORIG, _MASK = "_orig", "_mask"  # the suffixes of torch.nn.utils.prune
_KEY_OF_MASK: tuple[tuple[str, str], ...] = (
    (r"(^|\.)_weight_mask$", r"\1_layer.weight"),  # AC/DC and WoodFisher
    (r"(^|\.)weight_mask$", r"\1weight"),  # torch.nn.utils.prune
)
"""How the key of a mask becomes that of its weight; the first pattern that is found counts."""

_HARMLESS = (".num_batches_tracked", ".sparseWeight")  # what blocks may hold besides; and scalars


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
    the stem or of heads are left out.

    Args:
        path: a PyTorch, safetensors or detectron2 pickle file.
        source: the pre-training it comes from.
        input: how its network was fed; by default as `default_input` says.
        masks: a file of masks, under their parameters' names with or without ``_mask``; or
            `ZEROS`, to take the exact zeros among the prunable weights as pruned.
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
        raise TicketError(
            "expected one of a file of masks and a file of weights, found both: give the weights "
            "as the checkpoint and the masks as --mask"
        )
    own_masks, own = _split(read_checkpoint(path, skip_objects))
    theta = own if weights is None else _split(read_checkpoint(weights, skip_objects))[1]
    try:
        if weights is None and own_masks and not own:
            raise TicketError(
                "expected weights, found only masks: give the pre-trained weights they were found "
                "in as --weights"
            )
        layout = locate(theta, prefix=prefix if weights is None else None)
        _check_plain(theta, layout)
        _report_choice(layout, theta)
        if layout.dialect.note and input is None:
            logger.warning("%s", layout.dialect.note)
        arch = layout.arch
        if masks == ZEROS:
            origin = "exact zeros"
            chosen = _masks_of_zeros(_trunk(locate(own, archs=[arch], prefix=prefix), own), arch)
        else:
            found, origin = _given_masks(own_masks, own, masks, weights, skip_objects)
            near = layout.prefix if prefix is None else prefix
            chosen = _spelled(found, arch, near) if found else Masks.ones(arch.prunable)
        trunk = _trunk(layout, theta)
        recipe = {"imported": layout.dialect.name, "prefix": layout.prefix, "masks": origin}
        spec = default_input(source, layout, trunk) if input is None else input
        meta = TicketMeta(
            arch.name, source, _round(chosen), spec, recipe, stride_in_1x1=stride_in_1x1
        )
        return Ticket(chosen, trunk, meta, _known(chosen, trunk))
    except TicketError as error:
        raise TicketError(f"{path} cannot be made a ticket: {error}") from error


def _given_masks(
    own_masks: State, own: State, file: Path | str | None, weights: Path | None, skip_objects: bool
) -> tuple[State, str]:
    """The masks to use, by their weights' keys, and where they are from."""
    if isinstance(file, Path):
        entries = read_checkpoint(file, skip_objects)
        return _split(entries)[0] or entries, "of a file"
    if file is not None:
        raise TicketError(f"expected masks to be a Path or {ZEROS!r}, found {file!r}")
    if own_masks:
        return own_masks, "in the checkpoint"
    # Where θ is another file's, this one is here for its masks, whatever they are called.
    return (own, "in the checkpoint") if weights is not None else ({}, "none: dense")


def default_input(source: str, layout: Layout, trunk: State) -> InputSpec:
    """How a checkpoint's network was most likely fed.

    Google's simCLR took RGB in [0, 1] without normalisation. Its conversions to PyTorch are told
    by their names (v2), or by BatchNorm counters at zero: the weights were copied, not trained in
    PyTorch. Everything else is taken to be ImageNet's mean and standard deviation.
    """
    counters = [value for name, value in trunk.items() if name.endswith("num_batches_tracked")]
    copied = bool(counters) and not any(bool(value) for value in counters)
    google = layout.dialect.name == "simclrv2" or (source.startswith("simclr") and copied)
    return UNIT_RANGE if google else IMAGENET


def _split(state: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The masks in a state dict by their weights' keys, and the weights."""
    masks: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for key, value in state.items():
        for pattern, replacement in _KEY_OF_MASK:
            weight, count = re.subn(pattern, replacement, key)
            if count:
                masks[weight] = value
                break
        else:
            weights[key.removesuffix(_ORIG)] = value
    return masks, weights


def _trunk(layout: Layout, state: State) -> dict[str, Tensor]:
    """The trunk's weights, also of STR (arXiv 2002.03231), which stores some yet to be shrunk."""
    trunk = layout.extract(state)
    for name, key in layout.keys.items():
        threshold = state.get(key.removesuffix("weight") + "sparseThreshold")
        if threshold is not None and threshold.numel() == 1:
            weight = trunk[name].float()
            shrunk = torch.relu(weight.abs() - torch.sigmoid(threshold.flatten()))
            trunk[name] = weight.sign() * shrunk
    return trunk


def _check_plain(state: State, layout: Layout) -> None:
    """Refuse blocks that hold more than a ResNet's: the network would compute something else."""
    for key in layout.strangers(state):
        if state[key].numel() > 1 and not key.endswith(_HARMLESS):
            raise TicketError(
                f"{signs_of_others([key])}expected the blocks of a plain {layout.arch.name}, found "
                f"{key} in one of them. Give a checkpoint without such parts"
            )


def _report_choice(layout: Layout, state: State) -> None:
    """Say which of several trunks is taken, what is left out of it, and what is from elsewhere."""
    elsewhere = {
        part_of(name): key
        for name, key in layout.keys.items()
        if not key.startswith(layout.prefix) and name.endswith("weight")
    }
    for part, key in elsewhere.items():
        logger.warning("Took the %s of the trunk from elsewhere: %s", part, printable(key))
    ignored = layout.ignored(state)
    if ignored:
        logger.warning(
            "Left out %d entries such as %s, as the loaders of %s files do",
            *(len(ignored), printable(ignored[0]), layout.dialect.name),
        )
    if layout.left_out:
        others = "; ".join(f"{name} ({what})" for name, what in layout.left_out.items())
        logger.warning(
            "Took the trunk under %s, and left out %s: --prefix chooses another",
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
    _report_left_out(found, layout)
    whole = {name: torch.ones(shape) for name, shape in arch.prunable.items()}
    return Masks(whole | {name: found[key] for name, key in layout.keys.items()})


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


def _report_left_out(found: State, layout: Layout) -> None:
    used = set(layout.keys.values())
    for key, mask in found.items():
        # Of a number that is merely said to have a shape, nothing is counted.
        spread = mask.numel() * mask.itemsize > mask.untyped_storage().nbytes()
        if key.startswith(layout.prefix) and key not in used and not spread:
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
    if zeros:
        logger.warning(
            "%s of the %s prunable weights are exactly zero: --mask zeros takes them as pruned",
            *(f"{zeros:,}", f"{masks.numel:,}"),
        )
    return None


def _plain(dialect: str) -> Callable[[Ticket], bytes]:
    def encode(ticket: Ticket) -> bytes:
        state = from_torchvision(ticket.sparse_weights(), ticket.arch, dialect)
        return _torch_bytes({"state_dict": state})

    return encode


def _torch_prune(ticket: Ticket) -> bytes:
    state: dict[str, Tensor] = {}
    for name, value in ticket.weights.items():
        if name in ticket.masks:
            state[name + _ORIG] = value.clone()
            state[name + _MASK] = ticket.masks[name].float()
        else:
            state[name] = value.clone()
    return _torch_bytes({"state_dict": state})


def _detectron2(ticket: Ticket) -> bytes:
    state = from_torchvision(ticket.sparse_weights(), ticket.arch, "detectron2")
    arrays = {k: v.numpy() for k, v in state.items() if not k.endswith("num_batches_tracked")}
    # The checkpointer of detectron2 then finds the trunk wherever the model nests it.
    content = {"model": arrays, "__author__": "lth_plugins", "matching_heuristics": True}
    return pickle.dumps(content, protocol=4)


def _torch_bytes(content: Any) -> bytes:
    buffer = BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


FORMATS: Mapping[str, Callable[[Ticket], bytes]] = MappingProxyType(
    {
        "torchvision": _plain("torchvision"),
        "timm": _plain("timm"),
        "mmseg": _plain("mmseg"),
        "detectron2": _detectron2,
        "torch-prune": _torch_prune,
    }
)
"""What a ticket can be written as: dense checkpoints with zeros, or ``torch.nn.utils.prune``'s."""


def to_checkpoint(ticket: Ticket, path: str | PathLike[str], format: str) -> None:
    """Write a ticket as another framework's checkpoint, all or nothing.

    Args:
        ticket: the ticket.
        path: the file; overwritten. That of "detectron2" ends in .pkl, and no other does.
        format: one of `FORMATS`.

    Raises:
        TicketError: if the format is unknown or cannot express the architecture, or the file
            has the wrong ending or cannot be written.
    """
    path = Path(path)
    if format not in FORMATS:
        raise TicketError(f"unknown format {format!r}; known are {', '.join(FORMATS)}")
    if (path.suffix == ".pkl") != (format == "detectron2"):  # by that detectron2 tells its pickles
        wanted = "a name that ends in .pkl" if format == "detectron2" else "another end than .pkl"
        raise TicketError(f"expected {wanted} for format {format!r}, found {path}")
    if ticket.rest:
        logger.warning("%s is the trunk alone, without the ticket's %r", path, ticket.rest.masks)
    data = FORMATS[format](ticket)
    try:
        replace_file(path, data)
    except OSError as error:
        raise TicketError(
            f"cannot write {path}: {error.strerror or error}. Give a path in an existing folder "
            "with free space; nothing was changed"
        ) from error
