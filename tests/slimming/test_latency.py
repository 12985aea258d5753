"""Slimming to a share of the time of inference: the table of layer times, and its correction."""

import itertools
import logging
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

import lth_plugins as lth
from lth_plugins.slimming.cost import Cost, Flops
from lth_plugins.slimming.gradual import Slimming
from lth_plugins.slimming.latency import Latency, Surface
from lth_plugins.slimming.network import Group, Layer, Member, Network
from lth_plugins.slimming.selection import Budget, budget_of, select, settle

IMAGE = torch.ones(1, 3, 32, 32)


def network_of(channels: int = 8) -> Network:
    """Two layers, and the channels between them."""
    at = torch.arange(channels)[:, None]
    members = (Member("a", "out", channels, at), Member("b", "in", channels, at))
    layers = {
        name: Layer(name, 100.0, elements, False) for name, elements in (("a", 30), ("b", 10))
    }
    return Network({"a": Group("a", channels, members)}, {"b": "output"}, layers)


def kept(count: int, channels: int = 8) -> dict[str, Tensor]:
    return {"a": torch.arange(channels) < count}


TABLE = Latency(
    layers={
        "a": Surface((0.5, 1.0), (1.0,), ((4.0,), (6.0,))),
        "b": Surface((1.0,), (0.25, 0.5, 1.0), ((1.0, 1.5, 2.0),)),
    },
    rest=4.0,
)


def test_the_time_lies_between_what_was_measured_and_the_rest_goes_with_the_activations() -> None:
    network = network_of()
    assert TABLE(network, kept(8)) == 6 + 2 + 4
    assert TABLE(network, kept(6)) == 5 + 1.75 + 4 * (0.75 * 30 + 10) / 40
    assert TABLE.by_layer(network, kept(1)) == {"a": 4.0, "b": 1.0}  # narrower than measured
    both = Surface((0.5, 1.0), (0.5, 1.0), ((1.0, 2.0), (3.0, 8.0)))
    assert both(0.75, 0.75) == (1 + 2 + 3 + 8) / 4
    assert replace(TABLE, gain=0.5)(network, kept(6)) == (12 + TABLE(network, kept(6))) / 2


def test_a_removed_channel_never_costs_more_whatever_was_measured() -> None:
    torch.manual_seed(0)
    shares = (0.125, 0.25, 0.5, 0.75, 1.0)
    network = network_of(32)
    for _ in range(20):
        noisy = torch.rand(5, 5).tolist()
        surface = Surface.fitted(shares, shares, noisy)
        times = torch.tensor(surface.seconds)
        assert (times.diff(dim=0) >= 0).all() and (times.diff(dim=1) >= 0).all()
        latency = Latency({"a": surface, "b": surface}, rest=0.1, gain=1.7)
        costs = [latency(network, kept(count, 32)) for count in range(33)]
        assert costs == sorted(costs)
    rising = [[1.0, 2.0], [3.0, 4.0]]  # what rises already stays
    assert Surface.fitted((0.5, 1), (0.5, 1), rising).seconds == ((1.0, 2.0), (3.0, 4.0))


@dataclass(frozen=True)
class Slower(Flops):
    """Expects twice the saving that there is, until it is corrected."""

    gain: float = 2.0

    def __call__(self, network: Network, kept: object) -> float:
        return 200 - self.gain * (200 - super().__call__(network, kept))

    def corrected(self, *_: object) -> Cost:
        return self if self.gain == 1 else replace(self, gain=1.0)


def test_the_selection_is_corrected_by_what_the_narrower_model_costs(caplog) -> None:
    network, model = network_of(32), nn.Identity()
    scores = {"a": torch.arange(32.0)}
    budget = Budget(0.5, Slower(), multiple=1)
    assert int(select(network, scores, network.all_kept(), budget)["a"].sum()) == 24
    left = settle(model, network, scores, network.all_kept(), budget, lambda m: m)
    assert int(left["a"].sum()) == 16 and not caplog.records
    with caplog.at_level(logging.WARNING):  # what is gone does not come back, and is said
        settle(model, network, scores, kept(8, 32), budget, lambda m: m)
    assert "Asked for was 0.500 of the FLOPs, and 0.250 is left" in caplog.text


def test_a_network_is_slimmed_to_the_time_that_a_table_says() -> None:
    network = network_of()
    budget = Budget(0.8, TABLE, multiple=1)
    left = select(network, {"a": torch.arange(8.0)}, network.all_kept(), budget)
    assert TABLE(network, left) <= 0.8 * 12 < TABLE(network, kept(int(left["a"].sum()) + 1))
    with pytest.raises(lth.ConfigError, match=r"0.3 of the time of inference: .* most of it in a"):
        select(network, {"a": torch.arange(8.0)}, network.all_kept(), Budget(0.3, TABLE))


@pytest.mark.parametrize(
    ("flops", "latency", "match"),
    [
        (0.5, 0.6, "found both, 0.5 and 0.6"),
        (None, None, "found neither"),
        (None, 1.0, "share of the time of inference to keep, in .0, 1.*found 1.0"),
        (None, 0.0, "found 0.0"),
    ],
)
def test_exactly_one_budget_between_0_and_1_is_needed(
    flops: float | None, latency: float | None, match: str
) -> None:
    with pytest.raises(lth.ConfigError, match=match):
        lth.slim(nn.Conv2d(3, 8, 1), IMAGE, flops, latency=latency)


def make() -> nn.Module:
    torch.manual_seed(0)
    widths = (3, 64, 64, 64)
    layers = [nn.Conv2d(a, b, 3) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*layers, nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten())


def start(model: nn.Module, done: int, state: object = None) -> Slimming:
    slimming = Slimming(budget_of(None, 0.7), 0, 2, 1)
    if state is not None:
        slimming.load_state_dict(state)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    slimming.start(model, optimizer, lambda m: m(IMAGE), done, 2)
    return slimming


def test_a_training_is_slimmed_by_the_times_measured_at_its_start_when_resumed_too(
    tmp_path,
) -> None:
    model = make()
    slimming = start(model, 0)
    slimming.after_step(model, 1)
    torch.save(slimming.state_dict(), tmp_path / "state.pth")
    resumed = start(make(), 1, torch.load(tmp_path / "state.pth", weights_only=True))
    assert resumed.budget == slimming.budget  # measured anew, no time would be the same
    slimming.after_step(model, 2)
    small = slimming.finish(model)
    assert small[0].out_channels + small[1].out_channels + small[2].in_channels < 3 * 64
    for other in (budget_of(0.7, None), budget_of(None, 0.6)):
        with pytest.raises(lth.TicketError, match="slimmed by .*time of inference.* now asked for"):
            Slimming(other, 0, 2, 1).load_state_dict(slimming.state_dict())
