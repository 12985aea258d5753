"""Commands run each once, as many side by side as there are cores: what is there is not run again.

A step's marker, written last, holds the command and hashes of its inputs; when either differs the
step runs anew. What a command prints goes to a log of its own, and its last line to the terminal.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from lth_plugins.ticket.file import replace_file

TAIL_LINES = 25
HEARTBEAT_SECONDS = 20.0


class StepError(Exception):
    """A step cannot run or has failed; the message says what to look at."""


@dataclass(frozen=True)
class Step:
    """A Python script with arguments, and the files that tell whether it has to run.

    Attributes:
        name: of its log and marker; unique, fit for a file name.
        title: for people, a few words.
        command: the script and its arguments, relative to the working directory.
        inputs: files whose content decides the result. Steps before may make them.
        outputs: what is there once the step is done.
        folder: removed before the step starts afresh; None if the script minds its own folder.
        resumes: whether the same command, started again, goes on where it was stopped.
    """

    name: str
    title: str
    command: tuple[str, ...]
    inputs: tuple[Path, ...] = ()
    outputs: tuple[Path, ...] = ()
    folder: Path | None = None
    resumes: bool = False


@dataclass(frozen=True)
class Record:
    """A finished step.

    Attributes:
        step: the step.
        log: what it printed.
        seconds: its wall time; of the last attempt, if it was stopped and went on.
        cpu_seconds: processor time, of all cores together.
        attempts: how often it was started until it was done.
        ran: False if its result was there already.
    """

    step: Step
    log: Path
    seconds: float
    cpu_seconds: float
    attempts: int
    ran: bool


def command_line(step: Step) -> str:
    """The command as it can be typed in the working directory that it ran in."""
    # Not resolved: the python of a virtual environment is a link out of it.
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    return shlex.join([str(python), *step.command])


def run(steps: Sequence[Step], folder: Path, console: Console) -> dict[str, Record]:
    """Run steps in the working directory, with this Python.

    As many run at once as there are cores to use, each with one thread: small networks gain more
    from that than from threads, and numbers do not depend on how many cores there are. A step
    waits for those before it that make its inputs.

    Args:
        steps: what to run.
        folder: gets ``logs/NAME.log`` and ``steps/NAME.json``, the markers.
        console: where to show progress; a terminal shows a bar, a file gets lines.

    Returns:
        The record of each step, by name, in the order of ``steps``.

    Raises:
        StepError: if a command fails, with the end of its log, or another run works in the folder.
            Commands that still run are ended then.
    """
    records: dict[str, Record] = {}
    cores = len(os.sched_getaffinity(0))
    waiting = list(steps)
    running: dict[Future[Record], Step] = {}
    with (
        _locked(folder) as lock,
        _Display(console, len(steps)) as display,
        ThreadPoolExecutor(cores) as pool,
        _Commands(lock, display.line) as commands,
    ):
        while waiting or running:
            for step in _ready(waiting, running.values())[: cores - len(running)]:
                waiting.remove(step)
                display.start(step)
                running[pool.submit(_once, step, folder, commands)] = step
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                step = running.pop(future)
                records[step.name] = future.result()
                display.finish(records[step.name])
    return {step.name: records[step.name] for step in steps}


def _ready(waiting: Sequence[Step], running: Iterable[Step]) -> list[Step]:
    """The steps whose inputs no unfinished step before them makes."""
    ready = []
    unfinished = {path for step in running for path in step.outputs}
    for step in waiting:
        if unfinished.isdisjoint(step.inputs):
            ready.append(step)
        unfinished.update(step.outputs)
    return ready


def _once(step: Step, folder: Path, commands: "_Commands") -> Record:
    return _done(step, folder) or _run(step, folder, commands)


def _done(step: Step, folder: Path) -> Record | None:
    marker = _read_marker(step, folder)
    if "seconds" not in marker or not all(path.exists() for path in step.outputs):
        return None
    if any(marker[key] != value for key, value in _identity(step).items()):
        return None
    times = (marker["seconds"], marker["cpu_seconds"], marker["attempts"])
    return Record(step, _log_path(step, folder), *times, ran=False)


def _run(step: Step, folder: Path, commands: "_Commands") -> Record:
    identity = _identity(step)
    marker = _read_marker(step, folder)
    goes_on = step.resumes and "seconds" not in marker
    goes_on = goes_on and all(marker.get(key) == value for key, value in identity.items())
    if step.folder is not None and not goes_on:
        shutil.rmtree(step.folder, ignore_errors=True)
    attempts = marker["attempts"] + 1 if goes_on else 1
    _write_marker(step, folder, identity | {"attempts": attempts})

    log = _log_path(step, folder)
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with log.open("a" if goes_on else "w") as file:
        file.write(f"$ {command_line(step)}\n")
        returncode, cpu_seconds = commands.call(step, file)
    if returncode:
        raise StepError(
            f"{step.title} failed with exit code {returncode}. Its command:\n"
            f"{command_line(step)}\nThe end of {log}:\n{_tail(log)}"
        )
    missing = [str(path) for path in step.outputs if not path.exists()]
    if missing:
        raise StepError(
            f"{step.title} ended without an error, but left no {', '.join(missing)}. "
            f"The end of {log}:\n{_tail(log)}"
        )
    seconds = round(time.monotonic() - started, 2)
    times = {"seconds": seconds, "cpu_seconds": round(cpu_seconds, 2)}
    _write_marker(step, folder, identity | {"attempts": attempts} | times)
    return Record(step, log, **times, attempts=attempts, ran=True)


class _Commands:
    """The commands that run now. Leaving ends those that still do.

    Args:
        lock: a file to keep open: a child that outlives a killed parent keeps the lock on it, so
            that nobody else writes where it does.
        show: is given each step and the lines that it prints.
    """

    def __init__(self, lock: int, show: Callable[[Step, str], None]) -> None:
        self.lock, self.show = lock, show
        self.running: set[subprocess.Popen[bytes]] = set()
        self.left = False
        self.guard = threading.Lock()

    def __enter__(self) -> "_Commands":
        return self

    def __exit__(self, *_: object) -> None:
        with self.guard:
            self.left = True
            left_behind = list(self.running)
        for process in left_behind:
            process.terminate()
        deadline = time.monotonic() + 10
        for process in left_behind:
            # The thread that started it waits for it.
            while process.returncode is None and time.monotonic() < deadline:
                time.sleep(0.05)
            if process.returncode is None:
                process.kill()

    def call(self, step: Step, log: io.TextIOBase) -> tuple[int, float]:
        """Run the command; returns its exit code and its processor time in seconds."""
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        with self.guard:
            if self.left:
                raise StepError(f"{step.title} was not started: another step failed")
            process = subprocess.Popen(
                [sys.executable, *step.command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[self.lock],
            )
            self.running.add(process)
        assert process.stdout is not None
        # newline="" also ends a line at a carriage return, with which progress bars start anew.
        with io.TextIOWrapper(process.stdout, "utf-8", "replace", newline="") as lines:
            for line in lines:
                if not line.endswith("\r"):
                    log.write(line.rstrip() + "\n")
                    log.flush()
                if line.strip():
                    self.show(step, line.strip())
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        with self.guard:
            self.running.discard(process)
        return process.returncode, usage.ru_utime + usage.ru_stime


def _identity(step: Step) -> dict[str, Any]:
    """What a step's result depends on, as JSON has it."""
    missing = [str(path) for path in step.inputs if not path.is_file()]
    if missing:
        raise StepError(f"{step.title} needs {', '.join(missing)}, which is not there")
    inputs = {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in step.inputs}
    return {"command": list(step.command), "inputs": inputs}


def _marker_path(step: Step, folder: Path) -> Path:
    return folder / "steps" / f"{step.name}.json"


def _log_path(step: Step, folder: Path) -> Path:
    return folder / "logs" / f"{step.name}.log"


def _read_marker(step: Step, folder: Path) -> dict[str, Any]:
    try:
        return json.loads(_marker_path(step, folder).read_text())
    except FileNotFoundError:
        return {}


def _write_marker(step: Step, folder: Path, content: dict[str, Any]) -> None:
    path = _marker_path(step, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(content, indent=1).encode())


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int]:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StepError(
                f"another run, or a step that one left behind, still works in {folder}: "
                "wait for it or end it, then start again"
            ) from None
        yield lock.fileno()


class _Bar(Progress):
    """A progress bar with a line of text below for each of several things."""

    below: Iterable[str] = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for line in list(self.below):
            yield Text(line, style="dim", no_wrap=True, overflow="ellipsis")


class _Display:
    """How far the steps are: a bar and what each printed last, or, in a file, plain lines."""

    def __init__(self, console: Console, total: int) -> None:
        self.console = console
        self.total = total
        self.finished = 0
        self.last: dict[str, str] = {}  # what each running step printed last, by its title
        self.shown: dict[str, float] = {}
        self.bar = _Bar(
            BarColumn(20),
            TextColumn("{task.completed:.0f} of {task.total:.0f} steps done"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("", total=total)

    def __enter__(self) -> "_Display":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def start(self, step: Step) -> None:
        self.shown[step.title] = time.monotonic()
        self._tell(step, "")
        if not self.console.is_terminal:
            self._print(f"{step.title} …")

    def line(self, step: Step, text: str) -> None:
        """Show what a step printed; in a file now and then, where its log has it all."""
        self._tell(step, text)
        now = time.monotonic()
        if not self.console.is_terminal and now - self.shown[step.title] > HEARTBEAT_SECONDS:
            self.shown[step.title] = now
            self._print(f"    {step.title}: {text[:160]}")

    def finish(self, record: Record) -> None:
        self.finished += 1
        del self.last[record.step.title]
        self.bar.below = tuple(self.last.values())
        self.bar.update(self.task, completed=self.finished)
        took = f"{record.seconds:.0f} s (processor {record.cpu_seconds:.0f} s)"
        done = f"done in {took}" if record.ran else f"was done already, in {took}"
        self._print(f"[{self.finished}/{self.total}] {record.step.title}: {done}")

    def _tell(self, step: Step, text: str) -> None:
        self.last[step.title] = f"{step.title}: {text}"
        self.bar.below = tuple(self.last.values())

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
