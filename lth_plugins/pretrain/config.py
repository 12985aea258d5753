"""What a search for tickets is configured by: YAML files, and ``key=value`` on the command line.

What changes the tickets is the *recipe*; it goes into each ticket, and a folder is only resumed
with the recipe it was started with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, ClassVar

from lth_plugins.config import read_config
from lth_plugins.errors import ConfigError
from lth_plugins.pruning.criteria import needs_loss
from lth_plugins.pruning.search.settings import SearchSettings
from lth_plugins.registry import Registry
from lth_plugins.resilience.recipe import file_digest, recipe_of
from lth_plugins.settings import REQUIRED, setting
from lth_plugins.training.settings import Phase, TrainingConfig, method_of

TASKS: Registry[object] = Registry("task", "lth_plugins.pretrainings")
"""Pre-trainings by name: subclasses of `lth_plugins.training.module.Task`.

Another package adds one with ``@TASKS.register("mine")`` or an entry point. Ours are registered as
``"module:Class"``, so that their libraries are imported only where they are used.
"""

TASKS.register("supervised", "lth_plugins.training.supervised:Supervised")
TASKS.register("simclr", "lth_plugins.pretrain.simclr:SimCLR")
TASKS.register("moco", "lth_plugins.pretrain.moco:MoCo")

DENSE = "dense"
"""The teacher that is the dense pre-trained network."""

EARLY_BIRD_MEMORY = 5
"""Epochs whose masks ``early_bird`` compares with the present one."""


@dataclass
class Contrastive:
    """Of simclr and moco."""

    temperature: float = setting(0.2, above=0)
    projection: int = setting(128, least=1)  # dimensions of the projection head's output
    queue: int = setting(65536, least=1)  # of moco: keys to contrast with
    momentum: float = setting(0.999, least=0)  # of moco's key encoder
    min_scale: float = setting(0.2, above=0, most=1)  # smallest part of the image in a view's crop
    jitter: float = setting(1.0, least=0)  # strength of the colour jitter
    flip: float = setting(0.5, least=0)  # probability of a horizontal flip
    blur: float = setting(0.5, least=0)  # probability of a Gaussian blur


@dataclass
class FindConfig(SearchSettings, TrainingConfig):
    """Everything that `find.find` needs, besides the settings of all searches and trainings."""

    has_loss: ClassVar[bool] = True

    task: str = setting(choices=TASKS)  # the pre-training
    source: str = REQUIRED  # what the tickets say they were found in
    # θ_p: a checkpoint or a dense ticket, instead of pre-training. The recipe has its digest.
    init: str | None = setting(None, recipe=False)
    rounds: int = setting(18, least=0, recipe=False)
    # Of rewind=early: after this fraction of the pre-training.
    rewind_at: float = setting(0.05, above=0, below=1, recipe=lambda c: c.rewind == "early")
    # dense: each round's training also learns what θ_p computes, with its trained head.
    teacher: str | None = setting(None, choices=(DENSE,))
    early_bird: bool = False  # end a round's training once the mask it is pruned to stays
    # Also train the last ticket, for its line in metrics.jsonl.
    evaluate_last: bool = setting(True, recipe=False)
    batch_size: int = setting(256, least=2)  # over all devices, before accumulation
    # Makes θ_p; with a method it is the sparse training.
    pretrain: Phase = setting(factory=Phase, recipe=lambda c: c.init is None or c.method)
    training: Phase = setting(factory=Phase)  # of (m, θ_p), in each round
    contrastive: Contrastive = setting(factory=Contrastive)

    def check(self) -> None:
        super().check()
        self.check_teacher()
        others = {f"rounds={self.rounds}": self.rounds > 0, "early_bird=true": self.early_bird}
        others[f"teacher={self.teacher}"] = self.teacher is not None
        method_of(self, others)
        if self.rewind in ("init", "early") and self.init is not None:
            raise ConfigError(
                f"rewind={self.rewind} goes back to what θ_p was before, and init={self.init} is "
                "θ_p alone: leave out init, which pre-trains here, or give another rewind"
            )
        if self.rewind == "none" and self.training.schedule != "constant":
            raise ConfigError(
                "rewind=none trains on at the last learning rate, and that of training.schedule="
                f"{self.training.schedule} is 0: give training.schedule=constant and training.lr"
            )
        if self.early_bird and needs_loss(self.criterion):
            raise ConfigError(
                f"early_bird draws a mask after each epoch, and criterion={self.criterion} takes "
                "gradients for each: leave out one of the two"
            )
        if self.early_bird and self.training.epochs <= EARLY_BIRD_MEMORY:
            raise ConfigError(
                f"early_bird compares the mask with those of {EARLY_BIRD_MEMORY} epochs before, "
                f"found training.epochs={self.training.epochs}: it would never stop; leave it out"
            )


def load_config(path: str | PathLike[str], overrides: Sequence[str] = ()) -> FindConfig:
    """Read a search's configuration and check it, as `read_config` does."""
    return read_config(FindConfig, path, overrides)


def recipe(config: FindConfig) -> dict[str, Any]:
    """What the tickets depend on: no paths, no devices, not how many rounds."""
    started = {"init": file_digest(config.init, "init")} if config.init else {}
    return {**recipe_of(config), **started}
