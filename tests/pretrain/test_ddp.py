"""Two processes find what one finds: searches by the tool on two ranks, with gloo, on a CPU.

Rounding differs between the two, and training amplifies that; in double precision it stays far
below what a mask shows.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lth_plugins import Ticket
from tests.pretrain import ddp_find

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one")
    ddp_find.search(out, devices=1)
    return out


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder, and all that was printed."""
    out = tmp_path_factory.mktemp("two")
    command = [sys.executable, *TORCHRUN, ddp_find.__file__, out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout + done.stderr


@pytest.mark.parametrize("task", ddp_find.ROUNDS)
def test_two_processes_find_the_masks_of_one_and_measure_the_same(
    task: str, one: Path, two: tuple[Path, str]
) -> None:
    outs = [one / task, two[0] / task]
    first, second = ({path.name for path in out.iterdir()} for out in outs)
    assert first == second
    for k in range(1, ddp_find.ROUNDS[task] + 1):
        a, b = (Ticket.load(out / f"round_{k:02d}.ticket") for out in outs)
        assert a.masks == b.masks, f"round {k}"
        for name, value in a.weights.items():
            assert value.equal(b.weights[name]) or (value - b.weights[name]).abs().max() < 1e-6
    lines = [
        [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        for out in outs
    ]
    for line, other in zip(*lines, strict=True):
        assert {**other, "seconds": 0} == pytest.approx({**line, "seconds": 0}, abs=1e-6)


def test_one_of_two_processes_talks(two: tuple[Path, str]) -> None:
    assert two[1].count("round 1: ") == len(ddp_find.ROUNDS)


def test_processes_with_different_tickets_are_stopped(two: tuple[Path, str]) -> None:
    for rank in (0, 1):
        assert f"rank {rank}: the processes have different tickets of round {rank}" in two[1]
