"""One transfer: a ticket on a data set, from start to ``result.json``; and IMP made of such runs.

A run's folder holds ``config.yaml``, ``metrics.jsonl`` (a line an epoch), while it trains a
checkpoint, and in the end ``model.safetensors`` (torchvision's names), ``final.ticket`` and
``result.json``; `classify` called again goes on where it stopped.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_only
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor

from lth_plugins.errors import LthError
from lth_plugins.masking.attachment import attach
from lth_plugins.pruning.search.imp import KEPT, imp, round_path
from lth_plugins.resilience.atomic import write_atomically
from lth_plugins.resilience.ranks import barrier
from lth_plugins.resilience.recipe import check_folder, digest
from lth_plugins.resilience.seeds import seed_of
from lth_plugins.ticket import Choice, Ticket, TicketError
from lth_plugins.ticket.arch import PARTS, STAGES, part_of
from lth_plugins.ticket.foreign.checkpoints import read_checkpoint
from lth_plugins.ticket.keys import State
from lth_plugins.training.fit import SaveEarly, agree, alone_in, check_trainer, fit, forget, settled
from lth_plugins.training.loader import TrainLoader
from lth_plugins.transfer.config import TransferConfig, load_config, recipe
from lth_plugins.transfer.data import open_pictures
from lth_plugins.transfer.features import features
from lth_plugins.transfer.task import Classifier, Probe

logger = logging.getLogger(__name__)

CONFIG, LINES, RESULT = "config.yaml", "metrics.jsonl", "result.json"
MODEL, TICKET, FEATURES = "model.safetensors", "final.ticket", "features.safetensors"
_NAME = "transfer"  # of the training, for `fit`


def classify(config: TransferConfig) -> dict[str, Any]:
    """Train a ticket on a data set and measure it.

    Args:
        config: from `config.load_config`.

    Returns:
        What ``result.json`` holds.

    Raises:
        TicketError: before any training, if the ticket, the data or the output folder do not fit
            the configuration, or another process works in that; nothing on disk has changed then.
            And later, if the disk is full.
    """
    transfer = Transfer(config, open_ticket(config))
    with alone_in(transfer.folder):
        return transfer.run()


def search(config: TransferConfig) -> list[Path]:
    """Find task-specific tickets (m_T, θ) by IMP, each round of which is a `classify`.

    Args:
        config: its ``rounds`` says how many; its ticket is dense. ``out`` gets
            ``round_00.ticket``, …, and the run of each in ``train_00``, …

    Returns:
        The files of all rounds.

    Raises:
        TicketError: as `classify`, or if the ticket is sparse.
    """
    found = Search(config)
    with alone_in(found.folder):
        return found.run()


class Search:
    """One run of `search`. Making one checks everything and writes nothing.

    Args:
        config: the configuration.

    Raises:
        TicketError: as `search`.
    """

    def __init__(self, config: TransferConfig) -> None:
        trainer = settled(config.trainer, Path(config.out).expanduser())
        config = self.config = replace(config, trainer=trainer)
        self.dense = open_ticket(config)
        if self.dense.density < 1:
            raise TicketError(
                f"rounds={config.rounds} starts from a dense ticket, found {self.dense!r}: give "
                "the dense one of the same weights, of a search its round_00.ticket"
            )
        self.whole = Transfer(config, self.dense)  # for its checks
        self.folder = self.whole.folder
        self.early = self.folder / "early.safetensors"

    def run(self) -> list[Path]:
        """Find all rounds, or go on finding them, and measure the last. Returns their files."""
        config = self.config
        self.whole.start_folder()
        trained, origin = self._origin()
        meta = replace(
            self.dense.meta,
            source=config.data.name,
            recipe={"found_in": self.dense.meta.source, "transfer": self.whole.recipe},
        )

        def train(ticket: Ticket) -> State:
            run = self._round(ticket)
            run.run()
            return run.trunk()

        paths = []
        for ticket in imp(
            Ticket(self.dense.masks, origin, meta),
            train,
            config.rounds,
            self.folder,
            fraction=config.fraction,
            criterion=config.criterion,
            scope=config.scope,
            trained=trained,
            rewind=config.rewind,
            structure=config.structure.make(),
            save=rank_zero_only(Ticket.save),
        ):
            agree(ticket)
            logger.info("round %d: %r", ticket.meta.round, ticket)
            paths.append(round_path(self.folder, ticket.meta.round))
        self._round(ticket).run()
        return paths

    def _origin(self) -> tuple[State | None, State]:
        """What round 1 prunes, if it was trained for that, and θ."""
        if self.config.rewind == "init":
            standard = replace(self.config, stem="standard")  # what a ticket holds
            fresh = Classifier(standard, len(self.whole.pictures.classes), self.folder / LINES)
            return None, fresh.trunk.state_dict()
        if self.config.rewind != "early":
            return None, self.dense.weights
        first = Transfer(self._its_own(0), self.dense)
        first.run([SaveEarly(self.early, self.config.rewind_at)])
        state = _read_model(self.early)
        return first.trunk(), first.as_trunk(state)

    def _round(self, ticket: Ticket) -> "Transfer":
        """The training of a round's ticket."""
        k, config = ticket.meta.round, self._its_own(ticket.meta.round)
        config = replace(config, ticket=str(round_path(self.folder, k)), weights=None)
        if k > 0 and config.rewind == "early":
            config = replace(config, start=str(self.early))
        if k > 0 and config.rewind in KEPT:
            config = replace(config, start=str(Path(self._its_own(k - 1).out) / MODEL))
        if k > 0 and config.rewind == "none":
            phase = config.training
            lr = phase.lr * 0.1 ** len(phase.milestones)
            phase = replace(phase, lr=lr, milestones=[], warmup_epochs=0)
            config = replace(config, training=phase)
        return Transfer(config, ticket)

    def _its_own(self, k: int) -> TransferConfig:
        return replace(self.config, rounds=0, out=str(self.folder / f"train_{k:02d}"))


def open_ticket(config: TransferConfig) -> Ticket:
    """The ticket that a configuration describes.

    Raises:
        TicketError: if it cannot be read, or is not for the configuration's architecture.
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
        raise TicketError(
            f"expected a ticket for arch={config.arch}, found one for {ticket.meta.arch} in "
            f"{config.ticket}: give arch={ticket.meta.arch}"
        )
    if config.ticket_digest not in (None, ticket.digest):
        raise TicketError(
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
        TicketError: as `classify`.
    """

    def __init__(self, config: TransferConfig, ticket: Ticket) -> None:
        self.folder = Path(config.out).expanduser()
        trainer = settled(config.trainer, self.folder)
        config = self.config = replace(config, trainer=trainer, ticket_digest=ticket.digest)
        self.ticket = ticket
        self.recipe = recipe(self.config)
        self.linear = config.mode == "linear"
        self._check_folder()
        check_trainer(config)
        self.pictures = open_pictures(config.data, ticket.meta.input, augment=not self.linear)
        TrainLoader(self.pictures.train, config.batch_size, seed=0)  # refuses too few pictures
        logger.info("data: %s; ticket: %r", self.pictures, ticket)
        self.model = Classifier(self.config, len(self.pictures.classes), self.folder / LINES)
        # A stem that is not the ticket's keeps its own initialisation.
        parts = STAGES if config.stem == "small" else PARTS
        self.handle = attach(self.model.trunk, ticket, config.load_weights, parts)
        if config.start is not None:
            self._take(config.start)

    def run(self, callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
        """Train, or go on training, or do nothing if the result is there. Returns the result."""
        done = self.folder / RESULT
        if done.exists():
            result = json.loads(done.read_text())
            self._forget()  # what a run that was killed then could not
            logger.info("%s is finished: top1 %.2f %%", self.folder, 100 * result["top1"])
            return result
        self._check_folder()  # again: another process may have worked there until now
        self.start_folder()
        metrics = self._fit_head() if self.linear else self._fit_all(callbacks)
        self.handle.verify()
        result = self._result(metrics)
        self._store(result)
        barrier()
        return result

    def trunk(self) -> dict[str, Tensor]:
        """The trained trunk of a finished run."""
        return self.as_trunk(load_file(self.folder / MODEL))

    def as_trunk(self, state: State) -> dict[str, Tensor]:
        """The trunk in a model's state; its stem is the ticket's where this run has another."""
        stem = self.ticket.weights if self.config.stem == "small" else state
        return {n: (stem if part_of(n) == "stem" else state)[n] for n in self.ticket.weights}

    def _take(self, start: str) -> None:
        """Start from a model's weights instead of the ticket's; those that are pruned stay so."""
        state = _read_model(Path(start))
        own = self.model.state_dict()
        named = {n if n.startswith("fc.") else f"trunk.{n}": value for n, value in state.items()}
        wrong = [n for n in own.keys() | named.keys() if n not in own or n not in named]
        wrong += [n for n in own if n in named and own[n].shape != named[n].shape]
        if wrong:
            raise TicketError(
                f"expected the model.safetensors of a run with arch={self.config.arch}, "
                f"stem={self.config.stem} and {len(self.pictures.classes)} classes at "
                f"start={start}, found another {sorted(wrong)[0].removeprefix('trunk.')}"
            )
        self.model.load_state_dict(named)

    def _fit_all(self, callbacks: Sequence[Callback]) -> dict[str, float]:
        return fit(self.model, self.pictures, _NAME, self.folder, callbacks)

    def _fit_head(self) -> dict[str, float]:
        cache = self.folder / FEATURES
        seed = seed_of(self.config.seed)
        found = features(self.config, self.model.trunk, self.pictures, seed, cache)
        self.model.trunk.load_state_dict(found.trunk)
        probe = Probe(self.config, len(self.pictures.classes), self.folder / LINES)
        metrics = fit(probe, found.pictures, _NAME, self.folder)
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
            "sparsity": self.ticket.sparsity,
            "ticket": self.ticket.digest,
            "config": digest(self.recipe),
        }
        # The same run on the same machine gives the same digest; how long it took is not in it.
        return {**result, "digest": digest(result), "seconds": metrics["seconds"]}

    @rank_zero_only
    def _store(self, result: Mapping[str, Any]) -> None:
        """Write what a finished run leaves; ``result.json``, which says that it is, at last."""
        state = {n.removeprefix("trunk."): v for n, v in self.model.state_dict().items()}
        stock = {name: value.detach().cpu().contiguous() for name, value in state.items()}
        write_atomically(self.folder / MODEL, to_safetensors(stock))
        # Small-stem trunks are no standard trunks, which is what a ticket holds.
        if not self.linear and self.config.stem == "standard":
            changes = {"transfer": self.recipe, "found_in": self.ticket.meta.source}
            final = self.handle.ticket(
                source=self.config.data.name, recipe=changes, parent=self.ticket.digest
            )
            final.save(self.folder / TICKET)
        text = json.dumps(result, indent=2) + "\n"
        write_atomically(self.folder / RESULT, text.encode())
        self._forget()

    @rank_zero_only
    def _forget(self) -> None:
        """Remove what only an unfinished run needs."""
        forget(_NAME, self.folder)
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
        raise TicketError(
            f"{path.parent} is not a folder of this kind of run ({error}): give another "
            "output folder; nothing was changed"
        ) from None


def _read_model(path: Path) -> dict[str, Tensor]:
    """A whole model by torchvision's names, from ``model.safetensors`` or ``early.safetensors``."""
    return {n.removeprefix("trunk."): value for n, value in read_checkpoint(path).items()}
