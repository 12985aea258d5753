"""The gallery, the searches and the texts of a report such as that of ``make demo``."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lth_plugins.study.report import plots, searches
from lth_plugins.study.report.assets import Assets
from lth_plugins.study.report.study import write_study_report
from tests.study.reader import Reader


def test_the_report_of_a_demo_has_all_parts(demo_report: Path) -> None:
    read = Reader(demo_report)
    for part in (
        "It shows all.",
        "Pre-training and its rounds",
        "Metrics against remaining weights",
        "Layer-wise densities",
        "det: boxes",
        "seg: label maps",
        "of object pixels right",
        "10 trainings: 10 done",
        "What is done took 12.0 minutes of one core.",
        "Environment and versions",
        "Caveats",
        "One seed.",
    ):
        assert part in read.text
    # Of one image the truth, and what 6 and 4 conditions predict.
    panels = [image for image in read.all("img") if image["alt"].startswith("Image ")]
    assert len(panels) == (1 + 6) + (1 + 4)
    assert any("one: random mask, round 2: " in image["alt"] for image in panels)
    assert "one (top-1): 97.0 dense, 95.0 at 64.00 %" in " ".join(i["alt"] for i in read.all("img"))
    rows = json.loads((demo_report.parent / "tables/searches.json").read_text())["rows"]
    assert [(r["source"], r["round"], r["accuracy"]) for r in rows if r["round"] == 2] == [
        ("one", 2, 95.0),
        ("other", 2, 95.0),
    ]


def test_the_image_for_the_readme_is_small(demo_report: Path) -> None:
    path = demo_report.with_name("overview.png")
    assert path.stat().st_size < 300_000
    with Image.open(path) as image:
        assert image.width > 1000


def test_every_source_has_a_curve(tmp_path: Path) -> None:
    """However many there are: the demo once dropped a fourth."""
    rounds = [{"round": k, "density": 0.8**k, "val_top1": 0.9, "seconds": 1.0} for k in range(2)]
    names = [f"source{k}" for k in range(9)]
    with plots.style():
        parts = searches.sections(dict.fromkeys(names, rounds), Assets(tmp_path / "report.html"))
    (tmp_path / "page.html").write_text("".join(parts))
    (image,) = Reader(tmp_path / "page.html").all("img")
    assert all(f"{name} (top-1)" in image["alt"] for name in names)


@pytest.fixture
def copied(demo: Any, tmp_path: Path) -> Path:
    shutil.copytree(demo.folder, tmp_path / "demo")
    return tmp_path / "demo"


def test_predictions_that_are_empty_or_missing_are_told(copied: Path, tmp_path: Path) -> None:
    results = copied / "runs/det-one-resnet18-r02-random-0-s0/inference"
    (results / "coco_instances_results.json").write_text("[]")
    shutil.rmtree(copied / "runs/seg-one-resnet18-r00-dense-0-s0/predictions")
    (copied / "runs/find-other-resnet18/metrics.jsonl").unlink()
    read = Reader(write_study_report(copied, tmp_path / "report.html"))
    assert "0 of 4 found, 0 wrong" in read.text
    assert "predictions of seg, one, dense are not shown" in read.first_lines
    assert "the rounds of other are not shown" in read.first_lines


def test_images_that_are_missing_are_told(copied: Path, tmp_path: Path) -> None:
    plan = copied / "plan.json"
    plan.write_text(plan.read_text().replace("/images/test", "/nowhere"))
    read = Reader(write_study_report(copied, tmp_path / "report.html"))
    for task in ("det", "seg"):
        assert f"test images of {task} are not shown" in read.first_lines
    assert not (tmp_path / "overview.png").exists()
