"""SynFlow: synaptic flow, without data (Tanaka et al., arXiv 2006.05467, section 5)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lth_plugins.pruning.criteria.criterion import Losses, need
from lth_plugins.pruning.criteria.snip import Snip


@dataclass(frozen=True)
class SynFlow:
    """|w · ∂R/∂w| with R the sum of the outputs of |network| for an input of ones.

    Give ``loss=lambda model: model(torch.ones(1, 3, 224, 224)).sum()``. Normalisation is evaluated
    with its stored statistics. The paper prunes in 100 small steps, so that no layer is cut off:
    call `prune` repeatedly, each time with the masks of the time before.
    """

    def __call__(
        self, weights: Mapping[str, Tensor], model: nn.Module | None, loss: Losses | None
    ) -> Mapping[str, Tensor]:
        model, loss = need(self, model, loss)
        model.eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.abs_()
        return Snip()(weights, model, loss)
