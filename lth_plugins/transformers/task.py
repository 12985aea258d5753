"""Task-specific tickets in transformers: each round of IMP is a run of a Trainer."""

import copy
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed

from lth_plugins.errors import ConfigError
from lth_plugins.pruning.search.on_host import CheckpointHost, check_one_way
from lth_plugins.pruning.search.search import Run, Search
from lth_plugins.pruning.search.settings import TaskSettings, settings_from
from lth_plugins.ticket import Given, Ticket, load_given
from lth_plugins.transformers.attach import WORDING, attach_ticket
from lth_plugins.transformers.callbacks import TicketCallback, last_checkpoint
from lth_plugins.transformers.names import own_names
from lth_plugins.transformers.pruning import SparseTrainingCallback


def task_search(
    make_trainer: Callable[[PreTrainedModel, TrainingArguments], Trainer],
    model_init: Callable[[], PreTrainedModel],
    image_processor: Any,
    ticket: Given,
    args: TrainingArguments,
    **settings: Any,
) -> Search:
    """A search for task-specific tickets in a Trainer.

    Args:
        make_trainer: makes the Trainer of a model, with its data, for these arguments.
        model_init: builds the model, without a ticket.
        image_processor: as `attach_ticket`'s.
        ticket: the dense ticket to start from.
        args: of each run; ``max_steps`` says how long it is. ``output_dir`` gets
            ``round_00.ticket``, …, and the run of each in ``train_00``, ….
        settings: by the names of `lth_plugins.pruning.search.settings.TaskSettings`, such as
            ``rounds=8``.

    Returns:
        A search whose ``run()`` finds the tickets, or resumes.

    Raises:
        LthError: before anything is written, if the settings contradict each other or the ticket,
            or the folder was started with another recipe.
    """
    chosen = settings_from(TaskSettings, settings, "task_search")
    if args.max_steps < 1:
        raise ConfigError(
            f"expected max_steps of 1 or more in TrainingArguments, found {args.max_steps}: all "
            "rounds train equally long, by their number of steps"
        )
    dense, _ = load_given(ticket, WORDING, original=True)
    makers = (make_trainer, model_init, image_processor)
    return Search(_TrainerHost(*makers, args, dense, chosen), chosen)


class _TrainerHost(CheckpointHost):
    """transformers' Trainer as a host of searches; its checkpoints are folders."""

    state_key = "model"
    neck = "model.pixel_level_module.decoder."
    predictors = (
        *("*class_embed*", "*bbox_embed*", "*class_labels_classifier", "*class_predictor"),
        *("*bbox_predictor.layers.2", "*score_head", "*bbox_head.layers.2", "*.classifier"),
    )

    def __init__(
        self,
        make_trainer: Callable[[PreTrainedModel, TrainingArguments], Trainer],
        model_init: Callable[[], PreTrainedModel],
        processor: Any,
        args: TrainingArguments,
        dense: Ticket,
        settings: TaskSettings,
    ) -> None:
        self.make_trainer, self.model_init, self.processor = make_trainer, model_init, processor
        self.args = args
        folder = Path(str(args.output_dir))
        super().__init__(dense, settings, folder, "", args.max_steps, _recipe(args))
        self.meta = replace(self.meta, source=self._kind)  # known once a model is built

    def build(self, ticket: Ticket | None = None) -> nn.Module:
        set_seed(self.args.seed)
        model = self.model_init()
        attach_ticket(
            *(model, self.processor, ticket or self.dense),
            load_weights=self.settings.rewind != "init",
            allow_other_checkpoint=True,  # all rounds start from weights denser than their masks
        )
        self._names, self._kind = own_names(model), type(model).__name__
        return model

    def fit(self, folder: Path, weights: Path, run: Run, lr_scale: float | None) -> None:
        model: Any = self.build(run.ticket)
        model.load_state_dict(self.state(weights), strict=False)  # files leave out tied weights
        args = copy.deepcopy(self.args)
        args.output_dir = str(folder)
        if lr_scale is not None:
            args.learning_rate *= lr_scale
            args.lr_scheduler_type, args.warmup_steps = "constant", 0
        if run.keep_early:
            args.save_total_limit = None
        trainer = self.make_trainer(model, args)
        callbacks = trainer.callback_handler.callbacks
        moves = any(isinstance(callback, SparseTrainingCallback) for callback in callbacks)
        check_one_way("task_search", "SparseTrainingCallback", moves)
        if not any(isinstance(callback, TicketCallback) for callback in callbacks):
            trainer.add_callback(TicketCallback())
        trainer.add_callback(_SaveAt(self.settings.early_iter, args.max_steps))
        last = last_checkpoint(folder)
        trainer.train(resume_from_checkpoint=None if last is None else str(last))

    def result(self, index: int) -> Path:
        folder = self._run_folder(index)
        return last_checkpoint(folder) or folder

    def checkpoint(self, path: Path) -> dict[str, Any]:
        if not path.is_dir():
            return super().checkpoint(path)
        model = load_file(path / "model.safetensors")
        return {
            "model": {self._names.get(name, name): value for name, value in model.items()},
            "folder": path,
        }

    def param_groups(self, checkpoint: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        optimizer = torch.load(checkpoint["folder"] / "optimizer.pt", weights_only=True)
        groups: Sequence[Mapping[str, Any]] = optimizer["param_groups"]
        return groups

    @property
    def early(self) -> Path:
        return self._run_folder(0) / f"checkpoint-{self.settings.early_iter}"

    def place_early(self, folder: Path, run: Run) -> None:
        if last_checkpoint(folder) is None:
            shutil.copytree(self.early, folder / "early", dirs_exist_ok=True)
            os.replace(folder / "early", folder / self.early.name)


class _SaveAt(TrainerCallback):
    """Saves a checkpoint after these steps, too."""

    def __init__(self, *steps: int) -> None:
        self._steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in self._steps:
            control.should_save = True


_LEFT_OUT = (
    *("output_dir", "run_name", "project", "report_to", "push_", "hub_", "resume_from"),
    *("logging_", "log_", "save_", "eval_", "disable_tqdm", "dataloader_num", "dataloader_p"),
)
"""What names of arguments begin with that the trained weights do not depend on."""


def _recipe(args: TrainingArguments) -> dict[str, Any]:
    kept = {name: v for name, v in args.to_dict().items() if not name.startswith(_LEFT_OUT)}
    recipe: dict[str, Any] = json.loads(json.dumps(kept, default=str))
    return recipe
