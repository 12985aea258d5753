"""The frameworks' own models, each with the loss of a batch of synthetic scenes."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module], Tensor]
CLASSES, OBJECTS = 20, 5


def detector(name: str, arch: str, **more: object) -> tuple[nn.Module, Any]:
    """A detector of detectron2's COCO-Detection on a backbone that is trained, and its config.

    Args:
        name: such as "faster_rcnn".
        arch: the ResNet.
        more: settings under ``MODEL``.
    """
    from detectron2 import model_zoo
    from detectron2.modeling import build_model

    cfg = model_zoo.get_config(f"COCO-Detection/{name}_R_50_FPN_1x.yaml")
    options = {"DEVICE": "cpu", "WEIGHTS": "", "BACKBONE.FREEZE_AT": 0, "RESNETS.NORM": "BN"}
    options |= {"RESNETS.STRIDE_IN_1X1": False, "ROI_HEADS.NUM_CLASSES": CLASSES}
    options |= {"RETINANET.NUM_CLASSES": CLASSES}
    if arch == "resnet18":
        options |= {"RESNETS.DEPTH": 18, "RESNETS.RES2_OUT_CHANNELS": 64}
    for key, value in (options | more).items():
        cfg.merge_from_list([f"MODEL.{key}", value])
    torch.manual_seed(0)
    return build_model(cfg), cfg


def faster_rcnn(arch: str, side: int) -> tuple[nn.Module, Loss]:
    """detectron2's Faster R-CNN with an FPN on a trained backbone, and its losses on two scenes."""
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.events import EventStorage

    model = detector("faster_rcnn", arch)[0].train()
    scenes = []
    for _ in range(2):
        corners = torch.rand(OBJECTS, 2) * side / 2
        boxes = torch.cat([corners, corners + side / 3], dim=1)
        instances = Instances((side, side), gt_boxes=Boxes(boxes))
        instances.gt_classes = torch.randint(CLASSES, (OBJECTS,))
        image = torch.randint(256, (3, side, side), dtype=torch.uint8)
        scenes.append({"image": image, "instances": instances})

    def loss(model: nn.Module) -> Tensor:
        with EventStorage():  # detectron2's models log to it
            return sum(model(scenes).values())

    return model, loss


def segmentor(name: str, arch: str) -> nn.Module:
    """A segmentor of mmsegmentation, such as "fcn", on a stock ResNet of stride 8."""
    import mmseg
    from mmengine.config import Config
    from mmengine.registry import DefaultScope
    from mmseg.registry import MODELS
    from mmseg.utils import register_all_modules

    logging.getLogger("mmengine").setLevel(logging.WARNING)
    register_all_modules(init_default_scope=False)
    configs = mmseg.__path__[0] + "/.mim/configs"
    config = Config.fromfile(f"{configs}/_base_/models/{name}_r50-d8.py")
    config.merge_from_dict({"model.pretrained": None, "model.backbone.type": "ResNet"})
    cfg = config.model
    if arch == "resnet18":
        cfg.backbone.depth = 18
        cfg.decode_head.in_channels = 512
        if "c1_in_channels" in cfg.decode_head:
            cfg.decode_head.c1_in_channels = 64
        cfg.auxiliary_head.in_channels = 256
    for part in (cfg.backbone, cfg.decode_head, cfg.auxiliary_head):
        part.norm_cfg = {"type": "BN", "requires_grad": True}  # SyncBN needs GPUs
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmseg"):
        return MODELS.build(cfg)


def deeplabv3plus(arch: str, side: int) -> tuple[nn.Module, Loss]:
    """mmsegmentation's DeepLabV3+, and its losses on two scenes."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    model = segmentor("deeplabv3plus", arch).train()
    images = torch.randn(2, 3, side, side)
    samples = []
    for _ in range(2):
        sample = SegDataSample(metainfo={"img_shape": (side, side), "pad_shape": (side, side)})
        sample.gt_sem_seg = PixelData(data=torch.randint(19, (1, side, side)))
        samples.append(sample)

    def loss(model: nn.Module) -> Tensor:
        losses = model(images, samples, mode="loss")
        return sum(value for name, value in losses.items() if "loss" in name)

    return model, loss
