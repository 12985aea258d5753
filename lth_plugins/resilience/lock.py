"""One process at a time in an output folder, and an error where it cannot be written to.

A lock is the kernel's (``flock``): it ends with the process that holds it, however that ends, so a
stale lock never blocks a run. `atomic` writes the files.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from lth_plugins.errors import RunError
from lth_plugins.resilience.atomic import TEMPORARY

logger = logging.getLogger(__name__)

LOCK = ".lock"
PATIENCE = 0.2
"""Seconds: `is_locked` briefly takes the lock; a new holder needs a moment to write its note."""

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # such as Lustre mounted without flock
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

_held: set[TextIOWrapper] = set()


def _let_go() -> None:
    for lock in _held:
        lock.close()
    _held.clear()


# A forked child, such as a DataLoader's worker, shares its parent's locks, and would hold them for
# the seconds by which it outlives a killed parent. Closing its copy releases nothing else.
os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def output_folder(folder: Path, main: bool = True) -> Iterator[None]:
    """Work in a folder that no other process of these tools works in.

    Removes what an earlier process that was killed left half-written there.

    Args:
        folder: created if it does not exist.
        main: whether this is the main process of a distributed training; others take no lock.

    Raises:
        RunError: at once if another process works in the folder, with its host and number; and
            later in place of an ``OSError`` that says that a disk is full or cannot be written to.
    """
    try:
        with locked(folder / LOCK) if main else contextlib.nullcontext():
            if main:
                _remove_temporaries(folder)
            yield
    except OSError as error:
        refused = isinstance(error, PermissionError) and _lies_in(error.filename, folder)
        if not refused and error.errno not in _NO_ROOM:
            raise
        raise RunError(
            f"expected to write to the output folder {folder}, found {error}: make room there, or "
            "give another folder. The same command then resumes after what is complete"
        ) from error


@contextlib.contextmanager
def locked(path: Path, **notes: str | None) -> Iterator[int]:
    """Hold a lock; it belongs to every process that has the descriptor that this yields.

    Args:
        path: of the lock; it stays, and names the last holder.
        notes: what else it states.

    Raises:
        RunError: if another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as lock:
        try:
            _take(lock)
        except BlockingIOError:
            raise RunError(
                f"expected to be alone in {path.parent}, found that another run, or a step that "
                f"one left behind, still works there ({_holder(path)}): wait for it or end it, "
                "then start again, or give another folder"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning(
                "%s cannot be locked (%s): make sure that no other run is started there",
                path.parent,
                error.strerror,
            )
        lock.truncate(0)
        json.dump({"host": socket.gethostname(), "process": os.getpid(), **notes}, lock)
        lock.flush()
        _held.add(lock)
        try:
            yield lock.fileno()
        finally:
            _held.discard(lock)


def is_locked(path: Path) -> bool:
    """Whether a process holds this lock."""
    try:
        with path.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return False


def _take(lock: TextIOWrapper) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(PATIENCE / 20)
        else:
            return


def lock_notes(path: Path) -> dict[str, Any]:
    """Host and process of the last holder of a lock, and its notes; empty if there are none."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}


def _holder(path: Path) -> str:
    deadline = time.monotonic() + PATIENCE
    while not (notes := lock_notes(path)) and time.monotonic() < deadline:
        time.sleep(PATIENCE / 20)  # a new holder is about to write its note
    return f"process {notes['process']} on {notes['host']}" if notes else "an unknown process"


def _lies_in(file: Any, folder: Path) -> bool:
    return isinstance(file, str | os.PathLike) and Path(file).absolute().is_relative_to(
        folder.absolute()
    )


def _remove_temporaries(folder: Path) -> None:
    # A folder of tickets has its rounds' trainings in train_00, …
    for inside in (folder, *folder.glob("train_*/")):
        for path in inside.glob(TEMPORARY):
            path.unlink(missing_ok=True)
