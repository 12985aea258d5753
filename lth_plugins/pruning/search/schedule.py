"""Schedules: how sparse a network is to be, after how many iterations of one training. Pure."""

from dataclasses import dataclass

from lth_plugins.errors import ConfigError


@dataclass(frozen=True)
class CubicSchedule:
    """Prune fast while much is redundant, and ever slower (Zhu & Gupta, arXiv 1710.01878, eq. 1).

    s_t = s_f + (s_i - s_f) (1 - (t - begin) / (end - begin))³, from the sparsity s_i at ``begin``
    to s_f, the target, at ``end``.

    Attributes:
        target: the sparsity at the end, in (0, 1).
        begin: the iteration to begin after; nothing is pruned there yet, as s_t is still s_i.
        end: the iteration after which the target is reached.
        period: how many iterations lie between two prunings; the last one is at ``end`` anyway.

    Raises:
        ConfigError: if a value is invalid, or the end is not after the begin.
    """

    target: float
    begin: int
    end: int
    period: int

    def __post_init__(self) -> None:
        if not 0 < self.target < 1:
            raise ConfigError(f"expected a target sparsity between 0 and 1, found {self.target}")
        if not 0 <= self.begin < self.end:
            raise ConfigError(
                f"expected pruning to begin at 0 or later and to end after that, found begin "
                f"{self.begin} and end {self.end}"
            )
        if self.period < 1:
            raise ConfigError(f"expected a period of 1 iteration or more, found {self.period}")

    def sparsity(self, step: int, initial: float) -> float:
        """The sparsity after ``step`` iterations, from ``initial`` at ``begin``."""
        left = (self.end - step) / (self.end - self.begin)
        return self.target + (initial - self.target) * min(max(left, 0.0), 1.0) ** 3

    def is_due(self, step: int) -> bool:
        """Whether to prune after ``step`` iterations."""
        return self.begin < step <= self.end and (
            step == self.end or (step - self.begin) % self.period == 0
        )
