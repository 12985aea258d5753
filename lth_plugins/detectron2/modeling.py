"""Backbones and ROI heads: what detectron2 builds, with a ticket put on it.

detectron2's own builders and classes make the modules, so their options all work and checkpoints
have the stock keys.
"""

import logging
from collections.abc import Callable
from functools import partial
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
from torch import nn

from lth_plugins.detectron2.config import WORDING, find_ticket, is_c4, watch
from lth_plugins.detectron2.slimming import widths_of
from lth_plugins.masking.attachment import attach
from lth_plugins.masking.hosting import frozen_stages
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
    ticket, missing = _ticket_of(cfg, last=not is_c4(cfg))
    if ticket is not None and ticket.sparsity and cfg.MODEL.BACKBONE.FREEZE_AT > 1:
        setting = f"MODEL.BACKBONE.FREEZE_AT {cfg.MODEL.BACKBONE.FREEZE_AT}"
        logger.warning(frozen_stages(setting, "0 or 1"))
    backbone, parts = builder(cfg, input_shape), _parts(cfg)
    if ticket is not None:
        attach(backbone, ticket, cfg.MODEL.TICKET.LOAD_WEIGHTS, parts, False, WORDING)
    watch(backbone, cfg, parts, missing)
    return backbone


def _ticket_of(cfg: CfgNode, last: bool = True) -> tuple[Ticket | None, str]:
    """As `find_ticket`; none for a slimmed model, whose ticket `adopt_slimmed` attaches."""
    return (None, "") if widths_of(cfg) else find_ticket(cfg, last)


def _parts(cfg: CfgNode) -> tuple[str, ...]:
    """The parts of the trunk in the backbone: detectron2 builds it up to its last output."""
    stages = {"res2": 2, "res3": 3, "res4": 4, "res5": 5}
    return PARTS[: max(stages.get(name, 1) for name in cfg.MODEL.RESNETS.OUT_FEATURES)]


_HEADS = ("layer4",)  # what the ROI heads of a C4 model hold


@ROI_HEADS_REGISTRY.register()
class TicketRes5ROIHeads(Res5ROIHeads):
    """detectron2's ``Res5ROIHeads`` with layer4 of a ticket on its ``res5``.

    For C4 models, whose backbone ends at layer3 and must be ``build_ticket_resnet_backbone``.

    Args:
        ticket: the ticket; None builds the heads without one.
        load_weights: False keeps the random initialisation, masked.
        watch: called with the heads once they are built; from a config it is what has them check
            what is loaded into them.
        kwargs: those of ``Res5ROIHeads``.
    """

    @configurable
    def __init__(
        self,
        *,
        ticket: Ticket | None,
        load_weights: bool = True,
        watch: Callable[[nn.Module], None] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if ticket is not None:
            attach(self, ticket, load_weights, _HEADS, False, WORDING)
        if watch is not None:
            watch(self)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        ticket, missing = _ticket_of(cfg)
        return {
            **super().from_config(cfg, input_shape),
            "ticket": ticket,
            "load_weights": cfg.MODEL.TICKET.LOAD_WEIGHTS,
            "watch": partial(watch, cfg=cfg, parts=_HEADS, missing=missing),
        }
