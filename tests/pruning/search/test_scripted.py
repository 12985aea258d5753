"""Searches in a training function of the user's own. tests/conformance has whole ones."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import lth_plugins as lth
from lth_plugins.pruning.criteria import CRITERIA
from lth_plugins.pruning.search.imp import trained_path
from lth_plugins.pruning.search.scripted import Training
from lth_plugins.resilience.exit_codes import EXIT_CODE
from lth_plugins.resilience.sigterm import Stopped
from lth_plugins.slimming.widths import adopt_widths
from tests.processes import together
from tests.pruning.search import two_processes

ITERATIONS = 4


def build() -> nn.Module:
    return torchvision.models.resnet18(num_classes=2)


def train(model: nn.Module, run: Training) -> None:
    """Trains nothing, but does what else a function does."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for done in range(run.resume(optimizer=optimizer), run.iterations):
        run.after_step(done + 1)


Searching = Callable[..., Any]


@pytest.fixture
def search(dense18_file: Path, tmp_path: Path) -> Searching:
    """A search as a function of what trains, and of settings."""
    dense = lth.Ticket.load(dense18_file)

    def make(fit: Any = train, **settings: Any) -> Any:
        asked = {"rounds": 1, "iterations": ITERATIONS, "ticket": dense, **settings}
        return lth.task_search(asked.pop("build", build), fit, out=tmp_path / "out", **asked)

    return make


def test_a_training_that_is_stopped_resumes_with_the_same_random_numbers(
    search: Searching, tmp_path: Path
) -> None:
    drawn: dict[int, list[float]] = {}

    def drawing(stop_at: int) -> Any:
        def fit(model: nn.Module, run: Training) -> None:
            for done in range(run.resume(), run.iterations):
                numbers = [float(torch.rand(1)), float(np.random.rand())]
                assert drawn.setdefault(done, numbers) == numbers
                if done + 1 == stop_at:
                    os.kill(os.getpid(), signal.SIGTERM)
                run.after_step(done + 1)

        return fit

    with pytest.raises(Stopped) as ended:
        search(drawing(2)).run()
    assert ended.value.code == EXIT_CODE and sorted(drawn) == [0, 1]
    assert ended.value.saved == tmp_path / "out/train_00/checkpoint.pth"
    assert len(search(drawing(0)).run()) == 2
    assert sorted(drawn) == [0, 1, 2, 3] and len({tuple(n) for n in drawn.values()}) == 4


def test_a_training_is_resumed_with_what_its_checkpoint_holds(search: Searching) -> None:
    def stopped(model: nn.Module, run: Training) -> None:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        run.resume(optimizer=optimizer, model=optimizer)  # whatever the names
        os.kill(os.getpid(), signal.SIGTERM)
        run.after_step(1)

    with pytest.raises(Stopped):
        search(stopped).run()
    with pytest.raises(lth.RunError, match="with optimizer, model, as the .* found optimizer: "):
        search().run()


def test_a_slimmed_model_is_searched_in_its_widths(search: Searching) -> None:
    slim = lth.slim(build(), torch.zeros(1, 3, 32, 32), flops=0.5)
    state = slim.state_dict()

    def build_slim() -> nn.Module:
        model = build()
        adopt_widths(model, state)
        model.load_state_dict(state)
        return model

    dense = lth.Ticket.dense(state)
    files = search(build=build_slim, ticket=dense, keep="trained").run()
    found = lth.Ticket.load(files[-1])
    assert found.meta.widths == dense.meta.widths and 0.19 < found.sparsity < 0.21
    trained = lth.Ticket.load(trained_path(files[-1].parent, 1))
    assert trained.masks == found.masks and trained.meta.widths == dense.meta.widths
    assert trained.meta.recipe["trained_from"] == lth.Ticket.load(files[0]).digest


def test_a_search_that_is_finished_trains_nothing(search: Searching) -> None:
    paths = search().run()
    before = [path.stat().st_mtime_ns for path in paths]
    assert search(lambda model, run: pytest.fail("it trains")).run() == paths
    assert [path.stat().st_mtime_ns for path in paths] == before


def test_a_function_that_does_not_do_its_part_is_told_what_to_call(
    search: Searching, tmp_path: Path
) -> None:
    def forgets_resume(model: nn.Module, run: Training) -> None:
        run.after_step(1)

    def ends_early(model: nn.Module, run: Training) -> None:
        run.resume()
        run.after_step(1)

    def prunes(model: nn.Module, run: Training) -> None:
        pruning = lth.SparseTraining("gradual", target=0.5, begin=0, end=1, period=1)
        pruning.start(model, run.iterations)
        pruning.after_step(model, 1)
        train(model, run)

    def detaches(model: nn.Module, run: Training) -> None:
        lth.attached(model).detach()
        train(model, run)

    for fit, message in (
        (forgets_resume, r"expected run\.resume\(…\) before the first iteration"),
        (lambda model, run: None, r"4 iterations, found 0: call run\.after_step\(done\)"),
        (ends_early, r"4 iterations, found 1: call run\.after_step\(done\)"),
        (prunes, "leaves the masks as they are, found others .* leave out gradual pruning"),
        (detaches, "leaves the masks as they are, found none"),
    ):
        with pytest.raises(lth.LthError, match=message):
            search(fit).run()
        assert not (tmp_path / "out/round_01.ticket").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations": 0}, "expected iterations of 1 or more, found 0"),
        ({"checkpoint_period": 0}, "expected checkpoint_period of 1 or more, found 0"),
        ({"round": 2}, "unknown key round in task_search"),
        (
            {"scope": "backbone+neck"},
            "needs the name that the neck's .* found none",
        ),
        ({"scope": "backbone+neck", "neck": "fpn."}, "prunes nothing outside the backbone"),
        ({"build": lambda: torchvision.models.resnet34()}, "the model's trunk is a resnet34"),
        ({"build": lambda: nn.Linear(1, 1)}, "none of them is a first block"),
    ],
)
def test_invalid_settings_are_refused_before_anything_is_written(
    settings: dict[str, Any], message: str, search: Searching, tmp_path: Path
) -> None:
    with pytest.raises(lth.LthError, match=message):
        search(**settings)
    assert not (tmp_path / "out").exists()


def test_rewinding_asks_for_what_it_needs(search: Searching, dense18_file: Path) -> None:
    def with_weights() -> nn.Module:
        model = torchvision.models.resnet18()
        lth.attach(model, lth.Ticket.load(dense18_file))
        return model

    with pytest.raises(lth.ConfigError, match=r"have build leave them out \(load_weights=False\)"):
        search(rewind="init", build=with_weights)
    with pytest.raises(lth.ConfigError, match=r"expected run\.resume\(optimizer=…\)"):
        search(lambda model, run: run.resume(), rewind="none").run()


@pytest.mark.slow
def test_two_processes_find_the_same_tickets(dense18_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first, second = together(two_processes.search, dense18_file, out)
    assert first == second and len(set(first)) == 2
    assert (out / "train_01/finished").exists()


def test_a_function_that_gives_its_losses_is_ranked_by_them(
    search: Searching, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, given = torch.randn(2, 3, 32, 32), []

    def halves(weights, model, loss):
        if model is None:
            raise lth.ConfigError("needs a model")
        given.append([float(one(model)) for one in loss])
        return {name: weight.abs() for name, weight in weights.items()}

    halves.update = lambda *_: pytest.fail(
        "a round starts from a checkpoint, which knows no update"
    )
    monkeypatch.setitem(CRITERIA._values, "halves", halves)
    losses = [lambda model: model(images).sum(), lambda model: model(images).square().sum()]
    search(criterion="halves", rewind="learning_rate", loss=losses).run()
    assert len(given) == 1 and len(given[0]) == 2
    with pytest.raises(lth.ConfigError, match="'halves' ranks weights by the gradients"):
        search(criterion="halves")
