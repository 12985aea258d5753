"""Task-specific tickets in every host's own trainer: each round is a run of it (C2)."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lth_plugins as lth
from lth_plugins.pruning.criteria import CRITERIA
from lth_plugins.pruning.search import on_host
from lth_plugins.ticket import locate
from tests.conformance.hosts import marked
from tests.conformance.trainers import TRAINERS, Training, TrainingHost

State = Mapping[str, Tensor]
HEADS_TOO = {"rounds": 2, "scope": "all"}


@dataclass(frozen=True)
class Searched:
    """A search, and what each of its runs started with: the iterations done, and the model."""

    host: TrainingHost
    folder: Path
    starts: dict[str, tuple[int, State]] = field(default_factory=dict)

    def watch(self, folder: Path, model: nn.Module, done: int) -> None:
        if folder.name not in self.starts:
            state = {name: value.clone() for name, value in model.state_dict().items()}
            self.starts[folder.name] = (done, state)

    @property
    def tickets(self) -> list[lth.Ticket]:
        return [lth.Ticket.load(path) for path in sorted(self.folder.glob("round_*.ticket"))]

    @property
    def initial(self) -> State:
        return self.host.state(self.folder / "initial.pth")

    def last(self, index: int) -> Path:
        """The last checkpoint of the run of a round."""
        folder = self.folder / f"train_{index:02d}"
        return folder / Path((folder / "last_checkpoint").read_text().strip()).name

    def trained(self, index: int) -> State:
        return self.host.state(self.last(index))


@pytest.fixture(scope="module", params=marked(TRAINERS))
def host(request: pytest.FixtureRequest) -> TrainingHost:
    return TRAINERS[request.param]


@pytest.fixture(scope="module")
def run_of(host: TrainingHost, scenes: Path, dense18_file: Path) -> Callable[..., Training]:
    """A search of runs of two iterations, as a function of its folder and what to change."""

    def make(folder: Path, **changes: Any) -> Training:
        return Training(
            **{"ticket": dense18_file, "iterations": 2, **changes}, scenes=scenes, folder=folder
        )

    return make


@pytest.fixture(scope="module")
def found(
    host: TrainingHost, run_of: Callable[..., Training], tmp_path_factory: pytest.TempPathFactory
) -> Searched:
    """A complete search of two rounds, which prunes the heads, too."""
    searched = Searched(host, tmp_path_factory.mktemp("search") / "found")
    host.search(run_of(searched.folder, search=HEADS_TOO, watch=searched.watch)).run()
    return searched


def assert_starts_from(start: State, whole: State, ticket: lth.Ticket) -> None:
    """A run started from this whole model, under the ticket's masks."""
    names = {key: name for name, key in locate(whole).keys.items()}
    assert start.keys() == whole.keys()
    for key, value in whole.items():
        mask = ticket.all_masks.get(names.get(key, key))
        expected = value if mask is None else value.masked_fill(~mask, 0)
        assert torch.equal(start[key].cpu(), expected), key


def test_each_round_starts_from_the_same_whole_state_and_prunes_what_it_trained(
    found: Searched, dense18_file: Path
) -> None:
    dense, tickets, initial = lth.Ticket.load(dense18_file), found.tickets, found.initial
    assert [t.all_masks.density for t in tickets] == pytest.approx([1, 0.8, 0.64], abs=1e-6)
    assert len({ticket.meta.source for ticket in tickets}) == 1
    assert tickets[0].meta.source not in (dense.meta.source, found.folder.name)
    for k, ticket in enumerate(tickets):
        rewound = dense.with_masks(ticket.masks, {}).sparse_weights()
        assert all(torch.equal(ticket.weights[n], value) for n, value in rewound.items())
        done, start = found.starts[f"train_{k:02d}"]
        assert done == 0
        assert_starts_from(start, initial, ticket)
        if k < 2:
            assert tickets[k + 1].all_masks == lth.prune(found.trained(k), 0.2, ticket.all_masks)


@pytest.mark.skipif(sys.platform != "linux", reason="open files are read from /proc")
def test_no_run_of_a_search_leaves_a_file_open(found: Searched) -> None:
    opened = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    assert not [name for name in opened if name.startswith(str(found.folder))]


def test_heads_are_pruned_and_predictors_are_not(found: Searched) -> None:
    last, trained = found.tickets[-1], found.trained(2)
    assert last.outside.masks
    assert not any(word in name for word in found.host.predictors for name in last.outside.masks)
    for name, mask in last.outside.masks.items():
        assert not trained[name][~mask].any() and trained[name][mask].any(), name
        assert not torch.equal(trained[name], found.starts["train_02"][1][name]), name
    final = lth.Ticket.load(found.folder / "train_02/final.ticket")
    assert final.all_masks == last.all_masks
    assert all(torch.equal(value, trained[n]) for n, value in final.outside.weights.items())


def test_a_ticket_of_a_whole_model_trains_in_a_run_of_its_own(
    found: Searched, host: TrainingHost, run_of: Callable[..., Training], tmp_path: Path
) -> None:
    """Heads are initialised after the backbone, and have the ticket's weights all the same."""
    own, last = Searched(host, tmp_path), found.tickets[-1]
    ticket = found.folder / "round_02.ticket"
    host.train(run_of(tmp_path / "run", ticket=ticket, iterations=1, watch=own.watch))
    _, start = own.starts["run"]
    assert all(torch.equal(start[n].cpu(), value) for n, value in last.outside.weights.items())
    assert lth.Ticket.load(tmp_path / "run/final.ticket").all_masks == last.all_masks


def test_a_killed_search_resumes_from_its_runs_checkpoint_to_the_same_tickets(
    found: Searched, host: TrainingHost, run_of: Callable[..., Training], tmp_path: Path
) -> None:
    resumed = Searched(host, tmp_path / "found")
    shutil.copytree(found.folder, resumed.folder, copy_function=os.link)  # rewritten files are new
    shutil.rmtree(resumed.folder / "train_01")
    (resumed.folder / "round_02.ticket").unlink()

    def kill(folder: Path, model: nn.Module, done: int) -> None:
        if (folder.name, done) == ("train_01", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        host.search(run_of(resumed.folder, search=HEADS_TOO, watch=kill)).run()
    assert not (resumed.folder / "round_02.ticket").exists()
    paths = host.search(run_of(resumed.folder, search=HEADS_TOO, watch=resumed.watch)).run()
    assert {name: done for name, (done, _) in resumed.starts.items()} == {"train_01": 1}
    for path in paths:
        assert path.read_bytes() == (found.folder / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"search": {**HEADS_TOO, "fraction": 0.3}}, r"fraction is the default there, 0\.3"),
        ({"search": {"rounds": 2}}, r"scope is all there, the default"),
        ({"search": {**HEADS_TOO, "structure.kind": "channel"}}, r"structure\.kind is the default"),
        ({"search": HEADS_TOO, "iterations": 3}, r"max_iters? is 2 there, 3"),
        ({"search": HEADS_TOO, "seed": 2}, r"seed is \d there, 2"),
    ],
)
def test_the_folder_of_another_recipe_is_refused_and_kept(
    change: dict[str, Any], message: str, found: Searched, run_of: Callable[..., Training]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in sorted(found.folder.rglob("*"))}
    with pytest.raises(lth.RunError, match=re.compile(message, re.IGNORECASE)):
        found.host.search(run_of(found.folder, **change))
    assert {path: path.stat().st_mtime_ns for path in sorted(found.folder.rglob("*"))} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"search": {"rounds": 0}}, "expected rounds of 1 or more, found 0"),
        ({"search": {"early_iter": 1}}, "none with another, found rewind 'pretrained'"),
        ({"search": {"rewind": "early"}}, "early iteration of 1 or more"),
        (
            {"search": {"rewind": "early", "early_iter": 2}},
            "early iteration below the run's 2, found 2",
        ),
        ({"search": {"structure.multiple": 8}}, r"structure\.multiple needs structure\.kind"),
        ({"search": {"structure.kind": "rows"}}, "unknown structure 'rows'"),
        ({"search": {"scope": "heads"}}, "heads"),
        ({"search": {"exclude": ("no_such_module",)}}, "by the name 'no_such_module', found none"),
        ({"choice": {"random": True}}, "found .*random True"),
        ({"options": ["frozen"]}, "keeps the BN statistics of the dense network"),
    ],
)
def test_invalid_settings_are_refused_before_anything_is_written(
    change: dict[str, Any],
    message: str,
    host: TrainingHost,
    run_of: Callable[..., Training],
    tmp_path: Path,
) -> None:
    search = {"rounds": 1, **change.get("search", {})}
    run = run_of(tmp_path / "out", **{**change, "search": search})
    with pytest.raises(lth.LthError, match=re.compile(message, re.IGNORECASE)):
        host.search(run)
    assert not (tmp_path / "out").exists()


def test_searching_and_pruning_inside_a_training_are_not_done_at_once(
    host: TrainingHost, run_of: Callable[..., Training], tmp_path: Path
) -> None:
    with pytest.raises(lth.ConfigError, match="choose one"):
        host.search(run_of(tmp_path / "out", search={"rounds": 1}, method=("rigl", {})))


def test_a_sparse_ticket_is_refused(
    host: TrainingHost, run_of: Callable[..., Training], ticket18_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(lth.TicketError, match="starts from a dense ticket, .* round_00.ticket"):
        host.search(run_of(tmp_path / "out", search={"rounds": 1}, ticket=ticket18_file))
    assert not (tmp_path / "out").exists()


def test_rewinding_to_the_initialisation_starts_from_the_hosts(
    host: TrainingHost, run_of: Callable[..., Training], dense18_file: Path, tmp_path: Path
) -> None:
    search = host.search(run_of(tmp_path / "out", search={"rounds": 1, "rewind": "init"}))
    state, name = search.host.build().state_dict(), "layer1.0.conv1.weight"
    weight = state[locate(state).keys[name]].cpu()
    assert weight.any() and not torch.equal(weight, lth.Ticket.load(dense18_file).weights[name])


def test_rewinding_to_an_early_iteration_resumes_the_hosts_checkpoint_of_it(
    host: TrainingHost, run_of: Callable[..., Training], tmp_path: Path
) -> None:
    searched = Searched(host, tmp_path / "out")
    settings = {"rounds": 1, "rewind": "early", "early_iter": 1}
    host.search(run_of(searched.folder, search=settings, watch=searched.watch)).run()
    early, (zero, one) = host.state(searched.folder / "train_00/early.pth"), searched.tickets
    done, start = searched.starts["train_01"]
    assert (searched.starts["train_00"][0], done) == (0, 1)
    assert_starts_from(start, early, one)
    assert torch.equal(zero.weights["conv1.weight"], early[locate(early).keys["conv1.weight"]])
    moved = [n for n, value in searched.initial.items() if not torch.equal(early[n], value)]
    assert any(name.endswith("weight") for name in moved)
    optimizer = host.optimizer(searched.folder / "train_00/early.pth")
    assert len(optimizer["state"]) > 0


def test_fine_tuning_goes_on_at_the_last_learning_rate(
    host: TrainingHost, run_of: Callable[..., Training], tmp_path: Path
) -> None:
    searched = Searched(host, tmp_path / "out")
    settings = {"rounds": 1, "rewind": "none"}
    run = run_of(searched.folder, search=settings, options=["decay"], watch=searched.watch)
    host.search(run).run()
    _, one = searched.tickets
    assert_starts_from(searched.starts["train_01"][1], searched.trained(0), one)
    first, second = (host.optimizer(searched.last(k))["param_groups"] for k in (0, 1))
    rates = [0.1 * group["initial_lr"] for group in first]
    assert [group["lr"] for group in first] == pytest.approx(rates)
    assert [group["lr"] for group in second] == pytest.approx(rates)


class Sensitivity:
    """Ranks by |w · ∂L/∂w| over all losses, and notes what it was given."""

    def __init__(self) -> None:
        self.given: list[tuple[State, list[float]]] = []

    def __call__(self, weights, model, loss):
        if model is None:
            raise lth.ConfigError("needs a model")
        losses = [one(model) for one in loss]
        assert [float(one(model)) for one in loss] == [float(value) for value in losses]
        self.given.append((dict(weights), [float(value) for value in losses]))
        parameters = [model.get_parameter(locate(model).keys[name]) for name in weights]
        gradients = torch.autograd.grad(sum(losses), parameters)
        return {n: (weights[n] * g).abs() for n, g in zip(weights, gradients, strict=True)}


def test_a_search_ranks_by_the_losses_of_its_own_batches_or_says_that_it_has_none(
    host: TrainingHost,
    run_of: Callable[..., Training],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    criterion = Sensitivity()
    monkeypatch.setitem(CRITERIA._values, "sensitivity", criterion)
    monkeypatch.setattr(on_host, "GRADIENTS", 4)
    run = run_of(tmp_path / "out", search={"rounds": 1, "criterion": "sensitivity"})
    if host.framework not in ("detectron2", "mmseg"):
        with pytest.raises(lth.ConfigError, match="'sensitivity' ranks weights by the gradients"):
            host.search(run)
        return
    host.search(run).run()
    searched = Searched(host, run.folder)
    ((weights, losses),) = criterion.given
    assert len(losses) > 1 and len(set(losses)) == len(losses) and min(losses) > 0
    trained = searched.trained(0)
    assert all(torch.equal(v, trained[locate(trained).keys[n]]) for n, v in weights.items())
    assert searched.tickets[1].density == pytest.approx(0.8, abs=1e-6)
