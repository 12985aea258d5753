"""Test images with their ground truth, and what detectors and segmentors predict for them."""

import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

BackgroundFirst = NDArray[np.uint8]
"""A label map [H, W]: 0 background, class c is c + 1."""


@dataclass(frozen=True)
class Boxes:
    """Boxes of one image.

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
class TestImage:
    """A test image and the truth about it.

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


def read_images(scenes: str | PathLike[str], split: str, count: int) -> list[TestImage]:
    """The first images of a dataset that ``tools/make_digit_scenes.py`` wrote."""
    folder = Path(scenes)
    coco = json.loads((folder / "annotations" / f"instances_{split}.json").read_text())
    names = category_names(scenes, split)
    images = []
    for entry in coco["images"][:count]:
        with Image.open(folder / "images" / split / entry["file_name"]) as image:
            pixels = np.asarray(image.convert("RGB"))
        found = [a for a in coco["annotations"] if a["image_id"] == entry["id"]]
        name = Path(entry["file_name"]).stem
        images.append(TestImage(entry["id"], name, pixels, _boxes(found, names)))
    return images


def category_names(scenes: str | PathLike[str], split: str) -> dict[int, str]:
    """Names of the categories of a COCO-format dataset, by id."""
    path = Path(scenes) / "annotations" / f"instances_{split}.json"
    return {c["id"]: c["name"] for c in json.loads(path.read_text())["categories"]}


def coco_detections(path: str | PathLike[str], names: dict[int, str]) -> dict[int, Boxes]:
    """Predicted boxes by image id, from ``coco_instances_results.json`` of a COCO evaluator."""
    by_image: dict[int, list[dict[str, Any]]] = {}
    for detection in json.loads(Path(path).read_text()):
        by_image.setdefault(detection["image_id"], []).append(detection)
    return {image_id: _boxes(found, names) for image_id, found in by_image.items()}


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
