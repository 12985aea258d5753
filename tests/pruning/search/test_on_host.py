"""The search for task-specific tickets on a host of plain PyTorch, alone and on two processes.

tests/detectron2 and tests/mmseg have the real hosts.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import distributed, nn

import lth_plugins as lth
from lth_plugins import Ticket, TicketError
from lth_plugins.pruning.search.on_host import Run, TaskImp, TaskSearch
from lth_plugins.pruning.structure import Refill


class PlainPyTorch:
    """Two steps of SGD on noise, which differs by process; the main one saves the model."""

    source, max_iter, state_key = "noise", 2, "model"
    recipe: Mapping[str, Any] = {"lr": 0.1}
    neck, predictors = "neck.", ("fc",)

    def __init__(self, dense: Ticket) -> None:
        self.dense = dense
        self.trained: list[tuple[str, str]] = []

    def build(self) -> nn.Module:
        torch.manual_seed(1)
        model = torchvision.models.resnet18(num_classes=4)
        lth.attach(model, self.dense)
        return model

    def train(self, run: Run) -> None:
        rank = distributed.get_rank() if distributed.is_initialized() else 0
        model = torchvision.models.resnet18(num_classes=4)
        ticket = Ticket.load(run.ticket)
        self.trained.append((run.folder.name, ticket.digest))
        lth.attach(model, ticket)
        model.load_state_dict(torch.load(run.weights, weights_only=True)["model"])
        parallel = (
            nn.parallel.DistributedDataParallel(model) if distributed.is_initialized() else model
        )
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(2):
            generator = torch.Generator().manual_seed(10 * rank + step)
            optimizer.zero_grad()
            parallel(torch.randn(2, 3, 32, 32, generator=generator)).square().mean().backward()
            optimizer.step()
        if rank == 0:
            torch.save({"model": model.state_dict()}, run.folder / "final.pth")
            (run.folder / "last_checkpoint").write_text("final.pth")

    def param_groups(self, checkpoint: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        return [{"lr": 0.0, "initial_lr": 0.1}]


@pytest.fixture(scope="module")
def dense_file(ticket18: Ticket, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dense = Ticket.dense(ticket18.weights, source="test")
    return dense.save(tmp_path_factory.mktemp("dense") / "dense.ticket")


def search(file: Path, folder: Path, **settings: Any) -> TaskSearch:
    dense = Ticket.load(file)
    return TaskSearch(PlainPyTorch(dense), dense, TaskImp(**{"rounds": 1, **settings}), folder)


def test_more_rounds_may_be_asked_for_later(dense_file: Path, tmp_path: Path) -> None:
    search(dense_file, tmp_path / "out").run()
    longer = search(dense_file, tmp_path / "out", rounds=2)
    assert len(longer.run()) == 3
    assert [folder for folder, _ in longer.host.trained] == ["train_02"]


def test_each_rounds_masks_are_refilled(dense_file: Path, tmp_path: Path) -> None:
    channels = Refill("channel", multiple=8)
    _, path = search(dense_file, tmp_path / "out", structure=channels).run()
    ticket = Ticket.load(path)
    for inner in ticket.arch.inner:
        mask = ticket.masks[f"{inner.conv}.weight"]
        kept = mask.flatten(1).any(1)
        assert kept.sum() % 8 == 0 and torch.equal(mask[kept], torch.ones_like(mask[kept]))
    with pytest.raises(TicketError, match=r"imp\.structure\.multiple is 8 there, 1 was asked for"):
        search(dense_file, tmp_path / "out", structure=Refill("channel"))


def test_a_schedule_that_ends_at_zero_cannot_be_gone_on_with(
    dense_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(TicketError, match="the last learning rate of the schedule, which is 0"):
        search(dense_file, tmp_path / "out", rewind="none").run()


def test_a_folder_of_something_else_is_refused(dense_file: Path, tmp_path: Path) -> None:
    Ticket.load(dense_file).save(tmp_path / "round_00.ticket")
    with pytest.raises(TicketError, match=r"has a round_00\.ticket but no recipe\.json"):
        search(dense_file, tmp_path)
    with pytest.raises(TicketError, match="is a file: give a folder"):
        search(dense_file, tmp_path / "round_00.ticket")


def _search_on_one_of_two(rank: int, folder: str, file: str) -> None:
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    found = search(Path(file), Path(folder) / "out")
    paths = found.run()
    seen = {"tickets": [Ticket.load(path).digest for path in paths], "trained": found.host.trained}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(seen))
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_the_same_tickets(dense_file: Path, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_search_on_one_of_two, (str(tmp_path), str(dense_file)), nprocs=2)
    main, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert main == other
    assert [folder for folder, _ in main["trained"]] == ["train_00", "train_01"]
    assert [digest for _, digest in main["trained"]] == main["tickets"]
