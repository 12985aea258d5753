"""`Task`: what is trained is a ResNet trunk, a head beside it, an optimizer and metrics.

Pre-trainings and classifiers subclass it. The loop around it is Lightning's (`fit`).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
import torchvision
from torch import Tensor, nn

from lth_plugins.errors import ConfigError
from lth_plugins.masking.attachment import Attachment, attach, attached
from lth_plugins.resilience.seeds import seed_of, seeded
from lth_plugins.ticket import InputSpec, Ticket, TicketError, to_torchvision
from lth_plugins.ticket.keys import State
from lth_plugins.training.distillation import alike, soft_labels
from lth_plugins.training.loader import Transform
from lth_plugins.training.settings import Phase, TrainingConfig

LOGITS, FEATURES = "logits", "features"
"""What a training may learn from a teacher."""

TEMPERATURE = 4.0
"""Of logits, unless ``distill.temperature`` says otherwise."""


class Task(pl.LightningModule):
    """A training of ``trunk``. A round rewinds its whole state dict.

    A subclass adds its head, ``training_step`` and ``validation_step`` (which `tally` their
    metrics), and may override what follows `rewind`.

    Args:
        config: the configuration; ``seed`` fixes the random initialisation.
        phase: how long and how fast to train.
        classes: how many the data has.
        stream: number of this training within the run; its random numbers depend on it.

    Attributes:
        metrics: means over the last finished epoch, by name ("train_loss", "val_top1", …).
        batches: in an epoch; `fit` sets it.
    """

    batches: int

    def __init__(self, config: TrainingConfig, phase: Phase, classes: int, stream: int) -> None:
        super().__init__()
        self.config, self.phase = config, phase
        self.stream = seed_of(config.seed, stream)
        self.metrics: dict[str, float] = {}
        self._sums: dict[str, list[float | Tensor]] = {}
        self._position: dict[str, int] | None = None
        with seeded(seed_of(config.seed)):
            self.trunk = torchvision.models.get_model(config.arch, weights=None)
            self.features = self.trunk.fc.in_features
            self.trunk.fc = nn.Identity()
            # A fifth faster on a CPU, and the layout that tensor cores need.
            self.trunk.to(memory_format=torch.channels_last)
            self.build_head(classes)

    uses_bank: ClassVar[bool] = False
    """Whether validation looks at ``Splits.bank`` first, as the first of two loaders."""

    trunks: ClassVar[Sequence[str]] = ("trunk.",)
    """What the names of the trunk's entries in the state begin with, and those of its copies'."""

    @classmethod
    def views(cls, config: Any, spec: InputSpec) -> Sequence[Transform] | None:
        """What makes the views it trains on; None for the dataset's own augmentation."""
        return None

    def build_head(self, classes: int) -> None:
        """Add the modules that are trained beside the trunk."""
        raise NotImplementedError

    def take_head(self, state: State) -> bool:
        """Load the head's weights from a checkpoint, if it has them.

        Raises:
            TicketError: if it has another head.
        """
        raise NotImplementedError

    distils: ClassVar[str] = ""
    """What it learns of a teacher, as `outputs` and `training_step` have it: `LOGITS`, `FEATURES`,
    or "" where it cannot."""

    @classmethod
    def check_teacher(cls, config: TrainingConfig) -> None:
        """Check that it can learn from a teacher, if the configuration names one.

        Raises:
            ConfigError: if it cannot, or not with such settings.
        """
        if config.teacher is None:
            return
        if not cls.distils:
            raise ConfigError(
                f"expected a training that learns from a teacher, found {cls.__name__}, which does "
                "not: leave out teacher, or have it set distils, outputs and add self.taught(…) "
                "to its loss"
            )
        if cls.distils != LOGITS and config.distill.temperature is not None:
            raise ConfigError(
                f"distill.temperature is for logits, and {cls.__name__} learns features: leave it "
                "out"
            )

    def outputs(self, images: Tensor) -> Tensor:
        """What a teacher teaches about images, [N, …]."""
        raise NotImplementedError

    teacher: "Task | None" = None

    def learn_from(self, teacher: "Task") -> None:
        """Add what a trained model teaches to the loss of the training.

        Args:
            teacher: the same class of task. It is no submodule: no optimizer, state dict, precision
                or DistributedDataParallel sees it.
        """
        self.__dict__["teacher"] = teacher.eval().requires_grad_(False)

    def taught(self, images: Tensor, ours: Tensor) -> Tensor | float:
        """The loss of learning from the teacher, weighted; 0 where there is none.

        Args:
            images: a batch.
            ours: the `outputs` of it, in training.
        """
        if self.teacher is None:
            return 0.0
        with torch.no_grad():
            theirs = self.teacher.outputs(images)
        settings = self.config.distill
        if self.distils == LOGITS:
            loss = soft_labels(ours, theirs, settings.temperature or TEMPERATURE)
        else:
            loss = alike(ours, theirs)
        self.tally(len(images), train_distill=loss)
        return settings.weight * loss

    def rewind(self, pretrained: State, ticket: Ticket) -> Attachment:
        """Go back to (m, θ): the whole state, statistics and head too, under the mask."""
        self.load_state_dict(pretrained)
        return attach(self.trunk, ticket)

    @classmethod
    def head_of(cls, state: State) -> dict[str, Tensor]:
        """Of the whole state, what is trained beside the trunk."""
        return {n: value for n, value in state.items() if not n.startswith(tuple(cls.trunks))}

    def take(self, state: State | Ticket) -> bool:
        """Start from the pre-trained weights of a checkpoint or a ticket.

        Returns:
            Whether they had a head for this task; otherwise it stays as initialised.

        Raises:
            TicketError: if the trunk is another, or has the wrong head.
        """
        weights = state.weights if isinstance(state, Ticket) else state
        arch, trunk = to_torchvision(weights)
        if arch.name != self.config.arch:
            raise TicketError(
                f"expected {self.config.arch} weights in init, found {arch.name}: "
                f"set arch={arch.name}, or give other weights"
            )
        had_head = self.take_head(weights)
        self.trunk.load_state_dict(trunk, strict=False)  # counters may be missing
        return had_head

    def tally(self, count: int, **values: Tensor) -> None:
        """Add a batch's means to those of the epoch.

        Args:
            count: images in the batch.
            values: scalars, by the metric's name.
        """
        for name, value in values.items():
            sums = self._sums.setdefault(name, [0.0, 0.0])
            sums[0] = sums[0] + value.detach() * count
            sums[1] = sums[1] + count

    def _finish(self, prefix: str) -> None:
        """Turn the sums of the epoch, over all processes, into metrics."""
        for name in [name for name in self._sums if name.startswith(prefix)]:
            total, count = self._over_processes(self._sums.pop(name))
            self.metrics[name] = total / count
        shown = {name: v for name, v in self.metrics.items() if name.startswith(prefix)}
        # They are the same everywhere already; sync_dist keeps Lightning from warning.
        self.log_dict(shown, prog_bar=True, sync_dist=True)

    def _over_processes(self, sums: Sequence[Tensor | float]) -> list[float]:
        values = torch.stack([torch.as_tensor(value, device=self.device) for value in sums])
        return self.trainer.strategy.reduce(values, reduce_op="sum").tolist()

    def on_train_start(self) -> None:
        if self.teacher is not None:
            self.teacher.to(self.device, self.dtype)
        # Lightning restores the loader only if the checkpoint was made inside an epoch; resumed
        # from one made at its end, the next epoch would repeat the first one's images.
        loader = self.trainer.train_dataloader
        if self._position is not None and loader is not None:
            loader.load_state_dict(self._position)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Nothing in a step may depend on how many random numbers were drawn before it.
        torch.manual_seed(seed_of(self.stream, self.global_step, batch_idx, self.global_rank))

    def on_train_epoch_end(self) -> None:
        self._finish("train_")

    def on_validation_epoch_end(self) -> None:
        self._finish("val_")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Lightning asks before it opens the file: a leak is never saved over a good checkpoint.
        handle = attached(self)
        if handle is not None:
            handle.verify()
        sums = {name: self._over_processes(sums) for name, sums in self._sums.items()}
        checkpoint["metrics"] = {"means": dict(self.metrics), "sums": sums}
        # A learning-rate finder saves the state that it restores later before there is a loader.
        loader = self.trainer.train_dataloader
        checkpoint["position"] = None if loader is None else loader.state_dict()

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        self.metrics = dict(checkpoint["metrics"]["means"])
        self._position = checkpoint["position"]
        # They are those of all processes: the first one resumes with them, the others with none.
        part = int(self.trainer.is_global_zero)
        sums = checkpoint["metrics"]["sums"]
        self._sums = {name: [part * value for value in values] for name, values in sums.items()}

    def configure_optimizers(self) -> Any:
        settings = self.config.optimizer
        options: dict[str, Any] = {"lr": self.phase.lr, "weight_decay": settings.weight_decay}
        options["fused"] = True  # one pass over the weights instead of several
        if settings.name == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(
                self.trained(), momentum=settings.momentum, **options
            )
        else:
            optimizer = torch.optim.AdamW(self.trained(), **options)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    @property
    def steps(self) -> int:
        """Optimizer steps in an epoch."""
        # Not trainer.estimated_stepping_batches: that makes Lightning set up the loader before it
        # has read a checkpoint, whose position in the epoch it then loses.
        return math.ceil(self.batches / self.trainer.accumulate_grad_batches)

    def lr_factor(self, step: int) -> float:
        """The learning rate at a step, as a fraction of the highest: a warm-up, then `decay`."""
        warmup = self.phase.warmup_epochs * self.steps
        return (step + 1) / (warmup + 1) if step < warmup else self.decay(step)

    def decay(self, step: int) -> float:
        """The learning rate after the warm-up, as a fraction of the highest."""
        if self.phase.schedule == "constant":
            return 1.0
        warmup, steps = self.phase.warmup_epochs * self.steps, self.phase.epochs * self.steps
        progress = (step - warmup) / max(steps - warmup, 1)
        return (1 + math.cos(math.pi * min(progress, 1.0))) / 2

    def trained(self) -> list[nn.Parameter]:
        """The parameters that the optimizer trains."""
        return [p for p in self.parameters() if p.requires_grad]


def misfit(head: State, found: State) -> tuple[str, str] | None:
    """The first entry of a head that a checkpoint's does not fit: its name, and what was found."""
    for name, value in head.items():
        shape = tuple(found[name].shape) if name in found else "nothing"
        if shape != tuple(value.shape):
            return name, f"of shape {tuple(value.shape)}, found {shape}"
    return None
