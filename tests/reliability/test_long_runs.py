"""Two thousand steps with rounds of IMP inside: memory, open files and logs stay where they were.

The tools run as a user starts them, on the smallest of what they train. Linux only: `long_run.py`
asks /proc.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROUNDS = 4
STEPS = 400  # of each of the five trainings

# Bounds, and what they bound: from the second training to the last one.
MEMORY = 64 * 2**20  # bytes of resident memory, at its highest within the training
FILES = 4  # open at once
LOGS = 1.5 * 2**20  # bytes of everything a run writes that is no checkpoint and no ticket
PRINTED = 300 * 2**10  # bytes, of which these are the terminal's

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(sys.platform != "linux", reason="what a process holds is read from /proc"),
]


def classification(data: Path, out: Path) -> list[str]:
    command = ["tools/train_cls.py", "configs/transfer/digits_r18.yaml"]
    command += ["--ticket", f"{data}/dense.ticket"]
    settings = [f"out={out}", f"rounds={ROUNDS}", "trainer.accelerator=cpu", "stem=small"]
    settings += ["batch_size=16", "data.size=8", f"data.subset={16 * STEPS // 5}"]
    return [*command, *settings, "training.epochs=5"]


def segmentation(data: Path, out: Path) -> list[str]:
    command = ["tools/train_seg.py", "configs/mmseg/digits/fcn_r18_ticket.py"]
    command += ["--ticket", f"{data}/dense.ticket", "--work-dir", str(out)]
    command += ["--imp-rounds", str(ROUNDS)]
    scenes, size = data / "digit_scenes", "(32,32)"
    options = {
        "model.data_preprocessor.size": size,
        **{f"{split}_dataloader.dataset.data_root": scenes for split in ("train", "val", "test")},
        "train_dataloader.dataset.pipeline.2.crop_size": size,
        "train_dataloader.batch_size": 2,
        "train_cfg.max_iters": STEPS,
        "train_cfg.val_interval": STEPS // 2,
        "default_hooks.checkpoint.interval": STEPS // 4,
    }
    return [*command, "--cfg-options", *(f"{key}={value}" for key, value in options.items())]


def detection(data: Path, out: Path) -> list[str]:
    config = "configs/detectron2/digits/faster_rcnn_R_18_FPN_ticket.yaml"
    command = ["tools/train_det.py", "--config-file", config, "--imp-rounds", str(ROUNDS)]
    options = {
        "MODEL.TICKET.PATH": data / "dense.ticket",
        "OUTPUT_DIR": out,
        "INPUT.MIN_SIZE_TRAIN": "(64,)",
        "INPUT.MIN_SIZE_TEST": 64,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.MAX_ITER": STEPS,
        "SOLVER.CHECKPOINT_PERIOD": STEPS // 4,
        "TEST.EVAL_PERIOD": STEPS // 2,
    }
    return [*command, *(str(item) for pair in options.items() for item in pair)]


@pytest.mark.parametrize(
    "command",
    [
        classification,
        pytest.param(segmentation, marks=pytest.mark.mmseg),
        pytest.param(detection, marks=pytest.mark.detectron2),
    ],
)
def test_nothing_grows_from_round_to_round(
    command, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    notes = tmp_path / "notes.jsonl"
    printed = run(notes, command(data, out), data)

    held = [json.loads(line) for line in notes.read_text().splitlines()]
    assert held[-1]["step"] == (ROUNDS + 1) * STEPS
    assert len(list(out.glob("round_*.ticket"))) == ROUNDS + 1
    second, last = (most(held, training) for training in (1, ROUNDS))
    grown = {key: last[key] - second[key] for key in second}
    logs = sum(path.stat().st_size for path in out.rglob("*") if is_log(path))
    with capsys.disabled():
        print(
            f"\n{command.__name__}: {held[-1]['step']} steps",
            f"memory {second['memory'] / 2**20:.0f} MiB, {grown['memory'] / 2**20:+.1f}",
            f"open files {second['files']}, {grown['files']:+d}",
            f"logs {logs / 2**10:.0f} KiB, printed {printed / 2**10:.0f} KiB",
            sep="; ",
        )
    assert grown["memory"] <= MEMORY
    assert grown["files"] <= FILES
    assert logs <= LOGS
    assert printed <= PRINTED


def run(notes: Path, command: Sequence[str], data: Path) -> int:
    """Run a tool; returns how many bytes it printed."""
    done = subprocess.run(
        [sys.executable, "tests/reliability/long_run.py", str(notes), *command],
        cwd=ROOT,
        env={**os.environ, "DETECTRON2_DATASETS": str(data)},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr[-4000:].decode()
    return len(done.stdout + done.stderr)


def most(held: Sequence[dict[str, int]], training: int) -> dict[str, int]:
    """The most that was held at once during a training, which are counted from 0."""
    during = [n for n in held if training * STEPS < n["step"] <= (training + 1) * STEPS]
    return {key: max(note[key] for note in during) for key in ("memory", "files")}


def is_log(path: Path) -> bool:
    binary = (".pth", ".ckpt", ".ticket", ".safetensors")
    return path.is_file() and path.suffix not in binary
