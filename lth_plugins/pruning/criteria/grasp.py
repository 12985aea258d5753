"""GraSP: preserving the gradient flow (Wang et al., arXiv 2002.07376, equation 8)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lth_plugins.pruning.criteria.criterion import Losses, masked_parameters, need


@dataclass(frozen=True)
class GraSP:
    """w · Hg, with g the gradient and H the Hessian of the loss.

    The paper removes the weights with the highest -w · Hg, those whose removal reduces the gradient
    norm least; here the lowest scores go first, hence the sign.
    """

    def __call__(
        self, weights: Mapping[str, Tensor], model: nn.Module | None, loss: Losses | None
    ) -> Mapping[str, Tensor]:
        model, loss = need(self, model, loss)
        parameters = masked_parameters(model, weights)
        gradients = torch.autograd.grad(loss(model), list(parameters.values()), create_graph=True)
        # The gradient of g·stop(g) is Hg.
        flow = torch.stack([(g * g.detach()).sum() for g in gradients]).sum()
        products = torch.autograd.grad(flow, list(parameters.values()))
        return {
            name: weights[name] * product.cpu().float()
            for name, product in zip(parameters, products, strict=True)
        }
