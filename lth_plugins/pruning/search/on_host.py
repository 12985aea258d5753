"""Searches in a framework's own trainer, whose runs leave checkpoints: what its hosts share.

A search's folder also holds ``initial.pth`` (the whole model that rounds are rewound to, head
included, as a checkpoint of the framework) and the framework's run of each round, ``train_KK``.
"""

import io
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lth_plugins.errors import ConfigError, RunError, TicketError
from lth_plugins.masking.attachment import attached
from lth_plugins.pruning import Loss, prune
from lth_plugins.pruning.criteria import data_free
from lth_plugins.pruning.search.imp import round_path
from lth_plugins.pruning.search.modules import outside_trunk
from lth_plugins.pruning.search.search import Run
from lth_plugins.pruning.search.settings import TaskSettings
from lth_plugins.resilience.atomic import write_atomically
from lth_plugins.resilience.ranks import barrier, is_main
from lth_plugins.resilience.recipe import Recipe
from lth_plugins.resilience.seeds import seed_of, seeded
from lth_plugins.ticket.keys import State
from lth_plugins.ticket.locating import locate
from lth_plugins.ticket.masks import Masks
from lth_plugins.ticket.ticket import Ticket

INITIAL, EARLY, FINISHED = "initial.pth", "early.pth", "finished"
GRADIENTS = 256
"""Images that criteria which look at gradients rank by."""

LAST = "last_checkpoint"  # where fvcore and mmengine both note a run's latest checkpoint


def check_one_way(search: str, method: str, found: bool) -> None:
    """Refuse to search for tickets in trainings that move the masks themselves.

    Args:
        search: what the host calls the settings of the search.
        method: what it calls sparse training.
        found: whether its configuration asks for that, too.

    Raises:
        ConfigError: if so.
    """
    if found:
        raise ConfigError(
            f"found both {search}, which prunes between trainings, and {method}, which prunes "
            "inside one: choose one"
        )


def sparse_as_a_round(dense: Ticket, settings: TaskSettings) -> Ticket:
    """A ticket as sparse as the rounds begin to be, which asks more of a config than a dense one.

    Args:
        dense: the ticket that a search starts from.
        settings: of the search.
    """
    return dense.with_masks(prune(dense.weights, settings.fraction, dense.masks), {})


class CheckpointHost(ABC):
    """A `lth_plugins.pruning.search.search.Host` in a framework's trainer.

    A plug-in says how to `build` its model and how to `fit` it once.

    Args:
        dense: (1, θ_p), the ticket that the framework's configuration names.
        settings: how to search.
        folder: for all that it leaves.
        source: the task's name, for the tickets found in it.
        max_iter: iterations of a run.
        config: all of the configuration that a run's result depends on, as plain JSON types.

    Raises:
        ConfigError: if a setting does not fit the framework's configuration.
        TicketError: if the ticket is sparse, or does not fit the model.
    """

    state_key: str
    """The entry of a checkpoint that is the model's state dict."""

    neck: str
    """What the names of the neck's modules begin with."""

    predictors: Sequence[str]
    """Patterns of the names of the layers that heads end in."""

    pretrains = takes_weights = False

    def __init__(
        self,
        dense: Ticket,
        settings: TaskSettings,
        folder: Path,
        source: str,
        max_iter: int,
        config: Recipe,
    ) -> None:
        self.dense, self.settings, self.folder = dense, settings, folder
        if settings.rounds < 1:
            raise ConfigError(f"expected rounds of 1 or more, found {settings.rounds}")
        if dense.all_masks.density < 1:
            raise TicketError(
                f"finding tickets starts from a dense ticket, found {dense!r}: give the dense one "
                "of the same weights, of a search its round_00.ticket"
            )
        if not self.has_losses:
            data_free(settings.criterion)
        if settings.early_iter >= max_iter:
            raise ConfigError(
                f"expected an early iteration below the run's {max_iter}, found "
                f"{settings.early_iter}"
            )
        self.meta = replace(dense.meta, source=source)
        self.recipe = {"found_in": dense.meta.source, "ticket": dense.digest, "config": config}
        model = self.build()
        if attached(model) is None:
            raise TicketError(
                f"finding tickets prunes the one on the model, found none: {dense!r} is not of its "
                "widths. Of a slimmed checkpoint, name the slim.ticket beside it"
            )
        names = (self.neck, self.predictors)
        self.outside = outside_trunk(model, settings.scope, settings.exclude, *names)
        self._initial = {name: value.cpu() for name, value in model.state_dict().items()}

    @abstractmethod
    def build(self) -> nn.Module:
        """The model as a run would start with it, on a dense ticket."""

    @abstractmethod
    def fit(self, folder: Path, weights: Path, run: Run, lr_scale: float | None) -> None:
        """Train once, on all processes. ``last_checkpoint`` in the folder names the latest one.

        Args:
            folder: for all that the framework writes, with its checkpoint if it is to resume.
            weights: a checkpoint of the model to start from, head included.
            run: its ticket is the file `ticket_path` of it.
            lr_scale: the learning rate stays at this part of its base; None for the schedule.
        """

    @abstractmethod
    def param_groups(self, checkpoint: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        """The parameter groups of the optimizer in a checkpoint."""

    @property
    def has_losses(self) -> bool:
        """Whether `losses` has the losses of batches that the host trains on."""
        return False

    def losses(self) -> Sequence[Loss]:
        """The losses of some batches, of a model in training mode."""
        raise NotImplementedError

    @staticmethod
    def batches_of(size: int) -> int:
        """How many batches of a size to take the losses of."""
        return math.ceil(GRADIENTS / size)

    def probe(self, state: State) -> tuple[nn.Module, Sequence[Loss]]:
        model = self.build()
        model.load_state_dict(state)
        losses = enumerate(self.losses())
        return model.train(), [_repeatable(loss, number) for number, loss in losses]

    def ticket_path(self, run: Run) -> Path | None:
        """The file of the ticket to train; None for the one that the configuration names."""
        return None if run.ticket is None else round_path(self.folder, run.index)

    @property
    def is_main(self) -> bool:
        return is_main()

    @property
    def early(self) -> Path:
        return self._run_folder(0) / EARLY

    def start(self) -> None:
        path = self.folder / INITIAL
        if self.is_main and not path.exists():
            save_checkpoint({self.state_key: self._initial, "meta": {}}, path)
        self._initial.clear()
        barrier()

    def train(self, run: Run) -> State:
        folder = self._run_folder(run.index)
        if not self.is_finished(run.index):
            barrier()  # all have looked
            weights = run.weights or self.folder / INITIAL
            if self.is_main:
                folder.mkdir(exist_ok=True)
                if weights == self.early:
                    self.place_early(folder, run)
            barrier()
            self.fit(folder, weights, run, self._last_lr_scale() if run.last_lr else None)
            barrier()
            if self.is_main:
                (folder / FINISHED).touch()
        return self.state(self.result(run.index))

    def is_finished(self, index: int) -> bool:
        return (self._run_folder(index) / FINISHED).exists()

    def result(self, index: int) -> Path:
        note = self._run_folder(index) / LAST
        if not note.exists():
            raise RunError(
                f"expected checkpoints in {note.parent}, found none: let the host save one at the "
                "end"
            )
        return Path(note.parent, note.read_text().strip())

    def state(self, weights: Path | None) -> State:
        state: State = self.checkpoint(weights or self.folder / INITIAL)[self.state_key]
        return state

    def checkpoint(self, path: Path) -> dict[str, Any]:
        """A checkpoint of this very search. Frameworks keep more than tensors in theirs."""
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False)
        return checkpoint

    def trunk(self, state: State) -> State:
        return state

    def tidy(self, index: int) -> None:
        return None  # a framework's runs are kept

    def place_early(self, folder: Path, run: Run) -> None:
        """Have the framework resume from the early checkpoint, masked as the run's ticket is."""
        if (folder / LAST).exists():
            return
        assert run.ticket is not None
        checkpoint = self.checkpoint(self.early)
        checkpoint[self.state_key] = masked(checkpoint[self.state_key], run.ticket.all_masks)
        path = (folder / EARLY).absolute()
        save_checkpoint(checkpoint, path)
        write_atomically(folder / LAST, str(path).encode())

    def _last_lr_scale(self) -> float:
        """The last learning rate of the first run, as a part of its base."""
        group = self.param_groups(self.checkpoint(self.result(0)))[0]
        scale = float(group["lr"] / group["initial_lr"]) if "initial_lr" in group else 1.0
        if scale == 0:
            raise ConfigError(
                "rewind 'none' trains on at the last learning rate of the schedule, which is 0: "
                "nothing would be trained. Let the schedule end higher, or rewind 'learning_rate'"
            )
        return scale

    def _run_folder(self, index: int) -> Path:
        return self.folder / f"train_{index:02d}"


def _repeatable(loss: Loss, number: int) -> Loss:
    """A loss whose dropout, or choice of regions, is the same each time."""

    def repeated(model: nn.Module) -> Tensor:
        with seeded(seed_of(number)):
            return loss(model)

    return repeated


def masked(state: State, masks: Masks) -> dict[str, Tensor]:
    """A whole model's state dict without what masks prune; they name its trunk's as tickets do."""
    result, keys = dict(state), locate(state, slimmed=True).keys  # the masks say the widths
    for name, mask in masks.items():
        key = keys.get(name, name)
        result[key] = result[key].masked_fill(~mask, 0)
    return result


def save_checkpoint(checkpoint: Mapping[str, Any], path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_atomically(path, buffer.getvalue())
