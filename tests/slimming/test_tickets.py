"""Tickets of slimmed models: the same zeros in fewer channels, and more of them."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

import lth_plugins as lth
from lth_plugins.deploy.onnx import resnet
from lth_plugins.errors import TicketError
from lth_plugins.slimming.widths import adopt_widths
from lth_plugins.ticket.arch import ARCHITECTURES, ResNet
from lth_plugins.ticket.foreign.convert import from_checkpoint
from lth_plugins.ticket.outside import Outside

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def sparse_model(arch: str) -> nn.Module:
    torch.manual_seed(0)
    model = torchvision.models.get_model(arch, num_classes=3)
    dense = lth.Ticket.dense(model)
    classifier = model.fc.weight.detach()
    outside = Outside(lth.Masks({"fc.weight": classifier > 0}), {"fc.weight": classifier})
    ticket = replace(dense.with_masks(lth.prune(dense.weights, 0.6), {}), outside=outside)
    lth.attach(model, ticket)
    return model


def test_a_leak_is_not_slimmed_away() -> None:
    model = sparse_model("resnet18")
    model.layer1[0].conv1.weight.data.fill_(1)
    with pytest.raises(TicketError, match=r"layer1\.0\.conv1"):
        lth.slim(model, IMAGES, flops=0.9)


def test_a_model_that_reads_other_channels_does_not_adopt_the_widths(slim: nn.Module) -> None:
    model = torchvision.models.resnet18(num_classes=3)
    model.conv1 = nn.Conv2d(13, 64, 7, 2, 3, bias=False)
    with pytest.raises(TicketError, match=r"conv1 has .*\(64, 3, 7, 7\), found one of \(64, 13, "):
        adopt_widths(model, slim.state_dict())
    assert model.layer4[0].conv1.out_channels == 512


@pytest.fixture(scope="module")
def slim() -> nn.Module:
    """A ResNet-18 with a sparse ticket, of its classifier, too, at half of its FLOPs."""
    return lth.slim(sparse_model("resnet18"), IMAGES, flops=0.5)


def test_a_slimmed_checkpoint_is_no_foreign_one(slim: nn.Module, tmp_path: Path) -> None:
    torch.save({"model": slim.state_dict()}, tmp_path / "slim.pth")
    with pytest.raises(TicketError, match=r"of a slimmed model, .*: give slim\.ticket"):
        from_checkpoint(tmp_path / "slim.pth", source="test")


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_the_zeros_of_a_ticket_are_on_the_channels_that_are_left(arch: str) -> None:
    model = sparse_model(arch)
    small = lth.slim(model, IMAGES, flops=0.5)
    handle, ticket = lth.attached(small), lth.attached(model).ticket()
    handle.verify()
    assert handle.meta.widths and handle.masks.sparsity > 0.2
    state = small.state_dict()
    for name, mask in handle.masks.items():
        weight, wide = state[name], ticket.weights[name]
        assert torch.equal(mask, weight != 0)
        assert torch.isin(weight[mask], wide[ticket.masks[name]]).all()
    assert torch.equal(handle.all_masks["fc.weight"], small.fc.weight > 0)
    assert small.fc.in_features < model.fc.in_features
    before = handle.all_masks
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    for _ in range(2):
        optimizer.zero_grad()
        small.train()(IMAGES).square().mean().backward()
        optimizer.step()
    handle.verify()
    assert lth.attached(small).all_masks == before


def test_a_ticket_of_a_slimmed_trunk_is_stored_and_attached_to_a_model_of_its_widths(
    slim: nn.Module, tmp_path: Path
) -> None:
    ticket = lth.attached(slim).ticket(source="here")
    read = lth.Ticket.load(ticket.save(tmp_path / "slim.ticket"))
    assert read == ticket and read.meta.widths == ticket.meta.widths
    other = copy.deepcopy(slim)
    lth.attached(other).detach()
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    assert lth.attach(other, read).masks == ticket.masks
    with pytest.raises(
        lth.TicketError, match="a slimmed resnet18 with a stem .* trunk is a resnet18"
    ):
        lth.attach(torchvision.models.resnet18(), read)
    state = copy.deepcopy(slim.state_dict())
    with pytest.raises(lth.TicketError, match="for a resnet18 .* trunk is a slimmed resnet18"):
        lth.attach(slim, lth.Ticket.dense(torchvision.models.resnet18()))
    assert all(torch.equal(value, state[key]) for key, value in slim.state_dict().items())
    assert lth.attached(slim).masks == ticket.masks


def test_a_slimmed_state_dict_is_read_and_pruned_by_its_note_alone(slim: nn.Module) -> None:
    state = slim.state_dict()
    dense = lth.Ticket.dense(state)
    assert dense.meta.widths == lth.attached(slim).meta.widths
    masks = lth.prune(state, 0.9)
    assert dense.with_masks(masks, {}).sparsity == pytest.approx(0.9, abs=1e-4)
    assert lth.prune(dict(state), 0.5, masks).sparsity == pytest.approx(0.95, abs=1e-4)
    with pytest.raises(lth.TicketError, match="of another shape"):
        lth.Ticket.dense(dict(state))  # which says nothing
    damaged = slim.state_dict()
    damaged["layer2.0.conv2.weight"] = damaged["layer2.0.conv2.weight"][:-1]
    with pytest.raises(lth.TicketError, match="of another shape"):
        lth.Ticket.dense(damaged)
    with pytest.raises(lth.TicketError, match="export the whole model"):
        resnet(state)


@pytest.mark.parametrize("widths", [{"layer1": 32}, {"conv1": 65}, {"layer2": 0}, {"layer2": "8"}])
def test_widths_that_no_trunk_has_are_refused(widths: dict[str, int]) -> None:
    with pytest.raises(lth.TicketError, match="widths of a slimmed trunk"):
        lth.TicketMeta("resnet18", widths=widths)


def test_a_full_width_is_no_width() -> None:
    meta = lth.TicketMeta("resnet18", widths={"layer2": 128})
    assert meta == lth.TicketMeta("resnet18") and "widths" not in meta.to_dict()
    assert replace(meta, widths={"layer2": 64}).to_dict()["widths"] == {"layer2": 64}


def test_a_sparse_ticket_on_a_part_of_a_trunk_is_not_slimmed() -> None:
    model = torchvision.models.resnet18(num_classes=3)
    dense = lth.Ticket.dense(model)
    model.layer4, model.fc = nn.Identity(), nn.Linear(256, 3)
    parts = ("stem", "layer1", "layer2", "layer3")
    lth.attach(model, dense.with_masks(lth.prune(dense.weights, 0.5), {}), parts=parts)
    with pytest.raises(lth.TicketError, match="expected a whole trunk"):
        lth.slim(model, IMAGES, flops=0.5)
    lth.attach(model, dense, parts=parts)
    assert lth.attached(lth.slim(model, IMAGES, flops=0.5)) is None


@pytest.mark.parametrize("arch", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_widths_of_every_architecture_are_those_of_its_shapes(arch: ResNet) -> None:
    half = {n: (max(1, s[0] // 2), *s[1:]) for n, s in arch.shapes.items() if s}
    small = arch.as_wide_as(half)
    assert arch.as_wide_as(arch.shapes) == arch and small != arch
    assert small.shapes.keys() == arch.shapes.keys() and small.as_wide_as(small.shapes) == small
    for name, shape in small.shapes.items():
        if ".conv2." in name:
            assert shape[1] * arch.groups == small.shapes[name.replace("conv2", "conv1")][0]
        last = "conv3" if arch.bottleneck else "conv2"
        if ".downsample." in name and len(shape) == 4:
            block = name.partition(".downsample.")[0]
            assert shape[0] == small.shapes[f"{block}.{last}.weight"][0]
            assert shape[1] == small.shapes[f"{block}.conv1.weight"][1]
