"""Verdicts: scipy's and hand-computed figures, and what is not decided."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from lth_plugins.study.judge.verdict import (
    NON_INFERIOR,
    UNIVERSAL,
    WITHIN_STD,
    Answer,
    Key,
    Winner,
    holm,
    judge,
    non_inferiority,
    power,
    universal,
    winners,
)

DENSE = (80.0, 80.2, 79.8)
GOOD = (80.1, 80.0, 80.2)
BAD = (70.0, 70.3, 69.8)


def points(
    rounds: dict[int, Sequence[float]], task: str = "det", source: str = "moco"
) -> dict[Key, Sequence[float]]:
    return {(source, task, k): values for k, values in rounds.items()}


def test_p_is_that_of_a_welch_test_on_shifted_samples() -> None:
    sparse = (79.5, 79.9, 80.4, 79.2)
    (verdict,) = judge(points({0: DENSE, 3: sparse}))
    shifted = np.array(DENSE) - 0.01 * np.mean(DENSE)
    expected = stats.ttest_ind(sparse, shifted, equal_var=False, alternative="greater").pvalue
    assert verdict.p == verdict.p_holm == pytest.approx(expected)
    assert 0 < verdict.p < 1


def test_p_by_hand() -> None:
    # Means 10 and 10, margin 1, variances 1 and 1: t = 1 / sqrt(2 / 3) with 4 degrees of freedom.
    p = non_inferiority((9, 10, 11), (9, 10, 11), 1)
    assert p == pytest.approx(stats.t.sf(math.sqrt(1.5), 4))


def test_holm_by_hand() -> None:
    # Sorted: 0.01 * 4, 0.02 * 3, 0.03 * 2 (not below the one before), 0.5 * 1.
    assert holm([0.03, 0.5, 0.01, 0.02]) == pytest.approx([0.06, 0.5, 0.04, 0.06])
    assert holm([0.9, 0.8]) == pytest.approx([1, 1])
    assert len(holm([])) == 0


def test_holm_corrects_over_the_rounds_of_a_source_and_task_alone() -> None:
    values = points({0: DENSE, 1: GOOD, 2: BAD}) | points({0: DENSE, 1: GOOD}, source="simclr")
    one, two, other = judge(values)
    assert one.p_holm == pytest.approx(2 * one.p)
    assert two.p_holm == pytest.approx(two.p)
    assert other.p_holm == other.p == one.p


def test_power_is_how_often_equals_pass() -> None:
    rng = np.random.default_rng(0)
    sparse, dense = rng.normal(0, 1, (2, 20_000, 5)) * [[[1.0]], [[0.6]]]
    shifted = dense - 1.2
    p = stats.ttest_ind(sparse, shifted, axis=1, equal_var=False, alternative="greater").pvalue
    # Samples of exactly these standard deviations.
    unit = np.array([-2, -1, 0, 1, 2]) / np.std([-2, -1, 0, 1, 2], ddof=1)
    assert power(1.0 * unit, 0.6 * unit, 1.2, 0.05) == pytest.approx((p <= 0.05).mean(), abs=0.02)


def test_power_grows_with_seeds_and_falls_with_the_correction() -> None:
    few = (80.0, 80.8, 79.2)
    assert power(few, few, 0.8, 0.05) < 0.4 < 0.9 < power(few * 5, few * 5, 0.8, 0.05)
    verdict, _ = judge(points({0: few, 1: few, 2: few}))
    assert verdict.power_holm == pytest.approx(power(few, few, 0.8, 0.025))
    assert verdict.power_holm < verdict.power


def test_the_literature_lets_pass_what_the_test_does_not() -> None:
    noisy = (80.0, 84.0, 76.0)
    (verdict,) = judge(points({0: noisy, 1: (77.0, 78.0, 76.5)}))
    assert verdict.matching == {WITHIN_STD: True, NON_INFERIOR: False}


def test_the_test_lets_pass_a_small_loss_that_many_seeds_make_out() -> None:
    rng = np.random.default_rng(0)
    dense = rng.normal(80.0, 0.1, 30)
    (verdict,) = judge(points({0: dense, 1: dense - 0.3}))
    assert verdict.matching == {WITHIN_STD: False, NON_INFERIOR: True}


@pytest.mark.filterwarnings("error")
def test_seeds_without_any_noise_are_compared_exactly() -> None:
    values = points({0: (80.0,) * 3, 1: (79.5,) * 3, 2: (79.0,) * 3, 3: (79.9, 80.0, 80.1)})
    close, far, one_sided = judge(values)
    assert (close.p, close.power, close.matching[NON_INFERIOR]) == (0, 1, True)
    assert (far.p, far.matching[NON_INFERIOR]) == (1, False)
    assert one_sided.p < 0.01
    # numpy's mean of these is another number, so that its variance is not 0.
    (equal,) = judge(points({0: (94.72,) * 3, 1: (94.72,) * 3}))
    assert (equal.p, equal.power, equal.power_holm) == (0, 1, 1)


@pytest.mark.parametrize(
    ("dense", "sparse", "reason"),
    [
        (DENSE, GOOD[:2], "2 sparse seeds: it takes 3 to decide"),
        (DENSE[:1], GOOD, "1 dense seed: it takes 3"),
        ((), GOOD, "0 dense seeds"),
        (DENSE, (*GOOD, math.nan), "1 of 4 sparse seeds have no value"),
        ((math.nan, *DENSE), GOOD, "1 of 4 dense seeds have no value"),
        ((0.0, 0.0, 0.0), GOOD, "dense mean of 0 means nothing"),
    ],
)
def test_what_cannot_be_decided_says_why(
    dense: Sequence[float], sparse: Sequence[float], reason: str
) -> None:
    (verdict,) = judge(points({0: dense, 1: sparse}))
    assert reason in verdict.reason
    assert verdict.matching == {WITHIN_STD: None, NON_INFERIOR: None}
    assert math.isnan(verdict.p) and math.isnan(verdict.power)


def test_what_is_not_decided_does_not_count_in_the_correction() -> None:
    decided, _ = judge(points({0: DENSE, 1: GOOD, 2: GOOD[:2]}))
    assert decided.p_holm == decided.p


def won(rounds: dict[int, Sequence[float]]) -> Winner:
    found = winners(judge(points({0: DENSE, **rounds})))
    return next(w for w in found if w.criterion == NON_INFERIOR and w.task == "det")


def test_the_winning_ticket_is_the_sparsest_before_the_first_that_does_not_match() -> None:
    winner = won({1: GOOD, 3: GOOD, 5: BAD, 7: GOOD})
    assert (winner.round, winner.stopped_by, winner.undecided) == (3, 5, False)


def test_where_all_match_the_sparsest_wins() -> None:
    winner = won({1: GOOD, 3: GOOD})
    assert (winner.round, winner.stopped_by) == (3, None)


def test_no_ticket_wins_where_the_densest_does_not_match() -> None:
    assert won({1: BAD, 2: GOOD}).round is None


def test_an_undecided_round_ends_the_search_and_is_told() -> None:
    winner = won({1: GOOD, 2: GOOD[:2], 3: GOOD})
    assert (winner.round, winner.stopped_by, winner.undecided) == (1, 2, True)


def test_universal_is_matching_on_every_task_of_the_study() -> None:
    values = points({0: DENSE, 1: GOOD, 2: GOOD, 3: BAD, 4: GOOD[:1]}, "det")
    values |= points({0: DENSE, 1: GOOD, 2: BAD, 3: GOOD[:1], 4: GOOD}, "seg")
    values |= points({0: DENSE, 1: GOOD}, "det", source="simclr")  # no segmentation
    verdicts = judge(values)
    expected: dict[tuple[str, int], Answer] = {
        ("moco", 1): True,
        ("moco", 2): False,
        ("moco", 3): False,
        ("moco", 4): None,
        ("simclr", 1): None,
    }
    assert universal(verdicts, NON_INFERIOR) == expected
    on_all = {w.source: w for w in winners(verdicts) if w.task == UNIVERSAL}
    assert (on_all["moco"].round, on_all["moco"].stopped_by) == (1, 2)
    assert on_all["simclr"].round is None and on_all["simclr"].undecided

    # A task that nothing was measured on leaves open what the others do not refuse.
    expected[("moco", 1)] = None
    assert universal(verdicts, NON_INFERIOR, ["cls"]) == expected
    on_all = {w.source: w for w in winners(verdicts, ["cls"]) if w.task == UNIVERSAL}
    assert on_all["moco"].round is None and on_all["moco"].undecided
