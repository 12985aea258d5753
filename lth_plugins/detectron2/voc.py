"""Boxes in Pascal VOC's format, read strictly: what is wrong with a file is said with its name."""

import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from detectron2.structures import BoxMode

from lth_plugins.errors import LthError, RunError, unknown
from lth_plugins.training.images import read_size
from lth_plugins.training.places import Layout, check_layout, few, layout_of

VOC = Layout("a dataset in VOC's format", ("Annotations", "ImageSets/Main", "JPEGImages"))

_SHOWN = 3  # of the problems that an error names


def load_voc(root: Path, split: str, classes: Sequence[str], key: str) -> list[dict[str, Any]]:
    """Read a split of a dataset in VOC's format: all objects, difficult ones too.

    Boxes are pixel indices from 1, both ends inclusive, as VOC has them. A box that leaves the
    image by one pixel, as where a tool counts from 0, is clipped.

    Args:
        root: has ``Annotations/*.xml``, ``ImageSets/Main/SPLIT.txt`` and ``JPEGImages/*``.
        split: the name of a file in ``ImageSets/Main``.
        classes: the classes in the order of their labels.
        key: of the configuration, which describes the dataset, for messages.

    Returns:
        detectron2's entries, images with a number from 1 as ``image_id``.

    Raises:
        RunError: naming files that are missing or cannot be read, and boxes that are outside their
            image, degenerate or of an unknown class.
    """
    check_layout(root, layout_of(root, VOC), f"{key}.ROOT")
    splits = root / "ImageSets" / "Main"
    if not (splits / f"{split}.txt").is_file():
        there = sorted(path.stem for path in splits.glob("*.txt"))
        raise RunError(
            f"expected the split {split!r} of {key} in {splits}, found {few(there, 9)}: give one "
            f"of them as {key}.SPLIT"
        )
    names = [
        words[0]
        for line in (splits / f"{split}.txt").read_text().splitlines()
        if (words := line.split())
    ]
    if not names:
        raise RunError(f"expected the names of images in {splits / split}.txt, found none")
    images = {path.stem: path for path in sorted((root / "JPEGImages").iterdir())}
    entries, problems = [], []
    for number, name in enumerate(names, 1):
        try:
            entry = _entry(root, name, images.get(name), classes)
        except LthError as error:
            problems.append(str(error))
        else:
            entries.append({"image_id": number, **entry})
    if problems:
        raise RunError(
            f"{len(problems)} of the {len(names)} images of {key} cannot be used: "
            + "; ".join(problems[:_SHOWN])
            + (f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else "")
            + f". Correct these files, or remove their names from {splits / split}.txt"
        )
    return entries


def _entry(root: Path, name: str, image: Path | None, classes: Sequence[str]) -> dict[str, Any]:
    path = root / "Annotations" / f"{name}.xml"
    if not path.is_file():
        raise RunError(f"expected the boxes of {name} in {path}, found no such file")
    if image is None:
        raise RunError(f"expected an image {root / 'JPEGImages' / name}.jpg, found none")
    try:
        tree = ET.parse(path).getroot()
    except ET.ParseError as error:
        raise RunError(f"expected XML in {path}, found what is not ({error})") from None
    width, height = read_size(image)
    declared = (tree.findtext("size/width"), tree.findtext("size/height"))
    if declared not in ((str(width), str(height)), (None, None), ("0", "0")):
        raise RunError(
            f"expected the size of {image.name}, {width}×{height}, in {path}, found "
            f"{declared[0]}×{declared[1]}"
        )
    annotations = list(_annotations(tree, path, (width, height), classes))
    return {
        "file_name": str(image),
        "width": width,
        "height": height,
        "annotations": annotations,
    }


def _annotations(
    tree: ET.Element, path: Path, size: tuple[int, int], classes: Sequence[str]
) -> Iterator[dict[str, Any]]:
    for found in tree.iter("object"):
        name = (found.findtext("name") or "").strip()
        if name not in classes:
            raise unknown(f"class in {path}", name, classes)
        texts = [found.findtext(f"bndbox/{end}") for end in ("xmin", "ymin", "xmax", "ymax")]
        try:
            box = [float(text) for text in texts]  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise RunError(f"expected four numbers as a box in {path}, found {texts}") from None
        yield {
            "category_id": classes.index(name),
            "bbox": _checked(box, name, path, size),
            "bbox_mode": BoxMode.XYXY_ABS,
        }


def _checked(box: list[float], name: str, path: Path, size: tuple[int, int]) -> list[float]:
    """A box from inclusive indices to edges, clipped by up to a pixel: [x0, y0, x1, y1]."""
    x0, y0, x1, y1 = box
    shown = f"{name} at {', '.join(f'{value:g}' for value in box)}"
    width, height = size
    if not (x0 <= x1 and y0 <= y1):
        raise RunError(f"expected boxes with xmin ≤ xmax and ymin ≤ ymax in {path}, found {shown}")
    if min(x0, y0) < 0 or x1 > width + 1 or y1 > height + 1 or x0 > width or y0 > height:
        raise RunError(
            f"expected boxes inside the image of {width}×{height} in {path}, found {shown}"
        )
    return [max(x0 - 1, 0.0), max(y0 - 1, 0.0), min(x1, width), min(y1, height)]
