"""Selection: from scores to masks, the lowest scores first. Pure, deterministic and linear in time.

Ties at the threshold are broken by position: of equal scores, those that come first (in network
order, then in memory order) are pruned first.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lth_plugins.ticket.errors import TicketError
from lth_plugins.ticket.masks import Masks

SCOPES = ("global", "layer")


def select(scores: Mapping[str, Tensor], masks: Masks, fraction: float, scope: str) -> Masks:
    """Prune the ``fraction`` of what ``masks`` keep that has the lowest scores.

    Args:
        scores: name to score, the names and shapes of ``masks``; not NaN.
        masks: what is kept so far.
        fraction: of the kept weights, in [0, 1]; the number pruned is rounded half to even, as in
            ``torch.nn.utils.prune``.
        scope: "global" ranks all weights together, "layer" takes the fraction in each parameter.

    Raises:
        TicketError: if the fraction or scope is not one, or a score is NaN.
    """
    if not 0 <= fraction <= 1:
        raise TicketError(f"expected a fraction of weights to prune in [0, 1], found {fraction}")
    if scope == "global":
        return Masks(_prune_lowest(scores, masks, round(fraction * masks.kept)))
    if scope == "layer":
        pruned: dict[str, Tensor] = {}
        for name, mask in masks.items():
            count = round(fraction * int(torch.count_nonzero(mask)))
            pruned |= _prune_lowest({name: scores[name]}, {name: mask}, count)
        return Masks(pruned)
    raise TicketError(f"unknown scope {scope!r}; known are {', '.join(SCOPES)}")


def _prune_lowest(
    scores: Mapping[str, Tensor], masks: Mapping[str, Tensor], count: int
) -> dict[str, Tensor]:
    if count == 0:
        return dict(masks)
    threshold = _smallest({name: scores[name][mask] for name, mask in masks.items()}, count)
    pruned = {}
    below = 0
    for name, mask in masks.items():
        pruned[name] = mask & (scores[name] >= threshold)
        below += int(torch.count_nonzero(mask)) - int(torch.count_nonzero(pruned[name]))
    # What is still to prune has exactly the threshold's score: ties.
    for name in masks:
        if below == count:
            break
        tied = torch.nonzero((pruned[name] & (scores[name] == threshold)).flatten()).flatten()
        taken = tied[: count - below]
        pruned[name].view(-1)[taken] = False
        below += len(taken)
    return pruned


def _smallest(values: Mapping[str, Tensor], k: int) -> float:
    """The k-th smallest of all values together, k from 1."""
    flat = torch.cat([value.flatten() for value in values.values()])
    if bool(torch.isnan(flat).any()):
        name = next(name for name, value in values.items() if bool(torch.isnan(value).any()))
        raise TicketError(f"a score of {name} is not a number: did training diverge?")
    # NumPy's introselect is ten times as fast as torch.kthvalue on a CPU.
    array = flat.numpy()
    array.partition(k - 1)
    return float(array[k - 1])
