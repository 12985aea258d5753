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
    threshold, ties = _smallest(scores, masks, count)
    pruned: dict[str, Tensor] = {}
    for name, mask in masks.items():
        worth = scores[name].numpy()
        kept = mask.numpy() & (worth >= threshold)
        if ties:
            tied = np.flatnonzero(kept & (worth == threshold))[:ties]
            kept.flat[tied] = False
            ties -= len(tied)
        pruned[name] = torch.from_numpy(kept)
    return pruned


def _smallest(
    scores: Mapping[str, Tensor], masks: Mapping[str, Tensor], k: int
) -> tuple[float, int]:
    """The k-th smallest score of all kept weights together, and how many of the k have it.

    k counts from 1. This takes the memory of all weights once: a score at a time is copied, and
    bits are set in the place of a gather, which takes four times as long.
    """
    smallest = np.empty(sum(mask.numel() for mask in masks.values()), dtype=np.float32)
    start = 0
    for name, mask in masks.items():
        worth, kept = scores[name].numpy().ravel(), mask.numpy().ravel()
        if np.isnan(worth.sum()) and np.isnan(worth[kept]).any():
            raise TicketError(f"a score of {name} is not a number: did training diverge?")
        part = smallest[start : start + len(kept)]
        # A pruned weight gets all bits: not a number, which NumPy sorts last.
        np.bitwise_or(worth.view(np.int32), kept.view(np.int8) - 1, out=part.view(np.int32))
        start += len(kept)
    smallest.partition(k - 1)
    threshold = smallest[k - 1]
    return float(threshold), int(np.count_nonzero(smallest[:k] == threshold))
