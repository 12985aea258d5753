"""Searches in a training function of the user's own, for models that no trainer of a host trains.

The user says how to build the model and how to train it once. `Training` saves, resumes and stops
that training, so that a search that is killed resumes inside a round.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import distributed, nn

from lth_plugins.errors import ConfigError, RunError
from lth_plugins.masking.attachment import attach, attached
from lth_plugins.pruning import Loss, Losses
from lth_plugins.pruning.search.modules import NECK
from lth_plugins.pruning.search.on_host import (
    EARLY,
    LAST,
    CheckpointHost,
    masked,
    save_checkpoint,
)
from lth_plugins.pruning.search.search import Run, Search
from lth_plugins.pruning.search.settings import TaskSettings, settings_from
from lth_plugins.resilience.atomic import write_atomically
from lth_plugins.resilience.ranks import is_main
from lth_plugins.resilience.recipe import Recipe
from lth_plugins.resilience.seeds import reseed, seed_of
from lth_plugins.resilience.sigterm import Sigterm
from lth_plugins.ticket.choice import Given, load_given
from lth_plugins.ticket.locating import locate
from lth_plugins.ticket.ticket import Ticket

CHECKPOINT = "checkpoint.pth"


class Part(Protocol):
    """What a checkpoint holds beside the model: an optimizer, a schedule, a gradient scaler."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


class Training:
    """One training of a search, as the user's function sees it.

    PyTorch's, NumPy's and Python's random numbers depend on the seed and the iteration alone: a
    training that was resumed draws what it would have drawn. It is resumed bit for bit if its
    batches depend on the iteration alone, too.

    Attributes:
        index: the round whose ticket is trained.
        folder: of this training, for whatever else it writes.
        iterations: how many to train.
        lr_scale: the learning rate stays at this part of its base; None for the schedule.
    """

    def __init__(
        self,
        model: nn.Module,
        run: Run,
        folder: Path,
        host: "ScriptHost",
        lr_scale: float | None,
        stored: Mapping[str, Any],
    ) -> None:
        self.index, self.folder, self.lr_scale = run.index, folder, lr_scale
        self.iterations = host.script.iterations
        self._model, self._host, self._stored = model, host, stored
        self._done: int = stored.get("iteration", 0)
        self._early = host.settings.early_iter if run.keep_early else 0
        self._parts: Mapping[str, Part] = {}
        self._sigterm: Sigterm | None = None

    def resume(self, **parts: Part) -> int:
        """Take up the last checkpoint, if there is one. Call it before the first iteration.

        Args:
            parts: what checkpoints hold beside the model, by name, such as
                ``optimizer=optimizer``.

        Returns:
            How many iterations are done.

        Raises:
            ConfigError: if the search needs the optimizer, and it is not among the parts.
            RunError: if the checkpoint holds other parts.
        """
        if self._host.settings.rewind == "none" and "optimizer" not in parts:
            raise ConfigError(
                "rewind 'none' trains on at the last learning rate of the first training: expected "
                "run.resume(optimizer=…), found no optimizer in the call"
            )
        if self._stored and self._stored["parts"].keys() != parts.keys():
            raise RunError(
                f"expected run.resume with {', '.join(self._stored['parts']) or 'nothing'}, as the "
                f"checkpoint in {self.folder} has, found {', '.join(parts) or 'nothing'}: call it "
                "with the same, or give another output folder"
            )
        for name, part in parts.items():
            if self._stored:
                part.load_state_dict(self._stored["parts"][name])
        self._parts, self._sigterm = parts, Sigterm()
        self._reseed()
        return self._done

    def after_step(self, done: int) -> None:
        """Save where that is due after so many iterations, and stop on a signal.

        Raises:
            Stopped: on SIGTERM or Ctrl-C, after saving.
            TicketError: if a pruned weight is not zero. Nothing was saved then.
        """
        if self._sigterm is None:
            raise RunError("expected run.resume(…) before the first iteration, found no such call")
        self._done = done
        if done == self._early:
            self._write(EARLY)
        if done % self._host.script.checkpoint_period == 0:
            self.save()
        self._sigterm.stop_if_asked(self.save)
        self._reseed()

    def save(self) -> Path:
        """Write the checkpoint that `resume` takes up, on the main process."""
        path = self._write(CHECKPOINT)
        if is_main():
            write_atomically(self.folder / LAST, CHECKPOINT.encode())
        return path

    def close(self) -> None:
        """Stop listening to signals."""
        if self._sigterm is not None:
            self._sigterm.close()

    def finish(self) -> None:
        """Check that the function has trained as it was asked to, and save.

        Raises:
            RunError: if it has not.
        """
        if self._done != self.iterations:
            raise RunError(
                f"expected a training of {self.iterations} iterations, found {self._done}: call "
                "run.after_step(done) after each, and train run.iterations of them"
            )
        self.save()

    def _write(self, name: str) -> Path:
        state = dict(self._model.state_dict())
        parts = {key: part.state_dict() for key, part in self._parts.items()}
        if is_main():
            checkpoint = {"model": state, "iteration": self._done, "parts": parts}
            save_checkpoint(checkpoint, self.folder / name)
        return self.folder / name

    def _reseed(self) -> None:
        rank = distributed.get_rank() if distributed.is_initialized() else 0
        reseed(seed_of(self._host.script.seed, self._done, rank))


Build = Callable[[], nn.Module]
"""Builds the whole model as a training starts with it, on one device, not wrapped."""

Fit = Callable[[nn.Module, Training], object]
"""Trains a model, which has its ticket on it, once."""


def task_search(
    build: Build,
    fit: Fit,
    ticket: Given,
    out: str | PathLike[str],
    *,
    iterations: int,
    source: str = "task",
    seed: int = 0,
    checkpoint_period: int = 1000,
    config: Recipe | None = None,
    neck: str = "",
    predictors: Sequence[str] = (),
    loss: Losses | None = None,
    **settings: Any,
) -> Search:
    """Find task-specific tickets in a training function of your own, by IMP.

    ::

        def fit(model, run):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
            for step in range(run.resume(optimizer=optimizer), run.iterations):
                train_one_iteration(model, optimizer, batch_of(step))
                run.after_step(step + 1)

        lth.task_search(build, fit, "dense.ticket", "runs/imp", iterations=9000, rounds=8).run()

    Where several processes train, all of them call it. `fit` wraps the model for that itself.

    Args:
        build: makes the model; called once for a search and once for each training, seeded. With
            ``rewind="init"`` it leaves out the ticket's weights.
        fit: trains it, called with the model and its `Training`, in training mode.
        ticket: the dense ticket to start from, or its path or name. It replaces one that ``build``
            puts on the model.
        out: the folder; gets ``round_00.ticket``, …, and each training's ``train_00``, ….
        iterations: of a training.
        source: the task's name, which the tickets state.
        seed: of all trainings.
        checkpoint_period: iterations between two checkpoints of a training.
        config: whatever else the results depend on, as plain JSON types: a folder is only resumed
            with the same.
        neck: what the names of the neck's modules begin with, for ``scope="backbone+neck"``.
        predictors: patterns of the names of the layers that heads end in, which stay dense.
        loss: as of `lth_plugins.prune`, for criteria that look at gradients.
        settings: those of `lth_plugins.pruning.search.settings.TaskSettings`: ``rounds``,
            ``fraction``, ``rewind``, ``scope``, …; ``structure`` is a mapping.

    Returns:
        A search whose ``run()`` finds the tickets, or resumes, and returns their files.

    Raises:
        LthError: before anything is written, if a setting is invalid, the ticket is sparse or does
            not fit the model, or the folder was started with another recipe.
    """
    asked = settings_from(TaskSettings, settings, "task_search")
    for name, value in (("iterations", iterations), ("checkpoint_period", checkpoint_period)):
        if value < 1:
            raise ConfigError(f"expected {name} of 1 or more, found {value}")
    if asked.scope == NECK and not neck:
        raise ConfigError(
            f"scope {NECK!r} needs the name that the neck's modules begin with, found none: write "
            "neck='backbone.fpn.', or choose another scope"
        )
    script = Script(build, fit, source, iterations, seed, checkpoint_period, config or {}, loss)
    dense, _ = load_given(ticket, original=True)
    return Search(ScriptHost(script, dense, asked, Path(out), neck, predictors), asked)


@dataclass(frozen=True)
class Script:
    """What trains: the arguments of `task_search` about it."""

    build: Build
    fit: Fit
    source: str
    iterations: int
    seed: int
    checkpoint_period: int
    config: Recipe
    loss: Losses | None


class ScriptHost(CheckpointHost):
    """A training function as a host of searches; `task_search` makes one."""

    state_key = "model"

    def __init__(
        self,
        script: Script,
        dense: Ticket,
        settings: TaskSettings,
        folder: Path,
        neck: str,
        predictors: Sequence[str],
    ) -> None:
        self.script, self.neck, self.predictors = script, neck, predictors
        config = {"max_iter": script.iterations, "seed": script.seed, **script.config}
        super().__init__(dense, settings, folder, script.source, script.iterations, config)

    @property
    def has_losses(self) -> bool:
        return self.script.loss is not None

    def losses(self) -> Sequence[Loss]:
        given = self.script.loss or ()
        return [given] if callable(given) else given

    def build(self) -> nn.Module:
        reseed(seed_of(self.script.seed))
        model, init = self.script.build(), self.settings.rewind == "init"
        if init and _has_weights_of(self.dense, model):
            raise ConfigError(
                "rewind 'init' goes back to the model's own initialisation, found a model that is "
                "built with the ticket's weights: have build leave them out (load_weights=False)"
            )
        attach(model, self.dense, load_weights=not init)
        return model

    def fit(self, folder: Path, weights: Path, run: Run, lr_scale: float | None) -> None:
        ticket = self.dense if run.ticket is None else run.ticket
        model, note = self.build(), folder / LAST
        resumes = note.exists()
        stored = self.checkpoint(folder / note.read_text() if resumes else weights)
        attach(model, ticket)
        # A plain dict says nothing of other masks, and these zero nothing of it.
        model.load_state_dict(masked(stored["model"], ticket.all_masks))
        training = Training(model, run, folder, self, lr_scale, stored if resumes else {})
        try:
            self.script.fit(model.train(), training)
            self._check_masks(model, ticket)
            training.finish()
        finally:
            training.close()

    def param_groups(self, checkpoint: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        groups: Sequence[Mapping[str, Any]] = checkpoint["parts"]["optimizer"]["param_groups"]
        return groups

    def _check_masks(self, model: nn.Module, ticket: Ticket) -> None:
        handle = attached(model)
        if handle is None or handle.all_masks != ticket.all_masks:
            found = "none" if handle is None else "others"
            raise ConfigError(
                f"expected a training that leaves the masks as they are, found {found} after it: a "
                "search prunes between trainings, so leave out gradual pruning and detach() inside"
            )


def _has_weights_of(ticket: Ticket, model: nn.Module) -> bool:
    keys, state = locate(model, archs=[ticket.arch]).keys, model.state_dict(keep_vars=True)
    return all(torch.equal(state[keys[n]].cpu(), ticket.weights[n]) for n in ticket.masks)
