"""The IMP loop: what is trained, pruned and rewound, and what a folder of rounds is worth.

Training is pretended, by a function that moves real ResNet-18 weights; real training is in
tests/pretrain.
"""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch.nn.utils import prune as torch_prune

from lth_plugins import Ticket, TicketError, prune
from lth_plugins.errors import LthError, RunError
from lth_plugins.pruning.search.imp import imp, round_path
from lth_plugins.pruning.search.settings import SearchSettings
from lth_plugins.pruning.structure import Channels, Refill, structured

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def dense() -> Ticket:
    torch.manual_seed(0)
    recipe = {"seed": 0, "training": {"lr": 0.1}}
    return Ticket.dense(torchvision.models.resnet18(), source="digits", recipe=recipe)


def find(start: Ticket, train: Callable, rounds: int, folder: Path, **settings: Any) -> Iterator:
    return imp(start, train, SearchSettings(rounds=rounds, **settings), folder)


class PretendTraining:
    """Moves each kept weight by noise that depends on the round; remembers what it was given.

    Round 1 is given what is trained already, if anything is.
    """

    def __init__(self, seed: int = 0, trained: State | None = None) -> None:
        self.seed, self.trained = seed, trained
        self.given: list[Ticket] = []
        self.returned: dict[int, State] = {}

    def __call__(self, ticket: Ticket) -> State:
        k = ticket.meta.round + 1
        if k == 1 and self.trained is not None:
            return self.trained
        generator = torch.Generator().manual_seed(self.seed + k)
        trained = ticket.sparse_weights()
        for name, mask in ticket.masks.items():
            trained[name] += 0.02 * torch.randn(mask.shape, generator=generator) * mask
        self.given.append(ticket)
        self.returned[k] = trained
        return trained

    @property
    def rounds(self) -> list[int]:
        return list(self.returned)


def never(ticket: Ticket) -> State:
    raise AssertionError(
        f"round {ticket.meta.round + 1} is there already and must not be trained again"
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def run(
    dense: Ticket, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, PretendTraining, list[Ticket]]:
    folder, train = tmp_path_factory.mktemp("rounds"), PretendTraining(trained=dense.weights)
    return folder, train, list(find(dense, train, 3, folder))


def test_round_k_keeps_four_fifths_to_the_power_of_k(run) -> None:
    _, _, tickets = run
    assert [t.meta.round for t in tickets] == [0, 1, 2, 3]
    assert [t.density for t in tickets] == pytest.approx([1, 0.8, 0.64, 0.512], abs=1e-6)


def test_the_pretrained_weights_are_pruned_directly_and_only_then_is_trained(run, dense) -> None:
    _, train, tickets = run
    assert train.rounds == [2, 3]
    assert tickets[1].masks == prune(dense.weights, 0.2)


def test_each_round_trains_the_ticket_before_and_prunes_it_as_pytorch_would(run) -> None:
    _, train, tickets = run
    for k in (2, 3):
        before = tickets[k - 1]
        assert train.given[k - 2] == before
        model = torchvision.models.resnet18()
        model.load_state_dict(train.returned[k], strict=False)
        convolutions = {name: model.get_submodule(name[:-7]) for name in before.masks}
        for name, module in convolutions.items():
            torch_prune.custom_from_mask(module, "weight", before.masks[name])
        parameters = [(module, "weight") for module in convolutions.values()]
        torch_prune.global_unstructured(parameters, torch_prune.L1Unstructured, amount=0.2)
        for name, module in convolutions.items():
            assert torch.equal(tickets[k].masks[name], module.weight_mask.bool()), name


def test_everything_is_rewound_to_the_pretrained_weights(run, dense) -> None:
    _, train, tickets = run
    assert not torch.equal(
        train.returned[3]["layer1.0.conv1.weight"], dense.weights["layer1.0.conv1.weight"]
    )
    for ticket in tickets:
        for name, value in dense.weights.items():
            assert torch.equal(ticket.weights[name], value), name


def test_a_round_says_how_it_was_made(run, dense) -> None:
    folder, _, tickets = run
    stored = [Ticket.load(round_path(folder, k)) for k in range(4)]
    assert [t.digest for t in stored] == [t.digest for t in tickets]
    assert [t.meta.parent for t in stored] == [None, *(t.digest for t in stored[:3])]
    for ticket in stored:
        assert ticket.meta.source == "digits"
        assert ticket.meta.recipe == dense.meta.recipe, "all settings are the defaults"


def test_each_round_is_refilled_before_it_is_trained(dense, tmp_path: Path) -> None:
    structure, train = Channels(multiple=8), PretendTraining(trained=dense.weights)
    refill = Refill("channel", multiple=8)
    tickets = list(find(dense, train, 2, tmp_path, structure=refill))
    pruned = dense.with_masks(prune(dense.weights, 0.2), {})
    assert tickets[1].masks == structured(pruned, structure).masks
    assert train.given == [tickets[1]]
    assert tickets[2].masks.issubset(tickets[1].masks)
    assert tickets[2].meta.recipe["structure"] == {"kind": "channel", "multiple": 8}
    assert list(find(dense, never, 2, tmp_path, structure=refill)) == tickets
    with pytest.raises(LthError, match=r"structure\.kind is channel there, the default"):
        find(dense, never, 2, tmp_path)


def test_a_task_specific_ticket_trains_the_dense_network_first(dense, tmp_path: Path) -> None:
    train = PretendTraining()
    tickets = list(find(dense, train, 1, tmp_path))
    assert train.rounds == [1]
    assert train.given[0].density == 1
    assert tickets[1].masks == prune(train.returned[1], 0.2)


def test_a_training_is_gone_when_the_next_begins(
    dense: Ticket, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    gc.disable()  # which would be luck
    request.addfinalizer(gc.enable)

    class Trainer:
        """It refers to itself, as a trainer and its model do to each other."""

        def __init__(self) -> None:
            self.itself = self

    trainers: list[weakref.ref[Trainer]] = []

    def train(ticket: Ticket) -> State:
        assert [trainer() for trainer in trainers] == [None] * ticket.meta.round
        trainers.append(weakref.ref(Trainer()))
        return ticket.sparse_weights()

    assert len(list(find(dense, train, 2, tmp_path))) == 3


@pytest.mark.parametrize("allocation", ["layer", "erk"])
def test_a_round_prunes_by_its_allocation(allocation: str, dense: Ticket, tmp_path: Path) -> None:
    train = PretendTraining(trained=dense.weights)
    *_, ticket = find(dense, train, 1, tmp_path, allocation=allocation)
    assert ticket.masks == prune(dense.weights, 0.2, scope=allocation)
    assert ticket.meta.recipe["allocation"] == allocation


def test_without_a_rewind_a_round_starts_and_resumes_from_the_weights_that_were_pruned(
    dense: Ticket, tmp_path: Path
) -> None:
    train = PretendTraining(trained=dense.weights)
    *_, one, two, three = find(dense, train, 3, tmp_path, rewind="none")
    assert [ticket.digest for ticket in train.given] == [one.digest, two.digest]
    for ticket, trained in ((one, dense.weights), (two, train.returned[2])):
        assert ticket.meta.recipe["rewind"] == "none"
        assert all(torch.equal(ticket.weights[name], value) for name, value in trained.items())
    assert three.masks == prune(train.returned[3], 0.2, two.masks)

    whole = contents(tmp_path)
    round_path(tmp_path, 3).unlink()
    again = PretendTraining()
    list(find(dense, again, 3, tmp_path, rewind="none"))
    assert again.rounds == [3], "it resumes from the rounds that exist"
    assert contents(tmp_path) == whole

    round_path(tmp_path, 1).unlink()
    list(find(dense, PretendTraining(seed=9), 1, tmp_path, rewind="none"))
    with pytest.raises(RunError, match="from another round 1"):
        list(find(dense, never, 3, tmp_path, rewind="none"))


def test_a_complete_folder_is_not_computed_again(run, dense) -> None:
    folder, _, tickets = run
    before = contents(folder)
    again = find(dense, PretendTraining(trained=dense.weights), 3, folder)
    assert [t.digest for t in again] == [t.digest for t in tickets]
    assert contents(folder) == before


def test_a_stopped_run_that_is_resumed_gives_the_same_bytes(run, dense, tmp_path: Path) -> None:
    def stop_in_round_3(ticket: Ticket) -> State:
        if ticket.meta.round == 2:
            raise KeyboardInterrupt
        return PretendTraining(trained=dense.weights)(ticket)

    with pytest.raises(KeyboardInterrupt):
        list(find(dense, stop_in_round_3, 3, tmp_path))
    assert sorted(contents(tmp_path)) == [f"round_0{k}.ticket" for k in range(3)]

    train = PretendTraining()
    list(find(dense, train, 3, tmp_path))
    assert train.rounds == [3]
    assert contents(tmp_path) == contents(run[0])


@pytest.fixture
def one_round(run, tmp_path: Path) -> Path:
    for k in (0, 1):
        shutil.copy(round_path(run[0], k), tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda dense: (relabelled(dense, lr=0.2), {}), r"training\.lr is 0\.1 there, 0\.2"),
        (lambda dense: (dense, {"fraction": 0.3}), r"fraction is the default there, 0\.3"),
        (lambda dense: (moved(dense), {}), "other weights to rewind to"),
    ],
)
def test_rounds_of_another_recipe_are_refused_and_kept(
    change: Callable, message: str, dense: Ticket, one_round: Path
) -> None:
    before = contents(one_round)
    start, options = change(dense)
    with pytest.raises(RunError, match=message):
        find(start, never, 2, one_round, **options)
    assert contents(one_round) == before


def test_a_round_whose_parent_is_another_is_refused(dense: Ticket, one_round: Path) -> None:
    stray = Ticket.load(round_path(one_round, 1)).with_masks(prune(dense.weights, 0.3), {})
    stray.save(round_path(one_round, 1))
    with pytest.raises(RunError, match="from another round 0"):
        list(find(dense, never, 1, one_round))


def relabelled(dense: Ticket, lr: float) -> Ticket:
    return Ticket.dense(dense.weights, "digits", recipe={"seed": 0, "training": {"lr": lr}})


def moved(dense: Ticket) -> Ticket:
    weights = {**dense.weights, "bn1.running_mean": dense.weights["bn1.running_mean"] + 1}
    return Ticket.dense(weights, "digits", recipe=dense.meta.recipe)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": -1}, "expected rounds to be 0 or more, found -1"),
        ({"fraction": 0.0}, "between 0 and 1, found 0.0"),
        ({"fraction": 1.0}, "between 0 and 1, found 1.0"),
        ({"criterion": "size"}, "unknown criterion 'size'"),
        ({"criterion": "snip"}, "loss"),
        ({"allocation": "stage"}, "unknown allocation 'stage'; known are global, layer, erk"),
        ({"rewind": "late"}, "unknown rewind 'late'; known are pretrained, init, early"),
        ({"folder": "nowhere"}, "expected a folder for the rounds, found none"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    options: dict, message: str, dense: Ticket, tmp_path: Path
) -> None:
    settings = {"rounds": 1, **options}
    folder = tmp_path / settings.pop("folder", "")
    with pytest.raises(LthError, match=message):
        find(dense, never, folder=folder, **settings)
    assert contents(tmp_path) == {}


def test_a_sparse_start_is_refused(dense: Ticket, tmp_path: Path) -> None:
    sparse = dense.with_masks(prune(dense.weights, 0.2), {})
    with pytest.raises(TicketError, match="starts from a dense ticket"):
        find(sparse, never, 1, tmp_path)
