"""What a search for tickets is configured by: YAML files, and ``key=value`` on the command line.

What changes the tickets is the *recipe*; it goes into each ticket, and a folder is only ever
continued with the recipe it was started with.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from lth_plugins.config import read_config
from lth_plugins.errors import TicketError, unknown
from lth_plugins.pruning.search.imp import check_options
from lth_plugins.pruning.structure import Refill
from lth_plugins.ticket.arch import ARCHITECTURES

TASKS: Mapping[str, str] = {
    "supervised": "lth_plugins.training.supervised:Supervised",
    "simclr": "lth_plugins.pretrain.simclr:SimCLR",
    "moco": "lth_plugins.pretrain.moco:MoCo",
}
"""Pre-training by name: where its `task.Task` is. Another is a file and a row."""

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("constant", "cosine")

AUTO = "auto"
"""The precision that suits the device; a run settles on one, which its recipe then has."""

EARLY_BIRD_MEMORY = 5
"""Epochs whose masks ``early_bird`` compares with the present one."""


@dataclass
class Data:
    """What is trained on."""

    name: str = MISSING  # a row of `data.SOURCES`
    root: str | None = None  # of imagefolder: has train/CLASS/*.jpg and val/CLASS/*.jpg
    size: int = 224  # side of a picture, pixels
    subset: int | None = None  # train and validate on this many pictures only: a quick try
    workers: int = 0  # processes that load pictures


@dataclass
class Phase:
    """One training: of the dense network, or of the sub-network of each round."""

    epochs: int = MISSING
    lr: float = MISSING  # the highest, after the warm-up
    schedule: str = "constant"  # one of SCHEDULES
    warmup_epochs: float = 0.0  # lr rises linearly from 0


@dataclass
class Optimizer:
    """The same for all trainings."""

    name: str = "sgd"  # one of OPTIMIZERS
    momentum: float = 0.9  # of sgd
    weight_decay: float = 1e-4


@dataclass
class Contrastive:
    """Of simclr and moco."""

    temperature: float = 0.2
    projection: int = 128  # dimensions of the projection head's output
    queue: int = 65536  # of moco: keys to contrast with
    momentum: float = 0.999  # of moco's key encoder
    min_scale: float = 0.2  # smallest part of the picture that a view is cropped to
    jitter: float = 1.0  # strength of the colour jitter
    flip: float = 0.5  # probability of a horizontal flip
    blur: float = 0.5  # probability of a Gaussian blur


@dataclass
class Trainer:
    """Lightning's own arguments. ``devices`` and what follows share one global batch."""

    accelerator: str = "auto"
    devices: Any = "auto"
    num_nodes: int = 1
    precision: str = "32-true"  # Lightning's, or auto: 16-mixed on a GPU, 32-true on a CPU
    accumulate_grad_batches: int = 1
    sync_batchnorm: bool = False  # BatchNorm over the global batch; on several GPUs only


@dataclass
class FindConfig:
    """Everything that `find.find` needs."""

    task: str = MISSING  # a row of TASKS
    source: str = MISSING  # what the tickets say they were found in
    arch: str = MISSING  # a torchvision ResNet
    out: str = MISSING  # folder for all results
    seed: int = 0
    init: str | None = None  # θ_p: a checkpoint or a dense ticket, instead of pre-training
    rounds: int = 18
    fraction: float = 0.2
    criterion: str = "magnitude"  # a name in CRITERIA that needs no data
    scope: str = "global"  # one of SCOPES: rank all weights together, or share out by layer
    rewind: str = "pretrained"  # one of REWINDS: what a round goes back to
    rewind_at: float = 0.05  # of rewind=early: after this fraction of the pre-training
    structure: Refill = field(default_factory=Refill)  # of each round's masks
    early_bird: bool = False  # end a round's training once the mask it is pruned to stays
    evaluate_last: bool = True  # also train the last ticket, for its line in metrics.jsonl
    batch_size: int = 256  # over all devices, before accumulation
    checkpoint_steps: int = 1000  # inside an epoch; there is also one after each epoch
    wandb: str | None = None  # also log to this project of Weights & Biases
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    pretrain: Phase = field(default_factory=Phase)  # makes θ_p
    training: Phase = field(default_factory=Phase)  # of (m, θ_p), in each round
    contrastive: Contrastive = field(default_factory=Contrastive)
    trainer: Trainer = field(default_factory=Trainer)


def load_config(path: str | PathLike[str], overrides: Sequence[str] = ()) -> FindConfig:
    """`read_config` of a search for tickets, its values checked."""
    config = read_config(FindConfig, path, overrides)
    _check_values(config)
    return config


def recipe(config: FindConfig) -> dict[str, Any]:
    """What the tickets depend on: no paths, no machine, not how many rounds."""
    trainer = config.trainer
    # Absent where it is not asked for: folders from before there was any go on.
    asked = {"early_bird": True} if config.early_bird else {}
    return asked | {
        "task": config.task,
        "source": config.source,
        "arch": config.arch,
        "fraction": config.fraction,
        "criterion": config.criterion,
        "scope": config.scope,
        "rewind": config.rewind,
        "rewind_at": config.rewind_at if config.rewind == "early" else None,
        **config.structure.recipe(),
        "seed": config.seed,
        "init": file_digest(config.init, "init") if config.init else None,
        "batch_size": config.batch_size,
        "data": {k: getattr(config.data, k) for k in ("name", "size", "subset")},
        "optimizer": dict(vars(config.optimizer)),
        "contrastive": None if config.task == "supervised" else dict(vars(config.contrastive)),
        "pretrain": None if config.init else dict(vars(config.pretrain)),
        "training": dict(vars(config.training)),
        "precision": trainer.precision,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "sync_batchnorm": trainer.sync_batchnorm,
    }


def file_digest(path: str, key: str) -> str:
    """SHA-256 of the file that a key of a configuration names.

    Raises:
        TicketError: if there is none.
    """
    if not Path(path).is_file():
        raise TicketError(f"expected a file of weights at {key}={path}, found no such file")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _check_values(config: FindConfig) -> None:
    def choice(key: str, value: str, known: Sequence[str]) -> None:
        if value not in known:
            raise unknown(key, value, known)

    def at_least(least: float, **values: float | None) -> None:
        for key, value in values.items():
            if value is not None and value < least:
                key = key.replace("__", ".")
                raise TicketError(f"expected {key} to be {least} or more, found {value}")

    choice("task", config.task, list(TASKS))
    trained = [arch.name for arch in ARCHITECTURES.values() if not arch.deep_stem]
    choice("arch", config.arch, trained)
    check_options(config.fraction, config.criterion, config.scope, config.rewind)
    config.structure.make()
    choice("optimizer.name", config.optimizer.name, OPTIMIZERS)
    choice("pretrain.schedule", config.pretrain.schedule, SCHEDULES)
    choice("training.schedule", config.training.schedule, SCHEDULES)
    if not 0 < config.rewind_at < 1:
        raise TicketError(f"expected rewind_at to be between 0 and 1, found {config.rewind_at}")
    if config.rewind in ("init", "early") and config.init is not None:
        raise TicketError(
            f"rewind={config.rewind} goes back to what θ_p was before, and init={config.init} is "
            "θ_p alone: leave out init, which pre-trains here, or give another rewind"
        )
    if config.rewind == "none" and config.training.schedule != "constant":
        raise TicketError(
            "rewind=none goes on at the last learning rate, and that of training.schedule="
            f"{config.training.schedule} is 0: give training.schedule=constant and training.lr"
        )
    if config.early_bird and config.training.epochs <= EARLY_BIRD_MEMORY:
        raise TicketError(
            f"early_bird compares the mask with those of {EARLY_BIRD_MEMORY} epochs before, found "
            f"training.epochs={config.training.epochs}: it would never stop; leave it out"
        )
    at_least(
        0,
        rounds=config.rounds,
        seed=config.seed,
        data__workers=config.data.workers,
        optimizer__momentum=config.optimizer.momentum,
        optimizer__weight_decay=config.optimizer.weight_decay,
        pretrain__lr=config.pretrain.lr,
        pretrain__warmup_epochs=config.pretrain.warmup_epochs,
        training__lr=config.training.lr,
        training__warmup_epochs=config.training.warmup_epochs,
        contrastive__momentum=config.contrastive.momentum,
        contrastive__jitter=config.contrastive.jitter,
        contrastive__flip=config.contrastive.flip,
        contrastive__blur=config.contrastive.blur,
    )
    at_least(
        1,
        checkpoint_steps=config.checkpoint_steps,
        pretrain__epochs=config.pretrain.epochs,
        training__epochs=config.training.epochs,
        contrastive__projection=config.contrastive.projection,
        contrastive__queue=config.contrastive.queue,
        trainer__num_nodes=config.trainer.num_nodes,
        trainer__accumulate_grad_batches=config.trainer.accumulate_grad_batches,
    )
    # BatchNorm needs two values to take a variance of.
    at_least(2, batch_size=config.batch_size, data__subset=config.data.subset)
    at_least(8, data__size=config.data.size)
    if config.contrastive.temperature <= 0:
        raise TicketError(
            "expected contrastive.temperature to be more than 0, "
            f"found {config.contrastive.temperature}"
        )
    if not 0 < config.contrastive.min_scale <= 1:
        raise TicketError(
            "expected contrastive.min_scale to be a part of the picture, more than 0 and at most "
            f"1, found {config.contrastive.min_scale}"
        )
