"""Stops a training on SIGTERM, when it is preempted, or Ctrl-C: its step ends, it saves and exits.

`Sigterm` is the protocol that every host follows: should this step be the last, on all ranks; save;
say what was saved. How a host saves, and where it asks, is the host's. What a person then reads is
`lth_plugins.cli`'s.

PyTorch is imported where a training asks: a command that needs none starts faster.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from os import PathLike
from types import FrameType
from typing import Any

from lth_plugins.resilience.exit_codes import INTERRUPTED, STOPPED_BY

REPEATED = 0.5
"""Within this many seconds a second SIGINT is the same Ctrl-C, passed on by a launcher."""


Saved = str | PathLike[str] | None
"""The checkpoint that a run resumes from."""


class Stopped(SystemExit):
    """Ends the program on a signal; the exit code says which.

    Args:
        signum: the signal.

    Attributes:
        saved: the checkpoint that was saved, if any.
    """

    saved: Saved = None

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)


_came_at: dict[int, float] = {}  # when each signal first came; launchers repeat them


def _came_before(signum: int) -> bool:
    """Whether a signal came before this one. A second Ctrl-C ends the process at once."""
    now, before = time.monotonic(), bool(_came_at)
    if signum == signal.SIGINT and now - _came_at.get(signum, now) > REPEATED:
        for child in multiprocessing.active_children():
            child.kill()
        os.write(2, b"stopped at once\n")
        os._exit(INTERRUPTED)
    _came_at.setdefault(signum, now)
    return before


def _listen(hear: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Handle both signals with this, and return their former handlers; in the main thread only.

    Ctrl-C stays ignored where it was, as in background jobs.
    """
    _came_at.clear()
    if threading.current_thread() is not threading.main_thread():
        return {}
    wanted = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        wanted.append(signal.SIGINT)
    return {signum: signal.signal(signum, hear) for signum in wanted}


def _restore(before: dict[int, Any]) -> None:
    if threading.current_thread() is threading.main_thread():
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM and Ctrl-C raise `Stopped`, once, wherever the main thread is.

    A `Sigterm` that is made meanwhile hears them instead. Forked processes obey only their parent's
    SIGTERM.
    """

    def hear(signum: int, frame: FrameType | None) -> None:
        if not _came_before(signum):
            raise Stopped(signum)

    lives = threading.Event()  # any object that can be referred to weakly
    spare_workers(lives)
    before = _listen(hear)
    try:
        yield
    except KeyboardInterrupt:  # raised by a library itself
        raise Stopped(signal.SIGINT) from None
    finally:
        _restore(before)


@contextlib.contextmanager
def ctrl_c_waits() -> Iterator[None]:
    """Delay Ctrl-C until afterwards; processes started meanwhile never hear it.

    For processes that this one stops itself, in order.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def passed_on() -> Iterator[None]:
    """Pass SIGTERM and Ctrl-C on to the processes started meanwhile, and exit as they do.

    For what trains in processes of its own, such as detectron2's ``launch``: the process that a
    queue knows only waits for them.

    Raises:
        SystemExit: if one of them stopped, or failed and said why itself.
    """

    def pass_on(signum: int, frame: FrameType | None) -> None:
        _came_before(signum)
        children = multiprocessing.active_children()
        if not children:
            raise Stopped(signum)
        for child in children:
            child.terminate()

    from torch.multiprocessing import ProcessExitedException

    before = _listen(pass_on)
    try:
        yield
    except ProcessExitedException as ended:
        if ended.exit_code in STOPPED_BY:
            interrupted = INTERRUPTED in (ended.exit_code, *(128 + signum for signum in _came_at))
            raise Stopped(signal.SIGINT if interrupted else signal.SIGTERM) from None
        if ended.exit_code < 0:
            raise  # killed, or crashed
        raise SystemExit(ended.exit_code) from None
    finally:
        _restore(before)


_trainings: weakref.WeakSet[Any] = weakref.WeakSet()


def spare_workers(training: Any) -> None:
    """Let processes that are forked from now on obey only their parent's SIGTERM, and no Ctrl-C.

    Slurm sends SIGTERM to all processes of a job, a terminal sends Ctrl-C to all that it started,
    and a training cannot end its step when the workers of its DataLoader are gone.

    Args:
        training: for as long as this object lives.
    """
    _trainings.add(training)


_masks = threading.local()


def _before_fork() -> None:
    # Libraries start threads in a child before Python runs there: block the signals for them, too.
    blocked = {signal.SIGTERM, signal.SIGINT} if _trainings else ()
    _masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)


def _after_fork_in_parent() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.before)


def _after_fork_in_child() -> None:
    if _trainings:
        threading.Thread(target=_wait_for_the_parent, daemon=True).start()


def _wait_for_the_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)  # PyTorch takes anything else for a failure


if hasattr(signal, "sigwaitinfo"):  # macOS has none
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )


class Sigterm:
    """Hears SIGTERM and Ctrl-C from now until `close`, and lets a step end first.

    A host that asks after every step, `stop_if_asked`, makes one and needs no more. A host that
    cannot ask everywhere, as while it evaluates, sets `in_step` around its steps: outside of one
    a signal raises `Stopped` at once, wherever the process is, and `end` saves. Where several
    processes train, each makes one at the same time.

    Attributes:
        in_step: whether the training's state is incomplete. A signal then waits for the next ask.
        stopped: what ended the training, once a signal did.
    """

    def __init__(self, in_step: bool = True) -> None:
        self.in_step = in_step
        self.stopped: Stopped | None = None
        self._signum = 0
        from torch import distributed

        # Not the training's own group, which on GPUs would wait for them in each step.
        several = distributed.is_initialized() and distributed.get_world_size() > 1
        self._group = distributed.new_group(backend="gloo") if several else None
        self._before = _listen(self._hear)

    def stop_if_asked(self, save: Callable[[], Saved], alone: bool = False) -> None:
        """If a signal came, save, stop listening, and end the program.

        Args:
            save: writes the checkpoint of the state between two steps, unless it exists; returns
                its path, or None where nothing is saved yet.
            alone: whether this process asks without the others. Else all ask at the same step, and
                all stop there when a signal came to any.

        Raises:
            Stopped: if a signal came.
        """
        signum = self._signum if alone else self.asked()
        if not signum:
            return
        self.stopped, self.in_step = Stopped(signum), False
        self.stopped.saved = save()
        self.close()
        raise self.stopped

    def end(self, save: Callable[[], Saved]) -> None:
        """Stop listening after a training, however it ended.

        If a signal ended it outside of a step, nothing was saved then: save now.

        Args:
            save: as that of `stop_if_asked`.
        """
        self.close()
        if self.stopped is not None and self.stopped.saved is None:
            self.stopped.saved = save()

    def close(self) -> None:
        """Restore the signals' former handlers."""
        _restore(self._before)

    def asked(self) -> int:
        """The signal that came to any process of the training; 0 where none did.

        For a host that saves after its step, where it calls `stop_if_asked`. All processes ask.
        """
        import torch
        from torch import distributed

        signum = torch.tensor(self._signum)
        if self._group is not None:
            # A signal that comes meanwhile counts in the next step: the others do not know of it.
            distributed.all_reduce(signum, distributed.ReduceOp.MAX, group=self._group)
        return int(signum)

    def _hear(self, signum: int, frame: FrameType | None) -> None:
        if _came_before(signum):  # a launcher may repeat it while this saves
            return
        self._signum = signum
        if not self.in_step:
            self.stopped = Stopped(signum)
            raise self.stopped
