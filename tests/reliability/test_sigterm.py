"""SIGTERM lets a step end, and where several processes train, it stops all after the same one.

What tools of one process do with it is in test_kill.py.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from lth_plugins.sigterm import EXIT_CODE, Sigterm
from tests.reliability.test_kill import GRACE, ROOT, assert_same, contents

FORK = multiprocessing.get_context("fork")


def test_it_waits_for_a_step_and_for_nothing_else() -> None:
    before = signal.getsignal(signal.SIGTERM)
    sigterm = Sigterm()
    try:
        sigterm.in_step = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert sigterm.heard_by_any()
        sigterm.in_step = False
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), signal.SIGTERM)
        assert ended.value.code == EXIT_CODE == 143
    finally:
        sigterm.close()
    assert signal.getsignal(signal.SIGTERM) is before


def train(rank: int, store: Path, said: Any) -> None:
    distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    sigterm, steps = Sigterm(), 0
    sigterm.in_step = True
    while not sigterm.heard_by_any():
        steps += 1
        time.sleep(0.01 * rank)  # one is always ahead
        if steps == 3:
            said.put(rank)
    said.put(steps)


def test_a_signal_to_one_process_stops_both_after_the_same_step(tmp_path: Path) -> None:
    said = FORK.Queue()
    ranks = [FORK.Process(target=train, args=(rank, tmp_path / "store", said)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    assert sorted(said.get(timeout=300) for _ in ranks) == [0, 1]
    ranks[1].terminate()
    one, other = (said.get(timeout=300) for _ in ranks)
    assert one == other >= 3
    for process in ranks:
        process.join()
        assert process.exitcode == 0


def torchrun(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a tool of two processes."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, *launch, *command], cwd=ROOT, stdout=file, stderr=file
        )


@pytest.mark.soak
def test_a_search_by_two_processes_stops_within_an_epoch_and_goes_on(tmp_path: Path) -> None:
    settings = "data.size=16 data.subset=256 batch_size=16 rounds=1 evaluate_last=false"
    settings += " pretrain.epochs=2 training.epochs=1 optimizer.name=sgd"
    settings += " trainer.accelerator=cpu trainer.devices=2"
    command = ["tools/find_ticket.py", "configs/pretrain/digits_supervised.yaml", *settings.split()]
    whole, out, log = (tmp_path / name for name in ("whole", "out", "log.txt"))
    assert torchrun([*command, f"out={whole}"], log).wait(600) == 0, log.read_text()

    stopped = torchrun([*command, f"out={out}"], log)
    deadline = time.monotonic() + 300
    while "epoch 1/2" not in log.read_text():
        assert time.monotonic() < deadline and stopped.poll() is None, log.read_text()
        time.sleep(0.05)
    time.sleep(1)  # into the next epoch
    started = time.monotonic()
    stopped.terminate()  # torchrun passes it on to both
    assert stopped.wait(300) != 0
    waited = time.monotonic() - started
    print(f"ended {waited:.1f} seconds after SIGTERM")
    assert waited < GRACE
    (saved,) = (out / "checkpoints").rglob("*.ckpt")
    assert torch.load(saved, weights_only=False)["global_step"] % 16, "saved within an epoch"

    assert torchrun([*command, f"out={out}"], log).wait(600) == 0, log.read_text()
    assert "epoch 1/2" not in log.read_text()
    found, expected = contents(out), contents(whole)
    # What one process had summed up goes on in the first: other sums, but for rounding the same.
    for line, other in zip(*(c.pop("metrics.jsonl") for c in (found, expected)), strict=True):
        assert line == pytest.approx(other)
    assert_same(found, expected)
