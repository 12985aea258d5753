"""Second-order criteria: what pruning a weight costs, by the empirical Fisher information."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lth_plugins.errors import ConfigError
from lth_plugins.pruning.criteria.criterion import Losses, need_losses
from lth_plugins.pruning.criteria.fisher import blocked, fisher_blocks
from lth_plugins.pruning.criteria.surgery import (
    compensated,
    damped,
    elimination,
    inverse,
    saliency,
)
from lth_plugins.ticket.masks import Masks

TILE = 1 << 19
"""Entries of F that are worked on at a time: more do not fit into a processor's cache."""


@dataclass(frozen=True)
class WoodFisher:
    """w² / 2[F⁻¹]ᵢᵢ: what pruning the weight alone costs (arXiv 2004.14340, equation 6).

    F is the empirical Fisher information, in blocks on its diagonal. Give ``loss`` the mean loss of
    a batch, or a list of those of several batches: every image gives a gradient, of which some 256
    to 4,096 are needed. `lth_plugins.prune_and_update` also moves the weights that stay.

    Attributes:
        block: weights that are seen as correlated: so many consecutive ones.
        damping: λ, added to the diagonal of F; the larger, the more like magnitude.

    Raises:
        ConfigError: if a value is invalid.
    """

    block: int = 64
    damping: float = 1e-7

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ConfigError(f"expected a block of 1 weight or more, found {self.block}")
        if not 0 < self.damping < float("inf"):
            raise ConfigError(f"expected a damping of more than 0, found {self.damping}")

    def __call__(
        self, weights: Mapping[str, Tensor], model: nn.Module | None, loss: Losses | None
    ) -> Mapping[str, Tensor]:
        kept = {name: weight != 0 for name, weight in weights.items()}
        return dict(self._computed(self._costs, weights, kept, model, loss))

    def update(
        self,
        weights: Mapping[str, Tensor],
        masks: Masks,
        model: nn.Module | None,
        loss: Losses | None,
    ) -> Mapping[str, Tensor]:
        return dict(self._computed(compensated, weights, masks, model, loss))

    def _costs(self, weights: Tensor, fisher: Tensor, kept: Tensor) -> Tensor:
        return saliency(weights, inverse(fisher))

    def _computed(
        self,
        compute: Callable[[Tensor, Tensor, Tensor], Tensor],
        weights: Mapping[str, Tensor],
        kept: Mapping[str, Tensor],
        model: nn.Module | None,
        loss: Losses | None,
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield what is computed of the weights, F and masks of all blocks, by parameter."""
        model, losses = need_losses(self, model, loss)
        for name, fisher in fisher_blocks(model, weights, losses, self.block):
            values, masks = (
                blocked(of[name].flatten(), fisher.shape[-1]).split(self._tile(fisher))
                for of in (weights, kept)
            )
            parts = []
            for value, mask, part in zip(
                values, masks, fisher.split(self._tile(fisher)), strict=True
            ):
                value = value.double()
                information = damped(part.cpu().double(), value, self.damping)
                parts.append(compute(value, information, mask).float())
            shape = weights[name].shape
            yield name, torch.cat(parts).flatten()[: shape.numel()].view(shape)

    @staticmethod
    def _tile(fisher: Tensor) -> int:
        return max(1, TILE // fisher[0].numel())


@dataclass(frozen=True)
class CAP(WoodFisher):
    """The same, once all cheaper weights of the block are pruned (arXiv 2210.09223, section 3).

    Of two weights that stand in for each other, each alone costs little: WoodFisher prunes both,
    and CAP one.
    """

    def _costs(self, weights: Tensor, fisher: Tensor, kept: Tensor) -> Tensor:
        return elimination(weights, inverse(fisher))
