"""Finding tickets: pre-train once, then IMP on the same task; or pre-train sparse.

A run's folder holds ``config.yaml`` and ``recipe.json`` (the part of it that may not change),
``pretrained.safetensors`` (θ_p with the task's head), one ``round_KK.ticket`` per round and
``metrics.jsonl``; with ``keep=trained`` also ``round_KK.trained.ticket`` and the head beside it,
``round_KK.head.safetensors``. `find` called again resumes. Where several processes train, all of
them run this and compute the same tickets, and the first writes.
"""

import copy
import importlib
import itertools
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytorch_lightning as pl
from omegaconf import OmegaConf
from pytorch_lightning.utilities import rank_zero_only
from safetensors.torch import load_file
from torch import Tensor, nn

from lth_plugins.errors import ConfigError, RunError, TicketError
from lth_plugins.pretrain.config import TASKS, FindConfig, recipe
from lth_plugins.pretrain.data import open_images
from lth_plugins.pretrain.early_bird import EarlyBird
from lth_plugins.pruning import Loss, prune
from lth_plugins.pruning.search.imp import trained_path
from lth_plugins.pruning.search.search import RECIPE, Run, Search, agree, start_folder
from lth_plugins.pruning.search.settings import KEPT, TRAINED
from lth_plugins.resilience.atomic import write_atomically
from lth_plugins.resilience.ranks import barrier
from lth_plugins.resilience.recipe import check_folder
from lth_plugins.resilience.seeds import seed_of, seeded
from lth_plugins.ticket import IMAGENET, InputSpec, Masks, Ticket, TicketMeta
from lth_plugins.ticket.arch import Shape
from lth_plugins.ticket.foreign.checkpoints import read_checkpoint
from lth_plugins.ticket.foreign.convert import default_input
from lth_plugins.ticket.hub import SUFFIX
from lth_plugins.ticket.keys import State
from lth_plugins.ticket.locating import locate
from lth_plugins.ticket.masked_state import split_masks
from lth_plugins.training.callbacks import SaveEarly, describe
from lth_plugins.training.fit import (
    check_trainer,
    delete_checkpoints,
    fit,
    is_main,
    iterations,
    locked,
    resolve_precision,
    store,
    validate,
    validation_interval,
)
from lth_plugins.training.loader import Splits, TrainLoader
from lth_plugins.training.module import LOGITS, Task
from lth_plugins.training.settings import Phase
from lth_plugins.training.sparse import SparseTrainingCallback

logger = logging.getLogger(__name__)

CONFIG, METRICS = "config.yaml", "metrics.jsonl"
PRETRAINED, EARLY = "pretrained.safetensors", "early.safetensors"
FINAL = "final.ticket"  # of sparse training
HEAD = ".head.safetensors"

GRADIENTS = 1024
"""Images that criteria which look at gradients rank by, in whole batches."""


def find(config: FindConfig) -> list[Path]:
    """Pre-train, find tickets by IMP and measure them.

    Args:
        config: from `config.load_config`.

    Returns:
        The files of all rounds, 0 to ``config.rounds``; with a ``method`` that of ``final.ticket``.

    Raises:
        LthError: before any training, if data, initial weights or the output folder do not fit the
            configuration, or another process works in that; nothing on disk has changed then.
            And later, if the disk is full.
    """
    if config.method is not None:
        training = SparsePretraining(config)
        with locked(training.folder):
            return [training.run()]
    search = search_of(config)
    with locked(search.folder):
        return search.run()


def search_of(config: FindConfig) -> Search:
    """The search that a configuration describes. Everything is checked, and nothing written.

    Raises:
        LthError: as `find`.
    """
    host = Pretraining(config)
    return Search(host, host.config, config.evaluate_last)


class Pretraining:
    """A pre-training as a `Host`: its first training makes θ_p.

    Args:
        config: the configuration.

    Raises:
        LthError: as `find`.
    """

    pretrains = takes_weights = True
    outside: Mapping[str, Shape] = MappingProxyType({})

    def __init__(self, config: FindConfig) -> None:
        self.folder = Path(config.out).expanduser()
        self.early = self.folder / EARLY
        config = replace(config, trainer=resolve_precision(config.trainer, self.folder))
        self.config = config
        weights: State | Ticket | None = None
        spec = IMAGENET
        self.recipe = recipe(config)
        if config.init is not None:
            sparse = config.method is not None
            weights, spec = read_weights(Path(config.init), config.source, sparse)
        if spec != IMAGENET:
            self.recipe["input"] = asdict(spec)
        self.meta = TicketMeta(config.arch, config.source, input=spec)
        check_trainer(config)
        self.task_class = pretraining(config.task)
        self.task_class.check_teacher(config)
        self.images: Splits = open_images(config.data, self.task_class.views(config, spec), spec)
        TrainLoader(self.images.train, config.batch_size, seed=0)  # refuses what fills no batch
        logger.info("data: %s", self.images)
        # Training starts from here: made now, so that weights that do not fit are refused now.
        self.first = self._task(config.pretrain, stream=0)
        self.started_from = weights
        if weights is not None and not self.first.take(weights):
            if config.teacher is not None and self.task_class.distils == LOGITS:
                raise TicketError(
                    f"expected θ_p with its trained head as the teacher, found none for "
                    f"{config.task} in init={config.init}: give a checkpoint that has it, or "
                    "leave out teacher"
                )
            logger.warning(
                "%s has no head for %s: its rounds start from one as initialised",
                config.init,
                config.task,
            )

    @property
    def is_main(self) -> bool:
        return is_main()

    def start(self) -> None:
        self.metrics = Metrics(self.folder / METRICS)
        if self.is_main:
            write_atomically(self.folder / CONFIG, OmegaConf.to_yaml(self.config).encode())

    def train(self, run: Run) -> State:
        return self._pretrain(run) if run.index == 0 else self._train(run)

    def is_finished(self, index: int) -> bool:
        return index in self.metrics

    def result(self, index: int) -> Path:
        # After the pre-training, only rounds that are not rewound need the whole state.
        name = f"trained_{index:02d}.safetensors" if index > 0 else PRETRAINED
        return self.folder / name

    def state(self, weights: Path | None) -> State:
        if weights is not None:
            return load_file(weights)
        return self._task(self.config.pretrain, stream=0).state_dict()

    def trunk(self, state: State) -> State:
        prefix = "trunk."
        return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

    def probe(self, state: State) -> tuple[nn.Module, list[Loss]]:
        """The trunk in a whole state, and the pre-training's losses of some batches."""
        task, size = self._task(self.config.training, stream=0), self.config.batch_size
        task.load_state_dict(state)
        trunk, task.trunk = task.trunk, nn.Identity()
        loader = TrainLoader(self.images.train, size, seed_of(self.config.seed))
        batches = itertools.islice(loader, math.ceil(GRADIENTS / size))
        return trunk, [_loss_of(task, *numbered) for numbered in enumerate(batches)]

    def tidy(self, index: int) -> None:
        if index > 0:
            delete_checkpoints(_training(index - 1), self.folder)  # what the round was pruned from
        if index > 2 and self.is_main and self.result(index - 1).exists():
            self.result(index - 2).unlink(missing_ok=True)

    def _pretrain(self, run: Run) -> dict[str, Tensor]:
        """θ_p: the whole state of the pre-trained task, its head included."""
        path = self.result(0)
        if not path.exists():
            if self.config.init is not None:
                metrics = validate(self.first, self.images, _training(0), self.folder)
            else:
                early = SaveEarly(self.early, self.config.rewind_at)
                callbacks = [early] if run.keep_early else []
                metrics = fit(self.first, self.images, _training(0), self.folder, callbacks)
            self.metrics.put(0, density=1.0, sparsity=0.0, **metrics)
            logger.info("pre-trained: %s", describe(metrics))
            store(self.first.state_dict(), path)
        delete_checkpoints(_training(0), self.folder)
        state = load_file(path)
        self._keep_head(0, state)
        return state

    def _train(self, run: Run) -> State:
        """Train a ticket; its metrics are those of the ticket's round."""
        k, ticket, stored = run.index, run.ticket, self.result(run.index)
        assert ticket is not None
        if stored.exists() and k in self.metrics:
            return load_file(stored)
        phase = self.config.training
        if run.last_lr:
            phase = replace(phase, warmup_epochs=0)  # the schedule is constant
        task = self._task(phase, stream=k)
        attachment = task.rewind(self.state(run.weights), ticket)
        if self.config.teacher is not None:
            teacher = self._task(phase, stream=k)
            teacher.load_state_dict(load_file(self.result(0)))
            task.learn_from(teacher)
        bird = EarlyBird(ticket.masks, lambda state: self._prune(state, ticket))
        callbacks = [bird] if self.config.early_bird else []
        metrics = fit(task, self.images, _training(k), self.folder, callbacks)
        attachment.verify()
        if self.config.early_bird:
            if bird.epochs % validation_interval(task, self.images):  # not validated since then
                seconds = metrics["seconds"]
                metrics = validate(task, self.images, _training(k), self.folder)
                metrics["seconds"] = round(metrics["seconds"] + seconds, 2)
            metrics["saved"] = 1 - bird.epochs / phase.epochs
        if self.config.rewind in KEPT:  # the next round starts from all of this
            store(task.state_dict(), stored)
        self._keep_head(k, task.state_dict())
        # Last: a round that has its line is not trained again.
        self.metrics.put(k, density=ticket.density, sparsity=ticket.sparsity, **metrics)
        logger.info("round %d, trained: %s", k, describe(metrics))
        return task.state_dict()

    def _keep_head(self, k: int, state: State) -> None:
        """Store what a trained ticket has no place for."""
        if self.config.keep == TRAINED:
            store(self.task_class.head_of(state), head_beside(trained_path(self.folder, k)))

    def _prune(self, state: State, ticket: Ticket) -> Masks:
        """The masks that the next round has before they are refilled."""
        config = self.config
        return prune(state, config.fraction, ticket.masks, config.criterion, config.allocation)

    def _task(self, phase: Phase, stream: int) -> Task:
        return self.task_class(self.config, phase, len(self.images.classes), stream)


def _loss_of(task: Task, number: int, batch: Any) -> Loss:
    """The loss of a batch, which is the same each time: a step may change what is in its task."""

    def loss(trunk: nn.Module) -> Tensor:
        own = copy.deepcopy(task)
        own.trunk = trunk
        own.trainer = pl.Trainer(logger=False, enable_checkpointing=False)
        with seeded(seed_of(task.stream, number)):
            found = own.training_step(batch, number)
        assert isinstance(found, Tensor)
        return found

    return loss


def head_beside(path: Path) -> Path:
    """The file of the head that was trained with a ticket: ``round_06.head.safetensors``."""
    return path.with_name(path.name.removesuffix(SUFFIX).removesuffix(".trained") + HEAD)


class SparsePretraining:
    """A pre-training by a method of sparse training. Its folder gets ``final.ticket``.

    Args:
        config: the configuration.

    Raises:
        LthError: as `find`.
    """

    def __init__(self, config: FindConfig) -> None:
        self.host = Pretraining(config)
        self.config, self.folder = self.host.config, self.host.folder
        self._check_folder()
        task = self.host.first
        self.attachment = task.rewind(task.state_dict(), self._start())
        assert config.method is not None
        self.callback = SparseTrainingCallback(config.method, **config.method_options)
        self.callback.training.check(task, iterations(config, config.pretrain, self.host.images))

    def run(self) -> Path:
        """Train or resume, and return the file of the ticket."""
        self._check_folder()  # again: another process may have worked there since
        path = self.folder / FINAL
        if path.exists():
            return path
        start_folder(self.folder, self.host.recipe, self.host.is_main)
        self.host.start()
        name = self.callback.training.method.name
        metrics = fit(self.host.first, self.host.images, name, self.folder, [self.callback])
        ticket = self.attachment.ticket()  # with the weights as trained
        agree(ticket)
        logger.info("%s, trained: %s; %r", name, describe(metrics), ticket)
        density = {"density": ticket.density, "sparsity": ticket.sparsity}
        self.host.metrics.put(0, **density, **metrics)
        if self.host.is_main:
            ticket.save(path)
        barrier()
        delete_checkpoints(name, self.folder)
        return path

    def _start(self) -> Ticket:
        """The masks of ``init``, if it is a ticket, over the weights that training starts from."""
        meta = replace(self.host.meta, recipe=self.host.recipe)
        state, given = self.host.trunk(self.host.first.state_dict()), self.host.started_from
        masks = given.masks if isinstance(given, Ticket) else Masks.ones(meta.network.prunable)
        return Ticket(masks, state, meta)

    def _check_folder(self) -> None:
        check_folder(self.folder, self.host.recipe, RECIPE, [METRICS, FINAL])


def pretraining(name: str) -> type[Task]:
    """The class of a pre-training in `TASKS`.

    Raises:
        ConfigError: if there is none, or it is no `Task`.
    """
    found = TASKS[name]
    if isinstance(found, str):
        module, _, attribute = found.partition(":")
        found = getattr(importlib.import_module(module), attribute)
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ConfigError(f"expected task {name!r} to be a subclass of Task, found {found!r}")
    return found


class Metrics:
    """``metrics.jsonl``: one line per round, in order. The file is replaced, never appended to.

    Args:
        path: of the file; its lines are kept.

    Raises:
        RunError: if the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[int, dict[str, Any]] = {}
        if path.exists():
            try:
                lines = [json.loads(line) for line in path.read_text().splitlines()]
                self.lines = {line["round"]: line for line in lines}
            except (ValueError, TypeError, KeyError) as error:
                raise RunError(
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


def _training(k: int) -> str:
    """The name of the training whose result is measured as round k."""
    return f"round_{k:02d}" if k > 0 else "pretrain"


def read_weights(path: Path, source: str, sparse: bool = False) -> tuple[State | Ticket, InputSpec]:
    """The weights of a ticket or of a checkpoint, and the input of their network.

    Args:
        path: of the file.
        source: what is in a checkpoint.
        sparse: whether the ticket may be.
    """
    if path.suffix != SUFFIX:
        state = read_checkpoint(path)
        return state, default_input(source, locate(split_masks(state)[1]), state)
    ticket = Ticket.load(path)
    if ticket.density < 1 and not sparse:
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
