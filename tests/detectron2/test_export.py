"""Whole detectors in ONNX: onnxruntime finds in digit scenes what PyTorch finds."""

import logging
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, get_detection_dataset_dicts
from detectron2.modeling import build_model

import lth_plugins.detectron2 as plugin
from lth_plugins import TicketError
from lth_plugins.deploy.onnx import TOLERANCE


@pytest.mark.parametrize("kind", ["fpn", "mask_rcnn", "retinanet"])
def test_onnxruntime_finds_what_pytorch_finds(
    kind: str, tiny_cfg: Callable[..., CfgNode], tmp_path: Path
) -> None:
    # Far from the threshold, so that what a new network finds does not hang on the last bit.
    cfg = tiny_cfg(kind, {"MODEL.RETINANET.SCORE_THRESH_TEST": 0.05})
    plugin.apply_ticket_input(cfg)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    if kind == "retinanet":
        with torch.no_grad():
            model.head.cls_score.weight.mul_(100)
    mapper = DatasetMapper(cfg, is_train=False)
    scenes = [mapper(scene)["image"] for scene in get_detection_dataset_dicts(cfg.DATASETS.TEST)]
    sizes = [scenes[0], scenes[1][:, :48], scenes[2][:, :, :48]]
    assert plugin.export_onnx(model, sizes, tmp_path / "model.onnx") <= TOLERANCE

    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    names = [entry.name for entry in session.get_outputs()]
    found = dict(zip(names, session.run(None, {"image": scenes[3].float().numpy()}), strict=True))
    instances = model([{"image": scenes[3]}])[0]["instances"]
    assert len(instances) > 0
    boxes = torch.from_numpy(found["pred_boxes"])
    torch.testing.assert_close(boxes, instances.pred_boxes.tensor, rtol=0, atol=1e-2)
    assert found["pred_classes"].tolist() == instances.pred_classes.tolist()
    assert found["scores"] == pytest.approx(instances.scores.detach().numpy(), abs=1e-5)
    assert ("pred_masks" in names) == (kind == "mask_rcnn")


def test_a_detector_that_finds_nothing_is_exported_with_a_warning(
    tiny_cfg: Callable[..., CfgNode],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # detectron2's set-up of logs, by another test, keeps them from here
    monkeypatch.setattr(logging.getLogger("lth_plugins"), "propagate", True)
    cfg = tiny_cfg("fpn", {"MODEL.ROI_HEADS.SCORE_THRESH_TEST": 1.0})
    plugin.apply_ticket_input(cfg)
    model = build_model(cfg).eval()
    scene = DatasetMapper(cfg, is_train=False)(get_detection_dataset_dicts(cfg.DATASETS.TEST)[0])
    plugin.export_onnx(model, [scene["image"]], tmp_path / "model.onnx")
    assert "finds no object in any of the 1 images" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_what_is_no_detector_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TicketError, match="expected an R-CNN or a dense detector, found a Linear"):
        plugin.export_onnx(torch.nn.Linear(1, 1), [torch.zeros(3, 8, 8)], tmp_path / "a.onnx")
    assert not any(tmp_path.iterdir())
