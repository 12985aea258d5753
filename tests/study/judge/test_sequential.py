"""Repeated looks: published boundaries, and errors and power by simulation."""

import numpy as np
import pytest
from scipy import stats

from lth_plugins.study.judge.comparison import paired
from lth_plugins.study.judge.sequential import design, levels, sequential_p, spent

LOOKS = (3, 6, 9, 12)
FRACTIONS = tuple(seeds / LOOKS[-1] for seeds in LOOKS)


def test_boundaries_are_those_that_are_published() -> None:
    # Five equal looks, one-sided 0.025: Lan-DeMets' O'Brien-Fleming-like spending, as tabled in
    # software for such trials (gsDesign's sfLDOF, ldbounds).
    z = stats.norm.isf(levels(0.025, (0.2, 0.4, 0.6, 0.8, 1.0)))
    assert z == pytest.approx([4.877, 3.357, 2.680, 2.290, 2.031], abs=2e-3)
    assert levels(0.05, (1.0,)) == pytest.approx([0.05]) and design(0.05, (1.0,)) == (0.05,)
    assert spent(0.05, 1.0) == pytest.approx(0.05) and spent(0.05, 0.25) < 1e-4


def test_later_looks_do_not_change_earlier_levels() -> None:
    assert levels(0.05, (0.3, 1.0))[0] == pytest.approx(levels(0.05, (0.3, 0.5, 0.9, 1.0))[0])


@pytest.mark.parametrize("alpha", [0.05, 0.0125])
def test_a_sequential_p_is_at_the_level_where_a_look_is_at_its_boundary(alpha: float) -> None:
    bounds = design(alpha, FRACTIONS)
    for look, bound in enumerate(bounds):
        for factor, below in ((0.98, True), (1.02, False)):
            p = [0.9] * look + [factor * bound]
            assert (sequential_p(p, FRACTIONS) <= alpha) == below
    assert sequential_p([bounds[0] / 2, 0.9], FRACTIONS) < alpha  # what was found stays found
    assert sequential_p([0.3], (1.0,)) == 0.3


def rejected(true: float, spread: float, margin: float, trials: int = 20_000) -> np.ndarray:
    """By trial, whether the test says matching at any look, and whether it says not matching."""
    gaps = np.random.default_rng(0).normal(true, spread, (trials, LOOKS[-1]))
    bounds = design(0.05, FRACTIONS)
    found = np.zeros((2, trials), bool)
    for seeds, bound in zip(LOOKS, bounds, strict=True):
        for row, way in enumerate(("greater", "less")):
            p = stats.ttest_1samp(gaps[:, :seeds], -margin, axis=1, alternative=way).pvalue
            found[row] |= p <= bound
    return found


NOISE = 0.005  # more than three standard errors of 20,000 trials


def test_looking_four_times_at_the_margin_errs_no_more_often_than_the_level_says() -> None:
    assert (rejected(-0.5, 0.6, 0.5).mean(1) <= 0.05 + NOISE).all()
    # Without spending, it would.
    gaps = np.random.default_rng(0).normal(0, 1, (20_000, LOOKS[-1]))
    looks = [stats.ttest_1samp(gaps[:, :n], 0, axis=1, alternative="greater") for n in LOOKS]
    assert np.any([one.pvalue <= 0.05 for one in looks], axis=0).mean() > 0.1


def test_the_power_at_the_planned_number_is_what_was_planned() -> None:
    last = design(0.05, FRACTIONS)[-1]
    unit = np.array([-1.0, 0.0, 1.0])
    spread = next(  # the largest noise for which twelve seeds are enough
        s
        for s in np.linspace(1, 0.1, 91)
        if paired(dict(enumerate(s * unit)), dict.fromkeys(range(3), 0.0)).needed(0.5, last) <= 12
    )
    says_matching, says_not = rejected(0.0, spread, 0.5).mean(1)
    assert 0.8 - NOISE <= says_matching < 0.9 and says_not < 0.001
    says_matching, says_not = rejected(-1.0, spread, 0.5).mean(1)  # the mirror image
    assert 0.8 - NOISE <= says_not < 0.9 and says_matching < 0.001
