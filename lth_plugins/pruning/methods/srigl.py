"""SRigL: RigL with a constant fan-in, and ablation of neurons (Lasby et al., arXiv 2305.02299)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lth_plugins.pruning.methods.dynamic import check_fan_in, lowest_pruned
from lth_plugins.pruning.methods.method import Snapshot
from lth_plugins.pruning.methods.rigl import RigL
from lth_plugins.resilience.seeds import seed_of
from lth_plugins.settings import setting
from lth_plugins.ticket.masks import Masks


@dataclass(frozen=True)
class SRigL(RigL):
    """RigL whose neurons (output channels) of a layer all have the same number of weights.

    Section 3.1: an update counts each neuron's salient weights, those that stay and those that the
    gradients of pruned weights would grow. A neuron with too few of them is ablated: all that
    writes it is pruned, for good, and its weights go to the others. `lth_plugins.compact` removes
    such channels inside blocks. A sparse ticket is made one of constant fan-in first; its neurons
    without weights stay so.

    Attributes:
        gamma_sal: γ_sal, the part of the fan-in that must be salient; 0 ablates none.
    """

    name: ClassVar[str] = "srigl"

    gamma_sal: float = setting(0.3, least=0, most=1)

    def start(self, now: Snapshot) -> Masks:
        drawn, even = super().start(now), {}
        for index, (name, mask) in enumerate(drawn.items()):
            rows = mask.flatten(1)
            active = rows.any(1)
            if now.masks.density == 1:
                active[:] = True  # which has none, chance decided
            check_fan_in(name, mask, drawn.sparsity)
            generator = torch.Generator().manual_seed(seed_of(self.seed, index))
            others = torch.rand(rows.shape, generator=generator)
            size = now.weights[name].abs().flatten(1)
            even[name] = _even(torch.where(rows, 1 + size, others), rows, active).view_as(mask)
        return Masks.adopt(even)

    def move(self, now: Snapshot, name: str) -> Tensor:
        mask, gradient = now.masks[name], self.scores(now, name)
        rows = mask.flatten(1)
        kept = int(rows.sum())
        count = int(self.fraction(now.step, now.steps) * kept)
        if gradient is None or count == 0:
            return mask
        size, gradient = now.weights[name].abs().flatten(1), gradient.flatten(1)
        active = rows.any(1)
        left = lowest_pruned(size, rows, count)
        grown = ~rows & active[:, None]
        grown = lowest_pruned(gradient, grown, max(int(grown.sum()) - count, 0))
        active = self._not_ablated((left | grown).sum(1), active, rows)
        # The weights of ablated neurons are the first to go.
        left = lowest_pruned(torch.where(active[:, None], size, -1), rows, count)
        scores = torch.where(left, torch.inf, gradient)
        return _even(scores, rows, active).view_as(mask)

    def _not_ablated(self, salient: Tensor, active: Tensor, rows: Tensor) -> Tensor:
        """The neurons that stay: so many at least that they can hold all weights."""
        kept = int(rows.sum())
        least = max(1, int(self.gamma_sal * kept / len(rows))) if self.gamma_sal else 0
        needed = math.ceil(kept / rows.shape[1])
        best = salient.where(active, -1).argsort(descending=True, stable=True)[:needed]
        stays = active & (salient >= least)
        stays[best] = True
        return stays


def _even(scores: Tensor, rows: Tensor, active: Tensor) -> Tensor:
    """The mask that keeps the same number of the best scores in each active neuron.

    Args:
        scores: [neurons, fan-in].
        rows: the mask with as many weights, of the same shape.
        active: boolean, [neurons].
    """
    fan_in = min(round(int(rows.sum()) / max(int(active.sum()), 1)), rows.shape[1])
    best = scores.topk(fan_in, dim=1).indices
    return torch.zeros_like(rows).scatter_(1, best, active[:, None].expand_as(best).clone())
