"""The report of ``make demo``: what came out, as one HTML file, and a picture for the README."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from lth_plugins.pruning.search.imp import round_path
from lth_plugins.study.report import environment, plots, templates
from lth_plugins.study.run.results import (
    BackgroundFirst,
    Boxes,
    Metrics,
    Picture,
    category_names,
    coco_detections,
    detectron2_metrics,
    find_metrics,
    mmengine_metrics,
    read_label_map,
    read_pictures,
)
from lth_plugins.study.run.steps import Record, command_line
from lth_plugins.ticket import Masks, Ticket

SCORE = 0.5  # boxes below are not drawn

LOOKS = ((plots.BLUE, "o"), (plots.GREEN, "s"), (plots.PURPLE, "D"))
"""Colour and marker of each source."""


@dataclass(frozen=True)
class Source:
    """A pre-training that tickets were found in.

    Attributes:
        name: for folders.
        label: for people.
        config: of ``tools/find_ticket.py``.
        folder: of the pre-training and IMP.
    """

    name: str
    label: str
    config: Path
    folder: Path

    @cached_property
    def rounds(self) -> list[dict[str, Any]]:
        """What IMP measured in each round."""
        return find_metrics(self.folder)

    def accuracy(self, line: Mapping[str, Any]) -> float:
        """Of one round, on test digits, in percent: the classifier's, or that of neighbours."""
        return 100 * line["val_top1" if "val_top1" in line else "val_knn_top1"]

    @property
    def judge(self) -> str:
        """Whose accuracy `accuracy` is."""
        return "top-1" if "val_top1" in self.rounds[0] else "nearest neighbours"


@dataclass(frozen=True)
class Variant:
    """What is transferred: a ticket, or a random mask of its layer-wise densities.

    Attributes:
        source: where it was found.
        round: of IMP; 0 is dense.
        random: whether it is a random mask of that round's layer-wise densities.
    """

    source: Source
    round: int
    random: bool = False

    @property
    def name(self) -> str:
        """For folders."""
        return f"{self.source.name}_{'random' if self.random else 'round'}_{self.round:02d}"

    @property
    def kind(self) -> str:
        """For people, of variants of one source."""
        if self.random:
            return f"random mask, round {self.round}"
        return f"ticket, round {self.round}" if self.round else "dense"

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.source.label}: {self.kind}"

    @property
    def ticket(self) -> Path:
        return round_path(self.source.folder, self.round)

    @property
    def weights(self) -> Path | None:
        """Of a random mask: the dense ticket, for it keeps weights that its ticket lacks."""
        return round_path(self.source.folder, 0) if self.random else None

    @cached_property
    def masks(self) -> Masks:
        """The ticket's; a random mask has the same densities."""
        return Ticket.load(self.ticket).masks


@dataclass(frozen=True)
class Demo:
    """Where everything lies that the report tells of.

    Attributes:
        title: of the report.
        scenes: folder of the digit scenes.
        variants: what was transferred; of each source the dense network first.
        detect: folders of the detectron2 runs, by the names of their variants; empty if left out.
        segment: folders of the mmseg runs; empty if left out.
        left_out: why, for each of "detection" and "segmentation" that was.
        pictures: how many test scenes to show.
        records: the steps that were run, by name, in order.
    """

    title: str
    scenes: Path
    variants: Sequence[Variant]
    detect: Mapping[str, Path]
    segment: Mapping[str, Path]
    left_out: Mapping[str, str]
    pictures: int
    records: Mapping[str, Record] = field(default_factory=dict)

    @property
    def sources(self) -> list[Source]:
        return list(dict.fromkeys(v.source for v in self.variants))

    def of(self, source: Source, random: bool | None = None) -> list[Variant]:
        """A source's variants: all, the random masks or the others."""
        found = [v for v in self.variants if v.source == source]
        return [v for v in found if random is None or v.random == random]

    def among(self, runs: Mapping[str, Any]) -> list[Variant]:
        """The variants that there is a run of."""
        return [v for v in self.variants if v.name in runs]

    @cached_property
    def detection(self) -> dict[str, Metrics]:
        return {name: detectron2_metrics(folder) for name, folder in self.detect.items()}

    @cached_property
    def segmentation(self) -> dict[str, Metrics]:
        return {name: mmengine_metrics(folder) for name, folder in self.segment.items()}

    @cached_property
    def test_pictures(self) -> list[Picture]:
        return read_pictures(self.scenes, "test", self.pictures)

    @cached_property
    def names(self) -> dict[int, str]:
        """Names of the digits' categories, by id."""
        return category_names(self.scenes, "test")

    @cached_property
    def detections(self) -> dict[str, dict[int, Boxes]]:
        """Predicted boxes by variant and picture."""
        file = Path("inference", "coco_instances_results.json")
        return {v: coco_detections(run / file, self.names) for v, run in self.detect.items()}

    @property
    def predictions(self) -> dict[str, Path]:
        """Folder of predicted label maps of each variant; the segmentation's command names it."""
        return {name: folder / "predictions" for name, folder in self.segment.items()}

    @property
    def shown_metrics(self) -> list[tuple[str, Mapping[str, Metrics], str]]:
        """Name for people, values by variant, and key of each metric that there is."""
        shown: list[tuple[str, Mapping[str, Metrics], str]] = []
        if self.detect:
            shown += [("AP", self.detection, "bbox/AP"), ("AP50", self.detection, "bbox/AP50")]
        if self.segment:
            shown += [("mIoU", self.segmentation, "mIoU")]
        return shown

    @property
    def cpu_minutes(self) -> float:
        """Processor time of all steps together."""
        return sum(record.cpu_seconds for record in self.records.values()) / 60


def write_report(demo: Demo, path: Path) -> None:
    """Write the report to ``path`` and a picture of the results beside it, ``demo.png``.

    Raises:
        TicketError: if a run's results are not there.
    """
    sections = [_summary, _curves, _densities, _samples, _commands, _machine, _caveats]
    with plots.style():
        body = [part for section in sections for part in section(demo)]
        path.write_text(templates.page(demo.title, body), encoding="utf-8")
        if demo.shown_metrics:
            path.with_name("demo.png").write_bytes(_picture(demo))


def _summary(demo: Demo) -> list[Markup]:
    parts = [
        templates.heading(demo.title, 1),
        templates.paragraph(
            f"A ResNet-18 is pre-trained on handwritten digits, {_listed(demo.sources)}; iterative "
            "magnitude pruning (IMP) finds tickets in each, sparse sub-networks with their "
            "pre-trained weights. Some are then the backbone of a stock detector and a stock "
            "segmentor, trained on scenes full of digits. Does a ticket transfer like its dense "
            "network, and better than a random mask that is as sparse in every layer?"
        ),
    ]
    parts += [
        templates.paragraph(f"{task.capitalize()} is left out: {reason}", "note")
        for task, reason in demo.left_out.items()
    ]
    shown = demo.shown_metrics
    if shown:
        rows = [
            [
                v.label,
                f"{100 * v.masks.density:.2f}",
                *(_number(of[v.name][k]) if v.name in of else "" for _, of, k in shown),
            ]
            for v in demo.variants
        ]
        header = ["Backbone", "Weights left (%)", *(metric for metric, _, _ in shown)]
        caption = "On the test scenes, each metric from 0 to 100; empty where nothing was trained."
        parts.append(templates.table(header, rows, caption))
    parts.append(templates.bullets(_findings(demo)))
    parts.append(
        templates.paragraph(
            "One seed and tiny data: differences of a few points say nothing (see the caveats). "
            f"All steps together took {demo.cpu_minutes:.1f} minutes of one core.",
            "note",
        )
    )
    return parts


def _listed(sources: Sequence[Source]) -> str:
    *rest, last = [source.label for source in sources]
    return f"{', '.join(rest)} and {last}" if rest else last


def _findings(demo: Demo) -> list[str]:
    findings = []
    for source in demo.sources:
        first, last = source.rounds[0], source.rounds[-1]
        findings.append(
            f"Pre-training, {source.label}: {source.accuracy(first):.1f} % of the test digits "
            f"right when dense, {source.accuracy(last):.1f} % in round {last['round']}, with "
            f"{100 * last['density']:.1f} % of the weights ({source.judge})."
        )
    for source in demo.sources:
        tickets = {v.round: v for v in demo.of(source, random=False)}
        pairs = [(tickets[v.round], v) for v in demo.of(source, random=True)]
        pairs += [(v, tickets[0]) for v in tickets.values() if v.round]
        for one, other in pairs:
            differences = [
                f"{metric} {of[one.name][key] - of[other.name][key]:+.1f}"
                for metric, of, key in demo.shown_metrics
                if {one.name, other.name} <= of.keys()
                and math.isfinite(of[one.name][key] + of[other.name][key])
            ]
            if differences:
                findings.append(f"{one.label}, against {other.kind}: {', '.join(differences)}.")
    return findings


def _curves(demo: Demo) -> list[Markup]:
    fig, axes = plots.figure()
    series, told = [], []
    for source, (colour, marker) in zip(demo.sources, LOOKS, strict=False):
        densities = [line["density"] for line in source.rounds]
        values = [source.accuracy(line) for line in source.rounds]
        label = f"{source.label} ({source.judge})"
        series.append(plots.Series(label, densities, values, colour, marker))
        pairs = zip(densities, values, strict=True)
        told.append(f"{label}: " + ", ".join(f"{100 * d:.1f} %: {t:.1f}" for d, t in pairs))
    plots.draw_curves(axes, series, "Test accuracy (%)")
    axes.set_title("Pre-training: digits")
    pictures = [
        templates.picture(
            plots.to_svg(fig),
            f"Curves of the accuracy on test digits against remaining weights. {'. '.join(told)}.",
            "After training each round's ticket on the pre-training task. Without labels, a digit "
            "is what its nearest neighbours in feature space are.",
        )
    ]
    for title, draw, caption in _transfer_curves(demo):
        fig, axes = plots.figure()
        alt = draw(axes)
        axes.set_title(title)
        pictures.append(templates.picture(plots.to_svg(fig), alt, caption))
    return [
        templates.heading("Metrics against remaining weights"),
        templates.paragraph(
            "From dense on the left to sparse on the right; each round of IMP keeps 80 % of what "
            "was left. A random mask has the layer-wise densities of the ticket of its round, in "
            "other places, over the same pre-trained weights."
        ),
        templates.figures(pictures),
        templates.details(
            "Rounds of IMP as a table",
            templates.table(
                ["Pre-training", "Round", "Weights left (%)", "Accuracy (%)", "Training (s)"],
                [
                    [
                        source.label,
                        str(line["round"]),
                        f"{100 * line['density']:.2f}",
                        f"{source.accuracy(line):.2f}",
                        f"{line['seconds']:.1f}",
                    ]
                    for source in demo.sources
                    for line in source.rounds
                ],
                "Pre-training, on test digits. Round 0 is the dense network.",
            ),
        ),
    ]


def _transfer_curves(demo: Demo) -> list[tuple[str, Callable[[Any], str], str]]:
    """Title, drawing function (which returns the text for the blind) and caption of each task."""
    curves: list[tuple[str, Callable[[Any], str], str]] = []
    if demo.detect:
        caption = "Box average precision, COCO's: mean over IoU 0.50 to 0.95."
        draw = _curve(demo, demo.detection, "bbox/AP", "Average precision (AP)")
        curves.append(("Detection: Faster R-CNN R18-FPN", draw, caption))
    if demo.segment:
        caption = "Intersection over union, mean over the background and ten digits."
        draw = _curve(demo, demo.segmentation, "mIoU", "mIoU (%)")
        curves.append(("Segmentation: FCN R18", draw, caption))
    return curves


def _curve(
    demo: Demo, values: Mapping[str, Metrics], key: str, ylabel: str
) -> Callable[[Any], str]:
    def draw(axes: Any) -> str:
        series = []
        for source, (colour, marker) in zip(demo.sources, LOOKS, strict=False):
            for random in (False, True):
                of = [v for v in demo.of(source, random) if v.name in values]
                x, y = [v.masks.density for v in of], [values[v.name][key] for v in of]
                label = f"{source.label}, random mask" if random else source.label
                look = (plots.VERMILLION, "X", "") if random else (colour, marker, "-")
                if of:
                    series.append(plots.Series(label, x, y, *look))
        plots.draw_curves(axes, series, ylabel)
        axes.set_ylim(bottom=0)
        told = "; ".join(
            f"{v.label} ({100 * v.masks.density:.1f} % remain): {_number(values[v.name][key])}"
            for v in demo.among(values)
        )
        return f"Curves of {ylabel} against remaining weights. {told}."

    return draw


def _densities(demo: Demo) -> list[Markup]:
    tickets = [v for v in demo.variants if not v.random and v.masks.density < 1]
    profiles = {v.label: v.masks.densities() for v in tickets}
    fig, axes = plots.figure(width=5.6)
    plots.draw_densities(axes, profiles)
    names = list(next(iter(profiles.values())))
    rows = [
        [templates.code(name), *(f"{100 * d[name]:.2f}" for d in profiles.values())]
        for name in names
    ]
    extremes = "; ".join(
        f"{label}: most {100 * max(d.values()):.0f} %, least {100 * min(d.values()):.0f} %"
        for label, d in profiles.items()
    )
    return [
        templates.heading("Which layers keep their weights"),
        templates.paragraph(
            "IMP ranks all weights together, so it decides how dense each layer stays."
        ),
        templates.picture(
            plots.to_svg(fig),
            f"Layer-wise densities of the tickets, layers in network order. {extremes}. "
            "All values are in the table below.",
            "The stem, normalisation and heads are never pruned. The random mask has the densities "
            "of its ticket.",
        ),
        templates.details(
            "Densities as a table",
            templates.table(["Convolution", *profiles], rows, "Weights kept in each layer (%)."),
        ),
    ]


def _samples(demo: Demo) -> list[Markup]:
    parts = [
        templates.heading("Test scenes and what was predicted"),
        templates.paragraph(
            f"The first {len(demo.test_pictures)} scenes of the test split, not chosen. Neither "
            "the pre-training nor the training scenes hold their digits."
        ),
    ]
    if demo.detect:
        parts += [
            templates.heading("Boxes", 3),
            templates.paragraph(
                f"Predictions with a score of at least {SCORE}. Solid blue: right, that is, the "
                "right digit with an IoU of at least 0.5. Dashed vermillion: wrong.",
                "soft",
            ),
        ]
        parts += [_box_panels(demo, picture) for picture in demo.test_pictures]
    if demo.segment:
        parts += [
            templates.heading("Masks", 3),
            templates.paragraph(
                "Each digit has its colour, and larger regions their digit.", "soft"
            ),
        ]
        parts += [_mask_panels(demo, picture) for picture in demo.test_pictures]
    return parts


def _box_panels(demo: Demo, picture: Picture) -> Markup:
    fig, axes = plots.panel(picture.pixels)
    truth = picture.boxes
    plots.draw_boxes(axes, picture.pixels, truth, [True] * len(truth))
    alt = f"Scene {picture.name}, ground truth: digits {', '.join(truth.labels)}."
    shown = [templates.picture(plots.to_png(fig), alt, "ground truth")]
    for variant in demo.among(demo.detect):
        boxes, right = _predicted_boxes(demo, variant, picture)
        fig, axes = plots.panel(picture.pixels)
        plots.draw_boxes(axes, picture.pixels, boxes, right)
        found = f"{sum(right)} of {len(truth)} found, {len(right) - sum(right)} wrong"
        alt = f"Scene {picture.name}, boxes predicted by {variant.label}: {found}."
        caption = Markup("{}<br>{}").format(variant.label, found)
        shown.append(templates.picture(plots.to_png(fig), alt, caption))
    return templates.panels(shown)


def _predicted_boxes(demo: Demo, variant: Variant, picture: Picture) -> tuple[Boxes, list[bool]]:
    """The boxes to draw, and whether each is right."""
    nothing = Boxes(np.zeros((0, 4)), (), np.zeros(0))
    boxes = demo.detections[variant.name].get(picture.id, nothing).at_least(SCORE)
    return boxes, plots.matched(boxes, picture.boxes)


def _mask_panels(demo: Demo, picture: Picture) -> Markup:
    maps = {"ground truth": _true_labels(demo, picture)}
    maps |= {v.label: _predicted_labels(demo, v, picture) for v in demo.among(demo.segment)}
    truth = maps["ground truth"]
    shown = []
    for label, labels in maps.items():
        fig, axes = plots.panel(picture.pixels)
        plots.draw_label_map(axes, picture.pixels, labels, list(demo.names.values()))
        of_digits = (truth > 0) | (labels > 0)
        right = 100 * float((truth == labels)[of_digits].mean()) if of_digits.any() else 100.0
        note = "" if label == "ground truth" else f"{right:.0f} % of digit pixels right"
        alt = f"Scene {picture.name}, digits' pixels, {label}. {note}".strip()
        caption = Markup("{}<br>{}").format(label, note) if note else label
        shown.append(templates.picture(plots.to_png(fig), alt, caption))
    return templates.panels(shown)


def _true_labels(demo: Demo, picture: Picture) -> BackgroundFirst:
    return read_label_map(demo.scenes / "labels" / "test" / f"{picture.name}.png")


def _predicted_labels(demo: Demo, variant: Variant, picture: Picture) -> BackgroundFirst:
    return read_label_map(demo.predictions[variant.name] / f"{picture.name}.png")


def _commands(demo: Demo) -> list[Markup]:
    parts = [
        templates.heading("What made each number"),
        templates.paragraph(
            "The commands that were run, as many side by side as the machine has cores, each with "
            "one thread (OMP_NUM_THREADS=1); each can be typed in the repository's root. Time is "
            "wall time; processor time is what other work on the machine does not stretch."
        ),
    ]
    for record in demo.records.values():
        again = f", {record.attempts} attempts" if record.attempts > 1 else ""
        earlier = "" if record.ran else " Done by an earlier run of the demo."
        parts.append(
            Markup('<div class="step">{}{}{}</div>').format(
                templates.heading(record.step.title, 3),
                templates.command(command_line(record.step.command)),
                templates.paragraph(
                    Markup("{:.0f} s (processor {:.0f} s{}). Log: {}.{}").format(
                        *(record.seconds, record.cpu_seconds, again, templates.code(record.log)),
                        earlier,
                    ),
                    "soft",
                ),
            )
        )
    return [*parts, templates.paragraph(f"Together: {demo.cpu_minutes:.1f} minutes of one core.")]


def _machine(demo: Demo) -> list[Markup]:
    return [
        templates.heading("Machine and versions"),
        templates.table(["What", "Which"], environment.facts().items()),
    ]


def _caveats(demo: Demo) -> list[Markup]:
    return [
        templates.heading("Caveats"),
        templates.bullets(
            [
                "One seed. Another one may move a metric by some points, and turn small "
                "differences round. This demo shows that everything works together; whether a "
                "ticket is matching takes several seeds and a test.",
                "Tiny data: 1,442 digits of 8 x 8 pixels to pre-train on and a few hundred scenes "
                "to transfer to. Nothing here carries over to ImageNet, COCO or Cityscapes.",
                "An easy transfer: pre-training and training scenes draw the same scans, though "
                "test scenes draw others.",
                "Short training: minutes on a CPU. Longer training may bring the variants closer "
                "together, or apart.",
                "A ResNet-18 is far larger than this task needs, so these sparsities may not yet "
                "hurt. The paper goes to 1.80 % of a ResNet-50.",
                "Sparse here means zeros in dense tensors: nothing ran faster for it.",
            ]
        ),
    ]


def _picture(demo: Demo) -> bytes:
    """The README's picture: the curves of the tasks, and a scene with the first source's."""
    tasks = _transfer_curves(demo)
    drawings = {
        "Detection": _draw_scene_boxes,
        "Segmentation": _draw_scene_masks,
    }
    shown = [None, *demo.of(demo.sources[0])]
    fig, axes = plots.figure(width=12, height=2.6 * len(tasks))
    axes.remove()
    spec = fig.add_gridspec(len(tasks), len(shown) + 2)
    for row, (title, draw, _) in enumerate(tasks):
        axes = fig.add_subplot(spec[row, :2])
        draw(axes)
        axes.set_title(title, fontsize=10)
        for column, variant in enumerate(shown):
            axes = fig.add_subplot(spec[row, 2 + column])
            drawings[title.split(":")[0]](demo, axes, variant)
            axes.set_title(variant.kind if variant else "ground truth", fontsize=9)
            axes.set_axis_off()
    return plots.to_png(fig, dpi=110)


def _draw_scene_boxes(demo: Demo, axes: Any, variant: Variant | None) -> None:
    picture = demo.test_pictures[0]
    boxes, right = picture.boxes, [True] * len(picture.boxes)
    if variant is not None:
        boxes, right = _predicted_boxes(demo, variant, picture)
    plots.draw_boxes(axes, picture.pixels, boxes, right)


def _draw_scene_masks(demo: Demo, axes: Any, variant: Variant | None) -> None:
    picture = demo.test_pictures[0]
    labels: NDArray[np.uint8] = _true_labels(demo, picture)
    if variant is not None:
        labels = _predicted_labels(demo, variant, picture)
    plots.draw_label_map(axes, picture.pixels, labels, list(demo.names.values()))


def _number(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "none"
