"""The metrics that tools leave in their folders."""

import json
from os import PathLike
from pathlib import Path
from typing import Any

from lth_plugins.errors import RunError

Metrics = dict[str, float]


def find_metrics(folder: str | PathLike[str]) -> list[dict[str, Any]]:
    """The rounds that ``tools/find_ticket.py`` measured, in order: ``metrics.jsonl``."""
    return _lines(Path(folder) / "metrics.jsonl", "round")


def script_metrics(folder: Path) -> Metrics:
    """What a training script of the user's own wrote: ``metrics.json``, names and numbers."""
    path = folder / "metrics.json"
    if not path.is_file():
        raise RunError(
            f"expected the script to write its metrics to {path}, found no such file: write "
            'json.dump({"accuracy": 91.5}, file)'
        )
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise RunError(f"expected a JSON object of names and numbers in {path}: {error}") from None
    if not isinstance(content, dict) or any(type(v) not in (int, float) for v in content.values()):
        raise RunError(
            f"expected a JSON object of names and numbers in {path}, found {content!r:.100}"
        )
    return content


def detectron2_metrics(folder: str | PathLike[str]) -> Metrics:
    """The last evaluation in a detectron2 run's ``metrics.json``; NaN if nothing was detected."""
    return _lines(Path(folder) / "metrics.json", "bbox/AP")[-1]


def detectron2_evaluated(folder: Path) -> Metrics:
    """What ``tools/train_det.py --eval-only`` measured: ``evaluation.json``."""
    return _lines(folder / "evaluation.json", "bbox/AP")[-1]


def mmengine_metrics(folder: str | PathLike[str], metric: str = "mIoU") -> Metrics:
    """The last evaluation that an mmengine run logged in ``TIME/vis_data/scalars.json``."""
    files = sorted(Path(folder).glob("*/vis_data/scalars.json"))
    if not files:
        raise RunError(f"expected results in {folder}/*/vis_data/scalars.json, found none")
    return _lines(files[-1], metric)[-1]


def mmengine_tested(folder: Path) -> Metrics:
    """What an mmengine test measured: ``TIME/TIME.json``, the newest."""
    files = sorted(folder.glob("[0-9]*/[0-9]*.json"))
    if not files:
        raise RunError(f"expected results of a test in {folder}/*/*.json, found none")
    content: Metrics = json.loads(files[-1].read_text())
    return content


def last_mmengine_checkpoint(folder: Path) -> Path:
    """The checkpoint that mmengine noted as the last in a folder, which may have been moved."""
    note = folder / "last_checkpoint"
    if not note.is_file():
        raise RunError(f"expected a finished training in {folder}, found no {note.name} there")
    return folder / Path(note.read_text().strip()).name


def _lines(path: Path, key: str) -> list[dict[str, Any]]:
    """The JSON objects, one per line, that have this key; at least one."""
    if not path.is_file():
        raise RunError(f"expected results in {path}, found no such file: did the run finish?")
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except ValueError as error:
        raise RunError(f"expected a JSON object on each line of {path}: {error}") from None
    found = [line for line in lines if key in line]
    if not found:
        raise RunError(f"expected {key} in {path}, found no line with it: did the run finish?")
    return found
