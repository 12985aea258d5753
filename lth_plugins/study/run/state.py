"""The runs of a study: what was planned, and what has become of it.

A study's folder holds ``plan.json`` with all runs and the settings that they follow from, and for
each run NAME a marker ``steps/NAME.json``, what it printed, ``logs/NAME.log``, and what its tool
leaves, ``runs/NAME/``. `read_study` reads them back; only `write_plan` writes.
"""

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lth_plugins.errors import TicketError
from lth_plugins.resilience.atomic import write_atomically
from lth_plugins.resilience.lock import is_locked
from lth_plugins.study.plan.paths import near
from lth_plugins.study.run.steps import log_path, marker_path

KINDS: Mapping[str, str] = {
    "dense": "dense network",
    "ticket": "ticket",
    "random": "random mask of the same layer-wise densities",
    "reversed": "reversed mask, what the ticket left out",
    "transplant": "mask of one source over the weights of another",
    "reinit": "mask over a random initialisation",
    "swap": "ticket with mask entries swapped inside their layer",
    "noise": "ticket with noise on its weights",
    "channel": "ticket refilled to whole channels",
    "channel_l1": "as many channels, those with the largest weights",
    "narrow": "as many channels over a random initialisation: a dense narrower network",
}
"""What can be trained on a task; `FIND` is the kind of a search."""

PERTURBED = ("swap", "noise")
"""The kinds that have a strength. Their tickets are made before they are trained."""

STRUCTURED: Mapping[str, str] = {
    "channel": "channel",
    "channel_l1": "channel_l1",
    "narrow": "channel",
}
"""The kinds that train structured masks, all of the same FLOPs, with the masks' structure.

These tickets, too, are made before they are trained; the structures are
`lth_plugins.pruning.structure`'s.
"""

FIND, PERTURB, STRUCTURE = "find", "perturb", "structure"
"""What stands for the task in runs that make tickets: a search, and what `tools/ticket.py` does."""

MAKING = (FIND, PERTURB, STRUCTURE)

PLAN = "plan.json"
STATES = ("done", "running", "failed", "planned")


@dataclass(frozen=True)
class Run:
    """One planned run of a tool.

    Attributes:
        name: unique in the study and fit for a file name; it ends in the beginning of the digest.
        kind: a row of `KINDS`, or `FIND`: the search for the tickets of a source. Of a run that
            makes a structured ticket, the structure.
        source: whose masks: a source of the study.
        weights: whose θ; the source itself, but in a transplant.
        arch: the architecture, by torchvision's name.
        round: of the masks, 0 is dense; the last one of a search.
        task: a task of the study; one of `MAKING` where tickets are made.
        seed: of the training, of a random mask and of a perturbation; 0 where nothing is random.
        metric: what is compared, a key of `Result.metrics`, higher is better; "" without training.
        config: the tool's configuration file; None where `tools/ticket.py` makes a ticket.
        ticket: the masks' file; None for a search.
        command: script and arguments, to be run by this Python in the directory of the plan.
        inputs: files and folders that have to be there; runs that it needs may make them.
        outputs: files that are there once it is done.
        needs: digests of the runs that make its inputs.
        digest: of everything that determines the result (see `plan`).
        folder: what the tool leaves.
        strength: of what disturbs the ticket, in a swap or noise (see `perturb`).
    """

    name: str
    kind: str
    source: str
    weights: str
    arch: str
    round: int
    task: str
    seed: int
    metric: str
    config: Path | None
    ticket: Path | None
    command: tuple[str, ...]
    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...]
    needs: tuple[str, ...]
    digest: str
    folder: Path
    strength: float = 0.0

    @property
    def trains(self) -> bool:
        """Whether it trains on a task; else it makes tickets."""
        return self.task not in MAKING

    @property
    def title(self) -> str:
        """For people, a few words."""
        if self.kind == FIND:
            return f"find {self.source} {self.arch}, {self.round} rounds"
        detail = {"transplant": f" with {self.weights}"}
        detail |= dict.fromkeys(PERTURBED, f" {self.strength:g}")
        kind = self.kind + detail.get(self.kind, "")
        seed = "" if self.task == STRUCTURE else f" seed {self.seed}"
        return f"{self.task} {self.source} {self.arch} round {self.round} {kind}{seed}"


@dataclass(frozen=True)
class Result:
    """What has become of a run.

    Attributes:
        run: the run.
        state: one of `STATES`. A run that was stopped half-way is planned: it goes on.
        metrics: of a run that is done, by the names its tool uses; all fractions as percent. Empty
            where tickets are made; `results.find_metrics` reads the folder of a search.
        seconds: wall time of a run that is done; else NaN.
        log: what it printed; the file need not be there.
        problem: what is wrong with it, for people; None if nothing is. Of a run that failed, with
            its command and the end of its log.
    """

    run: Run
    state: str
    metrics: Mapping[str, float]
    seconds: float
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
        problems: all that is wrong, a sentence each. Those of single runs are among them.
    """

    folder: Path
    plan: "StoredPlan"
    results: tuple[Result, ...]
    makers: tuple[Result, ...]
    problems: tuple[str, ...]

    @property
    def left_out(self) -> Mapping[str, str]:
        """Tasks that cannot be run here, with the reason."""
        return self.plan.left_out


@dataclass(frozen=True)
class StoredPlan:
    """What ``plan.json`` holds.

    Attributes:
        config: the file that the study was planned by.
        runs: all of them.
        left_out: tasks that cannot be run here, with the reason.
        overrides: the ``key=value`` changes to the file.
        settings: what both come to.
        directory: the working directory, to which commands are relative.
    """

    config: Path
    runs: tuple[Run, ...]
    left_out: Mapping[str, str]
    overrides: tuple[str, ...]
    settings: Mapping[str, Any]
    directory: Path


def write_plan(
    folder: Path,
    config: Path,
    runs: Sequence[Run],
    left_out: Mapping[str, str],
    overrides: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write ``plan.json`` of a study, in whole.

    Paths into the folder are stored relative to it, so that it can be moved; all others are
    absolute, so that the plan can be read from any working directory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = os.path.abspath(folder)
    content = {
        "config": _stored(config, own),
        "overrides": list(overrides),
        "settings": dict(settings or {}),
        "directory": os.getcwd(),
        "left_out": dict(left_out),
        "runs": [_to_json(run, own) for run in runs],
    }
    write_atomically(folder / PLAN, json.dumps(content, indent=0).encode())


def read_plan(folder: Path) -> StoredPlan:
    """Read ``plan.json`` of a study.

    Raises:
        TicketError: if there is none, or it is damaged.
    """
    path = folder / PLAN
    if not path.is_file():
        raise TicketError(
            f"expected a study in {folder}, found no {PLAN}: start it with tools/study.py run"
        )
    try:
        content = json.loads(path.read_text())
        return StoredPlan(
            near(folder / content["config"]),
            tuple(_from_json(entry, folder) for entry in content["runs"]),
            content["left_out"],
            tuple(content["overrides"]),
            content["settings"],
            Path(content["directory"]),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise TicketError(
            f"{path} cannot be read ({error!r}): start tools/study.py run again, which writes it"
        ) from None


def read_study(folder: Path) -> Study:
    """Read a study's folder. What is wrong with single runs is among the problems, not raised.

    Raises:
        TicketError: if there is no plan in it, or it is damaged.
    """
    plan = read_plan(folder)
    runs = plan.runs
    markers = _read_markers(folder)
    results = [_result(run, folder, markers.get(run.name)) for run in runs]
    trainings = tuple(r for r in results if r.run.trains)
    makers = tuple(r for r in results if not r.run.trains)
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
    return Study(folder, plan, trainings, makers, problems)


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
        values = {"metrics": {}, "seconds": math.nan, **values}
        return Result(run, state, log=log, problem=problem, **values)

    if isinstance(marker, str):
        return result("failed", marker)
    if marker is not None and marker["digest"] == run.digest:
        if "seconds" in marker and all(map(_may_exist, run.outputs)):
            problem = _problem(run, marker["metrics"])
            return result("done", problem, metrics=marker["metrics"], seconds=marker["seconds"])
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
    """Whether it is there, as far as anybody can tell.

    A folder that cannot be read is no reason to redo what was done; `_problem` names it.
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


_PATHS = ("config", "ticket")
_TUPLES_OF_PATHS = ("inputs", "outputs")


def _to_json(run: Run, own: str) -> dict[str, Any]:
    # The folder follows from where the study is and the name.
    entry = {f.name: getattr(run, f.name) for f in fields(run) if f.name != "folder"}
    for name in _PATHS:
        entry[name] = None if entry[name] is None else _stored(entry[name], own)
    for name in _TUPLES_OF_PATHS:
        entry[name] = [_stored(path, own) for path in entry[name]]
    return entry


def _stored(path: Path, own: str) -> str:
    """A path as ``plan.json`` has it; ``own`` is the study's folder."""
    whole = os.path.abspath(path)
    return os.path.relpath(whole, own) if whole.startswith(own + os.sep) else whole


def _from_json(entry: dict[str, Any], folder: Path) -> Run:
    entry = dict(entry)
    for name in _PATHS:
        entry[name] = None if entry[name] is None else near(folder / entry[name])
    for name in _TUPLES_OF_PATHS:
        entry[name] = tuple(near(folder / path) for path in entry[name])
    for name in ("command", "needs"):
        entry[name] = tuple(entry[name])
    return Run(**entry, folder=folder / "runs" / entry["name"])
