"""Ticket encoders of segmentation_models_pytorch; tests/conformance has what each host promises."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import lth_plugins as lth
from lth_plugins import InputSpec, Ticket, TicketError
from lth_plugins.deploy.onnx import export_onnx
from lth_plugins.pruning.structure import Channels, structured
from lth_plugins.ticket import UNIT_RANGE, Outside
from tests.ticket.states import SENTINEL_2

smp = pytest.importorskip("segmentation_models_pytorch", reason="needs lth_plugins[smp]")
lth_smp = importlib.import_module("lth_plugins.smp")
pytestmark = pytest.mark.segmentation_models_pytorch

SMALL: dict[str, dict[str, Any]] = {
    "Unet": {"decoder_channels": (32, 16, 16, 8, 8)},
    "FPN": {"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32},
    "DeepLabV3Plus": {"decoder_channels": 16},
    "MAnet": {"decoder_channels": (32, 16, 16, 8, 8), "decoder_pab_channels": 16},
}
"""Models with small decoders: skip connections, sums with GroupNorm, dilated convolutions, and an
attention over positions."""


@pytest.fixture(scope="module")
def s2() -> Ticket:
    """A sparse ticket of a ResNet-18 that reads the 13 bands of Sentinel-2."""
    torch.manual_seed(0)
    dense = Ticket.dense(timm.create_model("resnet18", in_chans=13), "moco", SENTINEL_2)
    return dense.with_masks(lth.prune(dense.weights, 0.8), {})


@pytest.fixture(scope="module")
def s2_file(s2: Ticket, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(s2.save(tmp_path_factory.mktemp("smp") / "s2.ticket"))


@pytest.fixture
def unet(s2_file: str) -> nn.Module:
    return build(s2_file)


def build(ticket: str, arch: str = "Unet", **options: Any) -> nn.Module:
    options = {"in_channels": 13, "classes": 3, **SMALL.get(arch, {}), **options}
    return smp.create_model(arch, "ticket_resnet18", encoder_weights=ticket, **options)


def images(channels: int = 13, size: int = 64) -> Tensor:
    return torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(0))


def train(model: nn.Module, steps: int = 2, size: int = 64) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(images(size=size)).square().mean().backward()
        optimizer.step()


# DPT takes no ResNet: its encoder is a vision transformer.
@pytest.mark.parametrize("arch", [m for m in smp.MODEL_ARCHITECTURES_MAPPING if m != "dpt"])
def test_every_model_of_smp_trains_on_it(arch: str, s2: Ticket, s2_file: str) -> None:
    names = {name.lower(): name for name in SMALL}
    model = build(s2_file, names.get(arch, arch))
    train(model, 1, size=128 if arch == "pan" else 64)  # PAN pools three times below stride 16
    handle = lth.attached(model)
    handle.verify()
    assert handle.masks == s2.masks and isinstance(model.encoder, lth_smp.TicketEncoder)


def test_fewer_stages_and_dilated_ones_are_the_stock_encoders(s2: Ticket, s2_file: str) -> None:
    for options in ({"depth": 3}, {"output_stride": 8}, {"output_stride": 16}):
        encoders = [
            smp.encoders.get_encoder(name, in_channels=13, weights=ticket, **options).eval()
            for name, ticket in (("ticket_resnet18", s2_file), ("resnet18", None))
        ]
        ours, stock = encoders
        assert list(ours.state_dict()) == list(stock.state_dict())
        stock.load_state_dict(ours.state_dict())
        assert ours.out_channels == stock.out_channels and ours.out_channels[0] == 13
        expected = stock(images())
        for one, other in zip(ours(images()), expected, strict=True):
            assert torch.equal(one, other)
        assert lth.attached(ours).masks == s2.masks


def test_a_saved_model_is_made_again_with_its_ticket_or_as_a_stock_one(
    unet: nn.Module, s2: Ticket, tmp_path: Path
) -> None:
    train(unet)
    unet.save_pretrained(tmp_path / "saved")
    expected = unet.eval()(images())
    again = smp.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(again(images()), expected) and lth.attached(again).masks == s2.masks
    options = {"encoder_name": "resnet18", "encoder_weights": None}
    stock = smp.from_pretrained(tmp_path / "saved", **options).eval()
    assert torch.equal(stock(images()), expected) and lth.attached(stock) is None
    assert type(stock.encoder) is smp.encoders.encoders["resnet18"]["encoder"]


def test_a_checkpoint_of_another_ticket_is_refused(unet: nn.Module, s2: Ticket, tmp_path) -> None:
    other = s2.with_weights(s2.weights).shuffled(1).save(tmp_path / "other.ticket")
    state = unet.state_dict()
    with pytest.raises(TicketError, match=r"trained with masks .* zero [1-9][\d,]*"):
        build(str(other)).load_state_dict(state)
    with pytest.raises(TicketError, match="trained with masks"):
        build(str(other)).encoder.load_state_dict(unet.encoder.state_dict())


def test_the_input_is_the_tickets(s2_file: str, resnet18_state, tmp_path: Path) -> None:
    params = smp.encoders.get_preprocessing_params("ticket_resnet18", s2_file)
    assert params["mean"] == [0.0] * 13 and params["std"] == [10000.0] * 13
    preprocess = smp.encoders.get_preprocessing_fn("ticket_resnet18", s2_file)
    assert (preprocess(np.full((4, 4, 13), 5000.0)) == 0.5).all()
    caffe = InputSpec("BGR", (0.4, 0.5, 0.6), (0.1, 0.2, 0.3))
    for name, spec in (("rgb", InputSpec()), ("unit", UNIT_RANGE), ("caffe", caffe)):
        file = str(Ticket.dense(resnet18_state, input=spec).save(tmp_path / f"{name}.ticket"))
        pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3))
        ordered = pixels[..., ::-1] if spec.format == "BGR" else pixels
        expected = (ordered / 255 - spec.mean) / np.array(spec.std)
        found = smp.encoders.get_preprocessing_fn("ticket_resnet18", file)(pixels)
        assert np.allclose(found, expected), name


@pytest.mark.parametrize(
    ("name", "weights", "channels", "message"),
    [
        (
            "ticket_resnet18",
            "S2",
            3,
            r"13 channels \(B1,.* with in_channels=3: write in_channels=13",
        ),
        ("ticket_resnet18", "RGB", 13, r"3 channels \(RGB\), .* write in_channels=3"),
        ("ticket_resnet50", "S2", 13, "the ticket is for a resnet18 .* trunk is a resnet50"),
        ("ticket_resnet18", "imagenet", 3, "found 'imagenet', weights of smp's own: give a ticket"),
        ("ticket_resnet18", Path("r18.ticket"), 3, "to be text, .* found a PosixPath"),
        ("ticket_resnet18", None, 3, "name a ticket .* found none: for a dense model"),
        ("ticket_resnet18", "nowhere.ticket", 3, "nothing at nowhere.ticket.* without ticket_"),
        ("ticket_resnet18", "no_such_name", 3, "no_such_name"),
    ],
)
def test_what_cannot_be_an_encoder_is_refused(
    name: str, weights: str | None, channels: int, message: str, s2_file: str, ticket18_file: Path
) -> None:
    ticket = {"S2": s2_file, "RGB": str(ticket18_file)}.get(weights, weights)
    with pytest.raises(TicketError, match=message):
        smp.Unet(name, encoder_weights=ticket, in_channels=channels)
    if weights not in ("S2", "RGB", None):
        with pytest.raises(TicketError, match=message):
            smp.encoders.get_preprocessing_params(name, weights)


def test_smps_own_names_are_as_they_were(s2_file: str) -> None:
    dense = smp.Unet("resnet18", encoder_weights=None, in_channels=13)
    assert lth.attached(dense) is None
    with pytest.raises(KeyError, match="Wrong pretrained weights"):
        smp.Unet("resnet18", encoder_weights=s2_file)


@pytest.mark.parametrize("name", ["resnet18", "tu-resnet18"])
def test_a_ticket_is_attached_to_any_resnet_encoder(name: str, s2: Ticket) -> None:
    options = {"encoder_weights": None, "in_channels": 13, "classes": 3, **SMALL["Unet"]}
    model = smp.Unet(name, **options)
    lth.attach(model, s2)
    train(model)
    lth.attached(model).verify()
    assert list(model.state_dict()) == list(smp.Unet(name, **options).state_dict())
    with pytest.raises(TicketError, match="the model's stem reads 4: build .*in_channels=13"):
        lth.attach(smp.Unet(name, **{**options, "in_channels": 4}), s2)


def test_a_decoder_is_pruned_too_and_waits_for_the_whole_model(
    unet: nn.Module, s2: Ticket, tmp_path: Path
) -> None:
    lth.attached(unet).detach()
    heads = {n: tuple(p.shape) for n, p in unet.decoder.named_parameters("decoder") if p.dim() == 4}
    dense = Ticket(lth.Masks.ones(s2.arch.prunable), unet.encoder.state_dict(), s2.meta)
    outside = Outside.dense(heads, unet.state_dict())
    whole = Ticket(dense.masks, dense.weights, dense.meta, outside=outside)
    pruned = whole.with_masks(lth.prune(unet, 0.5, whole.all_masks), {})
    file = str(pruned.save(tmp_path / "whole.ticket"))
    model = build(file)
    with pytest.raises(TicketError, match=r"lth_plugins.attach_rest\(model\)"):
        train(model, 1)
    lth.attach_rest(model)
    train(model)
    assert lth.attached(model).all_masks == pruned.all_masks


@pytest.mark.parametrize("arch", [arch for arch in SMALL if arch != "Unet"])
def test_slimming_follows_the_decoders(arch: str, s2_file: str) -> None:
    model, keep = build(s2_file, arch).eval(), []
    if arch == "MAnet":  # it adds what its attention multiplies: no graph shows that
        with pytest.raises(TicketError, match="Keep the module that does more with its features"):
            lth.slim(model, images(), flops=0.5)
        keep = ["decoder.center", "encoder.layer4"]
    small = lth.slim(model, images(), flops=0.5, keep=keep)
    count = sum(parameter.numel() for parameter in small.parameters())
    assert count < 0.8 * sum(parameter.numel() for parameter in model.parameters())
    assert list(small.state_dict()) == list(model.state_dict())
    assert small(images()).shape == model(images()).shape
    train(small, 1)


def test_a_compacted_model_computes_the_same_and_is_exported(s2: Ticket, tmp_path: Path) -> None:
    dense = Ticket(lth.Masks.ones(s2.arch.prunable), s2.weights, s2.meta)
    channels = structured(dense, Channels(density=0.3, multiple=8)).save(tmp_path / "c.ticket")
    model = build(str(channels)).eval()
    small = lth.compact(model)
    assert small.encoder.layer4[0].conv1.out_channels < 512
    assert torch.allclose(small(images()), model(images()), atol=1e-4)
    assert export_onnx(small, images(), tmp_path / "unet.onnx", reference=model) < 1e-3
