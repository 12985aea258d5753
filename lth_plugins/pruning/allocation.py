"""Allocation: how many weights each parameter keeps, for scopes that fix that beforehand."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import torch

from lth_plugins.ticket.masks import Masks

Allocation = Callable[[Masks, float], dict[str, int]]
"""``allocation(masks, fraction)``: how many of the kept weights to prune, by parameter."""


def uniform(masks: Masks, fraction: float) -> dict[str, int]:
    """The same fraction of what each parameter keeps."""
    return {name: round(fraction * _kept(mask)) for name, mask in masks.items()}


def erk(masks: Masks, fraction: float) -> dict[str, int]:
    """Erdős-Rényi-kernel densities (Evci et al., RigL, arXiv 1911.11134, section 3).

    A parameter's density is proportional to (c_out + c_in + k_h + k_w) / (c_out c_in k_h k_w), and
    never above what it has left: what does not fit there goes to the others.
    """
    kept = {name: _kept(mask) for name, mask in masks.items()}
    left = sum(kept.values()) - round(fraction * sum(kept.values()))
    wish = {name: float(sum(mask.shape)) for name, mask in masks.items()}  # ∝ density × size
    keep: dict[str, int] = {}
    while True:
        free = [name for name in kept if name not in keep]
        scale = left / sum(wish[name] for name in free) if free else 0.0
        full = [name for name in free if scale * wish[name] >= kept[name]]
        if not full:
            break
        for name in full:
            keep[name] = kept[name]
            left -= kept[name]
    # Largest remainders first, so that the total is exact.
    keep |= {name: int(scale * wish[name]) for name in free}
    short = left - sum(keep[name] for name in free)
    by_remainder = sorted(free, key=lambda name: int(scale * wish[name]) - scale * wish[name])
    for name in by_remainder[:short]:
        keep[name] += 1
    return {name: kept[name] - keep[name] for name in kept}


def _kept(mask: torch.Tensor) -> int:
    return int(np.count_nonzero(mask.numpy()))


ALLOCATIONS: Mapping[str, Allocation] = MappingProxyType({"layer": uniform, "erk": erk})
"""Scopes by name, next to "global", which ranks all weights together."""
