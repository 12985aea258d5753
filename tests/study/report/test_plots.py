"""What figures show that a reader would rely on."""

import math

import numpy as np
import pytest
from matplotlib.collections import LineCollection, PolyCollection

from lth_plugins.study.analyse.structure import KernelMap
from lth_plugins.study.report import plots
from lth_plugins.study.report.mask_plots import draw_kernels, draw_matrix
from lth_plugins.study.report.predictions import Boxes


def test_a_band_lies_around_its_curve() -> None:
    _, axes = plots.figure()
    curve = plots.Series("a", [1, 0.8], [50.0, 40.0], plots.BLUE, spread=[2.0, 3.0])
    plots.draw_curves(axes, [curve], "metric")
    (band,) = axes.findobj(PolyCollection)
    corners = {tuple(np.round(point, 6)) for point in band.get_paths()[0].vertices}
    assert {(100, 52), (100, 48), (80, 43), (80, 37)} <= corners


def test_a_single_point_has_whiskers_instead_of_a_band() -> None:
    _, axes = plots.figure()
    curve = plots.Series("a", [0.2], [50.0], plots.BLUE, spread=[2.0])
    plots.draw_curves(axes, [curve], "metric")
    (whisker,) = axes.findobj(LineCollection)
    assert whisker.get_segments()[0].tolist() == [[20, 48], [20, 52]]


def test_a_single_seed_has_no_band_but_a_point() -> None:
    _, axes = plots.figure()
    curve = plots.Series("a", [1], [50.0], plots.BLUE, spread=[math.nan])
    plots.draw_curves(axes, [curve], "metric")
    assert axes.get_lines()[0].get_xydata().tolist() == [[100, 50]]


def test_many_curves_get_shades_instead_of_running_out_of_colours() -> None:
    assert len(plots.looks(19)) == 19
    assert len({tuple(colour) for colour, _ in plots.looks(19)}) == 19
    assert len({marker for _, marker in plots.looks(7)}) == 7


def test_a_matrix_names_its_rows_or_if_large_its_groups() -> None:
    for count, names in ((2, ["a 0", "a 1", "b 0", "b 1"]), (30, ["a", "b"])):
        _, axes = plots.figure()
        labels = [(group, str(k)) for group in "ab" for k in range(count)]
        draw_matrix(axes, np.eye(2 * count), labels, "IoU", logarithmic=True)
        assert [text.get_text() for text in axes.get_xticklabels()] == names


def test_a_dead_kernel_is_bright_and_stages_are_marked() -> None:
    _, axes = plots.figure()
    dead = np.zeros(50, bool)
    dead[[0, 49]] = True
    draw_kernels(axes, KernelMap(dead, {"layer1": 0, "layer2": 20}))
    image = axes.get_images()[0]
    colours = image.cmap(image.norm(image.get_array()))[..., :3].sum(-1)
    assert colours[0, 0] > 2 * colours[1, 0]
    # 5 rows: 50 kernels fill 10 columns, and layer2 begins in the fifth of them.
    assert image.get_array().shape == (5, 10)
    assert {line.get_xdata()[0] for line in axes.get_lines()} == {3.5}
    assert [text.get_text() for text in axes.get_xticklabels()] == ["layer1", "layer2"]


@pytest.mark.parametrize("draw", [plots.to_svg, plots.to_pdf])
def test_the_same_figure_gives_the_same_bytes(draw) -> None:
    def made() -> bytes:
        with plots.style():
            fig, axes = plots.figure()
            plots.draw_sizes(axes, [plots.Series("a", [1e6, 1e7], [2, 1], plots.BLUE)], "metric")
            return draw(fig)

    assert made() == made()


def test_a_true_box_is_found_once_and_by_its_class() -> None:
    truth = Boxes(np.array([[0.0, 0, 10, 10], [20, 0, 10, 10]]), ("3", "5"), np.ones(2))
    predicted = Boxes(
        np.array([[1.0, 0, 10, 10], [0, 0, 10, 10], [20, 0, 10, 10], [24, 0, 10, 10]]),
        ("3", "3", "3", "5"),
        np.array([0.6, 0.9, 0.9, 0.9]),
    )
    assert plots.matched(predicted, truth) == [False, True, False, False]


def test_remaining_weights_are_labelled_as_in_the_paper() -> None:
    with plots.style():
        _, axes = plots.figure()
        series = [plots.Series("IMP", [0.8**k for k in range(9)], range(9), plots.BLUE)]
        plots.draw_curves(axes, series, "metric")
    labels = [text.get_text() for text in axes.get_xticklabels()]
    assert labels[:5] == ["100.00", "80.00", "64.00", "51.20", "40.96"]
    assert labels[-1] == "16.78"
    assert axes.get_xscale() == "log" and axes.xaxis_inverted()
