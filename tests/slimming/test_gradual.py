"""`Slimming`, in a plain training loop."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import lth_plugins as lth
from lth_plugins.slimming import channels
from lth_plugins.slimming.cost import Flops
from lth_plugins.slimming.gradual import Slimming
from lth_plugins.slimming.selection import budget_of
from tests.processes import together

STEPS = 6


def images(step: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(step))


def run(model: nn.Module) -> torch.Tensor:
    return model(images(99))


def slimming(flops: float, *settings: Any) -> Slimming:
    return Slimming(budget_of(flops, None), *settings)


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=3)
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)


def train(
    slim: Slimming,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    start: int = 0,
    wrapped: nn.Module | None = None,
    rank: int = 0,
    after: Callable[[int], Any] = lambda step: None,
) -> None:
    slim.start(model, optimizer, run, start, STEPS)
    model.train()
    for step in range(start, STEPS):
        optimizer.zero_grad()
        labels = torch.arange(2) + step % 2
        cross_entropy((wrapped or model)(images(step + 100 * rank)), labels).backward()
        optimizer.step()
        slim.after_step(model, step + 1)
        after(step + 1)


@pytest.mark.parametrize("importance", ["l2", "taylor", "fisher"])
def test_a_training_that_is_resumed_ends_with_the_same_channels_and_weights(
    importance: str,
) -> None:
    model, optimizer = make()
    slim = slimming(0.5, 0, 4, 2, importance)
    saved: dict[str, Any] = {}

    def save(step: int) -> None:
        if step == 3:  # between two removals
            state = {"m": model.state_dict(), "o": optimizer.state_dict()}
            saved.update(copy.deepcopy({**state, "s": slim.state_dict()}))

    train(slim, model, optimizer, after=save)
    assert Flops()(slim.network, slim.kept) <= 0.5 * Flops()(slim.network, slim.network.all_kept())
    again, other = make()
    resumed = slimming(0.5, 0, 4, 2, importance)
    again.load_state_dict(saved["m"])
    other.load_state_dict(saved["o"])
    resumed.load_state_dict(saved["s"])
    train(resumed, again, other, start=3)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    small = slim.finish(model)
    wanted = model.eval()(images(0))
    torch.testing.assert_close(
        small.eval()(images(0)) / wanted.abs().max(), wanted / wanted.abs().max()
    )


def test_removed_channels_are_zero_after_every_step() -> None:
    model, optimizer = make()
    slim = slimming(0.5, 0, 2, 1, "l2")

    def check(step: int) -> None:
        before = copy.deepcopy(model.state_dict())
        channels.zero(model, slim.network, slim.kept)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        if step > 2:  # nothing is made or read of them, so that they have no gradients either
            dead = ~slim.kept["layer1.0.conv1"]
            assert dead.any() and not model.layer1[0].conv1.weight.grad[dead].any()
            assert not model.layer1[0].conv2.weight.grad[:, dead].any()

    train(slim, model, optimizer, after=check)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ((0.5, 0, 4, 1, "l2"), None),
        ((0.5, 0, 9, 1, "l2"), "within the training's 6 iterations"),
        ((0.01, 0, 4, 1, "l2"), "at the least"),
        ((0.5, 4, 4, 1, "l2"), "end after that"),
        ((0.5, 0, 4, 0, "l2"), "period"),
        ((2.0, 0, 4, 1, "l2"), r"in \(0, 1\)"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_step(
    settings: tuple[Any, ...], match: str | None
) -> None:
    model, optimizer = make()
    before = copy.deepcopy(model.state_dict())
    if match is None:
        slimming(*settings).start(model, optimizer, run, 0, STEPS)
    else:
        with pytest.raises(lth.ConfigError, match=match):
            slimming(*settings).start(model, optimizer, run, 0, STEPS)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_another_budget_is_refused_on_a_resume() -> None:
    model, optimizer = make()
    slim = slimming(0.5, 0, 4, 1, "l2")
    slim.start(model, optimizer, run, 0, STEPS)
    with pytest.raises(lth.TicketError, match="slimmed by"):
        slimming(0.6, 0, 4, 1, "l2").load_state_dict(slim.state_dict())


def _rank(rank: int) -> dict[str, Tensor]:
    model, optimizer = make()
    slim = slimming(0.5, 0, 4, 2, "fisher")
    wrapped = DistributedDataParallel(model)
    train(slim, model, optimizer, wrapped=wrapped, rank=rank)
    return dict(slim.kept)


def test_processes_that_see_other_images_remove_the_same_channels() -> None:
    first, second = together(_rank)
    assert all(torch.equal(kept, second[name]) for name, kept in first.items())
    assert not all(kept.all() for kept in first.values())
