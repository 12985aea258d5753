"""The configuration of a study: a YAML file, and ``key=value`` on the command line."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from lth_plugins.config import read_config
from lth_plugins.errors import ConfigError, unknown
from lth_plugins.settings import setting
from lth_plugins.study.plan.kinds import KINDS, MAKING, baselines, perturbations
from lth_plugins.study.plan.margin import read_margin
from lth_plugins.study.plan.tools import TOOLS
from lth_plugins.ticket.arch import ARCHITECTURES

AUTO = "auto"
LEAST_SEEDS = 3
"""What a verdict takes: with two, a variance has one degree of freedom."""
MOST_LOOKS = 4
EXECUTORS = ("local", "slurm")
_ARCHS = [arch.name for arch in ARCHITECTURES.values() if not arch.deep_stem]


# Paths are relative to the working directory. In those of sources and tasks, {arch} stands for the
# architecture.
@dataclass
class Source:
    """Where tickets come from: a search in a pre-training or on a task, or a folder of them."""

    config: str | None = None  # of tools/find_ticket.py
    # key=value changes to it, or to the task's.
    overrides: list[str] = field(default_factory=list)
    # Instead: a folder with round_00.ticket, …; or tickets by their rounds, each a path, a catalog
    # name or hf://…, with or without the dense one, round 0.
    tickets: Any = None
    # Or instead: a task of the study, on which IMP finds task-specific tickets (--imp-rounds). They
    # are trained on that task alone, unless tasks.NAME.sources says otherwise.
    task: str | None = None
    weights: str | None = None  # of task: the source whose dense ticket, round 0, the search prunes
    # Train from round_KK.trained.ticket, what each round's training ended in, instead of from θ:
    # what frozen trunks need. Of a pre-training's search, which keeps them then, or its folder.
    trained: bool = False
    # Instead of the study's; of baselines and perturbations only these rounds and 0 are trained.
    rounds: list[int] | None = setting(None, least=1)

    @property
    def given(self) -> dict[int, str] | None:
        """The tickets by their rounds; None where a folder or a search has them."""
        return self.tickets if isinstance(self.tickets, dict) else None

    @property
    def has_dense(self) -> bool:
        """Whether there is a ticket of round 0, which has all of θ."""
        return self.given is None or 0 in self.given


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
    config: str = MISSING  # of the tool; of the tool script, the script itself
    # key=value changes to it; {out} stands for the folder of the run.
    overrides: list[str] = field(default_factory=list)
    metric: str | None = None  # what is compared; the tool's first by default
    inputs: list[str] = field(default_factory=list)  # files, folders: needed beside the tickets
    sources: list[str] = field(default_factory=list)  # whose tickets; by default all
    shown: Shown = field(default_factory=Shown)
    # The loss that still matches: points of the metric, 0.5 by default, or 1% of dense.
    margin: str | None = None


@dataclass
class Perturbation:
    """Which tickets to perturb, and how much: differently for each seed."""

    rounds: list[int] = setting(least=0)
    strengths: list[float] = setting(above=0)  # see `perturb.swapped` and `perturb.noisy`


@dataclass
class Connectivity:
    """Which tickets to interpolate between two seeds, see ``study.py connect``."""

    rounds: list[int] = setting(factory=list, least=0)  # 0 is the dense network
    tasks: list[str] = field(default_factory=list)


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
    # A list; or auto, which adds seeds where a verdict is open, from min_seeds up to max_seeds.
    seeds: Any = MISSING
    min_seeds: int = 3
    max_seeds: int = 12
    rounds: list[int] = setting(least=1)  # of the tickets; the dense round 0 is always trained
    baselines: dict[str, list[int]] = field(default_factory=dict)  # rounds of each kind
    perturbations: dict[str, Perturbation] = field(default_factory=dict)  # by kind
    connectivity: Connectivity = field(default_factory=Connectivity)
    prepare: list[str] = field(default_factory=list)  # makes data: Python scripts, or lth …
    report: Texts = field(default_factory=Texts)
    executor: str = setting("local", choices=EXECUTORS)
    # Runs at a time; by default one per GPU, or one, and 64 on Slurm.
    parallel: int | None = setting(None, least=1)
    partition: str | None = None  # of Slurm
    slurm: dict[str, Any] = field(default_factory=dict)  # submitit's further settings of Slurm

    def check(self) -> None:
        _check_seeds(self)
        for key in ("archs", "rounds", "sources", "tasks"):
            _check_each_once(key, list(getattr(self, key)))
        _check_names(self)
        _check_kinds(self)
        _check_connectivity(self)

    @property
    def folder(self) -> Path:
        return Path(self.out).expanduser()

    @property
    def first_seeds(self) -> list[int]:
        """The seeds of everything that is trained; of ``auto`` those before the first look."""
        return list(range(self.min_seeds)) if self.seeds == AUTO else self.seeds

    @property
    def looks(self) -> tuple[int, ...]:
        """Of ``auto``, the number of seeds at each look, four or fewer; else none."""
        return looks_of(vars(self))

    def rounds_of(self, source: str) -> list[int]:
        """The rounds at which tickets of a source are trained."""
        own = self.sources[source].rounds
        return self.rounds if own is None else own

    def has_round(self, source: str, k: int) -> bool:
        """Whether baselines and perturbations of a round are trained of a source."""
        own = self.sources[source].rounds
        return own is None or k == 0 or k in own

    @property
    def named_configs(self) -> list[str]:
        """The configurations that it names."""
        given = [s.config for s in self.sources.values()] + [t.config for t in self.tasks.values()]
        configs = [config for config in given if config]
        return [c.replace("{arch}", arch) for arch in self.archs for c in configs]


def looks_of(settings: Mapping[str, Any]) -> tuple[int, ...]:
    """`StudyConfig.looks` of the settings that ``plan.json`` has."""
    if settings.get("seeds") != AUTO:
        return ()
    least, most = settings["min_seeds"], settings["max_seeds"]
    step = math.ceil((most - least) / (MOST_LOOKS - 1))
    return (*range(least, most, step), most)


def load_config(path: str | PathLike[str], overrides: Sequence[str] = ()) -> StudyConfig:
    """Read a study's configuration and check it, as `read_config` does."""
    return read_config(StudyConfig, path, overrides)


def _check_each_once(key: str, values: Sequence[Any]) -> None:
    if not values or len(set(values)) < len(values):
        raise ConfigError(f"expected {key} to have one or more, each once, found {values}")


def _check_seeds(config: StudyConfig) -> None:
    if config.seeds != AUTO:
        seeds = config.seeds
        if not isinstance(seeds, list) or any(type(n) is not int or n < 0 for n in seeds):
            raise ConfigError(
                f"expected seeds to be a list of numbers of 0 or more, or {AUTO}, found "
                f"{config.seeds}"
            )
        _check_each_once("seeds", seeds)
        return
    if config.min_seeds < LEAST_SEEDS:
        raise ConfigError(
            f"expected min_seeds of {LEAST_SEEDS} or more for seeds={AUTO}, found "
            f"{config.min_seeds}: whether to add seeds follows from their variance, and "
            f"{'one has none' if config.min_seeds == 1 else 'that of fewer says too little'}"
        )
    if config.max_seeds <= config.min_seeds:
        raise ConfigError(
            f"expected max_seeds of more than min_seeds={config.min_seeds} for seeds={AUTO}, found "
            f"{config.max_seeds}: there would be nothing to add"
        )


def _check_connectivity(config: StudyConfig) -> None:
    wanted = config.connectivity
    for name in wanted.tasks:
        if name not in config.tasks:
            raise unknown("connectivity.tasks", name, config.tasks)
        tool = config.tasks[name].tool
        if TOOLS[tool].evaluation is None:
            raise ConfigError(
                f"expected connectivity.tasks whose tools evaluate checkpoints, found {name}, of "
                f"the tool {tool}, which does not say how: leave it out"
            )
    if bool(wanted.rounds) != bool(wanted.tasks):
        raise ConfigError(
            f"expected connectivity to have both rounds and tasks, found {wanted}: give both, or "
            "leave it out"
        )
    known = {k for source in config.sources for k in config.rounds_of(source)}
    if any(source.has_dense for source in config.sources.values()):
        known.add(0)
    if absent := sorted(set(wanted.rounds) - known):
        raise ConfigError(
            f"expected connectivity.rounds among those that are trained, {sorted(known)}, found "
            f"{absent}: add them to rounds, or leave them out"
        )
    if wanted.rounds and len(config.first_seeds) < 2:
        raise ConfigError(
            f"connectivity lies between two seeds, and seeds is {config.seeds}: give two or more"
        )


def _check_names(config: StudyConfig) -> None:
    for name in (*config.sources, *config.tasks):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) or name in MAKING:
            raise ConfigError(
                f"{name!r} cannot name a source or a task, because files are named after it: use "
                f"letters, digits, '_', '.' and '-', and none of {', '.join(MAKING)}"
            )
    for name, source in config.sources.items():
        if sum(way is not None for way in (source.config, source.tickets, source.task)) != 1:
            raise ConfigError(
                f"expected sources.{name} to have one of config, to find tickets in a "
                "pre-training, task, to find them on a task, and tickets, a folder or the tickets "
                f"by their rounds; found {source}"
            )
        _check_task_specific(config, name, source)
        if source.trained and (source.task is not None or source.given is not None):
            raise ConfigError(
                f"sources.{name}.trained is for the search of a pre-training and for a folder of "
                "its tickets, found "
                + ("a task" if source.task is not None else "files: name the trained ones instead")
            )
        if source.rounds is not None:
            _check_each_once(f"sources.{name}.rounds", source.rounds)
        _check_tickets(config, name, source)
    for name, task in config.tasks.items():
        _check_shown(name, task)
        _check_metric(name, task)
        for source_name in task.sources:
            if source_name not in config.sources:
                raise unknown(f"tasks.{name}.sources", source_name, config.sources)


def _check_metric(name: str, task: Task) -> None:
    if task.margin is not None:
        read_margin(f"tasks.{name}.margin", task.margin)
    metrics = TOOLS[task.tool].metrics
    if metrics:
        if task.metric is not None and task.metric not in metrics:
            raise unknown(f"tasks.{name}.metric", task.metric, metrics)
        return
    if task.metric is None:
        raise ConfigError(
            f"expected tasks.{name}.metric, found none: name the metric to compare, higher is "
            f"better, among those that {task.config} measures"
        )
    if task.margin is None:
        raise ConfigError(
            f"expected tasks.{name}.margin, found none: only you know the scale of {task.metric}. "
            "Give the loss that still matches in its units, such as 0.5, or as a part of the dense "
            "mean, such as 1%"
        )


def _check_tickets(config: StudyConfig, name: str, source: Source) -> None:
    key, given = f"sources.{name}.tickets", source.given
    if given is None:
        if not isinstance(source.tickets, str | None):
            raise ConfigError(
                f"expected {key} to be a folder, or tickets by their rounds such as "
                f"{{6: NAME, 7: FILE}}, found {source.tickets}"
            )
        return
    if any(type(k) is not int or k < 0 or type(ref) is not str for k, ref in given.items()):
        raise ConfigError(
            f"expected {key} to have a path or a name for rounds of 0 or more, found {given}"
        )
    kinds = {**config.baselines, **{n: p.rounds for n, p in config.perturbations.items()}}
    wanted = {kind: [k for k in ks if config.has_round(name, k)] for kind, ks in kinds.items()}
    for kind, rounds in wanted.items():
        if rounds and kind in KINDS and KINDS[kind].dense_weights and not source.has_dense:
            raise ConfigError(
                f"{kind} needs all weights of the dense network, and {key} has no round 0: a "
                "ticket's file holds only the weights that it keeps. Add the dense ticket as "
                f"round 0, or leave {kind} out; reinit needs no weights"
            )
    trained = {*config.rounds_of(name), *(k for rounds in wanted.values() for k in rounds if k)}
    if absent := sorted(trained - given.keys()):
        raise ConfigError(
            f"expected {key} to have a ticket of each round that is trained, found none of "
            f"{absent}: add them, or give sources.{name}.rounds"
        )


def _check_task_specific(config: StudyConfig, name: str, source: Source) -> None:
    if source.task is None:
        if source.weights is not None:
            raise ConfigError(
                f"sources.{name}.weights is what a search on a task starts from: leave it out, or "
                f"give sources.{name}.task"
            )
        return
    if source.task not in config.tasks:
        raise unknown(f"sources.{name}.task", source.task, config.tasks)
    tool = config.tasks[source.task].tool
    if not TOOLS[tool].searches:
        raise ConfigError(
            f"expected sources.{name}.task whose tool finds tickets, found {source.task}, of the "
            f"tool {tool}, which does not: find them with task_search in a script of your own, and "
            f"give the folder as sources.{name}.tickets"
        )
    dense = [n for n, other in config.sources.items() if other.task is None and other.has_dense]
    if source.weights not in dense:
        raise unknown(f"sources.{name}.weights", f"{source.weights}", dense)


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
