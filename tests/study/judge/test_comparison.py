"""Comparisons of seeds: scipy's tests, power by simulation, and the seeds that a power takes."""

import math

import numpy as np
import pytest
from scipy import stats

from lth_plugins.study.judge.comparison import Comparison, Sample, correlation, paired, welch

DENSE = (80.0, 80.4, 79.7, 80.9)
SPARSE = (79.5, 79.9, 79.2, 80.6)


def sample(values: object) -> Sample:
    return dict(enumerate(map(float, values)))  # type: ignore[call-overload]


@pytest.mark.parametrize("margin", [0.3, 0.8])
def test_p_values_are_those_of_scipys_tests_on_shifted_samples(margin: float) -> None:
    shifted = np.array(DENSE) - margin
    for compare, test in (
        (paired, stats.ttest_rel),
        (welch, lambda *given, **options: stats.ttest_ind(*given, equal_var=False, **options)),
    ):
        found = compare(sample(SPARSE), sample(DENSE))
        for p, way in ((found.p_matching, "greater"), (found.p_not_matching, "less")):
            expected = test(SPARSE, shifted, alternative=way).pvalue
            assert p(margin) == pytest.approx(expected)
        # The interval of 90 % and the two tests at 5 % agree.
        low, high = found.interval(0.05)
        assert (low > -margin) == (found.p_matching(margin) < 0.05)
        assert (high < -margin) == (found.p_not_matching(margin) < 0.05)


def test_pairs_are_the_seeds_in_common_whatever_their_order() -> None:
    few = {3: 80.6, 1: 79.9, 2: 79.2}
    found = paired(few, sample(DENSE))
    assert found == paired(dict(sorted(few.items())), {k: DENSE[k] for k in (1, 2, 3)})
    assert found.seeds == 3 and found.freedom == 2
    expected = np.corrcoef([79.9, 79.2, 80.6], DENSE[1:])[0, 1]
    assert correlation(few, sample(DENSE)) == pytest.approx(expected)
    assert math.isnan(correlation(sample((1, 1, 1)), sample(DENSE)))


def test_pairing_sees_through_noise_that_is_shared_and_welch_does_not() -> None:
    rng = np.random.default_rng(0)
    shared, own = rng.normal(0, 1, 6), rng.normal(0, 0.05, (2, 6))
    sparse, dense = sample(shared + own[0]), sample(shared + own[1])
    assert correlation(sparse, dense) > 0.95
    assert paired(sparse, dense).p_matching(0.2) < 0.01 < 0.1 < welch(sparse, dense).p_matching(0.2)


# Samples whose spread is exactly this, so that power is a number that a simulation can check.
UNIT = np.array([-2, -1, 0, 1, 2]) / np.std([-2, -1, 0, 1, 2], ddof=1)


def test_power_is_how_often_the_test_rejects() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, (2, 20_000, 5)) * [[[1.0]], [[0.6]]]
    p = stats.ttest_ind(*noise - [[[0]], [[1.2]]], axis=1, equal_var=False, alternative="greater")
    found = welch(sample(UNIT), sample(0.6 * UNIT))
    assert found.power(1.2, 0.05) == pytest.approx((p.pvalue <= 0.05).mean(), abs=0.02)
    gaps = rng.normal(0, 1, (20_000, 5))
    p = stats.ttest_1samp(gaps, -1.2, axis=1, alternative="greater")
    found = paired(sample(UNIT), sample(np.zeros(5)))
    assert found.power(1.2, 0.05) == pytest.approx((p.pvalue <= 0.05).mean(), abs=0.02)


@pytest.mark.parametrize("compare", [paired, welch])
def test_the_seeds_needed_are_the_fewest_with_the_power(compare: object) -> None:
    found: Comparison = compare(sample(UNIT), sample(0.6 * UNIT[::-1]))  # type: ignore[operator]
    needed = found.needed(0.7, 0.05)
    assert found.at(needed).power(0.7, 0.05) >= 0.8 > found.at(needed - 1).power(0.7, 0.05)
    assert found.needed(70.0, 0.05) == 3 and found.needed(1e-6, 0.05) == math.inf
    assert found.at(5).power(0.7, 0.05) == pytest.approx(found.power(0.7, 0.05))


def test_the_spread_of_few_seeds_is_uncertain_by_chi_squared() -> None:
    found = paired(sample(UNIT[:3]), sample(np.zeros(3)))
    low, high = found.uncertainty(0.9)
    # sqrt(2 / 5.991) and sqrt(2 / 0.1026), of 2 degrees of freedom.
    assert low.spread / found.spread == pytest.approx(0.5778, abs=1e-3)
    assert high.spread / found.spread == pytest.approx(4.415, abs=1e-2)
    assert low.needed(0.7, 0.05) < found.needed(0.7, 0.05) < high.needed(0.7, 0.05)


def test_the_chance_to_decide_is_that_of_the_seeds_still_to_come() -> None:
    rng = np.random.default_rng(0)
    first = paired(sample(UNIT - 0.4), sample(np.zeros(5)))
    more = rng.normal(first.difference, first.spread, (20_000, 15))
    means = (5 * first.difference + 15 * more.mean(1)) / 20
    reach = stats.t.isf(0.05, 19) * first.spread / math.sqrt(20)
    rejects = (means + 0.5 > reach) | (-means - 0.5 > reach)
    assert first.chance(0.5, 0.05, 20) == pytest.approx(rejects.mean(), abs=0.01)


@pytest.mark.filterwarnings("error")
def test_seeds_without_any_noise_are_compared_exactly() -> None:
    # numpy's mean of the first is another number, so that its variance is not 0.
    for value in (94.72, 80.0):
        for compare in (paired, welch):
            found = compare(sample((value,) * 3), sample((value,) * 3))
            assert (found.p_matching(0.5), found.p_not_matching(0.5)) == (0, 1)
            assert found.power(0.5, 0.05) == 1 and found.needed(0.5, 0.05) == 3
            assert found.uncertainty() == (found, found) and found.interval(0.05) == (0, 0)
            lost = compare(sample((value - 1,) * 3), sample((value,) * 3))
            assert (lost.p_matching(0.5), lost.p_not_matching(0.5)) == (1, 0)
