"""Random pruning, the baseline of every criterion."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lth_plugins.pruning.criteria.criterion import Losses


@dataclass(frozen=True)
class Random:
    """Uniform noise; the same seed gives the same scores."""

    seed: int = 0

    def __call__(
        self, weights: Mapping[str, Tensor], model: nn.Module | None, loss: Losses | None
    ) -> Mapping[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        return {n: torch.rand(w.shape, generator=generator) for n, w in weights.items()}
