"""RigL: rigging the lottery (Evci et al., arXiv 1911.11134)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lth_plugins.pruning.methods.dynamic import Dynamic
from lth_plugins.pruning.methods.method import Snapshot


@dataclass(frozen=True)
class RigL(Dynamic):
    """Drops by magnitude and grows where the dense gradient is largest (algorithm 1).

    The paper makes an update instead of an optimizer's step; here it follows that step, as in its
    authors' code.
    """

    name: ClassVar[str] = "rigl"
    needs_gradients: ClassVar[bool] = True

    def scores(self, now: Snapshot, name: str) -> Tensor | None:
        gradient = now.gradients.get(name)
        return None if gradient is None else gradient.abs()
