"""The part of a report that is about pre-training: what each search measured in its rounds."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from lth_plugins.errors import LthError
from lth_plugins.study.plan.kinds import FIND
from lth_plugins.study.plan.metrics import find_metrics
from lth_plugins.study.report import plots, templates
from lth_plugins.study.report.assets import Assets
from lth_plugins.study.report.tables import Column, Table, number
from lth_plugins.study.run.state import Study

_MEASURES = {"val_top1": "top-1", "val_knn_top1": "nearest neighbours"}
"""What a search measures, by the key in its ``metrics.jsonl``."""


def read_searches(study: Study) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """The rounds of each search that is done, by its source, and a sentence about each problem."""
    several = len({maker.run.arch for maker in study.makers}) > 1
    searches, problems = {}, []
    for maker in study.makers:
        if maker.run.task != FIND or maker.state != "done":
            continue
        name = f"{maker.run.source} ({maker.run.arch})" if several else maker.run.source
        try:
            searches[name] = find_metrics(maker.run.folder)
        except LthError as error:
            problems.append(f"the rounds of {name} are not shown: {error}")
    return searches, problems


def sections(searches: Mapping[str, Sequence[Mapping[str, Any]]], show: Assets) -> list[Markup]:
    """The part of the page, under `plots.style`."""
    rows, series = [], []
    looks = plots.looks(len(searches))
    for (name, rounds), (colour, marker) in zip(searches.items(), looks, strict=True):
        key = next((key for key in _MEASURES if key in rounds[0]), None)
        values = [100 * line[key] for line in rounds] if key else [float("nan")] * len(rounds)
        measure = _MEASURES[key] if key else "not measured"
        densities = [line["density"] for line in rounds]
        rows += [
            (name, line["round"], 100 * line["density"], measure, value, line["seconds"])
            for line, value in zip(rounds, values, strict=True)
        ]
        if key:
            label = f"{name} ({measure})"
            series.append(plots.Series(label, densities, values, colour, marker))
    if not rows:
        return []
    columns = (
        Column("source", "Source"),
        Column("round", "Round"),
        Column("left", "Weights left (%)", number(2)),
        Column("measure", "Measure"),
        Column("accuracy", "Accuracy (%)", number(2)),
        Column("seconds", "Training (s)", number(1)),
    )
    table = Table(
        "Pre-training, on its own validation data. Round 0 is the dense network.",
        columns,
        tuple(rows),
    )
    parts = [
        templates.heading("Pre-training and its rounds"),
        templates.paragraph(
            "After training the ticket of each round on the pre-training task. Without labels, an "
            "image has the class of its nearest neighbours in feature space."
        ),
    ]
    if series:
        fig, axes = plots.figure()
        plots.draw_curves(axes, series, "Accuracy (%)")
        axes.set_title("Pre-training")
        ends = "; ".join(
            f"{s.label}: {s.values[0]:.1f} dense, {s.values[-1]:.1f} at {100 * s.x[-1]:.2f} %"
            for s in series
        )
        alt = f"Curves of the pre-training accuracy against remaining weights. {ends}."
        parts.append(show.figure(fig, "pre-training", alt, "Pre-training."))
    parts.append(
        templates.details("Rounds of the searches as a table", show.table(table, "searches"))
    )
    return parts
