"""`Run`, one planned run of a tool, and ``plan.json``, which holds all runs of a study.

Paths into the study's folder are stored relative to it, so that the folder can be moved. All others
are absolute, so that the plan can be read from any working directory.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lth_plugins.errors import RunError
from lth_plugins.resilience.atomic import write_atomically
from lth_plugins.study.plan.kinds import FIND, LINE, MAKING, STRUCTURE
from lth_plugins.study.plan.paths import near

PLAN = "plan.json"


@dataclass(frozen=True)
class Run:
    """One planned run of a tool.

    Attributes:
        name: unique in the study and fit for a file name; it ends in the beginning of the digest.
        kind: a name in `KINDS`, `FIND` or `LINE`. Of a run that makes a structured ticket, the
            structure.
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
    command: tuple[str, ...]
    digest: str
    folder: Path
    seed: int = 0
    metric: str = ""
    config: Path | None = None
    ticket: Path | None = None
    inputs: tuple[Path, ...] = ()
    outputs: tuple[Path, ...] = ()
    needs: tuple[str, ...] = ()
    strength: float = 0.0

    @property
    def trains(self) -> bool:
        """Whether it trains on a task; else it makes tickets, or evaluates between two seeds."""
        return self.task not in MAKING and self.kind != LINE

    @property
    def stage(self) -> str:
        """What it is counted with: its task, or what runs like it are for."""
        return "connectivity" if self.kind == LINE else self.task

    @property
    def title(self) -> str:
        """A few words for people."""
        if self.kind == FIND:
            return f"find {self.source} {self.arch}, {self.round} rounds"
        if self.kind == LINE:
            return f"{self.task} {self.source} {self.arch} round {self.round} between two seeds"
        kind = f"{self.kind} with {self.weights}" if self.weights != self.source else self.kind
        kind += f" {self.strength:g}" if self.strength else ""
        seed = "" if self.task == STRUCTURE else f" seed {self.seed}"
        return f"{self.task} {self.source} {self.arch} round {self.round} {kind}{seed}"


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
    """Write ``plan.json`` of a study atomically."""
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
        RunError: if it is missing or damaged.
    """
    path = folder / PLAN
    if not path.is_file():
        raise RunError(
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
        raise RunError(
            f"{path} cannot be read ({error!r}): start tools/study.py run again, which writes it"
        ) from None


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
