"""Removing channels: first by zeros, while the model trains, and in the end by narrower layers.

Zeroed, a channel is neither made nor read, so that its gradients are zero, too, and the model
computes what it computes without it.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lth_plugins.masking.attachment import attached
from lth_plugins.slimming.network import Kept, Network, Side
from lth_plugins.slimming.tracing import is_depthwise, is_norm

COUNTS = {
    "out": ("out_channels", "out_features", "num_features"),
    "in": ("in_channels", "in_features"),
}
"""Attributes of layers that say how many entries a side has."""


@torch.no_grad()
def zero(model: nn.Module, network: Network, kept: Kept) -> None:
    """Zero all that writes or reads a removed channel, in place."""
    modules = dict(model.named_modules())
    for (name, side), entries in network.entries(kept).items():
        if bool(entries.all()):
            continue
        for key, dim in tensors_of(modules[name], side):
            if key in ("running_mean", "running_var"):
                continue
            value = getattr(modules[name], key)
            value.index_fill_(dim, (~entries).nonzero().flatten().to(value.device), 0)


def narrow(model: nn.Module, network: Network, kept: Kept) -> None:
    """Remove the channels from a model, in place; its parameters are other tensors then."""
    modules = dict(model.named_modules())
    for (name, side), entries in network.entries(kept).items():
        cut(modules[name], side, entries)


def narrow_copy(model: nn.Module, network: Network, kept: Kept) -> nn.Module:
    """A copy of a model that has these channels alone, and no ticket."""
    small = copy.deepcopy(model)
    handle = attached(small)
    if handle is not None:
        handle.detach()
    narrow(small, network, kept)
    return small


def cut(module: nn.Module, side: Side, entries: Tensor) -> None:
    """Leave these entries of one side of a layer; boolean, [size]."""
    for key, dim in tensors_of(module, side):
        value = getattr(module, key)
        left = value.detach().index_select(dim, entries.nonzero().flatten().to(value.device))
        if isinstance(value, nn.Parameter):
            left = nn.Parameter(left, requires_grad=value.requires_grad)
        setattr(module, key, left)
    count = int(entries.sum())
    for attribute in COUNTS[side]:
        if hasattr(module, attribute):
            setattr(module, attribute, count)
    if isinstance(module, nn.Conv2d) and module.groups > 1:  # depthwise
        module.in_channels = module.groups = count


def tensors_of(module: nn.Module, side: Side) -> Iterator[tuple[str, int]]:
    """The tensors of a layer that have entries for a side, each with the dimension of these."""
    if is_norm(module):
        for key in ("weight", "bias", "running_mean", "running_var"):
            if getattr(module, key, None) is not None:
                yield key, 0
        return
    transposed = isinstance(module, nn.ConvTranspose2d)
    yield "weight", int((side == "in") != transposed) if not is_depthwise(module) else 0
    if side == "out" and module.bias is not None:
        yield "bias", 0
