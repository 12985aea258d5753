"""The report holds all parts, needs nothing but itself, and says what is missing."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from lth_plugins.study.report.demo import Demo, write_report
from lth_plugins.study.run.results import Boxes, detectron2_metrics, mmengine_metrics
from PIL import Image

import lth_plugins as lth
from lth_plugins.study.report import plots, templates


class Reader(HTMLParser):
    """Collects a page's elements, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_the_report_has_all_parts(demo_report: Path, finished: Demo) -> None:
    read = Reader(demo_report.read_text())
    for part in (
        "Metrics against remaining weights",
        "Which layers keep their weights",
        "Boxes",
        "Masks",
        "What made each number",
        "Machine and versions",
        "Caveats",
    ):
        assert part in read.text
    # 3 curves, 1 figure of densities, and a scene: the truth, and what 6 and 4 variants predict.
    assert len(read.all("img")) == 4 + 7 + 5
    # Dense in both tasks, then the random mask.
    for value in ("41.2", "66.5", "31.5", "20.2", "64.00"):
        assert value in read.text
    assert "runs/<find_one>" in read.text
    assert "12 s (processor 20 s)" in read.text
    assert "layer4.1.conv2.weight" in read.text
    against = "one <way>: ticket, round 2, against random mask, round 2"
    assert f"{against}: AP +7.0, AP50 +6.0, mIoU +5.0" in read.text
    assert (
        "the other way: 97.0 % of the test digits right when dense, 95.0 % in round 2" in read.text
    )


def test_the_report_is_self_contained(demo_report: Path) -> None:
    html = demo_report.read_text()
    for tag, attributes in Reader(html).elements:
        assert tag not in ("script", "iframe", "object")
        for name in ("src", "href", "srcset", "data", "poster"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "url(" not in html and "@import" not in html
    assert not re.search(r"https?:", html)


def test_every_picture_tells_what_it_shows(demo_report: Path) -> None:
    for picture in Reader(demo_report.read_text()).all("img"):
        assert len(picture["alt"]) > 20


def test_text_is_escaped(demo_report: Path) -> None:
    html = demo_report.read_text()
    assert "one &lt;way&gt;: dense" in html
    assert "<way>" not in html and "<find_one>" not in html


def test_the_picture_for_the_readme_is_small(demo_report: Path) -> None:
    picture = demo_report.with_name("demo.png")
    assert picture.stat().st_size < 300_000
    with Image.open(picture) as image:
        assert image.width > 1000


def test_missing_detection_is_told_with_its_reason(finished: Demo, tmp_path: Path) -> None:
    why = "detectron2 is not installed (make detectron2 tries to)."
    demo = replace(finished, detect={}, left_out={"detection": why})
    write_report(demo, tmp_path / "report.html")
    read = Reader((tmp_path / "report.html").read_text())
    assert f"Detection is left out: {why}" in read.text
    assert "mIoU" in read.text and "AP50" not in read.text
    assert len(read.all("img")) == 3 + 5


def test_a_report_without_any_transfer_still_tells_of_the_tickets(
    finished: Demo, tmp_path: Path
) -> None:
    left_out = {"detection": "no detectron2.", "segmentation": "no mmseg."}
    write_report(replace(finished, detect={}, segment={}, left_out=left_out), tmp_path / "r.html")
    read = Reader((tmp_path / "r.html").read_text())
    assert "Segmentation is left out: no mmseg." in read.text
    assert len(read.all("img")) == 2


def test_a_detector_that_found_nothing_is_reported(finished: Demo, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "inference").mkdir(parents=True)
    (run / "metrics.json").write_text('{"bbox/AP": NaN, "bbox/AP50": NaN}\n')
    (run / "inference/coco_instances_results.json").write_text("[]")
    demo = replace(finished, detect={**finished.detect, "one_random_02": run})
    write_report(demo, tmp_path / "report.html")
    text = Reader((tmp_path / "report.html").read_text()).text
    assert "none" in text and "0 of 4 found, 0 wrong" in text and "nan" not in text


def test_results_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(lth.TicketError, match=r"metrics\.json, found no such file"):
        detectron2_metrics(tmp_path)
    with pytest.raises(lth.TicketError, match=r"scalars\.json, found none"):
        mmengine_metrics(tmp_path)
    (tmp_path / "metrics.json").write_text(json.dumps({"total_loss": 1.0}) + "\n")
    with pytest.raises(lth.TicketError, match=r"expected bbox/AP in .*metrics\.json"):
        detectron2_metrics(tmp_path)


def test_of_several_evaluations_the_last_counts(tmp_path: Path) -> None:
    for time, value in (("20260101_000000", 1.0), ("20260102_000000", 2.0)):
        folder = tmp_path / time / "vis_data"
        folder.mkdir(parents=True)
        lines = [{"mIoU": 0.0}, {"mIoU": value}, {"loss": 0.5}]
        (folder / "scalars.json").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert mmengine_metrics(tmp_path)["mIoU"] == 2.0


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


def test_figures_are_drawn_alike_each_time() -> None:
    def draw() -> bytes:
        with plots.style():
            fig, axes = plots.figure()
            plots.draw_curves(axes, [plots.Series("a", [1, 0.8], [2, 1], plots.BLUE)], "metric")
            return plots.to_svg(fig)

    assert draw() == draw()


def test_a_table_keeps_text_as_text() -> None:
    assert "&lt;b&gt;" in templates.table(["<b>"], [["<i>", 1]])
    assert "&lt;i&gt;" in templates.table(["<b>"], [["<i>", 1]])
