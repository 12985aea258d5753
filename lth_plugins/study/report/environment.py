"""The environment of a report: system, processor, and the versions that decide the numbers."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import lth_plugins

PACKAGES = {
    "torch": ["torch"],
    "torchvision": ["torchvision"],
    "detectron2": ["detectron2"],
    "mmsegmentation": ["onedl-mmsegmentation", "mmsegmentation"],
    "mmengine": ["onedl-mmengine", "mmengine"],
    "Lightning": ["pytorch-lightning"],
}
"""What decides the numbers, by the names of its distributions."""


def facts() -> dict[str, str]:
    """The system, the processor, and the installed versions."""
    return {
        "System": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "Processor": f"{_processor()}, {len(os.sched_getaffinity(0))} cores to use",
        "lth_plugins": f"{lth_plugins.__version__}, commit {_commit()}",
        "Python": platform.python_version(),
        **{name: _version(distributions) for name, distributions in PACKAGES.items()},
    }


def _version(distributions: Sequence[str]) -> str:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str:
    """The checkout's commit, with a mark if files of it were changed since."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    folder = Path(lth_plugins.__file__).parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
