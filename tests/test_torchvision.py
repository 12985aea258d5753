"""Tickets as the trunks of torchvision's detectors and segmentors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torchvision.models import ResNet50_Weights, get_model
from torchvision.ops.misc import FrozenBatchNorm2d

import lth_plugins as lth
import lth_plugins.torchvision as tv
from lth_plugins.slimming.widths import adopt_widths
from lth_plugins.ticket import UNIT_RANGE, Choice

DETECTORS = [
    *("fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn"),
    *("maskrcnn_resnet50_fpn_v2", "retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2"),
    "fcos_resnet50_fpn",
]
SEGMENTORS = ["deeplabv3_resnet50", "fcn_resnet50", "fcn_resnet101"]
SMALL = {"num_classes": 3, "min_size": 64, "max_size": 64}


@pytest.fixture(scope="module")
def tickets(ticket18: lth.Ticket) -> dict[str, lth.Ticket]:
    """A ticket of each architecture that torchvision's names have, and of ResNet-18."""
    found = {"resnet18": ticket18}
    for arch in ("resnet50", "resnet101"):
        state = get_model(arch).state_dict()
        masks = lth.prune(state, 0.8)
        found[arch] = lth.Ticket(masks, state, lth.TicketMeta(arch, source="test"))
    return found


def build(name: str, ticket: Any, **options: Any) -> nn.Module:
    make = tv.detection if "_fpn" in name else tv.segmentation
    return make(name, ticket, **options)


@pytest.mark.parametrize("name", DETECTORS + SEGMENTORS)
def test_a_model_is_torchvisions_with_the_ticket_on_it(
    name: str, tickets: dict[str, lth.Ticket]
) -> None:
    ticket = tickets[name.split("_")[1]]
    model = build(name, ticket, num_classes=3)
    stock = get_model(name, weights=None, weights_backbone=None, num_classes=3)
    assert type(model) is type(stock)
    shapes = [{n: v.shape for n, v in one.state_dict().items()} for one in (model, stock)]
    assert list(shapes[0].items()) == list(shapes[1].items())
    assert str(model) == str(stock)
    handle = lth.attached(model)
    assert handle.ticket() == ticket
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("name", DETECTORS + SEGMENTORS[:2])
def test_the_name_says_the_trunk(name: str, tickets: dict[str, lth.Ticket]) -> None:
    own = name.replace("resnet50", "resnet18")
    model = build(own, tickets["resnet18"], num_classes=3)
    assert lth.attached(model).ticket() == tickets["resnet18"]
    features = model.eval().backbone(torch.rand(1, 3, 64, 64)).values()
    channels = 256 if "_fpn" in name else 512
    assert {one.shape[1] for one in features} == {channels}
    with pytest.raises(lth.TicketError, match=f"found one of resnet18: write '{own}'"):
        build(name, tickets["resnet18"])


BAD = [
    ({"weights": "DEFAULT"}, "weights='DEFAULT' would be loaded over the ticket"),
    ({"weights_backbone": ResNet50_Weights.DEFAULT}, "weights_backbone=.* over the ticket"),
    ({"pretrained": True}, "pretrained=True would be loaded over the ticket"),
    ({"norm_layer": FrozenBatchNorm2d}, "FrozenBatchNorm2d keeps the BN .* write norm_layer=torch"),
    ({"norm_layer": nn.SyncBatchNorm}, "found norm_layer=SyncBatchNorm: .*convert_sync_batchnorm"),
    ({"num_clases": 3}, "unknown option 'num_clases'.* did you mean 'num_classes'"),
]
BAD_DETECTION = [
    ({"trainable_backbone_layers": 3}, r"found 3: pruned stages must adapt\. To freeze one"),
    ({"image_mean": [0.0] * 3}, r"trained on RGB .* but the model has .* leave out image_mean"),
    ({"image_std": [0.2]}, r"expected input\.std to be .* found \[0\.2\]"),
    ({"image_sdt": [0.2] * 3}, "unknown option 'image_sdt'.* did you mean 'image_std'"),
]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        *(("fasterrcnn_resnet18_fpn", *bad) for bad in BAD + BAD_DETECTION),
        *(("fcn_resnet18", *bad) for bad in BAD),
        (
            "fasterrcn_resnet18_fpn",
            {},
            "unknown detector .* did you mean 'fasterrcnn_resnet50_fpn'",
        ),
        ("fcos_resnet18_fpn_v2", {}, "unknown detector"),
        ("ssd300_vgg16_fpn", {}, "unknown detector"),
        ("lraspp_mobilenet_v3_large", {}, "unknown segmentor .* known are deeplabv3_resnet50"),
    ],
)
def test_what_contradicts_a_ticket_is_refused(
    name: str, options: dict[str, Any], message: str, ticket18: lth.Ticket
) -> None:
    with pytest.raises(lth.LthError, match=message):
        build(name, ticket18, **options)


def test_options_that_ask_for_what_is_so_are_accepted(ticket18: lth.Ticket) -> None:
    mean, std = (list(values) for values in (ticket18.meta.input.mean, ticket18.meta.input.std))
    plain = {"weights": None, "weights_backbone": None, "norm_layer": nn.BatchNorm2d}
    own = {"trainable_backbone_layers": 5, "image_mean": mean, "image_std": None}
    model = tv.detection("fcos_resnet18_fpn", ticket18, **SMALL, **plain, **own)
    assert (model.transform.image_mean, model.transform.image_std) == (mean, std)
    lth.attached(tv.segmentation("fcn_resnet18", ticket18, **plain)).verify()


def test_a_ticket_that_torchvision_cannot_feed_or_build_is_refused(ticket18: lth.Ticket) -> None:
    with pytest.raises(lth.TicketError, match="found none: set ticket to a ticket file"):
        tv.detection("fcos_resnet18_fpn", "")
    bgr = replace(ticket18, meta=replace(ticket18.meta, input=lth.InputSpec("BGR")))
    with pytest.raises(lth.TicketError, match="give models RGB, but this ticket wants BGR"):
        tv.segmentation("fcn_resnet18", bgr)
    deep = lth.Ticket.dense(timm.create_model("resnet18d"))
    with pytest.raises(lth.ConfigError, match="torchvision has no resnet18d"):
        tv.detection("fcos_resnet18d_fpn", deep)


def test_the_input_is_the_tickets_and_is_checked_when_a_checkpoint_loads(
    ticket18: lth.Ticket,
) -> None:
    unit = replace(ticket18, meta=replace(ticket18.meta, input=UNIT_RANGE))
    model = tv.detection("fcos_resnet18_fpn", unit, **SMALL)
    assert (model.transform.image_mean, model.transform.image_std) == ([0.0] * 3, [1.0] * 3)
    other = tv.detection("fcos_resnet18_fpn", ticket18, **SMALL)
    with pytest.raises(lth.TicketError, match="the checkpoint was trained on RGB input with mean"):
        other.load_state_dict(model.state_dict())


def test_a_dense_checkpoint_is_refused_unless_it_is_allowed(
    ticket18: lth.Ticket, dense18_file: Path
) -> None:
    dense = tv.segmentation("fcn_resnet18", dense18_file, num_classes=3).state_dict()
    with pytest.raises(lth.TicketError, match="allow_other_checkpoint=True starts from"):
        tv.segmentation("fcn_resnet18", ticket18, num_classes=3).load_state_dict(dense)
    options = {"num_classes": 3, "allow_other_checkpoint": True}
    model = tv.segmentation("fcn_resnet18", ticket18, **options)
    model.load_state_dict(dense)
    lth.attached(model).verify()


def test_a_search_knows_the_neck_and_the_predictors(dense18_file: Path, tmp_path: Path) -> None:
    outside = {}
    for scope in ("backbone+neck", "all"):
        search = tv.task_search(
            lambda: tv.detection("fcos_resnet18_fpn", dense18_file, **SMALL),
            lambda model, run: None,
            dense18_file,
            tmp_path / "out",
            iterations=1,
            rounds=1,
            scope=scope,
        )
        outside[scope] = set(search.host.outside)
    assert {name.split(".")[1] for name in outside["backbone+neck"]} == {"fpn"}
    heads = outside["all"] - outside["backbone+neck"]
    assert {name.split(".")[2] for name in heads} == {"conv"} and len(heads) == 8
    assert not (tmp_path / "out").exists()
    with pytest.raises(lth.ConfigError, match="starts from all weights of a dense ticket"):
        tv.task_search(None, None, Choice(dense18_file, reverse=True), tmp_path, iterations=1)


def test_a_slimmed_detector_trains_and_its_checkpoint_loads(
    ticket18: lth.Ticket, tmp_path: Path
) -> None:
    model = tv.detection("fcos_resnet18_fpn", ticket18, **SMALL)
    small = lth.slim(model, [torch.rand(3, 64, 64)], flops=0.6).train()
    target = {"boxes": torch.tensor([[4.0, 4.0, 30.0, 40.0]]), "labels": torch.tensor([1])}
    sum(small([torch.rand(3, 64, 64)] * 2, [target] * 2).values()).backward()
    torch.save(small.state_dict(), tmp_path / "slim.pth")
    state = torch.load(tmp_path / "slim.pth", weights_only=True)
    assert sum(v.numel() for v in state.values()) < 0.8 * sum(
        v.numel() for v in model.state_dict().values()
    )
    again = tv.detection("fcos_resnet18_fpn", ticket18, **SMALL)
    adopt_widths(again, state)
    again.load_state_dict(state)
    images = [torch.rand(3, 64, 64)]
    for one, other in zip(
        small.eval()(images)[0].values(), again.eval()(images)[0].values(), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_detectors_and_segmentors_are_written_as_onnx(ticket18: lth.Ticket, tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = [torch.rand(3, 64, 64), torch.rand(3, 48, 64)]
    found = {"score_thresh": 0.0, "detections_per_img": 5}
    detector = tv.detection("fcos_resnet18_fpn", ticket18, **SMALL, **found).eval()
    assert tv.export_onnx(detector, images, tmp_path / "detector.onnx") < 1e-4
    segmentor = tv.segmentation("fcn_resnet18", ticket18, num_classes=3).eval()
    assert tv.export_onnx(segmentor, [images[0]] * 2, tmp_path / "segmentor.onnx") < 1e-4
