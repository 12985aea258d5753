"""What all files have in common: checks before reading, and an error where writing fails."""

import os
from pathlib import Path

from safetensors import SafetensorError

from lth_plugins.errors import NotFound, RunError
from lth_plugins.resilience.atomic import write_atomically

MOST_HEADER = 8 << 20
"""Bytes of a safetensors header; the largest tickets and checkpoints have a tenth of that."""


def check_there(path: Path, what: str) -> None:
    """Raise `NotFound` where there is no file that this user may see."""
    if not os.path.isfile(path):  # Path.is_file raises where a name is too long
        raise NotFound(
            f"expected {what}, found nothing at {path}: check the path, and who may read it"
        )


def check_header(path: Path) -> None:
    """Refuse a safetensors file whose header is longer than is worth parsing.

    Raises:
        SafetensorError: if it says so. Whether the header is sound is for safetensors to say.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > MOST_HEADER:
        raise SafetensorError(f"a header of {size:,} bytes, expected at most {MOST_HEADER:,}")


def write_file(path: Path, data: bytes) -> None:
    """Write a file atomically.

    Raises:
        RunError: if the folder does not exist or cannot be written to.
    """
    try:
        write_atomically(path, data)
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror or error}. Give a path in an existing folder "
            "with free space; nothing was changed"
        ) from error
