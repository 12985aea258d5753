"""The sparsity promise under everything trainers do: zeros, masks, clip norms, keys (`grid.run`).

`make test` takes a few cells, `make soak` all of them.
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest
import torch
import torchvision

import lth_plugins as lth
from tests.conformance.hosts import HOSTS
from tests.reliability import grid

DDP = [
    grid.Cell("timm", "SGD", "fp32", "clip", 2, {"static_graph": True}),
    grid.Cell("faster_rcnn_fpn", "SGD", "fp32", "clip", 2, {"find_unused_parameters": True}),
]


def params(cells: list[grid.Cell]) -> list[pytest.param]:
    """The cells, with the markers of the frameworks that they need."""
    marked = []
    for cell in cells:
        # The SyncBatchNorm that can train on a CPU is detectron2's.
        needs = {HOSTS[cell.host].framework, "detectron2" if cell.option == "SyncBN" else None}
        marks = [getattr(pytest.mark, name) for name in sorted(needs - {None})]
        marked.append(pytest.param(cell, id=str(cell), marks=marks))
    return marked


class Pair:
    """Two processes that run one cell after another, started when they are first needed."""

    def __init__(self, folder: Path, tickets: dict[str, str]) -> None:
        self._folder, self._tickets = folder, tickets
        self._process: SpawnProcess | None = None
        self._pipes: Sequence[Connection] = ()
        self._starts = 0

    def run(self, cell: grid.Cell) -> None:
        """Run a cell in both.

        Raises:
            AssertionError: with what either of them says.
        """
        if self._process is None:
            self._start()
        for pipe in self._pipes:
            pipe.send(cell)
        wrong = [self._answer(pipe) for pipe in self._pipes]
        if any(wrong):
            self._process.kill()  # one may wait for the other
            self.stop()
            pytest.fail("\n".join(f"process {rank}: {text}" for rank, text in enumerate(wrong)))

    def stop(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        if self._process is not None:
            self._process.join()
        self._process, self._pipes = None, ()

    def _start(self) -> None:
        self._starts += 1
        store = self._folder / f"store_{self._starts}"
        context = multiprocessing.get_context("spawn")
        self._pipes, theirs = zip(*(context.Pipe() for _ in range(2)), strict=True)
        self._process = context.Process(
            target=grid.answer_in_both, args=(store, self._tickets, theirs)
        )
        self._process.start()
        for pipe in theirs:
            pipe.close()

    @staticmethod
    def _answer(pipe: Connection) -> str:
        try:
            return pipe.recv()
        except EOFError:
            return "it died"


@pytest.fixture(scope="module")
def tickets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The file of an 80 % sparse ticket for each architecture."""
    folder = tmp_path_factory.mktemp("tickets")
    files = {}
    for arch in {host.arch for host in HOSTS.values()}:
        torch.manual_seed(0)
        state = torchvision.models.get_model(arch).state_dict()
        ticket = lth.Ticket(lth.prune(state, 0.8), state, lth.TicketMeta(arch, source="test"))
        files[arch] = str(ticket.save(folder / f"{arch}.ticket"))
    return files


@pytest.fixture(scope="module")
def pair(tickets: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    processes = Pair(tmp_path_factory.mktemp("pair"), tickets)
    yield processes
    processes.stop()


@pytest.fixture(scope="module")
def counted(request: pytest.FixtureRequest) -> Iterator[list[grid.Cell]]:
    """Takes the cells that hold, and says at the end how many."""
    cells: list[grid.Cell] = []
    yield cells
    reporter = request.config.pluginmanager.getplugin("terminalreporter")
    reporter.write_line(f"\ngrid: {len(cells)} of {len(grid.GRID)} cells hold")


@pytest.mark.parametrize("cell", params(grid.FEW))
def test_a_ticket_holds(cell, tickets, pair) -> None:
    hold(cell, tickets, pair)


@pytest.mark.parametrize("cell", params(DDP))
def test_a_ticket_holds_under_what_else_ddp_offers(cell, tickets, pair) -> None:
    hold(cell, tickets, pair)


@pytest.mark.soak
@pytest.mark.parametrize("cell", params(grid.GRID))
def test_a_ticket_holds_in_the_whole_grid(cell, tickets, pair, counted) -> None:
    hold(cell, tickets, pair)
    counted.append(cell)


@pytest.mark.parametrize(
    "axes",
    [
        ("host", "optimizer"),
        ("precision", "optimizer"),
        ("precision", "processes"),
        ("option", "processes"),
    ],
    ids=" x ".join,
)
def test_the_few_cells_have_every_pair_of(axes) -> None:
    met = {tuple(getattr(cell, axis) for axis in axes) for cell in grid.FEW}
    assert met == set(itertools.product(*(grid.AXES[axis] for axis in axes)))


def hold(cell: grid.Cell, tickets: dict[str, str], pair: Pair) -> None:
    if cell.processes == 2:
        pair.run(cell)
    else:
        grid.run(cell, tickets)
