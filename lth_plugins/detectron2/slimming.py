"""Slimming of a whole detector by detectron2's trainer: the node ``SLIM``, and `SlimHook`."""

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from torch import nn

from lth_plugins.detectron2.checkpoint import state_in
from lth_plugins.detectron2.config import WORDING, find_ticket
from lth_plugins.detectron2.hooks import check_order, model_of
from lth_plugins.masking.attachment import attach
from lth_plugins.slimming.gradual import Slimming, default_end
from lth_plugins.slimming.options import check_alone
from lth_plugins.slimming.selection import budget_of
from lth_plugins.slimming.tickets import fits
from lth_plugins.slimming.tracing import Forward
from lth_plugins.slimming.widths import adopt_widths


def add_slim_config(cfg: CfgNode) -> None:
    """Add ``SLIM`` to a config, before any file or option is merged into it."""
    cfg.SLIM = CfgNode()
    # The share of the whole detector's FLOPs to end with, or of its time of inference on this
    # machine and MODEL.DEVICE; with 0 for both the detector is not slimmed.
    cfg.SLIM.FLOPS = 0.0
    cfg.SLIM.LATENCY = 0.0
    # What channels are ranked by: l1, l2, ticket, taylor or fisher.
    cfg.SLIM.IMPORTANCE = "l2"
    # The iterations to begin and to end after, and between two removals; an END of 0 is half of
    # SOLVER.MAX_ITER. After END the narrower detector is fine-tuned.
    cfg.SLIM.BEGIN = 0
    cfg.SLIM.END = 0
    cfg.SLIM.PERIOD = 10
    # Names of modules whose output channels all stay, such as "backbone.bottom_up.stem".
    cfg.SLIM.KEEP = []
    # Both are those of a square image of this side, 0 for INPUT.MIN_SIZE_TEST, with the
    # proposals of MODEL.RPN.POST_NMS_TOPK_TEST and the objects of TEST.DETECTIONS_PER_IMAGE.
    cfg.SLIM.SIZE = 0
    # A slimmed checkpoint whose widths the detector is built with, see adopt_slimmed. It is set by
    # tools/train_det.py where MODEL.WEIGHTS, or the checkpoint that is resumed, is one.
    cfg.SLIM.WIDTHS = ""


def slims(cfg: CfgNode) -> bool:
    """Whether a config describes a slimming; one without the node does not."""
    node = cfg.get("SLIM")
    return node is not None and bool(node.FLOPS or node.LATENCY)


def widths_of(cfg: CfgNode) -> str:
    """The slimmed checkpoint whose widths a detector of this config is built with; "" for none."""
    node = cfg.get("SLIM")
    return "" if node is None else node.WIDTHS


def adopt_slimmed(model: nn.Module, cfg: CfgNode) -> None:
    """Give a freshly built detector the widths of ``SLIM.WIDTHS``, and its ticket; if that is set.

    The ticket that ``MODEL.TICKET`` names is attached if it is one of the slimmed trunk.

    Args:
        model: the whole detector, before a checkpoint is loaded and an optimizer made.
        cfg: complete.

    Raises:
        LthError: if the ticket is of another trunk, or does not go with the config.
    """
    path = widths_of(cfg)
    if not path:
        return
    state = state_in(path)
    adopt_widths(model, state)
    ticket, _ = find_ticket(cfg)
    if fits(ticket, state, WORDING.path) and ticket is not None:
        attach(model, ticket, cfg.MODEL.TICKET.LOAD_WEIGHTS, wording=WORDING)


def slimming_of(cfg: CfgNode) -> Slimming:
    """The slimming that a config describes.

    Raises:
        ConfigError: if a value is invalid, not one of ``FLOPS`` and ``LATENCY`` is given, or the
            config also trains sparse.
    """
    node, ticket = cfg.SLIM, cfg.MODEL.get("TICKET")
    moves = ticket is not None and ticket.METHOD
    check_alone("MODEL.TICKET.METHOD" if moves else None)
    budget = budget_of(node.FLOPS or None, node.LATENCY or None)
    end = node.END or default_end(node.BEGIN, cfg.SOLVER.MAX_ITER)
    return Slimming(budget, node.BEGIN, end, node.PERIOD, node.IMPORTANCE, node.KEEP)


def example_of(cfg: CfgNode) -> Forward:
    """Runs all layers of a detector of this config on an image of ``SLIM.SIZE``.

    An R-CNN's heads get as many proposals, and its mask head as many detections, as the config has
    at the most: what the detector itself finds depends on its weights.
    """
    proposals, found = cfg.MODEL.RPN.POST_NMS_TOPK_TEST, cfg.TEST.DETECTIONS_PER_IMAGE
    side = cfg.SLIM.SIZE or cfg.INPUT.MIN_SIZE_TEST

    def forward(model: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        image = torch.randint(0, 256, (3, side, side), generator=generator).float()
        batch = [{"image": image, "height": side, "width": side}]
        images = model.preprocess_image(batch)
        features = model.backbone(images.tensor)
        if isinstance(model, DenseDetector):
            model.head([features[f] for f in model.head_in_features])
        elif isinstance(model, GeneralizedRCNN):
            rpn: Any = model.proposal_generator
            rpn.rpn_head([features[f] for f in rpn.in_features])
            size = images.image_sizes[0]
            _heads(model.roi_heads, images, features, _boxes(proposals, size, model.device), found)
        else:
            model(batch)

    return forward


def _heads(heads: Any, images: Any, features: Any, boxes: Boxes, found: int) -> None:
    size = images.image_sizes[0]
    scores = torch.zeros(len(boxes), device=boxes.device)
    asked = Instances(size, proposal_boxes=boxes, objectness_logits=scores)
    # What is done with detections gets as many boxes as there are at the most, not those found.
    later = [name for name in ("mask_on", "keypoint_on") if getattr(heads, name, False)]
    try:
        for name in later:
            setattr(heads, name, False)
        heads(images, features, [asked])
    finally:
        for name in later:
            setattr(heads, name, True)
    if later:
        classes = torch.zeros(min(found, len(boxes)), dtype=torch.long, device=boxes.device)
        objects = Instances(size, pred_boxes=boxes[: len(classes)], pred_classes=classes)
        heads.forward_with_given_boxes(features, [objects])


def _boxes(count: int, size: tuple[int, int], device: torch.device) -> Boxes:
    """So many boxes of all sizes, spread over an image."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([size[1], size[0]] * 2)
    corners = torch.rand((count, 2, 2), generator=generator).sort(dim=1).values
    return Boxes((corners.flatten(1) * scale).to(device))


class SlimHook(HookBase):
    """Remove channels of the whole detector while it trains, until its budget is met.

    After training the narrower detector is written to ``slim.pth`` in ``folder``: an ordinary
    checkpoint, whose shapes are its widths; and its ticket, in the widths of its trunk, to
    ``slim.ticket``. It must come before ``PeriodicCheckpointer``::

        def build_hooks(self):
            hook = SlimHook(slimming_of(self.cfg), example_of(self.cfg), self.cfg.OUTPUT_DIR)
            return [hook, *super().build_hooks()]

    Args:
        slimming: how much, when, and by what.
        forward: runs a detector on an example.
        folder: where to write.
    """

    def __init__(self, slimming: Slimming, forward: Forward, folder: str | PathLike[str]) -> None:
        self.slimming, self._forward, self._folder = slimming, forward, Path(folder)

    def before_train(self) -> None:
        check_order(self, "slims what is already saved")
        trainer = self.trainer
        done, iterations = trainer.start_iter, trainer.max_iter
        self.slimming.start(model_of(self), trainer.optimizer, self._forward, done, iterations)

    def after_step(self) -> None:
        self.slimming.after_step(model_of(self), self.trainer.iter + 1)

    def state_dict(self) -> dict[str, Any]:
        return self.slimming.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.slimming.load_state_dict(state_dict)

    def after_train(self) -> None:
        # It is also called after an exception; iter is max_iter only if there was none.
        if self.trainer.iter >= self.trainer.max_iter and comm.is_main_process():
            self.slimming.write(model_of(self), self._folder, lambda state: {"model": state})
