"""Task-specific tickets in detectron2: each round of IMP is a run of a `DefaultTrainer`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.engine.hooks import PeriodicCheckpointer
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from lth_plugins.detectron2.config import check, choice_of, lowercase
from lth_plugins.detectron2.datasets import recipe_of_datasets
from lth_plugins.detectron2.slimming import slims
from lth_plugins.detectron2.teacher import digest_of, teacher_of
from lth_plugins.masking.attachment import attach_rest
from lth_plugins.pruning import Loss
from lth_plugins.pruning.search.on_host import (
    EARLY,
    CheckpointHost,
    check_one_way,
    sparse_as_a_round,
)
from lth_plugins.pruning.search.search import Run, Search
from lth_plugins.pruning.search.settings import TaskSettings, settings_from
from lth_plugins.ticket import Ticket


def task_search(cfg: CfgNode, trainer: type[DefaultTrainer]) -> Search:
    """The search for task-specific tickets that ``MODEL.TICKET.IMP`` describes.

    Args:
        cfg: complete, with the input of its ticket, which is a dense one. ``OUTPUT_DIR`` gets
            ``round_00.ticket``, …, and the run of each in ``train_00``, ….
        trainer: what trains a config.

    Returns:
        A search whose ``run()`` finds the tickets, or resumes.

    Raises:
        LthError: before anything is written, if the config contradicts itself or its ticket, or
            ``OUTPUT_DIR`` was started with another recipe.
    """
    node = cfg.MODEL.TICKET
    settings = settings_from(TaskSettings, lowercase(node.IMP), "MODEL.TICKET.IMP")
    check_one_way("MODEL.TICKET.IMP", "MODEL.TICKET.METHOD", bool(node.METHOD))
    check_one_way("MODEL.TICKET.IMP", "SLIM", slims(cfg))
    dense = choice_of(cfg).load_original()
    return Search(Detectron2Host(cfg, trainer, dense, settings), settings)


class Detectron2Host(CheckpointHost):
    """detectron2 as a host of searches."""

    state_key = "model"
    has_losses = True
    neck = "backbone."
    predictors = (
        *("*.cls_score", "*.bbox_pred", "*.objectness_logits", "*.anchor_deltas"),
        "*.predictor",
    )

    def __init__(
        self, cfg: CfgNode, trainer: type[DefaultTrainer], dense: Ticket, settings: TaskSettings
    ) -> None:
        self.cfg, self.trainer = cfg, trainer
        source, iterations = "+".join(cfg.DATASETS.TRAIN), cfg.SOLVER.MAX_ITER
        folder = Path(cfg.OUTPUT_DIR)
        super().__init__(dense, settings, folder, source, iterations, _recipe(cfg))

    def build(self) -> nn.Module:
        check(self.cfg, sparse_as_a_round(self.dense, self.settings))
        _seed(self.cfg)
        settings: dict[str, Any] = {"MODEL.TICKET.LOAD_WEIGHTS": self.settings.rewind != "init"}
        if teacher_of(self.cfg):
            settings["DISTILL.TEACHER"] = ""  # what adapts to it is not pruned
        cfg = self._with(settings)
        model = self.trainer.build_model(cfg)
        attach_rest(model)
        DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
        return model

    def fit(self, folder: Path, weights: Path, run: Run, lr_scale: float | None) -> None:
        settings = {
            "OUTPUT_DIR": str(folder),
            "MODEL.WEIGHTS": str(weights),
            # All rounds start from weights that are denser than their masks.
            "MODEL.TICKET.ALLOW_OTHER_CHECKPOINT": True,
        }
        if (ticket := self.ticket_path(run)) is not None:
            settings |= {"MODEL.TICKET.PATH": str(ticket), "MODEL.TICKET.WEIGHTS": ""}
        if lr_scale is not None:
            settings |= {
                "SOLVER.BASE_LR": self.cfg.SOLVER.BASE_LR * lr_scale,
                "SOLVER.LR_SCHEDULER_NAME": "WarmupMultiStepLR",
                "SOLVER.STEPS": (),
                "SOLVER.WARMUP_ITERS": 0,
            }
        cfg = self._with(settings)
        if self.is_main:
            (folder / "config.yaml").write_text(cfg.dump())
        _seed(cfg)  # every run is what it would be in a process of its own
        early = self.settings.early_iter if run.keep_early else 0
        trainer = _round(self.trainer, early)(cfg)
        trainer.resume_or_load(resume=True)
        trainer.train()

    def losses(self) -> list[Loss]:
        _seed(self.cfg)
        loader = iter(self.trainer.build_train_loader(self.cfg))
        count = self.batches_of(self.cfg.SOLVER.IMS_PER_BATCH)
        return [_loss_of(next(loader)) for _ in range(count)]

    def param_groups(self, checkpoint: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        return checkpoint["trainer"]["_trainer"]["optimizer"]["param_groups"]

    def _with(self, settings: Mapping[str, Any]) -> CfgNode:
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.merge_from_list([item for pair in settings.items() for item in pair])
        cfg.freeze()
        return cfg


def _loss_of(batch: list[dict[str, Any]]) -> Loss:
    def loss(model: nn.Module) -> Tensor:
        with EventStorage():
            return torch.stack(list(model(batch).values())).sum()

    return loss


def _seed(cfg: CfgNode) -> None:
    """Seed as detectron2's ``default_setup`` does."""
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + comm.get_rank())


def _round(trainer: type[DefaultTrainer], iteration: int) -> type[DefaultTrainer]:
    """This trainer with whole tickets, which keeps the checkpoint of an iteration to rewind to."""

    class Round(trainer):
        @classmethod
        def build_model(cls, cfg: CfgNode) -> nn.Module:
            model = super().build_model(cfg)
            attach_rest(model)
            return model

        def build_hooks(self) -> list[HookBase | None]:
            hooks = super().build_hooks()
            # Before the periodic one: a run that resumes from a later checkpoint has this one.
            at = [isinstance(hook, PeriodicCheckpointer) for hook in hooks] + [True]
            hooks.insert(at.index(True), _KeepEarly(iteration))
            return hooks

    return Round


class _KeepEarly(HookBase):
    def __init__(self, iteration: int) -> None:
        self._iteration = iteration

    def after_step(self) -> None:
        if self.trainer.iter + 1 == self._iteration:
            name = EARLY.removesuffix(".pth")
            self.trainer.checkpointer.save(name, iteration=self.trainer.iter)


def _recipe(cfg: CfgNode) -> dict[str, Any]:
    """What the trained weights depend on."""
    whole = yaml.safe_load(cfg.dump())
    recipe = {key: whole[key] for key in ("MODEL", "INPUT", "SOLVER", "DATALOADER", "SEED")}
    recipe["DATASETS"] = {"TRAIN": whole["DATASETS"]["TRAIN"], **recipe_of_datasets(cfg)}
    if cfg.MODEL.LOAD_PROPOSALS:
        recipe["DATASETS"]["PROPOSAL_FILES_TRAIN"] = whole["DATASETS"]["PROPOSAL_FILES_TRAIN"]
    if cfg.TEST.PRECISE_BN.ENABLED:  # it sets the statistics that a round trains on from
        recipe["TEST"] = {"PRECISE_BN": whole["TEST"]["PRECISE_BN"]}
    if teacher_of(cfg):
        recipe["DISTILL"] = {**whole["DISTILL"], "TEACHER": digest_of(cfg)}
    # The ticket's digest is in the recipe, and so are IMP's settings.
    for key in ("PATH", "WEIGHTS", "IMP", "METHOD", "METHOD_OPTIONS", "ALLOW_OTHER_CHECKPOINT"):
        del recipe["MODEL"]["TICKET"][key]
    del recipe["SOLVER"]["CHECKPOINT_PERIOD"], recipe["DATALOADER"]["NUM_WORKERS"]
    return recipe
