"""Gradual pruning of a real network in training: how sparse when, and after a resume."""

import io
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import lth_plugins as lth
from lth_plugins import Ticket, TicketError
from lth_plugins.errors import ConfigError, LthError
from lth_plugins.pruning import CRITERIA

SCHEDULE: dict[str, Any] = {"target": 0.7, "begin": 1, "end": 5, "period": 2}


class Training:
    """Six steps of SGD with momentum on noise, which differs from step to step."""

    def __init__(self, ticket: Ticket, **changes: Any) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = torchvision.models.resnet18(num_classes=4)
        self.handle = lth.attach(self.model, ticket)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.01, momentum=0.9)
        self.pruning = lth.SparseTraining("gradual", **{**SCHEDULE, **changes})
        self.done = 0

    def run(self, steps: int = 6) -> list[float]:
        """Train up to so many steps; the sparsity after each."""
        self.pruning.start(self.model, 6)
        found = []
        for step in range(self.done + 1, steps + 1):
            images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(step))
            self.optimizer.zero_grad()
            self.model(images).square().mean().backward()
            self.optimizer.step()
            self.pruning.after_step(self.model, step)
            self.handle.verify()
            found.append(self.handle.masks.sparsity)
        self.done = steps
        return found

    def save(self) -> io.BytesIO:
        buffer = io.BytesIO()
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "pruning": self.pruning.state_dict(self.model),
            "done": self.done,
        }
        torch.save(state, buffer)
        buffer.seek(0)
        return buffer

    def load(self, file: io.BytesIO) -> None:
        state = torch.load(file, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.pruning.load_state_dict(self.model, state["pruning"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = state["done"]


@pytest.fixture(scope="module")
def dense(ticket18: Ticket) -> Ticket:
    return Ticket.dense(ticket18.weights, source="test")


@pytest.mark.parametrize("allocation", ["global", "erk"])
def test_it_follows_the_schedule_to_exactly_the_target(dense: Ticket, allocation: str) -> None:
    training = Training(dense, allocation=allocation)
    # Nothing after 1 and 2 steps; 0.7 · (1 - 1/8) after 3, the target after 5.
    expected = [0, 0, 0.6125, 0.6125, 0.7, 0.7]
    assert training.run() == pytest.approx(expected, abs=1e-7)
    masks = training.handle.masks
    assert masks.kept == masks.numel - round(0.7 * masks.numel)


def test_a_sparse_ticket_is_pruned_on_from_its_own_sparsity(ticket18: Ticket) -> None:
    training = Training(ticket18, target=0.9)
    start = ticket18.sparsity
    *_, third, _, fifth, _ = training.run()
    assert third == pytest.approx(0.9 + (start - 0.9) / 8, abs=1e-7)
    assert fifth == pytest.approx(0.9, abs=1e-7)
    assert training.handle.masks.issubset(ticket18.masks)


@pytest.fixture(scope="module")
def whole(dense: Ticket) -> Ticket:
    """What an uninterrupted training ends in."""
    training = Training(dense)
    training.run()
    return training.handle.ticket()


@pytest.mark.parametrize("stop", [2, 4])
def test_a_resumed_training_ends_in_the_same_ticket(
    dense: Ticket, whole: Ticket, stop: int
) -> None:
    first, second = Training(dense), Training(dense)
    first.run(stop)
    second.load(first.save())
    assert second.handle.masks == first.handle.masks
    second.run()
    assert second.handle.ticket() == whole


def test_the_ticket_says_how_it_was_pruned(whole: Ticket) -> None:
    gradual = {**SCHEDULE, "criterion": "magnitude", "allocation": "global"}
    assert whole.meta.recipe == {"gradual": gradual}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"end": 7}, "within the training's 6 iterations, found end 7"),
        ({"target": 0.5}, "the ticket's 0.6723 or more, found 0.5"),
        ({"end": 1}, "found begin 1 and end 1"),
        ({"criterion": "snip"}, "loss"),
        ({"allocation": "even"}, "unknown allocation 'even'"),
    ],
)
def test_what_does_not_fit_is_refused(ticket18: Ticket, changes: dict, message: str) -> None:
    with pytest.raises(LthError, match=message):
        Training(ticket18, **changes).run()


def test_a_checkpoint_of_another_schedule_is_refused(dense: Ticket) -> None:
    training = Training(dense)
    training.run(3)
    other = Training(dense, target=0.9)
    with pytest.raises(TicketError, match="'target': 0.7, .*'target': 0.9"):
        other.load(training.save())
    assert other.handle.masks.density == 1


def test_a_checkpoint_of_another_ticket_is_refused(dense: Ticket) -> None:
    training = Training(dense)
    saved = training.pruning.state_dict(training.model)
    saved["masks"]["head.weight"] = saved["masks"].pop("layer1.0.conv1.weight")
    with pytest.raises(TicketError, match="on another ticket: head.weight is masked in one"):
        training.pruning.load_state_dict(training.model, saved)


def test_masks_that_are_none_of_the_ticket_are_refused(ticket18: Ticket) -> None:
    handle = Training(ticket18).handle
    with pytest.raises(TicketError, match=r"with layer1\.0\.conv1\.weight of shape .*, found none"):
        handle.replace(lth.Masks({"fc.weight": torch.ones(2, 2)}))
    assert handle.masks == ticket18.masks


def test_a_criterion_that_updates_weights_does_so_in_the_training(
    dense, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Doubles:
        """Ranks by magnitude, and doubles what stays."""

        def __call__(self, weights, model, loss):
            if loss is None:
                raise ConfigError("needs a loss")
            return {name: weight.abs() for name, weight in weights.items()}

        def update(self, weights, masks, model, loss):
            return {name: 2 * weight * masks[name] for name, weight in weights.items()}

    monkeypatch.setitem(CRITERIA._values, "doubles", Doubles())
    with pytest.raises(ConfigError, match="'doubles' ranks weights by the gradients"):
        lth.SparseTraining("gradual", **SCHEDULE, criterion="doubles")
    training = Training(dense, criterion="doubles", loss=[lambda model: model.fc.weight.sum()])
    training.pruning.start(training.model, 6)
    before = {name: training.model.get_parameter(name).clone() for name in training.handle.masks}
    training.pruning.after_step(training.model, 3)
    assert 0 < training.handle.masks.sparsity < 0.7
    for name, mask in training.handle.masks.items():
        assert torch.equal(training.model.get_parameter(name), 2 * before[name] * mask), name
    training.handle.verify()
