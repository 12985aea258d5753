"""A Python that has imported the frameworks, and forks for each command that it is given.

Starting a tool a hundred times then takes a hundred times as long as the tool, not as its imports.
The fork runs the script as ``__main__``, as a Python of its own would. `Starter` is what tests use,
as the fixture ``starter``; the rest runs in the process that it starts. The protocol is a line of
JSON per command, answered by its process id and, when it has ended, its exit code.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import pkgutil
import resource
import runpy
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MODULES = ["lth_plugins.pretrain.find", "lth_plugins.training.supervised"]
MODULES += ["lth_plugins.transfer.run", "lth_plugins.study.run.steps", "lth_plugins.digits"]
MODULES += ["torch.utils.tensorboard"]
MODULES += ["detectron2.evaluation", "lth_plugins.detectron2"] * bool(
    importlib.util.find_spec("detectron2")
)
MODULES += ["mmseg.datasets", "mmseg.evaluation", "mmseg.models", "lth_plugins.mmseg"] * bool(
    importlib.util.find_spec("mmseg")
)


@dataclass(frozen=True)
class Start:
    """A start of a tool, and what ends it.

    Attributes:
        function: when this is called, by the dotted name that it is looked up by, a signal comes.
        text: in the arguments of the call that is meant.
        signum: the signal.
        limit: instead, no file may be larger, in bytes, as on a disk that is full; 0 is no limit.
        soak: whether it is left to the soak, as one that others stand for.
    """

    function: str = ""
    text: str = ""
    signum: int = signal.SIGKILL
    limit: int = 0
    soak: bool = False


NOTHING = Start()


class Starter:
    """Runs scripts one at a time, in forks of a process that is started for the first one.

    Attributes:
        folder: detectron2 looks for its datasets in here, which it is told once, on import.

    Args:
        folder: an empty one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._log = folder / "log.txt"
        self._process: subprocess.Popen[str] | None = None

    def run(
        self,
        command: Sequence[object],
        start: Start = NOTHING,
        kill_after: float | None = None,
        cwd: Path = ROOT,
    ) -> int:
        """Run a script with the environment of this process.

        Args:
            command: the script and its arguments.
            start: what ends it.
            kill_after: seconds until it is killed.
            cwd: the folder it runs in.

        Returns:
            Its exit code, or minus the signal that ended it.
        """
        order = {
            "command": [*map(str, command)],
            "log": str(self._log),
            "cwd": str(cwd),
            "environment": self._environment(),
            **asdict(start),
        }
        child = 0
        try:
            process = self._running()
            process.stdin.write(json.dumps(order) + "\n")
            child = int(process.stdout.readline())
            if kill_after is not None:
                ended, _, _ = select.select([process.stdout], [], [], kill_after)
                if not ended:
                    _kill(child)
            return int(process.stdout.readline())
        except BaseException:  # such as a time-out: its answer would be taken for the next one's
            if child:
                _kill(child)
            self.close()
            raise

    def said(self) -> str:
        """What the last script printed, errors included."""
        return self._log.read_text(errors="replace")

    def close(self) -> None:
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait()
            self._process = None

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "DETECTRON2_DATASETS": str(self.folder)}

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.reliability.starter"],
                cwd=ROOT,
                env=self._environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                bufsize=1,
            )
            assert self._process.stdout.readline() == "ready\n"
        return self._process


def _kill(child: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)


def main() -> None:
    with contextlib.redirect_stdout(sys.stderr):  # some print while they are imported
        for name in MODULES:
            importlib.import_module(name)
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run(json.loads(line))
            return
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def run(order: dict[str, Any]) -> None:
    """Run one command, in a fork."""
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["environment"])
    if order["limit"]:
        # A file that would become larger cannot be written, as on a disk that is full.
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"], resource.RLIM_INFINITY))
    if order["function"]:
        arm(order["function"], order["text"], order["signum"])
    sys.argv = order["command"]
    sys.path.insert(0, str(Path(sys.argv[0]).parent.absolute()))
    runpy.run_path(sys.argv[0], run_name="__main__")


def arm(function: str, text: str, signum: int) -> None:
    """Have this process send itself a signal when a function is called with a text."""
    owner_name, _, name = function.rpartition(".")
    owner = pkgutil.resolve_name(owner_name)
    original = getattr(owner, name)

    def struck(*args: Any, **kwargs: Any) -> Any:
        if text in str(args):
            os.kill(os.getpid(), signum)
            setattr(owner, name, original)  # a signal that can be heard comes once
        return original(*args, **kwargs)

    setattr(owner, name, struck)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is pytest's, which ends this
    main()
