"""Compaction: channels that masks have emptied are removed from a model, which runs faster then.

Only widths inside blocks change (`ResNet.inner`), so the state dict's shapes say all there is to
know about a compacted model: `narrow_to` gives a freshly built one the widths of a state dict, in
any host, and `compact` itself works by it.

This is own code over the table of blocks. torch-pruning 1.6.1 traces a model with example inputs,
which a detector does not take as tensors; it knows nn.BatchNorm alone, so that detectron2's
FrozenBatchNorm2d keeps its width and the pruned model fails; and it drops what a dead channel
passes on. A ResNet's blocks need no graph: each inner convolution has one reader.
"""

import copy
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lth_plugins.attach import attached
from lth_plugins.ticket.arch import Inner
from lth_plugins.ticket.dialects import Layout, State, locate
from lth_plugins.ticket.errors import TicketError

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""How far a block's output may be from that of the masked block, relative to its largest value."""

_NORM = ("weight", "bias", "running_mean", "running_var")


def compact(model: nn.Module) -> nn.Module:
    """A copy of a model without the channels that its zeros have emptied; it computes the same.

    A channel inside a block goes if all weights that write it, or all that read it, are zero.
    Whether a ticket is, or was, attached does not matter: zeros decide. Masks stay behind with the
    model given, as does what refers to its parameters: make the optimizer anew.

    In evaluation outputs are equal but for rounding. What a dead channel passes on, its
    normalisation's constant, is kept. In training BatchNorm gives such a channel its bias instead
    (its output has mean and variance 0), and goes on training that; here the constant stays what
    it was in evaluation. For structured tickets, whose dead channels nothing reads, both are the
    same.

    Args:
        model: a model, of any known dialect, with a ResNet trunk somewhere in it.

    Returns:
        A model of the same class and state-dict keys, with narrower convolutions. Where nothing is
        dead, an equal copy, and a line in the log says so.

    Raises:
        TicketError: if there is no such trunk, its convolutions are grouped (ResNeXt) or not plain
            ones, or a block does more between its convolutions than normalise and rectify.
    """
    layout = locate(model)
    for inner in layout.arch.inner:
        _check_plain(model, layout, inner)
    small = copy.deepcopy(model)
    handle = attached(small)
    if handle is not None:
        handle.detach()
    state = small.state_dict()
    for inner in reversed(layout.arch.inner):  # what nothing reads may leave more that is not read
        _drop_dead(state, layout, inner, eps=_module(model, layout, inner.norm).eps)
    removed = _removed(model.state_dict(), state, layout)
    if not removed:
        logger.info("No channel inside a block is dead: the compact model is as wide as it was")
        return small
    narrow_to(small, state)
    small.load_state_dict(state)
    _check_blocks(model, small, layout)
    logger.info("Removed %d of %d channels inside blocks", removed, _channels(layout))
    return small


def narrow_to(model: nn.Module, state: State) -> None:
    """Give a freshly built model the widths that a compacted state dict has, so that it loads.

    It does nothing where both have the same. A ticket on the model is detached: its masks are of
    the full width. Other shapes that differ are left for the loader to find.

    Args:
        model: as wide as its configuration makes it; changed in place, its weights cut off.
        state: under the model's own names.
    """
    own = model.state_dict()
    if all(state[key].shape == value.shape for key, value in own.items() if key in state):
        return
    layout = locate(model)
    for inner in layout.arch.inner:
        key = layout.keys[f"{inner.conv}.weight"]
        width = len(state.get(key, own[key]))
        if width == len(own[key]):
            continue
        handle = attached(model)
        if handle is not None:
            handle.detach()
        conv, norm, reader = (
            _module(model, layout, name) for name in (inner.conv, inner.norm, inner.reader)
        )
        _cut(conv, "weight", slice(width))
        _cut(reader, "weight", (slice(None), slice(width)))
        for entry in _NORM:
            _cut(norm, entry, slice(width))
        conv.out_channels = norm.num_features = reader.in_channels = width


def _drop_dead(state: dict[str, Tensor], layout: Layout, inner: Inner, eps: float) -> None:
    """Take the dead channels of one convolution out of a state dict."""

    def key(module: str, entry: str = "weight") -> str:
        return layout.keys[f"{module}.{entry}"]

    norm = {entry: state[key(inner.norm, entry)].clone() for entry in _NORM}
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
        conv = _module(model, layout, name)
        if not isinstance(conv, nn.Conv2d) or conv.groups > 1:
            grouped = isinstance(conv, nn.Conv2d)
            found = f"{conv.groups} groups" if grouped else type(conv).__name__
            raise TicketError(
                f"expected plain convolutions in the blocks of a {layout.arch.name} to compact, "
                f"found {found} at {name}: channels of grouped (ResNeXt) and deformable "
                "convolutions are not removed"
            )


def _check_blocks(model: nn.Module, small: nn.Module, layout: Layout) -> None:
    """Raise ``TicketError`` if a block computes something else than it did."""
    for name, channels in _blocks(layout):
        generator = torch.Generator().manual_seed(0)  # not the caller's
        features = torch.randn((1, channels, 8, 8), generator=generator)
        with torch.no_grad():
            before, after = (
                copy.deepcopy(whole.get_submodule(name)).cpu().float().eval()(features)
                for whole in (model, small)
            )
        off = float((before - after).abs().max())
        if not off <= TOLERANCE * max(1.0, float(before.abs().max())):
            raise TicketError(
                f"expected {name} to compute the same without its dead channels, found outputs "
                f"{off:.2g} apart: it does more between its convolutions than batch normalisation "
                "and ReLU, or has no zero padding, and cannot be compacted"
            )


def _blocks(layout: Layout) -> Iterator[tuple[str, int]]:
    """The module of each block in the model, and its input channels."""
    for name, shape in layout.arch.shapes.items():
        if name.endswith(".conv1.weight"):
            yield layout.keys[name].rsplit(".", 2)[0], shape[1]


def _module(model: nn.Module, layout: Layout, name: str) -> Any:
    return model.get_submodule(layout.keys[f"{name}.weight"].removesuffix(".weight"))


def _cut(module: nn.Module, name: str, kept: slice | tuple[slice, ...]) -> None:
    """Leave this part of a parameter or buffer."""
    value = getattr(module, name)
    part = value.detach()[kept].clone()
    if isinstance(value, nn.Parameter):
        part = nn.Parameter(part, requires_grad=value.requires_grad)
    setattr(module, name, part)


def _channels(layout: Layout) -> int:
    return sum(layout.arch.shapes[f"{inner.conv}.weight"][0] for inner in layout.arch.inner)


def _removed(before: State, after: State, layout: Layout) -> int:
    keys = [layout.keys[f"{inner.conv}.weight"] for inner in layout.arch.inner]
    return sum(len(before[key]) - len(after[key]) for key in keys)
