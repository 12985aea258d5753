"""SNIP: connection sensitivity (Lee et al., arXiv 1810.02340, equation 5)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lth_plugins.pruning.criteria.criterion import Losses, masked_parameters, need


@dataclass(frozen=True)
class Snip:
    """|w · ∂L/∂w|: how much the loss changes, to first order, when the weight is removed."""

    def __call__(
        self, weights: Mapping[str, Tensor], model: nn.Module | None, loss: Losses | None
    ) -> Mapping[str, Tensor]:
        model, loss = need(self, model, loss)
        parameters = masked_parameters(model, weights)
        gradients = torch.autograd.grad(loss(model), list(parameters.values()))
        return {
            name: (weights[name] * gradient.cpu().float()).abs()
            for name, gradient in zip(parameters, gradients, strict=True)
        }
