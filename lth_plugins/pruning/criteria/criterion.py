"""What a criterion is. A criterion scores weights; `select` decides how many of them stay."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from lth_plugins.errors import ConfigError
from lth_plugins.ticket.locating import locate
from lth_plugins.ticket.masks import Masks

Loss = Callable[[nn.Module], Tensor]
"""``loss(model)``: a scalar, such as ``lambda m: cross_entropy(m(images), labels)``."""

Losses = Loss | Sequence[Loss]
"""One loss, or for criteria that need many gradients those of several batches of images."""


class Criterion(Protocol):
    """Scores weights; the lowest scores are pruned first."""

    def __call__(
        self, weights: Mapping[str, Tensor], model: nn.Module | None, loss: Losses | None
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


@runtime_checkable
class Surgeon(Criterion, Protocol):
    """A criterion that also says what becomes of the weights that stay."""

    def update(
        self,
        weights: Mapping[str, Tensor],
        masks: Masks,
        model: nn.Module | None,
        loss: Losses | None,
    ) -> Mapping[str, Tensor]:
        """Move the surviving weights, to make up for those that are pruned.

        Args:
            weights, model, loss: what they were scored by; in ``weights`` what is newly pruned is
                not zero yet.
            masks: what stays.

        Returns:
            All weights, zero where they are pruned: float32, on the CPU.
        """
        ...


def masked_parameters(model: nn.Module, names: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """The model's parameters behind these torchvision names; outside the trunk, its own names."""
    keys = locate(model).keys
    return {name: model.get_parameter(keys.get(name, name)) for name in names}


def need(criterion: object, model: nn.Module | None, loss: Losses | None) -> tuple[nn.Module, Loss]:
    """Both, or a `ConfigError` that says what to give."""
    model, losses = need_losses(criterion, model, loss)
    if not callable(loss):
        raise ConfigError(
            f"{type(criterion).__name__} takes one loss, found a list of {len(losses)}: give a "
            "function of the model"
        )
    return model, loss


def need_losses(
    criterion: object, model: nn.Module | None, loss: Losses | None
) -> tuple[nn.Module, Sequence[Loss]]:
    """The model and all losses, or a `ConfigError` that says what to give."""
    if model is None or loss is None:
        raise ConfigError(
            f"{type(criterion).__name__} ranks weights by gradients: give prune the model, not its "
            "state dict, and loss=lambda model: cross_entropy(model(images), labels) or the like"
        )
    return model, [loss] if callable(loss) else loss
