"""Backbones and ROI heads: what detectron2 builds, with a ticket put on it.

detectron2's own builders and classes make the modules, so their options all work and checkpoints
have the stock keys.
"""

import logging
from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, ROI_HEADS_REGISTRY, Backbone
from detectron2.modeling.backbone import build_resnet_backbone
from detectron2.modeling.backbone.fpn import (
    build_resnet_fpn_backbone,
    build_retinanet_resnet_fpn_backbone,
)
from detectron2.modeling.roi_heads import Res5ROIHeads

from lth_plugins.attach import attach
from lth_plugins.detectron2.config import check, get_ticket
from lth_plugins.ticket import Ticket
from lth_plugins.ticket.arch import PARTS

logger = logging.getLogger(__name__)

Builder = Callable[[CfgNode, ShapeSpec], Backbone]


@BACKBONE_REGISTRY.register()
def build_ticket_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """detectron2's ``build_resnet_backbone`` with the ticket of ``cfg.MODEL.TICKET`` on it."""
    return _build(build_resnet_backbone, cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_ticket_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """detectron2's ``build_resnet_fpn_backbone`` with the ticket of ``cfg.MODEL.TICKET`` on it."""
    return _build(build_resnet_fpn_backbone, cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_ticket_retinanet_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """detectron2's ``build_retinanet_resnet_fpn_backbone`` with the config's ticket on it."""
    return _build(build_retinanet_resnet_fpn_backbone, cfg, input_shape)


def _build(builder: Builder, cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    ticket = get_ticket(cfg)
    check(cfg, ticket)
    if cfg.MODEL.BACKBONE.FREEZE_AT > 1 and ticket.sparsity:
        logger.warning(
            "MODEL.BACKBONE.FREEZE_AT %d freezes pruned stages together with the BN statistics of "
            "the dense network: 0 or 1 lets them adapt",
            cfg.MODEL.BACKBONE.FREEZE_AT,
        )
    if cfg.MODEL.WEIGHTS.endswith(".pkl"):
        logger.warning(
            "MODEL.WEIGHTS %s is loaded over the ticket's weights: right for a detector trained on "
            'this ticket, wrong for any other weights (set MODEL.WEIGHTS to "")',
            cfg.MODEL.WEIGHTS,
        )
    backbone = builder(cfg, input_shape)
    attach(backbone, ticket, cfg.MODEL.TICKET.LOAD_WEIGHTS, _parts(cfg), whole=False)
    return backbone


def _parts(cfg: CfgNode) -> tuple[str, ...]:
    """The parts of the trunk in the backbone: detectron2 builds it up to its last output."""
    stages = {"res2": 2, "res3": 3, "res4": 4, "res5": 5}
    return PARTS[: max(stages.get(name, 1) for name in cfg.MODEL.RESNETS.OUT_FEATURES)]


@ROI_HEADS_REGISTRY.register()
class TicketRes5ROIHeads(Res5ROIHeads):
    """detectron2's ``Res5ROIHeads`` with layer4 of a ticket on its ``res5``.

    For C4 models, whose backbone ends at layer3 and must be ``build_ticket_resnet_backbone``.

    Args:
        ticket: the ticket.
        load_weights: False keeps the random initialisation, masked.
        kwargs: those of ``Res5ROIHeads``.
    """

    @configurable
    def __init__(self, *, ticket: Ticket, load_weights: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        attach(self, ticket, load_weights, ("layer4",), whole=False)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        ticket = get_ticket(cfg)
        check(cfg, ticket)
        ret = super().from_config(cfg, input_shape)
        return {**ret, "ticket": ticket, "load_weights": cfg.MODEL.TICKET.LOAD_WEIGHTS}
