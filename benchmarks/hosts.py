"""The frameworks' own models, each with the loss of a batch of synthetic scenes."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module], Tensor]
CLASSES, OBJECTS = 20, 5


def faster_rcnn(arch: str, side: int) -> tuple[nn.Module, Loss]:
    """detectron2's Faster R-CNN with an FPN on a trained backbone, and its losses on two scenes."""
    from detectron2 import model_zoo
    from detectron2.modeling import build_model
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.events import EventStorage

    cfg = model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    options = {"DEVICE": "cpu", "WEIGHTS": "", "BACKBONE.FREEZE_AT": 0, "RESNETS.NORM": "BN"}
    options |= {"RESNETS.STRIDE_IN_1X1": False, "ROI_HEADS.NUM_CLASSES": CLASSES}
    if arch == "resnet18":
        options |= {"RESNETS.DEPTH": 18, "RESNETS.RES2_OUT_CHANNELS": 64}
    for key, value in options.items():
        cfg.merge_from_list([f"MODEL.{key}", value])
    torch.manual_seed(0)
    model = build_model(cfg).train()
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


def deeplabv3plus(arch: str, side: int) -> tuple[nn.Module, Loss]:
    """mmsegmentation's DeepLabV3+ on a stock ResNet, and its losses on two scenes."""
    import mmseg
    from mmengine.config import Config
    from mmengine.registry import DefaultScope
    from mmengine.structures import PixelData
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample
    from mmseg.utils import register_all_modules

    logging.getLogger("mmengine").setLevel(logging.WARNING)
    register_all_modules(init_default_scope=False)
    configs = mmseg.__path__[0] + "/.mim/configs"
    config = Config.fromfile(f"{configs}/_base_/models/deeplabv3plus_r50-d8.py")
    config.merge_from_dict({"model.pretrained": None, "model.backbone.type": "ResNet"})
    cfg = config.model
    if arch == "resnet18":
        cfg.backbone.depth = 18
        cfg.decode_head.update(in_channels=512, c1_in_channels=64)
        cfg.auxiliary_head.in_channels = 256
    for part in (cfg.backbone, cfg.decode_head, cfg.auxiliary_head):
        part.norm_cfg = {"type": "BN", "requires_grad": True}  # SyncBN needs GPUs
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmseg"):
        model = MODELS.build(cfg).train()
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
