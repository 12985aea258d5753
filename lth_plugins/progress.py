"""How far something is, in words: every tool says so at least every ten seconds."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

QUIET_SECONDS = 8.0
"""After that long without a line, one says what is going on."""


def duration(seconds: float) -> str:
    """A time for people: 12 s, 3 min, 5.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class Pace:
    """The time that is left for a number of steps, from those made since this was created.

    Args:
        start: steps made before, such as those of an earlier start.
        steps: all there are.
    """

    def __init__(self, start: int, steps: int) -> None:
        self.start, self.steps = start, steps
        self._began = time.monotonic()

    def after(self, step: int) -> str:
        """How far it is: "step 20 of 90, about 35 s left"."""
        made = step - self.start
        said = f"step {step} of {self.steps}"
        if made < 1:
            return said
        each = (time.monotonic() - self._began) / made
        return f"{said}, about {duration(each * (self.steps - step))} left"


class Ticker:
    """Says how far a training of any host is, as soon as nothing was said for a while.

    Args:
        say: logs a line.
        start: steps made before, such as those of an earlier start.
        steps: all there are.
    """

    def __init__(self, say: Callable[[str], None], start: int, steps: int) -> None:
        self.pace = Pace(start, steps)
        self._say, self._said = say, time.monotonic()

    def after(self, step: int) -> None:
        """A step was made."""
        self.say(lambda: self.pace.after(step))

    def say(self, text: Callable[[], str]) -> None:
        """Say something, unless it is too soon."""
        if time.monotonic() - self._said >= QUIET_SECONDS:
            self._said = time.monotonic()
            self._say(text())


def intent(trains: str, images: int, steps: int, batch: int, folder: object) -> str:
    """What a training is about to do, in one line.

    Args:
        trains: the model, and the data.
        images: of the data.
        steps: of the optimizer.
        batch: images per step, over all processes.
        folder: where results go.
    """
    return f"Trains {trains}: {images:,} images, {steps:,} steps of {batch}; results go to {folder}"


@contextmanager
def heard(say: Callable[[str], None], what: str) -> Iterator[None]:
    """Say every few seconds that something which is itself silent goes on.

    Args:
        say: prints a line; another thread calls it.
        what: goes on.
    """
    began, over = time.monotonic(), threading.Event()

    def speak() -> None:
        while not over.wait(QUIET_SECONDS):
            say(f"    {what}: {duration(time.monotonic() - began)} so far")

    speaker = threading.Thread(target=speak, name="heard", daemon=True)
    speaker.start()
    try:
        yield
    finally:
        over.set()
        speaker.join()
