"""A ticket keeps the channels of its network's stem, and what the images in them are (C5)."""

from dataclasses import replace

import pytest
import timm
import torch
import torchvision
from torch import nn

import lth_plugins as lth
import lth_plugins.timm  # registers ticket_resnet18
from lth_plugins import InputSpec, Ticket, TicketError
from lth_plugins.deploy.onnx import resnet
from lth_plugins.training.loader import input_transform
from tests.ticket.states import SENTINEL_2

GREY = InputSpec("grey", (0.5,), (0.25,))
LANDSAT = InputSpec("9 bands", (0.0,) * 9, (1.0,) * 9)
INPUTS = {1: GREY, 9: LANDSAT, 13: SENTINEL_2}


def network(channels: int, arch: str = "resnet18") -> nn.Module:
    torch.manual_seed(channels)
    return timm.create_model(arch, in_chans=channels, num_classes=0).eval()


@pytest.fixture(scope="module", params=[(1, "resnet18"), (9, "resnet18d"), (13, "resnet18")])
def sparse(request: pytest.FixtureRequest) -> Ticket:
    channels, arch = request.param
    model = network(channels, arch)
    dense = Ticket.dense(model, "moco", INPUTS[channels])
    return dense.with_masks(lth.prune(model, 0.8), {})


def test_it_is_what_it_was_in_a_file_and_on_a_model(sparse: Ticket, tmp_path) -> None:
    channels = sparse.meta.input.channels
    loaded = Ticket.load(sparse.save(tmp_path / "a.ticket"))
    assert loaded == sparse and replace(loaded).digest == sparse.digest
    assert loaded.meta.input == INPUTS[channels]
    model = network(channels, sparse.meta.arch)
    handle = lth.attach(model, loaded)
    assert handle.ticket() == sparse
    images = torch.rand(2, channels, 64, 64)
    expected = model(images)
    hosted = timm.create_model(f"ticket_{sparse.meta.arch}", ticket=loaded, num_classes=0).eval()
    for other in (hosted, resnet(sparse.sparse_weights()), lth.compact(model)):
        assert torch.allclose(other.forward(images).flatten(), expected.flatten(), atol=1e-5)


def test_a_model_that_reads_other_channels_is_refused_by_name_and_stays(sparse: Ticket) -> None:
    channels, arch = sparse.meta.input.channels, sparse.meta.arch
    other = Ticket.dense(network(3, arch))
    for ticket, found in ((sparse, 3), (sparse, channels + 1), (other, channels)):
        model, wanted = network(found, arch), ticket.meta.input.channels
        before = {name: value.clone() for name, value in model.state_dict().items()}
        message = rf"reads images of {wanted} channels? \(.*the model's stem reads {found}: build"
        with pytest.raises(TicketError, match=rf"{message} .*in_channels={wanted}"):
            lth.attach(model, ticket)
        assert lth.attached(model) is None
        assert all(torch.equal(before[n], value) for n, value in model.state_dict().items())
    with pytest.raises(TicketError, match=f"the model's stem reads {channels + 1}"):
        timm.create_model(f"ticket_{arch}", ticket=sparse, in_chans=channels + 1)


def test_masks_move_between_weights_of_other_channels_and_the_input_with_the_weights(
    sparse: Ticket,
) -> None:
    rgb = Ticket.dense(network(3, sparse.meta.arch))
    moved = sparse.with_weights(rgb)
    assert moved.masks == sparse.masks and moved.meta.input == rgb.meta.input
    assert rgb.with_masks(sparse.masks, {}).with_weights(sparse).meta.input == sparse.meta.input
    stated = f"expected weights that read 3 channels .* reads {sparse.meta.input.channels}: give"
    with pytest.raises(TicketError, match=stated):
        rgb.with_weights(sparse.weights)


def test_an_input_must_be_stated_for_other_than_three_channels() -> None:
    message = r"read 3 channels \(RGB\).* found a stem that reads 13: .*InputSpec\('13 bands'"
    with pytest.raises(TicketError, match=message):
        Ticket.dense(network(13))


def test_a_network_that_reads_bands_is_not_given_photographs() -> None:
    with pytest.raises(TicketError, match=r"reads photographs.*found one of 13 channels \(B1,B2"):
        input_transform(SENTINEL_2)


def test_photographs_are_scaled_as_the_input_says() -> None:
    image = torchvision.transforms.functional.to_pil_image(torch.rand(3, 4, 4))
    given = input_transform(InputSpec("RGB", (0.0,) * 3, (10000.0,) * 3, scale=1))(image)
    values = torchvision.transforms.functional.pil_to_tensor(image)
    assert torch.allclose(given, values / 10000)


def test_timms_data_configuration_is_the_tickets() -> None:
    ticket = Ticket.dense(network(13), input=SENTINEL_2)
    config = timm.data.resolve_model_data_config(
        timm.create_model("ticket_resnet18", ticket=ticket)
    )
    assert config["input_size"][0] == 13
    assert config["std"] == pytest.approx([10000 / 255] * 13)


@pytest.mark.parametrize(
    ("format", "count"),
    [("RGB", 3), ("BGR", 3), ("B8,B4,B3", 3), ("grey", 1), ("2 bands", 2), ("1 band", 1)],
)
def test_a_format_says_how_many_channels_there_are(format: str, count: int) -> None:
    assert InputSpec(format, (0.0,) * count, (1.0,) * count).channels == count
    with pytest.raises(TicketError, match=f"input.mean .*one for each channel of '{format}'"):
        InputSpec(format, (0.0,) * (count + 1), (1.0,) * count)


@pytest.mark.parametrize(
    "format",
    [
        "",
        "B1,,B2",
        "B1, B2",
        "0 bands",
        "1025 bands",
        "9999999999999 bands",
        "B1\n",
        ",",
        None,
        3,
        ["B1"],
    ],
)
def test_a_format_that_names_no_channels_is_refused(format: object) -> None:
    with pytest.raises(TicketError, match="expected input.format .* or their number"):
        InputSpec(format, (0.0,), (1.0,))


@pytest.mark.parametrize("scale", [0, -1, float("nan"), float("inf"), "255x", None])
def test_a_scale_that_is_not_positive_is_refused(scale: object) -> None:
    with pytest.raises(TicketError, match="expected input.scale to be a positive number"):
        InputSpec(scale=scale)
