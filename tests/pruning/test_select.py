"""Selection keeps exactly what a stable sort of all scores would, however the scores lie."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from lth_plugins import Masks
from lth_plugins.pruning.selection import SAMPLED, select

FLOATS = [-np.inf, -1.0, -0.0, 0.0, 1e-38, 0.5, 1.0, np.inf]


@given(data=st.data(), fraction=st.floats(0, 1), seed=st.integers(0, 2**32 - 1))
def test_the_lowest_are_pruned_in_the_order_of_a_stable_sort(data, fraction, seed) -> None:
    rng = np.random.default_rng(seed)
    sizes = data.draw(st.lists(st.integers(1, 4 * SAMPLED), min_size=1, max_size=4))
    levels = data.draw(st.sampled_from([1, 2, len(FLOATS), 50, None]), label="different scores")
    density = data.draw(st.sampled_from([0.05, 0.5, 1.0]), label="kept so far")
    scores = [_scores(rng, size, levels) for size in sizes]
    masks = [rng.random(size) < density for size in sizes]

    assert_as_sorted(scores, masks, fraction)


@pytest.mark.parametrize("fraction", [0.001, 0.2, 0.5, 0.999])
def test_a_sample_that_shows_nothing_of_the_rest_changes_nothing(fraction: float) -> None:
    scores = np.arange(100 * SAMPLED, dtype=np.float32)
    scores[::SAMPLED] = 1e6  # all that the sample sees

    assert_as_sorted([scores], [np.ones(scores.shape, bool)], fraction)


def assert_as_sorted(
    scores: list[NDArray[np.float32]], masks: list[NDArray[np.bool_]], fraction: float
) -> None:
    before = Masks({str(i): torch.from_numpy(mask) for i, mask in enumerate(masks)})
    after = select(
        {str(i): torch.from_numpy(worth) for i, worth in enumerate(scores)},
        before,
        fraction,
        "global",
    )
    kept = np.flatnonzero(np.concatenate(masks))
    order = np.argsort(np.concatenate(scores)[kept], kind="stable")
    expected = np.concatenate(masks)
    expected[kept[order[: round(fraction * len(kept))]]] = False
    assert np.array_equal(np.concatenate([after[n].numpy() for n in after]), expected)
    assert before == Masks({str(i): torch.from_numpy(mask) for i, mask in enumerate(masks)})


def _scores(rng: np.random.Generator, size: int, levels: int | None) -> NDArray[np.float32]:
    if levels is None:
        return rng.standard_normal(size, dtype=np.float32)
    if levels == len(FLOATS):
        return rng.choice(np.array(FLOATS, np.float32), size)
    return rng.integers(0, levels, size).astype(np.float32)
