"""Test images with their ground truth, and what detectors and segmentors predict for them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LabelMap = NDArray[np.uint8]
"""A label map [H, W]: the index of each pixel's class; values without a class are unlabelled."""


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


NO_BOXES = Boxes(np.zeros((0, 4)), (), np.zeros(0))


@dataclass(frozen=True)
class TestImage:
    """A test image and the truth about it.

    Attributes:
        name: file name, without suffix.
        pixels: [H, W, 3], RGB.
        id: in the annotation file; None without one.
        boxes: the true boxes, of a detection.
        labels: the true label map, of a segmentation.
    """

    name: str
    pixels: NDArray[np.uint8]
    id: Any = None
    boxes: Boxes = NO_BOXES
    labels: LabelMap = field(default_factory=lambda: np.zeros((0, 0), np.uint8))


def boxed_images(
    images: Path, annotations: Path, count: int
) -> tuple[list[TestImage], dict[int, str]]:
    """The first images of an annotation file in COCO's format, and its categories by id."""
    coco = json.loads(annotations.read_text())
    names = {category["id"]: category["name"] for category in coco["categories"]}
    found = []
    for entry in coco["images"][:count]:
        boxes = _boxes([a for a in coco["annotations"] if a["image_id"] == entry["id"]], names)
        path = images / Path(entry["file_name"]).name
        found.append(TestImage(path.stem, _pixels(path), entry["id"], boxes))
    return found, names


def labelled_images(images: Path, labels: Path, count: int) -> list[TestImage]:
    """The first images, by name, of those with a label map ``NAME.png`` in a folder."""
    if not (paths := sorted(labels.glob("*.png"))[:count]):
        raise FileNotFoundError(f"no label map NAME.png in {labels}")
    found = []
    for path in paths:
        (image, *_) = [*sorted(images.glob(f"{path.stem}.*")), images / f"{path.stem}.png"]
        found.append(TestImage(path.stem, _pixels(image), labels=read_label_map(path)))
    return found


def _pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def coco_detections(path: Path, names: Mapping[int, str]) -> dict[Any, Boxes]:
    """Predicted boxes by image id, from ``coco_instances_results.json`` of a COCO evaluator."""
    by_image: dict[Any, list[dict[str, Any]]] = {}
    for detection in json.loads(path.read_text()):
        by_image.setdefault(detection["image_id"], []).append(detection)
    return {image_id: _boxes(found, names) for image_id, found in by_image.items()}


def read_label_map(path: Path) -> LabelMap:
    """A label map stored as a PNG file."""
    with Image.open(path) as image:
        return np.asarray(image)


def _boxes(entries: list[dict[str, Any]], names: Mapping[int, str]) -> Boxes:
    return Boxes(
        np.array([entry["bbox"] for entry in entries], float).reshape(-1, 4),
        tuple(names[entry["category_id"]] for entry in entries),
        np.array([entry.get("score", 1.0) for entry in entries], float),
    )
