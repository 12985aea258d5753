"""How far a study is, for people."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from lth_plugins.errors import printable
from lth_plugins.progress import duration
from lth_plugins.study.run.state import STATES, Result, Study


def say(console: Console, text: str) -> None:
    """Print a line as it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def status(study: Study) -> RenderableType:
    """Counts by task, what is left out, all problems, and an estimate of the time left."""
    results = study.all
    table = Table("task", *STATES, "mean time", box=None, pad_edge=False)
    for task, found in _by_task(results).items():
        counts = Counter(result.state for result in found)
        mean = _mean_seconds(found)
        time = "" if mean is None else duration(mean)
        table.add_row(task, *(str(counts[state]) for state in STATES), time)
    lines = [f"{task} is left out: {reason}." for task, reason in study.left_out.items()]
    lines += [f"problem: {problem}" for problem in study.problems]
    running = sum(result.state == "running" for result in results)
    return Group(f"{study.folder}: {summary(results, max(1, running))}", table, *map(Text, lines))


def summary(results: Iterable[Result], at_once: int) -> str:
    """One line: how many are done, and the time left for the others.

    Args:
        results: of all runs.
        at_once: how many run at a time.
    """
    by_task = _by_task(results)
    done = sum(r.state == "done" for found in by_task.values() for r in found)
    line = f"{done} of {sum(map(len, by_task.values()))} runs done"
    seconds, known = 0.0, True
    for found in by_task.values():
        left = sum(result.state in ("planned", "running") for result in found)
        mean = _mean_seconds(found)
        known &= not left or mean is not None
        seconds += left * (mean or 0.0) / at_once
    if seconds:
        line += f", {'about' if known else 'at least'} {duration(seconds)} left"
    return line


def doing(log: str, patterns: Iterable[str] = ()) -> str:
    """What a run is doing, in one line, by the end of its log.

    Args:
        log: its last lines; "" where there is none yet.
        patterns: of lines that say how far it is, as `Tool.progress` has them.
    """
    lines = log.splitlines()
    if not lines:
        return "waits"
    for line in reversed(lines):
        if line.startswith("$ "):  # the command, with which the log of each attempt begins
            break
        for pattern in patterns:
            if found := re.search(pattern, line):
                step, steps, left = found.groups()
                return f"step {step} of {steps}, about {left} left"
    return "starts" if lines[-1].startswith("$ ") else printable(lines[-1])[:160]


def _by_task(results: Iterable[Result]) -> dict[str, list[Result]]:
    by_task: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        by_task[result.run.stage].append(result)
    return by_task


def _mean_seconds(results: Iterable[Result]) -> float | None:
    """Of those that are done; None if none is."""
    times = [result.seconds for result in results if result.state == "done"]
    return sum(times) / len(times) if times else None
