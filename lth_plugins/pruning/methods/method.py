"""What a method of sparse training is. It chooses masks; `SparseTraining` puts them on a model."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from torch import Tensor, nn

from lth_plugins.settings import setting_of
from lth_plugins.ticket.masks import Masks


@dataclass(frozen=True)
class Snapshot:
    """A network in training, as a method sees it.

    Attributes:
        step: iterations done.
        steps: iterations of the whole training.
        masks: the present ones, of all that is masked.
        weights: by the names of ``masks``: float32, on the CPU.
        trained: the names of those that are not frozen.
        gradients: of the loss in the last iteration, also by pruned weights, for a method that
            needs them; float32, on the CPU, finite. What got no gradient is absent.
        initial: the sparsity that the training began with.
        model: what is trained, for criteria that need it.
    """

    step: int
    steps: float
    masks: Masks
    weights: Mapping[str, Tensor]
    trained: frozenset[str]
    gradients: Mapping[str, Tensor]
    initial: float
    model: nn.Module


@dataclass(frozen=True)
class Update:
    """What a method decides.

    Attributes:
        masks: from now on. What they keep and the present ones prune starts at 0.
        weights: other values of masked weights, by name, on the CPU.
        resets_momentum: whether the optimizer forgets all of its momentum, not only that of weights
            that grow.
    """

    masks: Masks
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    resets_momentum: bool = False


class Method(ABC):
    """Changes masks while a network trains. A subclass is a frozen dataclass of its options.

    Attributes:
        name: in `METHODS`.
        needs_gradients: whether `update` looks at the gradients of pruned weights.
        relative: whether its schedule depends on the length of the training.
    """

    name: ClassVar[str]
    needs_gradients: ClassVar[bool] = False
    relative: ClassVar[bool] = True

    @property
    def recipe(self) -> dict[str, Any]:
        """The options, for a ticket's description."""
        known = fields(self)  # type: ignore[arg-type]
        return {one.name: getattr(self, one.name) for one in known if setting_of(one).recipe}

    @abstractmethod
    def start(self, now: Snapshot) -> Masks:
        """Check that the method fits a training, before its first iteration.

        Returns:
            The masks to begin with.

        Raises:
            ConfigError: if it does not fit its length, or the ticket.
        """

    @abstractmethod
    def is_due(self, step: int, steps: float) -> bool:
        """Whether to `update` after this of so many iterations."""

    @abstractmethod
    def update(self, now: Snapshot) -> Update:
        """What changes after this iteration, which is due."""
