"""A study's folder is read back, with everything that is wrong in it."""

import json
import math
import multiprocessing
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lth_plugins.resilience.lock import locked
from lth_plugins.study.plan.kinds import FIND
from lth_plugins.study.plan.runs import Run, write_plan
from lth_plugins.study.report.assets import Assets
from lth_plugins.study.report.masks import read_tickets
from lth_plugins.study.run import steps
from lth_plugins.study.run.state import Study, lock_path, read_study
from lth_plugins.study.run.status import summary


def planned(folder: Path, seed: int, **changes: Any) -> Run:
    digest = f"{seed:064x}"
    run = Run(
        name=f"cls-moco-s{seed}",
        kind="ticket",
        source="moco",
        weights="moco",
        arch="resnet18",
        round=3,
        task="cls",
        seed=seed,
        metric="top1",
        config=Path("config.yaml"),
        ticket=Path("round_03.ticket"),
        command=("tools/train_cls.py", "config.yaml", f"seed={seed}"),
        digest=digest,
        folder=Path(),
    )
    run = replace(run, **changes)
    return replace(run, folder=folder / "runs" / run.name)


def finish(folder: Path, run: Run, **metrics: float) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    marker = {"digest": run.digest, "attempts": 1, "seconds": 2.5, "metrics": metrics}
    steps.write_marker(folder, run.name, marker)


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    """Three seeds, all done."""
    runs = [planned(tmp_path, seed) for seed in range(3)]
    write_plan(tmp_path, Path("study.yaml"), runs, {})
    for run in runs:
        finish(tmp_path, run, top1=90.0 + run.seed)
    return runs


def states(study: Study) -> list[str]:
    return [result.state for result in study.results]


def test_finished_runs_have_their_metrics_and_times(tmp_path: Path, runs: list[Run]) -> None:
    study = read_study(tmp_path)
    assert [result.run for result in study.results] == runs
    assert [result.value for result in study.results] == [90.0, 91.0, 92.0]
    assert states(study) == ["done"] * 3 and study.problems == ()
    assert study.results[0].seconds == 2.5
    assert study.results[0].log == tmp_path / "logs" / "cls-moco-s0.log"


def test_a_run_is_planned_then_running_then_done_or_failed(tmp_path: Path, runs: list[Run]) -> None:
    first, second, _ = runs
    shutil.rmtree(tmp_path / "steps")
    assert states(read_study(tmp_path)) == ["planned"] * 3
    steps.write_marker(tmp_path, first.name, {"digest": first.digest, "attempts": 1})
    steps.write_marker(tmp_path, second.name, {"digest": second.digest, "error": "why\nmore"})
    with locked(lock_path(tmp_path, first.name)):
        study = read_study(tmp_path)
    assert states(study) == ["running", "failed", "planned"]
    log = tmp_path / "logs" / f"{second.name}.log"
    assert study.problems == (f"{second.name}: why (more in {log})",)
    assert study.results[1].problem == "why\nmore"
    # Nobody holds the lock any more: it was stopped, and has to go on.
    assert states(read_study(tmp_path)) == ["planned", "failed", "planned"]


def test_a_run_of_another_digest_is_not_this_run(tmp_path: Path, runs: list[Run]) -> None:
    finish(tmp_path, replace(runs[0], digest="f" * 64), top1=50.0)
    assert states(read_study(tmp_path)) == ["planned", "done", "done"]


def test_a_search_is_done_once_its_last_ticket_is_there(tmp_path: Path) -> None:
    ticket = tmp_path / "round_03.ticket"
    search = planned(tmp_path, 0, kind=FIND, task=FIND, metric="", outputs=(ticket,))
    write_plan(tmp_path, Path("study.yaml"), [search], {})
    finish(tmp_path, search)
    assert [result.state for result in read_study(tmp_path).makers] == ["planned"]
    ticket.touch()
    study = read_study(tmp_path)
    assert [result.state for result in study.makers] == ["done"] and not study.results


Spoil = Callable[[Path, list[Run]], None]


def lose_every_metric(folder: Path, runs: list[Run]) -> None:
    for run in runs:
        finish(folder, run, top5=99.0)


def lose_the_folder(folder: Path, runs: list[Run]) -> None:
    shutil.rmtree(runs[1].folder)


def mark(content: dict[str, Any]) -> Spoil:
    """Replace the marker of the second run."""
    return lambda folder, runs: steps.write_marker(folder, runs[1].name, content)


COPY = "the same digest 000000000000, but different metrics: .*copy has"
UNREADABLE = r"cls-moco-s1: .*cls-moco-s1\.json cannot be read"
TEXT = {"digest": "d", "seconds": 1.0, "metrics": {"top1": "much"}}
STUDY = Path("study.yaml")


@pytest.mark.parametrize(
    ("spoil", "state", "message"),
    [
        (lambda f, r: finish(f, replace(r[0], name="copy"), top1=12.0), "done", COPY),
        (lambda f, r: finish(f, r[1], top5=99.0), "done", "s1: .*top1 is missing; there is top5"),
        (lose_every_metric, "done", "task cls: unknown metric top1, none of its 3 .* is top5"),
        (lambda f, r: finish(f, r[1], top1=math.nan), "done", "cls-moco-s1: its top1 is nan"),
        (lambda f, r: write_plan(f, STUDY, r[:1], {}), None, "task cls has one seed, 0"),
        (lose_the_folder, "done", "cls-moco-s1: .* its folder .*runs/cls-moco-s1 is gone"),
        (mark({"seconds": 1.0}), "failed", UNREADABLE),
        (mark(TEXT), "failed", UNREADABLE),
    ],
)
def test_what_is_wrong_is_named_once_and_the_run_is_not_dropped(
    tmp_path: Path, runs: list[Run], spoil: Spoil, state: str | None, message: str
) -> None:
    spoil(tmp_path, runs)
    study = read_study(tmp_path)
    assert [r.state for r in study.results if r.run.seed == 1] == ([state] if state else [])
    assert len([problem for problem in study.problems if re.search(message, problem)]) == 1


def test_a_folder_that_is_gone_is_named_where_the_metric_is_missing_too(
    tmp_path: Path, runs: list[Run]
) -> None:
    lose_every_metric(tmp_path, runs)
    lose_the_folder(tmp_path, runs)
    unknown, gone = read_study(tmp_path).problems
    assert unknown.startswith("task cls: unknown metric top1")
    assert gone.endswith("runs/cls-moco-s1 is gone or unreadable")


def read_as_somebody_else(folder: Path) -> list[str]:
    """What is read of a study, for a process of its own: nobody but root may read all of it.

    The working directory is all that it has to reach.
    """
    os.chdir(folder)
    if os.getuid() == 0:
        os.setuid(65534)
    study = read_study(Path("study"))
    (ticket,) = study.makers[0].run.outputs
    return [
        " ".join(r.state for r in (*study.makers, *study.results)),
        *study.problems,
        *read_tickets({("moco", 3, "ticket"): ticket}, {})[1],
        str(Assets(Path("report.html")).link("the ticket", ticket)),
    ]


def test_a_folder_that_cannot_be_read_is_named_and_its_run_is_not_redone(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    search, *trained = (planned(folder, seed) for seed in range(3))
    ticket = search.folder / "round_03.ticket"
    search = replace(search, kind=FIND, task=FIND, metric="", outputs=(ticket,))
    write_plan(folder, Path("study.yaml"), [search, *trained], {})
    for run in (search, *trained):
        finish(folder, run, top1=90.0)
    ticket.touch()
    hidden = [search.folder, trained[0].folder]
    tmp_path.chmod(0o755)
    for path in hidden:
        path.chmod(0)
    try:
        with multiprocessing.get_context("fork").Pool(1) as other:
            shown = other.apply(read_as_somebody_else, (tmp_path,))
    finally:
        for path in hidden:
            path.chmod(0o755)
    seen, *problems, masks, link = shown
    assert seen == "done done done"
    assert [p.split(":")[0] for p in problems] == [search.name, trained[0].name]
    assert all(problem.endswith(" is gone or unreadable") for problem in problems)
    assert "masks of moco, round 3, are not shown" in masks and "who may read it" in masks
    assert link == "the ticket"


def test_finished_runs_of_other_settings_are_counted(tmp_path: Path, runs: list[Run]) -> None:
    write_plan(tmp_path, Path("study.yaml"), runs[1:], {})
    (problem,) = read_study(tmp_path).problems
    assert problem.startswith("1 finished runs are not in the plan")
    assert "cls-moco-s0" in problem


def test_the_rest_is_estimated_from_what_is_done(tmp_path: Path, runs: list[Run]) -> None:
    more = [planned(tmp_path, seed) for seed in range(103)]
    write_plan(tmp_path, Path("study.yaml"), more, {})
    results = read_study(tmp_path).results
    assert summary(results, 1) == "3 of 103 runs done, about 4 min left"  # 100 x 2.5 s
    assert summary(results, 5) == "3 of 103 runs done, about 50 s left"
    other = planned(tmp_path, 0, task="det", name="det-moco-s0")
    write_plan(tmp_path, Path("study.yaml"), [*more, other], {})
    assert summary(read_study(tmp_path).results, 5) == "3 of 104 runs done, at least 50 s left"


def test_two_thousand_runs_cost_two_reads_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What keeps a status fast: nothing that a tool left is opened, only small markers."""
    runs = [planned(tmp_path, seed) for seed in range(2000)]
    write_plan(tmp_path, Path("study.yaml"), runs, {})
    for run in runs:
        run.folder.mkdir(parents=True)
        steps.marker_path(tmp_path, run.name).parent.mkdir(exist_ok=True)
        marker = {"digest": run.digest, "seconds": 1.0, "metrics": {"top1": 90.0}}
        steps.marker_path(tmp_path, run.name).write_text(json.dumps(marker))
    opened: list[Path] = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path) or read_bytes(path))
    study = read_study(tmp_path)
    assert len(study.results) == 2000 and set(states(study)) == {"done"}
    assert sorted(opened) == sorted(steps.marker_path(tmp_path, run.name) for run in runs)
