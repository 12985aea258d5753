"""Datasets in detectron2's catalogs: those that a config names, and their files."""

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances

from lth_plugins.errors import ConfigError
from lth_plugins.training.images import check_images

_DIGITS = re.compile(r"(digit_scenes(?:_small|_calm)?)_(train|test)")


def register_digit_scenes(names: Sequence[str]) -> None:
    """Register those of these datasets that ``tools/make_digit_scenes.py`` draws.

    They are ``digit_scenes_train``, ``digit_scenes_test`` and those of ``digit_scenes_small`` and
    ``digit_scenes_calm``, the scenes of ``configs/study/digits.yaml`` and ``demo.yaml``: boxes and
    masks of ten digits, in the folder of that name in ``$DETECTRON2_DATASETS`` (``./datasets`` by
    default).
    """
    datasets = Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser()
    for name in names:
        found = _DIGITS.fullmatch(name)
        if found and name not in DatasetCatalog.list():
            folder, split = datasets / found[1], found[2]
            register_coco_instances(
                name,
                {"thing_classes": [str(digit) for digit in range(10)]},
                str(folder / "annotations" / f"instances_{split}.json"),
                str(folder / "images" / split),
            )


def check_registered(names: Sequence[str], key: str) -> None:
    """Check that datasets of a config are in detectron2's catalog.

    Args:
        names: the datasets.
        key: of the config, for the message.

    Raises:
        ConfigError: naming the first that is not, similar ones, and how to register it.
    """
    registered = DatasetCatalog.list()
    for name in names:
        if name not in registered:
            close = difflib.get_close_matches(name, registered, n=3)
            raise ConfigError(
                f"expected registered datasets in {key}, found {name!r}"
                + (f"; did you mean {', '.join(close)}? " if close else ". ")
                + "Register your own in a script that then calls train_det.start(): detectron2.data"
                f".datasets.register_coco_instances({name!r}, {{}}, 'ANNOTATIONS.json', 'IMAGES/')"
            )


_FILES = ("file_name", "sem_seg_file_name", "pan_seg_file_name")


def files_of(entry: Mapping[str, Any]) -> Iterator[str]:
    """The local image files of an entry of a dataset; not those of detectron2's own protocols."""
    for key in _FILES:
        if key in entry and "://" not in entry[key]:
            yield entry[key]


def check_files(entries: Sequence[Mapping[str, Any]]) -> None:
    """Check that the image files of a dataset can be read, as far as that is cheap.

    Raises:
        UnreadableImage: naming those that cannot.
    """
    check_images(path for entry in entries for path in files_of(entry))
