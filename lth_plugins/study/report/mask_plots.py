"""Figures of masks: matrices of their similarities, and maps of their kernels."""

import math
from collections.abc import Sequence
from itertools import groupby, pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from numpy.typing import NDArray

from lth_plugins.study.analyse.structure import KernelMap

MOST_NAMES = 24
"""A larger matrix names its groups instead of its rows, which would be too small to read."""

_DOTS = ListedColormap(["#1b2a49", "#ffd23f"])  # dark: alive, bright: dead


def draw_matrix(
    axes: Axes,
    matrix: NDArray[np.float64],
    labels: Sequence[tuple[str, str]],
    what: str,
    logarithmic: bool = False,
) -> None:
    """A matrix of similarities, with a scale of colours.

    Args:
        axes: to draw on.
        matrix: [N, N].
        labels: [N], group and name of each row; rows of a group lie side by side.
        what: it shows, for the scale.
        logarithmic: whether the colours are; zeros look like the least positive value then.
    """
    norm = Normalize()
    if logarithmic:
        least, most = matrix[matrix > 0].min(), matrix.max()
        matrix, norm = np.maximum(matrix, least), LogNorm(least, max(most, 1.01 * least))
    image = axes.imshow(matrix, cmap="cividis", norm=norm, interpolation="none")
    scale = axes.figure.colorbar(image, ax=axes, label=what, shrink=0.8, format="%g")
    scale.ax.yaxis.set_minor_formatter("{x:g}")
    starts = [0]
    for _, rows in groupby(group for group, _ in labels):
        starts.append(starts[-1] + len(list(rows)))
    for start in starts[1:-1]:
        axes.axhline(start - 0.5, color="white", linewidth=1.5)
        axes.axvline(start - 0.5, color="white", linewidth=1.5)
    if len(labels) <= MOST_NAMES:
        places = [float(k) for k in range(len(labels))]
        names = [f"{group} {name}" for group, name in labels]
    else:
        places = [(a + b - 1) / 2 for a, b in pairwise(starts)]
        names = [labels[start][0] for start in starts[:-1]]
    axes.set_xticks(places, names, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(places, names, fontsize=8)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)


def draw_kernels(axes: Axes, kernels: KernelMap) -> None:
    """Every kernel a dot, column after column from the network's input to its output.

    Completely pruned kernels are bright. A line marks where a stage begins.
    """
    rows = math.ceil(math.sqrt(len(kernels.dead) / 2))
    columns = math.ceil(len(kernels.dead) / rows)
    # Beyond the last kernel there is none, which is neither: not drawn.
    dots = np.ma.masked_all(rows * columns)
    dots[: len(kernels.dead)] = kernels.dead
    axes.imshow(
        dots.reshape(columns, rows).T,
        cmap=_DOTS,
        norm=Normalize(0, 1),
        interpolation="none",
        aspect="auto",
    )
    places = [start / rows for start in kernels.starts.values()]
    for place in places[1:]:
        axes.axvline(place - 0.5, color="white", linewidth=2.4)
        axes.axvline(place - 0.5, color="#d55e00", linewidth=1.2)
    ends = [*places[1:], columns]
    centres = [(a + b) / 2 - 0.5 for a, b in zip(places, ends, strict=True)]
    axes.set_xticks(centres, kernels.starts)
    # Early stages are narrow: their names would touch.
    for k, label in enumerate(axes.get_xticklabels()):
        label.set(fontsize=8, va="top", y=-0.05 * (k % 2))
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.grid(False)
    axes.set_xlabel("from input to output")
