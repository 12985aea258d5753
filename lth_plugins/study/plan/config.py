"""What a study is configured by: a YAML file, and ``key=value`` on the command line."""

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from lth_plugins.config import read_config
from lth_plugins.errors import TicketError
from lth_plugins.study.plan.tools import TOOLS
from lth_plugins.study.run.state import KINDS, MAKING, PERTURBED
from lth_plugins.ticket.arch import ARCHITECTURES

EXECUTORS = ("local", "slurm")
BASELINES = tuple(kind for kind in KINDS if kind not in ("dense", "ticket", *PERTURBED))


# Paths are relative to the working directory. In those of sources and tasks, {arch} stands for the
# architecture.
@dataclass
class Source:
    """Where tickets come from: a search for them, or a folder that has them."""

    config: str | None = None  # of tools/find_ticket.py
    overrides: list[str] = field(default_factory=list)  # key=value changes to it
    tickets: str | None = None  # instead: a folder with round_00.ticket, …


@dataclass
class Task:
    """What tickets are transferred to."""

    tool: str = MISSING  # a row of TOOLS
    config: str = MISSING  # of the tool
    overrides: list[str] = field(default_factory=list)  # key=value changes to it
    metric: str | None = None  # what is compared; the tool's first by default
    inputs: list[str] = field(default_factory=list)  # files, folders: needed beside the tickets


@dataclass
class Perturbation:
    """Which tickets to disturb, and how much: each seed in another way."""

    rounds: list[int] = MISSING
    strengths: list[float] = MISSING  # see `perturb.swapped` and `perturb.noisy`


@dataclass
class StudyConfig:
    """Everything that `plan.plan` and `sweep.sweep` need."""

    out: str = MISSING  # folder for all results
    archs: list[str] = MISSING  # torchvision's ResNets
    sources: dict[str, Source] = MISSING  # by the names that the report gives them
    tasks: dict[str, Task] = MISSING
    seeds: list[int] = MISSING
    rounds: list[int] = MISSING  # of the tickets; the dense network, round 0, is always trained
    baselines: dict[str, list[int]] = field(default_factory=dict)  # rounds of each of BASELINES
    perturbations: dict[str, Perturbation] = field(default_factory=dict)  # by PERTURBED
    prepare: list[str] = field(default_factory=list)  # Python scripts that make data
    executor: str = "local"  # one of EXECUTORS
    parallel: int | None = None  # runs at a time; by default one a GPU or one, and 64 on Slurm
    partition: str | None = None  # of Slurm
    slurm: dict[str, Any] = field(default_factory=dict)  # submitit's further settings of Slurm

    @property
    def folder(self) -> Path:
        return Path(self.out).expanduser()

    @property
    def named_files(self) -> list[str]:
        """The configurations and scripts that it names, as `paths.shipped` finds them."""
        configs = [of.config for of in (*self.sources.values(), *self.tasks.values()) if of.config]
        scripts = [words[0] for command in self.prepare if (words := shlex.split(command))]
        return scripts + [c.replace("{arch}", arch) for arch in self.archs for c in configs]


def load_config(path: str | PathLike[str], overrides: Sequence[str] = ()) -> StudyConfig:
    """`read_config` of a study, its values checked.

    Raises:
        TicketError: if the file, a key or a value is not one.
    """
    config = read_config(StudyConfig, path, overrides)
    _check_values(config)
    return config


def _check_values(config: StudyConfig) -> None:
    groups: Mapping[str, Sequence[Any]] = {
        "archs": config.archs,
        "seeds": config.seeds,
        "rounds": config.rounds,
        "sources": list(config.sources),
        "tasks": list(config.tasks),
    }
    for key, values in groups.items():
        if not values or len(set(values)) < len(values):
            raise TicketError(f"expected {key} to have one or more, each once, found {values}")
    for name in (*config.sources, *config.tasks):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) or name in MAKING:
            raise TicketError(
                f"{name!r} cannot name a source or a task, because files are named after it: use "
                f"letters, digits, '_', '.' and '-', and none of {', '.join(MAKING)}"
            )

    _check_choice("executor", config.executor, EXECUTORS)
    for arch in config.archs:
        _check_choice("arch", arch, [a.name for a in ARCHITECTURES.values() if not a.deep_stem])
    for name, source in config.sources.items():
        if (source.config is None) == (source.tickets is None):
            raise TicketError(
                f"expected sources.{name} to have either config, to find tickets, or tickets, a "
                f"folder that has them; found {source}"
            )
    for name, task in config.tasks.items():
        _check_choice(f"tasks.{name}.tool", task.tool, list(TOOLS))
        tool = TOOLS[task.tool]
        if task.metric is not None:
            _check_choice(f"tasks.{name}.metric", task.metric, tool.metrics)
    _check_rounds(config)
    if config.parallel is not None and config.parallel < 1:
        raise TicketError(f"expected parallel to be 1 or more, found {config.parallel}")
    if min(config.seeds) < 0:
        raise TicketError(f"expected seeds of 0 or more, found {config.seeds}")


def _check_rounds(config: StudyConfig) -> None:
    if min(config.rounds) < 1:
        raise TicketError(
            f"expected rounds of 1 or more, found {config.rounds}: the dense network, which is "
            "round 0, is always trained"
        )
    for kind, rounds in config.baselines.items():
        _check_choice("baseline", kind, BASELINES)
        least = 0 if kind == "reinit" else 1  # all others of round 0 are a dense network, or none
        if len(set(rounds)) < len(rounds) or min(rounds, default=least) < least:
            raise TicketError(
                f"expected baselines.{kind} to be rounds of {least} or more, each once, found "
                f"{rounds}"
            )
    for kind, wanted in config.perturbations.items():
        _check_choice("perturbation", kind, PERTURBED)
        strengths, most = wanted.strengths, 1 if kind == "swap" else math.inf
        lists = (wanted.rounds, strengths)
        right = all(values and len(set(values)) == len(values) for values in lists)
        if not right or min(wanted.rounds) < 0 or not all(0 < s <= most for s in strengths):
            raise TicketError(
                f"expected perturbations.{kind} to have rounds of 0 or more and strengths above 0"
                f"{', up to 1' if kind == 'swap' else ''}, each once, found {wanted}"
            )
    if config.baselines.get("transplant") and len(config.sources) < 2:
        raise TicketError(
            "transplant lays the masks of one source over the weights of another, and there is "
            f"only {', '.join(config.sources)}: add a source, or leave transplant out"
        )


def _check_choice(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise TicketError(f"unknown {key} {value!r}; known are {', '.join(known)}")
