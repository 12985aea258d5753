"""Metrics are read from what the frameworks leave."""

import json
from pathlib import Path

import pytest

from lth_plugins.errors import RunError
from lth_plugins.study.plan.metrics import detectron2_metrics, mmengine_metrics


def test_results_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"metrics\.json, found no such file"):
        detectron2_metrics(tmp_path)
    with pytest.raises(RunError, match=r"scalars\.json, found none"):
        mmengine_metrics(tmp_path)
    (tmp_path / "metrics.json").write_text(json.dumps({"total_loss": 1.0}) + "\n")
    with pytest.raises(RunError, match=r"expected bbox/AP in .*metrics\.json"):
        detectron2_metrics(tmp_path)


def test_of_several_evaluations_the_last_counts(tmp_path: Path) -> None:
    for time, value in (("20260101_000000", 1.0), ("20260102_000000", 2.0)):
        folder = tmp_path / time / "vis_data"
        folder.mkdir(parents=True)
        lines = [{"mIoU": 0.0}, {"mIoU": value}, {"loss": 0.5}]
        (folder / "scalars.json").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert mmengine_metrics(tmp_path)["mIoU"] == 2.0
