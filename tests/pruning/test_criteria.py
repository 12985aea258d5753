"""Each criterion against scores computed by hand, and each allocation against its budget."""

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lth_plugins as lth
from lth_plugins import ConfigError, Masks
from lth_plugins.pruning import CRITERIA
from lth_plugins.pruning.allocation import erk, uniform
from lth_plugins.ticket import ARCHITECTURES

NAME = "layer1.0.conv1.weight"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=4)


def scores_of(criterion: str, model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Tensor:
    weights = {n: model.get_parameter(n).detach() for n in ARCHITECTURES["resnet18"].prunable}
    others = [n for n in weights if n != NAME]

    def whole(model: nn.Module) -> Tensor:  # autograd wants every weight in the loss
        return loss(model) + sum(model.get_parameter(n).square().sum() for n in others)

    return CRITERIA[criterion](weights, model, whole)[NAME]


def test_magnitude_by_hand(model) -> None:
    scores = CRITERIA["magnitude"]({"a": torch.tensor([-2.0, 0.5])}, None, None)
    assert scores["a"].tolist() == [2.0, 0.5]


def test_snip_by_hand(model) -> None:
    """L = Σ c w has the gradient c, so the sensitivity is |c w|."""
    weight = model.get_parameter(NAME).detach()
    c = torch.linspace(-1, 2, weight.numel()).view_as(weight)
    scores = scores_of("snip", model, lambda m: (c * m.get_parameter(NAME)).sum())
    torch.testing.assert_close(scores, (c * weight).abs())


def test_grasp_by_hand(model) -> None:
    """L = Σ a w² / 2 has the gradient a w and the Hessian a, so w · Hg is a² w²."""
    weight = model.get_parameter(NAME).detach()
    a = torch.linspace(0.5, 2, weight.numel()).view_as(weight)
    scores = scores_of("grasp", model, lambda m: (a * m.get_parameter(NAME).square()).sum() / 2)
    torch.testing.assert_close(scores, (a * weight).square())


def test_synflow_by_hand() -> None:
    """The flow through |network| is linear in |w|: with R = Σ c |w| the score is c |w|."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    weight = model.get_parameter(NAME).detach().clone()
    c = torch.linspace(0, 2, weight.numel()).view_as(weight)
    weights = {
        n: model.get_parameter(n).detach().clone() for n in ARCHITECTURES["resnet18"].prunable
    }

    def flow(model: nn.Module) -> Tensor:
        assert not model.training and all((p >= 0).all() for p in model.parameters())
        others = sum(model.get_parameter(n).sum() for n in weights if n != NAME)
        return (c * model.get_parameter(NAME)).sum() + others

    scores = CRITERIA["synflow"](weights, model, flow)[NAME]
    torch.testing.assert_close(scores, c * weight.abs())


@pytest.mark.parametrize("criterion", ["snip", "grasp", "synflow"])
def test_real_losses_prune_what_was_asked_and_leave_the_model_alone(model, criterion: str) -> None:
    images = torch.randn(4, 3, 32, 32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = lth.prune(model, 0.5)
    masks = lth.prune(
        *(model, 0.2, first, criterion), loss=lambda m: cross_entropy(m(images), torch.arange(4))
    )
    assert masks.issubset(first) and masks.kept == first.kept - round(0.2 * first.kept)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("criterion", ["snip", "grasp", "synflow"])
def test_gradients_need_a_model_and_a_loss(model, criterion: str) -> None:
    with pytest.raises(ConfigError, match="give prune the model, not its state dict"):
        lth.prune(model.state_dict(), 0.2, criterion=criterion)
    with pytest.raises(ConfigError, match="ranks weights by gradients"):
        lth.prune(model, 0.2, criterion=criterion)


def test_uniform_takes_the_same_fraction_everywhere() -> None:
    masks = Masks.ones({"a": (10, 10, 1, 1), "b": (5, 4, 3, 3)})
    assert uniform(masks, 0.25) == {"a": 25, "b": 45}


def test_erk_by_hand() -> None:
    """10 + 10 + 1 + 1 = 22 and 8 + 10 + 3 + 3 = 24: 92 weights are shared as 44 to 48."""
    masks = Masks.ones({"a": (10, 10, 1, 1), "b": (8, 10, 3, 3)})
    assert erk(masks, 1 - 92 / 820) == {"a": 100 - 44, "b": 720 - 48}


def test_erk_gives_what_does_not_fit_to_the_others() -> None:
    """Half of 820 is 410: the 196 that fall to ``a`` are more than its 100."""
    masks = Masks.ones({"a": (10, 10, 1, 1), "b": (8, 10, 3, 3)})
    assert erk(masks, 0.5) == {"a": 0, "b": 720 - 310}


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.9, 0.999, 1.0])
def test_erk_keeps_the_budget_on_resnet50(fraction: float) -> None:
    masks = Masks.ones(ARCHITECTURES["resnet50"].prunable)
    assert sum(erk(masks, fraction).values()) == round(fraction * masks.kept)
