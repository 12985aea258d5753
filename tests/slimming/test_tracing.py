"""Which channels belong together, on networks small enough to say it by hand."""

import copy
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

import lth_plugins as lth
from lth_plugins.slimming import channels
from lth_plugins.slimming.check import check_same
from lth_plugins.slimming.network import Network
from lth_plugins.slimming.tracing import trace

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def run(model: nn.Module) -> Tensor:
    return model(IMAGES)


def members(network: Network, group: str) -> set[tuple[str, str]]:
    return {(m.module, m.side) for m in network.groups[group].members}


class Residual(nn.Module):
    """A sum, a concatenation of two widths, and a flattened map before a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 6, 1)
        self.back = nn.Conv2d(6, 8, 1)
        self.side = nn.Conv2d(8, 4, 1)
        self.joint = nn.BatchNorm2d(12)
        self.last = nn.Conv2d(12, 5, 1)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.fc = nn.Linear(5 * 4, 7)

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm(self.stem(images)).relu()
        features = features + self.back(self.inner(features).relu())
        features = self.joint(torch.cat([features, self.side(features)], 1)).relu()
        return self.fc(self.pool(self.last(features)).flatten(1))


def test_channels_that_are_added_concatenated_or_flattened_go_together() -> None:
    network = trace(Residual(), run)
    stream = {("stem", "out"), ("norm", "out"), ("back", "out"), ("joint", "out")}
    assert members(network, "stem") == stream | {
        ("inner", "in"),
        ("side", "in"),
        ("last", "in"),
    }
    assert members(network, "side") == {("side", "out"), ("joint", "out"), ("last", "in")}
    of_side = {m.module: m.at.flatten().tolist() for m in network.groups["side"].members}
    assert of_side["last"] == [8, 9, 10, 11]
    (flattened,) = network.groups["last"].readers
    assert flattened.at[1].tolist() == [4, 5, 6, 7]
    assert network.held == {"fc": "no layer reads them: they are outputs of the model"}


def test_costs_are_those_of_the_example() -> None:
    layers = trace(Residual(), run).layers
    assert layers["stem"].macs == 2 * 8 * 16 * 16 * 3 * 9
    assert layers["fc"].macs == 2 * 7 * 20
    assert layers["inner"].activations == 2 * 6 * 16 * 16


class Fused(nn.Conv2d):
    """A convolution that normalises and activates inside, as detectron2's."""

    def __init__(self, *args: int, **kwargs: int) -> None:
        super().__init__(*args, **kwargs)
        self.norm, self.activation = nn.BatchNorm2d(self.out_channels), nn.functional.relu

    def forward(self, features: Tensor) -> Tensor:
        return self.activation(self.norm(super().forward(features)))


class Frozen(torchvision.ops.FrozenBatchNorm2d):
    pass


class Chain(nn.Module):
    """A layer to examine between two convolutions, which are also in a Python list."""

    def __init__(self, between: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.first = Fused(3, 8, 1)
        self.between = between
        self.last = nn.Conv2d(width, 2, 1)
        self.in_order = [self.first, self.between, self.last]

    def forward(self, features: Tensor) -> Tensor:
        for layer in self.in_order:
            features = layer(features)
        return features


@pytest.mark.parametrize(
    ("between", "width"),
    [
        (nn.Conv2d(8, 8, 3, groups=8), 8),
        (nn.ConvTranspose2d(8, 6, 2), 6),
        (Frozen(8), 8),
        (nn.SyncBatchNorm(8), 8),
        (nn.BatchNorm2d(8, affine=False), 8),
        (nn.Upsample(scale_factor=2), 8),
        (Fused(8, 6, 3, padding=1, padding_mode="reflect"), 6),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_model_that_loses_channels_computes_what_it_does_with_zeros(
    between: nn.Module, width: int
) -> None:
    model = Chain(copy.deepcopy(between), width)
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_()
    network = trace(model, run)
    assert "first" in network.groups
    kept = {n: torch.arange(g.channels) % 3 > 0 for n, g in network.groups.items()}
    channels.zero(model, network, kept)
    small = copy.deepcopy(model)
    channels.narrow(small, network, kept)
    assert small.first.out_channels == small.first.norm.num_features == 5
    torch.testing.assert_close(small.eval()(IMAGES), model.eval()(IMAGES))
    small.train()(IMAGES)  # its counts fit as well


@pytest.mark.parametrize(
    ("between", "why"),
    [
        (nn.Conv2d(8, 8, 3, groups=2), "between is a convolution of 2 groups"),
        (nn.GroupNorm(2, 8), "between is a GroupNorm, which is not made narrower"),
    ],
)
def test_layers_that_mix_channels_hold_them_by_name(between: nn.Module, why: str) -> None:
    network = trace(Chain(between), run)
    assert network.held["first"] == why
    assert "first" not in network.groups


def test_modules_that_are_to_be_kept_lose_no_outputs() -> None:
    network = trace(Residual(), run, keep=["back"])
    assert network.held["stem"] == "back is to be kept"
    assert set(network.groups) == {"inner", "side", "last"}
    with pytest.raises(lth.TicketError, match="none named 'bakc'"):
        trace(Residual(), run, keep=["bakc"])


def test_tracing_changes_nothing() -> None:
    model = Chain(Fused(8, 8, 1))
    model.first.norm.eval()
    before = copy.deepcopy(model.state_dict())
    trace(model, run)
    assert model.training and not model.first.norm.training and type(model.first) is Fused
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Shuffled(Chain):
    """Mixes channels where no graph shows it."""

    def forward(self, features: Tensor) -> Tensor:
        features = self.first(features)
        return self.last(self.between(features.flip(1)))


class Returning(Chain):
    """Returns features that it also reads."""

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        features = self.first(features)
        return features, self.last(self.between(features))


@pytest.mark.parametrize(
    ("kind", "match"),
    [(Shuffled, "mixes channels"), (Returning, "returns channels that its layers read")],
)
def test_a_coupling_that_tracing_does_not_see_is_refused(
    kind: Callable[..., Chain], match: str
) -> None:
    model = kind(nn.Conv2d(8, 8, 1))
    network = trace(model, run)
    kept = {n: torch.arange(g.channels) > 3 for n, g in network.groups.items()}
    channels.zero(model, network, kept)
    small = copy.deepcopy(model)
    channels.narrow(small, network, kept)
    with pytest.raises(lth.TicketError, match=match):
        check_same(model, small, network, run)


def test_an_example_that_does_not_fit_is_refused() -> None:
    with pytest.raises(lth.TicketError, match="expected the example to run through the Residual"):
        trace(Residual(), lambda model: model(IMAGES[:, :1]))


def test_a_deformable_convolution_is_refused_by_its_name_before_anything_runs() -> None:
    model = Chain(torchvision.ops.DeformConv2d(8, 8, 1))  # which cannot be called with features
    with pytest.raises(lth.TicketError, match="found between, a DeformConv2d"):
        trace(model, run)
