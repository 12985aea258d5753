"""The cubic schedule, against values computed by hand."""

import pytest

from lth_plugins.errors import ConfigError
from lth_plugins.pruning.search.schedule import CubicSchedule


def test_sparsities_by_hand() -> None:
    schedule = CubicSchedule(target=0.8, begin=100, end=200, period=25)
    # 0.8 - 0.8 · (1, 27/64, 1/8, 1/64, 0)
    expected = [0.0, 0.4625, 0.7, 0.7875, 0.8]
    assert [schedule.sparsity(step, 0.0) for step in range(100, 201, 25)] == pytest.approx(expected)
    # From half: 0.8 - 0.3 / 8
    assert schedule.sparsity(150, 0.5) == pytest.approx(0.7625)


def test_before_the_beginning_it_is_the_initial_sparsity_and_after_the_end_the_target() -> None:
    schedule = CubicSchedule(0.8, 100, 200, 25)
    assert schedule.sparsity(3, 0.2) == pytest.approx(0.2)
    assert schedule.sparsity(200, 0.2) == schedule.sparsity(1000, 0.2) == 0.8


@pytest.mark.parametrize(
    ("end", "due"), [(200, [125, 150, 175, 200]), (190, [125, 150, 175, 190]), (110, [110])]
)
def test_it_prunes_every_period_and_at_the_end(end: int, due: list[int]) -> None:
    schedule = CubicSchedule(0.8, 100, end, 25)
    assert [step for step in range(400) if schedule.is_due(step)] == due


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0.8, 10, 10, 1), "found begin 10 and end 10"),
        ((0.8, 10, 5, 1), "found begin 10 and end 5"),
        ((0.8, -1, 5, 1), "found begin -1"),
        ((0.8, 0, 5, 0), "period of 1 iteration or more, found 0"),
        ((0.0, 0, 5, 1), "target sparsity between 0 and 1, found 0.0"),
        ((1.0, 0, 5, 1), "target sparsity between 0 and 1, found 1.0"),
    ],
)
def test_what_is_no_schedule_is_refused(values: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CubicSchedule(*values)
