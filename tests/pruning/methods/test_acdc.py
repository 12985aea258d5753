"""AC/DC: its phases, what each compression keeps, and what each decompression forgets."""

import pytest
import torch
import torchvision

import lth_plugins as lth
from lth_plugins import Ticket
from lth_plugins.errors import LthError
from lth_plugins.pruning.methods import Snapshot, make_method

STEPS = 20


def _now(step: int, steps: int) -> Snapshot:
    weights, masks = {"w": torch.rand(4, 4)}, lth.Masks.ones({"w": (4, 4)})
    return Snapshot(step, steps, masks, weights, frozenset("w"), {}, 0.0, torch.nn.Module())


def test_phases_are_the_papers_at_any_length() -> None:
    acdc = make_method("acdc", sparsity=0.9)
    for steps in (20, 100, 1000):
        due = [step for step in range(steps + 1) if acdc.is_due(step, steps)]
        percents = [10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60, 65, 70, 75, 85]
        assert due == [steps * percent // 100 for percent in percents]
        dense = [step for step in due if acdc.update(_now(step, steps)).resets_momentum]
        assert dense == due[1:-1:2]


@pytest.mark.parametrize("options", [{"sparsity": 0.9}, {"n": 2, "m": 4}], ids=["global", "nm"])
def test_a_training_is_compressed_by_magnitude_and_let_go_without_momentum(
    ticket18: Ticket, options: dict
) -> None:
    torch.manual_seed(1)
    model = torchvision.models.resnet18(num_classes=4)
    handle = lth.attach(model, Ticket.dense(ticket18.weights, source="test"))
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    training = lth.SparseTraining("acdc", **options)
    training.start(model, STEPS)
    densities = []
    for step in range(1, 5):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 32, 32)).square().mean().backward()
        optimizer.step()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        training.after_step(model, step)
        densities.append(handle.masks.density)
        momentum = [one["momentum_buffer"] for one in optimizer.state.values()]
        assert any(value.any() for value in momentum) == (step != 3)
        if step == 2:
            masks = handle.masks
            if "n" in options:
                groups = [mask.unflatten(1, (-1, 4)).sum(2) for mask in masks.values()]
                assert all((group == 2).all() for group in groups)
            else:
                assert masks == lth.prune(before, 0.9)
    assert densities == pytest.approx(
        [1, 1 - options.get("sparsity", 0.5), 1, densities[1]], abs=1e-6
    )
    assert handle.ticket().meta.recipe["acdc"]["sparsity"] == options.get("sparsity")


@pytest.mark.parametrize(
    ("options", "sparse", "steps", "message"),
    [
        ({"sparsity": 0.9}, False, 12, "20 iterations or more for the 16 phases"),
        ({"sparsity": 0.9}, True, STEPS, "expected a dense ticket"),
        ({}, False, STEPS, "expected one of the two"),
        ({"sparsity": 0.9, "n": 2, "m": 4}, False, STEPS, "expected one of the two"),
        ({"n": 5, "m": 4}, False, STEPS, "0 < N <= M"),
        ({"n": 2, "m": 7}, False, STEPS, "in multiples of 7"),
        ({"sparsity": 0.9}, False, float("inf"), "of known length"),
    ],
)
def test_what_does_not_fit_is_refused(
    ticket18: Ticket, options: dict, sparse: bool, steps: float, message: str
) -> None:
    model = torchvision.models.resnet18(num_classes=4)
    ticket = ticket18 if sparse else Ticket.dense(ticket18.weights, source="test")
    handle = lth.attach(model, ticket)
    with pytest.raises(LthError, match=message):
        lth.SparseTraining("acdc", **options).start(model, steps)
    assert handle.masks == ticket.masks
