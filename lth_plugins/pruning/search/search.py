"""One search for tickets: IMP whose every training is a run of a host.

A host is whatever trains: a pre-training, a downstream classification, a framework's own trainer.
Nothing here knows one; each says by a `Host` how to train once. A search's folder holds
``recipe.json``, one ``round_KK.ticket`` per round, with ``keep=trained`` also a
``round_KK.trained.ticket`` of what its training ended in, and what the host's runs leave. Each step
is idempotent, so `Search.run` called again resumes.

Where several processes train, all of them run the search and compute the same tickets, and the main
one writes.
"""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import distributed, nn

from lth_plugins.errors import RunError
from lth_plugins.progress import duration
from lth_plugins.pruning import Loss
from lth_plugins.pruning.criteria import needs_loss
from lth_plugins.pruning.search.imp import imp, round_path, trained_path
from lth_plugins.pruning.search.settings import KEPT, TRAINED, SearchSettings
from lth_plugins.resilience.atomic import write_atomically
from lth_plugins.resilience.ranks import barrier, from_main
from lth_plugins.resilience.recipe import Recipe, check_folder, digest, recipe_of
from lth_plugins.ticket.arch import Shape
from lth_plugins.ticket.keys import State
from lth_plugins.ticket.masks import Masks
from lth_plugins.ticket.meta import TicketMeta
from lth_plugins.ticket.outside import Outside
from lth_plugins.ticket.ticket import Ticket

logger = logging.getLogger(__name__)

RECIPE = "recipe.json"

TRAINED_FROM = "trained_from"
"""In the recipe of a trained ticket: the digest of its search's round 0, the dense (1, θ)."""


@dataclass(frozen=True)
class Run:
    """One training. A host resumes a run that was interrupted.

    Attributes:
        index: the round whose ticket is trained.
        ticket: it; None for the first training where that comes before there is a ticket, and
            trains the host's dense model.
        weights: a file of the whole state to start from, head included, as the host stores it;
            None for the state that the host's first training starts from.
        keep_early: whether to keep the state at the early point, too, as `Host.early`.
        last_lr: whether the learning rate stays at the last value of the host's schedule.
    """

    index: int
    ticket: Ticket | None
    weights: Path | None = None
    keep_early: bool = False
    last_lr: bool = False


class Host(Protocol):
    """What a search needs of whatever trains. Making one checks everything and writes nothing.

    Attributes:
        folder: for all that the search and the host's runs leave.
        meta: of the tickets: architecture, the task that they are found in, and input.
        recipe: what the tickets depend on besides the search's settings, as plain JSON types. A
            large configuration of the host's own is its entry "config", of which tickets hold the
            digest.
        outside: the shapes of what is pruned outside the trunk, by parameter name.
        pretrains: whether the first training makes θ_p, which rounds are rewound to.
        takes_weights: whether a round that is not rewound starts from its ticket's weights, which
            a criterion may have updated, instead of from those that the round before ended in.
        is_main: whether this process writes.
        early: the file of the state at the early point of the first training.
    """

    folder: Path
    meta: TicketMeta

    @property
    def recipe(self) -> Recipe: ...

    @property
    def outside(self) -> Mapping[str, Shape]: ...

    @property
    def pretrains(self) -> bool: ...

    @property
    def takes_weights(self) -> bool: ...

    @property
    def is_main(self) -> bool: ...

    @property
    def early(self) -> Path: ...

    def start(self) -> None:
        """Write what the host needs in the folder, on all processes, before anything is trained."""
        ...

    def train(self, run: Run) -> State:
        """Train, on all processes, and return the whole state; at once if the run is finished."""
        ...

    def is_finished(self, index: int) -> bool:
        """Whether this run is finished, and measured."""
        ...

    def result(self, index: int) -> Path:
        """The file of the whole state that a finished run ended in."""
        ...

    def state(self, weights: Path | None) -> State:
        """The whole state in a file; for None that which the first training starts from."""
        ...

    def trunk(self, state: State) -> State:
        """What a ticket is made of in a whole state, in any known dialect."""
        ...

    def probe(self, state: State) -> tuple[nn.Module, Sequence[Loss]]:
        """A model with the trunk, in a whole state, and the losses of some batches.

        It is called for criteria that look at gradients, in one process.
        """
        ...

    def tidy(self, index: int) -> None:
        """Remove what is no longer needed once the ticket of this round is stored."""
        ...


class Search:
    """One search for tickets. Making one checks the folder and writes nothing.

    Args:
        host: what trains.
        settings: how to search.
        evaluate_last: whether to train the last ticket, too, to measure it as all others are.

    Raises:
        RunError: if the folder was started with another recipe.
    """

    def __init__(self, host: Host, settings: SearchSettings, evaluate_last: bool = True) -> None:
        self.host, self.settings, self.evaluate_last = host, settings, evaluate_last
        self.folder = host.folder
        self._started = ""  # the digest of round 0, once it is known
        self.recipe = {**recipe_of(settings), **host.recipe}
        self._seconds: list[float] = []  # of each round that was trained since this was made
        self._check_folder()

    def run(self) -> list[Path]:
        """Find the tickets, or resume, and return the files of all rounds."""
        self._start_folder()
        if self.host.pretrains or self.settings.rewind == "early":
            self.host.train(self._run(None))  # it makes what rounds are rewound to
        before: Ticket | None = None
        probe = self._probe if needs_loss(self.settings.criterion) else None
        arguments = (self.settings, self.folder, self._save, probe, self.host.takes_weights)
        for ticket in imp(self._dense(), self._train, *arguments):
            agree(ticket)
            logger.info("round %d: %r%s", ticket.meta.round, ticket, self._left(ticket.meta.round))
            if before is None:
                self._started = ticket.digest
            elif self._lacks_trained(before.meta.round):
                self._train(before)  # the folder was begun without keep=trained
            self.host.tidy(ticket.meta.round)
            before = ticket
        if self._lacks_trained(ticket.meta.round) or (
            self.evaluate_last and not self.host.is_finished(ticket.meta.round)
        ):
            self._train(ticket)
        self.host.tidy(ticket.meta.round + 1)
        return [round_path(self.folder, k) for k in range(self.settings.rounds + 1)]

    def _train(self, ticket: Ticket) -> State:
        finished, began = self.host.is_finished(ticket.meta.round), time.monotonic()
        self._last = self.host.train(self._run(ticket))
        if not finished:
            self._seconds.append(time.monotonic() - began)
        state = self.host.trunk(self._last)
        if self.settings.keep == TRAINED:
            trained = ticket.with_weights(state)
            recipe = {**ticket.meta.recipe, TRAINED_FROM: self._started}
            meta = replace(trained.meta, recipe=recipe)
            self._save(replace(trained, meta=meta), trained_path(self.folder, ticket.meta.round))
        return state

    def _probe(self, trunk: State) -> tuple[nn.Module, Sequence[Loss]]:
        """Of the whole state that has this trunk, the one that was trained last."""
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            raise RunError(
                f"expected one process for criterion {self.settings.criterion!r}, found "
                f"{distributed.get_world_size()}: train in one, or rank by magnitude"
            )
        return self.host.probe(self._last)

    def _lacks_trained(self, k: int) -> bool:
        """Whether to train round k for its trained ticket alone, on all processes alike."""
        wanted = self.settings.keep == TRAINED
        return wanted and not from_main(trained_path(self.folder, k).exists())

    def _left(self, k: int) -> str:
        """The time that is left once round k is pruned, by the rounds trained here; or ""."""
        trainings = self.settings.rounds - k + self.evaluate_last
        if not self._seconds or not trainings:
            return ""
        seconds = trainings * sum(self._seconds) / len(self._seconds)
        return f", about {duration(seconds)} left for {trainings} trainings"

    def _run(self, ticket: Ticket | None) -> Run:
        """The training of a round's ticket, rewound; of None, the first training."""
        rewind = self.settings.rewind
        if ticket is None or ticket.meta.round == 0:
            first = self.host.pretrains or rewind == "early"
            return Run(0, None if first else ticket, keep_early=rewind == "early")
        k = ticket.meta.round
        weights = self.host.result(k - 1) if rewind in KEPT else self._origin()
        return Run(k, ticket, weights, last_lr=rewind == "none")

    def _origin(self) -> Path | None:
        """The file of θ with its head; None for what the host's first training starts from."""
        if self.settings.rewind == "early":
            return self.host.early
        if self.host.pretrains and self.settings.rewind != "init":
            return self.host.result(0)
        return None

    def _dense(self) -> Ticket:
        """(1, θ)."""
        state = self.host.trunk(self.host.state(self._origin()))
        recipe: dict[str, Any] = dict(self.host.recipe)
        if "config" in recipe:
            recipe["config"] = digest(recipe["config"])
        meta = replace(self.host.meta, recipe=recipe)
        masks = Masks.ones(meta.network.prunable)
        return Ticket(masks, state, meta, outside=Outside.dense(self.host.outside, state))

    def _save(self, ticket: Ticket, path: Path) -> None:
        if self.host.is_main:
            ticket.save(path)

    def _check_folder(self) -> None:
        check_folder(
            self.folder, self.recipe, RECIPE, [round_path(self.folder, 0).name, "train_00"]
        )

    def _start_folder(self) -> None:
        self._check_folder()  # again: another process may have worked there since
        start_folder(self.folder, self.recipe, self.host.is_main)
        self.host.start()


def start_folder(folder: Path, recipe: Recipe, writes: bool) -> None:
    """Note a run's recipe in its folder, once all processes have looked at that.

    Args:
        folder: is made if it does not exist.
        recipe: the recipe.
        writes: whether this process writes; others wait for it.
    """
    barrier()
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / RECIPE, (json.dumps(recipe, indent=1) + "\n").encode())
    barrier()


def agree(ticket: Ticket) -> None:
    """Check that all processes of a training have the same ticket.

    Raises:
        RunError: on all of them, if they have not.
    """
    if not distributed.is_initialized():
        return
    digests: list[str] = [""] * distributed.get_world_size()
    distributed.all_gather_object(digests, ticket.digest)
    if len(set(digests)) > 1:
        raise RunError(
            f"the processes have different tickets of round {ticket.meta.round}, with the digests "
            f"{', '.join(digest[:12] for digest in digests)}: they must all see the same folder "
            "and the same files"
        )
