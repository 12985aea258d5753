"""The digit scenes that ``tools/make_digit_scenes.py`` draws, in detectron2's catalogs."""

import itertools
import os
from pathlib import Path

from detectron2.data.datasets import register_coco_instances

FOLDERS = ("digit_scenes", "digit_scenes_small")
"""Of sides from 96 to 160 pixels, and the smaller ones of `configs/study/digits.yaml`."""


def register_digit_scenes() -> None:
    """Register ``digit_scenes_train`` and ``digit_scenes_test``: boxes and masks of ten digits.

    And so for each of `FOLDERS`. They are looked for in the folder of that name of
    ``$DETECTRON2_DATASETS`` (``./datasets`` by default), as detectron2 looks for its own data sets,
    and read when they are first used.
    """
    datasets = Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser()
    for name, split in itertools.product(FOLDERS, ("train", "test")):
        register_coco_instances(
            f"{name}_{split}",
            {"thing_classes": [str(digit) for digit in range(10)]},
            str(datasets / name / "annotations" / f"instances_{split}.json"),
            str(datasets / name / "images" / split),
        )
