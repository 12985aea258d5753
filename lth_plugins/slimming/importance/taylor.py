"""Taylor: a channel is worth what the loss changes without it, to first order."""

import torch
from torch import Tensor

from lth_plugins.slimming.importance.importance import Sums, by_channel, relative, weights_of


class Taylor(Sums):
    """(Σ w · ∂L/∂w)² over the weights that write a channel, added up over steps.

    Molchanov et al., arXiv 1906.10771, equation 8. In each group relative to its mean.
    """

    @torch.no_grad()
    def after_backward(self) -> None:
        for name, group in self.network.groups.items():
            change = torch.zeros(group.channels, dtype=torch.float64)
            for _, values, dim, member in weights_of(self.model, group):
                if member.side == "out" and values.grad is not None:
                    change += by_channel(values * values.grad, dim, member)
            self.sums[name] += change.square()

    def scale(self, name: str, sums: Tensor) -> Tensor:
        return relative(sums)
