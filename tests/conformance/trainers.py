"""The trainers of the hosts that have one, as our tools run them on tiny digit scenes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ChainedScheduler, LinearLR, MultiStepLR
from torchvision.io import read_image
from torchvision.models.segmentation import FCN
from torchvision.ops import box_convert
from torchvision.ops.misc import FrozenBatchNorm2d
from torchvision.transforms.functional import normalize

import lth_plugins as lth
import lth_plugins.torchvision as tv
from lth_plugins.pruning.search.on_host import check_one_way
from lth_plugins.pruning.search.scripted import Training as SearchedTraining
from lth_plugins.pruning.search.search import Search
from lth_plugins.resilience.seeds import reseed, seed_of
from lth_plugins.resilience.sigterm import Sigterm
from lth_plugins.ticket import Choice

Watch = Callable[[Path, nn.Module, int], object]
"""Called with the folder of a run, its model, and the iterations done: before the first iteration,
and after each before any hook of ours."""


def only(folder: Path, model: nn.Module, done: int) -> None:
    """Only train."""


def at(actions: Mapping[int, Callable[[nn.Module], object]]) -> Watch:
    """Do something with the model after some iterations."""
    return lambda folder, model, done: actions.get(done, id)(model)


@dataclass(frozen=True)
class Training:
    """A run of a trainer, or of a search in one.

    Attributes:
        method: of sparse training, if any, with its options.
        options: names of the host's `TrainingHost.options`.
        search: settings of a search, by the names of `TaskSettings`, such as "structure.kind".
        choice: options of the ticket, by the names of `lth_plugins.ticket.Choice`.
        seed: of the run; by default the configuration's.
        learns: False sets the learning rate to 0.
    """

    scenes: Path
    folder: Path
    ticket: Path | str
    iterations: int
    watch: Watch = only
    resume: bool = False
    method: tuple[str, Mapping[str, Any]] | None = None
    options: Sequence[str] = ()
    search: Mapping[str, Any] = field(default_factory=dict)
    choice: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    learns: bool = True


class TrainingHost(Protocol):
    """A host that trains, resumes and searches by its own configuration. It saves each iteration.

    Attributes:
        framework: the marker of its tests; None for what is always installed.
        other: what a person writes to allow a checkpoint of another ticket.
        options: what a person writes for "frozen" BN statistics, and for a learning rate with a
            "decay" to a tenth after the first iteration.
        predictors: parts of the names of the layers that heads end in.
    """

    framework: str | None
    other: str
    options: Mapping[str, Mapping[str, Any]]
    predictors: Sequence[str]

    def train(self, run: Training) -> None:
        """Run the host's trainer; it writes ``final.ticket``."""
        ...

    def search(self, run: Training) -> Search:
        """The search that the host's configuration describes."""
        ...

    def saved(self, folder: Path, iteration: int) -> Path:
        """The checkpoint after so many iterations, of a run that goes beyond them."""
        ...

    def note(self, checkpoint: Path) -> str:
        """What the host's ``last_checkpoint`` says of a checkpoint beside it."""
        ...

    def state(self, checkpoint: Path) -> Mapping[str, Tensor]:
        """Of the model."""
        ...

    def optimizer(self, checkpoint: Path) -> Mapping[str, Any]:
        """The optimizer's state dict."""
        ...


@dataclass(frozen=True)
class Detectron2:
    """Faster R-CNN in the trainer of tools/train_det.py."""

    framework: str = "detectron2"
    other: str = "MODEL.TICKET.ALLOW_OTHER_CHECKPOINT True"
    options: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "frozen": {"MODEL.RESNETS.NORM": "FrozenBN"},
        "decay": {"SOLVER.STEPS": (1,), "SOLVER.GAMMA": 0.1},
    }
    predictors: Sequence[str] = ("predictor", "objectness_logits", "anchor_deltas")

    def train(self, run: Training) -> None:
        from detectron2.utils.env import seed_all_rng

        cfg = self._config(run)
        run.folder.mkdir(exist_ok=True)
        seed_all_rng(cfg.SEED)
        trainer = self._trainer(run.watch)(cfg)
        trainer.resume_or_load(resume=run.resume)
        trainer.train()

    def search(self, run: Training) -> Search:
        from lth_plugins.detectron2 import task_search

        return task_search(self._config(run), self._trainer(run.watch))

    def saved(self, folder: Path, iteration: int) -> Path:
        return folder / f"model_{iteration - 1:07d}.pth"

    def note(self, checkpoint: Path) -> str:
        return checkpoint.name

    def state(self, checkpoint: Path) -> Mapping[str, Tensor]:
        return torch.load(checkpoint, weights_only=True)["model"]

    def optimizer(self, checkpoint: Path) -> Mapping[str, Any]:
        return torch.load(checkpoint, weights_only=False)["trainer"]["_trainer"]["optimizer"]

    def _trainer(self, watch: Watch) -> Any:
        from detectron2.engine import HookBase

        from lth_plugins.detectron2 import trainer

        class Watching(HookBase):
            def before_step(self) -> None:
                if self.trainer.iter == self.trainer.start_iter:
                    self._watch(self.trainer.iter)

            def after_step(self) -> None:
                self._watch(self.trainer.iter + 1)

            def _watch(self, done: int) -> None:
                watch(Path(self.trainer.cfg.OUTPUT_DIR), self.trainer.model, done)

        class Trainer(trainer.Trainer):  # type: ignore[misc]
            def build_hooks(self) -> list[Any]:
                return [Watching(), *super().build_hooks()]

        return Trainer

    def _config(self, run: Training) -> Any:
        from detectron2.data import DatasetCatalog
        from detectron2.data.datasets import register_coco_instances

        from lth_plugins.detectron2 import apply_ticket_input
        from tests.detectron2.conftest import TINY, as_options, load_cfg

        name = f"{run.scenes.parent.name}_train"
        if name not in DatasetCatalog.list():
            annotations = run.scenes / "annotations/instances_train.json"
            register_coco_instances(name, {}, str(annotations), str(run.scenes / "images/train"))
        settings = {
            **TINY,
            "DATASETS.TRAIN": (name,),
            "DATASETS.TEST": (),
            "SOLVER.MAX_ITER": run.iterations,
            "SOLVER.CHECKPOINT_PERIOD": 1,
            "OUTPUT_DIR": run.folder,
            "MODEL.TICKET.PATH": run.ticket,
            **{f"MODEL.TICKET.IMP.{key.upper()}": value for key, value in run.search.items()},
            **{f"MODEL.TICKET.{_detectron2_name(key)}": v for key, v in run.choice.items()},
            **({} if run.seed is None else {"SEED": run.seed}),
            **({} if run.learns else {"SOLVER.BASE_LR": 0.0}),
        }
        if run.method is not None:
            name, options = run.method
            settings["MODEL.TICKET.METHOD"] = name
            node = "MODEL.TICKET.METHOD_OPTIONS"
            settings |= {f"{node}.{key.upper()}": value for key, value in options.items()}
        for option in run.options:
            settings |= self.options[option]
        cfg = load_cfg("fpn", as_options(settings))
        apply_ticket_input(cfg)
        cfg.freeze()
        return cfg


def _detectron2_name(of_choice: str) -> str:
    return {"seed": "RANDOM_SEED"}.get(of_choice, of_choice.upper())


@dataclass(frozen=True)
class Mmseg:
    """An FCN in mmengine's Runner, as tools/train_seg.py makes it."""

    framework: str = "mmseg"
    other: str = "allow_other_checkpoint=True in the backbone's init_cfg"
    options: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "frozen": {"model.backbone.norm_eval": True},
        "decay": {
            "param_scheduler": [
                {"type": "MultiStepLR", "milestones": [1], "gamma": 0.1, "by_epoch": False}
            ]
        },
    }
    predictors: Sequence[str] = ("conv_seg",)

    def train(self, run: Training) -> None:
        from mmengine.runner import Runner

        Runner.from_cfg(self._config(run)).train()

    def search(self, run: Training) -> Search:
        from lth_plugins.mmseg import task_search

        return task_search(self._config(run))

    def saved(self, folder: Path, iteration: int) -> Path:
        return folder / f"iter_{iteration}.pth"

    def note(self, checkpoint: Path) -> str:
        return str(checkpoint)

    def state(self, checkpoint: Path) -> Mapping[str, Tensor]:
        return torch.load(checkpoint, weights_only=False)["state_dict"]

    def optimizer(self, checkpoint: Path) -> Mapping[str, Any]:
        return torch.load(checkpoint, weights_only=False)["optimizer"]

    def _config(self, run: Training) -> Any:
        import mmseg.models  # noqa: F401  # fills mmseg's registry
        from mmengine.hooks import Hook
        from mmengine.registry import HOOKS
        from mmengine.runner import Runner

        from lth_plugins.mmseg import apply_ticket, make_resumable
        from tests.mmseg.conftest import digits_config, forget_visualizers, options_of

        class WatchHook(Hook):
            priority = "VERY_HIGH"

            def before_train(self, runner: Runner) -> None:
                self.first = runner.iter

            def before_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
                if runner.iter == self.first:
                    run.watch(Path(runner.work_dir), runner.model, runner.iter)

            def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
                run.watch(Path(runner.work_dir), runner.model, runner.iter + 1)

        HOOKS.register_module(module=WatchHook, force=True)
        forget_visualizers()
        settings: dict[str, Any] = {
            "train_cfg.max_iters": run.iterations,
            "resume": run.resume,
            "launcher": "none",
            **{f"imp.{key}": value for key, value in run.search.items()},
            **{
                f"model.backbone.init_cfg.{key}": str(v) if isinstance(v, Path) else v
                for key, v in run.choice.items()
            },
            **({} if run.seed is None else {"randomness.seed": run.seed}),
            **({} if run.learns else {"optim_wrapper.optimizer.lr": 0.0}),
        }
        for option in run.options:
            settings |= copy.deepcopy(dict(self.options[option]))
        cfg = digits_config(run.folder, run.ticket, options_of(run.scenes), settings)
        apply_ticket(cfg)
        cfg.custom_hooks.append({"type": "WatchHook"})
        if run.method is not None:
            name, options = run.method
            cfg.custom_hooks.append({"type": "SparseTrainingHook", "method": name, **options})
        make_resumable(cfg)
        return cfg


@dataclass(frozen=True)
class Torchvision:
    """A script like torchvision's references/detection/train.py, and .../segmentation/train.py.

    Attributes:
        name: of the model.
    """

    name: str = "fcn_resnet18"
    framework: str | None = None
    other: str = "allow_other_checkpoint=True"
    options: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "frozen": {"norm_layer": FrozenBatchNorm2d},
        "decay": {"lr_steps": [1]},
        "amp": {"amp": True, "warmup": 3},
    }
    predictors: Sequence[str] = ("classifier.4",)

    def train(self, run: Training) -> None:
        settings = self._settings(run)
        reseed(settings["seed"])
        model = self._model(run, settings)
        parts, sparse, done = self._parts(model, run, settings), None, 0
        if run.method is not None:
            name, options = run.method
            sparse = lth.SparseTraining(name, **options)
        note = run.folder / "last_checkpoint"
        if run.resume and note.exists():
            checkpoint = torch.load(run.folder / note.read_text(), weights_only=True)
            model.load_state_dict(checkpoint["model"])
            for name, part in parts.items():
                part.load_state_dict(checkpoint["parts"][name])
            if sparse is not None:
                sparse.load_state_dict(model, checkpoint["sparse"])
            done = checkpoint["iteration"]
        if sparse is not None:
            sparse.start(model, run.iterations)
        run.folder.mkdir(exist_ok=True)
        run.watch(run.folder, model, done)
        sigterm = Sigterm()
        for step in range(done, run.iterations):
            reseed(seed_of(settings["seed"], step))
            self._step(model, run, settings, parts, step)
            run.watch(run.folder, model, step + 1)
            if sparse is not None:
                sparse.after_step(model, step + 1)
            states = {name: part.state_dict() for name, part in parts.items()}
            checkpoint = {"model": model.state_dict(), "iteration": step + 1, "parts": states}
            if sparse is not None:
                checkpoint["sparse"] = sparse.state_dict(model)
            path = self.saved(run.folder, step + 1)
            torch.save(checkpoint, path)
            note.write_text(path.name)
            sigterm.stop_if_asked(lambda path=path: path)
        sigterm.close()
        lth.attached(model).ticket(source="digit scenes").save(run.folder / "final.ticket")

    def search(self, run: Training) -> Search:
        check_one_way("rounds", "method", run.method is not None)
        settings = self._settings(run)

        def fit(model: nn.Module, training: SearchedTraining) -> None:
            parts = self._parts(model, run, settings, training.lr_scale)
            done = training.resume(**parts)
            run.watch(training.folder, model, done)
            for step in range(done, training.iterations):
                self._step(model, run, settings, parts, step)
                run.watch(training.folder, model, step + 1)
                training.after_step(step + 1)
            lth.attached(model).ticket().save(training.folder / "final.ticket")

        asked: dict[str, Any] = {}
        for key, value in run.search.items():
            group, _, name = key.rpartition(".")
            (asked.setdefault(group, {}) if group else asked)[name] = value
        # Rewinding to the initialisation asks for a model that is built with its own.
        own = {"load_weights": asked.get("rewind") != "init"}
        return tv.task_search(
            lambda: self._model(replace(run, choice={**own, **run.choice}), settings),
            fit,
            Choice(run.ticket, **run.choice),
            run.folder,
            iterations=run.iterations,
            source="digit scenes",
            seed=settings["seed"],
            checkpoint_period=1,
            config={"lr": settings["lr"], "lr_steps": settings["lr_steps"]},
            **asked,
        )

    def saved(self, folder: Path, iteration: int) -> Path:
        return folder / f"model_{iteration}.pth"

    def note(self, checkpoint: Path) -> str:
        return checkpoint.name

    def state(self, checkpoint: Path) -> Mapping[str, Tensor]:
        return torch.load(checkpoint, weights_only=False)["model"]

    def optimizer(self, checkpoint: Path) -> Mapping[str, Any]:
        return torch.load(checkpoint, weights_only=True)["parts"]["optimizer"]

    def _settings(self, run: Training) -> dict[str, Any]:
        settings = {
            "lr": 0.02 if run.learns else 0.0,
            "lr_steps": [],
            "warmup": 0,
            "amp": False,
            "seed": 1 if run.seed is None else run.seed,
        }
        for option in run.options:
            settings |= self.options[option]
        return settings

    def _model(self, run: Training, settings: Mapping[str, Any]) -> nn.Module:
        norm = {key: settings[key] for key in ("norm_layer",) if key in settings}
        ticket = Choice(run.ticket, **run.choice)
        if self.name.startswith("fcn"):
            return tv.segmentation(self.name, ticket, num_classes=11, **norm)
        sizes = {"num_classes": 11, "min_size": 64, "max_size": 64}
        return tv.detection(self.name, ticket, **sizes, **norm)

    def _parts(
        self,
        model: nn.Module,
        run: Training,
        settings: Mapping[str, Any],
        lr_scale: float | None = None,
    ) -> dict[str, Any]:
        """The optimizer, its schedule and the gradient scaler of torchvision's script."""
        lr, steps = settings["lr"], settings["lr_steps"]
        if lr_scale is not None:
            lr, steps = lr * lr_scale, []
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr, momentum=0.9, weight_decay=1e-4)
        factor = 1 / 1000 if settings["warmup"] else 1.0
        warmup = LinearLR(optimizer, factor, total_iters=settings["warmup"])
        schedule = ChainedScheduler([warmup, MultiStepLR(optimizer, steps, gamma=0.1)])
        scaler = torch.amp.GradScaler("cpu", enabled=settings["amp"])
        return {"optimizer": optimizer, "lr_scheduler": schedule, "scaler": scaler}

    def _step(
        self,
        model: nn.Module,
        run: Training,
        settings: Mapping[str, Any],
        parts: Mapping[str, Any],
        step: int,
    ) -> None:
        """One iteration of torchvision's ``train_one_epoch``."""
        batch = _batch(run.scenes, seed_of(settings["seed"], step))
        with torch.autocast("cpu", torch.bfloat16, enabled=settings["amp"]):
            loss = _loss(model.train(), *batch)
        assert loss.isfinite()
        parts["optimizer"].zero_grad()
        parts["scaler"].scale(loss).backward()
        parts["scaler"].step(parts["optimizer"])
        parts["scaler"].update()
        parts["lr_scheduler"].step()


def _loss(model: nn.Module, images: list[Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
    if isinstance(model, FCN):
        spec = lth.attached(model).meta.input
        outputs = model(normalize(torch.stack(images), spec.mean, spec.std))
        maps = torch.stack([target["map"] for target in targets])
        return nn.functional.cross_entropy(outputs["out"], maps)
    return sum(model(images, targets).values())


def _batch(scenes: Path, seed: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two scenes: images in [0, 1]; boxes and labels as detectors take them, and label maps."""
    truth = json.loads((scenes / "annotations/instances_train.json").read_text())
    drawn = torch.randperm(len(truth["images"]), generator=torch.Generator().manual_seed(seed))
    images, targets = [], []
    for entry in (truth["images"][index] for index in drawn[:2].tolist()):
        image, labels = (
            read_image(str(scenes / folder / "train" / entry["file_name"]))
            for folder in ("images", "labels")
        )
        own = [a for a in truth["annotations"] if a["image_id"] == entry["id"]]
        boxes = box_convert(torch.tensor([a["bbox"] for a in own]).float(), "xywh", "xyxy")
        digits = torch.tensor([a["category_id"] for a in own])
        images.append(image / 255)
        targets.append({"boxes": boxes, "labels": digits, "map": labels[0].long()})
    return images, targets


TRAINERS: dict[str, TrainingHost] = {
    "detectron2": Detectron2(),
    "mmseg": Mmseg(),
    "torchvision": Torchvision(),
}
