"""What every training with Lightning is configured by: data, optimizer, phases, devices.

Pre-training and transfer add their own settings. Importing this imports neither Lightning nor
torchvision.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lth_plugins.errors import ConfigError
from lth_plugins.pruning.methods import METHODS, Method, make_method
from lth_plugins.settings import REQUIRED, setting
from lth_plugins.ticket.arch import ARCHITECTURES

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("constant", "cosine")
TRAINED = tuple(arch.name for arch in ARCHITECTURES.values() if not arch.deep_stem)
"""The architectures that are trained here: torchvision's ResNets."""

AUTO = "auto"
"""The precision that suits the device. A run keeps the one it was started with."""


@dataclass
class Data:
    """What is trained on."""

    name: str = REQUIRED  # a name in the SOURCES of pretrain/data.py or transfer/data.py
    root: str | None = setting(None, recipe=False)  # imagefolder: has train/CLASS/* and val/CLASS/*
    size: int = setting(224, least=8)  # side of an image, pixels
    # Train and validate on this many images only, to try something quickly.
    subset: int | None = setting(None, least=2)
    # Train on this many images of each class, the same in every run: few-shot learning.
    per_class: int | None = setting(None, least=1)
    # Which images per_class draws.
    choice: int = setting(0, least=0, recipe=lambda data: data.per_class is not None)
    skip_broken: bool = False  # leave out images that cannot be read; by default they are refused
    workers: int = setting(0, least=0, recipe=False)  # processes that load images


@dataclass
class Phase:
    """One training: of the dense network, or of the sub-network of each round."""

    epochs: int = setting(least=1)
    lr: float = setting(least=0)  # the highest, after the warm-up
    schedule: str = setting("constant", choices=SCHEDULES)
    warmup_epochs: float = setting(0.0, least=0)  # lr rises linearly from 0


@dataclass
class Optimizer:
    """The optimizer of all trainings."""

    name: str = setting("sgd", choices=OPTIMIZERS)
    momentum: float = setting(0.9, least=0)  # of sgd
    weight_decay: float = setting(1e-4, least=0)


@dataclass
class Distill:
    """How to learn from a teacher (`lth_plugins.training.distillation`)."""

    weight: float = setting(1.0, above=0)  # of its loss, beside the task's own
    temperature: float | None = setting(None, above=0)  # of logits; 4 where there is none


@dataclass
class Trainer:
    """Lightning's own arguments. All devices share one global batch."""

    accelerator: str = setting("auto", recipe=False)
    devices: Any = setting("auto", recipe=False)
    num_nodes: int = setting(1, least=1, recipe=False)
    precision: str = "32-true"  # Lightning's, or auto: 16-mixed on a GPU, 32-true on a CPU
    accumulate_grad_batches: int = setting(1, least=1)
    sync_batchnorm: bool = False  # BatchNorm over the global batch; on several GPUs only


@dataclass
class TrainingConfig:
    """What the configurations of pre-training and transfer share."""

    arch: str = setting(choices=TRAINED)  # a torchvision ResNet
    out: str = setting(recipe=False)  # folder for all results
    seed: int = setting(0, least=0)
    batch_size: int = setting(128, least=2)  # over all devices; BatchNorm needs a variance
    # Steps between checkpoints inside an epoch; there is also one after each epoch.
    checkpoint_steps: int = setting(1000, least=1, recipe=False)
    wandb: str | None = setting(None, recipe=False)  # also log to this project of Weights & Biases
    data: Data = setting(factory=Data)
    optimizer: Optimizer = setting(factory=Optimizer)
    # What to learn from besides the task; the subclasses say what it may name.
    teacher: str | None = setting(None, recipe=False)
    distill: Distill = setting(factory=Distill)
    trainer: Trainer = setting(factory=Trainer)
    # Sparse training: what moves the masks inside the training, such as rigl, and its options.
    method: str | None = setting(None, choices=METHODS)
    method_options: dict[str, Any] = setting(factory=dict)

    def check_teacher(self) -> None:
        """Raise ``ConfigError`` where settings of distillation have no teacher."""
        if self.teacher is None and self.distill != Distill():
            raise ConfigError(
                "expected a teacher with distill.weight or distill.temperature, found none: give "
                "teacher=…, or leave them out"
            )


def method_of(config: TrainingConfig, others: Mapping[str, bool]) -> Method | None:
    """The method of sparse training that a configuration names, if any.

    Args:
        config: the configuration.
        others: settings that no method goes with, as one writes them, and whether they are chosen.

    Raises:
        ConfigError: if there is no such method, its options are invalid, or one of those is chosen.
    """
    if config.method is None:
        if config.method_options:
            raise ConfigError(
                f"method_options={config.method_options} are of a method, and none is given: "
                f"give method={' or '.join(METHODS)}"
            )
        return None
    chosen = next((name for name, is_chosen in others.items() if is_chosen), None)
    if chosen is not None:
        raise ConfigError(
            f"method={config.method} trains one sparse network, from the first step to the last, "
            f"and {chosen} is something else: leave out one of the two"
        )
    return make_method(config.method, **config.method_options)
