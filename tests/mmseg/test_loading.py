"""What a backbone with a ticket accepts from mmengine's loaders, and what its checkpoints note."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mmseg.models  # noqa: F401  # fills mmseg's registry
import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.runner import Runner, load_checkpoint
from mmengine.runner.checkpoint import get_state_dict, save_checkpoint
from mmseg.apis import inference_model, init_model
from mmseg.registry import MODELS
from torch import nn

import lth_plugins as lth
import lth_plugins.mmseg  # fills the registries
from lth_plugins.pruning.structure import Channels, structured

IMAGENET = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True)


pytestmark = pytest.mark.usefixtures("quiet")


def config(ticket: Path | None, type: str = "TicketResNet", depth: int = 18, **options: Any) -> Any:
    """The config of a segmentor on a ticket, or without one."""
    init_cfg = ticket and dict(type="Ticket", checkpoint=str(ticket), **options)
    head = dict(type="FCNHead", in_channels=512, channels=16, num_convs=1, num_classes=11)
    return ConfigDict(
        type="EncoderDecoder",
        data_preprocessor=dict(type="SegDataPreProcessor", size=(64, 64), **IMAGENET),
        backbone=dict(type=type, depth=depth, init_cfg=init_cfg),
        decode_head=head,
        test_cfg=dict(mode="whole"),
    )


def segmentor(ticket: Path, **options: Any) -> nn.Module:
    model = MODELS.build(config(ticket, **options))
    model.init_weights()
    return model


def save(model: nn.Module, path: Path, **meta: Any) -> str:
    """As mmengine's Runner does."""
    save_checkpoint({"state_dict": get_state_dict(model), "meta": meta}, str(path))
    return str(path)


def test_pretrained_weights_over_the_ticket_are_refused(ticket18_file, tmp_path) -> None:
    """mmengine initialises by them last, whatever else is initialised."""
    file = save(MODELS.build(config(None, "ResNet")), tmp_path / "dense.pth")
    cfg = config(ticket18_file)
    cfg["init_cfg"] = dict(type="Pretrained", checkpoint=file)
    with pytest.raises(lth.TicketError, match="masks that it says nothing about"):
        MODELS.build(cfg).init_weights()


@pytest.mark.parametrize("depth", [34, 101], ids=["deeper", "other blocks"])
def test_a_checkpoint_of_another_architecture_is_refused(depth, ticket18_file, tmp_path) -> None:
    cfg = config(None, "ResNet", depth)
    if depth == 101:
        cfg["decode_head"]["in_channels"] = 2048
    file = save(MODELS.build(cfg), tmp_path / "deeper.pth")
    with pytest.raises(lth.TicketError, match="expected a checkpoint of a resnet18"):
        load_checkpoint(segmentor(ticket18_file), file)


@pytest.fixture(scope="module")
def compacted(
    quiet: None, ticket18: lth.Ticket, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, str]:
    """A segmentor on a channel ticket, and the file of what `lth.compact` makes of it."""
    folder = tmp_path_factory.mktemp("compacted")
    ticket = structured(ticket18, Channels(multiple=8)).save(folder / "channels.ticket")
    model = segmentor(ticket)
    classes = dict(classes=[str(i) for i in range(11)], palette=[[20 * i] * 3 for i in range(11)])
    return model, save(lth.compact(model), folder / "compact.pth", dataset_meta=classes)


@pytest.mark.parametrize(("type", "ticket"), [("TicketResNet", False), ("ResNet", True)])
def test_mmsegs_own_loader_takes_a_compacted_checkpoint(
    type: str, ticket: bool, compacted, ticket18_file
) -> None:
    model, file = compacted
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    if ticket:  # built to be tested by a Runner, which leaves the init_cfg
        small = MODELS.build(config(ticket18_file, type))
        load_checkpoint(small, file)
        small.eval()
        with torch.no_grad():
            batch = torch.from_numpy(image).permute(2, 0, 1)[None].float()
            found, expected = (m(batch) for m in (small, model.eval()))
        assert torch.allclose(found, expected, atol=1e-3)
    else:
        pipeline = [dict(type="LoadImageFromNDArray"), dict(type="PackSegInputs")]
        cfg = Config(dict(model=config(ticket18_file, type), test_pipeline=pipeline))
        cfg.test_dataloader = dict(dataset=dict(pipeline=pipeline))
        small = init_model(cfg, file, device="cpu")
        model.cfg = cfg
        found, expected = (inference_model(m.eval(), image).seg_logits.data for m in (small, model))
        assert torch.allclose(found, expected, atol=1e-3)
    assert small.backbone.layer4[1].conv1.out_channels < 512
    with pytest.raises(lth.TicketError, match="an optimizer that was made before"):
        small.train()
        small.backbone(torch.zeros(2, 3, 64, 64))


def test_a_training_that_starts_from_a_compacted_checkpoint_is_refused(
    compacted, tiny_config: Callable[..., Any]
) -> None:
    _, file = compacted
    with pytest.raises(lth.TicketError, match="the widths of a compacted checkpoint"):
        Runner.from_cfg(tiny_config({"load_from": file})).train()
