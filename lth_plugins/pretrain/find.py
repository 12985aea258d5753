"""Finding tickets: pre-train once, then IMP on the same task.

A run's folder holds ``config.yaml`` and ``recipe.json`` (the part of it that may not change),
``pretrained.safetensors`` (θ_p with the task's head), one ``round_KK.ticket`` a round and
``metrics.jsonl``; `find` called again goes on where it stopped.
"""

import importlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor

from lth_plugins.pretrain.config import TASKS, FindConfig, Phase, recipe
from lth_plugins.pretrain.data import Pictures, TrainLoader, open_pictures
from lth_plugins.pretrain.fit import describe, fit, forget, validate
from lth_plugins.pretrain.task import Task
from lth_plugins.prune.imp import check_recipe, imp, round_path
from lth_plugins.ticket import Ticket, TicketError
from lth_plugins.ticket.catalog import SUFFIX
from lth_plugins.ticket.convert import read_checkpoint
from lth_plugins.ticket.dialects import State
from lth_plugins.ticket.file import replace_file

logger = logging.getLogger(__name__)

CONFIG, RECIPE, PRETRAINED = "config.yaml", "recipe.json", "pretrained.safetensors"
METRICS = "metrics.jsonl"


def find(config: FindConfig) -> list[Path]:
    """Pre-train, find tickets by IMP and measure them.

    Args:
        config: from `config.load_config`.

    Returns:
        The files of all rounds, 0 to ``config.rounds``.

    Raises:
        TicketError: before any training, if data, initial weights or the output folder do not fit
            the configuration. Nothing on disk has changed then.
    """
    return list(Search(config).run())


class Search:
    """One run of `find`. Making one checks everything and starts the output folder.

    Args:
        config: the configuration.

    Raises:
        TicketError: as `find`.
    """

    def __init__(self, config: FindConfig) -> None:
        self.config = config
        self.folder = Path(config.out).expanduser()
        self.recipe = recipe(config)
        self._check_folder()
        module, name = TASKS[config.task].split(":")
        self.task_class: type[Task] = getattr(importlib.import_module(module), name)
        self.pictures: Pictures = open_pictures(config.data, self.task_class.views(config))
        TrainLoader(self.pictures.train, config.batch_size, seed=0)  # refuses what fills no batch
        # Training starts from here: made now, so that weights that do not fit are refused now.
        self.start = self._task(config.pretrain, stream=0)
        if config.init is not None and not self.start.take(_read_weights(Path(config.init))):
            logger.warning(
                "%s has no head for %s: its rounds start from one as initialised",
                config.init,
                config.task,
            )
        self.metrics = Metrics(self.folder / METRICS)
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(self.folder / RECIPE, (json.dumps(self.recipe, indent=1) + "\n").encode())
        replace_file(self.folder / CONFIG, OmegaConf.to_yaml(config).encode())

    def run(self) -> Iterator[Path]:
        """Yields the file of each round as soon as it is complete."""
        pretrained = self._pretrain()
        prefix = "trunk."
        trunk = {k[len(prefix) :]: v for k, v in pretrained.items() if k.startswith(prefix)}
        dense = Ticket.dense(trunk, source=self.config.source, recipe=self.recipe)

        def train(ticket: Ticket, k: int) -> State:
            return self._train(ticket, pretrained)

        config = self.config
        rounds = imp(
            dense,
            train,
            config.rounds,
            self.folder,
            fraction=config.fraction,
            criterion=config.criterion,
            trained=trunk,
        )
        for ticket in rounds:
            k = ticket.meta.round
            logger.info("round %d: %r", k, ticket)
            forget(_training(k - 1), self.folder)  # what it was pruned from
            yield round_path(self.folder, k)
        if config.evaluate_last and ticket.meta.round not in self.metrics:
            self._train(ticket, pretrained)
        forget(_training(ticket.meta.round), self.folder)

    def _pretrain(self) -> dict[str, Tensor]:
        """θ_p: the whole state of the pre-trained task, its head included."""
        path = self.folder / PRETRAINED
        if not path.exists():
            if self.config.init is not None:
                metrics = validate(self.start, self.pictures, _training(0), self.folder)
            else:
                metrics = fit(self.start, self.pictures, _training(0), self.folder)
            self.metrics.put(0, density=1.0, sparsity=0.0, **metrics)
            logger.info("pre-trained: %s", describe(metrics))
            state = {k: v.detach().cpu().contiguous() for k, v in self.start.state_dict().items()}
            replace_file(path, to_safetensors(state))
        forget(_training(0), self.folder)
        return load_file(path)

    def _train(self, ticket: Ticket, pretrained: State) -> State:
        """Train (m, θ_p) and return the trunk; its metrics are those of the ticket's round."""
        k = ticket.meta.round
        task = self._task(self.config.training, stream=k)
        attachment = task.rewind(pretrained, ticket)
        metrics = fit(task, self.pictures, _training(k), self.folder)
        attachment.verify()
        self.metrics.put(k, density=ticket.density, sparsity=ticket.sparsity, **metrics)
        logger.info("round %d, trained: %s", k, describe(metrics))
        return task.trunk.state_dict()

    def _task(self, phase: Phase, stream: int) -> Task:
        return self.task_class(self.config, phase, len(self.pictures.classes), stream)

    def _check_folder(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise TicketError(f"out={self.folder} is a file: give a folder")
        stored = self.folder / RECIPE
        if stored.exists():
            check_recipe(json.loads(stored.read_text()), self.recipe, self.folder)


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
        text = "".join(json.dumps(self.lines[k]) + "\n" for k in sorted(self.lines))
        replace_file(self.path, text.encode())


def _training(k: int) -> str:
    """The name of the training whose result is measured as round k."""
    return f"round_{k:02d}" if k > 0 else "pretrain"


def _read_weights(path: Path) -> State | Ticket:
    """The weights of a dense ticket or of a checkpoint."""
    if path.suffix != SUFFIX:
        return read_checkpoint(path)
    ticket = Ticket.load(path)
    if ticket.density < 1:
        raise TicketError(f"expected dense weights in init, found {ticket!r}: give round 0")
    return ticket
