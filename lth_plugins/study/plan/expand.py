"""From the configuration of a study to all of its runs.

A run's digest covers what its tool's configuration comes to, the kind of run, the seed, the
tickets, the commands that prepare data, and the version of this package. A ticket counts by its
digest, or, as long as it has to be found, by the recipe that finds it and its round. Paths, the
environment and the content of datasets do not count, but for the root of data.name=imagefolder,
which is all that identifies the dataset.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lth_plugins import __version__, pretrain
from lth_plugins.cli import command
from lth_plugins.errors import ConfigError, RunError
from lth_plugins.pretrain.config import recipe
from lth_plugins.pruning.search.imp import round_path, trained_path
from lth_plugins.shipped import find_config
from lth_plugins.study.plan.config import Source, StudyConfig, Task
from lth_plugins.study.plan.kinds import (
    FIND,
    JUDGED,
    KINDS,
    LINE,
    LINE_FILE,
    PERTURB,
    SEARCH,
    STRUCTURE,
    UNMASK,
)
from lth_plugins.study.plan.paths import near, prepared_by
from lth_plugins.study.plan.runs import Run
from lth_plugins.study.plan.tools import TOOLS, Training, data_identity
from lth_plugins.ticket.catalog import TicketCatalog
from lth_plugins.ticket.choice import Choice
from lth_plugins.ticket.file import read_digest
from lth_plugins.training.places import dataset_path


@dataclass(frozen=True)
class Plan:
    """What a study consists of.

    Attributes:
        runs: all of them, each after those that it needs. Trainings are in the order of their
            seeds, so that the first third of three seeds already shows everything once.
        left_out: tasks that cannot be run here, with the reason.
    """

    runs: tuple[Run, ...]
    left_out: Mapping[str, str]


Point = tuple[str, str, str, int]
"""Architecture, source, task and round of tickets."""


def plan(config: StudyConfig, seeds: Mapping[Point, int] | None = None) -> Plan:
    """All runs of a study.

    Args:
        config: of the study.
        seeds: of ``seeds: auto``, how many seeds some tickets get, and with them the dense networks
            that they are compared with. All else has those before the first look.

    Raises:
        ConfigError: if a configuration file is missing or invalid, or two runs are the same.
        TicketError: if a ticket is missing.
        RunError: if no task can run here.
    """
    missing = {name: TOOLS[task.tool].missing for name, task in config.tasks.items()}
    left_out = {name: reason for name, reason in missing.items() if reason is not None}
    if len(left_out) == len(config.tasks):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise RunError(f"expected a task that can run here, found none: {reasons}")
    for line in config.prepare:
        prepared_by(line)  # refuses what is none
    tasks = [
        _Task(config, name, task, arch)
        for arch in config.archs
        for name, task in config.tasks.items()
        if name not in left_out
    ]
    tickets = [t for arch in config.archs for t in _all_tickets(config, arch, tasks)]
    structured = [s for t in tickets for s in _structure(config, t)]
    perturbed = [
        p for seed in config.first_seeds for t in tickets for p in _perturb(config, t, seed)
    ]
    makers = [t.maker for t in (*tickets, *structured, *perturbed) if t.maker is not None]
    trainings = [
        run
        for seed in config.first_seeds
        for task in tasks
        for run in (
            *_trainings(config, task, task.own(tickets), seed),
            *_trainings_of_made(config, task, task.own([*structured, *perturbed]), seed),
        )
    ]
    counts = dict(seeds or {})
    trainings += [
        run
        for seed in range(len(config.first_seeds), max(counts.values(), default=0))
        for task in tasks
        for run in _more(config, task, task.own(tickets), seed, counts)
    ]
    _check_all_differ(trainings)
    return Plan((*makers, *trainings, *_lines(config, trainings)), left_out)


def check_inputs(plan: Plan, pending: Iterable[Run]) -> None:
    """Check that what runs need is there, or made by a run.

    Args:
        plan: of the study.
        pending: its runs that are not done.

    Raises:
        RunError: naming all that is missing.
    """
    made = {run.folder for run in plan.runs if not run.trains}
    absent: dict[Path, str] = {}
    for run in pending:
        for path in run.inputs:
            if path.parent not in made and not os.path.exists(path):
                absent.setdefault(path, run.task)
    if absent:
        each = "; ".join(f"{task} needs {path}" for path, task in absent.items())
        raise RunError(
            f"{each}, which is not there (paths are relative to {Path.cwd()}): put it there "
            "(docs/photos.md says where public datasets are from, and their layout), make it, or "
            "correct the configuration, such as tasks.NAME.inputs"
        )


@dataclass(frozen=True)
class _Tickets:
    """Tickets of a source in an architecture, which are there already or made by a run.

    Attributes:
        folder: where they are, or will be.
        maker: the run that makes them; None where they are there.
        given: files of rounds that are elsewhere, and there.
        has_dense: whether there is a ticket of round 0 with all of θ.
        trained: whether rounds start from what their own training ended in, instead of from θ.
    """

    source: str
    arch: str
    folder: Path
    maker: Run | None
    given: Mapping[int, Path] = field(default_factory=dict)
    has_dense: bool = True
    trained: bool = False

    def path(self, k: int) -> Path:
        if self.trained and k > 0:
            return trained_path(self.folder, k)
        return self.given.get(k, round_path(self.folder, k))

    def digest(self, k: int) -> str:
        """What stands for the ticket of a round in a run's digest."""
        if self.maker is None or k in self.given:
            return read_digest(self.path(k))
        return f"{self.maker.digest}/{self.path(k).stem if self.trained else k}"

    def needs(self, k: int) -> tuple[str, ...]:
        """What makes the ticket of a round."""
        return () if self.maker is None or k in self.given else (self.maker.digest,)


def _rounds(config: StudyConfig, name: str) -> int:
    """How often a search of a source prunes."""
    others = [*config.baselines.values(), *(p.rounds for p in config.perturbations.values())]
    wanted = [k for ks in others for k in ks if config.has_round(name, k)]
    return max(config.rounds_of(name) + wanted)


def _tickets(config: StudyConfig, name: str, source: Source, arch: str) -> _Tickets:
    if source.given is not None:
        return _given(config, name, source.given, arch)
    if source.tickets is not None:
        return _Tickets(name, arch, _path(source.tickets, arch), None, trained=source.trained)
    rounds = _rounds(config, name)
    path = _config(source.config or "", arch)
    changes = [*source.overrides, f"arch={arch}"]
    settings = pretrain.load_config(path, [*changes, "out=any"])
    found_by = {**recipe(settings), **data_identity(settings.data)}
    digest = _digest(find=found_by, prepare=config.prepare)
    run_name, folder = _named(config, f"{FIND}-{name}-{arch}", digest)
    last = (trained_path if source.trained else round_path)(folder, rounds)
    search = Run(
        name=run_name,
        kind=FIND,
        source=name,
        weights=name,
        arch=arch,
        round=rounds,
        task=FIND,
        seed=settings.seed,
        config=path,
        command=(
            *command("find"),
            f"{path}",
            *changes,
            *(["keep=trained"] if source.trained else []),
            f"rounds={rounds}",
            f"out={folder}",
        ),
        inputs=(path,),
        outputs=(last,),
        digest=digest,
        folder=folder,
    )
    return _Tickets(name, arch, folder, search, trained=source.trained)


def _given(config: StudyConfig, name: str, refs: Mapping[int, str], arch: str) -> _Tickets:
    """Tickets by their rounds. What is trained from scratch has masks made of the first one."""
    files = {k: _file(f"sources.{name}.tickets", ref, arch) for k, ref in refs.items()}
    given = _Tickets(name, arch, config.folder, None, files, has_dense=0 in files)
    if given.has_dense or 0 not in config.baselines.get("reinit", ()):
        return given
    made = _made(config, given, PERTURB, UNMASK, min(files), (f"--{UNMASK}",), to=0)
    return replace(given, folder=made.folder, maker=made.maker)


def _file(key: str, ref: str, arch: str) -> Path:
    found = TicketCatalog.find(ref.replace("{arch}", arch))
    if isinstance(found, Path):
        return near(found)
    raise ConfigError(
        f"expected {key} to name files, found {ref}, which is made by a function: save it, and "
        "give the file"
    )


def _structure(config: StudyConfig, tickets: _Tickets) -> Iterator[_Tickets]:
    """The tickets of a source, structured: each a folder with one ticket, for all seeds."""
    wanted = {
        (KINDS[kind].made_as, k)
        for kind, rounds in config.baselines.items()
        if KINDS[kind].made_by == STRUCTURE
        for k in rounds
        if config.has_round(tickets.source, k)
    }
    for structure, k in sorted(wanted):
        yield _made(config, tickets, STRUCTURE, structure, k, ("--kind", structure))


def _perturb(config: StudyConfig, tickets: _Tickets, seed: int) -> Iterator[_Tickets]:
    """The perturbed tickets of a source: each a folder with one ticket."""
    for kind, wanted in config.perturbations.items():
        for k, strength in itertools.product(wanted.rounds, wanted.strengths):
            if config.has_round(tickets.source, k):
                options = (f"--{KINDS[kind].made_as}", f"{strength}", "--seed", f"{seed}")
                yield _made(config, tickets, PERTURB, kind, k, options, seed, strength)


def _made(
    config: StudyConfig,
    tickets: _Tickets,
    task: str,
    kind: str,
    k: int,
    options: Sequence[str],
    seed: int = 0,
    strength: float = 0.0,
    to: int | None = None,
) -> _Tickets:
    """What ``tools/ticket.py TASK`` makes of round k's ticket: a folder with one, of round ``to``.

    That round is k by default.
    """
    # A ticket's file has no other weights than those that its own mask keeps.
    dense = tickets.path(0) if kind != UNMASK and KINDS[kind].dense_weights else None
    digest = _digest(
        **{task: kind},
        ticket=tickets.digest(k),
        weights=None if dense is None else tickets.digest(0),
        strength=strength,
        seed=seed,
        prepare=config.prepare,
    )
    detail = f"-{strength:g}-s{seed}" if task == PERTURB else ""
    what = f"{task}-{tickets.source}-{tickets.arch}-r{k:02d}-{kind}{detail}"
    name, folder = _named(config, what, digest)
    ticket, output = tickets.path(k), round_path(folder, k if to is None else to)
    weights = [] if dense is None else ["--weights", f"{dense}"]
    maker = Run(
        name=name,
        kind=kind,
        source=tickets.source,
        weights=tickets.source,
        arch=tickets.arch,
        round=k,
        task=task,
        seed=seed,
        ticket=ticket,
        command=(*command("ticket"), task, f"{ticket}", f"{output}", *weights, *options),
        inputs=(ticket, *([dense] if dense else [])),
        outputs=(output,),
        needs=tickets.needs(k),
        digest=digest,
        folder=folder,
        strength=strength,
    )
    return _Tickets(tickets.source, tickets.arch, folder, maker)


@dataclass(frozen=True)
class _Task:
    """A task of a study in an architecture."""

    study: StudyConfig
    name: str
    task: Task
    arch: str

    @property
    def config(self) -> Path:
        return _config(self.task.config, self.arch)

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        tool = TOOLS[self.task.tool]
        return {
            "tool": self.task.tool,
            "settings": tool.settings(self.config, self.task.overrides, self.arch),
            "prepare": self.study.prepare,
        }

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The files and folders that it needs beside tickets."""
        return tuple(dataset_path(_path(text, self.arch)) for text in self.task.inputs)

    def own(self, tickets: Sequence[_Tickets]) -> list[_Tickets]:
        """The tickets of its architecture and sources."""
        sources = self.study.sources.items()
        of = self.task.sources or [n for n, s in sources if s.task in (None, self.name)]
        return [t for t in tickets if t.arch == self.arch and t.source in of]

    def run(
        self,
        kind: str,
        masks: _Tickets,
        weights: _Tickets,
        k: int,
        seed: int,
        strength: float = 0.0,
    ) -> Run:
        """Train the masks of round k."""
        tool = TOOLS[self.task.tool]
        # A ticket's file has no other weights than those that it keeps.
        own = KINDS[kind].made_by or not KINDS[kind].dense_weights
        dense = None if own else weights.path(0)
        digest = _digest(
            **self.settings,
            kind="ticket" if kind == "dense" else kind,
            ticket=masks.digest(k),
            weights=None if dense is None else weights.digest(0),
            seed=seed,
        )
        full_kind = f"{kind}_{weights.source}" if KINDS[kind].other_weights else kind
        full_kind += f"_{strength:g}" if KINDS[kind].strength else ""
        what = f"{self.name}-{masks.source}-{self.arch}-r{k:02d}-{full_kind}-s{seed}"
        run_name, folder = _named(self.study, what, digest)
        options: Mapping[str, Any] = KINDS[kind].options
        choice = Choice(masks.path(k), dense, seed=seed, **options)
        overrides = [text.replace("{out}", f"{folder}") for text in self.task.overrides]
        training = Training(self.config, overrides, self.arch, choice, seed, folder)
        inputs = [self.config, masks.path(k), *([dense] if dense else [])]
        return Run(
            name=run_name,
            kind=kind,
            source=masks.source,
            weights=weights.source,
            arch=self.arch,
            round=k,
            task=self.name,
            seed=seed,
            metric=self.task.metric or tool.metrics[0],
            config=self.config,
            ticket=masks.path(k),
            command=tool.command(training),
            inputs=(*inputs, *self.inputs),
            needs=tuple(dict.fromkeys(masks.needs(k) + (weights.needs(0) if dense else ()))),
            digest=digest,
            folder=folder,
            strength=strength,
        )


def _all_tickets(config: StudyConfig, arch: str, tasks: Sequence[_Task]) -> Iterator[_Tickets]:
    """The tickets of all sources but those of tasks that are left out."""
    found = {
        name: _tickets(config, name, source, arch)
        for name, source in config.sources.items()
        if source.task is None
    }
    by_name = {task.name: task for task in tasks if task.arch == arch}
    for name, source in config.sources.items():
        if source.task is None:
            yield found[name]
        elif source.task in by_name and source.weights is not None:
            dense = found[source.weights]
            yield _task_specific(config, name, source, by_name[source.task], dense)


def _task_specific(
    config: StudyConfig, name: str, source: Source, task: _Task, dense: _Tickets
) -> _Tickets:
    """The tickets that IMP finds on a task, from the dense ticket of another source."""
    rounds, changes = _rounds(config, name), [*task.task.overrides, *source.overrides]
    tool = TOOLS[task.task.tool]
    digest = _digest(
        search=tool.settings(task.config, changes, task.arch),
        tool=task.task.tool,
        ticket=dense.digest(0),
        prepare=config.prepare,
    )
    run_name, folder = _named(config, f"{SEARCH}-{name}-{task.arch}", digest)
    choice, seed = Choice(dense.path(0)), config.first_seeds[0]
    training = Training(
        task.config,
        [text.replace("{out}", f"{folder}") for text in changes],
        *(task.arch, choice, seed, folder),
        rounds=rounds,
    )
    search = Run(
        name=run_name,
        kind=FIND,
        source=name,
        weights=dense.source,
        arch=task.arch,
        round=rounds,
        task=SEARCH,
        seed=seed,
        config=task.config,
        ticket=dense.path(0),
        command=tool.command(training),
        inputs=(task.config, dense.path(0), *task.inputs),
        outputs=(round_path(folder, rounds),),
        needs=dense.needs(0),
        digest=digest,
        folder=folder,
    )
    return _Tickets(name, task.arch, folder, search)


def _trainings(
    config: StudyConfig, task: _Task, tickets: Sequence[_Tickets], seed: int
) -> Iterator[Run]:
    for masks in tickets:
        if masks.has_dense:
            yield task.run("dense", masks, masks, 0, seed)
        for k in config.rounds_of(masks.source):
            yield task.run("ticket", masks, masks, k, seed)
        for kind, rounds in config.baselines.items():
            if KINDS[kind].made_by:  # it has tickets of its own
                continue
            others = [t for t in tickets if t is not masks]
            for weights in others if KINDS[kind].other_weights else [masks]:
                for k in rounds:
                    if config.has_round(masks.source, k):
                        yield task.run(kind, masks, weights, k, seed)


def _more(
    config: StudyConfig,
    task: _Task,
    tickets: Sequence[_Tickets],
    seed: int,
    counts: Mapping[Point, int],
) -> Iterator[Run]:
    """Trainings of a seed that only some tickets get, and of the dense networks beside them."""
    for masks in tickets:
        point = (masks.arch, masks.source, task.name)
        rounds = [k for k in config.rounds_of(masks.source) if counts.get((*point, k), 0) > seed]
        for k in (*((0,) if masks.has_dense else ()), *rounds) if rounds else ():
            yield task.run("ticket" if k else "dense", masks, masks, k, seed)


def _lines(config: StudyConfig, trainings: Sequence[Run]) -> Iterator[Run]:
    """Evaluations between the first two seeds of tickets."""
    if not config.connectivity.rounds:
        return
    one, other = config.first_seeds[:2]
    ends = {
        (run.task, run.source, run.arch, run.round, run.seed): run
        for run in trainings
        if run.kind in JUDGED and run.task in config.connectivity.tasks
    }
    for (name, source, arch, k, seed), first in ends.items():
        if seed == one and k in config.connectivity.rounds:
            yield _line(config, first, ends[name, source, arch, k, other])


def _line(config: StudyConfig, first: Run, second: Run) -> Run:
    """Evaluate between two seeds of a condition."""
    digest = _digest(line=[first.digest, second.digest])
    what = f"{first.task}-{first.source}-{first.arch}-r{first.round:02d}-{LINE}"
    run_name, folder = _named(config, what, digest)
    return replace(
        first,
        name=run_name,
        kind=LINE,
        metric="",
        command=(*command("study"), "connect", f"{config.folder}", run_name),
        outputs=(folder / LINE_FILE,),
        needs=(first.digest, second.digest),
        digest=digest,
        folder=folder,
    )


def _trainings_of_made(
    config: StudyConfig, task: _Task, tickets: Sequence[_Tickets], seed: int
) -> Iterator[Run]:
    """Trainings of the tickets that `tools/ticket.py` makes: structured and perturbed ones."""
    for ticket in tickets:
        made = ticket.maker
        if made is None:
            continue
        if made.task == PERTURB and made.seed == seed:
            yield task.run(made.kind, ticket, ticket, made.round, seed, made.strength)
        for kind, rounds in config.baselines.items() if made.task == STRUCTURE else ():
            row = KINDS[kind]
            if (row.made_by, row.made_as) == (STRUCTURE, made.kind) and made.round in rounds:
                yield task.run(kind, ticket, ticket, made.round, seed)


def _check_all_differ(runs: Sequence[Run]) -> None:
    by_digest: dict[str, Run] = {}
    for run in runs:
        other = by_digest.setdefault(run.digest, run)
        if other is not run:
            raise ConfigError(
                f"expected every run to differ, found that {run.title} and {other.title} are the "
                "same: leave one of the two out of the configuration"
            )


def _named(config: StudyConfig, what: str, digest: str) -> tuple[str, Path]:
    """The name of a run, and the folder that its tool leaves its results in."""
    name = f"{what}-{digest[:8]}"
    return name, config.folder / "runs" / name


def _path(text: str, arch: str) -> Path:
    return Path(text.replace("{arch}", arch)).expanduser()


def _config(text: str, arch: str) -> Path:
    return near(find_config(_path(text, arch)))


def _digest(**content: Any) -> str:
    text = json.dumps({**content, "version": __version__}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
