"""One process at a time in an output folder; whoever dies lets go; what cannot be written is said.

What tools do with it is in test_kill.py.
"""

import errno
import fcntl
import multiprocessing
import os
import resource
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lth_plugins import RunError
from lth_plugins.errors import LthError
from lth_plugins.resilience.atomic import open_atomically
from lth_plugins.resilience.lock import LOCK, PATIENCE, is_locked, locked, output_folder

Process = multiprocessing.context.ForkProcess
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Process]:
    """A process that works in the folder."""
    here = FORK.Event()

    def work() -> None:
        with output_folder(tmp_path):
            here.set()
            signal.pause()

    process = FORK.Process(target=work)
    process.start()
    assert here.wait(60)
    yield process
    process.kill()
    process.join()


def test_a_second_process_is_told_who_the_first_is(tmp_path: Path, holder: Process) -> None:
    first = f"process {holder.pid} on {socket.gethostname()}"
    with pytest.raises(RunError, match=first), output_folder(tmp_path):
        pytest.fail("two at once")
    with output_folder(tmp_path, main=False):  # a rank of the first one's training
        pass


def test_the_lock_of_a_process_that_was_killed_is_in_nobodys_way(
    tmp_path: Path, holder: Process
) -> None:
    holder.kill()
    holder.join()
    with output_folder(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()


def test_a_forked_worker_does_not_keep_the_lock_of_a_parent_that_is_gone(tmp_path: Path) -> None:
    here = FORK.Event()

    def work() -> None:
        here.set()
        signal.pause()

    with output_folder(tmp_path):
        worker = FORK.Process(target=work)
        worker.start()
        assert here.wait(60)
        assert is_locked(tmp_path / LOCK)
    try:
        assert worker.is_alive() and not is_locked(tmp_path / LOCK)
    finally:
        worker.kill()
        worker.join()


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    (tmp_path / "train_00").mkdir()
    left = [tmp_path / ".round_01.ticket.ab3_9xyz.tmp", tmp_path / "train_00/.a.pth.abcdefgh.tmp"]
    mine = [tmp_path / ".mine.tmp", tmp_path / "data.abcdefgh.tmp"]
    for path in left + mine:
        path.touch()
    with output_folder(tmp_path):
        assert [path.exists() for path in left + mine] == [False, False, True, True]


def test_where_there_are_no_locks_work_continues_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with output_folder(tmp_path):
        assert "cannot be locked" in caplog.text
        assert not is_locked(tmp_path / LOCK)


def test_who_asks_for_a_moment_whether_it_is_locked_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / LOCK
    path.touch()
    with path.open() as asks:
        fcntl.flock(asks, fcntl.LOCK_SH)
        threading.Timer(PATIENCE / 4, lambda: fcntl.flock(asks, fcntl.LOCK_UN)).start()
        with locked(path):
            assert is_locked(path)


def test_who_has_just_taken_the_lock_is_waited_for_to_say_who_it_is(tmp_path: Path) -> None:
    path = tmp_path / LOCK
    path.touch()
    notes = '{"host": "here", "process": 7}'
    with path.open() as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        threading.Timer(1.5 * PATIENCE, lambda: path.write_text(notes)).start()
        with pytest.raises(RunError, match="process 7 on here"), locked(path):
            pytest.fail("two at once")


def test_a_disk_that_is_full_is_said_and_the_older_checkpoint_stays(tmp_path: Path) -> None:
    path, limit = tmp_path / "last.ckpt", resource.getrlimit(resource.RLIMIT_FSIZE)
    path.write_bytes(b"older")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limit[1]))
    try:
        with (
            pytest.raises(RunError, match=r"expected to write to .* File too large: make room"),
            output_folder(tmp_path),
            open_atomically(path) as file,
        ):
            torch.save(torch.zeros(1 << 20), file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == b"older"
    assert {file.name for file in tmp_path.iterdir()} == {LOCK, "last.ckpt"}


def test_a_folder_that_cannot_be_written_to_is_said(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o555)
    tmp_path.chmod(0o555)
    said = FORK.SimpleQueue()

    def work() -> None:
        if os.geteuid() == 0:
            os.seteuid(65534)  # root may write everywhere
        for folder in (tmp_path / "out", tmp_path / "new"):
            try:
                with output_folder(folder):
                    said.put("it was written to")
            except LthError as error:
                said.put(str(error))

    process = FORK.Process(target=work)
    process.start()
    process.join()
    for name in ("out", "new"):
        message = said.get()
        assert f"expected to write to the output folder {tmp_path / name}, found" in message
        assert "Permission denied" in message and "give another folder" in message


def test_another_error_than_that_of_the_folder_is_left_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), output_folder(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "data/a.png"))
