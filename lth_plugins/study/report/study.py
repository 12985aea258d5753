"""The report of a study: which tickets match, the curves, the masks, and every run, as one HTML."""

import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import yaml
from markupsafe import Markup
from matplotlib.axes import Axes

from lth_plugins.resilience.atomic import write_atomically
from lth_plugins.study.analyse.cost import total
from lth_plugins.study.judge.comparison import PAIRED, WELCH
from lth_plugins.study.judge.conditions import Condition, conditions
from lth_plugins.study.judge.looks import verdicts
from lth_plugins.study.judge.verdict import (
    CRITERIA,
    TESTED,
    UNIVERSAL,
    WITHIN_STD,
    WORDS,
    Verdict,
    Winner,
    finite,
    mean_std,
    winners,
)
from lth_plugins.study.plan.kinds import JUDGED, KINDS, is_structured
from lth_plugins.study.report import (
    connectivity,
    environment,
    gallery,
    masks,
    plots,
    searches,
    templates,
)
from lth_plugins.study.report.assets import Assets
from lth_plugins.study.report.tables import Column, Table, answer, counted, number, span
from lth_plugins.study.run.state import STATES, Result, Study, read_study

MOST_PROBLEMS = 20  # shown; more are folded
KeyT = TypeVar("KeyT")


@dataclass(frozen=True)
class StudyReport:
    """What the sections of a report draw on.

    Attributes:
        study: as it was read.
        conditions: its runs, those of several seeds together.
        verdicts: see `judge`.
        tickets: the masks that could be read.
        problems: all that is wrong, a sentence each.
        show: where figures and tables go.
    """

    study: Study
    conditions: Sequence[Condition]
    verdicts: Sequence[Verdict]
    tickets: Sequence[masks.TicketMasks]
    problems: Sequence[str]
    show: Assets

    @cached_property
    def anchors(self) -> Mapping[tuple[str, str, int], str]:
        """Where the page lists the runs of a source, task and round: of dense and of tickets."""
        return {
            (condition.source, condition.run.task, condition.run.round): f"#{_anchor(k)}"
            for k, condition in enumerate(self.conditions)
            if condition.run.kind in JUDGED
        }

    @cached_property
    def _masks(self) -> Mapping[tuple[str, int, str], masks.TicketMasks]:
        return {(t.source, t.round, t.kind): t for t in self.tickets}

    def left(self, source: str, k: int, kind: str = "ticket") -> float:
        """The fraction of weights that masks of round k keep; NaN without the masks."""
        if k == 0:
            return 1.0
        found = self._masks.get((source, k, kind))
        return math.nan if found is None else found.density

    def density(self, condition: Condition) -> float:
        left = self.left(condition.source, condition.run.round, condition.masks)
        return 1 - left if condition.kind.complement else left

    def gflops(self, condition: Condition) -> float:
        """Of the trunk, what zeros do not save (see `cost.Cost`); NaN without the masks."""
        if condition.run.round == 0:
            own = (total(t.costs) for t in self.tickets if t.source == condition.source)
            return next((cost.flops / 1e9 for cost in own), math.nan)
        found = self._masks.get((condition.source, condition.run.round, condition.masks))
        if found is None:
            return math.nan
        cost = total(found.costs)
        if condition.kind.complement:  # what is never pruned stays
            return (cost.flops - cost.sparse_flops + found.costs["outside"].flops) / 1e9
        return cost.sparse_flops / 1e9


def write_study_report(folder: Path, out: Path) -> Path:
    """Write the report of a study to ``out``, with ``figures/`` and ``tables/`` beside it.

    Args:
        folder: of the study.
        out: the HTML file.

    Returns:
        ``out``.

    Raises:
        RunError: if the study has no plan. Problems of single runs and tickets are listed first in
            the report.
    """
    study = read_study(folder)
    found = conditions(study)
    paths = {
        (condition.source, condition.run.round, condition.masks): condition.run.ticket
        for condition in found
        if condition.run.round > 0
        and not condition.kind.strength
        and condition.run.ticket is not None
    }
    dense = {
        condition.source: condition.run.ticket
        for condition in found
        if condition.run.kind == "dense" and condition.run.ticket is not None
    }
    of_masks = {source for source, _, _ in paths}
    alignments, unaligned = masks.align_sources({s: p for s, p in dense.items() if s in of_masks})
    tickets, unreadable = masks.read_tickets(paths, alignments)
    rounds, unknown_rounds = searches.read_searches(study)
    shown = gallery.read_gallery(study, found)
    left_out = [f"task {task} is left out: {reason}" for task, reason in study.left_out.items()]
    out.parent.mkdir(parents=True, exist_ok=True)
    report = StudyReport(
        study,
        found,
        verdicts(study, found),
        tickets,
        [*study.problems, *left_out, *unaligned, *unreadable, *unknown_rounds, *shown.problems],
        Assets(out),
    )
    with plots.style():
        body = [
            *_head(report),
            *_verdict(report),
            *connectivity.sections(study, report.verdicts, report.show),
            *_curves(report),
            *searches.sections(rounds, report.show),
            *_baselines(report),
            *_channels(report),
            *_sizes(report),
            *_sensitivity(report),
            *masks.sections(tickets, report.show, bool(study.makers)),
            *gallery.sections(shown),
            *_runs(report),
            *_environment(),
            *_caveats(report),
        ]
        if shown.tasks:
            write_atomically(out.with_name("overview.png"), _overview(report, shown))
    write_atomically(out, templates.page(_title(study), body).encode())
    return out


def _title(study: Study) -> str:
    return _texts(study).get("title") or f"Is it matching? {study.plan.config.stem}"


def _texts(study: Study) -> Mapping[str, Any]:
    """What the author of the configuration has the report say."""
    return study.plan.settings.get("report") or {}


def _head(report: StudyReport) -> list[Markup]:
    results = report.study.results
    counts = {state: sum(r.state == state for r in results) for state in STATES}
    states = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    plan = report.study.plan
    changed = Markup(" with {}").format(templates.code(shlex.join(plan.overrides)))
    about = _texts(report.study).get("about")
    return [
        templates.heading(_title(report.study), 1),
        *([templates.paragraph(about)] if about else []),
        *_problems(report.problems),
        templates.paragraph(
            Markup("{}: {}.{} Study: {}, planned by {}{}.").format(
                counted(len(results), "training"),
                states or "none planned",
                _processor_time(report.study),
                report.show.link(templates.code(report.study.folder), report.study.folder),
                report.show.link(templates.code(plan.config), plan.config),
                changed if plan.overrides else "",
            ),
            "soft",
        ),
        templates.details(
            "The study's configuration" + (", changes included" if plan.overrides else ""),
            templates.command(
                yaml.safe_dump(dict(plan.settings), sort_keys=False, allow_unicode=True)
            ),
        ),
    ]


def _processor_time(study: Study) -> str:
    times = [r.cpu_seconds for r in (*study.makers, *study.results)]
    measured = sum(time for time in times if math.isfinite(time))
    return f" What is done took {measured / 60:.1f} minutes of one core." if measured else ""


def _problems(problems: Sequence[str]) -> list[Markup]:
    if not problems:
        return [templates.paragraph("No problems were found in the study's runs.", "soft")]
    title = counted(len(problems), "problem")
    first, rest = problems[:MOST_PROBLEMS], problems[MOST_PROBLEMS:]
    parts = [templates.bullets(first)]
    if rest:
        parts.append(templates.details(f"and {len(rest)} more", templates.bullets(rest)))
    return [templates.alarm(title, *parts)]


def _verdict(report: StudyReport) -> list[Markup]:
    parts = [
        templates.heading("Which tickets win"),
        templates.paragraph(
            "A winning ticket is the sparsest round such that it and all denser ones that were "
            "measured are matching. By the test, a ticket is matching where a one-sided t test "
            "rejects that it loses the margin or more, and not matching where one rejects that it "
            "loses the margin or less, each after Holm's correction over the rounds; either word "
            "takes a power of 0.8, and all else is open. Within one std, the literature's "
            "criterion: the mean is at least the dense mean less one dense standard deviation."
        ),
    ]
    if not report.verdicts:
        return [*parts, templates.paragraph("No ticket has been measured yet.", "note")]
    found = winners(report.verdicts, report.study.left_out)
    table = _verdict_table(report)
    judged = {v.task: v.rule for v in report.verdicts}
    parts += [
        report.show.table(_winner_table(report, found), "winners", _winner_links(report, found)),
        templates.heading("Verdicts", 3),
        templates.bullets([f"{task}: {rule}." for task, rule in judged.items()]),
        templates.paragraph(_power(report.verdicts), "note"),
        report.show.table(table.only(_SAID, _SAID_CAPTION), "verdict", _verdict_links(report)),
        report.show.table(table.only(_TESTED, _TESTED_CAPTION), "tests"),
    ]
    return parts


_SAID = (
    *("source", "task", "round", "left", "verdict", "within_std", "seeds", "mean", "std"),
    *("dense_seeds", "dense_mean", "dense_std", "difference", "low", "high", "margin", "reason"),
)
_SAID_CAPTION = (
    "Std: of the seeds, n - 1. 90 %: confidence interval of the test that decides. Means lead to "
    "their runs."
)
_TESTED = (
    *("source", "task", "round", "test", "correlation", "margin_percent", "p_paired", "p_welch"),
    *("p_holm", "p_not_holm", "power", "power_holm", "power_found"),
)
_TESTED_CAPTION = (
    "How each was tested. p, paired and p, Welch: of matching, at these seeds alone; Holm's are "
    "corrected over the rounds."
)


def _power(verdicts: Sequence[Verdict]) -> str:
    counts = {word: sum(v.word == word for v in verdicts) for word in WORDS.values()}
    text = f"{', '.join(f'{count} {word}' for word, count in counts.items() if count)}."
    tested = [v for v in verdicts if math.isfinite(v.power)]
    if not tested:
        return f"{text} No round is tested yet; the last column of the table says why."
    least, most = min(v.power_holm for v in tested), max(v.power for v in tested)
    return (
        f"{text} Power is the chance that the test says matching where there is no difference, or "
        "not matching where the loss is twice the margin, with the standard deviations found: "
        f"{span(100 * least, 100 * most, '.0f')} % here. Power for the difference found lets a "
        "word be said of one that is far from the margin."
    )


def _verdict_table(report: StudyReport) -> Table:
    columns = (
        Column("source", "Source"),
        Column("task", "Task"),
        Column("round", "Round"),
        Column("left", "Weights left (%)", number(2)),
        Column("verdict", "Verdict"),
        Column("within_std", "Within one std?", answer),
        Column("seeds", "Seeds"),
        Column("mean", "Mean", number(2)),
        Column("std", "Std", number(2)),
        Column("dense_seeds", "Dense seeds"),
        Column("dense_mean", "Dense mean", number(2)),
        Column("dense_std", "Dense std", number(2)),
        Column("difference", "Difference", number(2)),
        Column("low", "90 % from", number(2)),
        Column("high", "to", number(2)),
        Column("margin", "Margin (points)", number(2)),
        Column("margin_percent", "Margin (% of dense)", number(1)),
        Column("correlation", "Correlation", number(2)),
        Column("test", "Test"),
        Column("p_paired", "p, paired", number(4)),
        Column("p_welch", "p, Welch", number(4)),
        Column("p_holm", "p of matching, Holm", number(4)),
        Column("p_not_holm", "p of not matching, Holm", number(4)),
        Column("power", "Power (%), alone", number(0)),
        Column("power_holm", "at Holm's strictest", number(0)),
        Column("power_found", "for the difference found", number(0)),
        Column("reason", "Why open"),
    )
    return Table("", columns, tuple(_verdict_row(report, v) for v in report.verdicts))


def _verdict_row(report: StudyReport, v: Verdict) -> tuple[str | float | bool | None, ...]:
    test = v.comparison
    unknown = math.nan, math.nan
    low, high = unknown if test is None else test.interval(v.rule.alpha)
    dense_mean, dense_std = mean_std(v.dense)
    percent = 100 * v.margin / dense_mean if dense_mean > 0 else math.nan
    both = (v.tests.get(name) for name in (PAIRED, WELCH))
    return (
        *(v.source, v.task, v.round, 100 * report.left(v.source, v.round), v.word),
        *(v.matching[WITHIN_STD], len(finite(v.values)), *mean_std(v.values)),
        *(len(finite(v.dense)), dense_mean, dense_std),
        *(math.nan if test is None else test.difference, low, high, v.margin, percent),
        *(v.correlation, "" if test is None else test.test),
        *(math.nan if one is None else one.p_matching(v.margin) for one in both),
        *(v.p_holm, v.p_not_holm),
        *(100 * power for power in (v.power, v.power_holm, v.power_found)),
        v.reason,
    )


def _verdict_links(report: StudyReport) -> dict[tuple[int, str], str]:
    links = {}
    for row, v in enumerate(report.verdicts):
        for column in ("mean", "std", "seeds"):
            links[row, column] = report.anchors[v.source, v.task, v.round]
        if (v.source, v.task, 0) in report.anchors:
            for column in ("dense_mean", "dense_std", "dense_seeds"):
                links[row, column] = report.anchors[v.source, v.task, 0]
    return links


def _winner_table(report: StudyReport, found: Sequence[Winner]) -> Table:
    columns = (
        Column("source", "Source"),
        Column("task", "Task"),
        Column("criterion", "Criterion", lambda name: CRITERIA[str(name)]),
        Column("round", "Winning round", lambda k: "none" if k is None else str(k)),
        Column("left", "Weights left (%)", number(2)),
        Column("why", "Why none sparser"),
    )
    rows = [
        (
            *(w.source, w.task, w.criterion, w.round),
            math.nan if w.round is None else 100 * report.left(w.source, w.round),
            _why(w, report.study.left_out),
        )
        for w in found
    ]
    caption = f"By source and task; {UNIVERSAL!r}: matching on every task of the study (universal)."
    return Table(caption, columns, tuple(rows))


def _why(winner: Winner, left_out: Iterable[str]) -> str:
    if winner.stopped_by is None:
        return "none was measured"
    what = "is open" if winner.criterion == TESTED else "is not known"
    if winner.task == UNIVERSAL:
        what = "is not decided on every task"
        what += "".join(f", {task} is left out" for task in left_out)
    no = "is not matching" if winner.criterion == TESTED else "is further away"
    return f"round {winner.stopped_by} {what if winner.undecided else no}"


def _winner_links(report: StudyReport, found: Sequence[Winner]) -> dict[tuple[int, str], str]:
    return {
        (row, "round"): report.anchors[w.source, w.task, w.round]
        for row, w in enumerate(found)
        if w.round is not None and w.task != UNIVERSAL
    }


def _curves(report: StudyReport) -> list[Markup]:
    """Each task, a curve for each source."""
    tickets = [c for c in report.conditions if c.run.kind in JUDGED]
    figures = []
    for task, own in _grouped(tickets, lambda c: c.run.task).items():
        series = _series(own, lambda c: c.source, report.density, tickets)
        if series:
            figures.append(_figure(report, series, own, task, f"curves {task}"))
    intro = f"{_of_seeds(tickets)} From dense on the left to sparse on the right."
    return [
        templates.heading("Metrics against remaining weights"),
        templates.paragraph(intro if figures else "No training has a value yet."),
        templates.figures(figures),
        templates.details(
            "All means as a table",
            _means(report, report.conditions, "All that is trained.", "means"),
        ),
    ]


def _baselines(report: StudyReport) -> list[Markup]:
    """Each task and source that has baselines: its tickets beside them."""
    sparse = [
        c
        for c in report.conditions
        if c.run.kind != "dense" and not c.kind.strength and report.density(c) > 0
    ]
    dense = {(c.run.task, c.source): c for c in report.conditions if c.run.kind == "dense"}
    figures = []
    for (task, source), own in _grouped(sparse, lambda c: (c.run.task, c.source)).items():
        series = _series(own, lambda c: c.label, report.density, sparse)
        if series and any(c.run.kind != "ticket" for c in own):
            title, name = f"{task}, {source}", f"baselines {task} {source}"
            figures.append(_figure(report, series, own, title, name, dense.get((task, source))))
    notes = [_of_seeds([*sparse, *dense.values()])]
    notes += _explained(c for c in sparse if not is_structured(c.run.kind))
    if any(math.isfinite(c.mean_std[0]) for c in dense.values()):
        notes.append("The dashed line is the dense network.")
    return _figures("Beside baselines", " ".join(notes), figures)


def _figures(title: str, intro: str, figures: Sequence[Markup]) -> list[Markup]:
    """A section with figures; none without them."""
    if not figures:
        return []
    return [templates.heading(title), templates.paragraph(intro), templates.figures(figures)]


def _grouped(
    conditions: Iterable[Condition], key: Callable[[Condition], KeyT]
) -> dict[KeyT, list[Condition]]:
    """The conditions of each key, both in order."""
    groups: dict[KeyT, list[Condition]] = {}
    for condition in conditions:
        groups.setdefault(key(condition), []).append(condition)
    return groups


def _explained(conditions: Iterable[Condition]) -> list[str]:
    """A sentence about each kind among conditions that needs one."""
    kinds = {condition.run.kind for condition in conditions}
    return [KINDS[name].explained for name in KINDS if name in kinds and KINDS[name].explained]


def _of_seeds(conditions: Iterable[Condition]) -> str:
    """What points and bands are, of these."""
    measured = [condition for condition in conditions if math.isfinite(condition.mean_std[0])]
    spread = [math.isfinite(condition.mean_std[1]) for condition in measured]
    if not any(spread):
        return "Each point is a single seed, so nothing tells the noise."
    single = "" if all(spread) else "; a single seed has none"
    return f"Means over seeds, with a band of one standard deviation to both sides{single}."


def _channels(report: StudyReport) -> list[Markup]:
    """Each ticket that structured masks were made of: dense, as it is, and structured."""
    of = {
        (c.run.task, c.source, c.run.round) for c in report.conditions if is_structured(c.run.kind)
    }
    of |= {(task, source, 0) for task, source, _ in of}
    shown = [
        c
        for c in report.conditions
        if (c.run.kind in JUDGED or is_structured(c.run.kind))
        and (c.run.task, c.source, c.run.round) in of
    ]
    if not shown:
        return []
    shown.sort(key=lambda c: (c.run.task, c.source, c.run.round))
    notes = _explained(shown)
    if len(notes) > 1:
        notes.append("All have the same FLOPs, layer by layer, where they come from one ticket.")
    return [
        templates.heading("Whole channels"),
        templates.paragraph(" ".join(notes)),
        _means(report, shown, "Dense networks, tickets, and channels made of them.", "channels"),
    ]


def _means(report: StudyReport, conditions: Sequence[Condition], what: str, name: str) -> Markup:
    """A row for each condition; its mean leads to its runs."""
    caption = (
        f"{what} GFLOPs are multiply-adds of the trunk for an image of {masks.SIZE} × "
        f"{masks.SIZE} pixels, those of zeros left out."
    )
    table = Table(caption, _ROW, tuple(_row(report, condition) for condition in conditions))
    anchors = (_anchor(report.conditions.index(condition)) for condition in conditions)
    links = {(row, "mean"): f"#{anchor}" for row, anchor in enumerate(anchors)}
    return report.show.table(table, name, links)


_ROW = (
    Column("task", "Task"),
    Column("source", "Source"),
    Column("kind", "Kind"),
    Column("round", "Round"),
    Column("strength", "Strength", number(2)),
    Column("left", "Weights left (%)", number(2)),
    Column("gflops", "GFLOPs", number(3)),
    Column("seeds", "Seeds"),
    Column("metric", "Metric"),
    Column("mean", "Mean", number(2)),
    Column("std", "Std", number(2)),
)


def _row(report: StudyReport, condition: Condition) -> tuple[str | float, ...]:
    run = condition.run
    return (
        *(run.task, condition.source, condition.label, run.round),
        *(run.strength if condition.kind.strength else math.nan, 100 * report.density(condition)),
        *(report.gflops(condition), len(finite(condition.values)), run.metric, *condition.mean_std),
    )


def _sizes(report: StudyReport) -> list[Markup]:
    """Each task and source, a curve for each architecture, if there are several."""
    figures = []
    judged = [c for c in report.conditions if c.run.kind in JUDGED]
    for (task, source), own in _grouped(judged, lambda c: (c.run.task, c.run.source)).items():
        series = _series(own, lambda c: c.run.arch, lambda c: _remaining(report, c))
        if len(series) > 1:
            fig, axes = plots.figure()
            plots.draw_sizes(axes, series, f"{own[0].run.metric} (%)")
            axes.set_title(f"{task}, {source}")
            alt = f"{own[0].run.metric} on {task} against the number of remaining weights. "
            alt += _ends(series, lambda x: f"{x:,.0f} weights")
            text = f"{source}: large sparse networks beside small dense ones."
            caption = _caption(report, text, own)
            figures.append(report.show.figure(fig, f"sizes {task} {source}", alt, caption))
    intro = "Prunable weights that are left, across depths of network."
    return _figures("Metrics against the number of remaining weights", intro, figures)


def _remaining(report: StudyReport, condition: Condition) -> float:
    return report.density(condition) * sum(map(math.prod, condition.arch.prunable.values()))


def _sensitivity(report: StudyReport) -> list[Markup]:
    """Each perturbation and metric: a curve for each ticket and task that was perturbed."""
    figures = []
    kinds = _grouped(report.conditions, lambda c: (c.run.kind, c.run.metric))
    for (kind, metric), perturbed in kinds.items():
        strength = KINDS[kind].strength
        if strength is None:
            continue
        of = {(c.source, c.run.task, c.run.round) for c in perturbed}
        whole = [
            c
            for c in report.conditions
            if c.run.kind in JUDGED and (c.source, c.run.task, c.run.round) in of
        ]
        series = _series(
            [*whole, *perturbed],
            lambda c: f"{c.run.task}, {c.source}, round {c.run.round}",
            lambda c: c.run.strength,
        )
        if not series:
            continue
        fig, axes = plots.figure()
        plots.draw_strengths(axes, series, strength.axis, f"{metric} (%)")
        axes.set_title(kind)
        alt = f"{metric} against the strength of {kind}. " + _ends(series, lambda x: f"{x:g}")
        starts = any(0 in curve.x for curve in series)
        text = "0 is the ticket itself." if starts else f"{kind}: {metric}."
        caption = _caption(report, text, perturbed)
        figures.append(report.show.figure(fig, f"sensitivity {kind} {metric}", alt, caption))
    seeds = _of_seeds(c for c in report.conditions if c.kind.strength)
    intro = f"{seeds} Each task is a curve of its own."
    return _figures("Sensitivity to perturbations", intro, figures)


def _series(
    conditions: Sequence[Condition],
    label: Callable[[Condition], str],
    x: Callable[[Condition], float],
    among: Iterable[Condition] | None = None,
) -> list[plots.Series]:
    """Curves over the seeds' means, with a band of one standard deviation.

    Args:
        conditions: a point each; those without a value, or whose place is not known, are left out.
        label: a curve for each.
        x: where a point is.
        among: the labels of these have looks of their own, so that figures agree.
    """
    labels = dict.fromkeys(label(condition) for condition in among or conditions)
    looks = dict(zip(labels, plots.looks(len(labels)), strict=True))
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for condition in conditions:
        at = x(condition)
        if math.isfinite(at) and math.isfinite(condition.mean_std[0]):
            curves.setdefault(label(condition), []).append((at, *condition.mean_std))
    series = []
    for name, found in curves.items():
        xs, means, stds = zip(*sorted(found), strict=True)
        series.append(plots.Series(name, xs, means, *looks[name], spread=stds))
    return series


def _figure(
    report: StudyReport,
    series: Sequence[plots.Series],
    of: Sequence[Condition],
    title: str,
    name: str,
    dense: Condition | None = None,
) -> Markup:
    """A metric against remaining weights."""
    metric = of[0].run.metric
    fig, axes = plots.figure()
    mean, std = dense.mean_std if dense else (None, math.nan)
    plots.draw_curves(axes, series, f"{metric} (%)", mean, std)
    axes.set_title(title)
    ends = _ends(series, lambda x: f"{100 * x:.2f} %")
    if mean is not None and math.isfinite(mean):
        ends += f" Dense: {mean:.2f}."
    alt = f"{metric} against remaining weights, {title}. {ends}"
    return report.show.figure(fig, name, alt, _caption(report, f"{title}: {metric}.", of))


def _caption(report: StudyReport, text: str, of: Sequence[Condition]) -> Markup:
    """With a link to the first of the runs that a figure shows."""
    where = f"#{_anchor(report.conditions.index(of[0]))}"
    return Markup("{} {},").format(text, templates.link("Runs", where))


def _ends(series: Sequence[plots.Series], x: Callable[[float], str]) -> str:
    """The ends of curves in words."""

    def spelled(curve: plots.Series) -> str:
        ends = sorted({0, len(curve.x) - 1})  # one, where it is a point
        points = (f"{curve.values[i]:.2f} at {x(curve.x[i])}" for i in ends)
        return f"{curve.label}: {', '.join(points)}"

    return f"{'; '.join(map(spelled, series))}."


def _runs(report: StudyReport) -> list[Markup]:
    parts = [
        templates.heading("Every run"),
        templates.paragraph(
            Markup(
                "Each with its command, which can be typed in {}, and with its folder, "
                "configuration and log, as far as it has them. The numbers above lead here."
            ).format(templates.code(report.study.plan.directory))
        ),
    ]
    by_task: dict[str, list[Group]] = {}
    for k, condition in enumerate(report.conditions):
        title = f"{condition.title}: {condition.run.metric} {_spelled(*condition.mean_std)}"
        group = _group(report.show, title, condition.results, _anchor(k))
        by_task.setdefault(condition.run.task, []).append(group)
    if report.study.makers:
        by_task["what makes the tickets"] = [
            _group(report.show, maker.run.title, [maker], _anchor(f"maker-{k}"))
            for k, maker in enumerate(report.study.makers)
        ]
    columns = ("Seed", "Value", "State", "Time (s)", "Where")
    for task, groups in by_task.items():
        title = f"Runs of {task}"
        parts += [templates.heading(title, 3), templates.grouped(columns, groups, title)]
    return parts


Group = tuple[str, str, list[tuple[object, ...]]]
"""The anchor, the title and the rows of a group of runs."""


def _group(show: Assets, title: str, results: Sequence[Result], anchor: str) -> Group:
    return anchor, title, [_run_row(show, result) for result in results]


def _anchor(k: int | str) -> str:
    return f"runs-{k}"


def _spelled(mean: float, std: float) -> str:
    if not math.isfinite(mean):
        return "has no value"
    return f"{mean:.2f}" + (f" ± {std:.2f}" if math.isfinite(std) else "")


def _run_row(show: Assets, result: Result) -> tuple[object, ...]:
    run = result.run
    places = {"folder": run.folder, "config": run.config, "log": result.log}
    where = Markup(", ").join(show.link(text, path) for text, path in places.items() if path)
    notes = [f"{name} {value:.2f}" for name, value in result.metrics.items()]
    if math.isfinite(result.cpu_seconds):
        notes.append(f"processor {result.cpu_seconds:.0f} s")
    text = shlex.join(("python", *run.command)) + "".join(f"\n# {note}" for note in notes)
    command = templates.details("command", templates.command(text))
    seconds = number(0)(result.seconds)
    return (run.seed, number(2)(result.value), result.state, seconds, where + command)


def _environment() -> list[Markup]:
    return [
        templates.heading("Environment and versions of this report"),
        templates.table(["What", "Which"], list(environment.facts().items())),
    ]


def _caveats(report: StudyReport) -> list[Markup]:
    caveats = _texts(report.study).get("caveats")
    return [templates.heading("Caveats"), templates.bullets(caveats)] if caveats else []


def _overview(report: StudyReport, shown: gallery.Gallery) -> bytes:
    """Of each task of the gallery, the curves of tickets and baselines, and one image."""

    def curves(axes: Axes, task: str) -> None:
        own = [c for c in report.conditions if c.run.task == task and not c.kind.strength]

        def label(condition: Condition) -> str:
            judged = condition.run.kind in JUDGED
            return condition.source if judged else f"{condition.source}, {condition.label}"

        series = _series(own, label, report.density)
        plots.draw_curves(axes, series, f"{own[0].run.metric} (%)")

    return gallery.overview(shown, curves)
