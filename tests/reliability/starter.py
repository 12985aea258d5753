"""A Python that has imported the frameworks, and forks for each command that it reads.

Starting a tool a hundred times then takes a hundred times as long as the tool, not as its imports.
The fork runs the script as ``__main__``, as a Python of its own would. The protocol is one line of
JSON for each command, answered by its process number and, when it has ended, its exit code.
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
import signal
import sys
import time
from typing import Any

STRUCK = "A signal was sent at"
"""What the log says, and by the clock that all processes have, `time.monotonic`, when."""

MODULES = ["lth_plugins.pretrain.find", "lth_plugins.training.supervised"]
MODULES += ["lth_plugins.transfer.run", "lth_plugins.study.run.steps", "lth_plugins.digits"]
MODULES += ["torch.utils.tensorboard"]
MODULES += ["detectron2.evaluation", "lth_plugins.detectron2"] * bool(
    importlib.util.find_spec("detectron2")
)
MODULES += ["mmseg.datasets", "mmseg.evaluation", "mmseg.models", "lth_plugins.mmseg"] * bool(
    importlib.util.find_spec("mmseg")
)


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
    """Run one command: ``{"command": […], "log": FILE}`` and the fields of `test_kill.Start`."""
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if order["limit"]:
        # A file that would become larger cannot be written, as on a disk that is full.
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"], resource.RLIM_INFINITY))
    if order["function"]:
        arm(order["function"], order["text"], order["signum"])
    sys.argv = order["command"]
    runpy.run_path(sys.argv[0], run_name="__main__")


def arm(function: str, text: str, signum: int) -> None:
    """Have this process send itself a signal when a function is called with a text."""
    owner_name, _, name = function.rpartition(".")
    owner = pkgutil.resolve_name(owner_name)
    original = getattr(owner, name)

    def struck(*args: Any, **kwargs: Any) -> Any:
        if text in str(args):
            print(STRUCK, time.monotonic(), file=sys.stderr, flush=True)
            os.kill(os.getpid(), signum)
            setattr(owner, name, original)  # a signal that can be heard comes once
        return original(*args, **kwargs)

    setattr(owner, name, struck)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is pytest's, which ends this
    main()
