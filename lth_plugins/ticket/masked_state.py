"""Masks in state dicts: how libraries of pruning name them, and what they prune."""

import logging
import re
from collections.abc import Mapping

from torch import Tensor

from lth_plugins.errors import TicketError
from lth_plugins.ticket.inside import scopes
from lth_plugins.ticket.keys import State, some
from lth_plugins.ticket.layout import Layout

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


def apply_masks_to(
    state: dict[str, Tensor],
    masks: State,
    layout: Layout,
    biases: Mapping[str, str],
    to_convolutions: bool,
) -> frozenset[str]:
    """Multiply the trunk's parameters by their masks, in place in this dictionary.

    Returns:
        The keys of those that had one.

    Raises:
        TicketError: if a mask in the trunk belongs to no parameter, or holds other values than 0
            and 1.
    """
    kinds = {key: len(layout.arch.shapes[name]) for name, key in layout.keys.items()}
    kinds |= dict.fromkeys(biases, 1)
    inside = scopes(layout)
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


def outside_keys(state: State, layout: Layout) -> list[str]:
    """The entries of a state dict that are not inside the trunk, but for masks."""
    used, inside = set(layout.keys.values()), scopes(layout)
    return [k for k in split_masks(state)[1] if k not in used and not k.startswith(inside)]
