"""Task-specific tickets (m_T, θ): IMP whose every training is an ordinary run of a host's trainer.

A search's folder holds ``recipe.json``, ``initial.pth`` (the whole model that rounds are rewound
to, head included, as a checkpoint of the host), one ``round_KK.ticket`` a round and the host's run
of each, ``train_KK``; `TaskSearch.run` called again goes on where it stopped. What a host is, its
plug-in says (`Host`); nothing here knows one.
"""

import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from lth_plugins.errors import TicketError
from lth_plugins.pruning.search.imp import KEPT, check_options, imp, round_path
from lth_plugins.pruning.search.modules import BACKBONE, PREDICTORS, outside_trunk
from lth_plugins.pruning.structure import Refill
from lth_plugins.resilience.atomic import write_atomically
from lth_plugins.resilience.ranks import barrier, from_main, is_main
from lth_plugins.resilience.recipe import check_folder, digest
from lth_plugins.ticket.keys import State
from lth_plugins.ticket.locating import locate
from lth_plugins.ticket.masks import Masks
from lth_plugins.ticket.outside import Outside
from lth_plugins.ticket.ticket import Ticket

logger = logging.getLogger(__name__)

RECIPE, INITIAL, EARLY, FINISHED = "recipe.json", "initial.pth", "early.pth", "finished"
_LAST = "last_checkpoint"  # where fvcore and mmengine both note a run's latest checkpoint


@dataclass(frozen=True)
class TaskImp:
    """How to find task-specific tickets.

    Attributes:
        rounds: how many times to prune; 0 is an ordinary training.
        fraction: of the kept weights, pruned in each round.
        criterion: what trained weights are ranked by; a name in `CRITERIA` that needs no data.
        allocation: "global", "layer" or "erk", as ``scope`` of `lth_plugins.prune`.
        scope: what is pruned: "backbone", "backbone+neck" or "all", which is the heads, too.
        exclude: patterns of names of modules outside the trunk to leave dense, of which
            "predictors" stands for the layers that heads end in; see `scope.outside_trunk`.
        rewind: what each round starts from, one of `REWINDS`.
        early_iter: for ``rewind="early"``: the iteration of the first training to rewind to.
        structure: what each round's masks of the backbone are refilled to, before they are trained.

    Raises:
        TicketError: if a value is not one.
    """

    rounds: int = 0
    fraction: float = 0.2
    criterion: str = "magnitude"
    allocation: str = "global"
    scope: str = BACKBONE
    exclude: tuple[str, ...] = (PREDICTORS,)
    rewind: str = "pretrained"
    early_iter: int = 0
    structure: Refill = field(default_factory=Refill)

    def __post_init__(self) -> None:
        self.structure.make()
        check_options(self.fraction, self.criterion, self.allocation, self.rewind, "allocation")
        if (self.rewind == "early") != (self.early_iter > 0):
            raise TicketError(
                "expected an early iteration of 1 or more with rewind 'early', and none with "
                f"another, found rewind {self.rewind!r} and early_iter {self.early_iter}"
            )


@dataclass(frozen=True)
class Run:
    """One run of a host's trainer. A run that was stopped goes on from its latest checkpoint.

    Attributes:
        folder: for all that the host writes.
        ticket: the file of the ticket to train; None for the one that the configuration names.
        weights: the host's checkpoint of the model to start from, head included.
        lr_scale: the learning rate stays at this part of its base; None for the host's schedule.
        early_iter: after that many iterations, if any, a checkpoint is also kept as ``early.pth``.
    """

    folder: Path
    ticket: Path | None
    weights: Path
    lr_scale: float | None = None
    early_iter: int = 0


class Host(Protocol):
    """What IMP needs of a host: how to build its model, and how to train it once.

    Attributes:
        source: the task's name, for the tickets found in it.
        max_iter: how many iterations a run has.
        state_key: the entry of a checkpoint that is the model's state dict.
        recipe: all of the configuration that a run's result depends on, as plain JSON types.
        neck: what the names of the neck's modules begin with.
        predictors: patterns of the names of the layers that heads end in.
    """

    source: str
    max_iter: int
    state_key: str
    recipe: Mapping[str, Any]
    neck: str
    predictors: Sequence[str]

    def build(self) -> nn.Module:
        """The model as a run would start with it, on a dense ticket."""
        ...

    def train(self, run: Run) -> None:
        """One run, on all processes. ``last_checkpoint`` in its folder names the latest one."""
        ...

    def param_groups(self, checkpoint: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        """Those of the optimizer in a checkpoint."""
        ...


class TaskSearch:
    """One search for task-specific tickets. Making one checks everything and writes nothing.

    Args:
        host: the host.
        dense: (1, θ_p), the ticket that the host's configuration names.
        settings: how to search.
        folder: for all that it leaves.

    Raises:
        TicketError: if the ticket is sparse, a setting does not fit the host, or the folder is of
            another recipe.
    """

    def __init__(self, host: Host, dense: Ticket, settings: TaskImp, folder: Path) -> None:
        self.host, self.settings, self.folder = host, settings, folder
        if settings.rounds < 1:
            raise TicketError(f"expected rounds of 1 or more, found {settings.rounds}")
        if dense.all_masks.density < 1:
            raise TicketError(
                f"finding tickets starts from a dense ticket, found {dense!r}: give the dense one "
                "of the same weights, of a search its round_00.ticket"
            )
        if settings.early_iter >= host.max_iter:
            raise TicketError(
                f"expected an early iteration below the run's {host.max_iter}, found "
                f"{settings.early_iter}"
            )
        asked = asdict(settings)
        del asked["rounds"]  # more of them may be asked for later
        del asked["structure"]  # there only if one is asked for
        asked |= settings.structure.recipe()
        self.recipe = {"imp": asked, "ticket": dense.digest, "config": dict(host.recipe)}
        self._check_folder()
        self._dense = dense
        if is_main():
            model = host.build()
            names = (host.neck, host.predictors)
            self._outside = outside_trunk(model, settings.scope, settings.exclude, *names)
            self._state = {name: value.cpu() for name, value in model.state_dict().items()}

    def run(self) -> list[Path]:
        """Find the tickets, train each of them, and return their files.

        The main process leads, and writes; the others train with it.
        """
        barrier()  # all have looked at the folder before anything is written to it
        if is_main():
            self._lead()
        else:
            while (index := from_main(None)) is not None:
                self.host.train(self._run_of(index))
                barrier()
        return [round_path(self.folder, k) for k in range(self.settings.rounds + 1)]

    def _lead(self) -> None:
        self._start_folder()
        settings = self.settings
        if settings.rewind == "early":
            self._train(0)
        rounds = imp(
            self._start(),
            lambda ticket: self._train(ticket.meta.round),
            settings.rounds,
            self.folder,
            fraction=settings.fraction,
            criterion=settings.criterion,
            scope=settings.allocation,
            rewind=settings.rewind,
            structure=settings.structure.make(),
        )
        for ticket in rounds:
            logger.info("round %d: %r", ticket.meta.round, ticket)
        self._train(settings.rounds)  # the last ticket, to measure it as all others
        from_main(None)

    def _train(self, index: int) -> State:
        """The state of the model that training round ``index``'s ticket ends in."""
        run = self._run_of(index)
        if not (run.folder / FINISHED).exists():
            run.folder.mkdir(exist_ok=True)
            if self.settings.rewind == "early" and index > 0:
                self._place_early(run)
            from_main(index)
            self.host.train(run)
            barrier()
            (run.folder / FINISHED).touch()
        return _load(_latest(run.folder))[self.host.state_key]

    def _run_of(self, index: int) -> Run:
        settings, before = self.settings, self._run_folder(index - 1)
        run = Run(self._run_folder(index), round_path(self.folder, index), self._initial)
        if index == 0:
            if settings.rewind == "early":  # round 0 is made of this run
                return replace(run, ticket=None, early_iter=settings.early_iter)
            return run
        if settings.rewind in KEPT:
            run = replace(run, weights=_latest(before))
        if settings.rewind == "none":
            first = _load(_latest(self._run_folder(0)))
            run = replace(run, lr_scale=_last_lr_scale(self.host.param_groups(first)))
        return run

    def _place_early(self, run: Run) -> None:
        """Have the host resume from the early checkpoint, masked as the run's ticket is."""
        if (run.folder / _LAST).exists():
            return
        checkpoint = _load(self._run_folder(0) / EARLY)
        assert run.ticket is not None
        state = dict(checkpoint[self.host.state_key])
        keys = locate(state).keys
        for name, mask in Ticket.load(run.ticket).all_masks.items():
            key = keys.get(name, name)
            state[key] = state[key].masked_fill(~mask, 0)
        checkpoint[self.host.state_key] = state
        path = (run.folder / EARLY).absolute()
        _save(checkpoint, path)
        write_atomically(run.folder / _LAST, str(path).encode())

    def _start(self) -> Ticket:
        """(1, θ): what every round is rewound to."""
        early = self.settings.rewind == "early"
        path = self._run_folder(0) / EARLY if early else self._initial
        settings = self.settings
        task = {
            "scope": settings.scope,
            "exclude": list(settings.exclude),
            "early_iter": settings.early_iter,
            "config": digest(self.recipe),
        }
        recipe = {"found_in": self._dense.meta.source, "task": task}
        meta = replace(self._dense.meta, source=self.host.source, recipe=recipe)
        state = _load(path)[self.host.state_key]
        masks = Masks.ones(self._dense.arch.prunable)
        return Ticket(masks, state, meta, outside=Outside.dense(self._outside, state))

    @property
    def _initial(self) -> Path:
        return self.folder / INITIAL

    def _run_folder(self, index: int) -> Path:
        return self.folder / f"train_{index:02d}"

    def _check_folder(self) -> None:
        results = (self._initial, round_path(self.folder, 0), self._run_folder(0))
        check_folder(self.folder, self.recipe, RECIPE, [path.name for path in results])

    def _start_folder(self) -> None:
        self._check_folder()  # again: another process may have worked there until now
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.recipe, indent=1) + "\n"
        write_atomically(self.folder / RECIPE, text.encode())
        if not self._initial.exists():
            _save({self.host.state_key: self._state, "meta": {}}, self._initial)
        del self._state


def _last_lr_scale(groups: Sequence[Mapping[str, Any]]) -> float:
    """The learning rate that a schedule ended with, as a part of its base."""
    group = groups[0]
    scale = group["lr"] / group["initial_lr"] if "initial_lr" in group else 1.0
    if scale == 0:
        raise TicketError(
            "rewind 'none' goes on at the last learning rate of the schedule, which is 0: nothing "
            "would be trained. Let the schedule end higher, or rewind 'learning_rate'"
        )
    return scale


def _latest(folder: Path) -> Path:
    """The latest checkpoint of a host's run."""
    note = folder / _LAST
    if not note.exists():
        raise TicketError(
            f"expected checkpoints in {folder}, found none: let the host save one at the end"
        )
    return Path(folder, note.read_text().strip())


def _load(path: Path) -> dict[str, Any]:
    """A checkpoint of this very search. Hosts keep more than tensors in theirs."""
    return torch.load(path, map_location="cpu", weights_only=False)


def _save(checkpoint: Mapping[str, Any], path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_atomically(path, buffer.getvalue())
