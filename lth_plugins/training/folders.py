"""Folders of images, one folder per class: found, checked before a training, and read.

An image that cannot be read is named by its path, whether it is found beforehand or in the middle
of a training, in a process that loads images, too.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from lth_plugins.errors import LthError, TicketError

logger = logging.getLogger(__name__)

CHECKED = 50_000
"""Of larger data sets only the sizes of the files are looked at before a training."""

_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
_SHOWN = 3  # of what is listed in an error


class Images(ImageFolder):
    """torchvision's ``ImageFolder`` without hidden files and folders.

    Those are ``.ipynb_checkpoints``, which Jupyter makes, ``._NAME``, which macOS adds, and the
    like; what is left out is logged.

    Args:
        split: the folder that has one folder per class.
        transform: of each image.

    Raises:
        TicketError: if there is no such folder, it has no class, or a class has no image.
    """

    def __init__(self, split: Path, transform: Callable[[Any], Any]) -> None:
        if not split.is_dir():
            raise TicketError(
                f"expected a folder of pictures at {split}, found none; in {split.parent} is found "
                f"{contents(split.parent)}: {_meant(split)}"
            )
        self._hidden = 0
        super().__init__(
            str(split),
            transform,
            loader=read_image,
            is_valid_file=lambda path: self._is_image(Path(path).relative_to(split)),
            allow_empty=True,
        )
        present = {label for _, label in self.samples}
        empty = [name for name, label in self.class_to_idx.items() if label not in present]
        if empty:
            raise TicketError(
                f"expected pictures in {split / empty[0]}, found none "
                f"({', '.join(IMG_EXTENSIONS)}): there must be one folder a class, each with "
                f"pictures, and none are in the classes {', '.join(empty)}"
            )
        if self._hidden:
            logger.info("left out %d hidden files and folders in %s", self._hidden, split)

    def find_classes(self, directory: Any) -> tuple[list[str], dict[str, int]]:
        folders = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir())
        classes = [name for name in folders if not name.startswith(".")]
        self._hidden += len(folders) - len(classes)
        if not classes:
            raise TicketError(
                f"expected one folder a class in {directory}, each with pictures, found no class "
                "folder"
            )
        return classes, {name: label for label, name in enumerate(classes)}

    def _is_image(self, path: Path) -> bool:
        if path.suffix.lower() not in IMG_EXTENSIONS:
            return False
        hidden = any(part.startswith(".") for part in path.parts)
        self._hidden += hidden
        return not hidden


def contents(folder: Path) -> str:
    """What is in a folder, in a few words."""
    if not folder.is_dir():
        return "no such folder"
    names = sorted(path.name for path in folder.iterdir())
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return (", ".join(names[:4]) or "nothing") + more


def _meant(split: Path) -> str:
    """What to do about a split that is not there."""
    root = split.parent
    if (root.parent / split.name).is_dir():
        return f"give data.root={root.parent}"
    if not root.is_dir():
        return "set data.root"
    folders = [path for path in root.iterdir() if path.is_dir()]
    images = (path for folder in folders for path in folder.iterdir() if path.is_file())
    if any(path.suffix.lower() in IMG_EXTENSIONS for path in images):
        return (
            f"{root} holds the classes themselves; move their folders into train/, and some images "
            f"of each class into {split.name if split.name != 'train' else 'val'}/"
        )
    return f"set data.root to the folder that has train/ and {split.name}/, or rename what is there"


def read_image(path: str | Path) -> Image.Image:
    """Read an image of any mode as RGB; 16 bits are scaled to 8, and transparency is dropped.

    Raises:
        TicketError: if it cannot be read, with its path.
    """
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
                # PIL would cut off what is brighter than 255.
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            if image.mode in ("I", "F"):
                raise ValueError("it has 32 bits a channel, 8 or 16 are read")
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            return image.convert("RGB")
    except Exception as error:  # PIL's readers raise whatever goes wrong in them
        raise TicketError(
            f"{path} cannot be read as an image ({_reason(path, error)}): replace it, or remove it"
        ) from None


def _reason(path: str | Path, error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if os.path.getsize(path) == 0:
        return "the file is empty"
    if isinstance(error, UnidentifiedImageError):
        return "its content is of no known image format"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_images(*splits: Dataset[Any]) -> None:
    """Check that the images of data sets can be read, as far as that is cheap.

    Headers and ends of files are looked at, and what is odd about one is decoded; an image whose
    middle is damaged is found only when it is read. Data sets of other kinds are left alone.

    Raises:
        TicketError: if images cannot be read, with their paths.
    """
    paths = dict.fromkeys(path for split in splits for path in _paths(split))
    suspect = _is_odd if len(paths) <= CHECKED else _is_empty
    problems = []
    for path in paths:
        if suspect(path):
            try:
                read_image(path)
            except LthError as error:
                problems.append(str(error))
    if len(problems) > 1:
        named = "; ".join(problem.rpartition(": replace it")[0] for problem in problems[:_SHOWN])
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise TicketError(
            f"{len(problems)} images cannot be read: {named}{more}. Replace them, or remove them"
        )
    if problems:
        raise TicketError(problems[0])


def _paths(split: Dataset[Any]) -> list[str]:
    if isinstance(split, Subset):
        paths = _paths(split.dataset)
        return [paths[index] for index in split.indices] if paths else []
    return [path for path, _ in split.samples] if isinstance(split, Images) else []


def _is_empty(path: str) -> bool:
    return not os.path.isfile(path) or os.path.getsize(path) == 0


def _is_odd(path: str) -> bool:
    """Whether an image may be unreadable: its header or its end is not as expected."""
    try:
        with Image.open(path) as image, open(path, "rb") as file:
            file.seek(-min(64, os.path.getsize(path)), os.SEEK_END)
            end = _ENDS.get(image.format or "")
            return end is None or end not in file.read() or image.mode in ("I", "F")
    except Exception:  # see read_image
        return True


@contextmanager
def named_images() -> Iterator[None]:
    """Have an error of a process that loads images be that one sentence, without its traceback."""
    try:
        yield
    except LthError as error:
        text = str(error)
        if not text.startswith("Caught TicketError in DataLoader worker"):
            raise
        raise TicketError(text.rpartition("TicketError: ")[2].strip()) from None
