"""`lth.slim`, from a model and an example to a narrower model."""

import copy
import logging

import pytest
import timm
import torch
import torchvision
from torch import nn

import lth_plugins as lth
from lth_plugins.slimming.cost import Flops
from lth_plugins.slimming.importance import IMPORTANCES
from lth_plugins.slimming.network import Group, Layer, Member, Network
from lth_plugins.slimming.selection import Budget, select
from lth_plugins.slimming.tracing import trace
from lth_plugins.slimming.widths import adopt_widths

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=5).eval()


def flops(model: nn.Module) -> float:
    network = trace(model, lambda m: m(IMAGES))
    return Flops()(network, network.all_kept())


@pytest.mark.parametrize("importance", ["l1", "l2", "taylor", "fisher"])
def test_every_importance_meets_the_budget_and_leaves_the_outputs(
    resnet: nn.Module, importance: str
) -> None:
    small = lth.slim(
        resnet,
        IMAGES,
        flops=0.5,
        importance=importance,
        loss=lambda model: model(IMAGES).square().mean(),
    )
    assert 0.45 < flops(small) / flops(resnet) <= 0.5
    assert small(IMAGES).shape == (2, 5)
    assert small.layer1[0].conv2.out_channels < 64 or small.layer3[0].conv2.out_channels < 256
    assert all(p.grad is None for p in resnet.parameters())
    small.train()(IMAGES).sum().backward()


def test_what_ranks_channels_leaves_statistics_and_modes_as_they_are(resnet: nn.Module) -> None:
    model = copy.deepcopy(resnet).train()
    model.bn1.eval()
    small = lth.slim(model, IMAGES, 0.9, importance="taylor", loss=lambda m: m(IMAGES).sum())
    assert small.training and not small.bn1.training
    assert all(not layer.running_mean.any() for layer in (small.bn1, small.layer1[0].bn1))


def test_its_checkpoint_has_stock_keys_and_loads_into_a_fresh_model(
    resnet: nn.Module, tmp_path
) -> None:
    small = lth.slim(resnet, IMAGES, flops=0.4)
    assert list(small.state_dict()) == list(resnet.state_dict())
    torch.save(small.state_dict(), tmp_path / "slim.pth")
    state = torch.load(tmp_path / "slim.pth", weights_only=True)
    fresh = torchvision.models.resnet18(num_classes=5).eval()
    adopt_widths(fresh, state)
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh(IMAGES), small(IMAGES))
    again = copy.deepcopy(fresh)  # its own checkpoints are of a slimmed model, too
    other = torchvision.models.resnet18(num_classes=5)
    adopt_widths(other, again.state_dict())
    other.load_state_dict(again.state_dict())


def test_another_number_of_classes_is_no_slimmed_model(resnet: nn.Module) -> None:
    state = torchvision.models.resnet18(num_classes=3).state_dict()
    fresh = copy.deepcopy(resnet)
    adopt_widths(fresh, state)
    assert fresh.fc.out_features == 5


def test_a_slimmed_checkpoint_is_of_a_model_with_as_many_classes(resnet: nn.Module) -> None:
    state = lth.slim(resnet, IMAGES, flops=0.5).state_dict()
    fresh = torchvision.models.resnet18(num_classes=8)
    with pytest.raises(lth.TicketError, match=r"fc has a weight of \(5, 512\), found one of \(8, "):
        adopt_widths(fresh, state)
    assert fresh.layer4[1].conv1.out_channels == 512
    wrapped = nn.ModuleDict({"net": torchvision.models.resnet18(num_classes=8)})
    whole = nn.ModuleDict({"net": copy.deepcopy(resnet)})
    whole["net"] = lth.slim(resnet, IMAGES, flops=0.5)
    with pytest.raises(lth.TicketError, match="net.fc has a weight"):
        adopt_widths(wrapped, whole.state_dict())


def test_what_a_ticket_leaves_of_channels_ranks_them(resnet: nn.Module) -> None:
    model = copy.deepcopy(resnet)
    dense = lth.Ticket.dense(model.state_dict(), source="test")
    masks = {name: mask.clone() for name, mask in dense.masks.items()}
    masks["layer1.0.conv1.weight"][:32] = False  # of 64
    masks["layer1.0.conv2.weight"][:, :32] = False
    lth.attach(model, lth.Ticket(lth.Masks(masks), dense.weights, meta=dense.meta))
    small = lth.slim(model, IMAGES, flops=0.9, importance="ticket")
    assert small.layer1[0].conv1.out_channels == 32  # in steps of 16
    assert lth.attached(small).masks.sparsity < lth.attached(model).masks.sparsity
    with pytest.raises(lth.TicketError, match="found none"):
        lth.slim(resnet, IMAGES, flops=0.9, importance="ticket")


def test_a_budget_that_cannot_be_met_names_what_holds_it(resnet: nn.Module) -> None:
    with pytest.raises(lth.ConfigError, match=r"at the least 0\.\d+ is left, most of it in conv1"):
        lth.slim(resnet, IMAGES, flops=0.01)
    held = [name for name, _ in resnet.named_children() if name.startswith("layer")]
    with pytest.raises(lth.ConfigError, match="keep fewer "):
        lth.slim(resnet, IMAGES, flops=0.5, keep=held)


@pytest.mark.parametrize("share", [0.0, 1.0, -1, 1.5])
def test_a_share_is_between_0_and_1(resnet: nn.Module, share: float) -> None:
    with pytest.raises(lth.ConfigError, match=r"in \(0, 1\)"):
        lth.slim(resnet, IMAGES, flops=share)


def test_an_importance_of_gradients_needs_a_loss(resnet: nn.Module) -> None:
    with pytest.raises(lth.ConfigError, match="needs a loss"):
        lth.slim(resnet, IMAGES, flops=0.5, importance="fisher")
    with pytest.raises(lth.ConfigError, match="unknown importance 'fischer'"):
        lth.slim(resnet, IMAGES, flops=0.5, importance="fischer")


def test_it_says_how_much_is_left(resnet: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        lth.slim(resnet, IMAGES, flops=0.5)
    assert "removable channels are left" in caplog.text and "of the FLOPs" in caplog.text


@pytest.mark.parametrize(
    "name", ["resnet10t", "resnext26ts", "mobilenetv3_small_050", "efficientnet_b0", "regnetx_002"]
)
def test_models_of_timm_are_slimmed_or_refused_by_name(name: str) -> None:
    model = timm.create_model(name, num_classes=3).eval()
    try:
        small = lth.slim(model, IMAGES, flops=0.8)
    except (lth.TicketError, lth.ConfigError) as error:
        assert "eep" in str(error), error  # keep: what to do
    else:
        assert small(IMAGES).shape == (2, 3)
        assert flops(small) <= 0.8 * flops(model)


def test_a_model_whose_graph_cannot_be_followed_is_refused() -> None:
    model = torchvision.models.shufflenet_v2_x0_5(num_classes=3).eval()
    with pytest.raises(lth.TicketError, match="graph of the ShuffleNetV2 cannot be followed"):
        lth.slim(model, IMAGES, flops=0.5)


def test_a_detector_of_torchvision_is_slimmed_although_boxes_change_places() -> None:
    torch.manual_seed(0)
    model = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64
    ).eval()
    images = [torch.rand(3, 64, 64)]
    small = lth.slim(model, images, flops=0.6)
    assert small.rpn.head.conv[0][0].out_channels < 256
    assert set(small(images)[0]) == {"boxes", "labels", "scores"}


def two_groups(wide: int = 8, narrow: int = 4) -> Network:
    """A chain of three 1x1 layers; the first is wide."""
    line = {n: torch.arange(n)[:, None] for n in (wide, narrow)}
    groups = {
        "a": Group(
            "a", wide, (Member("a", "out", wide, line[wide]), Member("b", "in", wide, line[wide]))
        ),
        "b": Group(
            "b",
            narrow,
            (Member("b", "out", narrow, line[narrow]), Member("c", "in", narrow, line[narrow])),
        ),
    }
    layers = {name: Layer(name, 100.0, 10.0, False) for name in ("a", "b", "c")}
    return Network(groups, {"c": "output"}, layers)


def test_selection_removes_the_lowest_of_all_groups_until_the_budget_is_met() -> None:
    network = two_groups()
    scores = {
        "a": torch.tensor([9.0, 0, 9, 0, 9, 9, 9, 9]),
        "b": torch.tensor([5.0, 1, 5, 5]),
    }
    budget = Budget(0.8, Flops(), multiple=1)
    left = select(network, scores, network.all_kept(), budget)
    # Without a's two: 75 + 75 + 100 = 250 of 300; without b's lowest, too: 75 + 56.25 + 75.
    assert left["a"].tolist() == [True, False, True, False, True, True, True, True]
    assert left["b"].tolist() == [True, False, True, True]
    assert Flops()(network, left) == 75 + 56.25 + 75


def test_groups_of_which_nothing_is_known_stay_as_they_are() -> None:
    """Frozen stages have no gradients."""
    network = two_groups()
    scores = {"a": torch.zeros(8), "b": torch.tensor([5.0, 1, 5, 5])}
    left = select(network, scores, network.all_kept(), Budget(0.85, Flops(), multiple=1))
    assert left["a"].all() and left["b"].tolist() == [True, False, True, True]
    with pytest.raises(lth.ConfigError, match="freeze fewer stages"):
        select(network, scores, network.all_kept(), Budget(0.3, Flops(), multiple=1))


def test_selection_keeps_multiples_and_never_returns_a_channel() -> None:
    network = two_groups()
    scores = {"a": torch.arange(8.0), "b": torch.arange(4.0) + 100}
    budget = Budget(0.9, Flops(), multiple=4)
    first = select(network, scores, network.all_kept(), budget)
    assert first["a"].tolist() == [False] * 4 + [True] * 4 and first["b"].all()
    reverse = {name: -values for name, values in scores.items()}
    second = select(network, reverse, first, Budget(0.6, Flops(), multiple=1))
    assert not (second["a"] & ~first["a"]).any()
    assert select(network, scores, second, budget) == second  # met already


def test_selection_keeps_widths_that_kernels_compute_well() -> None:
    at = torch.arange(256)[:, None]
    members = (Member("a", "out", 256, at), Member("b", "in", 256, at))
    layers = {name: Layer(name, 100.0, 10.0, False) for name in ("a", "b")}
    network = Network({"a": Group("a", 256, members)}, {"b": "output"}, layers)
    scores = {"a": torch.arange(256.0)}
    shares = torch.linspace(0.2, 0.95, 30).tolist()
    found = {
        int(select(network, scores, network.all_kept(), Budget(share, Flops()))["a"].sum()) // 16
        for share in shares
    }
    # Blocks of 16 channels, of which a kernel takes two, three or five at once.
    assert found == {3, 4, 5, 6, 8, 9, 10, 12, 14, 15}


def test_the_taylor_of_a_linear_chain_is_that_of_the_paper() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([2.0, 3.0]).view(2, 1, 1, 1))
        model[1].weight.copy_(torch.tensor([1.0, 4.0]).view(1, 2, 1, 1))
    image = torch.ones(1, 1, 1, 1)
    taylor = IMPORTANCES["taylor"]()
    taylor.start(model, trace(model, lambda m: m(image)))
    model(image).sum().backward()
    taylor.after_backward()
    # w · ∂L/∂w is 2 · 1 and 3 · 4; squared, over their mean.
    expected = torch.tensor([4.0, 144.0], dtype=torch.float64)
    torch.testing.assert_close(taylor.scores()["0"], expected / expected.mean())


def test_the_fisher_of_two_readers_shares_their_mask() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(1, 2, 1, bias=False)
            self.left, self.right = (nn.Conv2d(2, 1, 1, bias=False) for _ in range(2))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            features = self.first(images)
            return self.left(features) + self.right(features)

    model = Fork()
    with torch.no_grad():
        model.first.weight.copy_(torch.tensor([1.0, 2.0]).view(2, 1, 1, 1))
        model.left.weight.copy_(torch.tensor([3.0, 1.0]).view(1, 2, 1, 1))
        model.right.weight.copy_(torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1))
    images = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
    fisher = IMPORTANCES["fisher"]()
    fisher.start(model, trace(model, lambda m: m(images)))
    model(images).sum().backward()
    fisher.after_backward()
    # Of image x: the mask of channel 1 has x·1·(3 - 1), of channel 2 x·2·(1 + 1); two activations.
    expected = torch.tensor([(2**2 + 4**2) / 2, (4**2 + 8**2) / 2], dtype=torch.float64)
    torch.testing.assert_close(fisher.scores()["first"], expected)
    fisher.stop()
    model(images).sum().backward()
    fisher.after_backward()
    assert not fisher.scores()["first"].any()
