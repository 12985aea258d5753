"""Measure time in turns, memory at its peak, and the machine's bandwidth.

Nothing here knows what is measured.
"""

import contextlib
import cProfile
import ctypes
import gc
import os
import pstats
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], object]
Way = Callable[[], Run]
"""Prepares one repetition, untimed, and returns the function to time."""

_clock: Callable[[], float] = time.perf_counter


def count_processor_time() -> None:
    """From now on measure the processor's time: what other work takes away is not counted."""
    global _clock
    _clock = time.process_time
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Times:
    """Repetitions of one way, in seconds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """The interquartile range."""
        low, high = np.percentile(self.seconds, (25, 75))
        return float(high - low)

    def over(self, other: "Times") -> float:
        """The median of this one's times over the other's, repetition by repetition."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)

    def __str__(self) -> str:
        unit, scale = ("s", 1) if self.median >= 1 else ("ms", 1000)
        spread = f" ± {scale * self.spread:.2g}" if len(self.seconds) > 1 else ""
        return f"{scale * self.median:.3g} {unit}{spread}"


def in_turns(ways: Mapping[str, Way], repeats: int, warm_up: int = 1) -> dict[str, Times]:
    """Time several ways in turns, ABCABC…: a slow phase of the machine slows all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(-warm_up, repeats):
        for name, way in ways.items():
            taken = seconds_of(way())
            if repetition >= 0:
                seconds[name].append(taken)
    return {name: Times(tuple(values)) for name, values in seconds.items()}


@contextlib.contextmanager
def other_work() -> Iterator[None]:
    """Keep every core busy with a process that only counts."""
    command = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(command) for _ in os.sched_getaffinity(0)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def seconds_of(run: Run) -> float:
    """The seconds that this takes, until a GPU has finished, too."""
    _finish()
    started = _clock()
    result = run()
    _finish()
    taken = _clock() - started
    del result  # freeing it is not part of it
    return taken


def _finish() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy of memory reads and writes together."""
    source = torch.ones(1 << 26, device=device)
    target = torch.empty_like(source)
    copies = in_turns({"copy": lambda: lambda: target.copy_(source)}, repeats=9, warm_up=2)
    return 2 * source.nbytes / min(copies["copy"].seconds)


def peak_extra_rss(prepare: Callable[..., Run], *args: Any) -> int:
    """The bytes by which the resident memory of a new process grows at most while it runs this.

    The kernel keeps this high-water mark, so that all allocators count. Nothing is warmed up. What
    the preparation freed goes back to the kernel, since reusing it would not be seen.
    """
    context = get_context("forkserver")  # each starts from one that has only imported
    context.set_forkserver_preload([prepare.__module__, "torchvision"])
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_grow, prepare, args).result()


def _grow(prepare: Callable[..., Run], args: tuple[Any, ...]) -> int:
    torch.set_num_threads(2)
    run = prepare(*args)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the mark falls to what is resident now
    before = _high_water()
    result = run()
    after = _high_water()
    del result
    return after - before


def _high_water() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (mark,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
    return 1024 * int(mark)


def peak_of_tensors(run: Run, device: torch.device) -> int:
    """The bytes by which PyTorch's allocator grows at most while this runs."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = profiled.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return int(np.cumsum([nbytes for _, nbytes in sorted(changes)]).max())


def seconds_in(run: Run, functions: set[str], device: torch.device) -> float:
    """The seconds of one run in Python functions of these names; on a GPU, in operators.

    The autograd engine runs hooks on the CPU in the thread that called it, where cProfile sees
    them, whatever library they use; those on a GPU only start kernels, which PyTorch's profiler
    times.
    """
    if device.type == "cuda":
        activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        with profile(activities=activities) as profiled:
            run()
            _finish()
        found = [e for e in profiled.key_averages() if e.key in functions]
        return sum(e.device_time_total for e in found) / 1e6
    profiler = cProfile.Profile(_clock)
    profiler.runcall(run)
    stats = pstats.Stats(profiler).get_stats_profile().func_profiles
    return sum(value.cumtime for name, value in stats.items() if name in functions)
