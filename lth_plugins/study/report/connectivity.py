"""Linear mode connectivity in a report: beside the verdict, what lies between two seeds."""

from collections.abc import Sequence

from markupsafe import Markup

from lth_plugins.errors import RunError
from lth_plugins.study.analyse.connectivity import PLACES, Line, read_line
from lth_plugins.study.judge.verdict import Verdict
from lth_plugins.study.plan.runs import Run
from lth_plugins.study.report import plots, templates
from lth_plugins.study.report.assets import Assets
from lth_plugins.study.report.tables import Column, Table, number
from lth_plugins.study.run.state import Study

_INTRO = (
    "The metric along the line between two seeds' weights: their masks, data and start are one "
    "ticket's, the order of the images and the heads are not. The barrier is the mean of the ends "
    "less the lowest value between them (arXiv 1912.05671). About zero, training ends in one "
    "valley whatever its noise; where it is high, a round may fail because it does not. "
    "BatchNorm's statistics are interpolated too, so each barrier is an upper bound. Heads that "
    "start at random differ between seeds, and add to it: compare with the dense network, round 0."
)


def sections(study: Study, verdicts: Sequence[Verdict], show: Assets) -> list[Markup]:
    """A table and a figure of each task; nothing without lines."""
    if not study.lines:
        return []
    several = len({r.run.arch for r in study.results}) > 1
    words = {v.key: v.word for v in verdicts}
    found: dict[str, list[tuple[Run, str, Line]]] = {}
    missing = []
    for result in study.lines:
        run = result.run
        source = f"{run.source} ({run.arch})" if several else run.source
        try:
            if result.state == "done":
                found.setdefault(run.task, []).append((run, source, read_line(run.folder)))
                continue
            missing.append(f"{run.title} is {result.state}")
        except RunError as error:
            missing.append(f"{run.title}: {error}")
    rows = [
        (
            *(task, source, run.round, words.get((source, task, run.round), "dense")),
            *(line.values[0], line.values[-1], min(line.values), line.barrier),
        )
        for task, lines in found.items()
        for run, source, line in lines
    ]
    parts = [templates.heading("Are two seeds connected"), templates.paragraph(_INTRO)]
    if rows:
        parts.append(show.table(Table("In points of the metric.", _COLUMNS, tuple(rows)), "lines"))
    parts.append(templates.figures([_figure(show, task, lines) for task, lines in found.items()]))
    return [*parts, *([templates.bullets(missing)] if missing else [])]


_COLUMNS = (
    Column("task", "Task"),
    Column("source", "Source"),
    Column("round", "Round"),
    Column("verdict", "Verdict"),
    Column("one", "One end", number(2)),
    Column("other", "Other end", number(2)),
    Column("lowest", "Lowest", number(2)),
    Column("barrier", "Barrier", number(2)),
)


def _figure(show: Assets, task: str, lines: Sequence[tuple[Run, str, Line]]) -> Markup:
    looks = plots.looks(len(lines))
    series = [
        plots.Series(f"{source}, round {run.round}", PLACES, line.values, *look)
        for (run, source, line), look in zip(lines, looks, strict=True)
    ]
    fig, axes = plots.figure()
    plots.draw_strengths(axes, series, "Place between the two seeds", "metric (%)")
    axes.set_title(task)
    barriers = ", ".join(
        f"{s.label} {x[2].barrier:.2f}" for s, x in zip(series, lines, strict=True)
    )
    alt = f"The metric along the line between two seeds, {task}. Barriers: {barriers}."
    return show.figure(
        fig, f"lines {task}", alt, Markup("{}.").format(f"{task}: between two seeds")
    )
