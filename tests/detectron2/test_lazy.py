"""Tickets in LazyConfigs."""

from pathlib import Path

import pytest
import torch
from detectron2.config import LazyCall, LazyConfig, instantiate
from detectron2.engine import SimpleTrainer
from detectron2.model_zoo import get_config
from omegaconf import DictConfig
from torch import nn

import lth_plugins as lth
from lth_plugins.detectron2 import with_ticket

EXAMPLE = (
    Path(__file__).parents[2]
    / "configs/detectron2/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_ticket.py"
)


def small(norm: str = "BN") -> DictConfig:
    """The zoo's Mask R-CNN as an R18 of the ticket's input."""
    model = get_config("common/models/mask_rcnn_fpn.py").model
    model.backbone.bottom_up.stages.depth = 18
    model.backbone.bottom_up.stages.pop("stride_in_1x1")
    model.backbone.bottom_up.stem.norm = model.backbone.bottom_up.stages.norm = norm
    model.input_format = "RGB"
    model.pixel_mean = list(lth.InputSpec().mean_255)
    model.pixel_std = list(lth.InputSpec().std_255)
    return model


def test_the_example_trains_a_step(r50: Path) -> None:
    cfg = LazyConfig.load(str(EXAMPLE))
    cfg = LazyConfig.apply_overrides(
        cfg,
        [
            f"model.ticket={r50}",
            "model.module.backbone.bottom_up.stem.norm=BN",
            "model.module.backbone.bottom_up.stages.norm=BN",
            "model.module.roi_heads.num_classes=10",
            "model.module.roi_heads.batch_size_per_image=4",
            "model.module.roi_heads.box_head.fc_dims=[16]",
            "model.module.roi_heads.box_predictor.input_shape.channels=16",
            "dataloader.train.dataset.names=tiny_scenes_train",
            "dataloader.train.total_batch_size=1",
            "dataloader.train.num_workers=0",
            "+dataloader.train.mapper.instance_mask_format=bitmask",
        ],
    )
    cfg.dataloader.train.mapper.augmentations = []
    assert cfg.train.init_checkpoint == ""
    assert cfg.dataloader.train.mapper.image_format == "RGB"
    assert cfg.dataloader.test.mapper.image_format == "RGB"
    model = instantiate(cfg.model)
    cfg.optimizer.params.model = model
    loader = instantiate(cfg.dataloader.train)
    trainer = SimpleTrainer(model, loader, instantiate(cfg.optimizer))
    trainer.train(0, 1)
    trained = lth.attached(model).ticket()
    ticket = lth.Ticket.load(r50)
    assert trained.masks == ticket.masks
    assert not torch.equal(
        trained.weights["layer4.2.conv3.weight"], ticket.weights["layer4.2.conv3.weight"]
    )


def test_a_backbone_alone_can_be_wrapped(r18: Path) -> None:
    model = small().backbone
    model.bottom_up = LazyCall(with_ticket)(module=model.bottom_up, ticket=str(r18))
    model.in_features = ["res2", "res3", "res4", "res5"]
    assert lth.attached(instantiate(model)).ticket() == lth.Ticket.load(r18)


def test_another_input_is_an_error_unless_the_config_says_so(r18: Path) -> None:
    model = small()
    model.input_format = "BGR"
    with pytest.raises(lth.TicketError, match=r'model\.input_format = .* = "RGB"'):
        instantiate(LazyCall(with_ticket)(module=model, ticket=str(r18)))
    wrapped = LazyCall(with_ticket)(module=model, ticket=str(r18), keep_input=True)
    assert lth.attached(instantiate(wrapped)) is not None


def test_frozen_norm_is_an_error_unless_the_config_says_so(r18: Path) -> None:
    model = small("FrozenBN").backbone.bottom_up
    with pytest.raises(lth.TicketError, match="statistics of the dense network"):
        instantiate(LazyCall(with_ticket)(module=model, ticket=str(r18)))
    wrapped = LazyCall(with_ticket)(module=model, ticket=str(r18), allow_frozen_norm=True)
    assert lth.attached(instantiate(wrapped)) is not None


def test_no_ticket_is_an_error_that_says_where_to_put_it() -> None:
    with pytest.raises(lth.TicketError, match="set `ticket` of with_ticket"):
        with_ticket(nn.Identity(), "")
