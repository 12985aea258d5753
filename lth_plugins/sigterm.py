"""SIGTERM, by which a queue tells a training to go: it ends its step, saves, and exits.

What to save, and when, is the plug-ins' part (`ResumeHook` of both); Lightning has its own.
"""

import signal
import threading
from types import FrameType

import torch
from torch import distributed

EXIT_CODE = 128 + signal.SIGTERM
"""Of a tool that was told to stop, has saved, and goes on when it is started again."""


class Sigterm:
    """Hears SIGTERM from now until `close`, and lets a step end first.

    Where several processes train, each has to make one at the same time.

    Attributes:
        told: whether SIGTERM came, to this process.
        heard: whether it came and is to be obeyed: in a step, once all agreed in `heard_by_any`.
        in_step: set while the training's state is not whole. Outside of a step SIGTERM raises
            ``SystemExit`` at once, wherever the process is.
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
        if not self.in_step:
            self.heard = True
            raise SystemExit(EXIT_CODE)
