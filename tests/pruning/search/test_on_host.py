"""Searches on a host of plain PyTorch: rewound, resumed, and on two processes.

The other hosts have small checks of their own: tests/{pretrain,transfer,detectron2,mmseg}.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, distributed, nn

import lth_plugins as lth
from lth_plugins import Ticket, prune
from lth_plugins.errors import LthError
from lth_plugins.pruning.search.imp import round_path
from lth_plugins.pruning.search.on_host import CheckpointHost
from lth_plugins.pruning.search.search import Run, Search
from lth_plugins.pruning.search.settings import TaskSettings
from lth_plugins.pruning.structure import Refill
from tests.processes import together

STEPS = 2


class Killed(Exception):
    pass


class PlainPyTorch(CheckpointHost):
    """Two steps of SGD on noise, which differs by process; the main one saves after each step."""

    state_key, neck, predictors = "model", "neck.", ("fc",)

    def __init__(self, dense: Ticket, settings: TaskSettings, folder: Path, lr: float) -> None:
        self.lr = lr
        self.starts: dict[int, dict[str, Tensor]] = {}
        self.steps: list[tuple[int, int]] = []
        self.kill_at: tuple[int, int] | None = None
        super().__init__(dense, settings, folder, "noise", STEPS, {"lr": lr})

    def build(self) -> nn.Module:
        torch.manual_seed(1)
        model = torchvision.models.resnet18(num_classes=4)
        lth.attach(model, self.dense, load_weights=self.settings.rewind != "init")
        return model

    def fit(self, folder: Path, weights: Path, run: Run, lr_scale: float | None) -> None:
        rank = distributed.get_rank() if distributed.is_initialized() else 0
        model = torchvision.models.resnet18(num_classes=4)
        ticket = self.ticket_path(run)
        lth.attach(model, self.dense if ticket is None else Ticket.load(ticket))
        note = folder / "last_checkpoint"
        resumed = note.exists()
        path = folder / note.read_text() if resumed else weights
        checkpoint = torch.load(path, weights_only=True)
        model.load_state_dict(checkpoint["model"])
        self.starts[run.index] = {name: v.clone() for name, v in model.state_dict().items()}
        parallel = (
            nn.parallel.DistributedDataParallel(model) if distributed.is_initialized() else model
        )
        optimizer = torch.optim.SGD(model.parameters(), self.lr * (lr_scale or 1))
        for step in range(checkpoint["step"] if resumed else 0, STEPS):
            if self.kill_at == (run.index, step):
                raise Killed
            self.steps.append((run.index, step))
            generator = torch.Generator().manual_seed(10 * rank + step)
            optimizer.zero_grad()
            parallel(torch.randn(2, 3, 32, 32, generator=generator)).square().mean().backward()
            optimizer.step()
            if rank == 0:
                saved = {"model": model.state_dict(), "step": step + 1}
                torch.save(saved, folder / f"{step + 1}.pth")
                note.write_text(f"{step + 1}.pth")
                if run.keep_early and step + 1 == self.settings.early_iter:
                    torch.save(saved, folder / "early.pth")

    def param_groups(self, checkpoint: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        return [{"lr": 0.02 * (self.lr > 0.05), "initial_lr": 0.1}]


@pytest.fixture(scope="module")
def dense_file(ticket18: Ticket, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dense = Ticket.dense(ticket18.weights, source="test")
    return dense.save(tmp_path_factory.mktemp("dense") / "dense.ticket")


def search(file: Path, folder: Path, lr: float = 0.1, **given: Any) -> Search:
    settings = TaskSettings(**{"rounds": 2, **given})
    settings.check()
    return Search(PlainPyTorch(Ticket.load(file), settings, folder, lr), settings)


def saved(folder: Path, k: int, name: str = f"{STEPS}.pth") -> dict[str, Tensor]:
    return torch.load(folder / f"train_{k:02d}" / name, weights_only=True)["model"]


REWINDS = {"early": {"early_iter": 1}, "init": {}, "none": {}}


@pytest.mark.parametrize("rewind", REWINDS)
def test_each_round_starts_from_what_it_is_rewound_to_and_resumes_there(
    rewind: str, dense_file: Path, tmp_path: Path
) -> None:
    folder, options = tmp_path / "out", {"rewind": rewind, **REWINDS[rewind]}
    killed = search(dense_file, folder, **options)
    killed.host.kill_at = (1, 1)
    with pytest.raises(Killed):
        killed.run()
    found = search(dense_file, folder, **options)
    tickets = [Ticket.load(path) for path in found.run()]

    assert killed.host.steps[-1:] + found.host.steps == [
        *([] if rewind == "early" else [(1, 0)]), *([(0, 1)] if rewind == "early" else []),
        (1, 1), *((2, step) for step in range(int(rewind == "early"), STEPS)),
    ], "no step is taken twice"  # fmt: skip
    initial = torch.load(folder / "initial.pth", weights_only=True)["model"]
    for k in (1, 2):
        origin = initial if rewind == "init" else saved(folder, k - 1)
        if rewind == "early":
            origin = saved(folder, 0, "early.pth")
        start = (killed if k == 1 and rewind != "early" else found).host.starts[k]
        for name, value in origin.items():
            mask = tickets[k].masks.get(name, torch.ones((), dtype=torch.bool))
            assert torch.equal(start[name], value * mask), name
        assert tickets[k].masks == prune(saved(folder, k - 1), 0.2, tickets[k - 1].masks)
        assert tickets[k].meta.recipe["rewind"] == rewind
    pretrained = Ticket.load(dense_file).weights["conv1.weight"]
    assert torch.equal(initial["conv1.weight"], pretrained) == (rewind != "init")


def test_more_rounds_may_be_asked_for_later(dense_file: Path, tmp_path: Path) -> None:
    search(dense_file, tmp_path / "out", rounds=1).run()
    longer = search(dense_file, tmp_path / "out")
    assert len(longer.run()) == 3
    assert [index for index, _ in longer.host.steps] == [2, 2]
    again = search(dense_file, tmp_path / "out")
    assert len(again.run()) == 3 and not again.host.steps
    for options, message in (
        ({"fraction": 0.3}, r"fraction is the default there, 0\.3 was asked for"),
        ({"scope": "all", "exclude": ()}, "exclude is the default there"),
        ({"lr": 0.2}, r"config\.lr is 0\.1 there, 0\.2 was asked for"),
    ):
        with pytest.raises(LthError, match=message):
            search(dense_file, tmp_path / "out", **options)


def test_each_rounds_masks_are_refilled(dense_file: Path, tmp_path: Path) -> None:
    channels = Refill("channel", multiple=8)
    _, path = search(dense_file, tmp_path / "out", rounds=1, structure=channels).run()
    ticket = Ticket.load(path)
    for inner in ticket.arch.inner:
        mask = ticket.masks[f"{inner.conv}.weight"]
        kept = mask.flatten(1).any(1)
        assert kept.sum() % 8 == 0 and torch.equal(mask[kept], torch.ones_like(mask[kept]))
    with pytest.raises(LthError, match=r"structure\.multiple is 8 there, the default was asked"):
        search(dense_file, tmp_path / "out", structure=Refill("channel"))


def test_a_schedule_that_ends_at_zero_cannot_be_resumed_from(
    dense_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(LthError, match="the last learning rate of the schedule, which is 0"):
        search(dense_file, tmp_path / "out", lr=0.01, rewind="none").run()


def test_a_folder_of_something_else_is_refused(dense_file: Path, tmp_path: Path) -> None:
    Ticket.load(dense_file).save(round_path(tmp_path, 0))
    with pytest.raises(LthError, match=r"has a round_00\.ticket but no recipe\.json"):
        search(dense_file, tmp_path)
    with pytest.raises(LthError, match="is a file: give a folder"):
        search(dense_file, round_path(tmp_path, 0))


def _search(rank: int, folder: Path, file: Path) -> dict[str, Any]:
    found = search(file, folder / "out", rounds=1)
    return {
        "tickets": [Ticket.load(path).digest for path in found.run()],
        "steps": found.host.steps,
    }


@pytest.mark.slow
def test_two_processes_train_the_same_tickets(dense_file: Path, tmp_path: Path) -> None:
    main, other = together(_search, tmp_path, dense_file)
    assert main == other
    assert main["steps"] == [(k, step) for k in (0, 1) for step in range(STEPS)]
