"""Runs a tool and notes, every so many optimizer steps, what its process holds; on Linux.

``python long_run.py NOTES TOOL ARGUMENTS …`` appends to NOTES a line of JSON each time: the step,
resident memory in bytes, open files.
"""

import json
import os
import runpy
import sys
from pathlib import Path

from torch.optim.optimizer import register_optimizer_step_post_hook

EVERY = 50
_steps = 0


def note(*_: object) -> None:
    global _steps
    _steps += 1
    if _steps % EVERY:
        return
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    files = len(os.listdir("/proc/self/fd"))
    held = {"step": _steps, "memory": pages * os.sysconf("SC_PAGESIZE"), "files": files}
    with notes.open("a") as file:
        file.write(json.dumps(held) + "\n")


if __name__ == "__main__":
    notes = Path(sys.argv[1])
    sys.argv = sys.argv[2:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))  # as Python does for a script
    register_optimizer_step_post_hook(note)
    runpy.run_path(sys.argv[0], run_name="__main__")
