"""Build the virtual environment that `make` works in, or bring it up to date.

A stamp in the environment, written last, says what it was built from. When it still holds, nothing
is installed; when it is missing, the build was cut short and starts again from nothing. Only the
standard library is used: this runs under the system's Python, before anything is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = "mmseg,pretrain,transfer,digits,timm,transformers,smp,sweep,study,export,slim,hub,docs,dev"
DETECTRON2_GIT = "https://github.com/facebookresearch/detectron2.git"
DETECTRON2_COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"
WHEELS = Path(os.environ.get("DETECTRON2_WHEELS") or "~/.cache/lth_plugins/wheels")
WHEELS = WHEELS.expanduser().absolute()
# Nobody may be there to answer a question.
UNATTENDED = {
    "PIP_NO_INPUT": "1",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "GIT_TERMINAL_PROMPT": "0",
    "PYTHONWARNINGS": "ignore",  # setuptools has advice for the authors of editable packages
}


def say(text: str) -> None:
    print(f"==> {text}", flush=True)


def dependency_key() -> str:
    """A hash of all that decides what is installed: what is asked for, how, and for which Python.

    pyproject.toml and the Makefile are left out on purpose: a new lint rule must not cost a new
    environment.
    """
    digest = hashlib.sha256(f"{sys.version} {sys.platform}".encode())
    for name in ("setup.py", "constraints.txt", ".ci/venv.py"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()[:12]


def find_wheels() -> list[Path]:
    """detectron2's wheels in the folder, newest first."""
    return sorted(WHEELS.glob("detectron2-*.whl"), key=lambda path: -path.stat().st_mtime)


def describe_wheels() -> list[str]:
    """The same, with what tells a rebuilt wheel from the one before."""
    return [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in find_wheels()]


def git_answers() -> bool:
    command = ["git", "ls-remote", "--exit-code", DETECTRON2_GIT, "HEAD"]
    try:
        subprocess.run(
            command,
            env=os.environ | UNATTENDED,
            timeout=20,
            check=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return True


class Venv:
    """One virtual environment, and the stamp that says what it holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.python = self.folder / "bin/python"
        self.stamp = self.folder / "lth_plugins.stamp.json"

    def read_stamp(self) -> dict[str, Any]:
        try:
            return json.loads(self.stamp.read_text()) if self.python.exists() else {}
        except (FileNotFoundError, ValueError):
            return {}

    def write_stamp(self, state: dict[str, Any]) -> None:
        # Renamed into place: a stamp is whole or it is not there.
        part = self.stamp.with_suffix(".part")
        part.write_text(json.dumps(state, indent=1) + "\n")
        part.replace(self.stamp)

    def run(self, *arguments: str | Path, quiet: bool = False) -> bool:
        """Run this environment's Python; `quiet` is for a question whose answer may be no."""
        env = os.environ | UNATTENDED
        # Else pip takes the checkout's own egg-info for an installed package.
        env.pop("PYTHONPATH", None)
        out = subprocess.DEVNULL if quiet else None
        done = subprocess.run(
            [self.python, *arguments],
            cwd=ROOT,
            env=env,
            check=not quiet,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
        return done.returncode == 0

    def pip(self, *arguments: str | Path, quiet: bool = False) -> bool:
        less = () if sys.stdout.isatty() else ("--quiet",)  # progress bars are for a terminal
        return self.run("-m", "pip", *arguments, *less, quiet=quiet)

    def install(self, *arguments: str | Path) -> None:
        self.pip("install", "-c", "constraints.txt", *arguments)

    def create(self) -> None:
        say(f"creating {self.folder}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", self.folder], check=True)

    def install_dependencies(self) -> None:
        say(f"installing lth_plugins[{EXTRAS}], pinned (several GB on the first run)")
        self.install("--upgrade", "pip", "setuptools")
        self.install("-e", f".[{EXTRAS}]")
        # Without its requirements: see setup.py.
        self.install("--no-deps", "mmcv-lite")
        if not self.run("-c", "import cv2", quiet=True):
            say(
                "this machine lacks the graphics libraries of OpenCV: installing its headless build"
            )
            self.install("--no-deps", "--force-reinstall", "opencv-python-headless")

    def install_project(self) -> None:
        say(f"pointing {self.folder} at {ROOT}")
        self.pip("install", "--no-deps", "--no-build-isolation", "-e", ".")

    def install_detectron2(self) -> bool:
        """From a wheel in the folder, else from Git; never by name, which no index has for it."""
        if self._install_detectron2_wheel() or self._detectron2_works():
            return True
        reason = f"{DETECTRON2_GIT} cannot be reached"
        if git_answers():
            reason = f"installing it from {DETECTRON2_GIT} failed"
            say("installing detectron2 from its Git repository (it compiles for some minutes)")
            with contextlib.suppress(subprocess.CalledProcessError):
                source = f"detectron2 @ git+{DETECTRON2_GIT}@{DETECTRON2_COMMIT}"
                self.install("--no-build-isolation", source)
            if self._detectron2_works():
                return True
        say(
            f"detectron2 is not installed: {WHEELS} holds no wheel that works here, and {reason}; "
            "all else works, its tests and the detection part of the demo are left out, and "
            "`make detectron2` tries again."
        )
        return False

    def _install_detectron2_wheel(self) -> bool:
        for wheel in find_wheels():
            # pip says whether the wheel is for this Python, without looking at any index.
            dry = ("--dry-run", "--no-deps", "--no-index", "--force-reinstall")
            if not self.pip("install", *dry, wheel, quiet=True):
                continue
            say(f"installing {wheel}")
            # A rebuilt wheel has the version of the one before, which pip would keep.
            self.pip("uninstall", "-y", "detectron2", quiet=True)
            self.install(wheel)
            if self._detectron2_works():
                return True
            say(f"{wheel.name} was built for another torch: removed again")
            self.pip("uninstall", "-y", "detectron2", quiet=True)
        return False

    def _detectron2_works(self) -> bool:
        # Its compiled part fits one version of torch, which the name of a wheel does not tell.
        return self.run("-c", "import torch, detectron2._C", quiet=True)


@contextlib.contextmanager
def locked(venv: Venv) -> Iterator[None]:
    """Two checkouts may share one environment; only one at a time builds it."""
    venv.folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{venv.folder}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that is building {venv.folder}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def bring_up_to_date(venv: Venv, retry_detectron2: bool) -> None:
    have = venv.read_stamp()
    want = {
        "dependencies": dependency_key(),
        "wheels": describe_wheels(),
        "project": str(ROOT),
        "detectron2": have.get("detectron2", False),
    }
    if retry_detectron2 and not want["detectron2"]:
        have.pop("wheels", None)
    stale = {name for name, value in want.items() if have.get(name) != value}
    if not stale:
        without = "" if want["detectron2"] else " (without detectron2)"
        say(f"{venv.folder} is up to date{without}")
        return

    began = time.monotonic()
    venv.stamp.unlink(missing_ok=True)
    try:
        if not have:
            venv.create()
        if "dependencies" in stale:
            venv.install_dependencies()
        elif "project" in stale:
            venv.install_project()
        if stale & {"dependencies", "wheels"}:
            want["detectron2"] = venv.install_detectron2()
            want["wheels"] = describe_wheels()
    except subprocess.CalledProcessError:
        # pip undoes what it could not finish: the environment is what it was. A kill, which it
        # cannot undo, leaves no stamp.
        if have:
            venv.write_stamp(have)
        raise
    venv.write_stamp(want)
    say(f"{venv.folder} is ready ({time.monotonic() - began:.0f} s)")


def main() -> int:
    parser = argparse.ArgumentParser(description="Build or update the virtual environment.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path(".venv"))
    parser.add_argument(
        "--retry-detectron2", action="store_true", help="if it is missing, look for it again"
    )
    parser.add_argument(
        "--key", action="store_true", help="only print the hash of what would be installed"
    )
    arguments = parser.parse_args()
    if sys.version_info < (3, 10):  # noqa: UP036 (nothing has checked it yet)
        say(
            f"lth_plugins needs Python 3.10 or newer, {sys.executable} is {sys.version.split()[0]};"
        )
        say("name another one, for instance: make PYTHON=python3.11 test")
        return 1
    if arguments.key:
        print(dependency_key())
        return 0
    venv = Venv(arguments.folder)
    try:
        with locked(venv):
            bring_up_to_date(venv, arguments.retry_detectron2)
    except subprocess.CalledProcessError as error:
        say(f"setting up {venv.folder} failed at: {' '.join(map(str, error.cmd))}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
