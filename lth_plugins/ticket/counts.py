"""How many weights masks keep, of how many."""

from collections.abc import Mapping
from dataclasses import dataclass


class Counted:
    """What has counts: sparsity and density as the paper counts them."""

    kept: int
    numel: int

    @property
    def density(self) -> float:
        """Fraction of the prunable weights that is kept; 1 where there is nothing to prune."""
        return self.kept / self.numel if self.numel else 1.0

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable weights that is pruned."""
        return 1.0 - self.density


@dataclass(frozen=True)
class Counts(Counted):
    """The counts of masks.

    Attributes:
        by_name: of each parameter, how many weights are kept and how many there are.
    """

    by_name: Mapping[str, tuple[int, int]]

    @property
    def kept(self) -> int:  # type: ignore[override]
        return sum(kept for kept, _ in self.by_name.values())

    @property
    def numel(self) -> int:  # type: ignore[override]
        return sum(numel for _, numel in self.by_name.values())
