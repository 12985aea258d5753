"""The gallery of a report: test images, and what dense networks, tickets and baselines predict."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from lth_plugins.study.judge.conditions import Condition
from lth_plugins.study.plan.tools import TOOLS, Tool
from lth_plugins.study.report import plots, templates
from lth_plugins.study.report.predictions import (
    NO_BOXES,
    Boxes,
    LabelMap,
    TestImage,
    boxed_images,
    coco_detections,
    labelled_images,
    read_label_map,
)
from lth_plugins.study.run.state import Study
from lth_plugins.training.places import dataset_path

SCORE = 0.5  # boxes below are not drawn

_INTROS = {
    "boxes": f"Predictions with a score of at least {SCORE}. Solid blue: right, that is, the right "
    "class with an IoU of at least 0.5. Dashed vermillion: wrong.",
    "label maps": "Each class has its colour, and larger regions their name.",
}


@dataclass(frozen=True)
class Prediction:
    """The predictions of a condition: of the first of its runs that is done."""

    condition: Condition
    folder: Path
    tool: Tool
    names: Mapping[int, str]

    @property
    def label(self) -> str:
        of = self.condition
        kind = of.label if of.dense else f"{of.label}, round {of.run.round}"
        return f"{of.source}: {kind}"

    @cached_property
    def detections(self) -> Mapping[Any, Boxes]:
        """Predicted boxes by image id."""
        return coco_detections(self.folder / self.tool.boxes, self.names)

    def boxes(self, image: TestImage) -> tuple[Boxes, list[bool]]:
        """The boxes to draw, and whether each is right."""
        boxes = self.detections.get(image.id, NO_BOXES).at_least(SCORE)
        return boxes, plots.matched(boxes, image.boxes)

    def labels(self, image: TestImage) -> LabelMap:
        return read_label_map(self.folder / self.tool.label_maps / f"{image.name}.png")


@dataclass(frozen=True)
class Shown:
    """What the report shows of a task.

    Attributes:
        images: the test images.
        names: of the classes: by category id for boxes, by value for label maps.
        predictions: of each condition, at least one.
    """

    images: Sequence[TestImage]
    names: Mapping[int, str]
    predictions: Sequence[Prediction]

    @property
    def what(self) -> str:
        return "boxes" if self.predictions[0].tool.boxes else "label maps"


@dataclass(frozen=True)
class Gallery:
    """What to show, by task, and a sentence about each part that cannot be read."""

    tasks: Mapping[str, Shown]
    problems: Sequence[str]


def read_gallery(study: Study, conditions: Sequence[Condition]) -> Gallery:
    """The gallery of the tasks whose configuration says which images to show."""
    tasks = {}
    problems: list[str] = []
    for task, settings in study.plan.settings.get("tasks", {}).items():
        tool, wanted = TOOLS[settings["tool"]], settings.get("shown") or {}
        done = [
            (condition, ran[0].run.folder)
            for condition in conditions
            if condition.run.task == task and not condition.kind.strength
            if (ran := [r for r in condition.results if r.state == "done"])
        ]
        if not done or not wanted.get("images") or not (tool.boxes or tool.label_maps):
            continue
        folder = study.plan.directory / dataset_path(wanted["images"])
        answers = wanted["truth"].replace("{out}", f"{done[0][1]}")
        truth = study.plan.directory / dataset_path(answers)
        try:
            if tool.boxes:
                images, names = boxed_images(folder, truth, wanted["count"])
            else:
                images = labelled_images(folder, truth, wanted["count"])
                names = dict(enumerate(wanted["classes"]))
        except (OSError, ValueError, KeyError) as error:
            problems.append(f"test images of {task} are not shown: {error!r}")
            continue
        predictions = []
        for condition, run_folder in done:
            prediction = Prediction(condition, run_folder, tool, names)
            try:
                for image in images:
                    _ = prediction.boxes(image) if tool.boxes else prediction.labels(image)
            except (OSError, ValueError, KeyError) as error:
                problems.append(f"predictions of {condition.title} are not shown: {error!r}")
                continue
            predictions.append(prediction)
        if predictions and images:
            tasks[task] = Shown(images, names, predictions)
    return Gallery(tasks, problems)


def sections(gallery: Gallery) -> list[Markup]:
    """The part of the page, under `plots.style`."""
    if not gallery.tasks:
        return []
    parts = [
        templates.heading("Test images and what was predicted"),
        templates.paragraph(
            "The first test images, not chosen. Of several seeds the first is shown."
        ),
    ]
    for task, shown in gallery.tasks.items():
        parts += [
            templates.heading(f"{task}: {shown.what}", 3),
            templates.paragraph(_INTROS[shown.what], "soft"),
        ]
        for image in shown.images:
            panels = [_panel(shown, image, e) for e in (None, *shown.predictions)]
            parts.append(templates.panels(panels))
    return parts


def _panel(shown: Shown, image: TestImage, prediction: Prediction | None) -> Markup:
    """One image with the ground truth, or with what a condition predicts."""
    fig, axes = plots.panel(image.pixels)
    note = _draw(axes, shown, image, prediction)
    label = prediction.label if prediction else "ground truth"
    alt = f"Image {image.name}, {shown.what}, {label}: {note}."
    caption = Markup("{}<br>{}").format(label, note) if prediction else label
    return templates.figure(plots.to_png(fig), alt, caption)


def _draw(axes: Axes, shown: Shown, image: TestImage, prediction: Prediction | None) -> str:
    """Draw an image with boxes or a label map, and return in words how much is right."""
    draw = _draw_boxes if shown.what == "boxes" else _draw_labels
    return draw(axes, shown, image, prediction)


def _draw_boxes(axes: Axes, shown: Shown, image: TestImage, prediction: Prediction | None) -> str:
    truth = image.boxes
    boxes, right = prediction.boxes(image) if prediction else (truth, [True] * len(truth))
    plots.draw_boxes(axes, image.pixels, boxes, right)
    if prediction is None:
        return f"{', '.join(truth.labels)}"
    return f"{sum(right)} of {len(truth)} found, {len(right) - sum(right)} wrong"


def _draw_labels(axes: Axes, shown: Shown, image: TestImage, prediction: Prediction | None) -> str:
    truth = image.labels
    labels = prediction.labels(image) if prediction else truth
    names = list(shown.names.values())
    plots.draw_label_map(axes, image.pixels, labels, names)
    drawn = [value for value, name in shown.names.items() if name != plots.BACKGROUND]
    counted = np.isin(truth, list(shown.names)) & (np.isin(truth, drawn) | np.isin(labels, drawn))
    right = 100 * float((truth == labels)[counted].mean()) if counted.any() else 100.0
    return f"{right:.0f} % of object pixels right"


def overview(gallery: Gallery, curves: Callable[[Axes, str], None]) -> bytes:
    """A PNG for a README: of each task its first image with one source, and below them its curves.

    That source is the one with the most conditions.

    Args:
        gallery: with at least one task.
        curves: draws the curves of a task.
    """
    columns = 0
    rows = {}
    for task, shown in gallery.tasks.items():
        ((source, _),) = Counter(e.condition.source for e in shown.predictions).most_common(1)
        rows[task] = [e for e in shown.predictions if e.condition.source == source]
        columns = max(columns, 1 + len(rows[task]))
    # In inches. Places are fixed, because names on images are written where they fit.
    width, below = 2.5 * columns, 2.8
    height = 2.15 * len(rows) + below
    fig, axes = plots.figure(width=width, height=height)
    fig.set_layout_engine("none")
    axes.remove()
    panels = fig.add_gridspec(len(rows), columns)
    panels.update(left=0.004, right=0.996, top=1 - 0.25 / height, bottom=below / height)
    panels.update(wspace=0.02, hspace=0.15)
    under = fig.add_gridspec(1, len(rows))
    under.update(left=0.75 / width, right=0.996, wspace=0.2)
    under.update(top=(below - 0.4) / height, bottom=0.8 / height)
    for row, (task, predictions) in enumerate(rows.items()):
        axes = fig.add_subplot(under[row])
        curves(axes, task)
        axes.set_title(task, fontsize=10)
        shown = gallery.tasks[task]
        for column, prediction in enumerate((None, *predictions)):
            axes = fig.add_subplot(panels[row, column])
            _draw(axes, shown, shown.images[0], prediction)
            title = prediction.label.split(": ", 1)[1] if prediction else f"{task}: ground truth"
            axes.set_title(title, fontsize=10)
            axes.set_axis_off()
    return plots.to_png(fig, dpi=110)
