"""The trainers of the hosts that have one, as our tools run them on tiny digit scenes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

At = Mapping[int, Callable[[nn.Module], object]]
"""What to do with the model after some iterations, before any hook of ours sees it."""


@dataclass(frozen=True)
class Training:
    """A run of a trainer.

    Attributes:
        pruned_to: the sparsity that gradual pruning ends with in the third iteration, if any.
        choice: options of the ticket, by `Choice`'s names.
        seed: of the run; the host's own configuration's by default.
        learns: False sets the learning rate to 0.
    """

    scenes: Path
    folder: Path
    ticket: Path
    iterations: int
    at: At
    resume: bool = False
    pruned_to: float = 0.0
    choice: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    learns: bool = True


class TrainingHost(Protocol):
    """A host that trains, resumes and searches by its own configuration.

    Attributes:
        framework: the marker of its tests.
        other: what a person writes to allow a checkpoint of another ticket.
    """

    framework: str
    other: str

    def train(self, run: Training) -> None:
        """Run the host's trainer; it saves after each iteration, and writes ``final.ticket``."""
        ...

    def saved(self, folder: Path, iteration: int) -> Path:
        """The checkpoint after so many iterations, of a run that goes beyond them."""
        ...

    def state(self, checkpoint: Path) -> Mapping[str, Tensor]:
        """Of the model."""
        ...

    def optimizer(self, checkpoint: Path) -> Mapping[str, Any]:
        """The optimizer's state dict."""
        ...

    def search(self, scenes: Path, folder: Path, dense: Path) -> list[Path]:
        """Find tickets in one round of two iterations; returns their files."""
        ...


@dataclass(frozen=True)
class Detectron2:
    """Faster R-CNN in the trainer of tools/train_det.py."""

    framework: str = "detectron2"
    other: str = "MODEL.TICKET.ALLOW_OTHER_CHECKPOINT True"

    def train(self, run: Training) -> None:
        from detectron2.engine import HookBase
        from detectron2.utils.env import seed_all_rng

        from tests.detectron2.conftest import load_tool

        class Acting(HookBase):
            def after_step(self) -> None:
                run.at.get(self.trainer.iter + 1, id)(self.trainer.model)

        class Trainer(load_tool("train_det").Trainer):  # type: ignore[misc]
            def build_hooks(self) -> list[Any]:
                return [Acting(), *super().build_hooks()]

        pruning = {"TARGET": run.pruned_to, "END": 3, "PERIOD": 1}
        cfg = self._config(
            run.scenes,
            run.folder,
            run.ticket,
            {
                "SOLVER.MAX_ITER": run.iterations,
                "SOLVER.CHECKPOINT_PERIOD": 1,
                **{f"MODEL.TICKET.GRADUAL.{key}": value for key, value in pruning.items()},
                **_detectron2_choice(run.choice),
                **({} if run.seed is None else {"SEED": run.seed}),
                **({} if run.learns else {"SOLVER.BASE_LR": 0.0}),
            },
        )
        run.folder.mkdir(exist_ok=True)
        seed_all_rng(cfg.SEED)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=run.resume)
        trainer.train()

    def saved(self, folder: Path, iteration: int) -> Path:
        return folder / f"model_{iteration - 1:07d}.pth"

    def state(self, checkpoint: Path) -> Mapping[str, Tensor]:
        return torch.load(checkpoint, weights_only=True)["model"]

    def optimizer(self, checkpoint: Path) -> Mapping[str, Any]:
        return torch.load(checkpoint, weights_only=False)["trainer"]["_trainer"]["optimizer"]

    def search(self, scenes: Path, folder: Path, dense: Path) -> list[Path]:
        from lth_plugins.detectron2 import task_search
        from tests.detectron2.conftest import load_tool

        settings = {"MODEL.TICKET.IMP.ROUNDS": 1, "SOLVER.MAX_ITER": 2}
        cfg = self._config(scenes, folder, dense, settings)
        return task_search(cfg, load_tool("train_det").Trainer).run()

    def _config(self, scenes: Path, folder: Path, ticket: Path, settings: Mapping[str, Any]) -> Any:
        from detectron2.data import DatasetCatalog
        from detectron2.data.datasets import register_coco_instances

        from lth_plugins.detectron2 import apply_ticket_input
        from tests.detectron2.conftest import TINY, as_options, load_cfg

        name = f"{scenes.parent.name}_train"
        if name not in DatasetCatalog.list():
            annotations = scenes / "annotations/instances_train.json"
            register_coco_instances(name, {}, str(annotations), str(scenes / "images/train"))
        given = {
            "DATASETS.TRAIN": (name,),
            "DATASETS.TEST": (),
            "MODEL.TICKET.PATH": ticket,
            "OUTPUT_DIR": folder,
        }
        cfg = load_cfg("fpn", as_options({**TINY, **given, **settings}))
        apply_ticket_input(cfg)
        cfg.freeze()
        return cfg


def _detectron2_choice(choice: Mapping[str, Any]) -> dict[str, Any]:
    renamed = {"seed": "RANDOM_SEED"}
    return {f"MODEL.TICKET.{renamed.get(key, key.upper())}": v for key, v in choice.items()}


@dataclass(frozen=True)
class Mmseg:
    """An FCN in mmengine's Runner, as tools/train_seg.py makes it."""

    framework: str = "mmseg"
    other: str = "allow_other_checkpoint=True in the backbone's init_cfg"

    def train(self, run: Training) -> None:
        from mmengine.hooks import Hook
        from mmengine.runner import Runner

        from lth_plugins.mmseg import make_resumable

        class Acting(Hook):
            priority = "VERY_HIGH"

            def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
                run.at.get(runner.iter + 1, id)(runner.model)

        settings = {
            "train_cfg.max_iters": run.iterations,
            **{
                f"model.backbone.init_cfg.{key}": str(v) if isinstance(v, Path) else v
                for key, v in run.choice.items()
            },
            **({} if run.seed is None else {"randomness": {"seed": run.seed}}),
            **({} if run.learns else {"optim_wrapper.optimizer.lr": 0.0}),
        }
        cfg = self._config(run.scenes, run.folder, run.ticket, settings)
        cfg.resume = run.resume
        if run.pruned_to:
            pruning = {"target": run.pruned_to, "begin": 0, "end": 3, "period": 1}
            cfg.custom_hooks.append({"type": "GradualPruningHook", **pruning})
        make_resumable(cfg)
        runner = Runner.from_cfg(cfg)
        runner.register_hook(Acting())
        runner.train()

    def saved(self, folder: Path, iteration: int) -> Path:
        return folder / f"iter_{iteration}.pth"

    def state(self, checkpoint: Path) -> Mapping[str, Tensor]:
        return torch.load(checkpoint, weights_only=False)["state_dict"]

    def optimizer(self, checkpoint: Path) -> Mapping[str, Any]:
        return torch.load(checkpoint, weights_only=False)["optimizer"]

    def search(self, scenes: Path, folder: Path, dense: Path) -> list[Path]:
        from lth_plugins.mmseg import task_search

        cfg = self._config(scenes, folder, dense, {"imp": {"rounds": 1}, "launcher": "none"})
        return task_search(cfg).run()

    def _config(self, scenes: Path, folder: Path, ticket: Path, settings: Mapping[str, Any]) -> Any:
        import mmseg.models  # noqa: F401  # fills mmseg's registry

        from lth_plugins.mmseg import apply_ticket
        from tests.mmseg.conftest import digits_config, options_of

        cfg = digits_config(folder, ticket, options_of(scenes), copy.deepcopy(dict(settings)))
        apply_ticket(cfg)
        return cfg


TRAINERS: dict[str, TrainingHost] = {"detectron2": Detectron2(), "mmseg": Mmseg()}
