"""Compacted detectors: the same detections on digit scenes, from a file that has their widths."""

import json
import resource
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, get_detection_dataset_dicts
from detectron2.modeling import build_model

import lth_plugins as lth
import lth_plugins.detectron2 as plugin
from lth_plugins.deploy.onnx import resnet
from lth_plugins.pruning.structure import Channels, structured
from lth_plugins.ticket.foreign.checkpoints import read_checkpoint


def save_channels(dense: lth.Ticket, folder: Path) -> Path:
    """The file of a channel ticket at three tenths of the weights."""
    ticket = structured(dense, Channels(density=0.3, multiple=8))
    return ticket.save(folder / "channels.ticket")


def detections(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "inference/coco_instances_results.json").read_text())


def test_train_det_compacts_a_detector_and_evaluates_it_from_its_file(
    train_det: ModuleType,
    command: Callable[..., Namespace],
    r18_dense: Path,
    tmp_path: Path,
) -> None:
    ticket = save_channels(lth.Ticket.load(r18_dense), tmp_path)
    options = {"MODEL.TICKET.PATH": ticket, "SOLVER.MAX_ITER": 1}
    train_det.main(command("fpn", options=options))
    out = tmp_path / "out"
    masked = detections(out)
    options["MODEL.WEIGHTS"] = out / "model_final.pth"
    (out / "compact.pth").write_bytes(b"older")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limit[1]))
    try:
        with pytest.raises(lth.LthError, match="File too large: make room"):
            train_det.main(command("fpn", "--eval-only", "--compact", options=options))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (out / "compact.pth").read_bytes() == b"older"
    train_det.main(command("fpn", "--eval-only", "--compact", "--onnx", options=options))
    compacted = detections(out)
    options["MODEL.WEIGHTS"] = out / "compact.pth"
    train_det.main(command("fpn", "--eval-only", options=options))
    assert detections(out) == compacted

    assert masked and len(compacted) == len(masked)
    for one, other in zip(masked, compacted, strict=True):
        assert one["category_id"] == other["category_id"]
        assert one["bbox"] == pytest.approx(other["bbox"], abs=1e-2)
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)
    sizes = [(out / name).stat().st_size for name in ("compact.pth", "model_final.pth")]
    assert sizes[0] < 0.5 * sizes[1]
    # What tools/ticket.py export reads of it.
    trunk = lth.compact(resnet(read_checkpoint(out / "model_final.pth")))
    assert trunk.layer4[1].conv1.out_channels < 512
    assert (out / "last_checkpoint").read_text() == "model_final.pth"


def test_the_stage_in_the_roi_heads_of_a_c4_model_is_compacted_too(
    tiny_cfg: Callable[..., CfgNode], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    dense = lth.Ticket.dense(torchvision.models.resnet50())
    cfg = tiny_cfg("c4", {"MODEL.TICKET.PATH": save_channels(dense, tmp_path)})
    plugin.apply_ticket_input(cfg)
    model = build_model(cfg).eval()
    small = lth.compact(model)
    for of in (lambda m: m.backbone.res4[1].conv2, lambda m: m.roi_heads.res5[1].conv2):
        assert of(small).out_channels < of(model).out_channels
    scene = DatasetMapper(cfg, False)(get_detection_dataset_dicts(["tiny_scenes_test"])[0])
    with torch.no_grad():
        one, other = (m([scene])[0]["instances"] for m in (model, small))
    assert len(one) and torch.equal(one.pred_classes, other.pred_classes)
    assert torch.allclose(one.scores, other.scores, atol=1e-4)
    assert torch.allclose(one.pred_boxes.tensor, other.pred_boxes.tensor, atol=1e-2)
