"""Criteria: what a weight is worth. A criterion scores weights; `select` decides which stay.

Each is a small frozen dataclass in `CRITERIA`; a new one is one class and one row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor


class Criterion(Protocol):
    """Scores weights; the lowest are pruned first."""

    def __call__(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Name to score for name to weight: same shapes, float32, on the CPU, not negative."""
        ...


@dataclass(frozen=True)
class Magnitude:
    """|w|, as in the lottery ticket literature (Han et al., arXiv 1506.02626)."""

    def __call__(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: weight.abs() for name, weight in weights.items()}


@dataclass(frozen=True)
class Random:
    """Uniform noise: random pruning, the baseline of every criterion."""

    seed: int = 0

    def __call__(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        return {n: torch.rand(w.shape, generator=generator) for n, w in weights.items()}


CRITERIA: Mapping[str, Criterion] = MappingProxyType({"magnitude": Magnitude(), "random": Random()})
