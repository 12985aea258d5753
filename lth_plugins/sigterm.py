"""SIGTERM, by which a queue tells a training to go: it ends its step, saves, and exits.

What to save, and when, is the hosts' part: `ResumeHook` of both plug-ins, and Lightning's
`lth_plugins.pretrain.fit.SaveLast`.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import distributed
from torch.multiprocessing import ProcessExitedException

EXIT_CODE = 128 + signal.SIGTERM
"""Of a tool that was told to stop, has saved, and goes on when it is started again."""

TOLD_TO_STOP = (EXIT_CODE, -signal.SIGTERM)
"""How a process ends that was told to stop: it saved and left, or had nothing to save."""


@contextlib.contextmanager
def handled(signum: signal.Signals, handler: Any) -> Iterator[None]:
    """Have a signal handled so, and afterwards as before; in the main thread only."""
    before = signal.signal(signum, handler)
    try:
        yield
    finally:
        signal.signal(signum, before)


@contextlib.contextmanager
def passed_on() -> Iterator[None]:
    """Pass SIGTERM on to the processes that are started meanwhile, and exit as they do.

    For what trains in processes of its own, such as detectron2's ``launch``: the one that a queue
    knows only waits for them.

    Raises:
        SystemExit: if one of them has stopped, or has ended without success and said why itself.
    """

    def pass_on(signum: int, frame: FrameType | None) -> None:
        children = multiprocessing.active_children()
        if not children:
            raise SystemExit(EXIT_CODE)
        for child in children:
            child.terminate()

    try:
        with handled(signal.SIGTERM, pass_on):
            yield
    except ProcessExitedException as ended:
        if ended.exit_code in TOLD_TO_STOP:
            raise SystemExit(EXIT_CODE) from None
        if ended.exit_code < 0:
            raise  # killed, or crashed
        raise SystemExit(ended.exit_code) from None


_trainings: weakref.WeakSet[Any] = weakref.WeakSet()


def spare_workers(training: Any) -> None:
    """Have processes that are forked from now on obey no SIGTERM but their parent's.

    Slurm sends it to all processes of a job, and a training does not end its step when its
    DataLoader's workers are gone.

    Args:
        training: for as long as this object lives.
    """
    _trainings.add(training)


_masks = threading.local()


def _before_fork() -> None:
    # Libraries start threads in a child before Python runs there; these must not take it, either.
    blocked = {signal.SIGTERM} if _trainings else ()
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
    """Hears SIGTERM from now until `close`, and lets a step end first.

    Where several processes train, each has to make one at the same time.

    Attributes:
        told: whether SIGTERM came, to this process.
        heard: whether it came and is to be obeyed: in a step, once all agreed in `heard_by_any`.
        in_step: set while the training's state is not whole. Outside of a step SIGTERM raises
            ``SystemExit`` at once, wherever the process is; but only the first.
    """

    def __init__(self) -> None:
        self.told = self.heard = self.in_step = False
        # Not the training's own group, which on GPUs would wait for them in each step.
        several = distributed.is_initialized() and distributed.get_world_size() > 1
        self._group = distributed.new_group(backend="gloo") if several else None
        self._before = signal.getsignal(signal.SIGTERM)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._hear)

    def heard_by_any(self) -> bool:
        """Whether SIGTERM came to any process of the training; all have to ask."""
        told = torch.tensor(int(self.told))
        if self._group is not None:
            # What comes meanwhile counts in the next step: the others do not know of it.
            distributed.all_reduce(told, distributed.ReduceOp.MAX, group=self._group)
        self.heard = bool(told)
        return self.heard

    def close(self) -> None:
        """Let SIGTERM do again what it did before."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._before)

    def _hear(self, signum: int, frame: FrameType | None) -> None:
        self.told = True
        if not self.in_step and not self.heard:  # who has heard it, saves: a launcher may repeat it
            self.heard = True
            raise SystemExit(EXIT_CODE)
