"""How far something is, in words."""

import threading

import pytest

from lth_plugins import progress
from lth_plugins.progress import Pace, Ticker, duration, heard, intent


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (7200, "2.0 h")]
)
def test_a_duration_is_in_the_unit_that_suits_it(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_pace_counts_all_steps_and_estimates_by_those_made_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    pace = Pace(start=10, steps=30)
    assert pace.after(10) == "step 10 of 30"
    now = 20.0
    assert pace.after(20) == "step 20 of 30, about 20 s left"


def test_a_ticker_says_how_far_it_is_only_after_a_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    now, lines = 0.0, []
    monkeypatch.setattr("time.monotonic", lambda: now)
    ticker = Ticker(lines.append, start=0, steps=100)
    for step in range(1, 13):
        now = 3.0 * step
        ticker.after(step)
    assert lines == [
        "step 3 of 100, about 5 min left",
        "step 6 of 100, about 5 min left",
        "step 9 of 100, about 5 min left",
        "step 12 of 100, about 4 min left",
    ]


def test_an_intention_is_one_line() -> None:
    assert intent("fcn on scenes", 1234, 80, 4, "runs/a") == (
        "Trains fcn on scenes: 1,234 images, 80 steps of 4; results go to runs/a"
    )


def test_what_is_silent_is_heard_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    lines: list[str] = []
    twice = threading.Event()

    def say(line: str) -> None:
        lines.append(line)
        if len(lines) == 2:
            twice.set()

    with heard(say, "Preparing data"):
        assert twice.wait(60)
    count = len(lines)
    assert lines[0] == "    Preparing data: 0 s so far" and count >= 2
    assert not [thread for thread in threading.enumerate() if thread.name == "heard"]
    assert len(lines) == count


def test_what_fails_is_not_heard_any_more() -> None:
    with pytest.raises(ValueError, match="broken"), heard(print, "Preparing data"):
        raise ValueError("broken")
    assert not [thread for thread in threading.enumerate() if thread.name == "heard"]
