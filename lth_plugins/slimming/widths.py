"""The widths of a slimmed model: noted in its checkpoints, and given to a model that loads one.

The note is metadata of the state dict, so that its keys are the stock keys. Without it a layer of
another width is an error of the user, such as another number of classes, and stays one.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lth_plugins.errors import LthError, TicketError
from lth_plugins.masking.attachment import attached
from lth_plugins.masking.input import ModelInput
from lth_plugins.masking.loading import allow_to_run, note_input, noted_input
from lth_plugins.masking.narrowing import narrow_to
from lth_plugins.slimming.channels import cut, tensors_of
from lth_plugins.slimming.network import Side
from lth_plugins.slimming.tracing import LAYERS, is_norm
from lth_plugins.ticket.keys import SLIMMED_MARK, is_slimmed
from lth_plugins.ticket.locating import locate

SLIMMED = "slim.pth"
"""What hosts call the checkpoint of the narrower model, beside their own."""

_INPUT = "slimmed_input"
"""Of a slimmed model: what its input is."""


def note_widths(model: nn.Module, model_input: ModelInput | None) -> None:
    """Have the checkpoints of a slimmed model say that they are of one, and what its input is.

    Args:
        model: whose checkpoints.
        model_input: which the ticket noted that was on the model; None where it is unknown.
    """
    if _INPUT not in model.__dict__:
        model.register_state_dict_post_hook(_after_state_dict)
    model.__dict__[_INPUT] = model_input


def _after_state_dict(
    module: nn.Module, _: object, __: str, local_metadata: dict[str, Any]
) -> None:
    local_metadata[SLIMMED_MARK] = True
    model_input: ModelInput | None = module.__dict__[_INPUT]
    if model_input is not None:
        note_input(local_metadata, model_input)


def adopt_widths(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Give a freshly built model the widths of a slimmed or compacted state dict, so that it loads.

    Where that makes it narrower, a ticket on it is detached: its masks are of the full width.

    Args:
        model: as wide as its configuration makes it; changed in place, its weights cut off.
        state: a state dict, under the model's own names.

    Raises:
        TicketError: if it is of a trunk that reads images of other channels.
    """
    if not is_slimmed(state):
        narrow_to(model, state)
        return
    there, stored = _channels_read_by(model), _channels_read_by(state)
    if there != stored and None not in (there, stored):
        raise TicketError(
            f"expected a slimmed checkpoint of a model that reads {there} channels, as this one "
            f"does, found one that reads {stored}: build the model for those images, or give "
            "another checkpoint"
        )
    narrower = list(_narrower(model, state))
    handle = attached(model)
    if handle is not None and narrower:
        handle.detach()
    allow_to_run(model)  # it needs no ticket
    for module, side, size, width in narrower:
        cut(module, side, torch.arange(size) < width)
    note_widths(model, noted_input(state))


def _channels_read_by(trunk: nn.Module | Mapping[str, Any]) -> int | None:
    """The channels of the images that a trunk reads; None where there is no whole one."""
    try:
        return locate(trunk, slimmed=True).arch.channels
    except LthError:
        return None


def _narrower(
    model: nn.Module, state: Mapping[str, Any]
) -> Iterator[tuple[nn.Module, Side, int, int]]:
    """The sides of layers that a state dict has fewer entries for: their size, and how many."""
    sides: tuple[Side, ...] = ("out", "in")
    for name, module in model.named_modules():
        for side in sides if isinstance(module, LAYERS) or is_norm(module) else ():
            for key, dim in tensors_of(module, side):
                value = state.get(f"{name}.{key}" if name else key)
                size = getattr(module, key).shape[dim]
                if isinstance(value, torch.Tensor) and value.shape[dim] < size:
                    yield module, side, size, value.shape[dim]
                    break
