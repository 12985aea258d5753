"""Datasets in detectron2's catalogs: those that a config names, their files, and our digit scenes.

The digit scenes are those that ``tools/make_digit_scenes.py`` draws.
"""

import difflib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances

from lth_plugins.ticket import TicketError
from lth_plugins.training.images import check_readable, check_small

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


def check_registered(names: Sequence[str], key: str) -> None:
    """Check that datasets of a config are in detectron2's catalog.

    Args:
        names: the datasets.
        key: of the config, for the message.

    Raises:
        TicketError: naming the first that is not, similar ones, and how to register it.
    """
    registered = DatasetCatalog.list()
    for name in names:
        if name not in registered:
            close = difflib.get_close_matches(name, registered, n=3)
            raise TicketError(
                f"expected registered datasets in {key}, found {name!r}"
                + (f"; did you mean {', '.join(close)}? " if close else ". ")
                + "Register your own in a script that then calls train_det.start(): detectron2.data"
                f".datasets.register_coco_instances({name!r}, {{}}, 'ANNOTATIONS.json', 'IMAGES/')"
            )


_FILES = ("file_name", "sem_seg_file_name", "pan_seg_file_name")


def _files(entry: Mapping[str, Any]) -> Iterator[str]:
    """The local image files of an entry of a dataset; not those of detectron2's own protocols."""
    for key in _FILES:
        if key in entry and "://" not in entry[key]:
            yield entry[key]


def check_files(entries: Sequence[Mapping[str, Any]]) -> None:
    """Check that the image files of a small dataset are there, and can be read.

    Raises:
        UnreadableImage: naming the first that is not.
    """
    check_small(path for entry in entries for path in _files(entry))


class ReadableMapper:
    """A dataset mapper that names the image file which cannot be read.

    Args:
        mapper: what loads an entry.
    """

    def __init__(self, mapper: Callable[[dict[str, Any]], Any]) -> None:
        self._mapper = mapper

    def __call__(self, entry: dict[str, Any]) -> Any:
        try:
            return self._mapper(entry)
        except Exception:
            check_readable(_files(entry), whole=True)
            raise
