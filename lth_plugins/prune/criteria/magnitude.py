"""Magnitude, the criterion of the lottery ticket literature (Han et al., arXiv 1506.02626)."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lth_plugins.prune.computed import Computed
from lth_plugins.prune.criteria.criterion import Loss


@dataclass(frozen=True)
class Magnitude:
    """|w|."""

    def __call__(
        self, weights: Mapping[str, Tensor], model: nn.Module | None, loss: Loss | None
    ) -> Mapping[str, Tensor]:
        return Computed(weights, lambda name: weights[name].abs())
