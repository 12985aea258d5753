"""What the tools leave in their folders, read back: metrics and predictions."""

import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lth_plugins.ticket import TicketError

Metrics = dict[str, float]

BackgroundFirst = NDArray[np.uint8]
"""A label map [H, W]: 0 background, class c is c + 1."""


@dataclass(frozen=True)
class Boxes:
    """Boxes of one picture.

    Attributes:
        xywh: [N, 4], pixels: left, top, width, height.
        labels: [N], the categories' names.
        scores: [N], in [0, 1]; ones for the ground truth.
    """

    xywh: NDArray[np.float64]
    labels: tuple[str, ...]
    scores: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.labels)

    def at_least(self, score: float) -> "Boxes":
        """Those with this score or a higher one."""
        keep = np.flatnonzero(self.scores >= score)
        return Boxes(self.xywh[keep], tuple(self.labels[i] for i in keep), self.scores[keep])


@dataclass(frozen=True)
class Picture:
    """A test picture and the truth about it.

    Attributes:
        id: in the annotation file.
        name: file name, without suffix.
        pixels: [H, W, 3], RGB.
        boxes: the ground truth.
    """

    id: int
    name: str
    pixels: NDArray[np.uint8]
    boxes: Boxes


def find_metrics(folder: str | PathLike[str]) -> list[dict[str, Any]]:
    """The rounds that ``tools/find_ticket.py`` measured, in order: ``metrics.jsonl``."""
    return _lines(Path(folder) / "metrics.jsonl", "round")


def detectron2_metrics(folder: str | PathLike[str]) -> Metrics:
    """The last evaluation in a detectron2 run's ``metrics.json``; NaN if nothing was detected."""
    return _lines(Path(folder) / "metrics.json", "bbox/AP")[-1]


def mmengine_metrics(folder: str | PathLike[str], metric: str = "mIoU") -> Metrics:
    """The last evaluation that an mmengine run logged in ``TIME/vis_data/scalars.json``."""
    files = sorted(Path(folder).glob("*/vis_data/scalars.json"))
    if not files:
        raise TicketError(f"expected results in {folder}/*/vis_data/scalars.json, found none")
    return _lines(files[-1], metric)[-1]


def read_pictures(scenes: str | PathLike[str], split: str, count: int) -> list[Picture]:
    """The first pictures of a data set that ``tools/make_digit_scenes.py`` wrote."""
    folder = Path(scenes)
    coco = json.loads((folder / "annotations" / f"instances_{split}.json").read_text())
    names = category_names(scenes, split)
    pictures = []
    for entry in coco["images"][:count]:
        with Image.open(folder / "images" / split / entry["file_name"]) as image:
            pixels = np.asarray(image.convert("RGB"))
        found = [a for a in coco["annotations"] if a["image_id"] == entry["id"]]
        name = Path(entry["file_name"]).stem
        pictures.append(Picture(entry["id"], name, pixels, _boxes(found, names)))
    return pictures


def category_names(scenes: str | PathLike[str], split: str) -> dict[int, str]:
    """Names of the categories of a COCO-format data set, by id."""
    path = Path(scenes) / "annotations" / f"instances_{split}.json"
    return {c["id"]: c["name"] for c in json.loads(path.read_text())["categories"]}


def coco_detections(path: str | PathLike[str], names: dict[int, str]) -> dict[int, Boxes]:
    """Predicted boxes by picture id, from ``coco_instances_results.json`` of a COCO evaluator."""
    by_picture: dict[int, list[dict[str, Any]]] = {}
    for detection in json.loads(Path(path).read_text()):
        by_picture.setdefault(detection["image_id"], []).append(detection)
    return {picture: _boxes(found, names) for picture, found in by_picture.items()}


def read_label_map(path: str | PathLike[str]) -> BackgroundFirst:
    """A label map stored as a PNG file."""
    with Image.open(path) as image:
        return np.asarray(image)


def _boxes(entries: list[dict[str, Any]], names: dict[int, str]) -> Boxes:
    return Boxes(
        np.array([entry["bbox"] for entry in entries], float).reshape(-1, 4),
        tuple(names[entry["category_id"]] for entry in entries),
        np.array([entry.get("score", 1.0) for entry in entries], float),
    )


def _lines(path: Path, key: str) -> list[dict[str, Any]]:
    """The JSON objects, one a line, that have this key; never none."""
    if not path.is_file():
        raise TicketError(f"expected results in {path}, found no such file: did the run finish?")
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except ValueError as error:
        raise TicketError(f"expected a JSON object on each line of {path}: {error}") from None
    found = [line for line in lines if key in line]
    if not found:
        raise TicketError(f"expected {key} in {path}, found no line with it: did the run finish?")
    return found
