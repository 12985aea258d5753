"""`attempt` runs one command, and leaves a log of what it printed and a marker of how it ended.

The marker is written last and atomically. It holds what identifies the step, its times and its
metrics, or why it failed.
"""

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lth_plugins.errors import RunError
from lth_plugins.resilience.atomic import write_atomically
from lth_plugins.resilience.exit_codes import STOPPED_BY

TAIL_LINES = 25
STOP_SECONDS = 30.0  # that a command has to end by itself


class StepError(RunError):
    """A step cannot run or has failed; the message says what to look at."""


class StepStopped(StepError):
    """A step's command ended on SIGTERM or Ctrl-C, as when a job is preempted; it may resume."""


@dataclass(frozen=True)
class Step:
    """A Python script with arguments.

    Attributes:
        name: of its log and marker; unique, fit for a file name.
        title: a few words for people.
        command: the script and its arguments, relative to the working directory.
        inputs: files and folders that have to be there.
        outputs: what is there once the step is done.
        folder: removed before the step starts afresh; None if the script manages its own folder.
        resumes: whether the same command, started again, resumes where it was stopped.
        digest: of all that decides the result; of the command where it is "".
    """

    name: str
    title: str
    command: tuple[str, ...]
    inputs: tuple[Path, ...] = ()
    outputs: tuple[Path, ...] = ()
    folder: Path | None = None
    resumes: bool = False
    digest: str = ""


def command_line(command: Sequence[str]) -> str:
    """A script with arguments as it can be typed in the working directory that it ran in."""
    # Not resolved: the python of a virtual environment is a link out of it.
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    return shlex.join([str(python), *command])


def attempt(
    step: Step,
    folder: Path,
    lock: int,
    environment: Mapping[str, str] | None = None,
    measure: Callable[[], Mapping[str, float]] | None = None,
) -> None:
    """Run one step, even if its result exists.

    Args:
        step: what to run.
        folder: gets the log, and the marker, which also tells of a failure.
        lock: a file to keep open. A child that outlives a killed parent keeps the lock on it, so
            that no other process writes to the same folder.
        environment: variables of the command beside those of this process.
        measure: called after the command; returns the metrics for the marker.

    Raises:
        StepError: if an input is missing, the command fails or leaves no output, or ``measure``
            raises it. `StepStopped` if the command was stopped, which is no failure.
    """
    missing = [str(path) for path in step.inputs if not os.path.exists(path)]
    if missing:
        raise StepError(f"{step.title} needs {', '.join(missing)}, which is not there")
    identity: dict[str, Any] = {"digest": step.digest or shlex.join(step.command)}
    marker = read_marker(folder, step.name)
    same = marker.get("digest") == identity["digest"]
    resumes = step.resumes and same and "seconds" not in marker
    if step.folder is not None and not resumes:
        shutil.rmtree(step.folder, ignore_errors=True)
    identity["attempts"] = marker["attempts"] + 1 if resumes else 1
    write_marker(folder, step.name, identity)

    log = log_path(folder, step.name)
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    try:
        with log.open("a" if resumes else "w") as file:
            file.write(f"$ {command_line(step.command)}\n")
            file.flush()
            returncode, cpu_seconds = _call(step, file, lock, environment or {})
        _check(step, returncode, log)
        metrics = {} if measure is None else {"metrics": dict(measure())}
    except StepError as error:
        how = "stopped" if isinstance(error, StepStopped) else "error"
        write_marker(folder, step.name, identity | {how: str(error)})
        raise
    seconds = round(time.monotonic() - started, 2)
    times = {"seconds": seconds, "cpu_seconds": round(cpu_seconds, 2)}
    write_marker(folder, step.name, identity | times | metrics)


def _check(step: Step, returncode: int, log: Path) -> None:
    if returncode in STOPPED_BY:
        by = STOPPED_BY[returncode]
        raise StepStopped(f"{step.title} was stopped ({by}); its log is {log}")
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


def _call(
    step: Step, log: io.TextIOBase, lock: int, environment: Mapping[str, str]
) -> tuple[int, float]:
    """Run the command and return its exit code and its processor time in seconds."""
    process = subprocess.Popen(
        [sys.executable, *step.command],
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=[lock],
    )
    try:
        _copy(process, log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    except BaseException:  # this process is stopped
        _end(process)
        raise
    return process.returncode, usage.ru_utime + usage.ru_stime


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _copy(process: "subprocess.Popen[bytes]", log: io.TextIOBase) -> None:
    """Copy what a process prints to a log, without the bars that it draws over and over."""
    assert process.stdout is not None
    # newline="" also ends a line at a carriage return, with which progress bars start anew.
    with io.TextIOWrapper(process.stdout, "utf-8", "replace", newline="") as lines:
        for line in lines:
            if not line.endswith("\r"):
                log.write(line.rstrip() + "\n")
                log.flush()


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
