"""Decides whether an image file can be read, and says what is wrong with it in one line.

What decodes an image for a host says "cannot identify image file", or returns None, and names no
path. Hosts ask here before a training, as far as that is cheap, and after something failed.
"""

import os
import re
from collections.abc import Callable, Iterable
from os import PathLike
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image

from lth_plugins.errors import RunError

FEW = 50_000
"""Of larger datasets only the sizes of the files are checked before a training."""

SMALL = 64 << 20
"""Files of at most this many bytes together are all decoded before a training."""

_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
_SHOWN = 3  # of the images that an error names

Path = str | PathLike[str]


def evenly_spaced(size: int, count: int) -> list[int]:
    """The indices of that many of ``size`` images, or of all, from the first to the last."""
    return torch.linspace(0, size - 1, min(count, size)).long().tolist()


class UnreadableImage(RunError):
    """An image file that cannot be read. The message names its path.

    When a DataLoader's worker raises it, the message loses the worker's traceback.
    """

    def __init__(self, message: str) -> None:
        from_worker = re.search(rf"\b{type(self).__name__}: (.*)\Z", message, re.DOTALL)
        super().__init__(from_worker[1].strip() if from_worker else message)


def read_image(path: Path) -> Image.Image:
    """Read an image of any mode as RGB; 16 bits are scaled to 8, and transparency is dropped.

    Raises:
        UnreadableImage: if it cannot be read.
    """
    why, image = _read(path, _to_rgb)
    if image is None:
        raise UnreadableImage(_message(path, why))
    return image


def read_size(path: Path) -> tuple[int, int]:
    """Width and height of an image as EXIF turns it, in pixels, from its header.

    Raises:
        UnreadableImage: if it has none.
    """
    why, size = _read(path, _turned_size)
    if size is None:
        raise UnreadableImage(_message(path, why))
    return size


def _turned_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return (height, width) if turned else (width, height)


def _decode(image: Image.Image) -> None:
    image.load()


def check_images(paths: Iterable[Path], decode: Callable[[Image.Image], Any] = _decode) -> None:
    """Check the images of a dataset before a training, as far as that takes only seconds.

    See `unreadable`; of more than `FEW` files only the sizes are checked. An image whose middle is
    damaged may be found only when it is read.

    Args:
        paths: the files; each is checked once.
        decode: reads an open image; by default it is decoded as it is.

    Raises:
        UnreadableImage: naming those that cannot be read, and why.
    """
    files = list(dict.fromkeys(os.fspath(path) for path in paths))
    if len(files) > FEW:
        files = [path for path in files if _size(path) == 0]
    problems = list(unreadable(files, decode).items())
    if len(problems) > 1:
        named = "; ".join(f"at {path} is {why}" for path, why in problems[:_SHOWN])
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise UnreadableImage(
            f"{len(problems)} images cannot be read: {named}{more}. Replace them, or remove them "
            "from the dataset"
        )
    if problems:
        raise UnreadableImage(_message(*problems[0]))


def unreadable(
    paths: Iterable[Path], decode: Callable[[Image.Image], Any] = _decode
) -> dict[str, str]:
    """The images that cannot be read, each with what is there instead.

    The headers and ends of all files are read, and a file that is odd is decoded; where all of them
    are small together, all are decoded. Some decoders silently fill a truncated JPEG with grey.
    """
    sizes = {os.fspath(path): _size(path) for path in paths}
    everything = len(sizes) <= FEW and sum(sizes.values()) <= SMALL
    problems = {}
    for path, size in sizes.items():
        if size == 0 or everything or _is_odd(path):
            why, _ = _read(path, decode)
            if why:
                problems[path] = why
    return problems


def check_rgb(paths: Iterable[Path]) -> None:
    """`check_images` for images that `read_image` reads."""
    check_images(paths, _to_rgb)


def unreadable_rgb(paths: Iterable[Path]) -> dict[str, str]:
    """`unreadable` for images that `read_image` reads."""
    return unreadable(paths, _to_rgb)


class Readable:
    """A function that loads an entry of a dataset, and names the image file that it cannot read.

    Args:
        load: loads an entry; everything else that it has is available here, too.
        files: the image files of an entry.
    """

    def __init__(self, load: Callable[[Any], Any], files: Callable[[Any], Iterable[Path]]) -> None:
        self._load, self._files = load, files

    def __call__(self, entry: Any) -> Any:
        files = list(self._files(entry))  # loading may change the entry
        try:
            return self._load(entry)
        except Exception:
            for path in files:
                why, _ = _read(path, _decode)
                if why:
                    raise UnreadableImage(_message(path, why)) from None
            raise

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_load", "_files"):  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self._load, name)


def _read(path: Path, decode: Callable[[Image.Image], Any]) -> tuple[str, Any]:
    """Why a file is no image that can be decoded, or "", and what decoding returned."""
    try:
        if os.path.getsize(path) == 0:
            return "an empty file", None
        with Image.open(path) as image:
            return "", decode(image)
    except FileNotFoundError:
        return "nothing", None
    except Exception as error:  # Pillow's decoders raise many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "cannot identify image file" in reason:
            return "something else: no image format that Pillow knows", None
        return f"one that cannot be read ({reason})", None


def _message(path: Path, why: str) -> str:
    return (
        f"expected an image at {os.fspath(path)}, found {why}: replace the file, or remove it from "
        "the dataset"
    )


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        # PIL would cut off what is brighter than 255.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("it has 32 bits per channel, 8 or 16 are read")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _size(path: Path) -> int:
    return os.path.getsize(path) if os.path.isfile(path) else 0


def _is_odd(path: str) -> bool:
    """Whether an image may be unreadable: its header or its end is not as expected."""
    try:
        with Image.open(path) as image, open(path, "rb") as file:
            file.seek(-min(64, os.path.getsize(path)), os.SEEK_END)
            end = _ENDS.get(image.format or "")
            return (end is not None and end not in file.read()) or image.mode in ("I", "F")
    except Exception:  # Pillow's decoders raise many kinds
        return True
