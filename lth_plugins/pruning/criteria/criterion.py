"""What a criterion is. A criterion scores weights; `select` decides how many of them stay."""

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor, nn

from lth_plugins.errors import ConfigError
from lth_plugins.ticket.locating import locate

Loss = Callable[[nn.Module], Tensor]
"""``loss(model)``: a scalar, such as ``lambda m: cross_entropy(m(images), labels)``."""


class Criterion(Protocol):
    """Scores weights; the lowest scores are pruned first."""

    def __call__(
        self, weights: Mapping[str, Tensor], model: nn.Module | None, loss: Loss | None
    ) -> Mapping[str, Tensor]:
        """Score the prunable weights.

        Args:
            weights: by torchvision name (outside the trunk by the model's): float32, on the CPU.
            model: a copy of the sub-network, which the criterion may change; given with ``loss``.
            loss: what the model is trained for.

        Returns:
            A score for each weight: same names and shapes, float32, on the CPU. `select` looks
            each up twice: one that is cheap to compute may be `Computed`.

        Raises:
            ConfigError: if the criterion needs a model or a loss and has none.
        """
        ...


def masked_parameters(model: nn.Module, names: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """The model's parameters behind these torchvision names; outside the trunk, its own names."""
    keys = locate(model).keys
    return {name: model.get_parameter(keys.get(name, name)) for name in names}


def need(criterion: object, model: nn.Module | None, loss: Loss | None) -> tuple[nn.Module, Loss]:
    """Both, or a `ConfigError` that says what to give."""
    if model is None or loss is None:
        raise ConfigError(
            f"{type(criterion).__name__} ranks weights by gradients: give prune the model, not its "
            "state dict, and loss=lambda model: cross_entropy(model(images), labels) or the like"
        )
    return model, loss
