"""Mask R-CNN R50-FPN on COCO 2017 as a LazyConfig, for detectron2's tools/lazyconfig_train_net.py.

Give the ticket as ``model.ticket=FILE``.
"""

from detectron2.config import LazyCall as L
from detectron2.model_zoo import get_config

from lth_plugins.detectron2 import with_ticket

_zoo = get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py")
_constants = get_config("common/data/constants.py").constants
dataloader, lr_multiplier, optimizer, train = (
    _zoo[key] for key in ("dataloader", "lr_multiplier", "optimizer", "train")
)
train.init_checkpoint = ""  # the weights are the ticket's

model = _zoo.model
# The ticket's input. If the ticket has another, with_ticket prints what to write here.
model.input_format = dataloader.train.mapper.image_format = "RGB"
model.pixel_mean = _constants.imagenet_rgb256_mean
model.pixel_std = _constants.imagenet_rgb256_std
# Normalisation is trained, because the dense network's BN statistics are wrong for the ticket.
model.backbone.bottom_up.freeze_at = 0
model.backbone.bottom_up.stem.norm = model.backbone.bottom_up.stages.norm = "SyncBN"
model.backbone.bottom_up.stages.stride_in_1x1 = False

model = L(with_ticket)(module=model, ticket="")
