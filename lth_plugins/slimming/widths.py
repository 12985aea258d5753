"""The widths of a slimmed model: noted in its checkpoints, and given to a model that loads one.

The note is metadata of the state dict, so that its keys are the stock keys. Without it a layer of
another width is an error of the user, such as another number of classes, and stays one.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lth_plugins.masking.attachment import attached
from lth_plugins.masking.input import ModelInput
from lth_plugins.masking.loading import allow_to_run, note_input, noted_input
from lth_plugins.masking.narrowing import narrow_to
from lth_plugins.slimming.channels import cut, tensors_of
from lth_plugins.slimming.network import Side
from lth_plugins.slimming.tracing import LAYERS, is_norm

SLIMMED = "slim.pth"
"""What hosts call the checkpoint of the narrower model, beside their own."""

_SLIMMED = "slimmed"
"""In the metadata of a state dict's root: that its layers have widths of their own."""


def note_widths(model: nn.Module, model_input: ModelInput | None) -> None:
    """Have the checkpoints of a slimmed model say that they are of one, and what its input is.

    Args:
        model: whose checkpoints.
        model_input: which the ticket noted that was on the model; None where it is unknown.
    """
    if _SLIMMED not in model.__dict__:
        model.register_state_dict_post_hook(_after_state_dict)
    model.__dict__[_SLIMMED] = model_input


def _after_state_dict(
    module: nn.Module, _: object, __: str, local_metadata: dict[str, Any]
) -> None:
    local_metadata[_SLIMMED] = True
    model_input: ModelInput | None = module.__dict__[_SLIMMED]
    if model_input is not None:
        note_input(local_metadata, model_input)


def is_slimmed(state: Mapping[str, Any]) -> bool:
    """Whether a state dict is that of a slimmed model."""
    return bool(getattr(state, "_metadata", {}).get("", {}).get(_SLIMMED))


def adopt_widths(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Give a freshly built model the widths of a slimmed or compacted state dict, so that it loads.

    A ticket on the model is detached: its masks are of the full width. It does nothing where both
    have the same widths.

    Args:
        model: as wide as its configuration makes it; changed in place, its weights cut off.
        state: a state dict, under the model's own names.
    """
    if not is_slimmed(state):
        narrow_to(model, state)
        return
    handle = attached(model)
    if handle is not None:
        handle.detach()
    allow_to_run(model)  # it needs no ticket
    sides: tuple[Side, ...] = ("out", "in")
    for name, module in model.named_modules():
        for side in sides:
            for key, dim in tensors_of(module, side) if _has_widths(module) else ():
                value = state.get(f"{name}.{key}" if name else key)
                size = getattr(module, key).shape[dim]
                if isinstance(value, torch.Tensor) and value.shape[dim] < size:
                    cut(module, side, torch.arange(size) < value.shape[dim])
                    break
    note_widths(model, noted_input(state))


def _has_widths(module: nn.Module) -> bool:
    return isinstance(module, LAYERS) or is_norm(module)
