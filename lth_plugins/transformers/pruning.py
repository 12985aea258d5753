"""Sparse training and slimming in transformers' Trainer."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from lth_plugins.errors import ConfigError, TicketError
from lth_plugins.masking.loading import expect_moved_masks
from lth_plugins.pruning.methods import SparseTraining
from lth_plugins.pruning.methods.training import GradualOptions
from lth_plugins.resilience.as_text import from_text, to_text
from lth_plugins.slimming.gradual import SlimmingHook
from lth_plugins.slimming.options import check_alone
from lth_plugins.slimming.tracing import Forward
from lth_plugins.transformers.callbacks import noted


class SparseTrainingCallback(TrainerCallback, ExportableState):
    """Move the masks of the ticket on a model while it trains, by a method such as RigL.

    ``trainer_state.json`` of each checkpoint holds the masks, and a resumed run restores them.
    `TicketCallback` writes the final ticket.

    Give it to the Trainer when that is made: it has to know of it before it loads a checkpoint. Its
    arguments are those of `lth_plugins.SparseTraining`.
    """

    _model: nn.Module | None = None

    def __init__(self, method: str, **options: Any) -> None:
        self.training = SparseTraining(method, **options)

    def state(self) -> dict[str, Any]:
        model = self._model
        pruned = None if model is None else to_text(self.training.state_dict(model))
        return {"args": self._args, "attributes": {"pruned": pruned}}

    @property
    def _args(self) -> dict[str, Any]:
        return {"method": self.training.method.name, **self.training.method.recipe}

    def on_init_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        expect_moved_masks(given["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._model = given["model"]
        if text := noted(state, self, "pruned"):
            self.training.load_state_dict(given["model"], from_text(text))
        elif state.global_step:
            raise TicketError(
                f"expected a checkpoint of a training with {type(self).__name__}, found one of "
                "another: resume it as it was started, or start anew"
            )
        self.training.start(given["model"], state.max_steps)
        state.stateful_callbacks[type(self).__name__] = {}  # it is filled when it is saved

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.training.after_step(given["model"], state.global_step)


class GradualPruningCallback(GradualOptions, SparseTrainingCallback):
    """Prune the ticket on a model while it trains, ever slower (Zhu & Gupta, arXiv 1710.01878).

    A `SparseTrainingCallback` of the method "gradual". It starts from a ticket of any density, such
    as a dense one.
    """

    @property
    def _args(self) -> dict[str, Any]:
        return self.training.method.recipe


class SlimmingCallback(SlimmingHook, TrainerCallback, ExportableState):
    """Remove channels of the whole model while it trains, until its budget is met.

    After training the narrower model's state dict is written to ``slim.pth`` in the output folder,
    and its ticket, in the widths of its trunk, to ``slim.ticket``. ``trainer_state.json`` of each
    checkpoint holds which channels are left, and a resumed run restores them.

    Args:
        forward: runs the model on an example on the model's device, such as
            ``lambda model: model(pixel_values=images.to(model.device))``; of the size that FLOPs
            and latency are for.
        settings: as `lth_plugins.slimming.gradual.SlimmingHook`'s, such as ``flops=0.5``.
    """

    def __init__(self, forward: Forward, **settings: Any) -> None:
        super().__init__(**settings)
        self._forward = forward

    def state(self) -> dict[str, Any]:
        started = self.slimming.network is not None
        slimmed = to_text(self.slimming.state_dict()) if started else None
        return {"args": {}, "attributes": {"slimmed": slimmed}}

    def on_init_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        reasons = {
            "load_best_model_at_end": "the best model may have channels that are removed now",
            "restore_callback_states_from_checkpoint": "no checkpoint holds its function, and it "
            "restores its state by itself",
        }
        for option, why in reasons.items():
            if getattr(args, option):
                raise ConfigError(
                    f"expected SlimmingCallback without {option}, found both: {why}. Leave out "
                    f"{option}"
                )

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.on_init_end(args, state, control)
        self.end_within(state.max_steps)
        if text := noted(state, self, "slimmed"):
            self.slimming.load_state_dict(from_text(text))
        moves = (one.__name__ for one in (SparseTrainingCallback, GradualPruningCallback))
        check_alone(next((name for name in moves if name in state.stateful_callbacks), None))
        optimizer = getattr(given["optimizer"], "optimizer", given["optimizer"])  # accelerate's
        steps = state.global_step, state.max_steps
        self.slimming.start(given["model"], optimizer, self._forward, *steps)
        state.stateful_callbacks[type(self).__name__] = {}  # it is filled when it is saved

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.slimming.after_step(given["model"], state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.is_world_process_zero:
            self.slimming.write(given["model"], Path(args.output_dir))
