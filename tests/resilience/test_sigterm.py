"""SIGTERM lets a step end, and where several processes train, it stops all after the same one.

What tools of one process do with it is in test_kill.py.
"""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.multiprocessing import start_processes

from lth_plugins.resilience.exit_codes import EXIT_CODE
from lth_plugins.resilience.sigterm import Sigterm, Stopped, passed_on, spare_workers
from tests.reliability import test_kill
from tests.reliability.test_kill import GRACE, ROOT, assert_same, contents, params

FORK = multiprocessing.get_context("fork")
SPAWN = multiprocessing.get_context("spawn")


def nothing() -> None:
    """There is no checkpoint to save."""


@pytest.fixture
def sigterm() -> Iterator[Sigterm]:
    before = signal.getsignal(signal.SIGTERM)
    sigterm = Sigterm()
    yield sigterm
    sigterm.close()
    assert signal.getsignal(signal.SIGTERM) is before


def test_it_waits_for_a_step_and_says_what_was_saved(sigterm: Sigterm) -> None:
    sigterm.stop_if_asked(nothing)
    os.kill(os.getpid(), signal.SIGTERM)

    def save() -> str:
        os.kill(os.getpid(), signal.SIGTERM)  # again, while it saves
        return "step_7.pth"

    with pytest.raises(Stopped) as ended:
        sigterm.stop_if_asked(save)
    assert ended.value is sigterm.stopped and ended.value.saved == "step_7.pth"
    assert ended.value.code == EXIT_CODE == 143
    sigterm.end(lambda: pytest.fail("it was saved before"))


def test_it_waits_for_nothing_else_and_saves_at_the_end(sigterm: Sigterm) -> None:
    sigterm.in_step = False
    with pytest.raises(Stopped) as ended:
        os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)  # again, while it saves
    sigterm.end(lambda: "step_7.pth")
    assert ended.value is sigterm.stopped and ended.value.saved == "step_7.pth"


def test_a_training_that_fails_by_itself_saves_nothing(sigterm: Sigterm) -> None:
    os.kill(os.getpid(), signal.SIGTERM)  # in a step, which then fails
    sigterm.end(lambda: pytest.fail("the step is incomplete"))
    assert sigterm.stopped is None


def train(rank: int, store: Path, said: Any) -> None:
    distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    sigterm, steps = Sigterm(), 0
    with suppress(Stopped):
        while True:
            sigterm.stop_if_asked(nothing)
            steps += 1
            time.sleep(0.01 * rank)  # one is always ahead
            if steps == 3:
                said.put(rank)
    said.put(steps)


def test_a_signal_to_one_process_stops_both_after_the_same_step(tmp_path: Path) -> None:
    said = SPAWN.Queue()
    ranks = [SPAWN.Process(target=train, args=(rank, tmp_path / "store", said)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    assert sorted(said.get(timeout=300) for _ in ranks) == [0, 1]
    ranks[1].terminate()
    one, other = (said.get(timeout=300) for _ in ranks)
    assert one == other >= 3
    for process in ranks:
        process.join()
        assert process.exitcode == 0


def load(said: Any) -> None:
    said.put("loading")
    time.sleep(0.5)
    said.put("loaded")
    time.sleep(300)


def test_a_worker_obeys_its_parent_alone(sigterm: Sigterm) -> None:
    spare_workers(sigterm)
    said = FORK.Queue()
    worker = FORK.Process(target=load, args=(said,))
    worker.start()
    assert said.get(timeout=300) == "loading"
    subprocess.run(["kill", str(worker.pid)], check=True)
    assert said.get(timeout=300) == "loaded"
    worker.terminate()
    worker.join(timeout=30)
    assert worker.exitcode == 0


def launch(said: Any) -> None:
    with passed_on():
        start_processes(wait, (said,), nprocs=2, start_method="fork")


def wait(rank: int, said: Any) -> None:
    sigterm = Sigterm()
    said.put(rank)
    while True:
        sigterm.stop_if_asked(lambda: said.put(rank))
        time.sleep(0.01)


def test_a_process_that_only_waits_passes_it_on_and_exits_as_the_others_do() -> None:
    said = SPAWN.Queue()
    parent = SPAWN.Process(target=launch, args=(said,))
    parent.start()
    for _ in range(2):
        assert sorted(said.get(timeout=300) for _ in range(2)) == [0, 1]
        parent.terminate()  # the second time there is nothing left to tell
    parent.join()
    assert parent.exitcode == EXIT_CODE


@dataclass(frozen=True)
class Tool:
    """A tool that trains in two processes.

    Attributes:
        command: what is started, given the data and the folder of the results.
        results: reads what has to be the same, given that folder.
        saved: reads after how many of its steps a run was saved, given that folder.
        moments: what the log says when it is told to stop, first and after it has gone on.
    """

    command: Callable[[Path, Path], Sequence[str]]
    results: Callable[[Path], Mapping[str, Any]]
    saved: Callable[[Path], int]
    moments: Sequence[str]


STEPS = 60
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def find(data: Path, out: Path) -> list[str]:
    settings = f"data.size=16 data.subset={16 * STEPS // 3} batch_size=16 rounds=1"
    settings += " pretrain.epochs=3 training.epochs=1 evaluate_last=false optimizer.name=sgd"
    settings += " data.workers=2"
    settings += f" trainer.accelerator=cpu trainer.devices=2 out={out}"
    config = "configs/pretrain/digits_supervised.yaml"
    return [*TORCHRUN, "tools/find_ticket.py", config, *settings.split()]


def detect(data: Path, out: Path) -> list[str]:
    _, *options = test_kill.detect(data, out)
    settings = f"SOLVER.MAX_ITER {STEPS} SOLVER.CHECKPOINT_PERIOD {STEPS} TEST.EVAL_PERIOD {STEPS}"
    settings += " DATALOADER.NUM_WORKERS 2"
    # Of BatchNorm each process has its own statistics, and evaluates them; a checkpoint has one's.
    settings += " MODEL.RESNETS.NORM naiveSyncBN"
    several = "-m tests.reliability.det_on_cpus --num-gpus 2 --dist-url auto"
    return [*several.split(), *options, *settings.split()]


def segment(data: Path, out: Path) -> list[str]:
    tool, *options = test_kill.segment(data, out)
    settings = f"train_cfg.max_iters={STEPS} train_cfg.val_interval={STEPS} log_level=INFO"
    settings += f" default_hooks.checkpoint.interval={STEPS} default_hooks.logger.interval=10"
    settings += " train_dataloader.num_workers=2"
    # mmengine's way to start several processes wants GPUs: they join, and wrap the model, before.
    settings += (
        " model_wrapper_cfg.type=MMDistributedDataParallel model_wrapper_cfg.device_ids=None"
    )
    join = "import runpy, sys, torch; torch.distributed.init_process_group('gloo'); "
    join += "sys.argv[:1] = []; "
    join += "runpy.run_path(sys.argv[0], run_name='__main__')"
    python = [*TORCHRUN, "--no-python", sys.executable, "-c", join]
    return [*python, tool, "--launcher", "pytorch", *options, *settings.split()]


def steps_saved(out: Path) -> int:
    (saved,) = (out / "checkpoints").rglob("*.ckpt")
    steps = torch.load(saved, weights_only=False)["global_step"]
    assert steps % (STEPS // 3), "saved within an epoch"
    return steps


def iterations_saved(out: Path) -> int:
    return int(re.search(r"(\d+)\.pth$", (out / "train_00/last_checkpoint").read_text())[1])


segmentations = partial(test_kill.segmentations, steps=STEPS)
TOOLS = {
    "find": Tool(find, contents, steps_saved, ["epoch 1/3", "epoch 2/3"]),
    "det": Tool(detect, test_kill.detections, iterations_saved, ["iter: 19", "iter: 39"]),
    "seg": Tool(segment, segmentations, iterations_saved, ["[10/60]", "[40/60]"]),
}


@pytest.mark.soak
@pytest.mark.parametrize("name", params(TOOLS))
def test_a_tool_of_two_processes_stops_where_it_is_and_resumes(
    name: str, data: Path, tmp_path: Path
) -> None:
    tool, whole, out, log = TOOLS[name], *(tmp_path / n for n in ("whole", "out", "log.txt"))
    assert start(tool.command(data, whole), data, log).wait(600) == 0, log.read_text()
    before = 0
    # To the process that was started; then to all, workers of data loaders, too, as Slurm does.
    for moment, send in zip(tool.moments, (os.kill, os.killpg), strict=True):
        stopped = start(tool.command(data, out), data, log)
        deadline = time.monotonic() + 300
        while moment not in log.read_text():
            assert time.monotonic() < deadline and stopped.poll() is None, log.read_text()
            time.sleep(0.02)
        if before:
            assert tool.moments[0] not in log.read_text(), "it went on where it was saved"
        started = time.monotonic()
        send(stopped.pid, signal.SIGTERM)
        code, waited = stopped.wait(300), time.monotonic() - started
        print(f"{name} ended {waited:.1f} seconds after SIGTERM")
        assert code == (EXIT_CODE if name == "det" else 1), log.read_text()  # torchrun has its own
        assert waited < GRACE
        assert before < tool.saved(out) < STEPS
        before = tool.saved(out)
    assert start(tool.command(data, out), data, log).wait(600) == 0, log.read_text()
    # What one process of find_ticket.py had summed up goes on in the first: another rounding.
    expected = tool.results(whole)
    if metrics := expected.get("metrics.jsonl"):
        expected["metrics.jsonl"] = [pytest.approx(line) for line in metrics]
    assert_same(tool.results(out), expected)


def start(command: Sequence[str], data: Path, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, "DETECTRON2_DATASETS": str(data), "CUDA_VISIBLE_DEVICES": ""},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
