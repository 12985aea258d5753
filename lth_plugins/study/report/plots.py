"""Figures: curves over remaining weights, layer-wise densities, figures with predictions on them.

What masks look like is in `mask_plots`. Colours are Okabe and Ito's and Paul Tol's, which the
colour-blind can tell apart; what a colour says, a marker, a line style or a digit says, too.
Functions draw on axes that are given, under `style`; `to_svg`, `to_png` and `to_pdf` make files of
a figure. pyplot's global state is not used.
"""

import io
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, FixedLocator, NullFormatter, NullLocator
from matplotlib.transforms import BboxBase
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from lth_plugins.study.report.predictions import Boxes, LabelMap
from lth_plugins.ticket.arch import STAGES, part_of

BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
"""Of Okabe and Ito's palette."""

_CURVES = (BLUE, VERMILLION, GREEN, PURPLE, "#E69F00", "#56B4E9", "#000000")
LOOKS: Sequence[tuple[Any, str]] = tuple(zip(_CURVES, "osD^vPX", strict=True))
"""Colour and marker of the curves of a figure, in order: the same place, the same look."""

# Tol's "muted", which has nine, and Okabe and Ito's yellow.
LABEL_COLOURS = (
    *("#332288", "#88CCEE", "#44AA99", "#117733", "#999933"),
    *("#DDCC77", "#CC6677", "#882255", "#AA4499", "#F0E442", "#DDDDDD"),
)
BACKGROUND = "background"
"""The name of a class that is not drawn."""

_NAME: Any = {"fontsize": 7, "weight": "bold", "clip_on": True}  # of a box or a region
_MANY = 6  # boxes of an image, above which their names are smaller
_OPAQUE = 0.7  # how far the colour of a class covers the image
_NAMED = 0.002  # of the image: smaller regions would be hidden by their own name

STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same everywhere
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "lth_plugins",
    "svg.fonttype": "path",
}


def style() -> AbstractContextManager[None]:
    """While this is entered, figures are made, drawn and saved in `STYLE`."""
    return matplotlib.rc_context(STYLE)


@dataclass(frozen=True)
class Series:
    """A curve.

    Attributes:
        label: for the legend.
        x: where; fractions of the weights that remain in (0, 1], or what else the axis shows.
        values: one for each x; NaN leaves a gap.
        colour: of line and markers.
        marker: matplotlib's, a different one for each series of a figure.
        line: matplotlib's line style; "" draws markers alone.
        spread: half the width of a band around each value, such as the standard deviation of its
            seeds; NaN leaves a gap, and empty draws none.
    """

    label: str
    x: Sequence[float]
    values: Sequence[float]
    colour: str
    marker: str = "o"
    line: str = "-"
    spread: Sequence[float] = ()


def looks(count: int) -> Sequence[tuple[Any, str]]:
    """Colours and markers of a figure's curves: `LOOKS`, or, of many, shades and no markers."""
    if count <= len(LOOKS):
        return LOOKS[:count]
    shades = matplotlib.colormaps["cividis"](np.linspace(0, 0.95, count))
    return [(shade, "") for shade in shades]


def figure(width: float = 5.2, height: float = 3.9) -> tuple[Figure, Axes]:
    """A figure, sizes in inches, and its axes. By default its letters can be read on a phone."""
    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, fig.subplots()


def to_svg(fig: Figure) -> bytes:
    """The same figure gives the same bytes."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def to_png(fig: Figure, dpi: int = 180) -> bytes:
    """A PNG with a palette of 256 colours, which is a third of the size of one without."""
    fig.set_dpi(dpi)
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    buffer = io.BytesIO()
    # k-means, or rare colours, such as that of a thin box, are lost.
    image.quantize(256, kmeans=2).save(buffer, "png", optimize=True)
    return buffer.getvalue()


def to_pdf(fig: Figure) -> bytes:
    """For a paper; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="pdf", metadata={"CreationDate": None})
    return buffer.getvalue()


def draw_curves(
    axes: Axes,
    series: Sequence[Series],
    ylabel: str,
    reference: float | None = None,
    reference_spread: float = math.nan,
) -> None:
    """Metrics against remaining weights, from dense on the left to sparse on the right.

    Args:
        axes: to draw on.
        series: the curves.
        ylabel: the metric and its unit.
        reference: the dense network's value, a dashed line.
        reference_spread: half the width of a band around it.
    """
    if reference is not None and math.isfinite(reference):
        axes.axhline(reference, color=_GREY, linestyle="--", linewidth=1, label="dense")
        if math.isfinite(reference_spread):
            ends = reference - reference_spread, reference + reference_spread
            axes.axhspan(*ends, color=_GREY, alpha=_BAND, linewidth=0)
    _draw(axes, series, ylabel, scale=100)
    label_remaining_weights(axes, [d for s in series for d in s.x])


def draw_sizes(axes: Axes, series: Sequence[Series], ylabel: str) -> None:
    """Metrics against the number of remaining weights, a curve for each depth of network.

    As figure 9 of Chen et al., arXiv 2012.06908: is a large sparse network better than a small
    dense one of as many weights?
    """
    _draw(axes, series, ylabel)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("Remaining weights (number)")


def draw_strengths(axes: Axes, series: Sequence[Series], xlabel: str, ylabel: str) -> None:
    """Metrics against the strength of a perturbation."""
    _draw(axes, series, ylabel)
    axes.set_xlabel(xlabel)


_GREY = "#555555"
_BAND = 0.18  # opacity


def _draw(axes: Axes, series: Sequence[Series], ylabel: str, scale: float = 1) -> None:
    for s in series:
        x = [scale * position for position in s.x]
        look: dict[str, Any] = {"color": s.colour, "marker": s.marker, "linestyle": s.line}
        axes.plot(x, s.values, label=s.label, markersize=7, linewidth=1.8, **look)
        if len(x) == 1 and len(s.spread):  # a band would have no width
            axes.errorbar(x, s.values, s.spread, color=s.colour, capsize=4)
        elif len(s.spread):
            low, high = (np.add(s.values, sign * np.asarray(s.spread)) for sign in (-1, 1))
            axes.fill_between(x, low, high, color=s.colour, alpha=_BAND, linewidth=0)
    axes.set_ylabel(ylabel)
    if len(axes.get_lines()) > 1:
        axes.legend(fontsize=9)


def label_remaining_weights(axes: Axes, densities: Sequence[float]) -> None:
    """A logarithmic axis, 100 % on the left, labelled as in the paper: 100.00, 80.00, 64.00, …

    Args:
        axes: whose x axis.
        densities: what it must show, fractions.
    """
    rounds = math.ceil(math.log(min(densities)) / math.log(0.8) - 1e-6)
    step = math.ceil((rounds + 1) / 20)  # more than 20 labels would touch
    ticks = [100 * 0.8**k for k in range(0, rounds + 1, step)]
    axes.set_xscale("log")
    axes.set_xlim(107, 100 * min(densities) / 1.07)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    labels = [f"{tick:.2f}" for tick in ticks]
    axes.set_xticklabels(labels, fontsize=9, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_xlabel("Remaining weights (%)")


def draw_densities(axes: Axes, profiles: Mapping[str, Mapping[str, float]]) -> None:
    """Layer-wise densities of tickets, the layers in network order.

    Args:
        axes: to draw on.
        profiles: for each ticket, by its label, what `Masks.densities` returns.
    """
    names = list(next(iter(profiles.values())))
    for (label, densities), (colour, marker) in zip(
        profiles.items(), looks(len(profiles)), strict=True
    ):
        percent = [100 * densities[name] for name in names]
        axes.plot(percent, color=colour, marker=marker, label=label, markersize=5)
    for k, name in enumerate(names):
        if "downsample" in name:
            axes.axvspan(k - 0.4, k + 0.4, color="#e8e8e8", zorder=0)
    stages = [part_of(name) for name in names]
    starts = [stages.index(stage) for stage in STAGES]
    for start in starts[1:]:
        axes.axvline(start - 0.5, color="#888888", linewidth=0.8)
    ends = [*starts[1:], len(names)]
    axes.set_xticks([(a + b - 1) / 2 for a, b in zip(starts, ends, strict=True)], STAGES)
    axes.tick_params(axis="x", length=0)
    axes.grid(False, axis="x")
    axes.set_ylim(0, 105)
    axes.set_ylabel("Weights kept in the layer (%)")
    axes.set_xlabel("Convolutions in network order (shortcuts shaded)")
    columns = 2 if len(profiles) <= len(LOOKS) else 3
    axes.legend(fontsize=9, ncols=columns, loc="upper center", bbox_to_anchor=(0.5, -0.17))


def draw_boxes(axes: Axes, pixels: NDArray[np.uint8], boxes: Boxes, right: Sequence[bool]) -> None:
    """Boxes on an image: right ones blue, wrong ones vermillion and dashed.

    Args:
        axes: made by `panel`.
        pixels: [H, W, 3].
        boxes: to draw, with their labels.
        right: for each box, see `matched`.
    """
    axes.imshow(pixels, interpolation="nearest")
    for (x, y, width, height), label, good in zip(boxes.xywh, boxes.labels, right, strict=True):
        colour, line = (BLUE, "-") if good else (VERMILLION, (0, (3, 2)))
        # A white line below lets the box stand out from any background.
        for edge, thickness in (("white", 3.2), (colour, 1.8)):
            style = "-" if edge == "white" else line
            box = Rectangle((x - 0.5, y - 0.5), width, height, fill=False, edgecolor=edge)
            box.set(linewidth=thickness, linestyle=style)
            axes.add_patch(box)
        tag = {"boxstyle": "square,pad=0.15", "facecolor": colour, "edgecolor": "none"}
        name = {**_NAME, "fontsize": 5} if len(boxes) > _MANY else _NAME
        axes.text(x + 0.5, max(y, 3), label, va="center", color="white", bbox=tag, **name)


def draw_label_map(
    axes: Axes, pixels: NDArray[np.uint8], labels: LabelMap, names: Sequence[str]
) -> None:
    """A label map over a grey image that shows through, with names on regions, larger ones first.

    Args:
        axes: made by `panel`.
        pixels: [H, W, 3].
        labels: the map.
        names: of its values. `BACKGROUND` and values without a name stay grey.
    """
    grey = pixels.mean(2, keepdims=True) / 255
    image = np.broadcast_to(0.25 + 0.6 * grey, pixels.shape).copy()
    drawn = {value: name for value, name in enumerate(names) if name != BACKGROUND}
    for at, value in enumerate(drawn):
        colour = np.array(to_rgb(LABEL_COLOURS[at % len(LABEL_COLOURS)]))
        inside = labels == value
        image[inside] = _OPAQUE * colour + (1 - _OPAQUE) * grey[inside]
    axes.imshow(image, interpolation="nearest")
    named = []
    for value, name in drawn.items():
        regions, count = ndimage.label(labels == value, structure=np.ones((3, 3)))
        sizes = ndimage.sum_labels(labels == value, regions, range(1, count + 1))
        for region, size in enumerate(sizes, start=1):
            if size >= _NAMED * labels.size:
                y, x = ndimage.center_of_mass(regions == region)
                named.append((size, x, y, name))
    _write_names(axes, [(x, y, name) for _, x, y, name in sorted(named, reverse=True)])


def _write_names(axes: Axes, names: Sequence[tuple[float, float, str]]) -> None:
    """Write names at places of an image, moved inside it, as far as they cover no earlier one."""
    tag = {"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    axes.apply_aspect()
    whole = axes.get_window_extent()
    taken: list[BboxBase] = []
    for x, y, name in names:
        text = axes.text(x, y, name, ha="center", va="center", bbox=tag, **_NAME)
        size = text.get_window_extent().padded(2)
        right = max(whole.x0 - size.x0, 0) - max(size.x1 - whole.x1, 0)
        up = max(whole.y0 - size.y0, 0) - max(size.y1 - whole.y1, 0)
        at, to = axes.transData.transform((x, y)), axes.transData.inverted()
        text.set_position(tuple(to.transform((at[0] + right, at[1] + up))))
        size = size.translated(right, up)
        if any(size.overlaps(other) for other in taken):
            text.remove()
        else:
            taken.append(size)


def panel(pixels: NDArray[np.uint8]) -> tuple[Figure, Axes]:
    """A figure that shows an image at 74 pixels per inch, at most 3.6 inches wide, and its axes."""
    height, width = pixels.shape[:2]
    inches = min(0.0135, 3.6 / width)
    fig = Figure(figsize=(width * inches, height * inches))
    axes = fig.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    return fig, axes


def matched(predicted: Boxes, truth: Boxes) -> list[bool]:
    """Which predictions are right: the best scored first, each matches a true box of its class.

    Args:
        predicted: boxes with scores.
        truth: boxes of the same image; an intersection over union of 0.5 is enough.
    """
    free = set(range(len(truth)))
    right = [False] * len(predicted)
    for i in np.argsort(-predicted.scores, kind="stable"):
        same = [j for j in free if truth.labels[j] == predicted.labels[i]]
        overlaps = {j: _overlap(predicted.xywh[i], truth.xywh[j]) for j in same}
        best = max(overlaps, key=overlaps.__getitem__, default=None)
        if best is not None and overlaps[best] >= 0.5:
            right[int(i)] = True
            free.remove(best)
    return right


def _overlap(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Intersection over union of two boxes (left, top, width, height)."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    return float(shared / (a[2] * a[3] + b[2] * b[3] - shared)) if shared else 0.0
