"""Magnitude: a channel is worth what its weights weigh."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lth_plugins.slimming.importance.importance import Weights, by_channel, relative, weights_of
from lth_plugins.slimming.network import Group


@dataclass
class Magnitude(Weights):
    """The norm of all weights that write and read a channel (DepGraph, arXiv 2301.12900, sec. 3.3).

    In each group relative to its mean.

    Attributes:
        power: 1 for the sum of absolute values, 2 for the root of the sum of squares.
    """

    power: int = 2

    @torch.no_grad()
    def scores(self) -> dict[str, Tensor]:
        return {name: relative(self._norm(group)) for name, group in self.network.groups.items()}

    def _norm(self, group: Group) -> Tensor:
        powers = torch.zeros(group.channels, dtype=torch.float64)
        for _, values, dim, member in weights_of(self.model, group):
            powers += by_channel(values.abs().double() ** self.power, dim, member)
        return powers ** (1 / self.power)
