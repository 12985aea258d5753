"""Runs are executed through submitit: once each, whatever is killed, and whatever fails."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

import lth_plugins as lth
from lth_plugins.commands import study
from lth_plugins.pruning.search.imp import round_path
from lth_plugins.resilience.lock import is_locked
from lth_plugins.study.plan.config import StudyConfig
from lth_plugins.study.plan.expand import Plan
from lth_plugins.study.plan.kinds import FIND
from lth_plugins.study.plan.runs import Run
from lth_plugins.study.plan.tools import TOOLS
from lth_plugins.study.run import steps
from lth_plugins.study.run.slurm import JobStates
from lth_plugins.study.run.state import Result, lock_path, read_study
from lth_plugins.study.run.status import doing
from lth_plugins.study.run.sweep import sweep

ROOT = Path(__file__).resolve().parents[3]

# Notes each start, and fails, or waits for a file or for another run, as its arguments say.
SCRIPT = """
import pathlib, sys, time
name, what = sys.argv[1:]
with open("started", "a") as file:
    file.write(name + "\\n")
print("a reason" if what == "fail" else "fine")
if what == "fail":
    sys.exit(3)
while what == "wait" and not pathlib.Path("go").exists():
    time.sleep(0.05)
while what == "meet" and len(open("started").readlines()) < 2:
    time.sleep(0.05)
pathlib.Path(name).touch()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with a script."""
    monkeypatch.chdir(tmp_path)
    Path("script.py").write_text(SCRIPT)
    yield tmp_path
    Path("go").touch()  # a test that fails leaves nobody waiting


def job(name: str, what: str = "work", needs: tuple[str, ...] = ()) -> Run:
    """A run of the script that leaves a file of its name."""
    return Run(
        name=name,
        kind=FIND,
        source=name,
        weights=name,
        arch="resnet18",
        round=1,
        task=FIND,
        command=("script.py", name, what),
        inputs=(Path("script.py"),),
        outputs=(Path(name),),
        needs=needs,
        digest=f"digest of {name}",
        folder=Path("runs", name),
    )


def run_quietly(*runs: Run, **settings: object) -> tuple[dict[str, Result], str]:
    printed = io.StringIO()
    console = Console(file=printed, width=200)
    sweep(StudyConfig(out="study", **settings), Path("study.yaml"), Plan(runs, {}), console)
    return {r.run.name: r for r in read_study(Path("study")).makers}, printed.getvalue()


def start(*runs: Run, **settings: object) -> subprocess.Popen:
    """A sweep in a process of its own."""
    code = f"""
from pathlib import *
from rich.console import Console
from lth_plugins.study.plan.config import StudyConfig
from lth_plugins.study.plan.expand import Plan
from lth_plugins.study.plan.runs import Run
from lth_plugins.study.run.sweep import sweep
sweep(StudyConfig(out="study", **{settings!r}), Path("study.yaml"), Plan({runs!r}, {{}}), Console())
"""
    return subprocess.Popen([sys.executable, "-c", code])


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


def started() -> list[str]:
    path = Path("started")
    return path.read_text().split() if path.exists() else []


def test_a_run_that_fails_is_tried_once_more_and_does_not_stop_the_rest(folder: Path) -> None:
    first, last = job("first", "fail"), job("last")
    needs_first = job("needs_first", needs=(first.digest,))
    needs_that = job("needs_that", needs=(needs_first.digest, last.digest))
    results, printed = run_quietly(first, needs_first, last, needs_that)
    assert {name: r.state for name, r in results.items()} == {
        "first": "failed",
        "needs_first": "planned",
        "last": "done",
        "needs_that": "planned",
    }
    assert started() == ["first", "first", "last"]
    for part in ("failed, is tried once more", "exit code 3", "script.py first fail", "a reason"):
        assert part in printed
    assert "a reason" in results["first"].problem
    assert not any(Path("study/jobs/local").iterdir())  # submitit's own files

    # Started again, only what is not done runs.
    Path("script.py").write_text(SCRIPT.replace("sys.exit(3)", "pass"))
    results, _ = run_quietly(first, needs_first, last)
    assert {r.state for r in results.values()} == {"done"}
    assert started()[3:] == ["first", "needs_first"]


def test_what_follows_from_a_plan_is_run_in_the_same_sweep_and_failures_are_not_repeated(
    folder: Path,
) -> None:
    first, bad, second = job("first"), job("bad", "fail"), job("second")
    plans = iter([Plan((first, bad, second), {}), None])
    locked: list[bool] = []

    def more() -> Plan | None:
        locked.append(is_locked(Path("study/.lock")))
        return next(plans)

    console = Console(file=io.StringIO())
    plan = Plan((first, bad), {})
    sweep(StudyConfig(out="study"), Path("study.yaml"), plan, console, (), more)
    assert started() == ["first", "bad", "bad", "second"] and locked == [True, True]
    assert [r.run.name for r in read_study(Path("study")).makers] == ["first", "bad", "second"]


def test_a_sweep_says_what_its_runs_do_before_they_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lth_plugins.progress.QUIET_SECONDS", 0.0)
    run = job("one")
    lines = run_quietly(run)[1].splitlines()
    begins, ends = lines.index(f"{run.title} …"), lines.index(f"    {run.title}: waits")
    assert begins < ends < next(k for k, line in enumerate(lines) if "done in" in line)


def test_a_training_starts_with_its_ticket_while_the_search_goes_on(folder: Path) -> None:
    """The search waits for what the training makes: one after the other, neither would end."""
    search = replace(job("search", "wait"), folder=Path())
    training = replace(job("go", needs=(search.digest,)), inputs=(Path("started"),))
    results, _ = run_quietly(search, training, parallel=2)
    assert {name: r.state for name, r in results.items()} == {"search": "done", "go": "done"}
    assert started() == ["search", "go"]


LOG = "$ python tools/train_seg.py\n"
MMENGINE = "INFO - Iter(train) [ 20/100]  base_lr: 4.0e-03 lr: 4.0e-04  eta: 0:01:17  time: 2.2\n"
DETECTRON2 = "[11/28 08:04:58 d2.evaluation.evaluator]: Inference done 11/100. ETA=0:00:12\n"
OURS = "[11/28 08:04:58 lth_plugins.detectron2.hooks]: step 97 of 130, about 6 s left\n"


@pytest.mark.parametrize(
    ("log", "tool", "says"),
    [
        ("", "segmentation", "waits"),
        (LOG, "segmentation", "starts"),
        (LOG + "a line\n", "segmentation", "a line"),
        (LOG + MMENGINE + "a line\n", "segmentation", "step 20 of 100, about 0:01:17 left"),
        (LOG + MMENGINE + LOG, "segmentation", "starts"),
        (LOG + OURS, "detection", "step 97 of 130, about 6 s left"),
        (LOG + OURS + DETECTRON2, "detection", "step 11 of 100, about 0:00:12 left"),
        (LOG + "pretrain: epoch 2/8, step 57 of 360, about 80 s left", "classification", ""),
    ],
)
def test_a_sweep_reads_how_far_a_run_is_in_the_log_of_its_host(
    log: str, tool: str, says: str
) -> None:
    assert doing(log, TOOLS[tool].progress) == (says or log.splitlines()[-1])


def test_a_run_that_the_queue_stops_is_no_failure_and_resumes(folder: Path) -> None:
    stops = "import sys\nif open('started').read().count('one') < 3: sys.exit(143)\n"
    Path("script.py").write_text(SCRIPT.replace("print", stops + "print", 1))
    results, printed = run_quietly(job("one"))
    assert results["one"].state == "done" and started() == ["one"] * 3  # a failure is tried twice
    assert printed.count("was stopped and resumes") == 2 and "failed" not in printed


def test_two_runs_at_a_time_share_the_processors(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    Path("script.py").write_text(SCRIPT + "import os; print(os.environ['OMP_NUM_THREADS'])")
    results, _ = run_quietly(job("one", "meet"), job("two", "meet"), parallel=2)
    assert {r.state for r in results.values()} == {"done"}
    for name in results:
        said = steps.log_path(Path("study"), name).read_text().split()[-1]
        assert said == str(max(1, os.cpu_count() // 2))


def test_what_a_killed_sweep_left_behind_is_waited_for_and_not_started_again(folder: Path) -> None:
    run = job("one", "wait")
    driver = start(run)
    wait_for(started)
    driver.kill()
    driver.wait()
    assert is_locked(lock_path(Path("study"), "one"))
    again = start(run, job("two"))
    wait_for(lambda: is_locked(Path("study/.lock")))
    with pytest.raises(lth.LthError, match="another run"):
        run_quietly(run)
    assert started() == ["one"]
    Path("go").touch()
    assert again.wait(300) == 0
    assert started() == ["one", "two"]
    (one, _) = read_study(Path("study")).makers
    assert one.state == "done"


def test_a_sweep_that_is_preempted_ends_its_runs_and_resumes_later(folder: Path) -> None:
    run = job("one", "wait")
    driver = start(run)
    wait_for(started)
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(300) == 143
    assert not is_locked(lock_path(Path("study"), "one"))
    (result,) = read_study(Path("study")).makers
    assert result.state == "planned"
    Path("go").touch()
    results, _ = run_quietly(run)
    assert results["one"].state == "done" and started() == ["one", "one"]


def test_a_missing_input_is_named_without_starting_anything(folder: Path) -> None:
    run = job("one")
    Path("script.py").unlink()
    with pytest.raises(lth.RunError, match=r"find needs script\.py, which is not there"):
        run_quietly(run)
    assert [r.state for r in read_study(Path("study")).makers] == ["planned"]


def test_an_input_may_be_a_folder_and_may_be_lost_meanwhile(folder: Path) -> None:
    Path("images").mkdir()
    first = replace(job("first"), inputs=(Path("script.py"), Path("images")))
    last = replace(job("last", needs=(first.digest,)), inputs=(Path("images"),))
    Path("script.py").write_text(SCRIPT + "pathlib.Path('images').rmdir()")
    results, printed = run_quietly(first, last)
    assert results["first"].state == "done" and started() == ["first"]
    assert results["last"].problem == "it needs images, which is not there"
    assert "it needs images" in printed


def test_slurm_is_refused_where_there_is_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(lth.ConfigError, match="executor=slurm: .*sbatch"):
        run_quietly(job("one"), executor="slurm", partition="gpu")


# Slurm's commands, as far as submitit needs them: a queue of one machine, this one.
SLURM = {
    "sbatch": """
id=$(($(ls "$QUEUE" | wc -l) + 1))
SLURM_JOB_ID=$id sh "$1" > /dev/null 2>&1 &
echo $! > "$QUEUE/$id"
cp "$1" "$QUEUE/../submission"
echo "Submitted batch job $id"
""",
    "sacct": """
echo "JobID|State|NodeList"
for id in $(ls "$QUEUE"); do
    kill -0 $(cat "$QUEUE/$id") 2> /dev/null && state=RUNNING || state=COMPLETED
    echo "$id|$state|here"
done
""",
    "srun": """
while [ "${1%python*}" = "$1" ]; do shift; done
exec "$@"
""",
}


@pytest.fixture
def slurm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a file for each job that was submitted."""
    queue, commands = folder / "queue", folder / "bin"
    queue.mkdir()
    commands.mkdir()
    for name, text in SLURM.items():
        (commands / name).write_text("#!/bin/sh" + text)
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("QUEUE", str(queue))
    return queue


@pytest.mark.slow
def test_jobs_that_wait_in_slurms_queue_are_found_again(folder: Path, slurm: Path) -> None:
    settings = {
        "executor": "slurm",
        "partition": "gpu",
        "slurm": {"account": "me", "timeout_min": 60},
    }
    run = job("one", "wait")
    driver = start(run, **settings)
    wait_for(lambda: any(Path("study/jobs").rglob("*_submitted.pkl")))  # submitit has its number
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(300) == 143
    submission = Path("submission").read_text()
    for flag in ("--partition=gpu", "--account=me", "--time=60", "--job-name=one"):
        assert f"#SBATCH {flag}\n" in submission
    assert not Path("one").exists()
    Path("go").touch()
    results, _ = run_quietly(run, **settings)
    assert results["one"].state == "done"
    assert len(list(slurm.iterdir())) == 1 and started() == ["one"]


# Slurm without accounts: sacct fails, and only the queue tells. Its jobs are those that still run.
WITHOUT_ACCOUNTS = {
    "sacct": """
echo asked >> "$QUEUE/../sacct"
echo "Slurm accounting storage is disabled" >&2
exit 1
""",
    "squeue": """
for id in $(ls "$QUEUE"); do
    kill -0 $(cat "$QUEUE/$id") 2> /dev/null && echo "$id RUNNING"
done
exit 0
""",
}


@pytest.fixture
def slurm_without_accounts(slurm: Path) -> Path:
    for name, text in WITHOUT_ACCOUNTS.items():
        (slurm.parent / "bin" / name).write_text("#!/bin/sh" + text)
        (slurm.parent / "bin" / name).chmod(0o755)
    return slurm


def test_slurm_without_accounts_is_asked_by_its_queue_and_says_so_once(
    folder: Path, slurm_without_accounts: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = {"executor": "slurm", "slurm": {"timeout_min": 60}, "parallel": 1}
    lost = job("lost")
    # A job that is cancelled, or whose machine fails, leaves no result.
    srun = Path("bin/srun").read_text()
    dies = 'case "$*" in *lost*) exit 1;; esac\n'
    Path("bin/srun").write_text(srun.replace("#!/bin/sh", f"#!/bin/sh\n{dies}", 1))
    results, printed = run_quietly(job("one"), lost, **settings)
    assert results["one"].state == "done", results["one"].problem
    assert results["lost"].state == "failed"
    assert "it ended without a result" in results["lost"].problem
    assert printed.count("Slurm accounting storage is disabled") == 1
    assert "jobs are looked up in its queue, with squeue" in printed
    assert Path("sacct").read_text().split() == ["asked"]
    said = capfd.readouterr()
    assert "accounting" not in said.out + said.err and "sacct" not in said.out + said.err


def test_a_queue_that_cannot_be_asked_is_said_once_and_ends_no_job(
    folder: Path, slurm_without_accounts: Path
) -> None:
    said: list[str] = []
    states = JobStates(said.append)
    (folder / "bin/squeue").write_text("#!/bin/sh\necho Unable to contact slurm >&2; exit 1")
    for _ in range(3):
        assert not states.is_done("7", mode="force")
        time.sleep(0.01)
    assert len(said) == 2 and "Unable to contact slurm" in said[1]
    (folder / "bin/squeue").write_text(f"#!/bin/sh{WITHOUT_ACCOUNTS['squeue']}")
    assert states.is_done("7", mode="force")


def test_a_setting_that_slurm_does_not_have_is_refused(folder: Path, slurm: Path) -> None:
    with pytest.raises(lth.ConfigError, match="executor=slurm: .*wall_time"):
        run_quietly(job("one"), executor="slurm", slurm={"timeout_min": 3, "wall_time": 3})
    with pytest.raises(lth.ConfigError, match="expected slurm.timeout_min, .* found none"):
        run_quietly(job("one"), executor="slurm")


def test_the_settings_of_slurm_are_submitits_all_of_them(folder: Path, slurm: Path) -> None:
    (folder / "bin/sbatch").write_text('#!/bin/sh\ncp "$1" submission; exit 1')
    given = {"timeout_min": 3, "partition": "gpu", "job_name": "mine"}
    with pytest.raises(lth.RunError, match="could not be submitted"):
        run_quietly(job("one"), executor="slurm", slurm=given)
    submission = Path("submission").read_text()
    for flag in ("--partition=gpu", "--job-name=mine", "--time=3"):
        assert f"#SBATCH {flag}\n" in submission


def test_what_slurm_says_to_a_job_that_it_does_not_take_is_said(folder: Path, slurm: Path) -> None:
    (folder / "bin/sbatch").write_text("#!/bin/sh\necho invalid partition specified >&2; exit 1")
    with pytest.raises(lth.RunError, match="one.* could not be submitted.*invalid partition"):
        run_quietly(job("one"), executor="slurm", slurm={"timeout_min": 3})


STUDY = """
out: {out}
archs: [resnet18]
seeds: [3]
rounds: [5]
perturbations: {{swap: {{rounds: [5], strengths: [0.5]}}}}
sources: {{mine: {{tickets: '{tickets}'}}}}
tasks:
  cls:
    tool: classification
    config: configs/transfer/digits_r18.yaml
    overrides:
      [data.size=16, data.subset=16, batch_size=16, training.epochs=1, "training.milestones=[]"]
"""


@pytest.fixture(scope="module")
def study_py() -> ModuleType:
    return study


@pytest.mark.slow
def test_a_study_trains_and_measures_tickets_and_what_is_made_of_them(
    folder: Path,
    study_py: ModuleType,
    ticket18: lth.Ticket,
    resnet18_state: dict,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def said(*arguments: str) -> str:
        assert study_py.main(arguments) == 0
        return capsys.readouterr().out

    lth.Ticket.dense(resnet18_state, source="test", recipe={}).save(round_path(folder, 0))
    ticket18.save(round_path(folder, 5))
    Path("study.yaml").write_text(STUDY.format(out="study", tickets="."))
    printed = said("run", "study.yaml", "seeds=[3]")
    assert "Planning the study of study.yaml with 'seeds=[3]' …" in printed
    assert "To run: 4 of 4 runs (0 searches, 3 trainings); results go to study." in printed
    assert f"taken from {ROOT / 'configs'}: configs/transfer/digits_r18.yaml." in printed
    assert "4 of 4 runs done" in printed
    # Once more, from another working directory.
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    again = ("run", "../study.yaml", "out=../study", "sources.mine.tickets=..")
    printed = said(*again)
    assert "To run: 0 of 4 runs" in printed and "4 of 4 runs done" in printed
    assert not list(Path().iterdir())
    out = Path("../study").rename("../moved")  # tickets and runs are found there, too
    study = read_study(out)
    assert study.plan.directory == folder / "elsewhere"
    assert study.plan.settings["seeds"] == [3] and study.plan.overrides == again[2:]
    assert [(r.run.kind, r.run.round, r.state) for r in study.results] == [
        ("dense", 0, "done"),
        ("ticket", 5, "done"),
        ("swap", 5, "done"),
    ]
    (perturbed,) = study.makers
    masks = lth.Ticket.load(perturbed.run.outputs[0]).masks
    assert masks.densities() == ticket18.masks.densities() and masks != ticket18.masks
    for result in study.results:
        own = json.loads((result.run.folder / "result.json").read_text())
        assert result.value == pytest.approx(100 * own["top1"]) and result.cpu_seconds > 0
        assert (own["round"], own["seed"]) == (result.run.round, 3)
        assert json.loads(steps.marker_path(out, result.run.name).read_text())["attempts"] == 1
    assert study.problems == ("task cls has one seed, 3: nothing tells its noise",)
    assert "problem: task cls has one seed" in said("status", "../moved")
    assert said("report", "../moved", "--out", "r.html").splitlines()[-1] == "r.html"
    assert Path("r.html").is_file()


@pytest.mark.slow
def test_a_study_of_a_single_ticket_trains_the_dense_network_from_scratch(
    folder: Path, study_py: ModuleType, ticket18_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = STUDY.format(out="study", tickets=".").splitlines(keepends=True)
    lines = [line for line in lines if not line.startswith("perturbations")]  # those need all of θ
    Path("study.yaml").write_text("".join(lines))
    tickets = f"sources.mine.tickets={{5: {ticket18_file}}}"
    assert study_py.main(["run", "study.yaml", "seeds=[3]", tickets, "baselines.reinit=[0]"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "3 of 3 runs done" in printed
    assert "mine, cls: round 5 open (0 dense seeds" in printed
    study = read_study(Path("study"))
    ticket, scratch = study.results
    assert (ticket.run.kind, scratch.run.kind, scratch.run.round) == ("ticket", "reinit", 0)
    trained = [json.loads((r.run.folder / "result.json").read_text()) for r in study.results]
    assert trained[0]["sparsity"] > 0.5 and trained[1]["sparsity"] == 0
