"""Selection: from scores to masks, the lowest scores first. Pure, deterministic and linear in time.

Ties at the threshold are broken by position: of equal scores, those that come first (in network
order, then in memory order) are pruned first.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lth_plugins.prune.allocation import ALLOCATIONS
from lth_plugins.ticket.errors import TicketError
from lth_plugins.ticket.masks import Masks

SCOPES = ("global", *ALLOCATIONS)


def select(scores: Mapping[str, Tensor], masks: Masks, fraction: float, scope: str) -> Masks:
    """Prune the ``fraction`` of what ``masks`` keep that has the lowest scores.

    Args:
        scores: name to score, the names and shapes of ``masks``: float32, on the CPU, not NaN.
        masks: what is kept so far.
        fraction: of the kept weights, in [0, 1]; the number pruned is rounded half to even, as in
            ``torch.nn.utils.prune``.
        scope: "global" ranks all weights together; the names in `ALLOCATIONS` first share out how
            many each parameter loses.

    Raises:
        TicketError: if the fraction or scope is not one, or a score is NaN.
    """
    if not 0 <= fraction <= 1:
        raise TicketError(f"expected a fraction of weights to prune in [0, 1], found {fraction}")
    if scope not in SCOPES:
        raise TicketError(f"unknown scope {scope!r}; known are {', '.join(SCOPES)}")
    if scope == "global":
        return Masks(_prune_lowest(scores, masks, round(fraction * masks.kept)))
    pruned: dict[str, Tensor] = {}
    for name, count in ALLOCATIONS[scope](masks, fraction).items():
        pruned |= _prune_lowest({name: scores[name]}, {name: masks[name]}, count)
    return Masks(pruned)


def _prune_lowest(
    scores: Mapping[str, Tensor], masks: Mapping[str, Tensor], count: int
) -> dict[str, Tensor]:
    if count == 0:
        return dict(masks)
    # NumPy gathers and selects ten times as fast as PyTorch does on a CPU.
    worth = {name: scores[name].numpy() for name in masks}
    kept = {name: mask.numpy() for name, mask in masks.items()}
    threshold = _smallest(worth, kept, count)
    pruned = {name: kept[name] & (worth[name] >= threshold) for name in masks}
    # What is still to prune has exactly the threshold's score: ties.
    below = sum(np.count_nonzero(kept[n]) - np.count_nonzero(pruned[n]) for n in masks)
    left = count - int(below)
    for name in masks:
        if left == 0:
            break
        tied = np.flatnonzero(pruned[name] & (worth[name] == threshold))[:left]
        pruned[name].flat[tied] = False
        left -= len(tied)
    return {name: torch.from_numpy(mask) for name, mask in pruned.items()}


def _smallest(worth: Mapping[str, np.ndarray], kept: Mapping[str, np.ndarray], k: int) -> float:
    """The k-th smallest score of all kept weights together, k from 1."""
    sizes = {name: int(np.count_nonzero(mask)) for name, mask in kept.items()}
    scores = np.empty(sum(sizes.values()), dtype=np.float32)
    start = 0
    for name, size in sizes.items():
        part = scores[start : start + size]
        np.compress(kept[name].ravel(), worth[name].ravel(), out=part)
        if np.isnan(part.sum()):
            raise TicketError(f"a score of {name} is not a number: did training diverge?")
        start += size
    scores.partition(k - 1)
    return float(scores[k - 1])
