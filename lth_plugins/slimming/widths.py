"""The widths of a slimmed model: noted in its checkpoints, and given to a model that loads one.

The note is metadata of the state dict, so that its keys are the stock keys. It has the shapes that
the weights had before, so that a layer of another width for another reason, such as another number
of classes, stays an error of the user.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lth_plugins.errors import TicketError
from lth_plugins.masking.attachment import attached
from lth_plugins.masking.input import ModelInput
from lth_plugins.masking.loading import allow_to_run, note_input, noted_input
from lth_plugins.masking.narrowing import narrow_to
from lth_plugins.slimming.channels import cut, tensors_of
from lth_plugins.slimming.network import Side
from lth_plugins.slimming.tracing import LAYERS, is_norm
from lth_plugins.ticket.keys import SLIMMED_MARK, is_slimmed

SLIMMED = "slim.pth"
"""What hosts call the checkpoint of the narrower model, beside their own."""

_NOTE = "slimmed_from"
"""Of a slimmed model: what its checkpoints note."""

Shapes = Mapping[str, Sequence[int]]
"""The shape of each layer's weight, by the layer's name."""


def note_widths(model: nn.Module, full: Shapes, model_input: ModelInput | None) -> None:
    """Have the checkpoints of a slimmed model say that they are of one, and what its input is.

    Args:
        model: whose checkpoints.
        full: the shapes before it was slimmed.
        model_input: which the ticket noted that was on the model; None where it is unknown.
    """
    if _NOTE not in model.__dict__:
        model.register_state_dict_post_hook(_after_state_dict)
    model.__dict__[_NOTE] = ({name: list(shape) for name, shape in full.items()}, model_input)


def full_shapes(model: nn.Module) -> Shapes:
    """The shapes of a model before it was slimmed; those that it has, if it was not."""
    if _NOTE in model.__dict__:
        return model.__dict__[_NOTE][0]
    weights = {name: getattr(layer, "weight", None) for name, layer in _layers(model)}
    return {name: tuple(weight.shape) for name, weight in weights.items() if weight is not None}


def _after_state_dict(
    module: nn.Module, _: object, __: str, local_metadata: dict[str, Any]
) -> None:
    local_metadata[SLIMMED_MARK], model_input = module.__dict__[_NOTE]
    if model_input is not None:
        note_input(local_metadata, model_input)


def adopt_widths(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Give a freshly built model the widths of a slimmed or compacted state dict, so that it loads.

    Where that makes it narrower, a ticket on it is detached: its masks are of the full width.

    Args:
        model: as wide as its configuration makes it; changed in place, its weights cut off.
        state: a state dict, under the model's own names.

    Raises:
        TicketError: if it was slimmed from another model, such as one of other classes, or of
            images of other channels. The model is unchanged then.
    """
    if not is_slimmed(state):
        narrow_to(model, state)
        return
    full = _noted(state)
    _check_slimmed_from(full, model, state)
    narrower = list(_narrower(model, state))
    handle = attached(model)
    if handle is not None and narrower:
        handle.detach()
    allow_to_run(model)  # it needs no ticket
    for module, side, size, width in narrower:
        cut(module, side, torch.arange(size) < width)
    note_widths(model, full, noted_input(state))


def _noted(state: Mapping[str, Any]) -> Shapes:
    """The shapes that a state dict notes, by its own names."""
    found: dict[str, Sequence[int]] = {}
    for prefix, entry in getattr(state, "_metadata", {}).items():
        noted = entry.get(SLIMMED_MARK)
        for name, shape in noted.items() if isinstance(noted, Mapping) else ():
            found[f"{prefix}.{name}" if prefix else name] = shape
    return found


def _check_slimmed_from(full: Shapes, model: nn.Module, state: Mapping[str, Any]) -> None:
    """Check that a model has the shapes that were slimmed, or those that are left."""
    for name, layer in _layers(model):
        stored = state.get(f"{name}.weight")
        if name not in full or stored is None:
            continue
        there = tuple(layer.weight.shape)
        if there not in (tuple(full[name]), tuple(stored.shape)):
            raise TicketError(
                f"expected the model that the checkpoint was slimmed from, whose {name} has a "
                f"weight of {tuple(full[name])}, found one of {there}: build it as for the "
                "training that slimmed it, for the same images and number of classes"
            )


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers whose widths may change, by name."""
    for name, module in model.named_modules():
        if isinstance(module, LAYERS) or is_norm(module):
            yield name, module


def _narrower(
    model: nn.Module, state: Mapping[str, Any]
) -> Iterator[tuple[nn.Module, Side, int, int]]:
    """The sides of layers that a state dict has fewer entries for: their size, and how many."""
    sides: tuple[Side, ...] = ("out", "in")
    for name, module in _layers(model):
        for side in sides:
            for key, dim in tensors_of(module, side):
                value = state.get(f"{name}.{key}" if name else key)
                size = getattr(module, key).shape[dim]
                if isinstance(value, torch.Tensor) and value.shape[dim] < size:
                    yield module, side, size, value.shape[dim]
                    break
