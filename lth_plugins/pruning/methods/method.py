"""What a method of sparse training is. It chooses masks; `SparseTraining` puts them on a model."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor

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
    """

    step: int
    steps: float
    masks: Masks
    weights: Mapping[str, Tensor]
    trained: frozenset[str]
    gradients: Mapping[str, Tensor]
    initial: float


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
        return asdict(self)  # type: ignore[call-overload]

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
    def update(self, now: Snapshot) -> Masks:
        """The masks from now on. What they keep and the present ones prune starts at 0."""

    def resets_momentum(self, step: int, steps: float) -> bool:
        """Whether the optimizer forgets all of its momentum then, not only of grown weights."""
        return False
