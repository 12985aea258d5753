"""One process at a time in an output folder, and what there is to say when it cannot be written to.

A lock is the kernel's (``flock``): it is gone with the process that holds it, however that ends, so
nothing stale is ever in the way. Writing files atomically is the part of `atomic`.
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

from lth_plugins.errors import TicketError
from lth_plugins.resilience.atomic import TEMPORARY

logger = logging.getLogger(__name__)

LOCK = ".lock"
PATIENCE = 0.2
"""Seconds: whoever asks `is_locked` has a lock for a moment, and who took it has yet to say so."""

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # such as Lustre mounted without flock
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

_held: set[TextIOWrapper] = set()


def _let_go() -> None:
    for lock in _held:
        lock.close()
    _held.clear()


# A forked child, such as a DataLoader's worker, shares its parent's locks, and would keep them for
# the seconds that it outlives a parent that was killed. Closing its copy releases nothing else.
os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def output_folder(folder: Path, main: bool = True) -> Iterator[None]:
    """Work in a folder that no other process of these tools works in.

    What an earlier process that was killed left half-written there is removed.

    Args:
        folder: is made if it is not there.
        main: whether this is the main process of a distributed training; others take no lock.

    Raises:
        TicketError: at once if another process works in the folder, with its host and number; and
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
        raise TicketError(
            f"expected to write to the output folder {folder}, found {error}: make room there, or "
            "give another folder. Started again, it goes on from what was complete before"
        ) from error


@contextlib.contextmanager
def locked(path: Path, **notes: str | None) -> Iterator[int]:
    """Hold a lock, which belongs to whoever has the descriptor that this yields.

    Args:
        path: of the lock; it stays, and says who took it last.
        notes: what else it says.

    Raises:
        TicketError: if somebody else holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as lock:
        try:
            _take(lock)
        except BlockingIOError:
            raise TicketError(
                f"expected to be alone in {path.parent}, found that another run, or a step that "
                f"one left behind, still works there ({_holder(path)}): wait for it or end it, "
                "then start again, or give another folder"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning(
                "%s cannot be locked (%s): see to it that nothing else is started there",
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
    """Whether somebody holds this lock."""
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
    """What a lock says: host and process of who took it last, and the notes; empty if nothing."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}


def _holder(path: Path) -> str:
    deadline = time.monotonic() + PATIENCE
    while not (notes := lock_notes(path)) and time.monotonic() < deadline:
        time.sleep(PATIENCE / 20)  # whoever has just taken it is about to say so
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
