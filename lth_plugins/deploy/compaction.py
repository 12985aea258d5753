"""Compaction: remove the channels that masks have emptied from a model, which then runs faster.

Only widths inside blocks change (`ResNet.inner`), so the state dict's shapes say all there is to
know about a compacted model (`lth_plugins.masking.narrowing`).

This is own code over the table of blocks. torch-pruning 1.6.1 traces a model with example inputs,
which a detector does not accept as tensors; it knows nn.BatchNorm alone, so that detectron2's
FrozenBatchNorm2d keeps its width and the pruned model fails; and it drops what a dead channel
passes on. A ResNet's blocks need no graph: each inner convolution has one reader.
"""

import copy
import logging
import math

import torch
from torch import Tensor, nn

from lth_plugins.errors import TicketError
from lth_plugins.masking.attachment import attached
from lth_plugins.masking.narrowing import find_trunk, inner_convolutions, module_of, narrow_to
from lth_plugins.ticket.arch import NORM_ENTRIES, Inner
from lth_plugins.ticket.keys import State
from lth_plugins.ticket.layout import Layout
from lth_plugins.ticket.obstacles import check_model

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""How far a block's output may be from that of the masked block, relative to its largest value.

In half precision four times as far as 1 is from the next number: 0.004, in bfloat16 0.03.
"""


def compact(model: nn.Module) -> nn.Module:
    """A copy of a model without the channels that its zeros have emptied; it computes the same.

    A channel inside a block goes if all weights that write it, or all that read it, are zero.
    Whether a ticket is, or was, attached does not matter: zeros decide. Masks stay with the
    given model, and so does what refers to its parameters: make a new optimizer. Zeros that are
    left, such as those of shortcuts, are then trained like any other weight; a line in the log
    counts them.

    In evaluation outputs are equal but for rounding. What a dead channel passes on, its
    normalisation's constant, is kept. In training BatchNorm gives such a channel its bias instead
    (its output has mean and variance 0), and trains it further; here the constant stays what
    it was in evaluation. For structured tickets, whose dead channels nothing reads, both are the
    same in the first step, and as long as the zeros that are left stay zero.

    Args:
        model: a model, of any known dialect, with a ResNet trunk somewhere in it, which may lack
            its last stages.

    Returns:
        A model of the same class and state-dict keys, with narrower convolutions. Where nothing is
        dead, an equal copy, and a line in the log says so.

    Raises:
        TicketError: if there is no such trunk, it holds more than a plain ResNet's, convolutions
            are grouped (ResNeXt) or not plain ones, or a block does more between them than
            normalise and rectify.
    """
    layout = find_trunk(model)
    if layout.left_out:
        names = ", ".join(repr(name) for name in (layout.prefix, *layout.left_out))
        raise TicketError(
            f"expected the trunk to compact under one name, found it under {names}: compact the "
            "submodule, and put the result in the place of each"
        )
    for inner in inner_convolutions(layout):
        _check_plain(model, layout, inner)
    check_model(model, layout)
    small = copy.deepcopy(model)
    handle = attached(small)
    if handle is not None:
        handle.detach()
    state = small.state_dict()
    # From the last: what nothing reads may leave more that is not read.
    for inner in reversed(inner_convolutions(layout)):
        _drop_dead(state, layout, inner, eps=module_of(model, layout, inner.norm).eps)
    removed = _removed(model.state_dict(), state, layout)
    if removed:
        narrow_to(small, state)
        small.load_state_dict(state)
        _check_blocks(model, small, layout)
        channels = sum(len(model.get_parameter(key)) for key in _written(layout))
        logger.info("Removed %d of %d channels inside blocks", removed, channels)
    else:
        logger.info("No channel inside a block is dead: the compact model is as wide as it was")
    weights = (state[layout.keys[n]] for n in layout.arch.prunable if n in layout.keys)
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    if handle is not None and zeros:
        logger.info(
            "The compact model has no masks: training moves the %d zeros left in it, which stay "
            "zero in the model given",
            zeros,
        )
    return small


def _drop_dead(state: dict[str, Tensor], layout: Layout, inner: Inner, eps: float) -> None:
    """Take the dead channels of one convolution out of a state dict."""

    def key(module: str, entry: str = "weight") -> str:
        return layout.keys[f"{module}.{entry}"]

    norm = {entry: state[key(inner.norm, entry)].clone() for entry in NORM_ENTRIES}
    writes, reads = state[key(inner.conv)], state[key(inner.reader)].clone()
    written, read = writes.flatten(1).any(1), reads.transpose(0, 1).flatten(1).any(1)
    kept = written & read

    # A channel that nothing writes is zero before its normalisation and constant after it.
    wide = {name: value.double() for name, value in norm.items()}
    scale = wide["weight"] / (wide["running_var"] + eps).sqrt()
    constant = (wide["bias"] - wide["running_mean"] * scale).relu()
    passing = ~written & read & (constant > 0)
    if passing.any():
        passed = torch.einsum("oikl,i->okl", reads[:, passing].double(), constant[passing])
        if reads[0, 0].numel() == 1:
            # The same everywhere: the reader's normalisation subtracts it with its mean.
            mean = state[key(inner.reader_norm, "running_mean")]
            state[key(inner.reader_norm, "running_mean")] = mean - passed.flatten().to(mean.dtype)
        else:
            # Not at the border, where zeros are padded: there fewer of a kernel's places see the
            # constant. So one channel stays, is 1 everywhere, and is read as all of them were.
            carrier = int(passing.nonzero()[0])
            kept[carrier] = True
            norm["running_mean"][carrier], norm["bias"][carrier] = 0, 1
            reads[:, carrier] = passed.to(reads.dtype)
    if not kept.any():  # a convolution has one channel at least; what this one passed is folded
        kept[0] = True
        reads[:, 0] = 0
    state[key(inner.conv)] = writes[kept]
    state[key(inner.reader)] = reads[:, kept]
    for name, value in norm.items():
        state[key(inner.norm, name)] = value[kept]


def _check_plain(model: nn.Module, layout: Layout, inner: Inner) -> None:
    for name in (inner.conv, inner.reader):
        conv = module_of(model, layout, name)
        found = None
        if not isinstance(conv, nn.Conv2d):
            found = type(conv).__name__
        elif conv.groups > 1:
            found = f"{conv.groups} groups"
        elif conv.bias is not None:
            found = "a bias"
        if found:
            raise TicketError(
                f"expected plain convolutions in the blocks of a {layout.arch.name} to compact, "
                f"found {found} at {name}: channels of grouped (ResNeXt) and deformable "
                "convolutions, and of those with a bias, are not removed"
            )


def _check_blocks(model: nn.Module, small: nn.Module, layout: Layout) -> None:
    """Raise ``TicketError`` if a block computes something else than it did."""
    for block, name in layout.branches().items():
        channels = layout.arch.shapes[f"{block}.conv1.weight"][1]
        generator = torch.Generator().manual_seed(0)  # not the caller's
        features = torch.randn((1, channels, 8, 8), generator=generator)
        masked, narrow = (
            copy.deepcopy(whole.get_submodule(name)).cpu() for whole in (model, small)
        )
        # What dead channels pass on is rounded to the model's own precision where it is kept.
        tolerance = max(TOLERANCE, 4 * _precision(masked))
        with torch.no_grad():
            before = masked.float().eval()(features)
            try:
                off = float((before - narrow.float().eval()(features)).abs().max())
                found = f"outputs {off:.2g} apart"
            except RuntimeError as error:  # something in the block has the old width
                off, found = math.inf, f"that it fails ({error})"
        if not off <= tolerance * max(1.0, float(before.abs().max())):
            raise TicketError(
                f"expected {name} to compute the same without its dead channels, found {found}: "
                "it does more between its convolutions than batch normalisation and ReLU, or has "
                "no zero padding, and cannot be compacted"
            )


def _precision(block: nn.Module) -> float:
    """The distance from 1 to the next number, in the coarsest type that a block has."""
    values = (value for value in block.state_dict().values() if value.is_floating_point())
    return max(torch.finfo(value.dtype).eps for value in values)


def _written(layout: Layout) -> list[str]:
    """The weights that write the channels inside blocks."""
    return [layout.keys[f"{inner.conv}.weight"] for inner in inner_convolutions(layout)]


def _removed(before: State, after: State, layout: Layout) -> int:
    return sum(len(before[key]) - len(after[key]) for key in _written(layout))
