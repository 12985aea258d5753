"""Finding tickets: pre-train once, then IMP on the same task.

A run's folder holds ``config.yaml`` and ``recipe.json`` (the part of it that may not change),
``pretrained.safetensors`` (θ_p with the task's head), one ``round_KK.ticket`` a round and
``metrics.jsonl``; `find` called again goes on where it stopped. Where several processes train, all
run this and compute the same tickets, and the first of them writes.
"""

import importlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pytorch_lightning.utilities import rank_zero_only
from safetensors.torch import load_file
from torch import Tensor

from lth_plugins.pretrain.config import TASKS, FindConfig, Phase, recipe
from lth_plugins.pretrain.early_bird import EarlyBird
from lth_plugins.pruning import prune
from lth_plugins.pruning.search.imp import KEPT, imp, round_path
from lth_plugins.resilience.atomic import write_atomically
from lth_plugins.resilience.recipe import check_folder
from lth_plugins.ticket import IMAGENET, InputSpec, Masks, Ticket, TicketError
from lth_plugins.ticket.foreign.checkpoints import read_checkpoint
from lth_plugins.ticket.foreign.convert import default_input
from lth_plugins.ticket.hub import SUFFIX
from lth_plugins.ticket.keys import State
from lth_plugins.ticket.locating import locate
from lth_plugins.ticket.masked_state import split_masks
from lth_plugins.training.fit import (
    SaveEarly,
    agree,
    alone_in,
    check_trainer,
    describe,
    fit,
    forget,
    settled,
    store,
    validate,
)
from lth_plugins.training.loader import Pictures, TrainLoader, open_pictures
from lth_plugins.training.module import Task

logger = logging.getLogger(__name__)

CONFIG, RECIPE, METRICS = "config.yaml", "recipe.json", "metrics.jsonl"
PRETRAINED, EARLY = "pretrained.safetensors", "early.safetensors"


def find(config: FindConfig) -> list[Path]:
    """Pre-train, find tickets by IMP and measure them.

    Args:
        config: from `config.load_config`.

    Returns:
        The files of all rounds, 0 to ``config.rounds``.

    Raises:
        TicketError: before any training, if data, initial weights or the output folder do not fit
            the configuration, or another process works in that; nothing on disk has changed then.
            And later, if the disk is full.
    """
    search = Search(config)
    with alone_in(search.folder):
        return list(search.run())


class Search:
    """One run of `find`. Making one checks everything and writes nothing.

    Args:
        config: the configuration.

    Raises:
        TicketError: as `find`.
    """

    def __init__(self, config: FindConfig) -> None:
        self.folder = Path(config.out).expanduser()
        config = replace(config, trainer=settled(config.trainer, self.folder))
        self.config = config
        self.recipe = recipe(config)
        weights: State | Ticket | None = None
        self.input = IMAGENET
        if config.init is not None:
            weights, self.input = _read_weights(Path(config.init), config.source)
        if self.input != IMAGENET:  # else absent, as from folders of before it was looked at
            self.recipe["input"] = asdict(self.input)
        self._check_folder()
        check_trainer(config)
        module, name = TASKS[config.task].split(":")
        self.task_class: type[Task] = getattr(importlib.import_module(module), name)
        views = self.task_class.views(config, self.input)
        self.pictures: Pictures = open_pictures(config.data, views, self.input)
        TrainLoader(self.pictures.train, config.batch_size, seed=0)  # refuses what fills no batch
        logger.info("data: %s", self.pictures)
        # Training starts from here: made now, so that weights that do not fit are refused now.
        self.start = self._task(config.pretrain, stream=0)
        if weights is not None and not self.start.take(weights):
            logger.warning(
                "%s has no head for %s: its rounds start from one as initialised",
                config.init,
                config.task,
            )

    def run(self) -> Iterator[Path]:
        """Yields the file of each round as soon as it is complete."""
        self._check_folder()  # again: another process may have worked there until now
        self.metrics = Metrics(self.folder / METRICS)
        self._start_folder()
        pretrained = self._pretrain()
        origin = self._origin(pretrained)
        start = Ticket.dense(_trunk(origin), self.config.source, self.input, self.recipe)

        config = self.config
        rounds = imp(
            start,
            lambda ticket: self._train(ticket, origin),
            config.rounds,
            self.folder,
            fraction=config.fraction,
            criterion=config.criterion,
            scope=config.scope,
            trained=_trunk(pretrained),
            rewind=config.rewind,
            structure=config.structure.make(),
            save=rank_zero_only(Ticket.save),
        )
        for ticket in rounds:
            k = ticket.meta.round
            agree(ticket)
            logger.info("round %d: %r", k, ticket)
            forget(_training(k - 1), self.folder)  # what it was pruned from
            self._forget_trained(k - 2)
            yield round_path(self.folder, k)
        if config.evaluate_last and ticket.meta.round not in self.metrics:
            self._train(ticket, origin)
        forget(_training(ticket.meta.round), self.folder)

    def _pretrain(self) -> dict[str, Tensor]:
        """θ_p: the whole state of the pre-trained task, its head included."""
        path = self.folder / PRETRAINED
        if not path.exists():
            if self.config.init is not None:
                metrics = validate(self.start, self.pictures, _training(0), self.folder)
            else:
                early = SaveEarly(self.folder / EARLY, self.config.rewind_at)
                callbacks = [early] if self.config.rewind == "early" else []
                metrics = fit(self.start, self.pictures, _training(0), self.folder, callbacks)
            self.metrics.put(0, density=1.0, sparsity=0.0, **metrics)
            logger.info("pre-trained: %s", describe(metrics))
            store(self.start.state_dict(), path)
        forget(_training(0), self.folder)
        return load_file(path)

    def _origin(self, pretrained: State) -> State:
        """θ: the whole state that rounds are rewound to, or that those in `KEPT` start from."""
        if self.config.rewind == "init":
            return self._task(self.config.pretrain, stream=0).state_dict()
        return load_file(self.folder / EARLY) if self.config.rewind == "early" else pretrained

    def _train(self, ticket: Ticket, origin: State) -> State:
        """Train a ticket and return the trunk; its metrics are those of the ticket's round."""
        k, kept = ticket.meta.round, self.config.rewind in KEPT
        if self._trained(k).exists() and k in self.metrics:
            return _trunk(load_file(self._trained(k)))
        phase = self.config.training
        if self.config.rewind == "none":
            phase = replace(phase, warmup_epochs=0)  # the schedule is constant
        task = self._task(phase, stream=k)
        state = load_file(self._trained(k - 1)) if kept and k > 1 else origin
        attachment = task.rewind(state, ticket)
        bird = EarlyBird(ticket.masks, lambda state: self._prune(state, ticket))
        callbacks = [bird] if self.config.early_bird else []
        metrics = fit(task, self.pictures, _training(k), self.folder, callbacks)
        attachment.verify()
        if self.config.early_bird:
            if task.uses_bank and bird.epochs < phase.epochs:  # it validates in the last one only
                seconds = metrics["seconds"]
                metrics = validate(task, self.pictures, _training(k), self.folder)
                metrics["seconds"] = round(metrics["seconds"] + seconds, 2)
            metrics["saved"] = 1 - bird.epochs / phase.epochs
        if kept:  # the next round starts from all of this: its head is in no ticket
            store(task.state_dict(), self._trained(k))
        # At last: a round that has its line is not trained again.
        self.metrics.put(k, density=ticket.density, sparsity=ticket.sparsity, **metrics)
        logger.info("round %d, trained: %s", k, describe(metrics))
        return task.trunk.state_dict()

    def _prune(self, state: State, ticket: Ticket) -> Masks:
        """The masks that `imp` would prune this trained state to, before it refills them."""
        config = self.config
        return prune(state, config.fraction, ticket.masks, config.criterion, config.scope)

    def _trained(self, k: int) -> Path:
        """Where rounds that are not rewound find the whole state after training round k."""
        return self.folder / f"trained_{k:02d}.safetensors"

    @rank_zero_only
    def _forget_trained(self, k: int) -> None:
        self._trained(k).unlink(missing_ok=True)

    def _task(self, phase: Phase, stream: int) -> Task:
        return self.task_class(self.config, phase, len(self.pictures.classes), stream)

    @rank_zero_only
    def _start_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / RECIPE, (json.dumps(self.recipe, indent=1) + "\n").encode())
        write_atomically(self.folder / CONFIG, OmegaConf.to_yaml(self.config).encode())

    def _check_folder(self) -> None:
        check_folder(self.folder, self.recipe, RECIPE)


class Metrics:
    """``metrics.jsonl``: one line a round, in order. The file is replaced whole, never appended to.

    Args:
        path: of the file; lines that are there are kept.

    Raises:
        TicketError: if what is there is not such a file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[int, dict[str, Any]] = {}
        if path.exists():
            try:
                lines = [json.loads(line) for line in path.read_text().splitlines()]
                self.lines = {line["round"]: line for line in lines}
            except (ValueError, TypeError, KeyError) as error:
                raise TicketError(
                    f"expected a JSON object with a round on each line of {path}, found otherwise "
                    f"({error!r}): move the file away"
                ) from None

    def __contains__(self, k: int) -> bool:
        return k in self.lines

    def put(self, k: int, **values: float) -> None:
        """Set the line of round k."""
        self.lines[k] = {"round": k, **values}
        self._write()

    @rank_zero_only
    def _write(self) -> None:
        text = "".join(json.dumps(self.lines[k]) + "\n" for k in sorted(self.lines))
        write_atomically(self.path, text.encode())


def _trunk(state: State) -> dict[str, Tensor]:
    """The trunk in a task's whole state."""
    prefix = "trunk."
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _training(k: int) -> str:
    """The name of the training whose result is measured as round k."""
    return f"round_{k:02d}" if k > 0 else "pretrain"


def _read_weights(path: Path, source: str) -> tuple[State | Ticket, InputSpec]:
    """The weights of a dense ticket or of a checkpoint, and how their network is fed."""
    if path.suffix != SUFFIX:
        state = read_checkpoint(path)
        return state, default_input(source, locate(split_masks(state)[1]), state)
    ticket = Ticket.load(path)
    if ticket.density < 1:
        raise TicketError(
            f"expected dense weights in init, found {ticket!r}: give the dense ticket of the same "
            "weights, of a search its round_00.ticket, or the checkpoint that they come from"
        )
    if ticket.meta.stride_in_1x1:
        raise TicketError(
            f"expected the strides of init={path} in 3x3 convolutions, as they are trained here, "
            "found them in the first 1x1 ones (Caffe's)"
        )
    return ticket, ticket.meta.input
