"""Verdicts in a terminal: the words, and how many seeds each takes."""

import math
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lth_plugins.study.judge.verdict import Verdict

SEEDS_WIDTH = 150
"""Columns that the table of `seeds` takes; in a narrower terminal its lines break."""


def words(verdicts: Sequence[Verdict]) -> RenderableType:
    """A line for each source and task: which rounds are matching, not matching and open."""
    lines: dict[tuple[str, str], list[str]] = {}
    for v in verdicts:
        why = f" ({v.reason})" if v.reason else ""
        lines.setdefault((v.source, v.task), []).append(f"round {v.round} {v.word}{why}")
    return Group(*(Text(f"{s}, {t}: {'; '.join(found)}") for (s, t), found in lines.items()))


def seeds(verdicts: Sequence[Verdict]) -> RenderableType:
    """The seeds that each verdict takes for its power, from the variance so far.

    At Holm's strictest level: the number of rounds of a source and task that are tested.
    """
    table = Table(
        *(
            "source",
            "task",
            "round",
            "verdict",
            "test",
            "seeds",
            "margin",
            "spread (90 %)",
            "corr.",
        ),
        *("power", "seeds needed (90 %)"),
        box=None,
        pad_edge=False,
    )
    tested = [v for v in verdicts if v.comparison is not None]
    for v in tested:
        test = v.comparison
        assert test is not None
        rounds = sum((o.source, o.task) == (v.source, v.task) for o in tested)
        alpha = v.rule.alpha / rounds
        ends = test.uncertainty(0.9)
        low, high = (_count(end.needed(v.margin, alpha, v.rule.power)) for end in ends)
        needed = _count(test.needed(v.margin, alpha, v.rule.power))
        spreads = " to ".join(f"{end.spread:.2f}" for end in ends)
        table.add_row(
            *(v.source, v.task, f"{v.round}", v.word, test.test, f"{test.seeds}"),
            f"{v.margin:.2f} ({v.rule.margin})",
            f"{test.spread:.2f} ({spreads})",
            "–" if math.isnan(v.correlation) else f"{v.correlation:.2f}",
            *(f"{100 * v.power_holm:.0f} %", f"{needed} ({low} to {high})"),
        )
    missing = [
        f"{v.source}, {v.task}, round {v.round}: {v.reason}" for v in verdicts if v not in tested
    ]
    notes = [
        "Seeds needed: of the ticket and of the dense network each, to say matching with power "
        "0.8 if there is no difference, or not matching if the loss is twice the margin.",
        "The range follows from the spread's own 90 % interval (chi squared, normal noise). Three "
        "seeds know the spread to a factor of eight: plan for the upper half, or use seeds=auto.",
    ]
    return Group(table, *map(Text, [*notes, *missing]))


def _count(seeds: float) -> str:
    return "∞" if math.isinf(seeds) else f"{seeds:.0f}"
