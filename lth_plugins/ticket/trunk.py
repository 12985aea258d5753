"""Reading a trunk: every parameter that a state dict or a model has in it is accounted for.

Import, export, `Ticket.dense`, `attach` and `compact` all read through here. What a plain ResNet
does not have is folded where that is exact, left out by name where it is harmless, and refused
otherwise: a network that holds more computes something else. Where the trunk is, and how its
parameters are named, is `dialects`' business; which masks a ticket gets is `convert`'s.
"""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lth_plugins.errors import LthError, TicketError, printable
from lth_plugins.ticket.arch import ARCHITECTURES, PARTS, ResNet
from lth_plugins.ticket.inside import biases_in, holds_more, others_in, scopes, why_harmless
from lth_plugins.ticket.keys import State, is_slimmed, some
from lth_plugins.ticket.layout import Layout, locate_prunable
from lth_plugins.ticket.locating import locate
from lth_plugins.ticket.masked_state import apply_masks_to, check_has_masks, split_masks
from lth_plugins.ticket.obstacles import check_model, has_stride_in_1x1

logger = logging.getLogger(__name__)

_THRESHOLD = "sparseThreshold"  # of STR (arXiv 2002.03231)

PLAIN = frozenset(
    (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
)
"""The dtypes of plain numbers: what is complex or quantised is never a weight or a mask."""


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
        stride_in_1x1 = has_stride_in_1x1(source, layout)
        return TrunkState(layout, layout.extract(state), stride_in_1x1=stride_in_1x1)
    masks, state = split_masks(source)
    try:
        layout = locate(state, PARTS, archs, prefix, compacted, slimmed=is_slimmed(source))
    except LthError as error:
        more = f"{_look_alike(state)}{_not_read(source)}"
        raise TicketError(f"{str(error).rstrip('?') if more else error}{more}") from error
    _check_read(source, layout)
    if apply_masks:
        check_has_masks(source, layout)
    biases = _account_for(state, layout)
    masked = apply_masks_to(state, masks, layout, biases, apply_masks)
    weights = layout.extract(state)
    for key, mean in biases.items():  # (x + b) - m is x - (m - b)
        weights[mean] = (weights[mean].double() - state[key].double()).float()
    return TrunkState(layout, _thresholded(state, layout, weights), masked)


def _look_alike(state: State) -> str:
    """What a state dict without a known layout is instead, as a sentence; "" if unknown."""
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
        if not isinstance(value, Tensor):  # such as a module's extra state
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
    inside = scopes(layout)
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


def _account_for(state: State, layout: Layout) -> dict[str, str]:
    """The keys of convolutions' biases, and the names of the running means that follow.

    Raises:
        TicketError: naming an entry of the trunk that cannot be accounted for.
    """
    biases = biases_in(state, layout)
    thresholds = {_threshold_of(key) for key in layout.keys.values()}
    left_out: dict[str, list[str]] = {}
    read_elsewhere = {*biases, *layout.ignored(state)}
    for key in others_in(state, layout):
        if key in read_elsewhere or (key in thresholds and state[key].numel() == 1):
            continue
        why = why_harmless(key)
        if why is None:
            raise TicketError(holds_more(layout, key))
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
