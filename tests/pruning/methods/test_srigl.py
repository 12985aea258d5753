"""SRigL: constant fan-in and ablation, on hand-computed values and in a real network."""

import math
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

import lth_plugins as lth
from lth_plugins import Ticket
from lth_plugins.pruning.methods import Snapshot, make_method

WEIGHTS = torch.tensor([[5.0, 4.0, 0, 0], [3.0, 2.0, 0, 0], [0.2, 0.1, 0, 0]])
GRADIENTS = torch.tensor([[0, 0, 0.1, 0.2], [0, 0, 0.9, 0.8], [0, 0, 0.05, 0.7]])


def moved(gamma_sal: float, **changes: Any) -> list[list[bool]]:
    masks = lth.Masks({"w": WEIGHTS != 0})
    given = {"weights": {"w": WEIGHTS}, "gradients": {"w": GRADIENTS}, "trained": frozenset("w")}
    fixed = {"masks": masks, "initial": 0.5, "model": torch.nn.Module()}
    now = Snapshot(step=0, steps=9, **{**fixed, **given, **changes})
    return make_method("srigl", alpha=0.5, gamma_sal=gamma_sal).update(now).masks["w"].tolist()


def test_every_neuron_keeps_its_fan_in() -> None:
    # 5, 4, 3 stay; the fan-in of 2 is filled with 0.9, and with 0.05 and 0.7.
    assert moved(0.3) == [
        [True, True, False, False],
        [True, False, True, False],
        [False, False, True, True],
    ]


def test_a_neuron_with_few_salient_weights_is_ablated_and_the_others_take_its_weights() -> None:
    # Salient are 5, 4, 3 and 0.9, 0.8, 0.7: one of the last neuron's, where two are asked for.
    ablated = [
        [True, True, False, True],
        [True, False, True, True],
        [False, False, False, False],
    ]
    assert moved(1.0) == ablated
    # It stays ablated, however large the gradients of its weights.
    mask = torch.tensor(ablated)
    again = {"masks": lth.Masks({"w": mask}), "weights": {"w": WEIGHTS * mask}}
    large = GRADIENTS.clone()
    large[2] = 100
    now = Snapshot(
        0, 9, again["masks"], again["weights"], frozenset("w"), {"w": large}, 0.5, torch.nn.Module()
    )
    found = make_method("srigl", alpha=0.5).update(now).masks["w"]
    assert found.sum(1).tolist() == [3, 3, 0]


def fan_ins(mask: Tensor) -> set[int]:
    return set(mask.flatten(1).sum(1).tolist())


def test_a_network_keeps_a_constant_fan_in_and_loses_channels_that_compact_removes(
    ticket18: Ticket,
) -> None:
    torch.manual_seed(1)
    model = torchvision.models.resnet18(num_classes=4)
    dense = Ticket.dense(ticket18.weights, source="test")
    handle = lth.attach(model, dense)
    options = {"sparsity": 0.99, "delta_t": 1, "alpha": 0.5, "gamma_sal": 0.9}
    training = lth.SparseTraining("srigl", **options)
    training.start(model, 6)
    assert all(len(fan_ins(mask)) == 1 for mask in handle.masks.values())
    assert handle.masks.sparsity == pytest.approx(0.99, abs=1e-3)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    for step in (1, 2):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 32, 32)).square().mean().backward()
        optimizer.step()
        training.after_step(model, step)
    masks = handle.masks
    assert all(len(fan_ins(mask) - {0}) == 1 for mask in masks.values())
    assert masks.sparsity == pytest.approx(0.99, abs=1e-3)
    dead = {name: int((~mask.flatten(1).any(1)).sum()) for name, mask in masks.items()}
    assert sum(dead.values()) > 0
    small = lth.compact(model.eval())
    name = max((n for n in dead if ".conv1." in n), key=dead.__getitem__)
    assert len(small.get_parameter(name)) < len(model.get_parameter(name))
    assert all(dead[n] <= len(m) - math.ceil(int(m.sum()) / m[0].numel()) for n, m in masks.items())


def test_a_sparse_ticket_is_made_one_of_constant_fan_in(ticket18: Ticket) -> None:
    model = torchvision.models.resnet18(num_classes=4)
    handle = lth.attach(model, ticket18)
    lth.SparseTraining("srigl", delta_t=1).start(model, 6)
    masks = handle.masks
    assert all(len(fan_ins(mask) - {0}) == 1 for mask in masks.values())
    assert masks.sparsity == pytest.approx(ticket18.sparsity, abs=1e-3)
    # What it keeps of each neuron is what the ticket has, first.
    own, mask = ticket18.masks["layer4.1.conv2.weight"], masks["layer4.1.conv2.weight"]
    assert int((mask & ~own).sum()) == int(
        (mask.flatten(1).sum(1) - own.flatten(1).sum(1)).clamp(min=0).sum()
    )
