"""Caffe2's blobs become the weights that detectron2 itself makes of them."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.resnet import build_resnet_backbone

import lth_plugins as lth
from lth_plugins.ticket import ARCHITECTURES, DIALECTS, locate
from lth_plugins.ticket.foreign.convert import from_checkpoint


def blobs(depth: int = 50) -> dict[str, np.ndarray]:
    """MSRA's R-50.pkl: affine normalisation, no statistics, biases of convolutions."""
    spec = ARCHITECTURES[f"resnet{depth}"]
    generator = np.random.default_rng(0)
    made = {
        DIALECTS["caffe2"].spell(name, spec): generator.normal(0, 0.05, shape).astype("float32")
        for name, shape in spec.shapes.items()
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    }
    biases = {"conv1_b": np.ones(64, "float32"), "res2_0_branch2a_b": np.zeros(64, "float32")}
    return made | biases | {"fc1000_w": np.ones((1000, 2048), "float32")}


@pytest.mark.parametrize("detectron", [False, True], ids=["MSRA's R-50.pkl", "Detectron's"])
def test_caffe2_blobs_are_read_as_detectron2_reads_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, detectron: bool
) -> None:
    content: dict[str, object] = dict(blobs())
    if detectron:  # a trained detector: with its optimizer's state, and what is outside the trunk
        content |= {"res2_0_branch2a_w_momentum": np.ones((64, 64, 1, 1), "float32")}
        content |= {"fpn_inner_res5_2_sum_w": np.ones((256, 2048, 1, 1), "float32")}
        content = {"blobs": content, "cfg": "MODEL: {}"}
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps(content, protocol=2))

    cfg = get_cfg()
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    backbone = build_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()
    DetectionCheckpointer(backbone).load(str(path))
    ticket = from_checkpoint(path, "imagenet", stride_in_1x1=True)

    assert ticket.meta.arch == "resnet50" and ticket.meta.recipe["imported"] == "caffe2"
    layout = locate(backbone)
    for name, value in layout.extract(backbone.state_dict()).items():
        assert torch.equal(ticket.weights[name], value), name
    assert "conv1_b, as the loaders of caffe2 files do" in caplog.text
    assert "--pixels caffe" in caplog.text

    # The ticket of it is that network.
    cfg.MODEL.RESNETS.NORM = "BN"
    trained = build_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()
    lth.attach(trained, ticket)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(trained(images)["res5"], backbone(images)["res5"], atol=1e-5)
