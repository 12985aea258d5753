"""Random numbers that depend on the step of a training, not on what happened before it.

A run that is preempted and resumed draws the same numbers: those of an image come from a seed of
its place in the data's order, and those of a step from a seed of its number.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset


def seed_of(*parts: int) -> int:
    """One well-mixed seed, 63 bits, from several small numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def reseed(seed: int) -> None:
    """Seed PyTorch (on all devices), NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed PyTorch (on the CPU), NumPy and Python for a while; then restore their states."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


@contextmanager
def aside(stream: int) -> Iterator[None]:
    """Draw from PyTorch's generators, on all devices, without moving them.

    What is drawn depends on the seed in force and the stream, and what is drawn afterwards does not
    depend on it.

    Args:
        stream: a number for each use.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(torch.initial_seed(), stream))
        yield


class Seeded(Dataset[Any]):
    """A dataset whose random numbers come from a seed that is part of each image's index.

    Args:
        dataset: indexed by a number; the result is indexed by that number and a seed.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        index, seed = key
        with seeded(seed):
            return self.dataset[index]
