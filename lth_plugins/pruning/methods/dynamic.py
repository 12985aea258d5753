"""Dynamic sparse training: a fixed number of weights, which move. What RigL, SET, SRigL share."""

import math
from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from lth_plugins.errors import ConfigError
from lth_plugins.pruning.criteria.random import Random
from lth_plugins.pruning.methods.method import Method, Snapshot, Update
from lth_plugins.pruning.selection import prune_lowest, select
from lth_plugins.settings import check_settings, setting
from lth_plugins.ticket.masks import Masks


@dataclass(frozen=True)
class Dynamic(Method):
    """Every ``delta_t`` iterations each layer drops its smallest weights and grows as many others.

    It trains at constant density: of a dense ticket, under random masks of Erdős-Rényi-kernel
    densities (Evci et al., arXiv 1911.11134, section 3); of a sparse one, from its own masks, whose
    densities stay. Layers that are frozen keep their masks.

    Attributes:
        sparsity: of the random masks that a dense ticket starts with; a sparse ticket takes none.
        delta_t: ΔT, iterations between two updates.
        alpha: α, the fraction of a layer's weights that the first update moves.
        t_end: T_end, the part of the training after which masks stay. The fraction falls to 0 there
            by a cosine: α/2 (1 + cos(π t / T_end)).
        seed: of what is drawn at random.

    Raises:
        ConfigError: if a value is invalid.
    """

    sparsity: float | None = setting(None, above=0, below=1)
    delta_t: int = setting(100, least=1)
    alpha: float = setting(0.3, above=0, most=1)
    t_end: float = setting(0.75, above=0, most=1)
    seed: int = setting(0, least=0)

    def __post_init__(self) -> None:
        check_settings(self)

    def start(self, now: Snapshot) -> Masks:
        if self.delta_t >= self.t_end * now.steps:
            raise ConfigError(
                f"expected delta_t below {self.t_end:g} (t_end) of the training's {now.steps} "
                f"iterations, found {self.delta_t}: no mask would move. Train longer, or update "
                "more often"
            )
        if now.masks.density < 1:
            if self.sparsity is not None:
                raise ConfigError(
                    f"expected no sparsity with a ticket that is {now.masks.sparsity:.4f} sparse "
                    f"itself, found {self.sparsity}: leave it out, or start from a dense ticket"
                )
            return now.masks
        if self.sparsity is None:
            raise ConfigError(
                f"{self.name} trains a sparse network: expected a sparsity with a dense ticket, "
                "found none. Give sparsity=0.9 or the like, or a sparse ticket"
            )
        masks = select(Random(self.seed)(now.weights, None, None), now.masks, self.sparsity, "erk")
        for name, mask in masks.items():
            check_fan_in(name, mask, self.sparsity)
        return masks

    def is_due(self, step: int, steps: float) -> bool:
        return step % self.delta_t == 0 and step < self.t_end * steps

    def fraction(self, step: int, steps: float) -> float:
        """The fraction of each layer's weights that an update after ``step`` iterations moves."""
        part = min(step / (self.t_end * steps), 1.0)
        return self.alpha / 2 * (1 + math.cos(math.pi * part))

    def update(self, now: Snapshot) -> Update:
        moved = {
            name: self.move(now, name) if name in now.trained else now.masks[name]
            for name in now.masks
        }
        return Update(Masks.adopt(moved))

    def move(self, now: Snapshot, name: str) -> Tensor:
        """The new mask of one layer: the smallest weights dropped, those of the best score grown.

        What was just dropped may grow again, with the value that it has.
        """
        mask = now.masks[name]
        scores = self.scores(now, name)
        count = int(self.fraction(now.step, now.steps) * _kept(mask))
        if scores is None or count == 0:
            return mask
        left = lowest_pruned(now.weights[name].abs(), mask, count)
        return left | lowest_pruned(scores, ~left, _kept(~left) - count)

    @abstractmethod
    def scores(self, now: Snapshot, name: str) -> Tensor | None:
        """What the pruned weights of a layer are grown by, the highest first; None grows none."""


def lowest_pruned(scores: Tensor, mask: Tensor, count: int) -> Tensor:
    """The mask of one layer without the ``count`` lowest scores of what it keeps."""
    return prune_lowest({"": scores}, {"": mask}, count)[""]


def check_fan_in(name: str, mask: Tensor, sparsity: float) -> None:
    """Raise ``ConfigError`` if a layer's outputs have less than one weight each."""
    if _kept(mask) < len(mask):
        raise ConfigError(
            f"sparsity {sparsity:g} leaves {_kept(mask)} weights of {name} for its {len(mask)} "
            "outputs: expected a fan-in of 1 or more. Give a lower sparsity"
        )


def _kept(mask: Tensor) -> int:
    return int(np.count_nonzero(mask.numpy()))
