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
from lth_plugins.study.plan.paths import near
from lth_plugins.study.plan.tools import TOOLS, Tool
from lth_plugins.study.report import plots, templates
from lth_plugins.study.report.predictions import (
    BackgroundFirst,
    Boxes,
    TestImage,
    category_names,
    coco_detections,
    read_images,
    read_label_map,
)
from lth_plugins.study.run.state import Study

SCORE = 0.5  # boxes below are not drawn

_INTROS = {
    "boxes": f"Predictions with a score of at least {SCORE}. Solid blue: right, that is, the right "
    "class with an IoU of at least 0.5. Dashed vermillion: wrong.",
    "label maps": "Each class has its colour, and larger regions their name.",
}


@dataclass(frozen=True)
class Scenes:
    """A split of a dataset that ``tools/make_digit_scenes.py`` wrote, and its first images."""

    folder: Path
    split: str
    images: Sequence[TestImage]
    names: Mapping[int, str]

    def truth(self, image: TestImage) -> BackgroundFirst:
        return read_label_map(self.folder / "labels" / self.split / f"{image.name}.png")


@dataclass(frozen=True)
class Prediction:
    """The predictions of a condition: of the first of its runs that is done."""

    condition: Condition
    folder: Path
    tool: Tool
    scenes: Scenes

    @property
    def label(self) -> str:
        run = self.condition.run
        kind = "dense" if run.kind == "dense" else f"{self.condition.label}, round {run.round}"
        return f"{self.condition.source}: {kind}"

    @cached_property
    def detections(self) -> Mapping[int, Boxes]:
        """Predicted boxes by image id."""
        return coco_detections(self.folder / self.tool.boxes, dict(self.scenes.names))

    def boxes(self, image: TestImage) -> tuple[Boxes, list[bool]]:
        """The boxes to draw, and whether each is right."""
        nothing = Boxes(np.zeros((0, 4)), (), np.zeros(0))
        boxes = self.detections.get(image.id, nothing).at_least(SCORE)
        return boxes, plots.matched(boxes, image.boxes)

    def labels(self, image: TestImage) -> BackgroundFirst:
        return read_label_map(self.folder / self.tool.label_maps / f"{image.name}.png")


@dataclass(frozen=True)
class Gallery:
    """The predictions to show, by task, and a sentence about each that cannot be read."""

    scenes: Scenes
    tasks: Mapping[str, Sequence[Prediction]]
    problems: Sequence[str]


def read_gallery(study: Study, conditions: Sequence[Condition]) -> Gallery | None:
    """The gallery that a study's configuration asks for; None if it asks for none."""
    wanted: Mapping[str, Any] = study.plan.settings.get("gallery") or {}
    if not wanted.get("scenes"):
        return None
    folder, split = near(study.plan.directory / wanted["scenes"]), wanted["split"]
    try:
        images = read_images(folder, split, wanted["images"])
        scenes = Scenes(folder, split, images, category_names(folder, split))
    except (OSError, ValueError, KeyError) as error:
        nothing = Scenes(folder, split, [], {})
        return Gallery(nothing, {}, [f"no gallery: {folder} cannot be read as scenes: {error!r}"])
    tasks: dict[str, list[Prediction]] = {}
    problems = []
    for condition in conditions:
        task, done = condition.run.task, [r for r in condition.results if r.state == "done"]
        tool = TOOLS[study.plan.settings["tasks"][task]["tool"]]
        if not done or condition.kind.strength or not (tool.boxes or tool.label_maps):
            continue
        prediction = Prediction(condition, done[0].run.folder, tool, scenes)
        try:
            for image in images:
                _ = prediction.boxes(image) if tool.boxes else prediction.labels(image)
        except (OSError, ValueError, KeyError) as error:
            problems.append(f"predictions of {condition.title} are not shown: {error!r}")
            continue
        tasks.setdefault(task, []).append(prediction)
    return Gallery(scenes, tasks, problems)


def sections(gallery: Gallery | None) -> list[Markup]:
    """The part of the page, under `plots.style`."""
    if gallery is None or not gallery.tasks:
        return []
    parts = [
        templates.heading("Test images and what was predicted"),
        templates.paragraph(
            f"The first {len(gallery.scenes.images)} images of the {gallery.scenes.split} split, "
            "not chosen. Of several seeds the first is shown."
        ),
    ]
    for task, predictions in gallery.tasks.items():
        what = "boxes" if predictions[0].tool.boxes else "label maps"
        parts += [
            templates.heading(f"{task}: {what}", 3),
            templates.paragraph(_INTROS[what], "soft"),
        ]
        for image in gallery.scenes.images:
            panels = [_panel(gallery.scenes, image, e, what) for e in (None, *predictions)]
            parts.append(templates.panels(panels))
    return parts


def _panel(scenes: Scenes, image: TestImage, prediction: Prediction | None, what: str) -> Markup:
    """One image with the ground truth, or with what a condition predicts."""
    fig, axes = plots.panel(image.pixels)
    draw = _draw_boxes if what == "boxes" else _draw_labels
    note = draw(axes, scenes, image, prediction)
    label = prediction.label if prediction else "ground truth"
    alt = f"Image {image.name}, {what}, {label}: {note}."
    caption = Markup("{}<br>{}").format(label, note) if prediction else label
    return templates.figure(plots.to_png(fig), alt, caption)


def _draw_boxes(axes: Axes, scenes: Scenes, image: TestImage, prediction: Prediction | None) -> str:
    """Draw boxes, and return in words how many are right."""
    truth = image.boxes
    boxes, right = prediction.boxes(image) if prediction else (truth, [True] * len(truth))
    plots.draw_boxes(axes, image.pixels, boxes, right)
    if prediction is None:
        return f"{', '.join(truth.labels)}"
    return f"{sum(right)} of {len(truth)} found, {len(right) - sum(right)} wrong"


def _draw_labels(
    axes: Axes, scenes: Scenes, image: TestImage, prediction: Prediction | None
) -> str:
    """Draw a label map, and return in words how much of it is right."""
    truth = scenes.truth(image)
    labels = prediction.labels(image) if prediction else truth
    plots.draw_label_map(axes, image.pixels, labels, list(scenes.names.values()))
    objects = (truth > 0) | (labels > 0)
    right = 100 * float((truth == labels)[objects].mean()) if objects.any() else 100.0
    return f"{right:.0f} % of object pixels right"


def overview(gallery: Gallery, curves: Callable[[Axes, str], None]) -> bytes:
    """A PNG for a README: of each task its curves, and the first image with one source.

    That source is the one with the most conditions.

    Args:
        gallery: with at least one task and one image.
        curves: draws the curves of a task.
    """
    image = gallery.scenes.images[0]
    shown = {}
    for task, predictions in gallery.tasks.items():
        ((source, _),) = Counter(e.condition.source for e in predictions).most_common(1)
        shown[task] = [e for e in predictions if e.condition.source == source]
    columns = 3 + max(map(len, shown.values()))
    fig, axes = plots.figure(width=1.7 * columns, height=2.6 * len(shown))
    axes.remove()
    spec = fig.add_gridspec(len(shown), columns)
    for row, (task, predictions) in enumerate(shown.items()):
        axes = fig.add_subplot(spec[row, :2])
        curves(axes, task)
        axes.set_title(task, fontsize=10)
        draw = _draw_boxes if predictions[0].tool.boxes else _draw_labels
        for column, prediction in enumerate((None, *predictions), start=2):
            axes = fig.add_subplot(spec[row, column])
            draw(axes, gallery.scenes, image, prediction)
            title = prediction.label.split(": ", 1)[1] if prediction else "ground truth"
            axes.set_title(title, fontsize=9)
            axes.set_axis_off()
    return plots.to_png(fig, dpi=110)
