"""What a host without a trainer of its own does in the user's loop: prune, search and slim."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import lth_plugins as lth
from lth_plugins.pruning.search.scripted import Training
from tests.conformance.hosts import ALL, Host, marked

LOOPS = {name: ALL[name] for name in ("timm", "smp")}


@pytest.fixture(params=marked(LOOPS))
def host(request: pytest.FixtureRequest) -> Host:
    return ALL[request.param]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=0.1)


def step(host: Host, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    host.loss(model.train()).backward()
    optimizer.step()


def test_a_ticket_is_pruned_while_it_trains(host: Host, dense18_file: Path) -> None:
    model = host.build(str(dense18_file))
    pruning = lth.SparseTraining("gradual", target=0.9, begin=0, end=2, period=1)
    optimizer = optimizer_of(model)
    pruning.start(model, 2)
    for done in (1, 2):
        step(host, model, optimizer)
        pruning.after_step(model, done)
    step(host, model, optimizer)
    handle = lth.attached(model)
    handle.verify()
    assert handle.masks.sparsity == pytest.approx(0.9, abs=1e-6)


def test_a_search_finds_tickets_of_what_it_trained(
    host: Host, dense18_file: Path, tmp_path: Path
) -> None:
    def fit(model: nn.Module, run: Training) -> None:
        optimizer = optimizer_of(model)
        for done in range(run.resume(optimizer=optimizer), run.iterations):
            step(host, model, optimizer)
            run.after_step(done + 1)

    def build() -> nn.Module:
        return host.build(str(dense18_file))

    search = lth.task_search(build, fit, dense18_file, tmp_path, iterations=1, rounds=1)
    dense, pruned = (lth.Ticket.load(path) for path in search.run())
    trained = torch.load(tmp_path / "train_00/checkpoint.pth", weights_only=True)["model"]
    assert pruned.masks == lth.prune(trained, 0.2)
    assert all(torch.equal(v, dense.weights[n]) for n, v in pruned.weights.items() if "bn" in n)


def test_a_sparse_model_is_slimmed_and_trained_on(host: Host, ticket18_file: Path) -> None:
    model = host.build(str(ticket18_file)).eval()
    small = lth.slim(model, torch.rand(1, 3, 64, 64), flops=0.6)
    assert list(small.state_dict()) == list(model.state_dict())
    sizes = [sum(p.numel() for p in one.parameters()) for one in (small, model)]
    assert sizes[0] < 0.8 * sizes[1]
    step(host, small, optimizer_of(small))
    lth.attached(small).verify()
