"""Compaction: the same outputs with fewer channels, in every host, and back from a checkpoint."""

import copy
import logging
from collections.abc import Callable
from functools import cache

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import lth_plugins as lth
import lth_plugins.timm
from lth_plugins.masking.narrowing import narrow_to
from lth_plugins.pruning.structure import Channels, channel_masks, structured
from lth_plugins.ticket import Ticket, locate

IMAGES = torch.randn(2, 3, 65, 49, generator=torch.Generator().manual_seed(0))


def with_statistics(model: nn.Module) -> nn.Module:
    """The model with normalisation as after a training: every constant is another one."""
    generator = torch.Generator().manual_seed(1)
    for name, value in model.state_dict().items():
        if name.endswith(("running_mean", ".bias")):
            value.normal_(0, 0.5, generator=generator)
        elif name.endswith("running_var") or (value.dim() == 1 and name.endswith(".weight")):
            value.uniform_(0.5, 2, generator=generator)
    return model.eval()


@cache
def dense_ticket(arch: str) -> Ticket:
    torch.manual_seed(0)
    builder = torchvision.models.get_model if "d" not in arch else timm.create_model
    return Ticket.dense(with_statistics(builder(arch)), source="test")


@pytest.fixture(scope="module")
def channels18() -> Ticket:
    """A channel ticket of a ResNet-18 at a fifth of the weights."""
    return structured(dense_ticket("resnet18"), Channels(density=0.2, multiple=8))


def emptied(ticket: Ticket) -> Ticket:
    """The same channels dead, but still read: their constants matter."""
    masks = dict(ticket.masks)
    for name in (f"{inner.reader}.weight" for inner in ticket.arch.inner):
        masks[name] = masks[name].any(1, keepdim=True).expand_as(masks[name])
    return ticket.with_masks(lth.Masks(masks), {})


@cache
def emptied_ticket(arch: str) -> Ticket:
    return emptied(structured(dense_ticket(arch), Channels(density=0.3)))


def attached(ticket: Ticket) -> nn.Module:
    """A torchvision model, or a timm one where torchvision has none, with a ticket on it."""
    deep = ticket.arch.deep_stem
    model = (timm.create_model if deep else torchvision.models.get_model)(ticket.meta.arch)
    lth.attach(model, ticket)
    return model.eval()


def of_detectron2(ticket: Ticket, norm: str) -> nn.Module:
    """detectron2's backbone with a ticket on it."""
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.backbone import build_resnet_backbone

    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH = int(ticket.meta.arch.removeprefix("resnet"))
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 256 if ticket.arch.bottleneck else 64
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    cfg.MODEL.RESNETS.NORM = norm
    model = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    lth.attach(model, ticket)
    return model.eval()


def of_mmseg(ticket: Ticket) -> nn.Module:
    """mmseg's dilated (-d8) backbone with a ticket on it."""
    from mmseg.models.backbones import ResNet

    model = ResNet(
        int(ticket.meta.arch.removeprefix("resnet")),
        strides=(1, 2, 1, 1),
        dilations=(1, 1, 2, 4),
        contract_dilation=True,
        norm_cfg={"type": "SyncBN"},
    )
    lth.attach(model, ticket)
    model.eval()  # which returns nothing there
    return model


@torch.no_grad()
def difference(model: nn.Module, other: nn.Module) -> float:
    """The largest difference of their outputs; where these are large, relative to the largest."""
    one, two = (last(m(IMAGES)) for m in (model, other))
    return float((one - two).abs().max() / one.abs().max().clamp(min=1))


def last(outputs: Tensor | tuple[Tensor, ...] | dict[str, Tensor]) -> Tensor:
    """What the whole trunk computes, in any host's form."""
    if isinstance(outputs, dict):
        outputs = tuple(outputs.values())
    return outputs if isinstance(outputs, Tensor) else outputs[-1]


def widths(model: nn.Module, ticket: Ticket) -> list[int]:
    """Output channels of every convolution inside a block."""
    keys = locate(model, compacted=True).keys
    return [len(model.get_parameter(keys[f"{inner.conv}.weight"])) for inner in ticket.arch.inner]


def test_a_structured_ticket_becomes_a_narrower_model_that_computes_the_same(channels18) -> None:
    model = attached(channels18)
    small = lth.compact(model)
    assert difference(model, small) <= 1e-4
    assert widths(small, channels18) == [
        int(channels18.masks[f"{inner.conv}.weight"].flatten(1).any(1).sum())
        for inner in channels18.arch.inner
    ]
    prunable = channels18.arch.prunable
    left = sum(small.get_parameter(name).numel() for name in prunable)
    assert left == channels18.masks.kept  # all that is left is what the ticket keeps
    assert lth.attached(small) is None
    assert widths(lth.compact(small), channels18) == widths(small, channels18)
    lth.attached(model).verify()  # the model given is as it was
    assert widths(model, channels18) == widths(torchvision.models.resnet18(), channels18)


@pytest.mark.parametrize(
    ("arch", "build"),
    [
        pytest.param("resnet18", attached, id="torchvision"),
        pytest.param("resnet50d", attached, id="timm"),
        pytest.param(
            "resnet50",
            lambda ticket: of_detectron2(ticket, "FrozenBN"),
            id="detectron2-FrozenBN",
            marks=pytest.mark.detectron2,
        ),
        pytest.param(
            "resnet18",
            lambda ticket: of_detectron2(ticket, "SyncBN"),
            id="detectron2-SyncBN",
            marks=pytest.mark.detectron2,
        ),
        pytest.param("resnet18", of_mmseg, id="mmseg-d8-SyncBN", marks=pytest.mark.mmseg),
    ],
)
def test_what_dead_channels_pass_on_is_kept_exactly_at_borders_too(
    arch: str, build: Callable[[Ticket], nn.Module]
) -> None:
    dense, ticket = dense_ticket(arch), emptied_ticket(arch)
    model = build(ticket)
    small = lth.compact(model)
    assert difference(model, small) <= 1e-4
    assert sum(widths(small, dense)) < 0.7 * sum(widths(model, dense))
    # It is not that the constants do not matter: without them the outputs are others.
    state, keys = model.state_dict(), locate(model).keys
    for inner in dense.arch.inner:
        dead = ~ticket.masks[f"{inner.conv}.weight"].flatten(1).any(1)
        state[keys[f"{inner.norm}.bias"]][dead] -= 100
    assert difference(model, small) > 1e-2


def test_unstructured_tickets_lose_the_channels_that_happen_to_be_dead() -> None:
    dense = dense_ticket("resnet18")
    masks = dict(lth.prune(dense.weights, 0.9))
    masks["layer2.0.conv1.weight"] = masks["layer2.0.conv1.weight"].clone()
    masks["layer2.0.conv1.weight"][:5] = False  # nothing writes these
    masks["layer3.1.conv2.weight"] = masks["layer3.1.conv2.weight"].clone()
    masks["layer3.1.conv2.weight"][:, 7:9] = False  # nothing reads these
    model = attached(dense.with_masks(lth.Masks(masks), {}))
    small = lth.compact(model)
    assert difference(model, small) <= 1e-4
    assert small.layer3[1].conv1.out_channels == 254
    assert small.layer2[0].conv1.out_channels in (123, 124)  # one may carry the constants


def test_a_convolution_with_no_channel_left_keeps_one() -> None:
    dense = dense_ticket("resnet18")
    nothing = {
        i.conv: torch.zeros(len(dense.weights[f"{i.conv}.weight"])).bool() for i in dense.arch.inner
    }
    ticket = dense.with_masks(channel_masks(dense.masks, dense.arch, nothing), {})
    model = attached(emptied(ticket))
    small = lth.compact(model)
    assert difference(model, small) <= 1e-4
    assert set(widths(small, dense)) == {1}


def test_zeros_decide_whether_or_not_a_ticket_is_attached(channels18) -> None:
    model = attached(channels18)
    expected = lth.compact(model)
    lth.attached(model).detach()
    with torch.no_grad():  # fine-tuned without masks: what is read of dead channels came back
        for inner in channels18.arch.inner:
            model.get_submodule(inner.reader).weight.add_(0.01)
    small = lth.compact(model)
    assert difference(model, small) <= 1e-4
    # One more of each: it carries what the dead ones pass on.
    assert widths(small, channels18) == [n + 1 for n in widths(expected, channels18)]


def test_in_training_a_structured_ticket_computes_the_same_at_first(channels18) -> None:
    model = attached(channels18)
    small = lth.compact(model)
    assert difference(model.train(), small.train()) <= 1e-4
    assert difference(model.eval(), small.eval()) <= 1e-4  # their statistics moved alike
    small.train()(IMAGES).square().mean().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


def train(model: nn.Module, steps: int, keep_zeros: bool = False) -> list[Tensor]:
    """The outputs of each step, before it."""
    zeros = {p: p == 0 for p in model.parameters() if p.dim() == 4}
    optimizer = torch.optim.SGD(model.train().parameters(), 0.05, momentum=0.9)
    outputs = []
    for _ in range(steps):
        optimizer.zero_grad()
        outputs.append(model(IMAGES))
        outputs[-1].square().mean().backward()
        optimizer.step()
        for parameter, zero in zeros.items() if keep_zeros else ():
            parameter.data.masked_fill_(zero, 0)
    return [output.detach() for output in outputs]


def test_a_compact_model_trains_the_zeros_that_are_left_and_a_masked_one_does_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    dense = dense_ticket("resnet18")
    sparse = dense.with_masks(lth.prune(dense.weights, 0.8), {})  # its shortcuts keep their zeros
    torch.manual_seed(0)  # of the classifier: later steps multiply what rounding differs by
    model = attached(structured(sparse, Channels()))
    with caplog.at_level(logging.INFO, "lth_plugins.deploy.compaction"):
        small = lth.compact(model)
    shortcuts = [name for name in dense.arch.prunable if "downsample" in name]
    zeros = {name: small.get_parameter(name) == 0 for name in shortcuts}
    left = sum(int(zero.sum()) for zero in zeros.values())
    assert left > 1000 and f"training moves the {left} zeros left in it" in caplog.text
    held = copy.deepcopy(small)

    masked, narrow = train(model, 3), train(small, 3)
    narrow_held = train(held, 3, keep_zeros=True)
    apart = [
        [float((a - b).abs().max() / a.abs().max()) for a, b in zip(masked, other, strict=True)]
        for other in (narrow, narrow_held)
    ]
    assert apart[0][0] <= 1e-4 and apart[0][2] > 1e-3  # the same step, and others after it
    assert max(apart[1]) <= 1e-4
    lth.attached(model).verify()
    assert all(small.get_parameter(name)[zero].any() for name, zero in zeros.items())


def test_without_dead_channels_it_says_so_and_returns_an_equal_model(
    ticket18: Ticket, caplog: pytest.LogCaptureFixture
) -> None:
    model = attached(Ticket.dense(ticket18.weights))
    with caplog.at_level(logging.INFO, "lth_plugins.deploy.compaction"):
        small = lth.compact(model)
    assert "No channel inside a block is dead" in caplog.text
    assert small is not model and difference(model, small) == 0
    assert lth.attached(small) is None


def test_other_convolutions_and_blocks_are_refused_by_name(channels18) -> None:
    biased, pointwise = attached(channels18), attached(channels18)
    biased.layer2[0].conv1.register_parameter("bias", nn.Parameter(torch.zeros(128)))
    pointwise.layer4[1].conv2 = nn.Conv2d(512, 512, 1)
    smooth = timm.create_model("resnet18", act_layer="silu")
    lth.attach(with_statistics(smooth), emptied(channels18))
    for model, message in (
        (torchvision.models.resnext50_32x4d(), "resnext50_32x4d .* 32 groups at layer1.0.conv2"),
        (biased, "plain convolutions .* a bias at layer2.0.conv1"),
        (pointwise, r"layer4.1.conv2.weight is \(512, 512, 1, 1\)"),
        (smooth, "compute the same .*found outputs .* apart.* and Re"),
    ):
        with pytest.raises(lth.TicketError, match=message):
            lth.compact(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_another_precision_is_the_same_but_for_its_rounding(
    dtype: torch.dtype,
) -> None:
    ticket = emptied_ticket("resnet18")
    model = attached(ticket).to(dtype)
    small = lth.compact(model)
    assert {value.dtype for value in small.parameters()} == {dtype}
    assert sum(widths(small, ticket)) < 0.7 * sum(widths(model, ticket))
    # Roundings add up over blocks.
    assert difference(model.float(), small.float()) <= max(1e-4, 16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("last", [1, 3])
def test_a_trunk_without_its_last_stages_is_compacted_and_loads(channels18, last: int) -> None:
    def build() -> nn.Module:
        options = {"features_only": True, "out_indices": range(1, last + 1)}
        return timm.create_model("ticket_resnet18", ticket=emptied(channels18), **options).eval()

    model = build()
    small = lth.compact(model)
    features = zip(model(IMAGES), small(IMAGES), strict=True)
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in features)
    assert small.layer1[0].conv1.out_channels < 64
    again = loaded(build(), small.state_dict())
    assert torch.equal(again(IMAGES)[-1], small(IMAGES)[-1])


def loaded(fresh: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    narrow_to(fresh, state)
    fresh.load_state_dict(state)
    return fresh.eval()


@pytest.mark.parametrize(
    "build", [torchvision.models.resnet18, lambda: timm.create_model("resnet18")]
)
def test_a_compacted_state_dict_loads_into_a_fresh_model(
    build: Callable[[], nn.Module], channels18
) -> None:
    model = build()
    lth.attach(model, channels18)
    small = lth.compact(model.eval())
    fresh = loaded(build(), small.state_dict())
    assert torch.equal(fresh(IMAGES), small(IMAGES))
    # Also into one that has the ticket on it, as hosts build theirs.
    with_ticket = loaded(attached(channels18), small.state_dict())
    assert torch.equal(with_ticket(IMAGES), small(IMAGES))
    assert lth.attached(with_ticket) is None
    narrow_to(small, small.state_dict())  # nothing to do


def test_a_state_dict_of_the_full_width_changes_nothing(channels18) -> None:
    model = attached(channels18)
    state = dict(model.state_dict()) | {"fc.weight": torch.zeros(7, 512)}
    narrow_to(model, state)
    lth.attached(model).verify()
    assert locate(model).arch.name == "resnet18"
