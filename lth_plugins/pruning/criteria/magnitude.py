"""Magnitude, the criterion of the lottery ticket literature (Han et al., arXiv 1506.02626)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lth_plugins.pruning.criteria.criterion import Losses
from lth_plugins.pruning.lazy_tensors import Computed


@dataclass(frozen=True)
class Magnitude:
    """|w|."""

    def __call__(
        self, weights: Mapping[str, Tensor], model: nn.Module | None, loss: Losses | None
    ) -> Mapping[str, Tensor]:
        # NumPy's: each small call of PyTorch would wake all of its threads.
        return Computed(weights, lambda name: torch.from_numpy(np.abs(weights[name].numpy())))
