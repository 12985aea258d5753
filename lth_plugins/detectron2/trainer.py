"""detectron2's `DefaultTrainer` with tickets: what `lth det` trains with."""

from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.engine.hooks import EvalHook
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.modeling import GeneralizedRCNNWithTTA
from torch import nn

from lth_plugins import attach_rest, attached
from lth_plugins.detectron2 import (
    DistillHook,
    ResumableLoader,
    SlimHook,
    SparseTrainingHook,
    TicketHook,
    add_teacher,
    adopt_slimmed,
    build_optimizer,
    example_of,
    method_of,
    resumable,
    resumable_train_loader,
    slimming_of,
    slims,
)
from lth_plugins.detectron2.datasets import files_of
from lth_plugins.detectron2.evaluation import evaluators_of
from lth_plugins.detectron2.hooks import ProgressHook, attachment_of
from lth_plugins.detectron2.slimming import widths_of
from lth_plugins.detectron2.teacher import teacher_of
from lth_plugins.masking.loading import why_refused
from lth_plugins.progress import intent
from lth_plugins.training.images import Readable


class Trainer(DefaultTrainer):
    """detectron2's trainer with the evaluators of its datasets and our hooks."""

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = super().build_model(cfg)
        attach_rest(model)  # what the ticket prunes in neck and heads; before weights are loaded
        adopt_slimmed(model, cfg)
        needs_ticket = not widths_of(cfg) and not slims(cfg)
        if needs_ticket and attached(model) is None and why_refused(model) is None:
            attachment_of(model)  # says why it must have one
        add_teacher(model, cfg)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> ResumableLoader:
        return resumable_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        mapper = Readable(DatasetMapper(cfg, False), files_of)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, folder: str = "inference"
    ) -> DatasetEvaluator:
        make = evaluators_of(dataset_name)
        return DatasetEvaluators(make(dataset_name, str(Path(cfg.OUTPUT_DIR) / folder)))

    @classmethod
    def test_augmented(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Evaluate with test-time augmentation, for R-CNNs with ``TEST.AUG.ENABLED``."""
        evaluators = [cls.build_evaluator(cfg, n, "inference_TTA") for n in cfg.DATASETS.TEST]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return {f"{name}_TTA": result for name, result in results.items()}

    def build_hooks(self) -> list[HookBase | None]:
        cfg, folder = self.cfg, Path(self.cfg.OUTPUT_DIR)
        before: list[HookBase] = []  # what is saved is masked, pruned and slimmed
        if slims(cfg):
            before.append(SlimHook(slimming_of(cfg), example_of(cfg), folder))
        if attached(self.model) is not None:
            period, source = cfg.SOLVER.CHECKPOINT_PERIOD, "+".join(cfg.DATASETS.TRAIN)
            before.append(TicketHook(period, folder / "final.ticket", source=source))
        if (method := method_of(cfg)) is not None:
            name, options = method
            before.append(SparseTrainingHook(name, **options))
        trains = f"{cfg.MODEL.META_ARCHITECTURE} on {', '.join(cfg.DATASETS.TRAIN)}"
        if cfg.DATASETS.TEST:
            trains += f" (evaluates on {', '.join(cfg.DATASETS.TEST)})"
        steps, batch = cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH
        intends = intent(trains, self._trainer.data_loader.images, steps, batch, folder)
        hooks = [*before, *super().build_hooks(), ProgressHook(intends)]
        if teacher_of(cfg):
            hooks.append(DistillHook())
        if cfg.TEST.AUG.ENABLED:
            hooks.append(EvalHook(0, lambda: self.test_augmented(cfg, self.model)))
        return resumable(hooks, cfg.SEED)
