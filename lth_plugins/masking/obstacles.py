"""What keeps a mask from holding on a model, and what to do about it.

Sharding and re-parametrisation take a weight away from its module; a tensor on the meta device has
no values. Whoever attaches a ticket is told before anything changes, and whoever does it to a
model that holds one is told when it is next verified, trained or saved.
"""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from lth_plugins.errors import TicketError
from lth_plugins.ticket.arch import STAGES, part_of

USE_DDP = (
    "masks do not hold on parameters that are sharded or flattened. Train with "
    "torch.nn.parallel.DistributedDataParallel, or on one device, and attach the ticket to the "
    "model before it is wrapped"
)


def sharded_by(model: nn.Module) -> str | None:
    """What shards or flattens parameters of a model, such as "FSDP (fully_shard)"."""
    # Nothing is imported for it: a model cannot be what nobody has imported.
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    tensor: Any = sys.modules.get("torch.distributed.tensor")
    for module in model.modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FSDPModule):
            return "FSDP (fully_shard)"
        if isinstance(module, fsdp.FullyShardedDataParallel):
            return "FSDP (FullyShardedDataParallel)"
    for name, parameter in model.named_parameters():
        if is_flattened(parameter) or name.endswith("_flat_param"):
            return "FSDP (FullyShardedDataParallel)"
        if tensor is not None and isinstance(parameter, tensor.DTensor):
            return "DTensor"
    return None


def is_flattened(parameter: Tensor) -> bool:
    """Whether FSDP made this parameter a view of a flat one, which has its gradient."""
    return getattr(parameter, "_fsdp_flattened", False)


def replaced_by(module: nn.Module) -> str | None:
    """What computes a module's weight from other parameters, and how to undo it."""
    parameters = module._parameters
    if isinstance(parameters.get("weight"), nn.Parameter):
        return None
    if parametrize.is_parametrized(module, "weight"):
        return (
            "torch.nn.utils.parametrize computes the weight from other parameters: call "
            "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')"
        )
    if "weight_orig" in parameters and "weight_mask" in module._buffers:
        return (
            "torch.nn.utils.prune computes the weight from weight_orig and its own mask: call "
            "torch.nn.utils.prune.remove(module, 'weight')"
        )
    if "weight_orig" in parameters:
        return (
            "torch.nn.utils.spectral_norm computes the weight from weight_orig: call "
            "torch.nn.utils.remove_spectral_norm(module)"
        )
    if "weight_g" in parameters:
        return (
            "torch.nn.utils.weight_norm computes the weight from weight_g and weight_v: call "
            "torch.nn.utils.remove_weight_norm(module)"
        )
    return None


def weight_of(module: nn.Module) -> Tensor | None:
    """What a module computes with as its weight, without changing what that is computed from."""
    if not parametrize.is_parametrized(module, "weight"):
        found = module._parameters.get("weight", module.__dict__.get("weight"))
        return found if isinstance(found, Tensor) else None
    computing = module.get_submodule("parametrizations.weight")
    modes = {part: part.training for part in computing.modules()}
    computing.eval()  # in training, spectral norm goes a step on with its power iteration
    try:
        with torch.no_grad():
            weight: Tensor = computing()
            return weight
    finally:
        for part, mode in modes.items():
            part.training = mode


def check_not_sharded(model: nn.Module) -> None:
    """Raise ``TicketError`` if a model's parameters are sharded or flattened."""
    sharding = sharded_by(model)
    if sharding is not None:
        raise TicketError(f"expected a model with whole parameters, found {sharding}: {USE_DDP}")


def check_not_replaced(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise ``TicketError`` if the weight of a convolution is computed from other parameters."""
    for name, module in modules:
        how = replaced_by(module) if isinstance(module, nn.Conv2d) else None
        if how is not None:
            raise TicketError(
                f"expected {name}.weight to be a parameter, found that {how} for each such module, "
                "then do this again"
            )


def check_has_values(parameters: Mapping[str, Tensor]) -> None:
    """Raise ``TicketError`` if one of these parameters is on the meta device."""
    on_meta = [name for name, parameter in parameters.items() if parameter.is_meta]
    if on_meta:
        raise TicketError(
            f"expected a model with values, found {on_meta[0]} on the meta device: give the model "
            "its memory first, with model.to_empty(device=…) or "
            "model.load_state_dict(…, assign=True), then attach the ticket"
        )


def frozen_norms(model: nn.Module, modules: Mapping[str, Any]) -> str | None:
    """The class of a normalisation in the trunk's stages whose statistics never change, or None.

    The stem is not pruned, so its statistics are right for any ticket.

    Args:
        model: the whole model.
        modules: of its trunk's entries, by torchvision name.
    """
    for name, norm in modules.items():
        if not name.endswith("running_mean") or part_of(name) not in STAGES:
            continue
        if not isinstance(norm, _BatchNorm):
            return type(norm).__name__
        if model.training and not norm.training:
            return f"{type(norm).__name__} in evaluation mode"
    return None
