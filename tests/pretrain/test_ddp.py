"""Two processes find what one finds: three searches on two ranks, with gloo, on a CPU.

Rounding differs between the two, and training amplifies that; in double precision it stays far
below what a mask shows. That the tool itself runs on two ranks is in test_find.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lth_plugins import Ticket

SCRIPT = Path(__file__).with_name("ddp_find.py")
SMALL = ["data.size=16", "data.subset=32", "batch_size=16", "rounds=2", "evaluate_last=false"]
SMALL += ["pretrain.epochs=1", "training.epochs=1", "contrastive.queue=32"]
SMALL += ["trainer.precision=64-true", "trainer.accelerator=cpu"]
SMALL += ["optimizer.name=sgd", "optimizer.momentum=0"]  # no state: small checkpoints

pytestmark = pytest.mark.slow


def run(out: Path, devices: int) -> str:
    done = subprocess.run(
        [sys.executable, SCRIPT, out, *SMALL, f"trainer.devices={devices}"],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one")
    run(out, devices=1)
    return out


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("two")
    return out, run(out, devices=2)


@pytest.mark.parametrize("task", ["supervised", "simclr", "moco"])
def test_two_processes_find_the_masks_of_one_and_measure_the_same(
    task: str, one: Path, two: tuple[Path, str]
) -> None:
    outs = [one / task, two[0] / task]
    for k in (1, 2):
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


def test_processes_with_different_tickets_are_stopped(two: tuple[Path, str]) -> None:
    for rank in (0, 1):
        assert f"rank {rank}: the processes have different tickets of round {rank}" in two[1]
