"""Folders of images, one folder per class, as a dataset.

Whether an image can be read is decided in `images`.
"""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from lth_plugins.errors import RunError
from lth_plugins.training.images import check_rgb, read_image, unreadable_rgb
from lth_plugins.training.places import contents, few

logger = logging.getLogger(__name__)


class Images(ImageFolder):
    """torchvision's ``ImageFolder`` without hidden files and folders.

    Jupyter makes ``.ipynb_checkpoints``, macOS adds ``._NAME``; how many are left out is logged.

    Args:
        split: the folder that has one folder per class.
        transform: of each image.
        skip_broken: leave out images whose header or end shows that they cannot be read, too.

    Raises:
        RunError: if there is no such folder, it has no class, or a class has no image.
    """

    def __init__(
        self, split: Path, transform: Callable[[Any], Any], skip_broken: bool = False
    ) -> None:
        if not split.is_dir():
            raise RunError(
                f"expected a folder of images at {split}, found none; {split.parent} has "
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
        if skip_broken:
            self._skip(unreadable_rgb(path for path, _ in self.samples))
        present = {label for _, label in self.samples}
        empty = [name for name, label in self.class_to_idx.items() if label not in present]
        if empty:
            raise RunError(
                f"expected images in {split / empty[0]}, found none "
                f"({', '.join(IMG_EXTENSIONS)}): there must be one folder per class, each with "
                f"images, and none are in the classes {', '.join(empty)}"
            )
        if self._hidden:
            logger.info("left out %d hidden files and folders in %s", self._hidden, split)

    def find_classes(self, directory: Any) -> tuple[list[str], dict[str, int]]:
        folders = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir())
        classes = [name for name in folders if not name.startswith(".")]
        self._hidden += len(folders) - len(classes)
        if not classes:
            raise RunError(
                f"expected one folder per class in {directory}, each with images, found no class "
                "folder"
            )
        return classes, {name: label for label, name in enumerate(classes)}

    samples: list[tuple[str, int]]

    def _skip(self, broken: Mapping[str, str]) -> None:
        if broken:
            logger.warning(
                "left out %d of %d images in %s that cannot be read (data.skip_broken=true): %s",
                *(len(broken), len(self.samples), self.root, few(broken, 3)),
            )
        kept = [sample for sample in self.samples if sample[0] not in broken]
        self.samples, self.imgs, self.targets = kept, kept, [label for _, label in kept]

    def _is_image(self, path: Path) -> bool:
        if path.suffix.lower() not in IMG_EXTENSIONS:
            return False
        hidden = any(part.startswith(".") for part in path.parts)
        self._hidden += hidden
        return not hidden


def _meant(split: Path) -> str:
    """Say what to do about a missing split."""
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
    return f"set data.root to the folder that has {split.name}/, or rename what is there"


def check_folders(*splits: Dataset[Any]) -> None:
    """Check that the images of `Images` and subsets of them can be read, as far as that is cheap.

    Datasets of other kinds are not checked.

    Raises:
        UnreadableImage: if images cannot be read, with their paths.
    """
    check_rgb(path for split in splits for path in _paths(split))


def _paths(split: Dataset[Any]) -> list[str]:
    if isinstance(split, Subset):
        paths = _paths(split.dataset)
        return [paths[index] for index in split.indices] if paths else []
    return [path for path, _ in split.samples] if isinstance(split, Images) else []
