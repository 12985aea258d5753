"""AC/DC: alternating compressed and decompressed training (Peste et al., arXiv 2106.12379)."""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from lth_plugins.errors import ConfigError
from lth_plugins.pruning.criteria.magnitude import Magnitude
from lth_plugins.pruning.methods.method import Method, Snapshot, Update
from lth_plugins.pruning.selection import select
from lth_plugins.pruning.structure import NM
from lth_plugins.settings import check_settings, setting
from lth_plugins.ticket.masks import Masks

COMPRESSED = (10, 20, 30, 40, 50, 60, 70, 85)
"""After which percents of the training a compressed phase begins (the paper's section 4)."""
DENSE = (15, 25, 35, 45, 55, 65, 75)
"""After which one a dense phase begins; so does the training."""


@dataclass(frozen=True)
class ACDC(Method):
    """Trains compressed and dense phases in turn, the last of them compressed.

    Dense for 10 % of the training, then compressed and dense for 5 % each until 75 %, dense until
    85 %, and compressed to the end. Each compression prunes in one shot by global magnitude, or to
    N:M. Each decompression lets all weights train, the pruned ones from 0, and resets the momentum
    of all parameters. It starts from a dense ticket.

    Attributes:
        sparsity: of the compressed phases.
        n, m: instead of it, N of M consecutive input channels are kept (`NM`).

    Raises:
        ConfigError: if a value is invalid, or not one of the two is given.
    """

    name: ClassVar[str] = "acdc"

    sparsity: float | None = setting(None, above=0, below=1)
    n: int | None = setting(None, least=1)
    m: int | None = setting(None, least=2)

    def __post_init__(self) -> None:
        check_settings(self)
        pattern = (self.n is not None) + (self.m is not None)
        if (self.sparsity is None) != (pattern == 2) or pattern == 1:
            raise ConfigError(
                "acdc compresses to a sparsity, such as sparsity=0.9, or to N:M, such as n=2 and "
                f"m=4: expected one of the two, found {self.recipe}"
            )
        if self.n is not None and self.m is not None:
            NM(self.n, self.m)  # refuses N above M

    def start(self, now: Snapshot) -> Masks:
        changes = [round(now.steps * part / 100) for part in sorted(COMPRESSED + DENSE)]
        if changes[0] < 1 or any(b <= a for a, b in pairwise(changes)):
            raise ConfigError(
                f"expected a training of 20 iterations or more for the {len(changes) + 1} phases "
                f"of acdc, found one of {now.steps}"
            )
        if now.masks.density < 1:
            raise ConfigError(
                "acdc trains all weights in its dense phases: expected a dense ticket, found one "
                f"that is {now.masks.sparsity:.4f} sparse. Give the dense one of the same weights"
            )
        if self.sparsity is None:
            self._compressed(now)  # refuses widths that M does not divide
        return now.masks

    def is_due(self, step: int, steps: float) -> bool:
        return _begins(step, steps, COMPRESSED) or _begins(step, steps, DENSE)

    def update(self, now: Snapshot) -> Update:
        if _begins(now.step, now.steps, COMPRESSED):
            return Update(self._compressed(now))
        dense = Masks.ones({name: tuple(mask.shape) for name, mask in now.masks.items()})
        return Update(dense, resets_momentum=True)

    def _compressed(self, now: Snapshot) -> Masks:
        if self.n is not None and self.m is not None:
            return NM(self.n, self.m).masks(now.masks, now.weights)
        assert self.sparsity is not None
        return select(Magnitude()(now.weights, None, None), now.masks, self.sparsity, "global")


def _begins(step: int, steps: float, parts: tuple[int, ...]) -> bool:
    return any(step == round(steps * part / 100) for part in parts)
