"""Steps run once, side by side, again when something changed, and stop at the first failure."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from lth_plugins import TicketError
from lth_plugins.study.run.steps import Step, StepError, StepStopped, read_marker, run

SCRIPT = """
import pathlib, sys
text, out = sys.argv[1:]
pathlib.Path(out).parent.mkdir(exist_ok=True)
with open(out, "a") as file:
    file.write(text)
print("10 %", end="\\r")
print("90 %", end="\\r")
print("wrote", text)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a script that appends its first argument to a file."""
    monkeypatch.chdir(tmp_path)
    Path("script.py").write_text(SCRIPT)
    Path("input.txt").write_text("one")
    return tmp_path


def step(text: str = "a", name: str = "step", **options: object) -> Step:
    out = Path("own", name)
    command = ("script.py", text, str(out))
    inputs = (Path("input.txt"),)
    return Step(name, f"The {name}", command, inputs, (out,), **options)


def run_quietly(*steps: Step) -> tuple[dict, str]:
    printed = io.StringIO()
    records = run(steps, Path("runs"), Console(file=printed, width=200))
    return records, printed.getvalue()


def test_a_step_leaves_its_output_its_log_and_its_times(folder: Path) -> None:
    records, printed = run_quietly(step())
    record = records["step"]
    assert Path("own/step").read_text() == "a"
    # Bars that are drawn over and over are not kept.
    assert record.log.read_text() == f"$ {sys.executable} script.py a own/step\nwrote a\n"
    assert record.ran and record.seconds > 0 and record.cpu_seconds > 0 and record.attempts == 1
    assert "[1/1] The step: done in" in printed


def test_a_finished_step_is_not_run_again(folder: Path) -> None:
    first, _ = run_quietly(step())
    second, printed = run_quietly(step())
    assert Path("own/step").read_text() == "a"
    assert not second["step"].ran and second["step"].seconds == first["step"].seconds
    assert "was done already" in printed


def test_a_changed_command_runs_anew_in_an_empty_folder(folder: Path) -> None:
    run_quietly(step("a", folder=Path("own")))
    run_quietly(step("b", folder=Path("own")))
    assert Path("own/step").read_text() == "b"


def test_a_changed_input_or_a_lost_output_runs_the_step_again(folder: Path) -> None:
    run_quietly(step())
    Path("input.txt").write_text("two")
    run_quietly(step())
    assert Path("own/step").read_text() == "aa"
    Path("own/step").unlink()
    run_quietly(step())
    assert Path("own/step").read_text() == "a"


def test_a_missing_input_is_named(folder: Path) -> None:
    Path("input.txt").unlink()
    with pytest.raises(StepError, match=r"The step needs input\.txt, which is not there"):
        run_quietly(step())


def test_a_failing_step_stops_the_run_with_the_end_of_its_log(folder: Path) -> None:
    Path("broken.py").write_text("import sys; print('a reason'); sys.exit(3)")
    # Each makes an input of the next, or they would run side by side.
    before, made = step(name="before"), Path("made")
    broken = Step("broken", "The broken step", ("broken.py",), before.outputs, (made,))
    after = replace(step(name="after"), inputs=(made,))
    with pytest.raises(StepError) as error:
        run_quietly(before, broken, after)
    for part in ("The broken step", "exit code 3", "broken.py", "runs/logs/broken.log", "a reason"):
        assert part in str(error.value)
    assert Path("own/before").exists() and not Path("own/after").exists()

    Path("broken.py").write_text("import pathlib; pathlib.Path('made').touch()")
    records, _ = run_quietly(before, broken, after)
    assert [record.ran for record in records.values()] == [False, True, True]


MEET = """
import pathlib, sys, time
own, other = map(pathlib.Path, sys.argv[1:])
own.touch()
while not other.exists():
    time.sleep(0.02)
"""


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})


def meeting(own: str, other: str, **options: object) -> Step:
    """A step that ends once the other one has begun."""
    Path("meet.py").write_text(MEET)
    return Step(own, f"The {own}", ("meet.py", own, other), outputs=(Path(own),), **options)


@pytest.mark.usefixtures("two_cores")
def test_steps_run_side_by_side(folder: Path) -> None:
    records, _ = run_quietly(meeting("one", "other"), meeting("other", "one"))
    assert list(records) == ["one", "other"]


@pytest.mark.usefixtures("two_cores")
def test_a_step_waits_for_those_that_make_its_inputs(folder: Path) -> None:
    Path("late.py").write_text("import time; time.sleep(0.5); open('made', 'w').write('x')")
    Path("uses.py").write_text("print(open('made').read())")
    late = Step("late", "The late step", ("late.py",), outputs=(Path("made"),))
    uses = Step("uses", "Its user", ("uses.py",), inputs=(Path("made"),))
    records, _ = run_quietly(late, uses)
    assert records["uses"].log.read_text().endswith("\nx\n")


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize(
    ("script", "line"),
    [
        ("print('x: error: no such thing'); print('bye'); sys.exit(2)", "x: error: no such thing"),
        ("print('Warning'); raise ValueError('too\\nlong')", "ValueError: too"),
        ("print('step 3'); sys.exit(1)", "step 3"),
        ("print('step 3'); print('$ ls'); sys.exit(1)", "$ ls"),
        ("sys.exit(1)", "it printed nothing"),
        ("print('step 3', flush=True); os.kill(os.getpid(), 9)", "step 3"),
    ],
)
def test_the_first_line_of_a_failure_says_why(folder: Path, script: str, line: str) -> None:
    Path("broken.py").write_text(f"import os, sys\n{script}")
    with pytest.raises(StepError) as error:
        run_quietly(Step("broken", "The step", ("broken.py",)))
    first = str(error.value).splitlines()[0]
    ending = "was killed by SIGKILL" if "kill" in script else "failed with exit code [12]"
    assert re.fullmatch(f"The step {ending}: {re.escape(line)}", first)


def test_a_failing_step_ends_those_beside_it(folder: Path) -> None:
    Path("broken.py").write_text(MEET + "sys.exit(3)")
    broken = Step("broken", "The broken step", ("broken.py", "broken", "one"))
    started = time.monotonic()
    with pytest.raises(StepError, match="The broken step failed with exit code 3"):
        run_quietly(broken, meeting("one", "never"))
    assert time.monotonic() - started < 30  # else it would wait for ever
    assert "seconds" not in Path("runs/steps/one.json").read_text()


def test_a_step_that_leaves_no_output_has_failed(folder: Path) -> None:
    Path("lazy.py").write_text("")
    with pytest.raises(StepError, match=r"left no nothing\.txt"):
        run_quietly(Step("lazy", "The lazy step", ("lazy.py",), outputs=(Path("nothing.txt"),)))


IN_TWO_PARTS = """
import pathlib, sys, time
folder = pathlib.Path("own")
folder.mkdir(exist_ok=True)
if pathlib.Path("go").exists():
    (folder / "whole").touch()
else:
    (folder / "half").touch()
    time.sleep(float(sys.argv[1]))
"""


def two_parts(seconds: str, resumes: bool) -> Step:
    """A step that stops half-way, after some seconds, until there is a file named go."""
    Path("two.py").write_text(IN_TWO_PARTS)
    own, command = Path("own"), ("two.py", seconds)
    return Step("two", "Two", command, outputs=(own / "whole",), folder=own, resumes=resumes)


@pytest.mark.parametrize("resumes", [True, False])
def test_a_step_cut_short_goes_on_if_it_can_and_else_starts_afresh(
    folder: Path, resumes: bool
) -> None:
    with pytest.raises(StepError):
        run_quietly(two_parts("0", resumes))
    Path("go").touch()
    records, _ = run_quietly(two_parts("0", resumes))
    assert Path("own/half").exists() == resumes
    assert records["two"].attempts == 1 + resumes


@pytest.mark.parametrize(
    ("end", "by"),
    [
        ("raise SystemExit(143)", "SIGTERM"),
        ("os.kill(os.getpid(), 15)", "SIGTERM"),
        ("raise SystemExit(130)", "Ctrl-C"),
    ],
)
def test_a_step_that_is_told_to_stop_has_not_failed_and_goes_on(
    folder: Path, end: str, by: str
) -> None:
    stopping = two_parts("0", resumes=True)
    Path("two.py").write_text(f"{IN_TWO_PARTS}    import os; {end}")
    with pytest.raises(StepStopped, match=rf"told to stop \({by}\)"):
        run_quietly(stopping)
    assert "error" not in read_marker(Path("runs"), "two")
    Path("go").touch()
    records, _ = run_quietly(stopping)
    assert Path("own/half").exists() and records["two"].attempts == 2


RUN = """
from pathlib import Path
from rich.console import Console
from lth_plugins import TicketError
from lth_plugins.study.run.steps import Step, run
own = Path("own")
step = Step("two", "Two", ("two.py", "60"), outputs=(own / "whole",), folder=own, resumes=True)
run([step], Path("runs"), Console())
"""


def test_what_a_killed_run_left_behind_is_waited_for(folder: Path) -> None:
    again = two_parts("60", resumes=True)
    parent = subprocess.Popen([sys.executable, "-c", RUN], start_new_session=True)
    wait_for(Path("own/half"))
    parent.kill()
    parent.wait()
    with pytest.raises(TicketError, match="alone in runs"):
        run_quietly(again)
    os.killpg(parent.pid, signal.SIGKILL)
    time.sleep(0.2)

    Path("go").touch()
    records, _ = run_quietly(again)
    assert records["two"].attempts == 2


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.05)
