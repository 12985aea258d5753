"""Images that cannot be read: which file it is, and what is wrong with it, in one line.

What decodes an image for a host says "cannot identify image file", or returns None, and names no
path. Hosts ask here once something failed, and before a training where that is cheap.
"""

import os
import re
from collections.abc import Iterable
from os import PathLike

from PIL import Image

from lth_plugins.errors import TicketError

FEW = 2000
"""So many files are looked at before a training; of more, each is named when it is read."""

SMALL = 64 << 20
"""Bytes of files that are also decoded before a training."""


class UnreadableImage(TicketError):
    """An image file that cannot be read. The message names its path.

    It is raised again from a DataLoader's worker as a single line, without the worker's traceback.
    """

    def __init__(self, message: str) -> None:
        from_worker = re.search(rf"\b{type(self).__name__}: (.*)\Z", message, re.DOTALL)
        super().__init__(from_worker[1].strip() if from_worker else message)


def check_readable(paths: Iterable[str | PathLike[str]], whole: bool = False) -> None:
    """Check that files are images.

    Args:
        paths: the files.
        whole: whether to decode them, which finds truncated ones; else only their headers are read.

    Raises:
        UnreadableImage: naming the first that is not, and why.
    """
    for path in paths:
        why = _why_unreadable(path, whole)
        if why:
            raise UnreadableImage(
                f"expected an image at {os.fspath(path)}, found {why}: replace the file, or take "
                "it out of the dataset"
            )


def _why_unreadable(path: str | PathLike[str], whole: bool) -> str:
    try:
        if os.path.getsize(path) == 0:
            return "an empty file"
        with Image.open(path) as image:
            if whole:
                image.load()
    except FileNotFoundError:
        return "nothing"
    except Exception as error:  # Pillow's decoders raise many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "cannot identify image file" in reason:
            return "something else: no image format that Pillow knows"
        return f"one that cannot be read ({reason})"
    return ""


def check_small(paths: Iterable[str | PathLike[str]]) -> None:
    """Check the images of a dataset before a training, as far as that takes seconds.

    Of up to `FEW` files the headers are read; where all of them are small together, they are
    decoded: some decoders make a grey half of a truncated JPEG without a word.

    Args:
        paths: the files; each is looked at once.

    Raises:
        UnreadableImage: as `check_readable`.
    """
    distinct = list(dict.fromkeys(paths))
    if len(distinct) > FEW:
        return
    sizes = (os.path.getsize(path) for path in distinct if os.path.exists(path))
    check_readable(distinct, whole=sum(sizes) <= SMALL)
