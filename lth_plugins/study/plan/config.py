"""The configuration of a study: a YAML file, and ``key=value`` on the command line."""

import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from lth_plugins.config import read_config
from lth_plugins.errors import ConfigError, unknown
from lth_plugins.settings import setting
from lth_plugins.study.plan.kinds import KINDS, MAKING, baselines, perturbations
from lth_plugins.study.plan.tools import TOOLS
from lth_plugins.ticket.arch import ARCHITECTURES

EXECUTORS = ("local", "slurm")
_ARCHS = [arch.name for arch in ARCHITECTURES.values() if not arch.deep_stem]


# Paths are relative to the working directory. In those of sources and tasks, {arch} stands for the
# architecture.
@dataclass
class Source:
    """Where tickets come from: a search, or a folder that holds them."""

    config: str | None = None  # of tools/find_ticket.py
    overrides: list[str] = field(default_factory=list)  # key=value changes to it
    tickets: str | None = None  # instead: a folder with round_00.ticket, …
    # Instead of the study's; of baselines and perturbations only these rounds and 0 are trained.
    rounds: list[int] | None = setting(None, least=1)


@dataclass
class Shown:
    """The test images of a detection or segmentation that the report shows with predictions."""

    images: str | None = None  # their folder; none: nothing is shown
    # Of boxes: a file in COCO's format. Of label maps: a folder that has NAME.png for each image.
    # {out} stands for the folder of a run.
    truth: str = ""
    classes: list[str] = field(default_factory=list)  # of label maps, by value
    count: int = setting(3, least=1)  # the first ones, not chosen


@dataclass
class Task:
    """What tickets are transferred to."""

    tool: str = setting(choices=TOOLS)
    config: str = MISSING  # of the tool
    # key=value changes to it; {out} stands for the folder of the run.
    overrides: list[str] = field(default_factory=list)
    metric: str | None = None  # what is compared; the tool's first by default
    inputs: list[str] = field(default_factory=list)  # files, folders: needed beside the tickets
    sources: list[str] = field(default_factory=list)  # whose tickets; by default all
    shown: Shown = field(default_factory=Shown)


@dataclass
class Perturbation:
    """Which tickets to perturb, and how much: differently for each seed."""

    rounds: list[int] = setting(least=0)
    strengths: list[float] = setting(above=0)  # see `perturb.swapped` and `perturb.noisy`


@dataclass
class Texts:
    """What the report says in its author's words."""

    title: str | None = None
    about: str | None = None  # a paragraph below the title
    caveats: list[str] = field(default_factory=list)  # a list at the end


@dataclass
class StudyConfig:
    """Everything that `plan.plan` and `sweep.sweep` need."""

    out: str = MISSING  # folder for all results
    archs: list[str] = setting(choices=_ARCHS)
    sources: dict[str, Source] = MISSING  # by the names that the report gives them
    tasks: dict[str, Task] = MISSING
    seeds: list[int] = setting(least=0)
    rounds: list[int] = setting(least=1)  # of the tickets; the dense round 0 is always trained
    baselines: dict[str, list[int]] = field(default_factory=dict)  # rounds of each kind
    perturbations: dict[str, Perturbation] = field(default_factory=dict)  # by kind
    prepare: list[str] = field(default_factory=list)  # Python scripts that make data
    report: Texts = field(default_factory=Texts)
    executor: str = setting("local", choices=EXECUTORS)
    # Runs at a time; by default one per GPU, or one, and 64 on Slurm.
    parallel: int | None = setting(None, least=1)
    partition: str | None = None  # of Slurm
    slurm: dict[str, Any] = field(default_factory=dict)  # submitit's further settings of Slurm

    def check(self) -> None:
        for key in ("archs", "seeds", "rounds", "sources", "tasks"):
            _check_each_once(key, list(getattr(self, key)))
        _check_names(self)
        _check_kinds(self)

    @property
    def folder(self) -> Path:
        return Path(self.out).expanduser()

    def rounds_of(self, source: str) -> list[int]:
        """The rounds at which tickets of a source are trained."""
        own = self.sources[source].rounds
        return self.rounds if own is None else own

    def has_round(self, source: str, k: int) -> bool:
        """Whether baselines and perturbations of a round are trained of a source."""
        own = self.sources[source].rounds
        return own is None or k == 0 or k in own

    @property
    def named_files(self) -> list[str]:
        """The configurations and scripts that it names."""
        given = [s.config for s in self.sources.values()] + [t.config for t in self.tasks.values()]
        configs = [config for config in given if config]
        scripts = [words[0] for command in self.prepare if (words := shlex.split(command))]
        return scripts + [c.replace("{arch}", arch) for arch in self.archs for c in configs]


def load_config(path: str | PathLike[str], overrides: Sequence[str] = ()) -> StudyConfig:
    """Read a study's configuration and check it, as `read_config` does."""
    return read_config(StudyConfig, path, overrides)


def _check_each_once(key: str, values: Sequence[Any]) -> None:
    if not values or len(set(values)) < len(values):
        raise ConfigError(f"expected {key} to have one or more, each once, found {values}")


def _check_names(config: StudyConfig) -> None:
    for name in (*config.sources, *config.tasks):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) or name in MAKING:
            raise ConfigError(
                f"{name!r} cannot name a source or a task, because files are named after it: use "
                f"letters, digits, '_', '.' and '-', and none of {', '.join(MAKING)}"
            )
    for name, source in config.sources.items():
        if (source.config is None) == (source.tickets is None):
            raise ConfigError(
                f"expected sources.{name} to have either config, to find tickets, or tickets, a "
                f"folder that has them; found {source}"
            )
        if source.rounds is not None:
            _check_each_once(f"sources.{name}.rounds", source.rounds)
    for name, task in config.tasks.items():
        _check_shown(name, task)
        metrics = TOOLS[task.tool].metrics
        if task.metric is not None and task.metric not in metrics:
            raise unknown(f"tasks.{name}.metric", task.metric, metrics)
        for source_name in task.sources:
            if source_name not in config.sources:
                raise unknown(f"tasks.{name}.sources", source_name, config.sources)


def _check_shown(name: str, task: Task) -> None:
    tool = TOOLS[task.tool]
    if task.shown.images is None:
        return
    if not tool.boxes and not tool.label_maps:
        raise ConfigError(
            f"tasks.{name}.shown is for boxes and label maps, which {task.tool} does not predict: "
            "leave it out"
        )
    if not task.shown.truth:
        raise ConfigError(f"expected tasks.{name}.shown.truth beside its images, found none")
    if tool.label_maps and not task.shown.classes:
        raise ConfigError(
            f"expected tasks.{name}.shown.classes, the names of the label maps' values, found none"
        )


def _check_kinds(config: StudyConfig) -> None:
    for name, rounds in config.baselines.items():
        if name not in baselines():
            raise unknown("baseline", name, baselines())
        least = KINDS[name].least_round
        if len(set(rounds)) < len(rounds) or min(rounds, default=least) < least:
            raise ConfigError(
                f"expected baselines.{name} to be rounds of {least} or more, each once, found "
                f"{rounds}"
            )
        if rounds and KINDS[name].other_weights and len(config.sources) < 2:
            raise ConfigError(
                f"{name} lays the masks of one source over the weights of another, and there is "
                f"only {', '.join(config.sources)}: add a source, or leave {name} out"
            )
    for name, wanted in config.perturbations.items():
        if name not in perturbations():
            raise unknown("perturbation", name, perturbations())
        _check_each_once(f"perturbations.{name}.rounds", wanted.rounds)
        _check_each_once(f"perturbations.{name}.strengths", wanted.strengths)
        strength = KINDS[name].strength
        most = strength.most if strength else math.inf
        if max(wanted.strengths) > most:
            raise ConfigError(
                f"expected perturbations.{name}.strengths to be at most {most:g}, found "
                f"{wanted.strengths}"
            )
