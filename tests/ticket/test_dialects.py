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


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnet50c", "resnet50d", "resnet101d"])
def test_timms_models_are_recognised(arch: str) -> None:
    timm_name = arch if timm.is_model(arch) else None
    with torch.device("meta"):
        if timm_name:
            model = timm.create_model(timm_name)
        else:  # timm keeps resnet50c without a registered name
            model = timm.models.resnet.ResNet(
                timm.models.resnet.Bottleneck, (3, 4, 6, 3), stem_width=32, stem_type="deep"
            )
    layout = locate(model)
    assert layout.arch.name == arch
    assert set(layout.keys) == set(ARCHITECTURES[arch].shapes)


@pytest.mark.parametrize("dialect", list(DIALECTS))
@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnet50d"])
@pytest.mark.parametrize("prefix", ["", "backbone.", "module.backbone.bottom_up."])
def test_every_dialect_is_two_way(dialect: str, arch: str, prefix: str) -> None:
    spec = ARCHITECTURES[arch]
    if not DIALECTS[dialect].supports(spec):
        return
    state = {name: torch.empty(shape, device="meta") for name, shape in spec.shapes.items()}
    spelled = from_torchvision(state, spec, dialect, prefix)
    assert len(spelled) == len(state), "two parameters with one name"
    found, back = to_torchvision(spelled | {"decode_head.conv1.weight": torch.empty(3)})
    assert found is spec
    assert all(back[name] is value for name, value in state.items())


def test_a_stage_may_live_elsewhere() -> None:
    spec = ARCHITECTURES["resnet50"]
    state = {name: torch.empty(shape, device="meta") for name, shape in spec.shapes.items()}
    spelled = {
        ("roi_heads." if name.startswith("res5") else "backbone.") + name: value
        for name, value in from_torchvision(state, spec, "detectron2").items()
    }
    keys = locate(spelled).keys
    assert keys["layer4.2.bn3.running_var"] == "roi_heads.res5.2.conv3.norm.running_var"
    assert keys["bn1.bias"] == "backbone.stem.conv1.norm.bias"


def test_a_trunk_without_counters_is_complete() -> None:
    spec = ARCHITECTURES["resnet18"]
    state = {n: torch.zeros(s) for n, s in spec.shapes.items() if "num_batches" not in n}
    assert locate(state).arch is spec


def test_an_unknown_layout_shows_the_closest_known_one(resnet18_state) -> None:
    del resnet18_state["layer3.1.conv2.weight"]
    with pytest.raises(
        TicketError, match=r"closest is torchvision resnet18.* 1 missing \(such as layer3\.1\.conv2"
    ):
        locate(resnet18_state)
    with pytest.raises(TicketError, match="Is it a ResNet checkpoint"):
        locate({"encoder.weight": torch.zeros(3)})


def test_group_normalisation_is_no_known_layout() -> None:
    model = torchvision.models.resnet18(norm_layer=lambda c: torch.nn.GroupNorm(8, c))
    with pytest.raises(TicketError, match="running_mean"):
        locate(model)


def test_two_trunks_are_ambiguous(resnet18_state) -> None:
    both = {
        f"{side}.{name}": value
        for side in ("student", "teacher")
        for name, value in resnet18_state.items()
    }
    with pytest.raises(TicketError, match=r"found 2, under 'student\.', 'teacher\.'"):
        locate(both)


def test_an_unknown_dialect_shows_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown dialect 'caffe'; known are .*detectron2, "):
        DIALECTS["caffe"]
