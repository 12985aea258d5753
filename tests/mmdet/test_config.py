"""The initialiser serves mmdetection's stock ResNet."""

from pathlib import Path

import mmdet.models  # noqa: F401  # fills mmdet's registry
import pytest
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope

import lth_plugins as lth

CONFIG = Path(__file__).parents[2] / "configs/mmdet/faster-rcnn_r50_fpn_1x_coco_ticket.py"


def config(ticket: Path) -> Config:
    cfg = Config.fromfile(CONFIG)
    options = {"model.backbone.depth": 18, "model.neck.in_channels": [64, 128, 256, 512]}
    cfg.merge_from_dict({**options, "model.backbone.init_cfg.checkpoint": str(ticket)})
    init_default_scope("mmdet")
    return cfg


def test_a_ticket_is_a_detectors_backbone(ticket18: lth.Ticket, ticket18_file: Path) -> None:
    model = MODELS.build(config(ticket18_file).model)
    model.init_weights()

    handle = lth.attached(model.backbone)
    assert handle is not None and handle.masks == ticket18.masks
    handle.verify()
    state = model.backbone.state_dict()
    for name, value in ticket18.sparse_weights().items():
        assert state[name].equal(value), name


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.backbone.norm_eval", True, "norm_eval=True"),
        ("model.data_preprocessor.bgr_to_rgb", False, "the ticket was trained on RGB input"),
    ],
)
def test_what_a_sparse_ticket_does_not_want_is_refused(
    key: str, value: bool, message: str, ticket18_file: Path
) -> None:
    cfg = config(ticket18_file)
    cfg.merge_from_dict({key: value})
    with pytest.raises(lth.TicketError, match=message):
        MODELS.build(cfg.model).init_weights()
