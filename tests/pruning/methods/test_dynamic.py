"""RigL and SET: what they drop and grow, on hand-computed values and in a real training."""

import copy
import io
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import lth_plugins as lth
from lth_plugins import Ticket, TicketError
from lth_plugins.errors import LthError
from lth_plugins.pruning.allocation import erk
from lth_plugins.pruning.methods import METHODS, Snapshot, Update, make_method
from tests.pruning.methods import two_processes

STEPS = 8
OPTIONS: dict[str, Any] = {"sparsity": 0.9, "delta_t": 2}

WEIGHTS = torch.tensor([[1.0, -0.1, 0.0, 0.0], [0.2, -3.0, 0.0, 0.0]])
GRADIENTS = torch.tensor([[0.0, 0.5, -9.0, 0.1], [0.0, 0.0, 0.2, 0.9]])


def snapshot(step: int = 2, **changes: Any) -> Snapshot:
    masks = lth.Masks({"w": WEIGHTS != 0})
    given = {"weights": {"w": WEIGHTS}, "gradients": {"w": GRADIENTS}, "trained": frozenset("w")}
    fixed = {"masks": masks, "initial": 0.5, "model": nn.Module()}
    return Snapshot(step=step, steps=16, **{**fixed, **given, **changes})


def test_rigl_drops_the_smallest_and_grows_where_the_gradient_is_largest() -> None:
    # Half of four weights at t = 0: -0.1 and 0.2 go, -9 and 0.9 come.
    rigl = make_method("rigl", alpha=0.5)
    assert rigl.update(snapshot(step=0)).masks["w"].tolist() == [
        [True, False, True, False],
        [False, True, False, True],
    ]
    # A dropped weight grows again where its own gradient is the largest.
    back = GRADIENTS.clone()
    back[0, 1] = 10
    found = rigl.update(snapshot(step=0, gradients={"w": back})).masks["w"]
    assert found[0].tolist() == [True, True, True, False]


def test_set_grows_at_random_and_the_same_each_time() -> None:
    drawn = [make_method("set", alpha=0.5, seed=seed) for seed in (0, 0, 1, 2, 3)]
    masks = [method.update(snapshot(step=0, gradients={})).masks["w"] for method in drawn]
    assert all(m.sum() == 4 and m[0, 0] and m[1, 1] for m in masks)
    assert torch.equal(masks[0], masks[1]) and any(not torch.equal(masks[0], m) for m in masks[2:])


def test_the_fraction_falls_by_a_cosine_until_masks_stay() -> None:
    rigl = make_method("rigl", delta_t=100)
    due = [step for step in range(1, 1001) if rigl.is_due(step, 1000)]
    assert due == [100, 200, 300, 400, 500, 600, 700]
    expected = [0.15 * (1 + math.cos(math.pi * step / 750)) for step in due]
    assert [rigl.fraction(step, 1000) for step in due] == pytest.approx(expected)
    assert rigl.fraction(0, 1000) == 0.3 and rigl.fraction(750, 1000) == pytest.approx(0)


def test_frozen_layers_and_those_without_a_gradient_keep_their_masks() -> None:
    rigl, still = make_method("rigl"), WEIGHTS != 0
    for changes in ({"trained": frozenset()}, {"gradients": {}}):
        assert torch.equal(rigl.update(snapshot(step=0, **changes)).masks["w"], still)


class Training:
    """SGD with momentum on noise that differs from step to step."""

    def __init__(self, ticket: Ticket, method: str = "rigl", **options: Any) -> None:
        torch.manual_seed(1)
        self.model: nn.Module = torchvision.models.resnet18(num_classes=4)
        self.handle = lth.attach(self.model, ticket)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.01, momentum=0.9)
        self.training = lth.SparseTraining(method, **options)

    def images(self, step: int) -> Tensor:
        return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(step))

    def step(self, step: int) -> None:
        self.optimizer.zero_grad()
        self.model(self.images(step)).square().mean().backward()
        self.optimizer.step()
        self.training.after_step(self.model, step)

    def run(self, begin: int, end: int) -> None:
        self.training.start(self.model, STEPS)
        for step in range(begin + 1, end + 1):
            self.step(step)

    def save(self) -> io.BytesIO:
        buffer = io.BytesIO()
        parts = (self.model.state_dict(), self.optimizer.state_dict())
        torch.save((*parts, self.training.state_dict(self.model)), buffer)
        return buffer

    def load(self, buffer: io.BytesIO, masks_first: bool = False) -> None:
        buffer.seek(0)
        model, optimizer, training = torch.load(buffer, weights_only=True)
        if not masks_first:
            self.model.load_state_dict(model)
        self.training.load_state_dict(self.model, training)
        if masks_first:
            self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)


@pytest.fixture(scope="module")
def dense(ticket18: Ticket) -> Ticket:
    return Ticket.dense(ticket18.weights, source="test")


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_a_dense_ticket_is_trained_at_erk_densities_and_resumes_bit_for_bit(
    dense: Ticket, method: str
) -> None:
    whole = Training(dense, method, **OPTIONS)
    whole.training.start(whole.model, STEPS)
    first, densities = whole.handle.masks, []
    pruned = erk(dense.masks, 0.9)
    assert all(int((~mask).sum()) == pruned[name] for name, mask in first.items())
    saved = []
    for step in range(1, STEPS + 1):
        whole.step(step)
        densities.append(whole.handle.masks.densities())
        if step in (3, 4):
            saved.append((step, whole.save()))
    assert all(one == first.densities() for one in densities)
    assert whole.handle.masks != first
    final = whole.handle.ticket()
    assert final.meta.recipe[method]["sparsity"] == 0.9
    assert any(not torch.equal(final.weights[n], dense.weights[n]) for n in final.masks)
    for (step, buffer), masks_first in zip(saved, (True, False), strict=True):
        resumed = Training(dense, method, **OPTIONS)
        resumed.load(buffer, masks_first)
        resumed.run(step, STEPS)
        assert resumed.handle.ticket() == final


def test_a_sparse_ticket_is_trained_from_its_own_masks(ticket18: Ticket) -> None:
    training = Training(ticket18, delta_t=2)
    training.training.start(training.model, STEPS)
    assert training.handle.masks == ticket18.masks
    training.run(0, 2)
    assert training.handle.masks != ticket18.masks
    assert training.handle.masks.densities() == ticket18.masks.densities()


def test_an_update_sees_the_dense_gradient_of_all_batches_and_the_optimizer_does_not(
    dense: Ticket, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(dense, sparsity=0.9, delta_t=1)
    training.training.start(training.model, STEPS)
    model, handle = training.model, training.handle
    plain = torchvision.models.resnet18(num_classes=4)
    plain.load_state_dict(model.state_dict())
    batches = [training.images(step) for step in (1, 2)]
    for batch in batches:
        for network in (plain, model):
            network(batch).square().mean().backward()
    seen: dict[str, Tensor] = {}
    method = training.training.method
    monkeypatch.setattr(
        type(method), "update", lambda _, now: seen.update(now.gradients) or Update(now.masks)
    )
    assert all(not model.get_parameter(n).grad[~m].any() for n, m in handle.masks.items())
    training.optimizer.step()
    training.training.after_step(model, 1)
    assert seen.keys() == handle.masks.keys()
    for name, gradient in seen.items():
        assert torch.allclose(gradient, plain.get_parameter(name).grad, atol=1e-6), name


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, weight_decay=1e-2),
        lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    ],
)
def test_grown_weights_start_at_zero_without_momentum(ticket18: Ticket, make: Any) -> None:
    training = Training(ticket18)
    handle, model = training.handle, training.model
    optimizer = training.optimizer = make(list(model.parameters()))
    model(training.images(1)).square().mean().backward()
    optimizer.step()
    name = "layer1.0.conv1.weight"
    parameter, before = model.get_parameter(name), handle.masks
    for value in optimizer.state[parameter].values():  # as left from before an earlier mask
        if value.shape == parameter.shape:
            value.fill_(1.0)
    handle.replace(~before)
    grown, state = ~before[name], optimizer.state[parameter]
    tensors = [value for value in state.values() if value.shape == parameter.shape]
    assert tensors and all(not value[grown].any() and value[~grown].all() for value in tensors)
    assert not parameter.any() and handle.masks == ~before
    handle.verify()
    handle.replace(before, reset_all_momentum=True)
    assert not any(v.any() for v in tensors)
    assert not any(v.any() for v in optimizer.state[model.fc.weight].values() if v.dim() == 2)


def test_a_step_that_the_scaler_skips_postpones_the_update(ticket18: Ticket) -> None:
    training = Training(ticket18, delta_t=2)
    training.run(0, 1)
    scaler, masks = torch.amp.GradScaler("cpu", init_scale=2.0), ticket18.masks
    for step, bad in ((2, math.inf), (3, 1.0)):
        training.optimizer.zero_grad()
        loss = training.model(training.images(step)).square().mean() * bad
        scaler.scale(loss).backward()
        scaler.step(training.optimizer)
        scaler.update()
        training.training.after_step(training.model, step)
        assert (training.handle.masks == masks) == (step == 2)


def test_a_gradient_that_is_not_finite_is_refused_by_name(ticket18: Ticket) -> None:
    training = Training(ticket18, delta_t=1)
    training.training.start(training.model, STEPS)
    (training.model(training.images(1)).square().mean() * math.nan).backward()
    training.optimizer.step()
    with pytest.raises(TicketError, match=r"after 1 iterations, found others in layer1\.0\.conv1"):
        training.training.after_step(training.model, 1)
    assert training.handle.masks == ticket18.masks


@pytest.mark.parametrize(
    ("sparse", "options", "message"),
    [
        (False, {"delta_t": 2}, "expected a sparsity with a dense ticket"),
        (True, OPTIONS, "expected no sparsity with a ticket that is 0.67"),
        (False, {**OPTIONS, "delta_t": 6}, r"expected delta_t below 0.75 .* 8 iterations, found 6"),
        (False, {**OPTIONS, "sparsity": 0.9999}, "17 weights of layer1.0.conv1.weight for its 64"),
        (False, {**OPTIONS, "sparsity": 1.5}, "expected sparsity to be between 0 and 1, found 1.5"),
        (False, {**OPTIONS, "sparsity": "x"}, "expected sparsity to be between 0 and 1, found x"),
        (False, {"sparsty": 0.9}, "unknown option of method rigl 'sparsty'.* did you mean 'spars"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    dense: Ticket, ticket18: Ticket, sparse: bool, options: dict, message: str
) -> None:
    ticket = ticket18 if sparse else dense
    model = torchvision.models.resnet18(num_classes=4)
    handle = lth.attach(model, ticket)
    with pytest.raises(LthError, match=message):
        lth.SparseTraining("rigl", **options).start(model, STEPS)
    assert handle.masks == ticket.masks and handle.meta == ticket.meta


def test_two_methods_in_one_training_and_unknown_ones_are_refused(ticket18: Ticket) -> None:
    training = Training(ticket18, delta_t=1)
    training.training.start(training.model, STEPS)
    other = lth.SparseTraining("gradual", target=0.9, begin=0, end=4, period=1)
    other.start(training.model, STEPS)
    with pytest.raises(TicketError, match="the masks that rigl has set.* Choose one method"):
        training.step(1)
    with pytest.raises(LthError, match="unknown method 'rigel'.*did you mean 'rigl'"):
        lth.SparseTraining("rigel")
    assert {"gradual", "rigl", "set"} <= set(METHODS)


def test_a_checkpoint_of_another_run_is_refused(ticket18: Ticket) -> None:
    training = Training(ticket18, delta_t=2)
    training.run(0, 2)
    state = training.training.state_dict(training.model)
    longer = Training(ticket18, delta_t=2)
    longer.training.load_state_dict(longer.model, state)
    with pytest.raises(TicketError, match="in a training of 8 iterations.* found one of 9"):
        longer.training.start(longer.model, 9)
    other = Training(ticket18.shuffled(1), delta_t=2)
    with pytest.raises(TicketError, match="on another ticket, with masks"):
        other.training.load_state_dict(other.model, state)
    assert other.handle.masks == ticket18.shuffled(1).masks


def test_copies_of_a_model_carry_what_a_checkpoint_has_of_weights_that_grew(
    ticket18: Ticket,
) -> None:
    training = Training(ticket18, delta_t=2)
    training.run(0, 2)
    saved = training.save()
    resumed = Training(ticket18, delta_t=2)
    saved.seek(0)
    model, _, state = torch.load(saved, weights_only=True)
    resumed.model.load_state_dict(model)
    copied = copy.deepcopy(resumed.model)
    resumed.training.load_state_dict(copied, state)
    assert all(torch.equal(v, model[n]) for n, v in copied.state_dict().items())
    # What was trained in between is not overwritten.
    resumed.model(resumed.images(1)).sum().backward()
    before = resumed.model.layer1[0].conv1.weight.clone()
    resumed.handle.replace(training.handle.masks)
    kept = training.handle.masks["layer1.0.conv1.weight"]
    assert torch.equal(resumed.model.layer1[0].conv1.weight, before * kept)


def test_two_processes_move_the_same_masks_by_the_mean_gradient(
    dense18_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = [sys.executable, two_processes.__file__, dense18_file, out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = (Path(f"{out}.{rank}").read_text().split() for rank in (0, 1))
    assert first[:2] == second[:2]
    assert float(first[1]) == pytest.approx(0.9, abs=1e-6) and float(first[2]) < 1e-4
