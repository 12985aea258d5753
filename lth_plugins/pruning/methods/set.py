"""SET: sparse evolutionary training (Mocanu et al., arXiv 1707.04780)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lth_plugins.pruning.methods.dynamic import Dynamic
from lth_plugins.pruning.methods.method import Snapshot
from lth_plugins.resilience.seeds import seed_of


@dataclass(frozen=True)
class SET(Dynamic):
    """Drops by magnitude and grows at random.

    The paper moves a constant fraction after each epoch; here it falls as RigL's, whose authors
    compare the two so.
    """

    name: ClassVar[str] = "set"

    def scores(self, now: Snapshot, name: str) -> Tensor | None:
        seed = seed_of(self.seed, now.step, list(now.masks).index(name))
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(now.masks[name].shape, generator=generator)
