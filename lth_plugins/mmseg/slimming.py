"""Slimming of a whole segmentor by mmengine's Runner: `SlimHook`."""

from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import HOOKS, RUNNERS
from mmengine.runner import Runner
from torch import nn

from lth_plugins.errors import ConfigError
from lth_plugins.mmseg.checkpoint import first_checkpoint, read_state
from lth_plugins.mmseg.config import backbone_of, drop_ticket
from lth_plugins.mmseg.hooks import SparseTrainingHook, holder, model_of
from lth_plugins.mmseg.init import WORDING, choice_of, ticket_options
from lth_plugins.mmseg.input import input_of
from lth_plugins.slimming.gradual import SlimmingHook
from lth_plugins.slimming.options import check_alone
from lth_plugins.slimming.tickets import fits
from lth_plugins.slimming.tracing import Forward
from lth_plugins.slimming.widths import adopt_widths
from lth_plugins.ticket.keys import is_slimmed


@HOOKS.register_module()
class SlimHook(SlimmingHook, Hook):
    """Remove channels of the whole segmentor while it trains, until its budget is met.

    After training the narrower segmentor is written to ``slim.pth`` in the work dir: an ordinary
    checkpoint, whose shapes are its widths; and its ticket, in the widths of its trunk, to
    ``slim.ticket``. Auxiliary heads are not counted.

    Priority: "LOW", before ``CheckpointHook`` ("VERY_LOW"): what is saved is slimmed. Not together
    with ``EMAHook``, whose averages remember what was removed.

    Args:
        size: height and width of the image that FLOPs and latency are for; None for the size of
            the data preprocessor or, where it has none, of the first crop.
        settings: as `lth_plugins.slimming.gradual.SlimmingHook`'s.
    """

    priority = "LOW"

    def __init__(self, size: tuple[int, int] | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self._size = size

    def before_run(self, runner: Runner) -> None:
        if runner._train_loop is None:
            return
        if any(isinstance(hook, EMAHook) for hook in runner.hooks):
            raise ConfigError(
                "expected SlimHook without EMAHook, found both: averages of the weights remember "
                "what was removed. Leave out EMAHook"
            )
        moves = (type(one).__name__ for one in runner.hooks if isinstance(one, SparseTrainingHook))
        check_alone(next(moves, None))
        self.end_within(runner.max_iters)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if self.slimming.network is None:
            self._start(runner, data_batch)

    def _start(self, runner: Runner, data_batch: Any) -> None:
        model = model_of(runner)
        size = self._size or model.data_preprocessor.size or data_batch["inputs"][0].shape[-2:]
        optimizer: Any = runner.optim_wrapper.optimizer
        forward, inference = examples_of(tuple(size))
        iterations = (runner.iter, runner.max_iters)
        self.slimming.start(model, optimizer, forward, *iterations, inference=inference)

    def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        self.slimming.after_step(model_of(runner), runner.iter + 1)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        checkpoint["slimming"] = self.slimming.state_dict()

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        if runner._resume and "slimming" in checkpoint:
            self.slimming.load_state_dict(checkpoint["slimming"])

    def after_train(self, runner: Runner) -> None:
        if self.slimming.network is None:  # resumed after the last iteration
            self._start(runner, next(iter(runner.train_dataloader)))
        if is_main_process():
            model = model_of(runner)
            meta = {"ticket_input": input_of(model.data_preprocessor).to_dict()}
            folder = Path(runner.work_dir)
            self.slimming.write(model, folder, lambda state: {"meta": meta, "state_dict": state})


def apply_slimmed(cfg: Config) -> None:
    """Make a training config begin with a slimmed checkpoint, in place, if it names one.

    ``slim_widths`` of the config then names it, for `build_runner`. The ticket stays if it is one
    of the slimmed trunk; a dense one of the full width goes.

    Args:
        cfg: what `apply_ticket` made of a training config.

    Raises:
        TicketError: if the checkpoint cannot be read, or the ticket is of another trunk.
    """
    path = first_checkpoint(cfg)
    state = read_state(path) if path is not None else {}
    if not is_slimmed(state):
        return
    cfg.slim_widths = path
    backbone, _ = backbone_of(cfg.model)
    ticket = choice_of(ticket_options(backbone.init_cfg)).load_ahead()
    if not fits(ticket, state, WORDING.path):
        drop_ticket(cfg)


def build_runner(cfg: Config) -> Runner:
    """mmengine's Runner of a config; its model has the widths of ``slim_widths``, if any."""
    runner = RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg)
    if cfg.get("slim_widths"):
        owner, name = holder(runner)
        model = getattr(owner, name)
        adopt_slimmed(model, cfg)
        if owner is not runner:  # the wrapper of several processes has the wide parameters
            runner.model = runner.wrap_model(cfg.get("model_wrapper_cfg"), model)
    return runner


def adopt_slimmed(model: nn.Module, cfg: Config) -> None:
    """Give a freshly built model the widths of ``slim_widths`` of its config, if that is set."""
    if cfg.get("slim_widths"):
        adopt_widths(model, read_state(cfg.slim_widths))


def examples_of(size: tuple[int, ...]) -> tuple[Forward, Forward]:
    """What runs a segmentor on an image of a size: all its heads, and those of inference."""
    image = torch.randn((1, 3, *size), generator=torch.Generator().manual_seed(0))

    def inference(model: Any) -> object:
        return model(image.to(next(model.parameters()).device), mode="tensor")

    def forward(model: Any) -> None:
        features = model.extract_feat(image.to(next(model.parameters()).device))
        heads = [model.decode_head]
        if model.with_auxiliary_head:
            auxiliary = model.auxiliary_head
            heads += auxiliary if isinstance(auxiliary, nn.ModuleList) else [auxiliary]
        for head in heads:
            head(features)

    return forward, inference
