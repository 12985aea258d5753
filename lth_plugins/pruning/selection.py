"""Selection: from scores to masks, the lowest scores first. Pure, deterministic and linear in time.

Ties at the threshold are broken by position: of equal scores, those that come first (in network
order, then in memory order) are pruned first.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lth_plugins.errors import ConfigError, TicketError, unknown
from lth_plugins.pruning.allocation import ALLOCATIONS
from lth_plugins.ticket.masks import Masks

SCOPES = ("global", *ALLOCATIONS)

SAMPLED = 251
"""One score in so many is in the sample: a prime, which falls in with no layout of kernels."""


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
        ConfigError: if the fraction or scope is invalid.
        TicketError: if a score is NaN.
    """
    if not 0 <= fraction <= 1:
        raise ConfigError(f"expected a fraction of weights to prune in [0, 1], found {fraction}")
    if scope not in SCOPES:
        raise unknown("scope", scope, SCOPES)
    if scope == "global":
        return Masks.adopt(prune_lowest(scores, masks, round(fraction * masks.kept)))
    pruned: dict[str, Tensor] = {}
    for name, count in ALLOCATIONS[scope](masks, fraction).items():
        pruned |= prune_lowest({name: scores[name]}, {name: masks[name]}, count)
    return Masks.adopt(pruned)


class _Part(NamedTuple):
    """What is known of one parameter, flat, once the threshold is bracketed."""

    kept: np.ndarray  # bool: pruned below the bracket; what is in it is decided last
    undecided: np.ndarray  # indices of what is in the bracket
    worth: np.ndarray  # scores of these


def prune_lowest(
    scores: Mapping[str, Tensor], masks: Mapping[str, Tensor], count: int
) -> dict[str, Tensor]:
    """Prune the ``count`` lowest of what ``masks`` keep.

    A sample brackets the threshold, and only what is in the bracket, one weight in a hundred, is
    ranked (Floyd & Rivest, "Expected time bounds for selection", CACM 1975). The result does not
    depend on the sample: a bracket that misses is widened to all weights.
    """
    if count == 0:
        return dict(masks)
    kept = sum(np.count_nonzero(mask.numpy()) for mask in masks.values())
    for low, high in (_bracket(scores, masks, count / kept), (-np.inf, np.inf)):
        parts = {n: _part(n, scores[n].numpy().ravel(), masks[n], low, high) for n in masks}
        below = kept - sum(np.count_nonzero(part.kept) for part in parts.values())
        worth = np.concatenate([part.worth for part in parts.values()])
        if below < count <= below + len(worth):
            break
    worth.partition(count - below - 1)
    threshold = worth[count - below - 1]
    ties = count - below - np.count_nonzero(worth < threshold)
    for part in parts.values():
        part.kept[part.undecided[part.worth < threshold]] = False
        tied = part.undecided[part.worth == threshold][:ties]
        part.kept[tied] = False
        ties -= len(tied)
    return {n: torch.from_numpy(part.kept).view(masks[n].shape) for n, part in parts.items()}


def _bracket(
    scores: Mapping[str, Tensor], masks: Mapping[str, Tensor], fraction: float
) -> tuple[float, float]:
    """Two scores between which, most likely, the lowest ``fraction`` of the kept ones ends."""
    sampled = slice(None, None, SAMPLED)
    sample = [scores[n].numpy().ravel()[sampled][masks[n].numpy().ravel()[sampled]] for n in masks]
    ordered = np.sort(np.concatenate(sample))
    rank, margin = int(fraction * len(ordered)), 1 + 4 * math.isqrt(len(ordered))
    low = ordered[rank - margin] if rank >= margin else -np.inf
    high = ordered[rank + margin] if rank + margin < len(ordered) else np.inf
    return low, high


def _part(name: str, worth: np.ndarray, mask: Tensor, low: float, high: float) -> _Part:
    kept = mask.numpy().ravel()
    if np.isnan(worth.sum()) and np.isnan(worth[kept]).any():
        raise TicketError(f"a score of {name} is not a number: did training diverge?")
    above = worth >= low
    above &= kept
    inside = worth <= high
    inside &= above
    undecided = np.flatnonzero(inside)
    return _Part(above, undecided, worth[undecided])
