"""Tickets reach every place of a detectron2 model that holds a trunk, and compute the same (C4)."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

import lth_plugins as lth
import lth_plugins.detectron2 as plugin

MakeCfg = Callable[..., CfgNode]
CONFIGS = Path(__file__).parents[2] / "configs/detectron2"


@pytest.mark.parametrize(
    "file",
    [
        "PascalVOC-Detection/faster_rcnn_R_50_FPN_ticket.yaml",
        "PascalVOC-Detection/faster_rcnn_R_50_C4_ticket.yaml",
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_ticket.yaml",
        "COCO-Detection/retinanet_R_50_FPN_1x_ticket.yaml",
    ],
)
def test_a_real_config_builds_with_the_whole_ticket(file: str, r50: Path) -> None:
    cfg = get_cfg()
    plugin.add_ticket_config(cfg)
    cfg.merge_from_file(str(CONFIGS / file))
    cfg.merge_from_list(["MODEL.TICKET.PATH", str(r50), "MODEL.DEVICE", "cpu"])
    plugin.apply_ticket_input(cfg)
    cfg.freeze()
    model = build_model(cfg)
    ticket = lth.Ticket.load(r50)
    handle = lth.attached(model)
    assert handle.masks == ticket.masks
    assert handle.ticket() == ticket
    assert any(isinstance(m, torch.nn.SyncBatchNorm) for m in model.modules())


@pytest.mark.parametrize("kind", ["fpn", "c4"])
def test_features_equal_torchvisions(
    kind: str, tiny_cfg: MakeCfg, ticket_of: Callable[[str], Path]
) -> None:
    ticket = lth.Ticket.load(ticket_of(kind))
    reference = torchvision.models.get_model(ticket.meta.arch).eval()
    reference.load_state_dict(ticket.sparse_weights(), strict=False)
    cfg = tiny_cfg(kind)
    plugin.apply_ticket_input(cfg)
    model = build_model(cfg).eval()

    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if kind == "c4":
            found = model.backbone(images)["res4"]
            found = {"res4": found, "res5": model.roi_heads.res5(found)}
        else:
            found = model.backbone.bottom_up(images)
        x = reference.maxpool(reference.relu(reference.bn1(reference.conv1(images))))
        for stage in (2, 3, 4, 5):
            x = getattr(reference, f"layer{stage - 1}")(x)
            if f"res{stage}" in found:
                torch.testing.assert_close(found[f"res{stage}"], x, rtol=1e-5, atol=1e-5)


def test_a_dilated_c5_model_takes_a_ticket(tiny_cfg: MakeCfg, r50: Path) -> None:
    cfg = tiny_cfg("c4")
    cfg.merge_from_list(
        [
            *("MODEL.RESNETS.OUT_FEATURES", ["res5"], "MODEL.RESNETS.RES5_DILATION", 2),
            *("MODEL.RPN.IN_FEATURES", ["res5"], "MODEL.ROI_HEADS.IN_FEATURES", ["res5"]),
            *("MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
            *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 1),
            *("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 2, "MODEL.ROI_BOX_HEAD.FC_DIM", 16),
        ]
    )
    plugin.apply_ticket_input(cfg)
    assert lth.attached(build_model(cfg)).ticket() == lth.Ticket.load(r50)
