"""A step leaves its log and its marker, resumes or starts afresh, and says why it failed."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lth_plugins.errors import LthError, RunError
from lth_plugins.resilience.lock import locked
from lth_plugins.study.run.steps import Step, StepError, StepStopped, attempt, read_marker

# Leaves a file, or only half of its work until there is a file named "go".
SCRIPT = """
import os, pathlib, sys, time
folder = pathlib.Path("own")
folder.mkdir(exist_ok=True)
print("10 %", end="\\r")
print("90 %", end="\\r")
print("wrote it")
if pathlib.Path("go").exists():
    (folder / "whole").touch()
else:
    (folder / "half").touch()
    exec(sys.argv[1])
"""
RUNS = Path("runs")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory, with the script."""
    monkeypatch.chdir(tmp_path)
    Path("script.py").write_text(SCRIPT)


def step(half: str = "pass", **options: Any) -> Step:
    own = Path("own")
    given = {"inputs": (Path("script.py"),), "outputs": (own / "whole",), "folder": own}
    return Step("step", "The step", ("script.py", half), **(given | options))


def run(step: Step, **options: Any) -> dict[str, Any]:
    with locked(RUNS / ".lock") as lock:
        attempt(step, RUNS, lock, **options)
    return read_marker(RUNS, step.name)


def test_a_step_leaves_its_output_its_log_and_its_marker() -> None:
    Path("go").touch()
    marker = run(step(digest="d"), measure=lambda: {"top1": 90.0})
    assert Path("own/whole").exists()
    # Bars that are drawn over and over are not kept.
    log = (RUNS / "logs/step.log").read_text()
    assert log == f"$ {sys.executable} script.py pass\nwrote it\n"
    assert marker["seconds"] > 0 and marker["cpu_seconds"] > 0
    assert (marker["digest"], marker["attempts"], marker["metrics"]) == ("d", 1, {"top1": 90.0})


@pytest.mark.parametrize(
    ("half", "message"),
    [
        ("print('x: error: none'); print('bye'); sys.exit(2)", "failed .* 2: x: error: none"),
        ("print('Warning'); raise ValueError('too\\nlong')", "failed .* 1: ValueError: too"),
        ("print('step 3'); sys.exit(3)", "failed with exit code 3: step 3"),
        ("print('$ ls'); sys.exit(1)", r"failed .*: \$ ls"),
        ("os.kill(os.getpid(), 9)", "was killed by SIGKILL: wrote it"),
        ("pass", r"ended without an error, but left no own/whole\."),
    ],
)
def test_the_first_line_of_a_failure_says_why(half: str, message: str) -> None:
    with pytest.raises(StepError) as error:
        run(step(f"sys.stdout.flush(); {half}" if "kill" in half else half))
    first, *rest = str(error.value).splitlines()
    assert re.fullmatch(f"The step {message}", first)
    assert any("runs/logs/step.log" in line for line in rest)
    assert read_marker(RUNS, "step")["error"] == str(error.value)


def test_a_missing_input_is_named() -> None:
    with pytest.raises(RunError, match=r"The step needs input\.txt, which is not there"):
        run(step(inputs=(Path("input.txt"),)))


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("resumes", [True, False])
@pytest.mark.parametrize(
    ("half", "error", "word"),
    [
        ("sys.exit(1)", StepError, "failed"),
        ("sys.exit(143)", StepStopped, r"was stopped \(SIGTERM\)"),
        ("os.kill(os.getpid(), 15)", StepStopped, r"was stopped \(SIGTERM\)"),
        ("sys.exit(130)", StepStopped, r"was stopped \(Ctrl-C\)"),
    ],
)
def test_a_step_cut_short_resumes_if_it_can_and_else_starts_afresh(
    half: str, error: type[StepError], word: str, resumes: bool, changed: bool
) -> None:
    with pytest.raises(error, match=word):
        run(step(half, resumes=resumes, digest="a"))
    assert ("error" in read_marker(RUNS, "step")) == (error is StepError)
    Path("go").touch()
    marker = run(step(half, resumes=resumes, digest="b" if changed else "a"))
    resumed = resumes and not changed
    assert Path("own/half").exists() == resumed and marker["attempts"] == 1 + resumed


PARENT = """
from pathlib import Path
from lth_plugins.resilience.lock import locked
from lth_plugins.study.run.steps import Step, attempt
with locked(Path("runs/.lock")) as lock:
    attempt(Step("step", "Step", ("script.py", "time.sleep(60)")), Path("runs"), lock)
"""


def test_what_a_killed_process_left_running_keeps_the_lock() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], start_new_session=True)
    wait_for(lambda: Path("own/half").exists())
    parent.kill()
    parent.wait()
    with pytest.raises(LthError, match="alone in runs"):
        run(step())
    os.killpg(parent.pid, signal.SIGKILL)
    Path("go").touch()

    def is_free() -> bool:
        try:
            run(step())
        except LthError:
            return False
        return True

    wait_for(is_free)


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)
