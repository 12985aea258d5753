"""Models that a ticket cannot be read of or attached to, and what to do about each.

A plain ResNet's trunk holds nothing but its parameters, and reduces the resolution by its strides.
Flattening and re-parametrisation take a weight away from its module; a tensor on the meta device
has no values. `attach` refuses such a model before it changes anything; a model that becomes one
while a ticket is attached is refused when it is next verified, trained or saved.
"""

import math
import re
import sys
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from lth_plugins.errors import TicketError
from lth_plugins.ticket.arch import STAGES, part_of
from lth_plugins.ticket.inside import biases_in, holds_more, others_in, scopes, why_harmless
from lth_plugins.ticket.keys import common_path, unwrapped
from lth_plugins.ticket.layout import Layout

NOT_FLATTENED = (
    "masks do not hold on parameters that are flattened or taken apart. Shard the model with "
    "torch.distributed.fsdp.fully_shard (FSDP2; fsdp_version: 2 in accelerate), or train with "
    "torch.nn.parallel.DistributedDataParallel, and attach the ticket to the model before it is "
    "wrapped"
)


def flattened_by(model: nn.Module) -> str | None:
    """What flattens or partitions parameters of a model, such as "DeepSpeed ZeRO-3"."""
    # A model cannot be of a class whose module is not imported: import nothing here.
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FullyShardedDataParallel):
            return _FSDP
    for name, parameter in model.named_parameters():
        by = taken_by(parameter) or (_FSDP if name.endswith("_flat_param") else None)
        if by is not None:
            return by
    return None


def taken_by(parameter: Tensor) -> str | None:
    """What made a parameter a view of a flat one (FSDP), or took its values away (ZeRO-3)."""
    if hasattr(parameter, "ds_id"):  # DeepSpeed partitions its values over the processes
        return "DeepSpeed ZeRO-3"
    return _FSDP if getattr(parameter, "_fsdp_flattened", False) else None


_FSDP = "FSDP (FullyShardedDataParallel)"


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
    computing.eval()  # in training, spectral norm does another step of its power iteration
    try:
        with torch.no_grad():
            weight: Tensor = computing()
            return weight
    finally:
        for part, mode in modes.items():
            part.training = mode


def check_not_flattened(model: nn.Module) -> None:
    """Raise ``TicketError`` if a model's parameters are flattened."""
    by = flattened_by(model)
    if by is not None:
        raise TicketError(
            f"expected a model with parameters of its own, found {by}: {NOT_FLATTENED}"
        )


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


def check_model(model: nn.Module, layout: Layout) -> None:
    """Refuse a model whose trunk is more than a plain ResNet's.

    Raises:
        TicketError: naming a parameter or buffer that no ticket holds, or what else than its
            convolutions reduces the resolution.
    """
    # With keep_vars: only names are looked at, and a ticket on the model need not hold.
    state = model.state_dict(keep_vars=True)
    for key in others_in(state, layout):
        if why_harmless(key) is not None:
            continue
        if key in biases_in(state, layout):
            raise TicketError(
                f"expected the convolutions of a plain {layout.arch.name} without biases, found "
                f"{key}: a ticket has no place for it. Build the model with bias=False; import "
                "its checkpoint (tools/ticket.py import) to fold biases into running means"
            )
        raise TicketError(holds_more(layout, key))
    _check_sampling(model, layout)


_POOLS = (nn.AvgPool2d, nn.MaxPool2d, nn.LPPool2d)


def _check_sampling(model: nn.Module, layout: Layout) -> None:
    """Refuse blocks that reduce the resolution by anything but a convolution's stride.

    Anti-aliased ResNets (arXiv 1904.11486; timm's resnetblur50, resnetaa50) pool behind the second
    convolution, whose own stride is then 1, and have a plain one's parameters.
    """
    # Wrappers of activation checkpointing are in the modules' names, and in no key.
    modules = {unwrapped(path): module for path, module in model.named_modules()}
    inside = tuple(unwrapped(scope) for scope in scopes(layout))
    for path, module in modules.items():
        if f"{path}.".startswith(inside) and "blur" in type(module).__name__.lower():
            raise TicketError(_anti_aliased(layout, path, type(module).__name__))
    for keys in _blocks(layout).values():
        plain = {name: unwrapped(key) for name, key in keys.items()}
        block = common_path(plain.values())
        shortcut = common_path([key for name, key in plain.items() if ".downsample." in name])
        if layout.arch.avg_down:  # its pooling may stand beside what holds both
            shortcut = re.sub(r"\.\d+\.$", ".", shortcut)
        main, beside = 1, 1
        for path, module in modules.items():
            if not f"{path}.".startswith(block):
                continue
            aside = bool(shortcut) and f"{path}.".startswith(shortcut)
            if isinstance(module, _POOLS) and not aside:
                raise TicketError(_anti_aliased(layout, path, type(module).__name__))
            if isinstance(module, _POOLS) or f"{path}.weight" in plain.values():
                if aside:
                    beside *= stride_of(module)
                else:
                    main *= stride_of(module)
        if shortcut and main != beside:
            raise TicketError(
                _anti_aliased(layout, block, f"strides of {main}, and {beside} in the shortcut")
            )


def _anti_aliased(layout: Layout, where: str, found: str) -> str:
    return (
        f"expected the convolutions of a plain {layout.arch.name} to reduce the resolution by "
        f"their strides, found {found} at {where.strip('.')}: it is another network with the same "
        "parameters, such as an anti-aliased ResNet (timm's resnetblur50, resnetaa50). Give the "
        "plain one"
    )


def _blocks(layout: Layout) -> Mapping[str, dict[str, str]]:
    """Name and key of the entries of each block."""
    blocks: dict[str, dict[str, str]] = {}
    for name, key in layout.keys.items():
        if part_of(name) != "stem":
            blocks.setdefault(".".join(name.split(".")[:2]), {})[name] = key
    return MappingProxyType(blocks)


def stride_of(module: Any) -> int:
    stride = getattr(module, "stride", 1)
    return max(stride) if isinstance(stride, tuple) else int(stride)


def has_stride_in_1x1(model: nn.Module, layout: Layout) -> bool:
    """Whether a bottleneck has its stride in its first 1x1 convolution."""
    modules = layout.modules(model)
    firsts = [module for name, module in modules.items() if name.endswith(".conv1.weight")]
    return layout.arch.bottleneck and math.prod(map(stride_of, firsts)) > 1
