"""C4: one canonical naming; every framework's model is recognised, wherever its trunk is nested."""

import pytest
import timm
import torch
import torchvision

from lth_plugins import ConfigError, TicketError
from lth_plugins.ticket import ARCHITECTURES, DIALECTS, from_torchvision, locate, to_torchvision


@pytest.mark.parametrize(
    "arch", [a for a in ARCHITECTURES if a in torchvision.models.list_models(torchvision.models)]
)
def test_the_table_is_torchvisions(arch: str) -> None:
    with torch.device("meta"):
        state = torchvision.models.get_model(arch).state_dict()
    trunk = {
        name: tuple(value.shape) for name, value in state.items() if not name.startswith("fc.")
    }
    assert list(trunk.items()) == list(ARCHITECTURES[arch].shapes.items())
    assert locate(state).arch.name == arch


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnet50d", "resnet101d"])
def test_timms_models_are_recognised(arch: str) -> None:
    with torch.device("meta"):
        layout = locate(timm.create_model(arch))
    assert layout.arch.name == arch
    assert set(layout.keys) == set(ARCHITECTURES[arch].shapes)


@pytest.mark.parametrize(
    ("dialect", "arch"),
    [
        (name, arch)
        for name, dialect in DIALECTS.items()
        for arch in ("resnet18", "resnet50", "resnet50d")
        if dialect.supports(ARCHITECTURES[arch])
    ],
)
def test_every_dialect_is_two_way(dialect: str, arch: str) -> None:
    spec = ARCHITECTURES[arch]
    state = {name: torch.empty(shape, device="meta") for name, shape in spec.shapes.items()}
    for prefix in ("", "module.backbone.bottom_up."):
        spelled = from_torchvision(state, spec, dialect, prefix)
        assert len(spelled) == len(state), "two parameters with one name"
        found, back = to_torchvision(spelled | {"decode_head.conv1.weight": torch.empty(3)})
        assert found is spec
        assert all(back[name] is value for name, value in state.items())


def test_an_unknown_layout_shows_the_closest_known_one(resnet18_state) -> None:
    del resnet18_state["layer3.1.conv2.weight"]
    with pytest.raises(
        TicketError, match=r"closest is torchvision resnet18.* 1 missing \(such as layer3\.1\.conv2"
    ):
        locate(resnet18_state)
    with pytest.raises(TicketError, match="Is it a ResNet checkpoint"):
        locate({"encoder.weight": torch.zeros(3)})


def test_an_unknown_dialect_shows_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown dialect 'caffe'; known are .*detectron2, "):
        DIALECTS["caffe"]
