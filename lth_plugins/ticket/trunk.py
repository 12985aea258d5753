"""Reading a trunk: every parameter that a state dict or a model has in it is accounted for.

Import, export, `Ticket.dense`, `attach` and `compact` all read through here. What a plain ResNet
does not have is folded where that is exact, left out by name where it is harmless, and refused
otherwise: a network that holds more computes something else. Where the trunk is, and how its
parameters are named, is `dialects`' business; which masks a ticket gets is `convert`'s.
"""

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lth_plugins.errors import LthError, TicketError, printable
from lth_plugins.ticket.arch import ARCHITECTURES, ResNet, part_of
from lth_plugins.ticket.dialects import (
    Layout,
    State,
    locate,
    locate_prunable,
    signs_of_others,
    unwrapped,
)
from lth_plugins.ticket.foreign.unpickle import PLAIN

logger = logging.getLogger(__name__)

_ORIG = "_orig"  # of torch.nn.utils.prune
_PARAMETRIZED = ".original"  # of torch.nn.utils.parametrize, and so of torch.ao.pruning
_KEY_OF_MASK: tuple[tuple[str, str], ...] = (
    (r"(^|\.)_(weight|bias)_mask$", r"\1_layer.\2"),  # AC/DC and WoodFisher
    (r"(^|\.)pre_ops\.\d+\.op\._binary_mask$", r"\1weight"),  # NNCF
    (r"(^|\.)(weight|bias)\.mask$", r"\1\2"),  # the state of torch.ao.pruning's sparsifiers
    (r"(^|\.)((binary|pruning|sparsity)_)?mask$", r"\1weight"),
    (r"(^|\.)mask_(weight|bias)$", r"\1\2"),
    (r"(_keep)?_mask$", ""),  # torch.nn.utils.prune, SynFlow, NNI
    # A dictionary of masks beside that of weights.
    (r"(^|\.)(((pruning|sparsity|sparse|binary|weight)_)?masks?(_dict|_values)?\.)", r"\1\2"),
)
"""How the key of a mask becomes that of its parameter; the first pattern that is found counts."""

_THRESHOLD = "sparseThreshold"  # of STR (arXiv 2002.03231)
_HARMLESS: tuple[tuple[str, str], ...] = (
    (r"\.num_batches_tracked$", "a counter"),
    (r"\.sparseWeight$", "what STR computes from a weight and its threshold"),
    (r"\.total_(ops|params)$", "what thop counted"),
    (
        r"\.(weight_fake_quant|activation_post_process)\.",
        "observed for a later quantisation; the weights are those before it",
    ),
)
"""Patterns of what a trunk may hold besides its parameters, and why it can be left out."""

_BESIDE_STEM = ("relu", "prelu", "act", "act1", "maxpool")
"""Modules between the stem and the stages, which have no parameters in a plain ResNet."""


@dataclass(frozen=True)
class TrunkState:
    """A trunk as it was read.

    Attributes:
        layout: where it was found.
        weights: by torchvision name: what the network computes with.
        masked: the keys of what masks in the state dict were applied to.
        stride_in_1x1: as `TicketMeta.stride_in_1x1`; None where a state dict cannot tell.
    """

    layout: Layout
    weights: dict[str, Tensor]
    masked: frozenset[str] = frozenset()
    stride_in_1x1: bool | None = None

    @property
    def arch(self) -> ResNet:
        return self.layout.arch


def read_trunk(
    source: State | nn.Module,
    prefix: str | None = None,
    archs: Iterable[ResNet] = ARCHITECTURES.values(),
    compacted: bool = False,
    apply_masks: bool = True,
) -> TrunkState:
    """Read the ResNet trunk of a state dict or a model, with nothing dropped in silence.

    Of a state dict, the masks in it are applied, convolutions' biases are folded into the running
    means of the normalisation that follows, and STR's thresholds are applied. A model is taken as
    it is: one that has any of these is refused.

    Args:
        source: a model, or its state dict, in any known dialect.
        prefix: as in `locate`.
        archs: the architectures it may have.
        compacted: whether blocks may have fewer channels inside than the architecture has.
        apply_masks: False leaves convolutions' weights as they are where the state dict has a mask
            for them: θ. Masks of biases and normalisation, which no ticket has, are applied always.

    Raises:
        TicketError: if no known layout fits, several do, or the trunk holds more than a plain
            ResNet's.
    """
    if isinstance(source, nn.Module):
        layout = locate(source, archs=archs, prefix=prefix, compacted=compacted)
        check_model(source, layout)
        state = source.state_dict()
        stride_in_1x1 = _stride_in_1x1(source, layout)
        return TrunkState(layout, layout.extract(state), stride_in_1x1=stride_in_1x1)
    masks, state = split_masks(source)
    try:
        layout = locate(state, archs=archs, prefix=prefix, compacted=compacted)
    except LthError as error:
        more = f"{_look_alike(state)}{_not_read(source)}"
        raise TicketError(f"{str(error).rstrip('?') if more else error}{more}") from error
    _check_read(source, layout)
    if apply_masks:
        check_has_masks(source, layout)
    biases = _account_for(state, layout)
    masked = _apply_masks(state, masks, layout, biases, apply_masks)
    weights = layout.extract(state)
    for key, mean in biases.items():  # (x + b) - m is x - (m - b)
        weights[mean] = (weights[mean].double() - state[key].double()).float()
    return TrunkState(layout, _thresholded(state, layout, weights), masked)


def _look_alike(state: State) -> str:
    """What a state dict without a known layout is instead, as a sentence; "" if nobody knows."""
    means = any(key.endswith("running_mean") for key in state)
    bias = next((k for k in state if re.search(r"(^|\.)layer\d.*conv\d\.bias$", k)), None)
    deep = next((k for k, v in state.items() if _is_wide_stem(k, v)), None)
    if bias and not means:
        return f". Its normalisation is folded into {bias} and others: give it as it was before"
    return (
        f". Its stem is wider ({deep}), as of timm's resnet50s: that is not known" if deep else ""
    )


def unread_in(source: State) -> dict[str, str]:
    """The entries that hold no plain numbers, by key, and what they are.

    Those of a file were left out when it was read (`Entries`).
    """
    unread = dict(getattr(source, "unread", {}))
    for key, value in source.items():
        if not isinstance(value, Tensor):  # a module's extra state, or nobody's
            unread[key] = f"{type(value).__name__}, and no tensor"
        elif value.layout != torch.strided:
            unread[key] = "a sparse tensor: give value.to_dense()"
        elif value.dtype not in PLAIN:
            unread[key] = f"a tensor of {value.dtype}"
    return unread


def _not_read(source: State) -> str:
    """What could not be read where no trunk is found, as a sentence; "" if everything was."""
    for key, what in unread_in(source).items():
        return f". Not read was {printable(key)}, {what}"
    return ""


def _check_read(source: State, layout: Layout) -> None:
    """Refuse a trunk that holds anything but plain numbers, or masks that do.

    Raises:
        TicketError: naming it.
    """
    unread = unread_in(source)
    inside = _scopes(layout)
    for key, what in unread.items():
        masks, _ = split_masks({key: torch.empty(0)})
        if (masks and locate_prunable(masks, layout.arch)) or key.startswith(inside):
            raise TicketError(
                f"expected plain numbers in {key}, which the trunk of a {layout.arch.name} needs, "
                f"found {what}"
            )
    for key in layout.keys.values():
        if key in source and source[key].dtype in (torch.int8, torch.uint8):
            raise TicketError(
                f"expected floating-point numbers in {key}, found {source[key].dtype}, as of a "
                "quantised model: give the floating-point one"
            )


def _is_wide_stem(key: str, value: Tensor) -> bool:
    named = re.search(r"(^|\.)(conv1|stem)\.0\.weight$", key)
    return named is not None and isinstance(value, Tensor) and value.shape[0] > 32


def to_torchvision(source: State | nn.Module) -> tuple[ResNet, dict[str, Tensor]]:
    """The architecture of anything `read_trunk` reads, and its trunk in torchvision's names.

    Raises:
        TicketError: as `read_trunk`.
    """
    trunk = read_trunk(source)
    return trunk.arch, trunk.weights


def split_masks(state: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The masks in a state dict, by their parameters' keys, and everything else.

    Parameters have the keys they have without masks: ``torch.nn.utils.prune`` and
    ``torch.ao.pruning`` rename them, and NNI wraps their modules.
    """
    masks: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for key, value in state.items():
        for pattern, replacement in _KEY_OF_MASK:
            masked, count = re.subn(pattern, replacement, key)
            if count:
                masks[masked] = value
                break
        else:
            weights[key.removesuffix(_ORIG)] = value
    for key in [key for key in weights if key.endswith(_PARAMETRIZED)]:
        plain = key.removesuffix(_PARAMETRIZED).replace(".parametrizations.", ".")
        if _tail(plain) in {_tail(masked) for masked in masks}:
            weights[plain] = weights.pop(key)
    wrappers = {key.rpartition(".")[0] for key in masks}
    wrapped = [key for key in weights if key.count(".") > 1]
    for key in wrapped:
        path, _, entry = key.rpartition(".")
        module = path.removesuffix(".module")
        if module != path and module in wrappers:
            value = weights.pop(key)  # NNI 2 keeps the product beside the parameter
            weights.setdefault(f"{module}.{entry}", value)
    named = {f"{key}.weight": key for key in masks if key not in weights}
    masks |= {weight: masks.pop(key) for weight, key in named.items() if weight in weights}
    return masks, weights


def _tail(key: str) -> str:
    """The stage, block, convolution and entry that a key ends in."""
    return ".".join(key.split(".")[-4:])


def check_model(model: nn.Module, layout: Layout) -> None:
    """Refuse a model whose trunk is more than a plain ResNet's.

    Raises:
        TicketError: naming a parameter or buffer that no ticket holds, or what else than its
            convolutions reduces the resolution.
    """
    # With keep_vars: only names are looked at, and a ticket on the model need not hold.
    state = model.state_dict(keep_vars=True)
    for key in _unknown(state, layout):
        if key in _biases(state, layout):
            raise TicketError(
                f"expected the convolutions of a plain {layout.arch.name} without biases, found "
                f"{key}: a ticket has no place for it. Build the model with bias=False; import "
                "its checkpoint (tools/ticket.py import) to fold biases into running means"
            )
        raise TicketError(_holds_more(layout, key))
    _check_sampling(model, layout)


def _holds_more(layout: Layout, key: str) -> str:
    return (
        f"{signs_of_others([key])}expected the blocks of a plain {layout.arch.name}, found {key} "
        "in one of them or in its stem. Give a network without such parts"
    )


def _account_for(state: State, layout: Layout) -> dict[str, str]:
    """The keys of convolutions' biases, and the names of the running means that follow.

    Raises:
        TicketError: naming an entry of the trunk that cannot be accounted for.
    """
    biases = _biases(state, layout)
    thresholds = {_threshold_of(key) for key in layout.keys.values()}
    left_out: dict[str, list[str]] = {}
    used = set(layout.keys.values())
    inside = _scopes(layout)
    ignored = layout.ignored(state)
    for key, value in state.items():
        if key in used or not key.startswith(inside) or key in biases or key in ignored:
            continue
        if key in thresholds and value.numel() == 1:
            continue
        why = _why_harmless(key)
        if why is None:
            raise TicketError(_holds_more(layout, key))
        left_out.setdefault(why, []).append(key)
    for why, keys in left_out.items():
        logger.info("Left out %s: %s", some(keys), why)
    for key, mean in biases.items():
        if state[key].shape != state[layout.keys[mean]].shape:
            raise TicketError(
                f"expected {key} to have one value for each channel of its convolution, found "
                f"shape {tuple(state[key].shape)}"
            )
    if biases:
        logger.warning(
            "Folded %s into the running means of the normalisation that follows: the network "
            "computes the same",
            some(list(biases)),
        )
    return biases


def outside(state: State, layout: Layout) -> list[str]:
    """The entries of a state dict that are not inside the trunk, but for masks."""
    used, inside = set(layout.keys.values()), _scopes(layout)
    return [k for k in split_masks(state)[1] if k not in used and not k.startswith(inside)]


def _unknown(state: State, layout: Layout) -> Iterator[str]:
    """The entries in the trunk that are neither its parameters nor harmless."""
    used = set(layout.keys.values())
    inside = _scopes(layout)
    for key in state:
        if key.startswith(inside) and key not in used and _why_harmless(key) is None:
            yield key


def _why_harmless(key: str) -> str | None:
    return next((why for pattern, why in _HARMLESS if re.search(pattern, f".{key}")), None)


def _biases(state: State, layout: Layout) -> dict[str, str]:
    """The keys of convolutions' biases, and the running mean that follows each, by its name."""
    biases = {}
    # A framework may leave the means out, but has the weights.
    there = [n for n in layout.arch.shapes if f"{n.rpartition('.')[0]}.weight" in layout.keys]
    norms = [name for name in there if name.endswith(".running_mean")]
    convs = [name for name in layout.keys if len(layout.arch.shapes[name]) == 4]
    for conv, mean in zip(convs, norms, strict=True):  # in network order, they alternate
        key = layout.keys[conv].removesuffix("weight") + "bias"
        if key in state and key not in layout.keys.values():
            biases[key] = mean
    return biases


def _threshold_of(key: str) -> str:
    return key.removesuffix("weight") + _THRESHOLD


def _thresholded(state: State, layout: Layout, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """STR stores weights that are yet to be shrunk, and the thresholds for it."""
    shrunk = []
    for name, key in layout.keys.items():
        threshold = state.get(_threshold_of(key)) if len(layout.arch.shapes[name]) == 4 else None
        if threshold is not None:
            weight = weights[name].float()
            shrink = torch.sigmoid(threshold.flatten().float())
            weights[name] = weight.sign() * torch.relu(weight.abs() - shrink)
            shrunk.append(key)
    if shrunk:
        logger.info("Applied STR's thresholds to %s", some(shrunk))
    return weights


def _apply_masks(
    state: dict[str, Tensor],
    masks: State,
    layout: Layout,
    biases: Mapping[str, str],
    to_convolutions: bool,
) -> frozenset[str]:
    """Multiply the trunk's parameters by their masks, in this state dict of one's own.

    Returns:
        The keys of those that had one.

    Raises:
        TicketError: if a mask in the trunk belongs to no parameter, or is none.
    """
    kinds = {key: len(layout.arch.shapes[name]) for name, key in layout.keys.items()}
    kinds |= dict.fromkeys(biases, 1)
    inside = _scopes(layout)
    masked, zeroed = [], []
    for key, mask in masks.items():
        if not key.startswith(inside) or (kinds.get(key) == 4 and not to_convolutions):
            continue
        shape = tuple(state[key].shape) if key in kinds else None
        if shape != tuple(mask.shape):
            raise TicketError(
                f"expected a parameter of shape {tuple(mask.shape)} for the mask of {key}, found "
                f"{f'shape {shape}' if shape else 'none'}"
            )
        kept = mask != 0
        if not bool((kept == mask).all()):
            raise TicketError(
                f"the mask of {key} must hold only 0 and 1, found others: was it thresholded?"
            )
        masked.append(key)
        if not bool(kept.all()):
            state[key] = state[key].masked_fill(~kept, 0)
            zeroed.append(key)
    if zeroed:
        why = "" if to_convolutions else ". Tickets prune convolutions only: these zeros will train"
        logger.warning("Set to zero what masks prune of %s%s", some(zeroed), why)
    return frozenset(masked)


def check_has_masks(state: State, layout: Layout) -> None:
    """Refuse parameters that ``torch.nn.utils.prune`` renamed, and whose masks are not there."""
    for key in layout.keys.values():
        if key not in state and key + _ORIG in state and f"{key}_mask" not in state:
            raise TicketError(
                f"expected {key}_mask, which torch.nn.utils.prune writes beside {key}{_ORIG}, "
                "found none: give the file of masks (--mask), or save the model again"
            )


def _scopes(layout: Layout) -> tuple[str, ...]:
    """The prefixes of everything that is inside the trunk."""
    by_part: dict[str, list[str]] = {}
    for name, key in layout.keys.items():
        by_part.setdefault(part_of(name), []).append(key)
    scopes: list[str] = []
    for keys in by_part.values():
        shared = common_path(keys)
        if layout.prefix.startswith(shared):  # beside others, such as conv1 and bn1 beside fc
            depth = shared.count(".") + 1
            scopes += {".".join(key.split(".")[:depth]) + "." for key in keys}
            scopes += [f"{shared}{name}." for name in _BESIDE_STEM]
        else:
            scopes.append(shared)
    scopes += [block for block in layout.blocks() if not block.endswith(".")]  # Caffe2's blobs
    if layout.dialect.name == "sequential":
        scopes += [f"{layout.prefix}{child}." for child in (2, 3)]  # ReLU and pooling
    return tuple(scopes)


def common_path(keys: Iterable[str]) -> str:
    """The modules that all of these keys are in, with a dot at the end; "" if there is none."""
    steps = zip(*(key.split(".")[:-1] for key in keys), strict=False)
    shared = takewhile(lambda step: len(set(step)) == 1, steps)
    return "".join(f"{step[0]}." for step in shared)


def some(keys: list[str], most: int = 3) -> str:
    """A few of these keys, and how many there are."""
    shown = printable(", ".join(keys[:most]))
    return shown if len(keys) <= most else f"{shown} and {len(keys) - most} more"


# --- what only a model tells


_POOLS = (nn.AvgPool2d, nn.MaxPool2d, nn.LPPool2d)


def _check_sampling(model: nn.Module, layout: Layout) -> None:
    """Refuse blocks that reduce the resolution by anything but a convolution's stride.

    Anti-aliased ResNets (arXiv 1904.11486; timm's resnetblur50, resnetaa50) pool behind the second
    convolution, whose own stride is then 1, and have a plain one's parameters.
    """
    # Wrappers of activation checkpointing are in the modules' names, and in no key.
    modules = {unwrapped(path): module for path, module in model.named_modules()}
    inside = tuple(unwrapped(scope) for scope in _scopes(layout))
    for path, module in modules.items():
        if f"{path}.".startswith(inside) and "blur" in type(module).__name__.lower():
            raise TicketError(_anti_aliased(layout, path, type(module).__name__))
    for keys in _blocks(layout).values():
        plain = {name: unwrapped(key) for name, key in keys.items()}
        block = common_path(plain.values())
        shortcut = common_path([key for name, key in plain.items() if ".downsample." in name])
        main, beside = 1, 1
        for path, module in modules.items():
            if not f"{path}.".startswith(block):
                continue
            aside = bool(shortcut) and f"{path}.".startswith(shortcut)
            if isinstance(module, _POOLS) and not aside:
                raise TicketError(_anti_aliased(layout, path, type(module).__name__))
            if isinstance(module, _POOLS) or f"{path}.weight" in plain.values():
                if aside:
                    beside *= _stride(module)
                else:
                    main *= _stride(module)
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


def _stride(module: Any) -> int:
    stride = getattr(module, "stride", 1)
    return max(stride) if isinstance(stride, tuple) else int(stride)


def _stride_in_1x1(model: nn.Module, layout: Layout) -> bool:
    """Whether a bottleneck has its stride in its first 1x1 convolution."""
    modules = layout.modules(model)
    firsts = [module for name, module in modules.items() if name.endswith(".conv1.weight")]
    return layout.arch.bottleneck and math.prod(map(_stride, firsts)) > 1
