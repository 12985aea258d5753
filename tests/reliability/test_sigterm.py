"""SIGTERM lets a step end, and where several processes train, it stops all after the same one.

What tools do with it is in test_kill.py.
"""

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from torch import distributed

from lth_plugins.sigterm import EXIT_CODE, Sigterm

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
