"""What a transfer is configured by: YAML files, and ``key=value`` on the command line.

What changes the result is the *recipe*; a folder is only ever continued with the recipe it was
started with.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import Any

from omegaconf import MISSING

from lth_plugins.config import read_config
from lth_plugins.errors import TicketError, unknown
from lth_plugins.pretrain.config import (
    OPTIMIZERS,
    SCHEDULES,
    Optimizer,
    Phase,
    Trainer,
    file_digest,
)
from lth_plugins.pretrain.config import Data as PretrainData
from lth_plugins.pruning.search.imp import check_options
from lth_plugins.pruning.structure import Refill
from lth_plugins.ticket.arch import ARCHITECTURES

MODES = ("finetune", "linear")
STEMS = ("standard", "small")


@dataclass
class Data(PretrainData):
    """What is trained on. ``name`` is a row of `data.SOURCES`."""

    download: bool = False  # let torchvision fetch what is not in root


@dataclass
class Training(Phase):
    """How long and how fast to train."""

    milestones: list[int] = field(default_factory=list)  # epochs after which lr is divided by 10


@dataclass
class TransferConfig:
    """Everything that `run.classify` needs."""

    ticket: str = MISSING  # a path, a catalog name or hf://owner/repo[/file][@sha256:…]
    arch: str = MISSING  # a torchvision ResNet; the ticket's
    out: str = MISSING  # folder for all results
    seed: int = 0  # of the training, and of the mask with random=true
    weights: str | None = None  # another ticket, whose θ to train under this one's masks
    load_weights: bool = True  # False: the masks over a random initialisation
    reverse: bool = False  # what the ticket left out
    random: bool = False  # a random mask of the ticket's layer-wise densities
    ticket_digest: str | None = None  # if given, the ticket's digest has to be this
    start: str | None = None  # a run's model.safetensors: start from its weights, head and stem too
    mode: str = "finetune"  # one of MODES
    stem: str = "standard"  # one of STEMS; small is 3x3, stride 1, no pooling, not the ticket's
    precise_bn: int = 200  # linear: batches that BN statistics are re-estimated on; 0 keeps them
    rounds: int = 0  # more: find task-specific tickets by IMP, that many rounds
    fraction: float = 0.2  # this and what follows are of rounds, as in FindConfig
    criterion: str = "magnitude"
    scope: str = "global"
    rewind: str = "pretrained"
    rewind_at: float = 0.05  # of rewind=early: after this fraction of the first training
    structure: Refill = field(default_factory=Refill)  # of each round's masks
    batch_size: int = 128  # over all devices, before accumulation
    checkpoint_steps: int = 1000  # inside an epoch; there is also one after each epoch
    wandb: str | None = None  # also log to this project of Weights & Biases
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    training: Training = field(default_factory=Training)
    trainer: Trainer = field(default_factory=Trainer)


def load_config(path: str | PathLike[str], overrides: Sequence[str] = ()) -> TransferConfig:
    """`read_config` of a transfer, its values checked."""
    config = read_config(TransferConfig, path, overrides)
    _check_values(config)
    return config


def recipe(config: TransferConfig) -> dict[str, Any]:
    """What the result depends on: no paths, no machine. The ticket is there by its digest."""
    linear, early = config.mode == "linear", config.rewind == "early"
    pruning = [*("fraction", "criterion", "scope", "rewind"), *(["rewind_at"] if early else [])]
    return {
        **{key: getattr(config, key) for key in ("ticket_digest", "arch", "seed", "mode", "stem")},
        **{key: getattr(config, key) for key in ("load_weights", "reverse", "random")},
        **({"precise_bn": config.precise_bn} if linear else {}),
        **({"start": file_digest(config.start, "start")} if config.start else {}),
        **({key: getattr(config, key) for key in pruning} if config.rounds > 0 else {}),
        **(config.structure.recipe() if config.rounds > 0 else {}),
        "batch_size": config.batch_size,
        "data": {key: getattr(config.data, key) for key in ("name", "size", "subset")},
        "optimizer": asdict(config.optimizer),
        "training": asdict(config.training),
        "precision": config.trainer.precision,
        "accumulate_grad_batches": config.trainer.accumulate_grad_batches,
        "sync_batchnorm": config.trainer.sync_batchnorm,
    }


def _check_values(config: TransferConfig) -> None:
    training = config.training
    config.structure.make()
    check_options(config.fraction, config.criterion, config.scope, config.rewind)

    choices: Mapping[str, tuple[str, Sequence[str]]] = {
        "arch": (config.arch, [a.name for a in ARCHITECTURES.values() if not a.deep_stem]),
        "mode": (config.mode, MODES),
        "stem": (config.stem, STEMS),
        "optimizer.name": (config.optimizer.name, OPTIMIZERS),
        "training.schedule": (training.schedule, SCHEDULES),
    }
    for key, (value, known) in choices.items():
        if value not in known:
            raise unknown(key, value, known)

    least: Mapping[str, tuple[float | None, float]] = {
        "seed": (config.seed, 0),
        "precise_bn": (config.precise_bn, 0),
        "rounds": (config.rounds, 0),
        "batch_size": (config.batch_size, 2),  # BatchNorm takes a variance
        "checkpoint_steps": (config.checkpoint_steps, 1),
        "data.size": (config.data.size, 8),
        "data.subset": (config.data.subset, 2),
        "data.workers": (config.data.workers, 0),
        "optimizer.momentum": (config.optimizer.momentum, 0),
        "optimizer.weight_decay": (config.optimizer.weight_decay, 0),
        "training.epochs": (training.epochs, 1),
        "training.lr": (training.lr, 0),
        "training.warmup_epochs": (training.warmup_epochs, 0),
        "trainer.num_nodes": (config.trainer.num_nodes, 1),
        "trainer.accumulate_grad_batches": (config.trainer.accumulate_grad_batches, 1),
    }
    for key, (number, limit) in least.items():
        if number is not None and number < limit:
            raise TicketError(f"expected {key} to be {limit} or more, found {number}")

    if not 0 < config.rewind_at < 1:
        raise TicketError(f"expected rewind_at to be between 0 and 1, found {config.rewind_at}")
    if config.rewind == "none" and training.schedule != "constant":
        raise TicketError(
            "rewind=none goes on at the last learning rate, and that of training.schedule="
            f"{training.schedule} is 0: give training.schedule=constant"
        )
    drops = training.milestones
    if sorted(set(drops)) != drops or (drops and not 0 < drops[0] <= drops[-1] < training.epochs):
        raise TicketError(
            f"expected training.milestones to rise and lie between 0 and training.epochs="
            f"{training.epochs}, found {drops}: give others, or none (training.milestones=[])"
        )
    if drops and training.schedule != "constant":
        raise TicketError(
            f"training.milestones={drops} and training.schedule={training.schedule} contradict: "
            "give schedule=constant to divide lr at milestones, or milestones=[]"
        )
    if config.mode == "linear" and config.stem == "small":
        raise TicketError(
            "mode=linear with stem=small would freeze a stem that is not the ticket's but random: "
            "give stem=standard, and data.size=224 for small pictures"
        )
    if config.rounds > 0 and (config.reverse or config.random or not config.load_weights):
        raise TicketError(
            "rounds finds tickets from a dense ticket's weights, and reverse, random or "
            "load_weights=false is something else: give one of the two"
        )
    if config.rounds > 0 and config.start is not None:
        raise TicketError(
            "rounds finds tickets from a dense ticket's weights, and start gives others: "
            "give one of the two"
        )
    if config.mode == "linear" and config.rounds > 0:
        raise TicketError(
            "rounds finds tickets by the weights that training changes, and mode=linear changes "
            "none of them: give mode=finetune"
        )
