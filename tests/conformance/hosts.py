"""The hosts' models, each as the plug-in's own configuration path builds it, and their losses.

Small: ResNet-18 where the host has one, two images of 64 px (DeepLabV3+ 32 px). Frameworks are
imported where they are used, so that a missing one costs its own tests only. `BASELINE` is a plain
model of torchvision, where a script attaches the ticket itself; `trainers` has the hosts' own
trainers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lth_plugins as lth
import lth_plugins.timm  # registers ticket_resnet18
import lth_plugins.torchvision
from lth_plugins.ticket import Choice

IMAGES = 2
BUILT = ("SyncBN", "frozen", "checkpointing")
"""The options of a trainer that a model is built for; the others are the loop's."""


class Host(Protocol):
    """A model of one framework.

    Attributes:
        arch: of the ticket that it trains.
        framework: the marker of its tests; None for what is always installed.
        configures: whether it has a configuration, which says what the model is fed and how the
            ticket is changed.
        trunk_only: what a person writes to leave out what a ticket prunes outside the trunk; ""
            for a host that builds whole models at once.
    """

    arch: str
    framework: str | None
    configures: bool
    trunk_only: str

    def build(self, ticket: str | None, option: str = "", **choice: Any) -> nn.Module:
        """The model on a ticket, or the stock one for None, prepared for a trainer's option.

        "input" gives it another input than RGB images in [0, 1], which the ticket wants. A host
        with a configuration takes other attributes of `lth_plugins.ticket.Choice`, too.
        """
        ...

    def loss(self, model: nn.Module) -> Tensor:
        """Of a random batch; the model may be wrapped in DistributedDataParallel."""
        ...

    def compiled(self, model: nn.Module) -> nn.Module:
        """The part of the model to compile."""
        ...


@dataclass(frozen=True)
class Detectron2:
    """A detector of one of our configurations (`KINDS` in the detectron2 tests)."""

    kind: str
    arch: str = "resnet18"
    size: int = 64
    framework = "detectron2"
    configures = True
    trunk_only = "MODEL.TICKET.REST False"

    def build(self, ticket: str | None, option: str = "", **choice: Any) -> nn.Module:
        from detectron2.layers import CNNBlockBase
        from detectron2.modeling import build_model
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
            apply_activation_checkpointing,
        )

        from lth_plugins.detectron2 import apply_ticket_input
        from lth_plugins.detectron2.config import BACKBONES
        from tests.detectron2.conftest import KINDS, TINY, as_options, load_cfg

        tiny = {key: value for key, value in TINY.items() if key.startswith("MODEL.")}
        cfg = load_cfg(self.kind, as_options({**tiny, **KINDS[self.kind][1], **_SMALL_HEADS}))
        if option == "frozen":
            cfg.MODEL.BACKBONE.FREEZE_AT = 2
        if option == "input":
            cfg.MODEL.PIXEL_STD = [10.0, 10.0, 10.0]
        for name, value in choice.items():
            cfg.MODEL.TICKET[{"seed": "RANDOM_SEED", "outside": "REST"}.get(name, name.upper())] = (
                value
            )
        if option == "SyncBN":
            cfg.MODEL.RESNETS.NORM = "naiveSyncBN"  # SyncBN needs a GPU
        if ticket is None:
            spec = lth.InputSpec()
            cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN = spec.format, list(spec.mean_255)
            cfg.MODEL.PIXEL_STD = list(spec.std_255)
            stock = {ours: theirs for theirs, ours in BACKBONES.items()}
            cfg.MODEL.BACKBONE.NAME = stock[cfg.MODEL.BACKBONE.NAME]
            cfg.MODEL.ROI_HEADS.NAME = cfg.MODEL.ROI_HEADS.NAME.removeprefix("Ticket")
        else:
            cfg.MODEL.TICKET.PATH = ticket
            apply_ticket_input(cfg)
        model = build_model(cfg)
        if option == "checkpointing":  # detectron2 has no switch for it, PyTorch has this
            apply_activation_checkpointing(
                model, check_fn=lambda module: isinstance(module, CNNBlockBase)
            )
        return model

    def loss(self, model: nn.Module) -> Tensor:
        from detectron2.structures import BitMasks, Boxes, Instances
        from detectron2.utils.events import EventStorage

        size = self.size
        boxes = torch.tensor([[4.0, 4.0, 30.0, 40.0], [20.0, 10.0, 60.0, 56.0]]) * (size / 64)
        truth = Instances((size, size))
        truth.gt_boxes = Boxes(boxes)
        truth.gt_classes = torch.tensor([1, 7])
        truth.gt_masks = BitMasks(torch.rand(2, size, size) > 0.5)
        with EventStorage():
            losses = model([{"image": p, "instances": truth} for p in _images(size)])
        return sum(losses.values())

    def compiled(self, model: nn.Module) -> nn.Module:
        return model.backbone


@dataclass(frozen=True)
class Mmseg:
    """A segmentor of one of our configurations, with what makes it a small one."""

    config: str
    size: int
    options: Mapping[str, Any] = field(default_factory=dict)
    arch: str = "resnet18"
    framework = "mmseg"
    configures = True
    trunk_only = "rest=False in the backbone's init_cfg"

    def build(self, ticket: str | None, option: str = "", **choice: Any) -> nn.Module:
        import mmseg.models  # noqa: F401  # fills mmseg's registry
        from mmengine.config import Config
        from mmengine.logging import MMLogger
        from mmengine.registry import init_default_scope
        from mmseg.registry import MODELS

        from lth_plugins.mmseg import apply_ticket
        from tests.mmseg.conftest import ROOT

        MMLogger.get_instance("mmengine").setLevel("WARNING")
        cfg = Config.fromfile(ROOT / "configs/mmseg" / self.config)
        size = {"model.data_preprocessor.size": (self.size, self.size)}
        cfg.merge_from_dict({**size, **self.options})
        if option == "frozen":
            cfg.model.backbone.frozen_stages = 1
        if option == "checkpointing":
            cfg.model.backbone.with_cp = True
        if option == "input":
            cfg.model.data_preprocessor.std = [10.0, 10.0, 10.0]
        for name, value in choice.items():
            cfg.model.backbone.init_cfg[{"outside": "rest"}.get(name, name)] = value
        if ticket is None:
            cfg.model.backbone.update(type="ResNet", init_cfg=None)
        else:
            apply_ticket(cfg, ticket)
        init_default_scope("mmseg")
        model = MODELS.build(cfg.model)
        model.init_weights()
        return _synchronised(model) if option == "SyncBN" else model

    def loss(self, model: nn.Module) -> Tensor:
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample

        inner = model.module if isinstance(model, DistributedDataParallel) else model
        labels = torch.randint(0, 11, (IMAGES, 1, self.size, self.size))
        samples = [SegDataSample(gt_sem_seg=PixelData(data=label)) for label in labels]
        data = {"inputs": list(_images(self.size)), "data_samples": samples}
        losses = model(**inner.data_preprocessor(data, training=True), mode="loss")
        return inner.parse_losses(losses)[0]

    def compiled(self, model: nn.Module) -> nn.Module:
        return model.backbone


class TorchvisionDetector:
    """Faster R-CNN of the plug-in, with a small head in the place of its own."""

    arch = "resnet18"
    framework = None
    configures = True
    trunk_only = ""

    def build(self, ticket: str | None, option: str = "", **choice: Any) -> nn.Module:
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
            apply_activation_checkpointing,
        )
        from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
        from torchvision.models.detection.faster_rcnn import (
            FasterRCNN,
            FastRCNNPredictor,
            TwoMLPHead,
        )
        from torchvision.models.resnet import BasicBlock

        options: dict[str, Any] = {"num_classes": 11, "min_size": 64, "max_size": 64}
        options |= {"rpn_batch_size_per_image": 8, "box_batch_size_per_image": 8}
        if option == "input":
            options["image_std"] = [10 / 255] * 3
        model: Any
        if ticket is None:
            trunk = {"backbone_name": "resnet18", "weights": None, "norm_layer": nn.BatchNorm2d}
            model = FasterRCNN(resnet_fpn_backbone(**trunk, trainable_layers=5), **options)
        else:
            model = lth_plugins.torchvision.detection(
                "fasterrcnn_resnet18_fpn", Choice(ticket, **choice), **options
            )
        model.roi_heads.box_head = TwoMLPHead(256 * 7 * 7, 32)
        model.roi_heads.box_predictor = FastRCNNPredictor(32, 11)
        if option == "frozen":
            for name in ("conv1", "bn1", "layer1"):
                model.backbone.body[name].requires_grad_(False)
        if option == "checkpointing":
            apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, BasicBlock))
        return _synchronised(model) if option == "SyncBN" else model

    def loss(self, model: nn.Module) -> Tensor:
        boxes = torch.tensor([[4.0, 4.0, 30.0, 40.0], [20.0, 10.0, 60.0, 56.0]])
        targets = [{"boxes": boxes, "labels": torch.tensor([1, 7])} for _ in range(IMAGES)]
        return sum(model(list(_images(64) / 255), targets).values())

    def compiled(self, model: nn.Module) -> nn.Module:
        return model.backbone


class _Classifier:
    """A classifier of ten classes, without a configuration."""

    arch = "resnet18"
    framework = None
    configures = False
    trunk_only = ""

    def loss(self, model: nn.Module) -> Tensor:
        logits = model(_images(64) / 255)
        return nn.functional.cross_entropy(logits, torch.randint(0, 10, (IMAGES,)))

    def compiled(self, model: nn.Module) -> nn.Module:
        return model


class Timm(_Classifier):
    """timm's ResNet-18, as a classifier of ten classes."""

    def build(self, ticket: str | None, option: str = "", **choice: Any) -> nn.Module:
        if ticket is None:
            model = timm.create_model("resnet18", num_classes=10)
        else:
            model = timm.create_model("ticket_resnet18", ticket=ticket, num_classes=10)
        if option == "frozen":
            timm.utils.freeze(model, ["conv1", "bn1", "layer1"])
        model.set_grad_checkpointing(option == "checkpointing")
        return _synchronised(model) if option == "SyncBN" else model


@dataclass(frozen=True)
class Transformers:
    """A model of Hugging Face transformers on timm's ResNet-18, of `tests.transformers.models`."""

    kind: str
    arch: str = "resnet18"
    framework = "transformers"
    configures = True
    trunk_only = ""

    def build(self, ticket: str | None, option: str = "", **choice: Any) -> nn.Module:
        from timm.models.resnet import BasicBlock
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
            apply_activation_checkpointing,
        )

        import lth_plugins.transformers as lt
        from lth_plugins.ticket import Choice, locate
        from tests.transformers.models import processor_for, small

        std = {"image_std": [10 / 255] * 3} if option == "input" else {}
        model, processor = small(self.kind), processor_for(self.kind, **std)
        if ticket is None:  # with BatchNorm that trains, as beside a ticket
            lt.attach_ticket(model, processor, lth.Ticket.dense(model.state_dict())).detach()
        else:
            lt.attach_ticket(model, processor, Choice(ticket, **choice))
        if option == "frozen":
            trunk = model.get_submodule(locate(model).prefix[:-1])
            for part in ("conv1", "bn1", "layer1"):
                trunk.get_submodule(part).requires_grad_(False)
        if option == "checkpointing":
            apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, BasicBlock))
        return _synchronised(model) if option == "SyncBN" else model

    def loss(self, model: nn.Module) -> Tensor:
        boxes = torch.tensor([[0.3, 0.3, 0.4, 0.5], [0.6, 0.5, 0.6, 0.7]])
        labels: Any = [{"boxes": boxes, "class_labels": torch.tensor([1, 7])}] * IMAGES
        if "Semantic" in self.kind:
            labels = torch.randint(0, 11, (IMAGES, 64, 64))
        return model(pixel_values=_images(64) / 255, labels=labels).loss

    def compiled(self, model: nn.Module) -> nn.Module:
        return getattr(model, "model", model).backbone


class Smp:
    """A U-Net of segmentation_models_pytorch with a small decoder."""

    arch = "resnet18"
    framework = "segmentation_models_pytorch"
    configures = False
    trunk_only = ""

    def build(self, ticket: str | None, option: str = "", **choice: Any) -> nn.Module:
        import segmentation_models_pytorch as smp
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
            apply_activation_checkpointing,
        )
        from torchvision.models.resnet import BasicBlock

        import lth_plugins.smp  # noqa: F401  # registers ticket_resnet18

        name = "resnet18" if ticket is None else "ticket_resnet18"
        decoder = {"decoder_channels": (32, 16, 16, 8, 8), "classes": 11}
        model = smp.Unet(name, encoder_weights=ticket, **decoder)
        if option == "frozen":
            for part in ("conv1", "bn1", "layer1"):
                model.encoder.get_submodule(part).requires_grad_(False)
        if option == "checkpointing":
            apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, BasicBlock))
        return _synchronised(model) if option == "SyncBN" else model

    def loss(self, model: nn.Module) -> Tensor:
        labels = torch.randint(0, 11, (IMAGES, 64, 64))
        return nn.functional.cross_entropy(model(_images(64) / 255), labels)

    def compiled(self, model: nn.Module) -> nn.Module:
        return model.encoder


class Torchvision(_Classifier):
    """torchvision's ResNet-18 in a script of the user's own: no plug-in, `lth_plugins.attach`."""

    def build(self, ticket: str | None, option: str = "", **choice: Any) -> nn.Module:
        model = torchvision.models.resnet18()
        if ticket is not None:
            lth.attach(model, lth.Ticket.load(ticket))
        return model


def _images(size: int) -> Tensor:
    return torch.randint(0, 256, (IMAGES, 3, size, size), dtype=torch.uint8)


def _synchronised(model: nn.Module) -> nn.Module:
    """As ``SyncBatchNorm.convert_sync_batchnorm``, for a CPU: the class is detectron2's."""
    from detectron2.layers import NaiveSyncBatchNorm

    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = NaiveSyncBatchNorm
            module._stats_mode = ""
    return model


# Half precision is thirty times as slow as single on a CPU without instructions for it.
_SMALL_HEADS = {
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 2,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": 0.5,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 4,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 4,
    "MODEL.RETINANET.NUM_CONVS": 1,
}
_DEEPLAB = {
    **{f"model.{part}.norm_cfg.type": "BN" for part in ("backbone", "decode_head")},
    "model.auxiliary_head.norm_cfg.type": "BN",
    "model.backbone.depth": 18,
    "model.decode_head.in_channels": 512,
    "model.decode_head.c1_in_channels": 64,
    "model.decode_head.channels": 32,
    "model.auxiliary_head.in_channels": 256,
    "model.auxiliary_head.channels": 16,
}
HOSTS: dict[str, Host] = {
    "faster_rcnn_fpn": Detectron2("fpn"),
    # Its heads are made of bottlenecks, and its trunk ends at stride 16.
    "faster_rcnn_c4": Detectron2("c4", arch="resnet50", size=32),
    "mask_rcnn": Detectron2("mask_rcnn"),
    "retinanet": Detectron2("retinanet"),
    "fcn": Mmseg("digits/fcn_r18_ticket.py", 64, {"model.decode_head.channels": 16}),
    # Its trunk ends at stride 8.
    "deeplabv3plus": Mmseg("deeplabv3plus_r50_voc12aug_ticket.py", 32, _DEEPLAB),
    "timm": Timm(),
    "upernet": Transformers("UperNetForSemanticSegmentation"),
    "unet": Smp(),
    "torchvision_faster_rcnn": TorchvisionDetector(),
}
BASELINE = Torchvision()
ALL: dict[str, Host] = {
    "detectron2": HOSTS["faster_rcnn_fpn"],
    "mmseg": HOSTS["fcn"],
    "timm": HOSTS["timm"],
    "torchvision": HOSTS["torchvision_faster_rcnn"],
    "own_script": BASELINE,
    # Its BatchNorm is frozen in stock code.
    "transformers": Transformers("DetrForObjectDetection"),
    "smp": HOSTS["unet"],
}
"""A model of each host."""


class Marked(Protocol):
    """What needs a framework, or none."""

    framework: str | None


def marked(hosts: Mapping[str, Marked]) -> list[object]:
    """The names of hosts, with the markers of the frameworks that they need."""
    return [
        pytest.param(name, marks=getattr(pytest.mark, host.framework) if host.framework else ())
        for name, host in hosts.items()
    ]
