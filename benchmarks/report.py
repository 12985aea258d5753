"""One measured figure as a row, and all of them as RESULTS.md."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lth_plugins.study.report.environment import facts

COLUMNS = ("What", "Ours", "Peer", "Ratio", "Must be", "Met", "Against the physical limit")

ABOUT = """\
Written by `benchmarks/run.py`; each section says when and on what it was measured. A value is the
median of its repetitions ± their interquartile range. Our repetitions and the peers' take turns,
and a ratio is the median of the ratios of each turn: the peer's over ours where a lower bound is
given, ours over the peer's, or what the row says, where an upper bound is given. Peers are
PyTorch's own ways, or re-expressed in `benchmarks/peers.py`. W is the memory of the prunable
weights, 4 bytes each. The physical limit follows from the bytes that must be moved, over the
bandwidth of a copy on this machine, or from the masks' entropy. Figures of a GPU are in RESULTS-
cuda.md, once `benchmarks/run.py --device cuda` has measured them."""


@dataclass(frozen=True)
class Target:
    """The bound of a figure."""

    bound: float
    at_most: bool

    def met_by(self, figure: float) -> bool:
        return figure <= self.bound if self.at_most else figure >= self.bound

    def __str__(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.bound:g}"


def at_most(bound: float) -> Target:
    return Target(bound, True)


def at_least(bound: float) -> Target:
    return Target(bound, False)


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        what: what is measured.
        ours: our value, with its unit and spread.
        peer: the peer's value, and its name.
        ratio: the figure that the target bounds.
        target: None where none is set.
        limit: the figure beside what the machine, or the entropy, allows.
        reason: why it may miss its target; shown where it does.
        unit: the unit of the ratio.
    """

    what: str
    ours: str
    peer: str
    ratio: float
    target: Target | None
    limit: str = "–"
    reason: str = ""
    unit: str = "×"

    @property
    def met(self) -> bool | None:
        return None if self.target is None else self.target.met_by(self.ratio)

    def __str__(self) -> str:
        shown = f"{self.ratio:.4g} {self.unit}"
        target = "–" if self.target is None else f"{self.target} {self.unit}"
        met = {None: "–", True: "yes", False: "**no**"}[self.met]
        cells = (self.what, self.ours, self.peer, shown, target, met, self.limit)
        return f"| {' | '.join(cells)} |"


def table_head() -> str:
    return f"| {' | '.join(COLUMNS)} |\n" + "| --- " * len(COLUMNS) + "|"


def section(
    title: str,
    rows: Sequence[Row],
    skipped: Iterable[str],
    how: str,
    seconds: float,
) -> str:
    """A section of RESULTS.md, with its date and its environment.

    Args:
        title: the section's title.
        rows: the figures.
        skipped: one sentence for each benchmark that was not run.
        how: device and settings, in words.
        seconds: the time that all of it took.
    """
    missed = [f"- {row.what}: {row.reason or 'no reason known'}" for row in rows if not is_ok(row)]
    versions = facts()
    commit = versions.pop("lth_plugins")
    parts = [
        f"## {title}",
        f"- {time.strftime('%Y-%m-%d', time.gmtime())}, lth_plugins {commit}; {how}; "
        f"{seconds / 60:.0f} minutes\n"
        f"- {'; '.join(f'{key}: {value}' for key, value in versions.items())}",
    ]
    if rows:
        parts.append("\n".join([table_head(), *map(str, rows)]))
    for what, lines in (("Misses", missed), ("Not measured", [f"- {line}" for line in skipped])):
        if lines:
            parts.append("\n".join([f"{what}:", "", *lines]))
    return "\n\n".join(parts) + "\n"


def results(sections: Mapping[str, str], before: str = "") -> str:
    """RESULTS.md.

    Args:
        sections: texts by title, in order; an empty one keeps the text of `before`.
        before: the file so far. Its sections of other titles are dropped.
    """
    kept = {text.splitlines()[0]: text for text in before.split("\n## ")[1:]}
    texts = [
        text or (f"## {kept[title].rstrip()}\n" if title in kept else "")
        for title, text in sections.items()
    ]
    return "\n".join(["# Measured beside the peers\n", f"{ABOUT}\n", *filter(None, texts)])


def is_ok(row: Row) -> bool:
    return row.met is not False
