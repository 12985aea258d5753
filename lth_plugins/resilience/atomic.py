"""Write files atomically."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

TEMPORARY = f".?*.{'[a-z0-9_]' * 8}.tmp"
"""Matches the temporary files of `open_atomically`."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file atomically: a crash leaves the old one or the new one."""
    with open_atomically(path) as file:
        file.write(data)


@contextlib.contextmanager
def open_atomically(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file to write atomically: the target is replaced when the file closes.

    A temporary file beside the target is written, flushed and renamed. If anything goes wrong, the
    target stays as it is; a process that is killed leaves a file that matches `TEMPORARY`.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):  # it was renamed, and then came a signal
            os.unlink(temporary)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from None  # torch.save would hide that a disk is full
        raise
    with contextlib.suppress(OSError):  # not every system opens folders, or flushes them
        _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Flush a folder, so that the names of its files survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
