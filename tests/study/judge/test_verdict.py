"""Verdicts: scipy's and hand-computed figures, and what is not decided."""

import math
import re
from collections.abc import Sequence

import numpy as np
import pytest

from lth_plugins.study.judge.comparison import PAIRED, WELCH, Sample
from lth_plugins.study.judge.verdict import (
    TESTED,
    UNIVERSAL,
    WITHIN_STD,
    Answer,
    Key,
    Look,
    Rule,
    Verdict,
    Winner,
    holm,
    judge,
    look,
    universal,
    winners,
)
from lth_plugins.study.plan.margin import Margin, read_margin

DENSE = (80.0, 80.2, 79.8) * 2
GOOD = (80.1, 80.0, 80.2) * 2
BAD = (70.0, 70.3, 69.8) * 2


def points(
    rounds: dict[int, Sequence[float]], task: str = "det", source: str = "moco"
) -> dict[Key, Sample]:
    return {(source, task, k): dict(enumerate(values)) for k, values in rounds.items()}


def test_the_rule_says_which_test_decides_and_the_other_is_beside_it() -> None:
    values = points({0: DENSE, 3: (79.5, 79.9, 80.4, 79.2)})
    for is_paired, name in ((True, PAIRED), (False, WELCH)):
        (verdict,) = judge(values, Rule(paired=is_paired))
        assert verdict.tests.keys() == {PAIRED, WELCH}
        assert verdict.comparison is verdict.tests[name]
        assert verdict.p == verdict.p_holm == verdict.tests[name].p_matching(0.5)
        assert verdict.p_not == verdict.tests[name].p_not_matching(0.5)
    assert verdict.correlation == pytest.approx(
        np.corrcoef(DENSE[:4], (79.5, 79.9, 80.4, 79.2))[0, 1]
    )


def test_a_margin_is_in_points_or_relative_to_the_dense_mean() -> None:
    values = points({0: DENSE, 1: (79.2, 79.3, 79.1)})
    (half,) = judge(values)
    (percent,) = judge(values, Rule(read_margin("margin", "1%")))
    assert half.margin == 0.5 and percent.margin == pytest.approx(0.8)
    assert half.p > 0.5 > percent.p
    rules = {"det": Rule(read_margin("margin", "2.5")), "other": Rule()}
    assert judge(values, rules)[0].margin == 2.5


def test_holm_by_hand() -> None:
    # Sorted: 0.01 * 4, 0.02 * 3, 0.03 * 2 (not below the one before), 0.5 * 1.
    assert holm([0.03, 0.5, 0.01, 0.02]) == pytest.approx([0.06, 0.5, 0.04, 0.06])
    assert holm([0.9, 0.8]) == pytest.approx([1, 1])
    assert len(holm([])) == 0


def test_holm_corrects_over_the_rounds_of_a_source_and_task_alone() -> None:
    values = points({0: DENSE, 1: GOOD, 2: BAD}) | points({0: DENSE, 1: GOOD}, source="simclr")
    one, two, other = judge(values)
    assert one.p_holm == pytest.approx(2 * one.p)
    assert two.p_not_holm == pytest.approx(2 * two.p_not)
    assert other.p_holm == other.p == one.p


def test_power_is_that_of_the_test_that_decides_alone_and_at_holms_strictest() -> None:
    one, two = judge(points({0: DENSE, 1: GOOD, 2: GOOD}), Rule(paired=True))
    assert one.power == pytest.approx(one.tests[PAIRED].power(0.5, 0.05))
    assert one.power_holm == pytest.approx(one.tests[PAIRED].power(0.5, 0.025))
    assert one.power_holm < one.power
    assert two.power_holm == one.power_holm


def test_the_literature_lets_pass_what_the_test_leaves_open() -> None:
    noisy = (80.0, 84.0, 76.0)
    (verdict,) = judge(points({0: noisy, 1: (77.0, 78.0, 76.5)}))
    assert verdict.matching == {WITHIN_STD: True, TESTED: None}
    assert verdict.word == "open" and re.search(r"power \d+ %$", verdict.reason)


def test_the_test_lets_pass_a_small_loss_that_many_seeds_make_out() -> None:
    rng = np.random.default_rng(0)
    dense = rng.normal(80.0, 0.1, 30)
    (verdict,) = judge(points({0: dense, 1: dense - 0.3}))
    assert verdict.matching == {WITHIN_STD: False, TESTED: True}
    assert verdict.word == "matching" and verdict.reason == ""


@pytest.mark.parametrize(
    ("loss", "word"),
    [
        (0.0, "matching"),
        (0.5, "open"),  # on the margin: nothing can tell, however many seeds
        (1.0, "not matching"),
    ],
)
def test_a_word_says_on_which_side_of_the_margin_it_is(loss: float, word: str) -> None:
    noise = np.tile([-0.2, 0.0, 0.2], 5)
    (verdict,) = judge(points({0: 80 + noise, 1: 80 - loss - noise}))
    assert verdict.power_holm > 0.8 and verdict.word == word
    assert (verdict.reason == "") == (word != "open")
    if word == "open":
        assert "too close to the margin" in verdict.reason


def test_nothing_is_said_without_power_even_if_a_test_rejects() -> None:
    (verdict,) = judge(points({0: (80.0, 80.9, 79.1), 1: (81.6, 82.5, 80.4)}))
    assert verdict.p < 0.05 and max(verdict.power_holm, verdict.power_found) < 0.8
    assert verdict.answer is None and verdict.reason.startswith("a test rejects, but with power")


def test_a_loss_far_beyond_the_margin_is_said_where_the_power_to_see_it_is_there() -> None:
    (verdict,) = judge(points({0: (80.0, 80.9, 79.1), 1: (70.0, 71.2, 69.1)}))
    assert verdict.power_holm < 0.8 < verdict.power_found and verdict.answer is False


def at(looks: Sequence[Look], values: Sequence[float], dense: Sequence[float]) -> Verdict:
    """The verdict of a design of four looks."""
    rule = Rule(paired=True, looks=(3, 6, 9, 12))
    given = points({0: dense, 1: values})
    return judge(given, rule, {("moco", "det", 1): looks})[0]


def test_what_a_look_has_spent_is_spent() -> None:
    dense = 80 + np.tile([0.2, -0.1, -0.1], 2)
    sparse = dense + np.array([0.1, -0.1, 0.05, -0.05, 0.02, -0.02])
    once = judge(points({0: dense, 1: sparse}), Rule(paired=True))[0]
    now = look(once)
    assert now.seeds == 6 and now.p == once.p
    early, late = Look(3, 0.5, 0.5), Look(3, 1e-12, 0.5)
    assert at([early, now], sparse, dense).p > once.p  # one of four looks
    unclear = Look(6, 0.5, 0.5)
    found = at([late, unclear], sparse, dense)
    assert found.p == at([late], sparse, dense).p < 0.001  # what was found stays found
    fifty = Look(6, 0.04, 0.9)
    assert at([early, fifty], sparse, dense).answer is None  # 0.04 of one look would do


def test_a_design_stops_where_more_seeds_are_unlikely_to_decide() -> None:
    rng = np.random.default_rng(0)
    dense = 80 + rng.normal(0, 1, 6)
    gaps = np.tile([0.9, -0.9], 3)
    on_the_margin = at([Look(3, 0.5, 0.5), Look(6, 0.5, 0.5)], dense - 0.5 + gaps, dense)
    assert on_the_margin.futile and "no more are added" in on_the_margin.reason
    hopeful = at([Look(3, 0.5, 0.5), Look(6, 0.2, 0.9)], dense + gaps, dense)
    assert hopeful.answer is None and not hopeful.futile


@pytest.mark.parametrize(
    ("dense", "sparse", "reason"),
    [
        (DENSE, GOOD[:2], "2 sparse seeds: it takes 3 to decide"),
        (DENSE[:1], GOOD, "1 dense seed: it takes 3"),
        ((), GOOD, "0 dense seeds"),
        (DENSE, (*GOOD, math.nan), "1 of 7 sparse seeds have no value"),
        ((math.nan, *DENSE), GOOD, "1 of 7 dense seeds have no value"),
    ],
)
def test_what_cannot_be_decided_says_why(
    dense: Sequence[float], sparse: Sequence[float], reason: str
) -> None:
    (verdict,) = judge(points({0: dense, 1: sparse}))
    assert reason in verdict.reason
    assert verdict.matching == {WITHIN_STD: None, TESTED: None}
    assert math.isnan(verdict.p) and math.isnan(verdict.power)


def test_a_relative_margin_needs_a_positive_dense_mean_and_pairs_need_seeds_in_common() -> None:
    zero = points({0: (0.0, 0.1, -0.1), 1: GOOD})
    (verdict,) = judge(zero, Rule(Margin(0.01, relative=True)))
    assert "dense mean of 0 means nothing" in verdict.reason
    assert judge(zero)[0].reason == ""
    apart = {
        ("moco", "det", 0): dict(enumerate(DENSE)),
        ("moco", "det", 1): dict.fromkeys((5, 6, 7), 80.0),
    }
    assert "1 seeds that dense and sparse have both" in judge(apart, Rule(paired=True))[0].reason
    assert judge(apart, Rule(paired=False))[0].p < 1


def test_what_is_not_decided_does_not_count_in_the_correction() -> None:
    decided, _ = judge(points({0: DENSE, 1: GOOD, 2: GOOD[:2]}))
    assert decided.p_holm == decided.p


def won(rounds: dict[int, Sequence[float]]) -> Winner:
    found = winners(judge(points({0: DENSE, **rounds})))
    return next(w for w in found if w.criterion == TESTED and w.task == "det")


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
    assert universal(verdicts, TESTED) == expected
    on_all = {w.source: w for w in winners(verdicts) if w.task == UNIVERSAL}
    assert (on_all["moco"].round, on_all["moco"].stopped_by) == (1, 2)
    assert on_all["simclr"].round is None and on_all["simclr"].undecided

    # A task that nothing was measured on leaves open what the others do not refuse.
    expected[("moco", 1)] = None
    assert universal(verdicts, TESTED, ["cls"]) == expected
    on_all = {w.source: w for w in winners(verdicts, ["cls"]) if w.task == UNIVERSAL}
    assert on_all["moco"].round is None and on_all["moco"].undecided
