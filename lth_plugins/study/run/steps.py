"""Commands run each once, as many side by side as there are cores: what is there is not run again.

A step's marker, written last, holds the command and hashes of its inputs, or a digest that stands
for them; when it differs the step runs anew. What a command prints goes to a log of its own. `run`
runs steps and shows their last lines; `attempt` runs one, for whoever decides whose turn it is.
"""

import hashlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from lth_plugins.resilience.atomic import write_atomically
from lth_plugins.resilience.lock import locked
from lth_plugins.resilience.sigterm import TOLD_TO_STOP

TAIL_LINES = 25
HEARTBEAT_SECONDS = 20.0
STOP_SECONDS = 30.0  # that a command has to end by itself


class StepError(Exception):
    """A step cannot run or has failed; the message says what to look at."""


class StepStopped(StepError):
    """A step's command was told to stop (SIGTERM), as a queue does with a job; it may go on."""


@dataclass(frozen=True)
class Step:
    """A Python script with arguments, and the files that tell whether it has to run.

    Attributes:
        name: of its log and marker; unique, fit for a file name.
        title: for people, a few words.
        command: the script and its arguments, relative to the working directory.
        inputs: files whose content decides the result. Steps before may make them. Folders, too,
            where a digest stands for their content.
        outputs: what is there once the step is done.
        folder: removed before the step starts afresh; None if the script minds its own folder.
        resumes: whether the same command, started again, goes on where it was stopped.
        digest: of all that decides the result, where somebody knows better than the command and
            the content of the inputs.
    """

    name: str
    title: str
    command: tuple[str, ...]
    inputs: tuple[Path, ...] = ()
    outputs: tuple[Path, ...] = ()
    folder: Path | None = None
    resumes: bool = False
    digest: str | None = None


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


def command_line(command: Sequence[str]) -> str:
    """A script with arguments as it can be typed in the working directory that it ran in."""
    # Not resolved: the python of a virtual environment is a link out of it.
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    return shlex.join([str(python), *command])


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
        StepError: if a command fails, with the end of its log, or is told to stop. Commands that
            still run are ended then.
        TicketError: if another run works in the folder.
    """
    records: dict[str, Record] = {}
    cores = len(os.sched_getaffinity(0))
    waiting = list(steps)
    running: dict[Future[Record], Step] = {}
    with (
        locked(folder / ".lock") as lock,
        _Display(console, len(steps)) as display,
        ThreadPoolExecutor(cores) as pool,
        Commands(lock, {"OMP_NUM_THREADS": "1"}, display.line) as commands,
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


def _once(step: Step, folder: Path, commands: "Commands") -> Record:
    return _done(step, folder) or attempt(step, folder, commands)


def attempt(
    step: Step,
    folder: Path,
    commands: "Commands",
    measure: Callable[[], Mapping[str, float]] | None = None,
) -> Record:
    """Run one step, whether or not its result is there.

    Args:
        step: what to run.
        folder: gets the log, and the marker, which also tells of a failure.
        commands: runs it.
        measure: called after the command; what it returns goes into the marker, as "metrics".

    Raises:
        StepError: as `run`, and what ``measure`` raises; `StepStopped` if the command was told to
            stop, which is no failure: the marker says so.
    """
    identity = _identity(step)
    marker = read_marker(folder, step.name)
    goes_on = step.resumes and "seconds" not in marker
    goes_on = goes_on and all(marker.get(key) == value for key, value in identity.items())
    if step.folder is not None and not goes_on:
        shutil.rmtree(step.folder, ignore_errors=True)
    identity["attempts"] = marker["attempts"] + 1 if goes_on else 1
    write_marker(folder, step.name, identity)

    log = log_path(folder, step.name)
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    try:
        with log.open("a" if goes_on else "w") as file:
            file.write(f"$ {command_line(step.command)}\n")
            file.flush()
            returncode, cpu_seconds = commands.call(step, file)
        _check(step, returncode, log)
        metrics = {} if measure is None else {"metrics": dict(measure())}
    except StepError as error:
        how = "stopped" if isinstance(error, StepStopped) else "error"
        write_marker(folder, step.name, identity | {how: str(error)})
        raise
    seconds = round(time.monotonic() - started, 2)
    times = {"seconds": seconds, "cpu_seconds": round(cpu_seconds, 2)}
    write_marker(folder, step.name, identity | times | metrics)
    return Record(step, log, **times, attempts=identity["attempts"], ran=True)


def _done(step: Step, folder: Path) -> Record | None:
    marker = read_marker(folder, step.name)
    if "seconds" not in marker or not all(path.exists() for path in step.outputs):
        return None
    if any(marker[key] != value for key, value in _identity(step).items()):
        return None
    times = (marker["seconds"], marker["cpu_seconds"], marker["attempts"])
    return Record(step, log_path(folder, step.name), *times, ran=False)


def _check(step: Step, returncode: int, log: Path) -> None:
    if returncode in TOLD_TO_STOP:
        by = TOLD_TO_STOP[returncode]
        raise StepStopped(f"{step.title} was told to stop ({by}); its log is {log}")
    if returncode:
        raise StepError(
            f"{step.title} {_ending(returncode)}: {reason(log)}\nIts command:\n"
            f"{command_line(step.command)}\nThe end of {log}:\n{tail(log)}"
        )
    missing = [str(path) for path in step.outputs if not path.exists()]
    if missing:
        raise StepError(
            f"{step.title} ended without an error, but left no {', '.join(missing)}.\n"
            f"The end of {log}:\n{tail(log)}"
        )


class Commands:
    """The commands that run now. Leaving ends those that still do.

    Args:
        lock: a file to keep open: a child that outlives a killed parent keeps the lock on it, so
            that nobody else writes where it does.
        environment: variables of the commands beside those of this process.
        show: is given each step and the lines that it prints.
    """

    def __init__(
        self,
        lock: int,
        environment: Mapping[str, str],
        show: Callable[[Step, str], None] = lambda step, line: None,
    ) -> None:
        self.lock, self.environment, self.show = lock, environment, show
        self.running: set[subprocess.Popen[bytes]] = set()
        self.left = False
        self.guard = threading.Lock()

    def __enter__(self) -> "Commands":
        return self

    def __exit__(self, *_: object) -> None:
        with self.guard:
            self.left = True
            left_behind = list(self.running)
        for process in left_behind:
            process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for process in left_behind:
            # The thread that started it waits for it.
            while process.returncode is None and time.monotonic() < deadline:
                time.sleep(0.05)
            if process.returncode is None:
                process.kill()

    def call(self, step: Step, log: io.TextIOBase) -> tuple[int, float]:
        """Run the command; returns its exit code and its processor time in seconds."""
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **self.environment}
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
        try:
            self._read(step, process, log)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        except BaseException:  # this very thread is told to stop
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise
        finally:
            with self.guard:
                self.running.discard(process)
        return process.returncode, usage.ru_utime + usage.ru_stime

    def _read(self, step: Step, process: subprocess.Popen[bytes], log: io.TextIOBase) -> None:
        assert process.stdout is not None
        # newline="" also ends a line at a carriage return, with which progress bars start anew.
        with io.TextIOWrapper(process.stdout, "utf-8", "replace", newline="") as lines:
            for line in lines:
                if not line.endswith("\r"):
                    log.write(line.rstrip() + "\n")
                    log.flush()
                if line.strip():
                    self.show(step, line.strip())


def _identity(step: Step) -> dict[str, Any]:
    """What a step's result depends on, as JSON has it."""
    missing = [str(path) for path in step.inputs if not os.path.exists(path)]
    if missing:
        raise StepError(f"{step.title} needs {', '.join(missing)}, which is not there")
    if step.digest is not None:
        return {"digest": step.digest}
    inputs = {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in step.inputs}
    return {"command": list(step.command), "inputs": inputs}


def marker_path(folder: Path, name: str) -> Path:
    """What says how far a step is."""
    return folder / "steps" / f"{name}.json"


def log_path(folder: Path, name: str) -> Path:
    """What a step printed; the file need not be there."""
    return folder / "logs" / f"{name}.log"


def read_marker(folder: Path, name: str) -> dict[str, Any]:
    """The marker of a step; empty where there is none, or none that can be read."""
    try:
        content = json.loads(marker_path(folder, name).read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_marker(folder: Path, name: str, content: Mapping[str, Any]) -> None:
    """Replace the marker of a step."""
    path = marker_path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1).encode())


def tail(log: Path) -> str:
    """The last lines of a log; empty where there is none."""
    if not log.is_file():
        return ""
    return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])


def reason(log: Path) -> str:
    """Why a command failed, by its log: the last line that tells of an error, or the last line."""
    if not log.is_file():
        return "there is no log"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    header = command_line(())  # each attempt's log begins with its command
    starts = [k for k, line in enumerate(lines) if line.startswith(f"$ {header}")]
    own = [line.strip() for line in lines[starts[-1] + 1 if starts else 0 :]]
    errors = [line for line in own if _ERROR.search(line)]
    return (errors or own or ["it printed nothing"])[-1]


_ERROR = re.compile(r"(^|\W|[a-z])(error|exception)(\(.*\))?: ", re.IGNORECASE)


def _ending(returncode: int) -> str:
    if returncode < 0:
        return f"was killed by {signal.Signals(-returncode).name}"
    return f"failed with exit code {returncode}"


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
