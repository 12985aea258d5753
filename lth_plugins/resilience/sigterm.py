"""SIGTERM, by which a queue stops a training, and Ctrl-C: it ends its step, saves, and exits.

What to save, and when, is the hosts' part: `ResumeHook` of both plug-ins, and Lightning's
`lth_plugins.training.fit.SaveLast`. What a person then reads is `lth_plugins.cli`'s.
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
from typing import Any, NoReturn

import torch
from torch import distributed
from torch.multiprocessing import ProcessExitedException

EXIT_CODE = 128 + signal.SIGTERM
"""Of a tool that was stopped by SIGTERM; started again, it resumes."""

INTERRUPTED = 128 + signal.SIGINT
"""Of a tool that was stopped by Ctrl-C; started again, it resumes."""

TOLD_TO_STOP = {
    EXIT_CODE: "SIGTERM",
    -signal.SIGTERM: "SIGTERM",
    INTERRUPTED: "Ctrl-C",
    -signal.SIGINT: "Ctrl-C",
}
"""How a process ends that was told to stop, and by what: it saved, or had nothing to save."""

REPEATED = 0.5
"""Seconds within which a second SIGINT is the same Ctrl-C, which launchers pass on."""


class Stopped(SystemExit):
    """A stop that a signal asked for; the exit code says which.

    Args:
        signum: the signal.

    Attributes:
        saved: the checkpoint that was saved on the way, if any.
    """

    saved: str | PathLike[str] | None = None

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)


_told_at: dict[int, float] = {}  # when each signal first came; launchers repeat them


def _told_before(signum: int) -> bool:
    """Whether this process was told to stop before this signal. A second Ctrl-C ends it at once."""
    now, before = time.monotonic(), bool(_told_at)
    if signum == signal.SIGINT and now - _told_at.get(signum, now) > REPEATED:
        for child in multiprocessing.active_children():
            child.kill()
        os.write(2, b"stopped at once\n")
        os._exit(INTERRUPTED)
    _told_at.setdefault(signum, now)
    return before


def _listen(hear: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Have both signals call this, and return their former handlers; in the main thread only.

    Ctrl-C stays ignored where it was, as in background jobs.
    """
    _told_at.clear()
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
    """Have SIGTERM and Ctrl-C raise `Stopped` meanwhile, once, wherever the main thread is.

    A `Sigterm` made meanwhile hears them in its place. Processes that are forked obey neither, but
    for their parent's SIGTERM.
    """

    def hear(signum: int, frame: FrameType | None) -> None:
        if not _told_before(signum):
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
    """Have Ctrl-C be heard only afterwards; processes started meanwhile never hear it.

    For those that this one stops itself, in order.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def passed_on() -> Iterator[None]:
    """Pass SIGTERM and Ctrl-C on to the processes started meanwhile, and exit as they do.

    For what trains in processes of its own, such as detectron2's ``launch``: the one that a queue
    knows only waits for them.

    Raises:
        SystemExit: if one of them has stopped, or has ended without success and said why itself.
    """

    def pass_on(signum: int, frame: FrameType | None) -> None:
        _told_before(signum)
        children = multiprocessing.active_children()
        if not children:
            raise Stopped(signum)
        for child in children:
            child.terminate()

    before = _listen(pass_on)
    try:
        yield
    except ProcessExitedException as ended:
        if ended.exit_code in TOLD_TO_STOP:
            interrupted = INTERRUPTED in (ended.exit_code, *(128 + signum for signum in _told_at))
            raise Stopped(signal.SIGINT if interrupted else signal.SIGTERM) from None
        if ended.exit_code < 0:
            raise  # killed, or crashed
        raise SystemExit(ended.exit_code) from None
    finally:
        _restore(before)


_trainings: weakref.WeakSet[Any] = weakref.WeakSet()


def spare_workers(training: Any) -> None:
    """Have processes that are forked from now on obey no SIGTERM but their parent's, and no Ctrl-C.

    Slurm sends SIGTERM to all processes of a job, a terminal Ctrl-C to all that it started, and a
    training does not end its step when its DataLoader's workers are gone.

    Args:
        training: for as long as this object lives.
    """
    _trainings.add(training)


_masks = threading.local()


def _before_fork() -> None:
    # Libraries start threads in a child before Python runs there; these must not take it, either.
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

    Where several processes train, each has to make one at the same time.

    Attributes:
        told: the signal that came to this process; 0 before.
        heard: whether one came and is to be obeyed: in a step, once all agreed in `heard_by_any`.
        stopped: what to raise once it is heard; whoever saves on the way notes that in it.
        in_step: set while the training's state is not whole. Outside of a step a signal raises
            `Stopped` at once, wherever the process is; but only the first.
    """

    def __init__(self) -> None:
        self.heard = self.in_step = False
        self.told = 0
        self.stopped: Stopped | None = None
        # Not the training's own group, which on GPUs would wait for them in each step.
        several = distributed.is_initialized() and distributed.get_world_size() > 1
        self._group = distributed.new_group(backend="gloo") if several else None
        self._before = _listen(self._hear)

    def heard_by_any(self) -> bool:
        """Whether a signal came to any process of the training; all have to ask."""
        told = torch.tensor(self.told)
        if self._group is not None:
            # What comes meanwhile counts in the next step: the others do not know of it.
            distributed.all_reduce(told, distributed.ReduceOp.MAX, group=self._group)
        self.heard = bool(told)
        if self.heard and self.stopped is None:
            self.stopped = Stopped(int(told))
        return self.heard

    def stop(self, saved: str | PathLike[str] | None = None) -> NoReturn:
        """End the program, once a signal came.

        Args:
            saved: the checkpoint that a run resumes from.

        Raises:
            Stopped: always.
        """
        stopped = self.stopped or Stopped(self.told)
        stopped.saved = saved
        raise stopped

    def close(self) -> None:
        """Let the signals do again what they did before."""
        _restore(self._before)

    def _hear(self, signum: int, frame: FrameType | None) -> None:
        if _told_before(signum):  # a launcher may repeat it while this saves
            return
        self.told = signum
        if not self.in_step:
            self.heard, self.stopped = True, Stopped(signum)
            raise self.stopped
