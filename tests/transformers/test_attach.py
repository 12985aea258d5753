"""`attach_ticket` on every model it is for: what it loads, changes, and refuses."""

from __future__ import annotations

import copy
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoBackbone, DetrImageProcessor, SwinConfig, ViTImageProcessor

import lth_plugins as lth
import lth_plugins.transformers as lt
from lth_plugins.masking.hosting import warn_if_untested
from lth_plugins.ticket import UNIT_RANGE, Choice, InputSpec, locate
from tests.transformers.models import (
    OPTIONS,
    Scenes,
    collate,
    processor_for,
    resnet,
    small,
)

DETR, UPERNET = "DetrForObjectDetection", "UperNetForSemanticSegmentation"
BATCH_NORM = "model.backbone.model.layer1.0.bn1"


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def detr() -> Any:
    """A DETR on timm's ResNet-18; tests take a copy."""
    return small(DETR)


@pytest.mark.parametrize(
    ("kind", "arch"),
    [(kind, "timm" if kind.startswith("RTDetr") else "resnet18") for kind in OPTIONS]
    + [(DETR, "timm")],
)
def test_a_ticket_trains_masked_and_stock_code_loads_what_is_saved(
    kind: str, arch: str, ticket18: lth.Ticket, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, processor = small(kind, arch), processor_for(kind)
    keys = list(model.state_dict())
    handle = lt.attach_ticket(model, processor, ticket18)
    model.get_submodule(locate(model).prefix[:-1]).requires_grad_(True)
    assert list(model.state_dict()) == keys
    if model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable()
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.train().parameters(), 1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    scenes = Scenes(kind, processor, 2)
    before = state_of(model)
    for _ in range(2):
        accelerator.backward(model(**collate([scenes[0], scenes[1]])).loss)
        optimizer.step()
        optimizer.zero_grad()
    handle.verify()
    found = locate(model).keys
    for name in ("layer1.0.conv1.weight", "layer4.1.conv2.weight", "layer4.1.bn2.running_mean"):
        assert not torch.equal(model.state_dict()[found[name]], before[found[name]]), name
    model.save_pretrained(tmp_path)
    stock, info = getattr(transformers, kind).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    pixels = scenes[0]["pixel_values"][None]
    with torch.no_grad():
        ours, theirs = model.eval()(pixel_values=pixels), stock.eval()(pixel_values=pixels)
    assert torch.allclose(ours[0], theirs[0], atol=1e-5)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50d"])
def test_a_backbone_computes_what_torchvision_and_timm_compute(arch: str) -> None:
    """ResNetBackbone, and that of an RT-DETR."""
    torch.manual_seed(0)
    if arch == "resnet18":
        model = backbone = AutoBackbone.from_config(resnet(arch, (1, 2, 3, 4)))
        plain = torchvision.models.resnet18().eval()
    else:
        model = small("RTDetrForObjectDetection", arch)
        backbone, plain = model.model.backbone.model, timm.create_model(arch).eval()
    ticket = lth.Ticket.dense(plain.state_dict())
    ticket = ticket.with_masks(lth.prune(ticket.weights, 0.5), {})
    lt.attach_ticket(model, DetrImageProcessor(), ticket)
    lth.attach(plain, ticket)
    stages: list[Tensor] = []
    for stage in (plain.layer1, plain.layer2, plain.layer3, plain.layer4):
        stage.register_forward_hook(lambda _, __, output: stages.append(output))
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        plain(image)
        found = backbone.eval()(image).feature_maps
    for one, other in zip(found, stages[-len(found) :], strict=True):
        assert torch.allclose(one, other, atol=1e-5, rtol=1e-5)


def test_frozen_batch_norm_becomes_one_that_trains_unless_allowed(
    detr: Any, ticket18: lth.Ticket, caplog: pytest.LogCaptureFixture
) -> None:
    model, kept = copy.deepcopy(detr), copy.deepcopy(detr)
    with caplog.at_level(logging.INFO):
        lt.attach_ticket(model, DetrImageProcessor(), ticket18)
    assert "Replaced 20 DetrFrozenBatchNorm2d in the trunk" in caplog.text
    norm = model.get_submodule(BATCH_NORM)
    assert isinstance(norm, nn.BatchNorm2d) and norm.weight.requires_grad
    assert torch.equal(norm.running_mean, ticket18.weights["layer1.0.bn1.running_mean"])
    model.load_state_dict(dict(kept.state_dict() | model.state_dict()))  # strict, no metadata
    lt.attach_ticket(kept, DetrImageProcessor(), ticket18, allow_frozen_norm=True)
    assert type(kept.get_submodule(BATCH_NORM)) is type(detr.get_submodule(BATCH_NORM))
    assert "normalisation is frozen" in caplog.text


def test_a_trunk_that_transformers_freezes_is_named(
    ticket18: lth.Ticket, caplog: pytest.LogCaptureFixture
) -> None:
    model = small(DETR, "resnet18")
    lt.attach_ticket(model, DetrImageProcessor(), ticket18)
    assert "model.get_submodule('model.backbone.model').requires_grad_(True)" in caplog.text


def test_default_mean_and_std_become_the_tickets(detr: Any, ticket18: lth.Ticket) -> None:
    ticket = lth.Ticket.dense(ticket18.weights, input=UNIT_RANGE)
    processor = DetrImageProcessor(do_resize=False)
    image = np.full((64, 64, 3), 255, np.uint8)
    processor(image)
    lt.attach_ticket(copy.deepcopy(detr), processor, ticket)
    assert processor(image, return_tensors="pt")["pixel_values"].max() == pytest.approx(1)
    found = ViTImageProcessor(do_normalize=False)  # of pixels in [0, 1], as the ticket wants
    lt.attach_ticket(copy.deepcopy(detr), found, ticket)
    assert not found.do_normalize


def test_another_ticket_replaces_the_first_and_its_input(detr: Any, ticket18: lth.Ticket) -> None:
    model, processor = copy.deepcopy(detr), DetrImageProcessor()
    unit = lth.Ticket.dense(ticket18.weights, input=UNIT_RANGE)
    counts = []
    for ticket in (unit, ticket18):
        lt.attach_ticket(model, processor, ticket).verify()
        hooks = (model._load_state_dict_pre_hooks, model._state_dict_hooks)
        counts.append([len(each) for each in hooks])
    assert counts[0] == counts[1]
    assert lth.attached(model).masks == ticket18.masks
    assert processor.image_mean == [0.485, 0.456, 0.406]


def test_an_array_is_a_mean_like_a_list(detr: Any, ticket18: lth.Ticket) -> None:
    mean = np.array([0.485, 0.456, 0.406])
    lt.attach_ticket(copy.deepcopy(detr), DetrImageProcessor(image_mean=mean), ticket18)
    with pytest.raises(lth.TicketError, match=r"returns RGB .* mean \[127.5"):
        processor = DetrImageProcessor(image_mean=mean * 0 + 0.5)
        lt.attach_ticket(copy.deepcopy(detr), processor, ticket18)


CHANNELS = {"num_channels": 13}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no normalisation": (
        {"do_normalize": False},
        {},
        r"DetrImageProcessor returns RGB input with mean \[0.0, 0.0, 0.0\] .*do_normalize=True, "
        r"image_mean=\[0.485, 0.456, 0.406\], image_std=\[0.229, 0.224, 0.225\]\), or keep_input",
    ),
    "another mean": ({"image_mean": [0.5, 0.5, 0.5]}, {}, r"returns RGB .* mean \[127.5"),
    "no rescaling": ({"do_rescale": False}, {}, r"returns RGB .* std \[0.229"),
    "channel order": ({}, {"input": InputSpec("BGR")}, "take a ticket of weights .* that order"),
    "no processor": ({"none": True}, {}, "expected the image processor .* found None"),
    "no model": ({}, {"plain": True}, r"found a ResNet: .*lth_plugins\.attach"),
    "no trunk": (
        {},
        {"backbone_config": SwinConfig(out_features=["stage4"], depths=[1] * 4, embed_dim=8)},
        r"expected a ResNet as the backbone of the UperNet.*, found SwinBackbone: build",
    ),
    "another depth": ({}, {"arch": "resnet50"}, "ticket is for a resnet50 .* trunk is a resnet18"),
    "13 channels": ({}, CHANNELS, "reads images of 3 channels .* stem reads 13"),
    "pre-trained": ({}, {"pretrained": True}, "loaded over the ticket's: write use_pretrained_ba"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_contradiction_is_refused_and_nothing_changes(
    name: str, detr: Any, ticket18: lth.Ticket
) -> None:
    settings, change, message = copy.deepcopy(REFUSED[name])
    processor = None if settings.pop("none", False) else DetrImageProcessor(**settings)
    model, ticket = copy.deepcopy(detr), ticket18
    if "backbone_config" in change:
        model = small(UPERNET, **change)
    elif "plain" in change:
        model = torchvision.models.resnet18()
    elif change == CHANNELS:
        model = small(DETR, backbone_config=resnet("timm", (4,), num_channels=13))
    elif change.pop("pretrained", False):
        model.config.backbone_config.use_pretrained_backbone = True
    elif change.get("arch"):
        ticket = lth.Ticket.dense(torchvision.models.resnet50().state_dict())
    elif change:
        ticket = lth.Ticket.dense(ticket18.weights, **change)
    before, given = state_of(model), processor and processor.to_dict()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(lth.TicketError, match=re.compile(message, re.DOTALL)):
        lt.attach_ticket(model, processor, ticket)
    after = model.state_dict()
    assert before.keys() == after.keys() and lth.attached(model) is None
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert kinds == [type(module) for module in model.modules()]
    assert given == (processor and processor.to_dict())


def test_what_is_allowed_is_not_refused(detr: Any, ticket18_file: Path) -> None:
    processor, model = DetrImageProcessor(do_normalize=False), copy.deepcopy(detr)
    masked = Choice(ticket18_file, load_weights=False)
    handle = lt.attach_ticket(model, processor, masked, keep_input=True)
    handle.verify()
    key = locate(detr).keys["conv1.weight"]
    assert torch.equal(model.state_dict()[key], detr.state_dict()[key])
    assert not processor.do_normalize


def test_a_checkpoint_of_other_masks_is_refused_under_the_names_in_its_file(
    detr: Any, ticket18: lth.Ticket, tmp_path: Path
) -> None:
    model, other = copy.deepcopy(detr), copy.deepcopy(detr)
    lt.attach_ticket(model, DetrImageProcessor(), ticket18)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() != model.state_dict().keys()  # or this test shows nothing
    lt.attach_ticket(other, DetrImageProcessor(), ticket18.shuffled(3))
    with pytest.raises(lth.TicketError, match="zero .* allow_other_checkpoint=True in attach_tick"):
        other.load_state_dict(saved, strict=False)
    lt.attach_ticket(other, DetrImageProcessor(), ticket18)
    other.load_state_dict(saved)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())


def test_a_version_that_was_not_tested_is_named(caplog: pytest.LogCaptureFixture) -> None:
    now = transformers.__version__
    major = int(now.split(".")[0])
    warn_if_untested("transformers", "5.0", now)
    warn_if_untested("transformers", f"{major}", f"{major}")
    assert not caplog.text
    warn_if_untested("transformers", "4.0", "4.57")
    warn_if_untested("transformers", f"{major + 1}.0", f"{major + 1}.2")
    assert caplog.text.count(f"transformers {now} is installed") == 2
    assert "tested with 4.0 to 4.57" in caplog.text
