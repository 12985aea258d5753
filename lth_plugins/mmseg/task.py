"""Task-specific tickets in mmsegmentation: each round of IMP is a run of mmengine's Runner."""

import copy
import itertools
import json
import logging
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.registry import HOOKS, MODELS, init_default_scope
from mmengine.runner import Runner, load_checkpoint, set_random_seed
from torch import Tensor, nn

from lth_plugins.errors import ConfigError
from lth_plugins.masking.attachment import attach_rest
from lth_plugins.mmseg.config import backbone_of, join_processes
from lth_plugins.mmseg.hooks import ProgressHook
from lth_plugins.mmseg.images import ImagesHook
from lth_plugins.mmseg.init import check_statistics, choice_of, ticket_options
from lth_plugins.mmseg.slimming import adopt_slimmed, build_runner
from lth_plugins.mmseg.teacher import DISTILL_HOOKS
from lth_plugins.pruning import Loss
from lth_plugins.pruning.search.on_host import (
    EARLY,
    CheckpointHost,
    check_one_way,
    sparse_as_a_round,
)
from lth_plugins.pruning.search.search import Run, Search
from lth_plugins.pruning.search.settings import TaskSettings, settings_from
from lth_plugins.resilience.recipe import file_digest
from lth_plugins.ticket import Ticket


def task_search(cfg: Config) -> Search:
    """The search for task-specific tickets that ``imp=dict(…)`` in a config describes.

    Its keys are the fields of `lth_plugins.pruning.search.settings.TaskSettings`; ``structure`` is
    a ``dict(kind=…)`` of those of `lth_plugins.pruning.structure.Refill`, where "" and 0 are None.

    Args:
        cfg: what `apply_ticket` made of a training config; its ticket is a dense one. The work dir
            gets ``round_00.ticket``, …, and the run of each in ``train_00``, ….

    Returns:
        A search whose ``run()`` finds the tickets, or resumes.

    Raises:
        LthError: before anything is written, if the config contradicts itself or its ticket, or the
            work dir was started with another recipe.
    """
    settings = settings_from(TaskSettings, cfg.imp, "imp=dict(…)")
    hooks = [hook["type"] for hook in cfg.custom_hooks]
    for hook in ("SparseTrainingHook", "GradualPruningHook", "SlimHook"):
        check_one_way("imp", hook, hook in hooks)
    if settings.rewind == "early" and "EMAHook" in hooks:
        raise ConfigError(
            "expected no EMAHook with rewind 'early', found one: its averages of the dense network "
            "would come back with the early checkpoint. Leave out EMAHook, or rewind elsewhere"
        )
    options = _options(cfg.model) or {}
    dense = choice_of(options).load_original()
    if "max_iters" not in cfg.train_cfg:
        raise ConfigError(
            "expected a training of so many iterations, found no train_cfg.max_iters: use "
            "train_cfg=dict(type='IterBasedTrainLoop', max_iters=…)"
        )
    join_processes(cfg)
    return Search(MmsegHost(cfg, settings, dense), settings)


class MmsegHost(CheckpointHost):
    """mmengine's Runner as a host of searches."""

    state_key = "state_dict"
    has_losses = True
    neck = "neck."
    predictors = ("*.conv_seg",)

    def __init__(self, cfg: Config, settings: TaskSettings, dense: Ticket) -> None:
        self.cfg = cfg
        source, iterations = Path(cfg.filename or cfg.model.type).stem, cfg.train_cfg.max_iters
        folder = Path(cfg.work_dir)
        super().__init__(dense, settings, folder, source, iterations, _recipe(cfg))

    def build(self) -> nn.Module:
        cfg = self._copy()
        _options(cfg.model)["load_weights"] = self.settings.rewind != "init"
        if cfg.get("randomness", {}).get("seed") is not None:
            set_random_seed(cfg.randomness.seed)
        init_default_scope(cfg.get("default_scope", "mmseg"))
        model = MODELS.build(cfg.model)
        adopt_slimmed(model, cfg)
        sparse = sparse_as_a_round(self.dense, self.settings)
        if not _options(cfg.model).get("keep_norm_eval"):
            for module in model.modules():
                if ticket_options(getattr(module, "init_cfg", None)) is not None:
                    check_statistics(module, sparse)
        with _quiet():  # mmengine prints a line for every parameter where there is no log file
            model.init_weights()
        attach_rest(model)
        if cfg.get("load_from"):
            load_checkpoint(model, cfg.load_from, map_location="cpu")
        return model

    def fit(self, folder: Path, weights: Path, run: Run, lr_scale: float | None) -> None:
        cfg = self._copy()
        cfg.work_dir = str(folder.absolute())
        cfg.experiment_name = f"{folder.name}_{uuid.uuid4().hex}"  # one for each Runner
        if cfg.get("visualizer"):
            cfg.visualizer.name = cfg.experiment_name  # or the first run's gets all runs' metrics
        cfg.resume = (folder / "last_checkpoint").exists()
        cfg.load_from = None if cfg.resume else str(weights)
        # All rounds start from weights that are denser than their masks.
        _options(cfg.model)["allow_other_checkpoint"] = True
        if (ticket := self.ticket_path(run)) is not None:
            _options(cfg.model).update(checkpoint=str(ticket), weights=None)
        if lr_scale is not None:
            cfg.param_scheduler = None
            cfg.optim_wrapper.optimizer.lr *= lr_scale
        if run.keep_early:
            keep = {"type": "KeepEarlyHook", "iteration": self.settings.early_iter}
            cfg.custom_hooks.append(keep)
        runner = build_runner(cfg)
        runner.register_hook(ImagesHook())
        runner.register_hook(ProgressHook())
        runner.train()
        _put_away(runner)

    def losses(self) -> list[Loss]:
        cfg = self._copy()
        seed = cfg.get("randomness", {}).get("seed")
        loader = Runner.build_dataloader(cfg.train_dataloader, seed=seed)
        count = self.batches_of(cfg.train_dataloader.batch_size)
        return [_loss_of(batch) for batch in itertools.islice(loader, count)]

    def param_groups(self, checkpoint: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        return checkpoint["optimizer"]["param_groups"]

    def _copy(self) -> Config:
        cfg = copy.deepcopy(self.cfg)
        cfg.pop("imp")
        return cfg


def _loss_of(batch: Any) -> Loss:
    def loss(model: Any) -> Tensor:
        data = model.data_preprocessor(copy.deepcopy(batch), training=True)
        total: Tensor = model.parse_losses(model(**data, mode="loss"))[0]
        return total

    return loss


def _put_away(runner: Runner) -> None:
    """Close the log of a run and drop its curves, which mmengine keeps for as long as we live."""
    for handler in list(runner.logger.handlers):
        if isinstance(handler, logging.FileHandler):
            handler.close()
            runner.logger.removeHandler(handler)  # mmengine writes to its stream by itself
    runner.message_hub.log_scalars.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel("WARNING")
    try:
        yield
    finally:
        logger.setLevel(level)


@HOOKS.register_module()
class KeepEarlyHook(Hook):
    """Keep the checkpoint of one iteration, which the rounds of a search are rewound to.

    Priority: "LOW", after ``ParamSchedulerHook`` and before ``CheckpointHook``, so that a run which
    resumes from a later checkpoint has this one.
    """

    priority = "LOW"

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        if runner.iter + 1 == self.iteration:
            runner.save_checkpoint(runner.work_dir, EARLY, by_epoch=False)


def _options(model: Mapping[str, Any]) -> Any:
    """The ticket's entry in the config of a model."""
    return ticket_options(backbone_of(model)[0].get("init_cfg"))


def _recipe(cfg: Config) -> dict[str, Any]:
    """What the trained weights depend on."""
    keys = ["model", "train_dataloader", "train_cfg", "optim_wrapper", "param_scheduler"]
    keys += ["randomness", "custom_hooks", "load_from"]
    whole = cfg.to_dict()
    recipe = {key: whole.get(key) for key in keys}
    optional = ("sync_bn", "auto_scale_lr", "data_preprocessor")
    recipe |= {key: whole[key] for key in optional if whole.get(key) is not None}
    if get_world_size() > 1:  # a batch is theirs together
        recipe["processes"] = get_world_size()
    for hook in recipe["custom_hooks"]:
        if hook["type"] in DISTILL_HOOKS:
            hook["teacher"] = file_digest(hook["teacher"], "teacher")
    # The ticket's digest is in the recipe.
    for key in ("checkpoint", "weights", "allow_other_checkpoint"):
        _options(recipe["model"]).pop(key, None)
    for key in ("num_workers", "persistent_workers", "pin_memory"):
        recipe["train_dataloader"].pop(key, None)
    return json.loads(json.dumps(recipe, default=str))
