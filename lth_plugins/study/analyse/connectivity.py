"""Linear mode connectivity: does a line lead from one seed of a ticket to another?

Two networks that a ticket's seeds train to are linearly connected where the error along the
straight line between their weights stays as low as at its ends. Frankle, Dziugaite, Roy and Carbin
(arXiv 1912.05671, section 2) find that a sub-network matches where its seeds are connected: where
they are not, a verdict of not matching is explained by training that noise can turn anywhere.

BatchNorm's statistics are interpolated like weights, so that a tool's own evaluation does, without
training data. Statistics that are re-estimated give lower barriers (Jordan et al., arXiv
2211.08403): a barrier here is an upper bound.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lth_plugins.errors import RunError, TicketError
from lth_plugins.resilience.atomic import open_atomically, write_atomically
from lth_plugins.study.plan.kinds import LINE, LINE_FILE
from lth_plugins.study.plan.runs import Run, read_plan
from lth_plugins.study.plan.tools import TOOLS, Evaluation, Training
from lth_plugins.ticket import Ticket, locate
from lth_plugins.ticket.choice import Choice
from lth_plugins.ticket.keys import State

PLACES = tuple(i / 10 for i in range(11))
"""Where on the line networks are evaluated; 0 and 1 are its ends."""

_STATES = ("model", "state_dict")
"""Where detectron2's and mmengine's checkpoints have the state dict."""


@dataclass(frozen=True)
class Line:
    """A metric along the line between two seeds.

    Attributes:
        values: at each of `PLACES`; larger is better.
    """

    values: tuple[float, ...]

    @property
    def barrier(self) -> float:
        """The mean of the ends less the lowest value on the line; 0 where nothing is lower.

        It is the error barrier of arXiv 1912.05671, the highest error less the mean of the ends,
        in units of the metric.
        """
        return float(np.mean([self.values[0], self.values[-1]]) - min(self.values))


def interpolate(one: State, other: State, at: float) -> dict[str, Tensor]:
    """The network at a place between two.

    Args:
        one: its state dict, at place 0.
        other: one of the same entries and shapes, at place 1.
        at: the place.

    Returns:
        (1 - at) one + at other; integers, which count batches, are those of ``one``.

    Raises:
        TicketError: if they have other entries or shapes.
    """
    shapes = [{name: tuple(value.shape) for name, value in end.items()} for end in (one, other)]
    if odd := sorted(name for name, _ in set(shapes[0].items()) ^ set(shapes[1].items())):
        raise TicketError(
            f"expected two networks of the same entries and shapes, found another {odd[0]}: give "
            "two seeds of one training"
        )
    return {
        name: torch.lerp(value, other[name], at) if value.is_floating_point() else value
        for name, value in one.items()
    }


def check_end(state: State, ticket: Ticket) -> None:
    """Check that a network was trained under a ticket's masks.

    Raises:
        TicketError: if it has weights that the ticket prunes.
    """
    keys = locate(state).keys
    wrong = [name for name, mask in ticket.masks.items() if state[keys[name]][~mask].any()]
    if wrong:
        raise TicketError(
            f"expected both ends of the line to have the masks of one ticket, found weights that "
            f"it prunes in {len(wrong)} layers, such as {wrong[0]}: give two seeds of one ticket"
        )


def connect(folder: Path, name: str) -> Line:
    """Evaluate along the line of a planned run, and write `LINE_FILE`; resumes.

    Args:
        folder: of the study.
        name: of a run of the kind `LINE`, whose two seeds are done.

    Raises:
        RunError: if there is no such run, or an evaluation fails.
        TicketError: if the seeds are not of one ticket.
    """
    plan = read_plan(folder)
    run = next((run for run in plan.runs if (run.name, run.kind) == (name, LINE)), None)
    if run is None:
        raise RunError(
            f"expected a planned run of kind {LINE} in {folder}, found none named {name}"
        )
    task = plan.settings["tasks"][run.task]
    tool = TOOLS[task["tool"]]
    assert tool.evaluation is not None and run.ticket is not None  # the configuration was checked
    by_digest = {one.digest: one for one in plan.runs}
    ends = [by_digest[digest] for digest in run.needs]
    paths = [tool.evaluation.checkpoint(end.folder) for end in ends]
    contents = [_read(path) for path in paths]
    states = [_state(content) for content in contents]
    ticket = Ticket.load(run.ticket)
    for state in states:
        check_end(state, ticket)
    file = run.folder / LINE_FILE
    found: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
    between = run.folder / f"between{paths[0].suffix}"
    run.folder.mkdir(parents=True, exist_ok=True)
    for at in PLACES:
        if f"{at:g}" in found:
            continue
        _write(between, contents[0], interpolate(states[0], states[1], at))
        metrics = _evaluate(tool.evaluation, _training(run, task, at), between)
        found[f"{at:g}"] = float(metrics[ends[0].metric])
        write_atomically(file, json.dumps(found).encode())
        between.unlink()
    return read_line(run.folder)


def read_line(folder: Path) -> Line:
    """The line that `connect` left in the folder of its run.

    Raises:
        RunError: if it is not complete.
    """
    try:
        found = json.loads((folder / LINE_FILE).read_text())
        return Line(tuple(float(found[f"{at:g}"]) for at in PLACES))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"expected a metric at {len(PLACES)} places in {folder}: {error!r}"
        ) from None


def _training(run: Run, task: Mapping[str, Any], at: float) -> Training:
    """What the tool is told, as when the ends were trained."""
    assert run.config is not None and run.ticket is not None
    out = run.folder / f"at_{at:g}"
    shutil.rmtree(out, ignore_errors=True)  # of an evaluation that was stopped
    overrides = [text.replace("{out}", f"{out}") for text in task["overrides"]]
    choice = Choice(run.ticket, seed=run.seed)
    return Training(run.config, overrides, run.arch, choice, run.seed, out)


def _evaluate(evaluation: Evaluation, training: Training, checkpoint: Path) -> Mapping[str, float]:
    command: Sequence[str] = evaluation.command(training, checkpoint)
    process = subprocess.Popen([sys.executable, *command], stdin=subprocess.DEVNULL)
    try:
        code = process.wait()
    except BaseException:  # this process is stopped
        process.terminate()
        process.wait()
        raise
    if code:
        raise RunError(f"evaluating {checkpoint} failed with exit code {code}; see above")
    return evaluation.read(training.out)


def _read(path: Path) -> dict[str, Any]:
    """A checkpoint that a training of this study wrote, whole."""
    if path.suffix == ".safetensors":
        return dict(load_file(path))
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False)
    return content


def _state(content: Mapping[str, Any]) -> State:
    return next((content[key] for key in _STATES if key in content), content)


def _write(path: Path, content: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Write a checkpoint of another state dict; mmengine's notes beside it stay."""
    if path.suffix == ".safetensors":
        save_file(dict(state), path)
        return
    key = next(key for key in _STATES if key in content)
    notes = {"meta": content["meta"]} if "meta" in content else {}
    with open_atomically(path) as file:
        torch.save({**notes, key: dict(state)}, file)
