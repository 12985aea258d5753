"""What a round is rewound to before it trains, heads and key encoders included. Real digits.

Each rewind meets a kill on a host of plain PyTorch: tests/pruning/search/test_on_host.py.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from lth_plugins import Ticket, prune
from lth_plugins.errors import ConfigError
from lth_plugins.pretrain import find as find_module
from lth_plugins.pretrain import load_config
from lth_plugins.pruning.criteria import CRITERIA
from lth_plugins.training.settings import Phase
from lth_plugins.training.supervised import Supervised
from tests.pretrain.searches import CONFIGS, State, small_search

STEPS = 2  # in an epoch
SETTINGS = ["pretrain.epochs=2", "pretrain.schedule=constant", "pretrain.warmup_epochs=0"]
SETTINGS += ["training.epochs=1", "training.schedule=constant", "training.warmup_epochs=1"]

search = partial(small_search, settings=SETTINGS)


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[State, State, Phase]]:
    """The whole state before and after each training, and how it was trained, by its name."""
    found: dict[str, tuple[State, State, Phase]] = {}
    fit = find_module.fit

    def watched(task, images, name, folder, *more):
        before = copied(task)
        metrics = fit(task, images, name, folder, *more)
        found[name] = before, copied(task), task.phase
        return metrics

    monkeypatch.setattr(find_module, "fit", watched)
    return found


def copied(task) -> State:
    return {name: value.clone() for name, value in task.state_dict().items()}


def assert_masked(state: State, whole: State, ticket: Ticket) -> None:
    """``state`` is ``whole`` with the ticket's masks on all trunks."""
    assert state.keys() == whole.keys()
    for name, value in whole.items():
        mask = ticket.masks.get(name.split("trunk.")[-1]) if "trunk." in name else None
        assert torch.equal(state[name], value if mask is None else value * mask), name


def tickets(out: Path) -> list[Ticket]:
    return [Ticket.load(path) for path in sorted(out.glob("round_*.ticket"))]


def assert_rewound(ticket: Ticket, origin: State, rewind: str) -> None:
    assert ticket.meta.recipe["rewind"] == rewind
    for name, value in ticket.sparse_weights().items():
        mask = ticket.masks.get(name, torch.ones(()))
        assert torch.equal(value, origin[f"trunk.{name}"] * mask), name


class Killed(Exception):
    pass


@pytest.mark.slow
def test_every_round_starts_from_an_early_state_also_of_a_run_that_is_killed(
    ends, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The early state is saved after step 2 of 4; a round of 2 steps follows."""
    options = ["rewind=early", "rewind_at=0.5", "checkpoint_steps=1", "rounds=1"]
    search(tmp_path / "whole", *options).run()
    _, trained, _ = ends["pretrain"]
    start = ends["round_01"][0]
    # Half of two epochs: what pre-training for one epoch ends in.
    search(tmp_path / "half", "pretrain.epochs=1", "rounds=0").run()
    origin = ends["pretrain"][1]
    found = tickets(tmp_path / "whole")
    for ticket in found:
        assert_rewound(ticket, origin, "early")
    assert_masked(start, origin, found[1])
    trunk = {n.removeprefix("trunk."): v for n, v in trained.items() if n.startswith("trunk.")}
    assert found[1].masks == prune(trunk, 0.2), "round 1 prunes what was pre-trained"

    train, taken, kills = Supervised.training_step, [], [1, 3, 5]

    def training_step(self, batch, batch_idx):
        if kills and len(taken) == kills[0]:
            kills.pop(0)
            raise Killed
        taken.append(batch_idx)
        return train(self, batch, batch_idx)

    monkeypatch.setattr(Supervised, "training_step", training_step)
    for _ in range(3):
        with pytest.raises(Killed):
            search(tmp_path / "killed", *options).run()
    search(tmp_path / "killed", *options).run()
    assert len(taken) == STEPS * 3, "no step is taken twice"
    whole, killed = (
        {p.name: p.read_bytes() for p in (tmp_path / out).iterdir() if p.is_file()}
        for out in ("whole", "killed")
    )
    assert whole.keys() == killed.keys()
    other = {"config.yaml", "metrics.jsonl"}  # these name the folder and the seconds
    assert [name for name in whole if whole[name] != killed[name] and name not in other] == []


def test_a_rewind_to_the_initialisation_takes_the_head_along(ends, tmp_path: Path) -> None:
    search(tmp_path, "rewind=init", "pretrain.epochs=1", "rounds=1").run()
    origin = ends["pretrain"][0]
    for ticket in tickets(tmp_path):
        assert_rewound(ticket, origin, "init")
    assert_masked(ends["round_01"][0], origin, tickets(tmp_path)[1])


def test_without_a_rewind_a_round_starts_from_the_last_ones_whole_state(
    ends, tmp_path: Path
) -> None:
    options = ["rewind=none", "pretrain.epochs=1"]
    search(tmp_path, *options, "rounds=2", task="moco").run()

    _, one, two = tickets(tmp_path)
    assert_masked(ends["round_01"][0], ends["pretrain"][1], one)
    assert_masked(ends["round_02"][0], ends["round_01"][1], two)
    assert (one.meta.recipe["rewind"], two.meta.recipe["rewind"]) == ("none", "none")
    assert ends["round_02"][2].warmup_epochs == 0, "it trains on at the rate that is reached"
    # More rounds start from there, too, without training round 2 again.
    ends.clear()
    search(tmp_path, *options, "rounds=3", "evaluate_last=false", task="moco").run()
    assert not ends
    assert Ticket.load(tmp_path / "round_03.ticket").meta.parent == two.digest


def test_a_run_killed_as_it_stores_its_last_round_resumes_to_all_of_it(
    ends, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["rewind=learning_rate", "rounds=1", "pretrain.epochs=1"]
    trained = tmp_path / "trained_01.safetensors"
    store, put = find_module.store, find_module.Metrics.put

    def killed_store(state: State, path: Path) -> None:
        if path == trained:
            raise Killed
        store(state, path)

    def killed_put(metrics, k: int, **values: float) -> None:
        if k == 1:
            raise Killed
        put(metrics, k, **values)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(find_module, "store", killed_store)
        search(tmp_path, *options).run()
    assert not trained.exists()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(find_module.Metrics, "put", killed_put)
        search(tmp_path, *options).run()
    stored = trained.read_bytes()
    search(tmp_path, *options).run()

    assert trained.read_bytes() == stored
    assert ends["round_01"][2].warmup_epochs == 1, "it takes the whole schedule again"
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [0, 1]
    assert not (tmp_path / "checkpoints").exists()


def test_what_a_rewind_needs_is_checked_before_training(tmp_path: Path) -> None:
    config = CONFIGS / "digits_supervised.yaml"
    for rewind in ("init", "early"):
        with pytest.raises(ConfigError, match=f"rewind={rewind} goes back to what θ_p was before"):
            load_config(config, [f"rewind={rewind}", "init=r18.pth"])
    with pytest.raises(ConfigError, match="rewind=none trains on at the last learning rate"):
        load_config(config, ["rewind=none"])


class Sensitivity:
    """Ranks by |w · ∂L/∂w| over all losses, and halves what stays; notes what it was given."""

    def __init__(self) -> None:
        self.given: list[tuple[State, list[float]]] = []

    def __call__(self, weights, model, loss):
        if model is None:
            raise ConfigError("needs a model")
        losses = [one(model) for one in loss]
        again = [float(one(model)) for one in loss]
        assert again == [float(value) for value in losses], "what is drawn is the same each time"
        self.given.append(({n: v.clone() for n, v in weights.items()}, again))
        parameters = [model.get_parameter(name) for name in weights]
        gradients = torch.autograd.grad(sum(losses), parameters)
        return {n: (weights[n] * g).abs() for n, g in zip(weights, gradients, strict=True)}

    def update(self, weights, masks, model, loss):
        return {name: weight * masks[name] / 2 for name, weight in weights.items()}


@pytest.mark.parametrize(
    ("task", "rewind"), [("supervised", "none"), ("simclr", "pretrained"), ("moco", "none")]
)
def test_a_round_is_ranked_by_the_losses_of_its_own_pre_training(
    task: str, rewind: str, ends, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    criterion = Sensitivity()
    monkeypatch.setitem(CRITERIA._values, "sensitivity", criterion)
    options = ["criterion=sensitivity", f"rewind={rewind}", "pretrain.epochs=1", "rounds=1"]
    search(tmp_path, *options, task=task).run()
    ((weights, losses),) = criterion.given
    assert len(losses) == STEPS and all(value > 0 for value in losses)
    _, trained, _ = ends["pretrain"]
    assert all(torch.equal(value, trained[f"trunk.{n}"]) for n, value in weights.items())
    ticket = tickets(tmp_path)[1]
    assert ticket.masks.density == pytest.approx(0.8, abs=1e-6)
    updated = 0.5 if rewind == "none" else 1
    for start in (ticket.sparse_weights(), ends["round_01"][0]):
        for name, mask in ticket.masks.items():
            value = start[name if name in start else f"trunk.{name}"]
            assert torch.equal(value, weights[name] * mask * updated), name
    # A resumed search does not rank again.
    search(tmp_path, *options, task=task).run()
    assert len(criterion.given) == 1


def test_a_criterion_that_takes_gradients_is_not_for_early_birds(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="criterion=cap takes gradients for each: leave out"):
        search(tmp_path, "criterion=cap", "early_bird=true", "training.epochs=9")
