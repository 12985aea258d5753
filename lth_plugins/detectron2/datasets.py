"""The digit scenes that ``tools/make_digit_scenes.py`` draws, in detectron2's catalogs."""

import os
from pathlib import Path

from detectron2.data.datasets import register_coco_instances


def register_digit_scenes() -> None:
    """Register ``digit_scenes_train`` and ``digit_scenes_test``: boxes and masks of ten digits.

    They are looked for in the folder ``digit_scenes`` of ``$DETECTRON2_DATASETS`` (``./datasets``
    by default), as detectron2 looks for its own data sets, and read when they are first used.
    """
    root = Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser() / "digit_scenes"
    for split in ("train", "test"):
        register_coco_instances(
            f"digit_scenes_{split}",
            {"thing_classes": [str(digit) for digit in range(10)]},
            str(root / "annotations" / f"instances_{split}.json"),
            str(root / "images" / split),
        )
