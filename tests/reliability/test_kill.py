"""Each tool is started for real, killed, and started again: it ends as if it had not been.

Kills come at the worst moments, by the name of a function that is called then, and in the soak at
random ones. What is compared is all that a run leaves but times: tickets, weights, optimizers,
metrics and predictions, bit for bit, on one thread of a CPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import lth_plugins as lth
from lth_plugins.resilience.lock import LOCK, is_locked, output_folder
from lth_plugins.study.plan.metrics import detectron2_metrics, mmengine_metrics
from tests.reliability.starter import Start, Starter

ROOT = Path(__file__).resolve().parents[2]
KILLS = 50
GRACE = 30
"""Seconds from SIGTERM to SIGKILL, if Slurm is not configured otherwise (its KillWait)."""


def killed(function: str, text: str = "", soak: bool = False) -> Start:
    return Start(function, text, soak=soak)


def told_to_stop(function: str, soak: bool = False) -> Start:
    return Start(function, signum=signal.SIGTERM, soak=soak)


def in_a_prune(soak: bool = False) -> Start:
    return killed("lth_plugins.pruning.search.imp.prune", soak=soak)


def in_a_ticket(soak: bool = False) -> Start:
    return killed("os.replace", "round_01.ticket", soak)


def full_disk(soak: bool = False) -> Start:
    return Start(limit=1 << 20, soak=soak)


@dataclass(frozen=True)
class Tool:
    """A tool, and what is done to it.

    Attributes:
        command: makes a command that leaves its results in a folder.
        results: reads all that has to be the same, without times.
        starts: its starts but the last, which nothing ends.
    """

    command: Callable[[Path, Path], Sequence[str]]
    results: Callable[[Path], Mapping[str, Any]]
    starts: Sequence[Start]


def find(data: Path, out: Path) -> list[str]:
    settings = "data.size=16 data.subset=64 batch_size=16 rounds=2 checkpoint_steps=2"
    settings += " pretrain.epochs=2 training.epochs=1 evaluate_last=false optimizer.name=sgd"
    config = "configs/pretrain/digits_supervised.yaml"
    return ["tools/find_ticket.py", config, f"out={out}", *settings.split()]


def classify(data: Path, out: Path) -> list[str]:
    settings = "data.size=16 data.subset=32 batch_size=16 rounds=1 checkpoint_steps=1"
    settings += " training.epochs=2 training.milestones=[]"
    config, ticket = "configs/transfer/digits_r18.yaml", f"ticket={data}/dense.ticket"
    return ["tools/train_cls.py", config, ticket, f"out={out}", *settings.split()]


def detect(data: Path, out: Path) -> list[str]:
    from tests.detectron2.conftest import TINY, as_options

    settings = {
        **{key: value for key, value in TINY.items() if key.startswith("MODEL.")},
        "MODEL.TICKET.PATH": data / "dense.ticket",
        "INPUT.MIN_SIZE_TRAIN": (56, 64),
        "INPUT.MIN_SIZE_TEST": 64,
        "INPUT.RANDOM_FLIP": "horizontal",
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.MAX_ITER": 4,
        "SOLVER.STEPS": (2,),
        "SOLVER.WARMUP_ITERS": 0,
        "SOLVER.CHECKPOINT_PERIOD": 2,
        "TEST.EVAL_PERIOD": 2,
        "OUTPUT_DIR": out,
    }
    config = "configs/detectron2/digits/faster_rcnn_R_18_FPN_ticket.yaml"
    command = ["tools/train_det.py", "--config-file", config, "--imp-rounds", "1"]
    return [*command, *as_options(settings)]


def segment(data: Path, out: Path) -> list[str]:
    settings = {
        **{f"{s}_dataloader.dataset.data_root": data / "digit_scenes" for s in ("train", "val")},
        "train_dataloader.batch_size": 2,
        "model.decode_head.dropout_ratio": 0.5,
        "train_cfg.max_iters": 4,
        "train_cfg.val_interval": 2,
        "default_hooks.checkpoint.interval": 2,
        "log_level": "WARNING",
    }
    config, ticket = "configs/mmseg/digits/fcn_r18_ticket.py", f"{data}/dense.ticket"
    options = [f"{name}={value}" for name, value in settings.items()]
    command = ["tools/train_seg.py", config, "--ticket", ticket, "--work-dir", f"{out}"]
    return [*command, "--imp-rounds", "1", "--cfg-options", *options]


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def plain(value: Any) -> Any:
    """A nested value with the digests of its tensors in their places."""
    if isinstance(value, torch.Tensor):
        return digest(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value


def timeless(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if "seconds" not in k and "time" not in k}


def contents(folder: Path) -> dict[str, Any]:
    """The files that find_ticket.py and train_cls.py leave: digests, or without their times."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix in (".json", ".jsonl"):
            lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            found[name] = [timeless(json.loads(line)) for line in lines]
        elif path.name != LOCK and "logs/" not in name and path.suffix != ".yaml":
            found[name] = digest(path.read_bytes())
    return found


def checkpoint(path: Path, *keys: str) -> Any:
    loaded = torch.load(path, map_location="cpu", weights_only=False)
    return plain([loaded[key] for key in keys])


def tickets(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): digest(p.read_bytes()) for p in folder.rglob("*.ticket")}


BOXES = ("bbox/AP", "bbox/AP50")


def detections(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = dict(tickets(folder))
    for run in sorted(folder.glob("train_*")):
        found[f"{run.name} ends in"] = checkpoint(run / "model_final.pth", "model", "trainer")
        boxes = (run / "inference/coco_instances_results.json").read_text()
        found[f"{run.name} measured"] = [
            boxes,
            *(str(detectron2_metrics(run)[f"bbox/{k}"]) for k in ("AP", "AP50")),
        ]
    return found


def segmentations(folder: Path, steps: int = 4) -> dict[str, Any]:
    found: dict[str, Any] = dict(tickets(folder))
    for run in sorted(folder.glob("train_*")):
        keys = ("state_dict", "optimizer", "param_schedulers")
        found[f"{run.name} ends in"] = checkpoint(run / f"iter_{steps}.pth", *keys)
        found[f"{run.name} measured"] = timeless(mmengine_metrics(run))
    return found


SUPERVISED = "lth_plugins.training.supervised.Supervised"
COCO = "detectron2.evaluation.coco_evaluation.COCOEvaluator"
IOU = "mmseg.evaluation.metrics.iou_metric.IoUMetric"

# Which start is left to the soak: each kind of moment that the tools share meets one of them in the
# suite, and each tool a SIGTERM or a kill in what is its own.
TOOLS = {
    "find": Tool(
        find,
        contents,
        [
            killed(f"{SUPERVISED}.validation_step", soak=True),
            told_to_stop(f"{SUPERVISED}.training_step"),
            in_a_prune(soak=True),
            in_a_ticket(),
            full_disk(),
            killed(
                "lth_plugins.pretrain.find.delete_checkpoints", "round_01"
            ),  # a ticket, and its checkpoint
        ],
    ),
    "cls": Tool(
        classify,
        contents,
        [
            killed(f"{SUPERVISED}.validation_step", soak=True),
            told_to_stop(f"{SUPERVISED}.training_step", soak=True),
            in_a_prune(),
            in_a_ticket(soak=True),
            full_disk(soak=True),
            killed("os.replace", "result.json", soak=True),
            killed(
                "lth_plugins.transfer.run.delete_checkpoints"
            ),  # the result is there, and its checkpoint
        ],
    ),
    "det": Tool(
        detect,
        detections,
        [
            killed(f"{COCO}.process", soak=True),
            told_to_stop("detectron2.engine.train_loop.SimpleTrainer.run_step"),
            in_a_prune(soak=True),
            in_a_ticket(soak=True),
            full_disk(soak=True),
            killed("os.replace", "last_checkpoint", soak=True),  # of a checkpoint that is there
            told_to_stop(f"{COCO}.process", soak=True),
            killed("os.replace", "model_final.pth"),  # the last but one is of the same iteration
            killed(f"{COCO}.evaluate", soak=True),
        ],
    ),
    "seg": Tool(
        segment,
        segmentations,
        [
            killed(f"{IOU}.process", soak=True),
            told_to_stop("mmengine.optim.OptimWrapper.update_params"),
            in_a_prune(soak=True),
            in_a_ticket(soak=True),
            full_disk(soak=True),
            killed("mmengine.runner.runner.save_checkpoint", soak=True),
            told_to_stop(f"{IOU}.process", soak=True),
            killed(f"{IOU}.compute_metrics"),
        ],
    ),
}


def params(names: Iterable[str]) -> list[Any]:
    """Names of tools, with the markers of the frameworks that they need."""
    needs = {"det": pytest.mark.detectron2, "seg": pytest.mark.mmseg}
    return [pytest.param(name, marks=needs.get(name, ())) for name in names]


EACH = params(TOOLS)


@pytest.fixture(scope="module")
def data(starter: Starter, _resnet18_weights: dict[str, torch.Tensor]) -> Path:
    """A folder with ``dense.ticket``, and digit scenes in ``digit_scenes``.

    Wide and high scenes: detectron2 does not put both into a batch.
    """
    folder = starter.folder
    lth.Ticket.dense(_resnet18_weights, source="test").save(folder / "dense.ticket")
    scenes = f"--out {folder}/digit_scenes --train 7 --test 2 --min-size 64 --max-size 96"
    assert starter.run(["tools/make_digit_scenes.py", *scenes.split()]) == 0, starter.said()
    return folder


@dataclass(frozen=True)
class Whole:
    """A run that nothing happened to."""

    folder: Path
    seconds: float
    results: Mapping[str, Any]


@pytest.fixture(scope="module")
def whole(
    data: Path, starter: Starter, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Whole]:
    runs: dict[str, Whole] = {}

    def of(name: str) -> Whole:
        if name not in runs:
            folder, tool = tmp_path_factory.mktemp(name) / "whole", TOOLS[name]
            started = time.monotonic()
            assert starter.run(tool.command(data, folder)) == 0, starter.said()
            runs[name] = Whole(folder, time.monotonic() - started, tool.results(folder))
        return runs[name]

    return of


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_a_tool_that_is_stopped_again_and_again_ends_as_one_that_was_not(
    name: str, data: Path, starter: Starter, whole: Callable[[str], Whole], tmp_path: Path
) -> None:
    tool, out = TOOLS[name], tmp_path / "out"
    starts = [start for start in tool.starts if not start.soak]
    stop_and_go(tool.command(data, out), starts, starter, out)
    assert_same(tool.results(out), whole(name).results)


@pytest.mark.soak
@pytest.mark.parametrize("name", EACH)
def test_a_tool_that_is_stopped_at_every_moment_ends_as_one_that_was_not(
    name: str, data: Path, starter: Starter, whole: Callable[[str], Whole], tmp_path: Path
) -> None:
    tool, out = TOOLS[name], tmp_path / "out"
    stop_and_go(tool.command(data, out), tool.starts, starter, out)
    assert_same(tool.results(out), whole(name).results)


def stop_and_go(
    command: Sequence[str], starts: Sequence[Start], starter: Starter, out: Path
) -> None:
    for start in starts:
        before, code = tickets(out), starter.run(command, start)
        if start.limit:
            assert code in (1, 2), starter.said()
            assert re.search(r"File too large.*(make room|free space)", starter.said())
            assert before and tickets(out) == before
        else:
            assert code == {signal.SIGTERM: 143}.get(start.signum, -start.signum), starter.said()
    assert starter.run(command) == 0, starter.said()
    assert not [path for path in out.rglob(".*") if path.name != LOCK], "nothing is left behind"


@contextlib.contextmanager
def disk(folder: Path) -> Iterator[Callable[[int], None]]:
    """A disk of its own, to be given a size in bytes."""

    def resize(size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)

    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True)
    try:
        yield resize
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.soak
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a disk")
@pytest.mark.parametrize("name", EACH)
def test_a_tool_on_a_disk_that_is_full_again_and_again_ends_as_one_with_room(
    name: str, data: Path, starter: Starter, whole: Callable[[str], Whole], tmp_path: Path
) -> None:
    tool, expected = TOOLS[name], whole(name)
    needed = sum(path.stat().st_size for path in expected.folder.rglob("*") if path.is_file())
    with disk(tmp_path / "disk") as resize:
        out, before = tmp_path / "disk/out", {}
        for tenths in (1, 3, 5, 8):
            resize(needed * tenths // 10)
            code = starter.run(tool.command(data, out))
            assert code in (1, 2), starter.said()
            assert re.search("No space left.*(make room|free space)", starter.said())
            assert before.items() <= tickets(out).items(), "what was complete stays"
            before = tickets(out)
        resize(4 * needed)
        assert starter.run(tool.command(data, out)) == 0, starter.said()
        assert_same(tool.results(out), expected.results)


@pytest.mark.parametrize("name", EACH)
def test_a_second_process_on_a_folder_is_refused_and_changes_nothing(
    name: str, data: Path, starter: Starter, whole: Callable[[str], Whole]
) -> None:
    tool, folder = TOOLS[name], whole(name).folder
    with output_folder(folder):
        assert starter.run(tool.command(data, folder)) in (1, 2)
    assert f"still works there (process {os.getpid()} on" in starter.said()
    assert_same(tool.results(folder), whole(name).results)


STEPS = """
import sys
from pathlib import Path
from lth_plugins.resilience.lock import locked
from lth_plugins.study.run.steps import Step, attempt, read_marker
folder = Path(sys.argv[1])
script = folder.parent / "append.py"
with locked(folder / ".lock") as lock:
    for n in "ab":
        step = Step(n, n, (str(script), str(folder / n)), (script,), (folder / n,))
        if "seconds" not in read_marker(folder, n):
            attempt(step, folder, lock)
"""


def test_a_study_that_is_killed_while_it_notes_what_is_done_does_it_once_more(
    starter: Starter, tmp_path: Path
) -> None:
    (tmp_path / "append.py").write_text("import sys; open(sys.argv[1], 'w').write('done')")
    (tmp_path / "steps.py").write_text(STEPS)
    out = tmp_path / "study"
    for step in "ab":
        command = [str(tmp_path / "steps.py"), str(out)]
        assert starter.run(command, killed("os.replace", f"{step}.json")) == -signal.SIGKILL, (
            starter.said()
        )
        # The other step, left behind, holds the lock until it ends; meanwhile a run is refused.
        deadline = time.monotonic() + 60
        while is_locked(out / LOCK):
            assert time.monotonic() < deadline, "a step never ended"
            time.sleep(0.05)
    assert starter.run(command) == 0, starter.said()
    for step in "ab":
        assert json.loads((out / "steps" / f"{step}.json").read_text())["seconds"] > 0
        assert (out / step).read_text() == "done"


@pytest.mark.soak
@pytest.mark.parametrize("name", EACH)
def test_fifty_kills_at_random_moments(
    name: str,
    data: Path,
    starter: Starter,
    whole: Callable[[str], Whole],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    tool, out, draw = TOOLS[name], tmp_path / "out", random.Random(name)
    command, kills, ends = tool.command(data, out), 0, 0
    while kills < KILLS or out.exists():
        last = kills >= KILLS
        after = None if last else draw.uniform(0, whole(name).seconds)
        code = starter.run(command, kill_after=after)
        if code == -signal.SIGKILL:
            kills += 1
            continue
        assert code == 0, f"after {kills} kills:\n{starter.said()}"
        assert_same(tool.results(out), whole(name).results)
        ends += 1
        shutil.rmtree(out)
    with capfd.disabled():
        print(f"\n{name}: {kills} kills survived; {ends} runs ended as one that was not killed")
