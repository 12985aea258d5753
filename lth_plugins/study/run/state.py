"""The state of a study: what has become of each planned run.

A study's folder holds ``plan.json`` with all runs and the settings that they follow from. For each
run NAME it holds a marker, ``steps/NAME.json``, what it printed, ``logs/NAME.log``, and the folder
of its tool, ``runs/NAME/``. `read_study` reads them back and writes nothing.
"""

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lth_plugins.resilience.lock import is_locked
from lth_plugins.study.plan.kinds import LINE
from lth_plugins.study.plan.runs import Run, StoredPlan, read_plan
from lth_plugins.study.run.steps import log_path, marker_path

STATES = ("done", "running", "failed", "planned")


@dataclass(frozen=True)
class Result:
    """What has become of a run.

    Attributes:
        run: the run.
        state: one of `STATES`. A run that was stopped half-way is planned: it resumes.
        metrics: of a run that is done, by the names its tool uses; all fractions as percent. Empty
            where tickets are made; `metrics.find_metrics` reads the folder of a search.
        seconds: wall time of a run that is done; else NaN. Of the last attempt, if it resumed.
        cpu_seconds: processor time likewise, of all cores together.
        log: what it printed; the file need not be there.
        problem: what is wrong with it, for people; None if nothing is. Of a run that failed, with
            its command and the end of its log.
    """

    run: Run
    state: str
    metrics: Mapping[str, float]
    seconds: float
    cpu_seconds: float
    log: Path
    problem: str | None = None

    @property
    def value(self) -> float:
        """The metric that is compared; NaN if it is not there."""
        return self.metrics.get(self.run.metric, math.nan)


@dataclass(frozen=True)
class Study:
    """A study's folder, read back.

    Attributes:
        folder: of the study.
        plan: what was planned, by what.
        results: one for each training that is planned, in the plan's order.
        makers: one for each run that makes tickets, in the plan's order.
        lines: one for each run that evaluates between two seeds, in the plan's order.
        problems: all that is wrong, a sentence each. Those of single runs are among them.
    """

    folder: Path
    plan: StoredPlan
    results: tuple[Result, ...]
    makers: tuple[Result, ...]
    lines: tuple[Result, ...]
    problems: tuple[str, ...]

    @property
    def all(self) -> tuple[Result, ...]:
        """Of every run."""
        return (*self.makers, *self.results, *self.lines)

    @property
    def left_out(self) -> Mapping[str, str]:
        """Tasks that cannot be run here, with the reason."""
        return self.plan.left_out


def read_study(folder: Path) -> Study:
    """Read a study's folder. What is wrong with single runs is among the problems, not raised.

    Raises:
        RunError: if there is no plan in it, or it is damaged.
    """
    plan = read_plan(folder)
    runs = plan.runs
    markers = _read_markers(folder)
    results = [_result(run, folder, markers.get(run.name)) for run in runs]
    trainings = tuple(r for r in results if r.run.trains)
    lines = tuple(r for r in results if r.run.kind == LINE)
    makers = tuple(r for r in results if not r.run.trains and r.run.kind != LINE)
    unknown = _unknown_metrics(trainings)
    # A metric that no run of a task has is one problem, not one of each run.
    single = [
        r
        for r in results
        if r.problem and not (r.run.task in unknown and r.problem == _no_metric(r.run, r.metrics))
    ]
    problems = (
        *_contradictions(markers),
        *unknown.values(),
        *_single_seeds(trainings),
        *(_in_one_line(result) for result in single),
        *_not_planned(markers, runs),
    )
    return Study(folder, plan, trainings, makers, lines, problems)


def lock_path(folder: Path, name: str) -> Path:
    """Locked by a run while it works, and by its tool, which may outlive it."""
    return folder / "steps" / f"{name}.lock"


def read_result(folder: Path, run: Run) -> Result:
    """What has become of one run."""
    path = marker_path(folder, run.name)
    return _result(run, folder, _read_marker(path) if path.exists() else None)


Marker = Mapping[str, Any] | str
"""The content of a marker, or why it cannot be read."""


def _read_markers(folder: Path) -> dict[str, Marker]:
    return {path.stem: _read_marker(path) for path in sorted(folder.glob("steps/*.json"))}


def _read_marker(path: Path) -> Marker:
    try:
        content = json.loads(path.read_bytes())
        metrics = {str(name): float(value) for name, value in content.get("metrics", {}).items()}
        times = {"seconds": float(content["seconds"])} if "seconds" in content else {}
        return {**content, "digest": str(content["digest"]), "metrics": metrics, **times}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{path} cannot be read ({error!r}): delete it, and the run starts anew"


def _result(run: Run, folder: Path, marker: Marker | None) -> Result:
    log = log_path(folder, run.name)

    def result(state: str, problem: str | None = None, **values: Any) -> Result:
        values = {"metrics": {}, "seconds": math.nan, "cpu_seconds": math.nan, **values}
        return Result(run, state, log=log, problem=problem, **values)

    if isinstance(marker, str):
        return result("failed", marker)
    if marker is not None and marker["digest"] == run.digest:
        if "seconds" in marker and all(map(_may_exist, run.outputs)):
            problem = _problem(run, marker["metrics"])
            times = {name: marker.get(name, math.nan) for name in ("seconds", "cpu_seconds")}
            return result("done", problem, metrics=marker["metrics"], **times)
        if is_locked(lock_path(folder, run.name)):
            return result("running")
        if "error" in marker:
            return result("failed", str(marker["error"]))
    return result("planned")


def _problem(run: Run, metrics: Mapping[str, float]) -> str | None:
    if not (os.path.isdir(run.folder) and os.access(run.folder, os.R_OK | os.X_OK)):
        return f"it is done, but its folder {run.folder} is gone or unreadable"
    if run.metric in metrics and not math.isfinite(metrics[run.metric]):
        return f"its {run.metric} is {metrics[run.metric]}"
    return _no_metric(run, metrics)


def _no_metric(run: Run, metrics: Mapping[str, float]) -> str | None:
    if not run.metric or run.metric in metrics:
        return None
    return f"it is done, but {run.metric} is missing; there is {_names(metrics)}"


def _may_exist(path: Path) -> bool:
    """Whether a path exists, or cannot be looked at.

    A folder that cannot be read is no reason to repeat a run; `_problem` names it.
    """
    try:
        return path.exists()
    except PermissionError:
        return True


def _in_one_line(result: Result) -> str:
    lines = (result.problem or "").splitlines()
    logged = len(lines) > 1 or (result.state == "failed" and result.log.is_file())
    more = f" (more in {result.log})" if logged else ""
    return f"{result.run.name}: {lines[0]}{more}"


def _unknown_metrics(results: Iterable[Result]) -> dict[str, str]:
    """The problem of each task whose metric none of its finished runs has."""
    by_task: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        if result.state == "done":
            by_task[result.run.task].append(result)
    return {
        task: f"task {task}: unknown metric {done[0].run.metric}, none of its {len(done)} finished "
        f"runs has it; there is {_names({name for r in done for name in r.metrics})}"
        for task, done in by_task.items()
        if all(r.run.metric not in r.metrics for r in done)
    }


def _single_seeds(results: Iterable[Result]) -> list[str]:
    seeds: dict[str, set[int]] = defaultdict(set)
    for result in results:
        seeds[result.run.task].add(result.run.seed)
    return [
        f"task {task} has one seed, {min(found)}: nothing tells its noise"
        for task, found in seeds.items()
        if len(found) == 1
    ]


def _contradictions(markers: Mapping[str, Marker]) -> list[str]:
    """Runs with the same digest, by different names, whose metrics differ."""
    by_digest: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, marker in markers.items():
        if not isinstance(marker, str) and "seconds" in marker:
            by_digest[marker["digest"]][name] = marker["metrics"]
    problems = []
    for digest, found in by_digest.items():
        # As text, so that NaN is like NaN.
        if len(set(map(str, found.values()))) > 1:
            each = "; ".join(f"{name} has {metrics}" for name, metrics in found.items())
            problems.append(f"the same digest {digest[:12]}, but different metrics: {each}")
    return problems


def _not_planned(markers: Mapping[str, Marker], runs: Iterable[Run]) -> list[str]:
    names = {run.name for run in runs}
    others = [
        name
        for name, marker in markers.items()
        if name not in names and (isinstance(marker, str) or "seconds" in marker)
    ]
    if not others:
        return []
    return [
        f"{len(others)} finished runs are not in the plan, whose settings are others now, "
        f"and are not counted: {', '.join(others[:3])}{', …' if len(others) > 3 else ''}"
    ]


def _names(metrics: Iterable[str]) -> str:
    return ", ".join(sorted(metrics)) or "none"
