"""One transfer: a ticket on a dataset, from start to ``result.json``; and IMP made of such runs.

A run's folder holds ``config.yaml``, ``metrics.jsonl`` (a line per epoch), a checkpoint while it
trains, and in the end ``model.safetensors`` (torchvision's names), ``final.ticket`` and
``result.json``; `classify` called again resumes.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from omegaconf import OmegaConf
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn

from lth_plugins.errors import ConfigError, LthError, RunError, TicketError
from lth_plugins.masking.attachment import attach
from lth_plugins.pruning import Loss
from lth_plugins.pruning.search.imp import round_path
from lth_plugins.pruning.search.search import Run, Search
from lth_plugins.resilience.atomic import write_atomically
from lth_plugins.resilience.ranks import barrier
from lth_plugins.resilience.recipe import check_folder, digest
from lth_plugins.resilience.seeds import seed_of
from lth_plugins.ticket import Choice, Ticket
from lth_plugins.ticket.arch import PARTS, STAGES, Shape, part_of
from lth_plugins.ticket.foreign.checkpoints import read_checkpoint
from lth_plugins.ticket.keys import State
from lth_plugins.training.callbacks import SaveEarly, write_state
from lth_plugins.training.fit import (
    check_trainer,
    delete_checkpoints,
    fit,
    is_main,
    iterations,
    locked,
    resolve_precision,
    validate,
)
from lth_plugins.training.loader import TrainLoader
from lth_plugins.training.settings import Distill
from lth_plugins.training.sparse import SparseTrainingCallback
from lth_plugins.transfer.config import TransferConfig, load_config, recipe
from lth_plugins.transfer.data import open_images
from lth_plugins.transfer.features import features
from lth_plugins.transfer.task import Classifier, Probe

logger = logging.getLogger(__name__)

CONFIG, LINES, RESULT = "config.yaml", "metrics.jsonl", "result.json"
EVALUATION = "evaluation.json"
MODEL, TICKET, FEATURES = "model.safetensors", "final.ticket", "features.safetensors"
_NAME = "transfer"  # of the training, for `fit`


def classify(config: TransferConfig) -> dict[str, Any]:
    """Train a ticket on a dataset and measure it.

    Args:
        config: from `config.load_config`.

    Returns:
        What ``result.json`` holds.

    Raises:
        LthError: before any training, if the ticket, the data or the output folder do not fit
            the configuration, or another process works in that; nothing on disk has changed then.
            And later, if the disk is full.
    """
    transfer = Transfer(config, open_ticket(config))
    with locked(transfer.folder):
        return transfer.run()


def evaluate(config: TransferConfig) -> dict[str, float]:
    """Measure the model that ``config.start`` names, without training.

    Args:
        config: from `config.load_config`.

    Returns:
        What ``evaluation.json`` holds.

    Raises:
        LthError: as `classify`, or if ``start`` is no model of this configuration.
    """
    config = replace(config, teacher=None, distill=Distill())  # it is for a training
    transfer = Transfer(config, open_ticket(config))
    with locked(transfer.folder):
        transfer.start_folder()
        found = validate(transfer.model, transfer.images, "evaluation", transfer.folder)
        result = {"top1": found["val_top1"], "val_loss": found["val_loss"]}
        if is_main():
            write_atomically(transfer.folder / EVALUATION, json.dumps(result).encode())
        return result


def search(config: TransferConfig) -> list[Path]:
    """Find task-specific tickets (m_T, θ) by IMP, each round of which is a `classify`.

    Args:
        config: its ``rounds`` says how many; its ticket is dense. ``out`` gets
            ``round_00.ticket``, …, and the run of each in ``train_00``, …

    Returns:
        The files of all rounds.

    Raises:
        LthError: as `classify`, or if the ticket is sparse.
    """
    host = Classification(config)
    found = Search(host, host.config)
    with locked(found.folder):
        return found.run()


class Classification:
    """Downstream classification as a `Host`: each run of a search is a `Transfer`.

    Args:
        config: the configuration.

    Raises:
        LthError: as `search`.
    """

    pretrains = takes_weights = False
    outside: Mapping[str, Shape] = MappingProxyType({})

    def __init__(self, config: TransferConfig) -> None:
        self._dense = open_ticket(config)
        if self._dense.density < 1:
            raise TicketError(
                f"rounds={config.rounds} starts from a dense ticket, found {self._dense!r}: give "
                "the dense one of the same weights, of a search its round_00.ticket"
            )
        self._whole = Transfer(config, self._dense)  # for its checks
        self.config = self._whole.config
        self.folder, self.early = self._whole.folder, self._whole.folder / "early.safetensors"
        self.meta = replace(self._dense.meta, source=config.data.name)
        self.recipe = {"found_in": self._dense.meta.source, **self._whole.recipe}

    @property
    def is_main(self) -> bool:
        return is_main()

    def start(self) -> None:
        self._whole.start_folder()

    def train(self, run: Run) -> State:
        transfer = Transfer(self._configured(run), run.ticket or self._dense)
        transfer.run([SaveEarly(self.early, self.config.rewind_at)] if run.keep_early else [])
        return self.state(self.result(run.index))

    def is_finished(self, index: int) -> bool:
        return (self._run_folder(index) / RESULT).exists()

    def result(self, index: int) -> Path:
        return self._run_folder(index) / MODEL

    def state(self, weights: Path | None) -> State:
        if weights is not None:
            return read_model(weights)
        if self.config.rewind != "init":
            return self._dense.weights
        standard = replace(self.config, stem="standard")  # what a ticket holds
        fresh = Classifier(standard, len(self._whole.images.classes), self.folder / LINES)
        return fresh.trunk.state_dict()

    def trunk(self, state: State) -> State:
        """The trunk with the ticket's stem where the runs have a small one."""
        own = self._dense.weights
        small = state["conv1.weight"].shape != own["conv1.weight"].shape
        return {n: (own if small and part_of(n) == "stem" else state)[n] for n in own}

    def probe(self, state: State) -> tuple[nn.Module, Sequence[Loss]]:
        raise NotImplementedError  # the settings allow no criterion that looks at gradients

    def tidy(self, index: int) -> None:
        pass  # runs are kept

    def _configured(self, run: Run) -> TransferConfig:
        """The configuration of a run, which an ordinary `classify` repeats."""
        config = replace(self.config, rounds=0, out=str(self._run_folder(run.index)))
        if run.ticket is not None:
            path = round_path(self.folder, run.index)
            config = replace(config, ticket=str(path), weights=None)
        if run.weights is not None:
            config = replace(config, start=str(run.weights))
        if run.last_lr:
            phase = config.training
            lr = phase.lr * 0.1 ** len(phase.milestones)
            phase = replace(phase, lr=lr, milestones=[], warmup_epochs=0)
            config = replace(config, training=phase)
        return config

    def _run_folder(self, index: int) -> Path:
        return self.folder / f"train_{index:02d}"


def open_ticket(config: TransferConfig) -> Ticket:
    """The ticket that a configuration describes.

    Raises:
        TicketError: if it cannot be read.
        ConfigError: if it is not for the configuration's architecture, or has another digest.
    """
    choice = Choice(
        config.ticket,
        weights=config.weights,
        reverse=config.reverse,
        random=config.random,
        seed=config.seed,
        outside=False,
    )
    ticket = choice.load()
    if ticket.meta.arch != config.arch:
        raise ConfigError(
            f"expected a ticket for arch={config.arch}, found one for {ticket.meta.arch} in "
            f"{config.ticket}: give arch={ticket.meta.arch}"
        )
    if config.ticket_digest not in (None, ticket.digest):
        raise ConfigError(
            f"expected ticket_digest={config.ticket_digest}, found {ticket.digest} in "
            f"{config.ticket}: it is another ticket, or other weights, reverse, random or seed"
        )
    return ticket


class Transfer:
    """One run of `classify`. Making one checks everything and writes nothing.

    Args:
        config: the configuration.
        ticket: what `open_ticket` returns for it.

    Raises:
        LthError: as `classify`.
    """

    def __init__(self, config: TransferConfig, ticket: Ticket) -> None:
        self.folder = Path(config.out).expanduser()
        trainer = resolve_precision(config.trainer, self.folder)
        config = self.config = replace(config, trainer=trainer, ticket_digest=ticket.digest)
        self.ticket = ticket
        self.recipe = recipe(self.config)
        self.linear = config.mode == "linear"
        self._check_folder()
        check_trainer(config)
        self.images = open_images(config.data, ticket.meta.input, augment=not self.linear)
        TrainLoader(self.images.train, config.batch_size, seed=0)  # refuses too few images
        logger.info("data: %s; ticket: %r", self.images, ticket)
        self.model = Classifier(self.config, len(self.images.classes), self.folder / LINES)
        # A stem that is not the ticket's keeps its own initialisation.
        parts = STAGES if config.stem == "small" else PARTS
        self.handle = attach(self.model.trunk, ticket, config.load_weights, parts)
        if config.start is not None:
            self._load(self.model, config.start, "start")  # what is pruned stays so
        if config.teacher is not None:
            self.model.learn_from(self._teacher(config.teacher))
        self._sparse: list[SparseTrainingCallback] = []
        if config.method is not None:
            callback = SparseTrainingCallback(config.method, **config.method_options)
            callback.training.check(self.model, iterations(config, config.training, self.images))
            self._sparse.append(callback)

    def run(self, callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
        """Train or resume, or do nothing if the result exists. Returns the result."""
        done = self.folder / RESULT
        if done.exists():
            result = json.loads(done.read_text())
            self._tidy()  # in case the run was killed before it did
            logger.info("%s is finished: top1 %.2f %%", self.folder, 100 * result["top1"])
            return result
        self._check_folder()  # again: another process may have worked there until now
        self.start_folder()
        callbacks = [*callbacks, *self._sparse]
        if self.linear:
            metrics = self._fit_head()
        else:
            metrics = fit(self.model, self.images, _NAME, self.folder, callbacks)
        self.handle.verify()
        result = self._result(metrics)
        self._store(result)
        barrier()
        return result

    def _load(self, model: Classifier, path: str, key: str) -> None:
        """Give a model the weights of a run's ``model.safetensors``, named by a key of the config.

        Raises:
            ConfigError: if it is of another architecture or other classes, or lacks a parameter.
        """
        state = read_model(Path(path))
        named = {n if n.startswith("fc.") else f"trunk.{n}": value for n, value in state.items()}
        own = model.state_dict()
        for name in sorted(own.keys() | named.keys()):
            shapes = [tuple(s[name].shape) if name in s else None for s in (own, named)]
            if shapes[0] != shapes[1]:
                what = name.removeprefix("trunk.")
                found = f"no {what}" if shapes[1] is None else f"{what} of shape {shapes[1]}"
                raise ConfigError(
                    f"expected the model.safetensors of a run with arch={self.config.arch}, "
                    f"stem={self.config.stem} and {len(self.images.classes)} classes at "
                    f"{key}={path}, found {found}"
                )
        model.load_state_dict(named)

    def _teacher(self, path: str) -> Classifier:
        teacher = Classifier(self.config, len(self.images.classes), self.folder / LINES)
        self._load(teacher, path, "teacher")
        beside = Path(path).with_name(TICKET)
        if beside.exists():
            trained, own = Ticket.load(beside).meta.input, self.ticket.meta.input
            if trained != own:
                raise TicketError(
                    f"expected a teacher that was trained on the input of the student's ticket, "
                    f"{own}, found one that was trained on {trained} at {path}: give another"
                )
        return teacher

    def _fit_head(self) -> dict[str, float]:
        cache = self.folder / FEATURES
        seed = seed_of(self.config.seed)
        found = features(self.config, self.model.trunk, self.images, seed, cache)
        self.model.trunk.load_state_dict(found.trunk)
        probe = Probe(self.config, len(self.images.classes), self.folder / LINES)
        metrics = fit(probe, found.images, _NAME, self.folder)
        self.model.fc.load_state_dict(probe.fc.state_dict())
        return metrics

    def _result(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        config, meta = self.config, self.ticket.meta
        result = {
            "top1": metrics["val_top1"],
            "val_loss": metrics["val_loss"],
            "train_loss": metrics["train_loss"],
            "data": config.data.name,
            "mode": config.mode,
            "seed": config.seed,
            "epochs": config.training.epochs,
            "arch": meta.arch,
            "source": meta.source,
            "round": meta.round,
            "masks": meta.recipe.get("masks", "found"),
            "sparsity": self.handle.masks.sparsity,
            "ticket": self.ticket.digest,
            "config": digest(self.recipe),
        }
        if config.method is not None:
            result["method"] = config.method
        # The same run in the same environment has the same digest: its duration does not count.
        return {**result, "digest": digest(result), "seconds": metrics["seconds"]}

    @rank_zero_only
    def _store(self, result: Mapping[str, Any]) -> None:
        """Write what a finished run leaves; ``result.json``, which says that it is, at last."""
        state = {n.removeprefix("trunk."): v for n, v in self.model.state_dict().items()}
        write_state(state, self.folder / MODEL)
        # Small-stem trunks are no standard trunks, which is what a ticket holds.
        if not self.linear and self.config.stem == "standard":
            changes = {"transfer": self.recipe, "found_in": self.ticket.meta.source}
            final = self.handle.ticket(
                source=self.config.data.name, recipe=changes, parent=self.ticket.digest
            )
            final.save(self.folder / TICKET)
        text = json.dumps(result, indent=2) + "\n"
        write_atomically(self.folder / RESULT, text.encode())
        self._tidy()

    @rank_zero_only
    def _tidy(self) -> None:
        """Remove what only an unfinished run needs."""
        delete_checkpoints(_NAME, self.folder)
        (self.folder / FEATURES).unlink(missing_ok=True)

    def _check_folder(self) -> None:
        results = (LINES, MODEL, TICKET, RESULT)
        check_folder(self.folder, self.recipe, CONFIG, results, _read_recipe)

    @rank_zero_only
    def start_folder(self) -> None:
        """Make the output folder, with the configuration in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = OmegaConf.to_yaml(OmegaConf.structured(self.config))
        write_atomically(self.folder / CONFIG, text.encode())


def _read_recipe(path: Path) -> dict[str, Any]:
    """That of the run which stored this configuration."""
    try:
        return recipe(load_config(path))
    except LthError as error:
        raise RunError(
            f"{path.parent} is not a folder of this kind of run ({error}): give another "
            "output folder; nothing was changed"
        ) from None


def read_model(path: Path) -> dict[str, Tensor]:
    """A whole model by torchvision's names, from ``model.safetensors`` or ``early.safetensors``."""
    return {n.removeprefix("trunk."): value for n, value in read_checkpoint(path).items()}
