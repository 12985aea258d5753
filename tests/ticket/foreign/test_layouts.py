"""Layouts people bring: each is recognised wherever its trunk is, or refused by what it is."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.optim.swa_utils import AveragedModel

import lth_plugins as lth
from lth_plugins import Ticket, TicketError
from lth_plugins.ticket import ARCHITECTURES, DIALECTS, locate
from lth_plugins.ticket.averages import averages_among
from lth_plugins.ticket.foreign.convert import from_checkpoint
from lth_plugins.ticket.keys import WRAPPERS
from lth_plugins.ticket.locating import meant_by
from lth_plugins.ticket.trunk import read_trunk
from tests.ticket.foreign.layouts import maskrcnn_benchmark, named, number
from tests.ticket.states import Rule, State, renamed, save, trunk, under

MASKRCNN = ("resnet50 torchvision", "backbone.body.")
LAYOUTS: dict[str, tuple[Callable[[], State], str, str]] = {
    # its keys, architecture and dialect, prefix
    **{
        f"microsoft/resnet-{depth}": (
            lambda depth=depth: under("resnet.", named("transformers", f"resnet{depth}")),
            *(f"resnet{depth} transformers", "resnet."),
        )
        for depth in (18, 34, 50, 101, 152)
    },
    "transformers' RT-DETR": (
        lambda: under("model.backbone.model.", named("transformers' RT-DETR", "resnet50d")),
        *("resnet50d transformers", "model.backbone.model."),
    ),
    **{
        f"mmpretrain V1{variant}": (
            lambda variant=variant: under(
                "backbone.", named(f"mmpretrain V1{variant}", f"resnet50{variant}")
            ),
            *(f"resnet50{variant} mmpretrain", "backbone."),
        )
        for variant in "cd"
    },
    "mmaction2": (
        lambda: under("backbone.", named("mmaction2")),
        *("resnet50 mmaction", "backbone."),
    ),
    "pycls": (lambda: under("model_state.", named("pycls")), "resnet50 pycls", "model_state."),
    "NVIDIA, YOLACT": (
        lambda: renamed(trunk("resnet50"), (r"^layer(\d)", number("layers.{}", -1))),
        *("resnet50 layers", ""),
    ),
    "a stem in a Sequential": (
        lambda: renamed(trunk(), (r"^conv1", "layer0.0"), (r"^bn1", "layer0.1")),
        *("resnet18 layer0", ""),
    ),
    **{
        f"maskrcnn-benchmark, {model}": (lambda heads=h: maskrcnn_benchmark(heads), *MASKRCNN)
        for h, model in enumerate(("FPN", "C4", "C4 with masks"))
    },
    "detectron2, C4": (
        lambda: renamed(
            named("detectron2"), (r"^res5", "roi_heads.res5"), (r"^(?!roi_heads)", "backbone.")
        ),
        *("resnet50 detectron2", "backbone."),
    ),
    "torchvision's IntermediateLayerGetter": (
        lambda: under("backbone.body.", trunk("resnet50", counter=None)),
        *MASKRCNN,
    ),
    "a stem module beside the stages": (
        lambda: renamed(trunk(), (r"^(conv1|bn1)", r"net.stem.\1"), (r"^layer", "net.body.layer")),
        *("resnet18 torchvision", "net.body."),
    ),
    "robustness' attacker, which holds the model again": (
        lambda: (
            under("model.module.model.", trunk()) | under("model.module.attacker.model.", trunk())
        ),
        *("resnet18 torchvision", "model.module.model."),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_recognised_by_its_true_keys(layout: str) -> None:
    make, what, prefix = LAYOUTS[layout]
    state = make() | {
        "head.fc.weight": torch.zeros(3, 3),
        "neck.conv.weight": torch.zeros(2, 2, 1, 1),
    }
    found = locate(state)
    assert f"{found.arch.name} {found.dialect.name}" == what and found.prefix == prefix
    weights = found.extract(state)
    optional = {name for name in found.arch.shapes if name.endswith("tracked")}
    assert weights.keys() >= found.arch.shapes.keys() - optional
    assert read_trunk(state).layout.keys == found.keys, "nothing in it is unaccounted for"


def test_a_stage_of_another_trunk_is_not_borrowed() -> None:
    student = {name: value for name, value in trunk().items() if not name.startswith("layer4")}
    both = under("student.", student) | under("teacher.", trunk(value=2))
    assert locate(both).prefix == "teacher."
    with pytest.raises(TicketError, match=r"under the prefix 'student'.*missing .*layer4"):
        locate(both, prefix="student")


def test_no_dialect_names_a_module_as_wrappers_do() -> None:
    for dialect in DIALECTS.values():
        for name in filter(dialect.supports, ARCHITECTURES.values()):
            assert not any(WRAPPERS & {*key.split(".")} for key in dialect.table(name).values())


# --- what is none of them


OTHERS: dict[str, str] = {  # what it is called, and models of timm and torchvision
    "ConvNeXt": "timm/convnext_atto torchvision/convnext_tiny",
    "a vision transformer": (
        "timm/vit_tiny_patch16_224 timm/deit_tiny_patch16_224 torchvision/vit_b_16"
    ),
    "Swin": "timm/swin_tiny_patch4_window7_224 torchvision/swin_t",
    "a RegNet": "timm/regnetx_002 timm/regnety_002",
    "EfficientNet": "timm/efficientnet_b0 torchvision/efficientnet_b0",
    "MobileNet": (
        "timm/mobilenetv3_small_050 torchvision/mobilenet_v2 torchvision/mobilenet_v3_small"
    ),
    "ResNeSt": "timm/resnest14d",
    "Res2Net": "timm/res2net50_26w_4s",
    "squeeze-and-excitation": "timm/seresnet50 timm/legacy_seresnet18 timm/ecaresnet50d",
    "selective kernels": "timm/skresnet18",
    "global context|a stem of several": "timm/gcresnet50t",
    "ResNet v2, BiT": "timm/resnetv2_50 timm/resnetv2_50x1_bit",
    "NF-ResNet": "timm/nf_resnet50",
    "GroupNorm": "timm/resnet50_gn",
    "CLIP": "timm/resnet50_clip",
    "a stem of several": "timm/resnet51q",
    "resnet50s": "timm/resnet50s",
    "DLA": "timm/dla34",
    "HRNet": "timm/hrnet_w18_small",
    "a DenseNet": "timm/densenet121 torchvision/densenet121",
    "VGG": "timm/vgg11 torchvision/vgg11_bn torchvision/alexnet",
    "Inception": "timm/inception_v3 torchvision/googlenet",
    "SqueezeNet": "torchvision/squeezenet1_0",
    "ShuffleNet": "torchvision/shufflenet_v2_x0_5",
}


@pytest.mark.parametrize(
    ("model", "named"),
    [(model, named) for named, models in OTHERS.items() for model in models.split()],
)
def test_another_network_is_refused_as_what_it_is(model: str, named: str) -> None:
    library, name = model.split("/")
    make = timm.create_model if library == "timm" else torchvision.models.get_model
    with torch.device("meta"):
        state = make(name).state_dict()
    filled = {key: torch.zeros(()).expand(value.shape) for key, value in state.items()}
    with pytest.raises(TicketError, match=named):
        read_trunk(under("module.", filled))


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("_fsdp_wrapped_module.flat_param", "FULL_STATE_DICT"),
        ("layer1.0.conv1.base_layer.weight", "merge_and_unload"),
        ("layer1.0.conv1.parametrizations.weight.original", "torch.nn.utils.parametrize"),
        ("params.ResNetBlock_0.Conv_0.kernel", "TensorFlow and JAX"),
        ("arg:stage1_unit1_conv1_weight", "MXNet"),
        ("res2_0_branch2a_gn_s", "group normalisation"),
    ],
)
def test_what_has_to_be_converted_first_is_named(key: str, named: str) -> None:
    with pytest.raises(TicketError, match=named):
        locate({key: torch.zeros(3)})


def test_clips_resnet_is_refused_by_name() -> None:
    """openai/CLIP's ModifiedResNet has a stem of three convolutions, and pools by attention."""
    state = trunk("resnet50")
    for i, shape in enumerate(((32, 3, 3, 3), (32, 32, 3, 3), (64, 32, 3, 3)), start=1):
        state[f"conv{i}.weight"] = torch.zeros(shape)
        for entry in ("weight", "bias", "running_mean", "running_var"):
            state[f"bn{i}.{entry}"] = torch.zeros(shape[0])
    with pytest.raises(TicketError, match="it has a stem of several convolutions.*CLIP"):
        locate(under("visual.", state))
    state |= {"attnpool.positional_embedding": torch.zeros(50, 2048)}
    with pytest.raises(TicketError, match="it has the attention pooling of CLIP's modified ResNet"):
        locate(under("visual.", state) | {"positional_embedding": torch.zeros(77, 512)})


UNKNOWN: dict[str, tuple[State, str]] = {
    "names close to known ones": (
        renamed(trunk("resnet34"), (r"^layer(\d)\.(\d+)\.conv(\d)", r"stages.\1.blk\2.convol\3")),
        r"100 % of a resnet34's convolutions.*the closest is \w+'s",
    ),
    "names that no dialect has": (
        renamed(trunk("resnet50"), (r"layer", "unheard_of"), (r"downsample", "of")),
        r"100 % of a resnet50's convolutions.*Rename them",
    ),
    "a ResNet-26, of two blocks a stage": (
        {n: v for n, v in trunk("resnet50").items() if not re.match(r"layer\d\.[2-9]", n)},
        r"the closest is .*more than it has .*layer1\.0\.conv3",
    ),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_an_unknown_resnet_is_compared_with_the_closest_known_one(what: str) -> None:
    state, message = UNKNOWN[what]
    with pytest.raises(TicketError, match=message):
        locate(state)


def test_the_documentation_lists_every_dialect_and_wrapper() -> None:
    text = (Path(__file__).parents[3] / "docs" / "import.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    named = {row.rstrip("| ").rpartition("| ")[2] for row in rows}
    assert {dialect.name for dialect in DIALECTS.values()} <= named
    assert all(f"`{wrapper}`" in text for wrapper in WRAPPERS)


# --- wrappers


WRAPPED: dict[str, list[Rule]] = {
    "a compiled model": [(r"^", "_orig_mod.")],
    "compiled blocks": [(r"^(layer\d\.\d)", r"\1._orig_mod")],
    "compiled convolutions": [(r"(conv\d)", r"\1._orig_mod")],
    "a compiled stage, data parallel": [(r"^(layer2)", r"\1._orig_mod"), (r"^", "module.")],
    "sharded blocks of a sharded model": [
        (r"^(layer\d\.\d)", r"\1._fsdp_wrapped_module"),
        (r"^", "_fsdp_wrapped_module."),
    ],
    "the first sharding": [(r"^(layer\d)", r"\1._fsdp_wrapped_module._fpw_module")],
    "checkpointed and compiled blocks": [
        (r"^(layer\d\.\d)", r"\1._orig_mod._checkpoint_wrapped_module")
    ],
    "Fabric over a compiled model": [(r"^", "_forward_module._orig_mod.")],
    "Opacus": [(r"^", "_module.")],
    "some blocks, every other one": [(r"^(layer\d\.0)", r"\1.module")],
}


@pytest.mark.parametrize("how", WRAPPED)
@pytest.mark.parametrize("prefix", ["", "state_dict.model.", "module.backbone."])
def test_wrappers_inside_a_path_do_not_matter(how: str, prefix: str) -> None:
    state = under(prefix, renamed(trunk(), *WRAPPED[how]))
    layout = locate(state)
    assert layout.arch.name == "resnet18" and layout.dialect.name == "torchvision"
    assert set(layout.keys) == set(ARCHITECTURES["resnet18"].shapes)
    assert set(layout.keys.values()) == set(state), "keys are the state dict's own"
    assert layout.prefix.startswith(prefix)
    assert read_trunk(state).layout.keys == layout.keys


def test_wrappers_do_not_hide_what_a_block_has_besides() -> None:
    state = renamed(trunk(), *WRAPPED["compiled blocks"])
    more = {"layer2.0._orig_mod.se.fc1.weight": torch.zeros(4, 4)}
    with pytest.raises(TicketError, match=next(iter(more))):
        read_trunk(state | more)


def test_masks_under_wrapped_names_are_found(ticket18: Ticket, tmp_path) -> None:
    masked = {
        (f"{n}_orig" if n in ticket18.masks else n): v for n, v in ticket18.weights.items()
    } | {f"{name}_mask": mask.float() for name, mask in ticket18.masks.items()}
    state = renamed(masked, *WRAPPED["compiled blocks"])
    assert from_checkpoint(save(state, tmp_path / "a.pth")).masks == ticket18.masks


def test_of_two_weights_of_a_wrapper_its_own_is_taken() -> None:
    """NNI keeps the weight and its mask in the wrapper, and their product in the module."""
    state = trunk()
    key = "layer1.0.conv1.module.weight"
    product = state["layer1.0.conv1.weight"].clone()
    product[:5] = 0
    layout = locate(state | {key: product})
    assert layout.keys["layer1.0.conv1.weight"] == "layer1.0.conv1.weight"
    with pytest.raises(TicketError, match=key):
        read_trunk(state | {key: product})  # without its mask nobody knows what it is


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_parts(model: Any) -> nn.Module:
    model.layer1 = compiled(model.layer1)
    model.layer2[0] = compiled(model.layer2[0])
    model.layer2[1].conv1 = compiled(model.layer2[1].conv1)
    return model


def checkpointed_blocks(model: nn.Module) -> nn.Module:
    block = torchvision.models.resnet.BasicBlock
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, block))
    return model


def checkpointed_convolutions(model: Any) -> nn.Module:
    apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, nn.Conv2d))
    model.layer3 = checkpoint_wrapper(model.layer3)
    return model


def parallel_inside(model: Any) -> nn.Module:
    model.conv1 = nn.DataParallel(model.conv1)
    return AveragedModel(nn.Sequential(model))


LIVE = [compiled, compiled_parts, checkpointed_blocks, checkpointed_convolutions, parallel_inside]


@pytest.mark.parametrize("wrap", LIVE)
def test_a_wrapped_model_is_masked_and_trains_masked(wrap, ticket18: Ticket) -> None:
    model = wrap(torchvision.models.resnet18())
    handle = lth.attach(model, ticket18)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(2):
        model(torch.randn(2, 3, 32, 32)).square().sum().backward()
        optimizer.step()
    model.load_state_dict(model.state_dict())
    handle.verify()
    assert handle.ticket().masks == ticket18.masks
    dense = Ticket.dense(model)
    assert all(not dense.weights[n][~mask].any() for n, mask in ticket18.masks.items())
    assert lth.prune(model, 0.5, masks=ticket18.masks).issubset(ticket18.masks)


@pytest.mark.parametrize("wrap", LIVE)
def test_a_wrapped_model_is_compacted(wrap) -> None:
    model = torchvision.models.resnet18().eval()
    with torch.no_grad():
        for block in (model.layer2[1], model.layer3[0]):
            block.conv1.weight[:40] = 0
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(images)
        wrapped = wrap(model).eval()
        small = lth.compact(wrapped)
        assert torch.allclose(small(images), before, atol=1e-5)
    count = [sum(p.numel() for p in m.parameters()) for m in (small, wrapped)]
    assert count[0] < count[1]


class TwoNames(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.net, self.compiled = model, compiled(model)


def test_one_module_under_two_names_is_one_trunk(ticket18: Ticket) -> None:
    model = TwoNames(torchvision.models.resnet18())
    lth.attach(model, ticket18).verify()
    assert locate(model).left_out == {"compiled._orig_mod.": "the same weights"}
    with pytest.raises(TicketError, match=r"under one name, found .*'net\.', 'compiled"):
        lth.compact(model)


# --- several trunks


AVERAGES = [
    ("encoder_q.", "encoder_k."),
    ("module.encoder_q.", "module.encoder_k."),
    ("model.module.encoder.", "model.module.encoder_k."),
    ("query_encoder.", "key_encoder."),
    ("backbone.", "backbone_momentum."),
    ("encoder.", "momentum_encoder."),
    ("learner.online_encoder.net.", "learner.target_encoder.net."),
    ("online_network.encoder.", "target_network.encoder."),
    ("network.", "target_network."),
    ("backbone.", "target_net.module.0."),
    ("visual_encoder.", "visual_encoder_m."),
    ("state_dict.", "state_dict_ema."),
    ("model.", "model_ema."),
    ("model.", "model_ema.module."),
    ("model.", "ema_model.module."),
    ("model.", "ema."),
    ("state_dict.model.backbone.", "state_dict.ema.module.backbone."),
    ("state_dict.backbone.", "state_dict.ema_model.backbone."),
    ("state_dict.", "ema_state_dict."),
    ("state_dict.backbone.", "ema_state_dict.module.backbone."),
    ("state_dict.net.", "current_model_state.net."),
    ("module.", "module_ema."),
    ("module.", "module_ema.module."),
    ("net.", "swa_model.module."),
]


@pytest.mark.parametrize(("taken", "average"), AVERAGES)
def test_of_a_trunk_and_its_average_one_is_taken(taken: str, average: str) -> None:
    for state in (
        under(taken, trunk()) | under(average, trunk(value=2)),
        under(average, trunk(value=2)) | under(taken, trunk()),
    ):
        layout = locate(state)
        assert layout.prefix == taken and list(layout.left_out) == [average]
        assert "average" in layout.left_out[average]
        assert locate(state, prefix=average).prefix == average
        assert locate(state, prefix=taken).prefix == taken


def test_what_is_no_average_is_asked_about() -> None:
    for prefixes in (["student.", "teacher."], ["a.", "b."], ["encoder_1.", "encoder_2."]):
        assert averages_among(prefixes) == {}
        with pytest.raises(TicketError, match="found 2"):
            locate(under(prefixes[0], trunk()) | under(prefixes[1], trunk(value=2)))


def test_flat_buffers_of_averages_are_no_trunk() -> None:
    """mmcv 1.x: ema_backbone_layer1_0_conv1_weight."""
    flat = {"ema_backbone_" + name.replace(".", "_"): v for name, v in trunk(value=2).items()}
    assert locate(under("backbone.", trunk()) | flat).prefix == "backbone."


@pytest.mark.parametrize(
    ("prefix", "meant"),
    [
        ("teacher", "teacher.backbone."),
        ("student", "student.module.backbone."),
        ("student.backbone", "student.module.backbone."),
        ("student.module", "student.module.backbone."),
        ("student.module.backbone.", "student.module.backbone."),
        ("module.backbone", "student.module.backbone."),
    ],
)
def test_any_part_of_a_prefix_that_is_unambiguous_will_do(prefix: str, meant: str) -> None:
    """DINO: the student is data parallel."""
    state = under("student.module.backbone.", trunk()) | under("teacher.backbone.", trunk(value=2))
    assert locate(state, prefix=prefix).prefix == meant


def test_a_whole_prefix_wins_over_an_end_and_an_end_over_a_part() -> None:
    trunks = ["net.", "a.net.", "b.net.inner.", "net.c."]
    assert meant_by("net", trunks) == ["net."]
    assert meant_by("net", trunks[1:]) == ["a.net."]
    assert meant_by("net", trunks[2:]) == trunks[2:]
    assert meant_by("ne", trunks) == []
    assert meant_by("module", ["model.", "model_ema.module."]) == ["model_ema.module."]


def test_a_prefix_that_is_ambiguous_or_wrong_lists_those_there_are() -> None:
    state = under("a.student.backbone.", trunk()) | under("a.teacher.backbone.", trunk(value=2))
    for prefix in ("backbone", "a"):
        with pytest.raises(TicketError, match=r"found 2, under 'a\.student.*', 'a\.teacher"):
            locate(state, prefix=prefix)
    with pytest.raises(TicketError, match=r"the prefix 'tea', found them under 'a\.student\."):
        locate(state, prefix="tea")


SAID: dict[str, tuple[dict[str, Any], list[str]]] = {
    "parts from elsewhere": (
        renamed(
            trunk(),
            *(
                (r"^(conv1|bn1)", r"entry.\1"),
                (r"^layer4", "heads.layer4"),
                (r"^layer", "body.layer"),
            ),
        ),
        [
            "Read the stem of the trunk from elsewhere: entry.bn1.weight",
            "Read the layer4 of the trunk from elsewhere: heads.layer4.",
        ],
    ),
    "a moving average": (
        {"state_dict": trunk(), "state_dict_ema": trunk(value=2)},
        ["Read the trunk under state_dict., and left out state_dict_ema. (a moving average of it)"],
    ),
}


@pytest.mark.parametrize("what", SAID)
def test_import_says_which_trunk_it_takes(what: str, tmp_path, caplog) -> None:
    content, said = SAID[what]
    ticket = from_checkpoint(save(content, tmp_path / "a.pth"))
    assert (ticket.weights["layer1.0.conv1.weight"] == 1).all()
    assert all(words in caplog.text for words in said)
