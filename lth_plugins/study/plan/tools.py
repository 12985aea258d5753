"""The tools that a study trains tickets with: their commands, and what they measure.

A tool is one entry of `TOOLS`, here or in another package.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lth_plugins.cli import command
from lth_plugins.errors import ConfigError, RunError
from lth_plugins.registry import Registry
from lth_plugins.shipped import with_bases
from lth_plugins.study.plan.metrics import (
    Metrics,
    detectron2_evaluated,
    detectron2_metrics,
    last_mmengine_checkpoint,
    mmengine_metrics,
    mmengine_tested,
    script_metrics,
)

if TYPE_CHECKING:
    from lth_plugins.ticket.choice import Choice
    from lth_plugins.training.settings import Data


@dataclass(frozen=True)
class Training:
    """What a tool trains.

    Attributes:
        config: the tool's configuration file.
        overrides: ``key=value`` changes to it.
        arch: the architecture.
        choice: the ticket, and how it is trained.
        seed: of the training.
        out: folder for the results.
        rounds: find task-specific tickets instead, pruning so often.
    """

    config: Path
    overrides: Sequence[str]
    arch: str
    choice: "Choice"
    seed: int
    out: Path
    rounds: int = 0

    def options(self) -> dict[str, Any]:
        """The options of the choice that differ from their defaults, by `Choice`'s names."""
        choice = self.choice
        options: dict[str, Any] = {} if choice.weights is None else {"weights": choice.weights}
        if choice.random:
            options |= {"random": True, "seed": choice.seed}
        if choice.reverse:
            options["reverse"] = True
        if not choice.load_weights:
            options["load_weights"] = False
        return options


@dataclass(frozen=True)
class Evaluation:
    """How a tool evaluates a checkpoint without training.

    Attributes:
        checkpoint: the final one in a folder of results, a PyTorch or safetensors file.
        command: script and arguments that evaluate a checkpoint; results go to ``out`` of the
            `Training`.
        read: the metrics in that folder, by the names and in the units of a training's.
    """

    checkpoint: Callable[[Path], Path]
    command: Callable[[Training, Path], tuple[str, ...]]
    read: Callable[[Path], Metrics]


@dataclass(frozen=True)
class Tool:
    """A tool that trains tickets on a task.

    Attributes:
        command: script and arguments of a training.
        read: the metrics in a folder of results, all in percent.
        settings: what a configuration with overrides and an architecture resolves to, as JSON
            types: all that decides a result, apart from the remaining values of a `Training`.
        metrics: what it can measure, each higher where better; the first is compared by default.
            Empty where only the user knows: then a task names its metric and its margin.
        framework: a module that it needs.
        install: what installs that.
        boxes: file of predicted boxes in a folder of results, COCO's results as JSON; "" for none.
        label_maps: folder of predicted label maps in a folder of results; "" for none.
        progress: patterns of log lines that say how far it is. Their three groups are the step,
            the number of steps, and the time left. Other lines are shown as they are.
        paired: whether runs of one seed share the order of the data, the augmentations and the
            initialisation of the heads, whatever the ticket. Verdicts then compare seed by seed.
        evaluation: of a checkpoint; None where the tool has none.
        searches: whether it finds task-specific tickets (`Training.rounds`).
    """

    command: Callable[[Training], tuple[str, ...]]
    read: Callable[[Path], Metrics]
    settings: Callable[[Path, Sequence[str], str], Mapping[str, Any]]
    metrics: tuple[str, ...]
    framework: str
    install: str
    boxes: str = ""
    label_maps: str = ""
    progress: tuple[str, ...] = ()
    paired: bool = False
    evaluation: Evaluation | None = None
    searches: bool = True

    @property
    def missing(self) -> str | None:
        """Why it cannot run here; None where its framework is installed, even if broken."""
        spec = importlib.util.find_spec(self.framework)
        if spec is not None and spec.origin is not None:  # a mere folder of that name has none
            return None
        return f"{self.framework} is not installed (`{self.install}` looks for it again)"

    def measure(self, folder: Path) -> Metrics:
        """The metrics in a folder of results that can be compared.

        Raises:
            RunError: if there are none.
        """
        found = self.read(folder)
        return {name: float(found[name]) for name in self.metrics or found if name in found}


TOOLS: Registry[Tool] = Registry("tool", "lth_plugins.study_tools")
"""What tickets can be transferred to, by name. Another package adds an entry point to the group."""


def _classify(training: Training) -> tuple[str, ...]:
    options = {name: value for name, value in training.options().items() if name != "seed"}
    return (
        *(*command("cls"), f"{training.config}", "--ticket", f"{training.choice.path}"),
        *(*training.overrides, f"arch={training.arch}", f"seed={training.seed}"),
        *((f"rounds={training.rounds}",) if training.rounds else ()),
        *(f"{name}={str(v).lower() if isinstance(v, bool) else v}" for name, v in options.items()),
        f"out={training.out}",
    )


def _resumed(training: Training) -> tuple[str, ...]:
    """A search resumes by itself."""
    return ("--imp-rounds", f"{training.rounds}") if training.rounds else ("--resume",)


def _segment(training: Training) -> tuple[str, ...]:
    node = "model.backbone.init_cfg"
    return (
        *(*command("seg"), f"{training.config}", "--ticket", f"{training.choice.path}"),
        *("--work-dir", f"{training.out}", *_resumed(training), "--cfg-options"),
        *(*training.overrides, f"randomness.seed={training.seed}"),
        *(f"{node}.{name}={value}" for name, value in training.options().items()),
    )


def _detect(training: Training) -> tuple[str, ...]:
    return _detector(training, *_resumed(training))


def _detector(training: Training, *flags: str) -> tuple[str, ...]:
    node, renamed = "MODEL.TICKET", {"seed": "RANDOM_SEED"}
    overrides = [part for override in training.overrides for part in override.split("=", 1)]
    options = [
        part
        for name, value in training.options().items()
        for part in (f"{node}.{renamed.get(name, name.upper())}", f"{value}")
    ]
    return (
        *(*command("det"), "--config-file", f"{training.config}", *flags),
        *(f"{node}.PATH", f"{training.choice.path}", *overrides, "SEED", f"{training.seed}"),
        *(*options, "OUTPUT_DIR", f"{training.out}"),
    )


def _script(training: Training) -> tuple[str, ...]:
    options = training.options()
    flags = {"random": "--random", "reverse": "--reverse", "load_weights": "--reinit"}
    weights = ("--weights", f"{options['weights']}") if "weights" in options else ()
    return (
        *(*command("script"), "--ticket", f"{training.choice.path}", *weights),
        *(flag for name, flag in flags.items() if name in options),
        *("--seed", f"{training.seed}", "--out", f"{training.out}", f"{training.config}"),
        *(f"--{override}" for override in training.overrides),
    )


def _evaluate_classifier(training: Training, checkpoint: Path) -> tuple[str, ...]:
    return (*_classify(training), "--eval-only", f"{checkpoint}")


def _evaluate_segmentor(training: Training, checkpoint: Path) -> tuple[str, ...]:
    options = ("--cfg-options", *training.overrides) if training.overrides else ()
    return (
        *(*command("test-seg"), f"{training.config}", f"{checkpoint}", "--val"),
        *("--work-dir", f"{training.out}", *options),
    )


def _evaluate_detector(training: Training, checkpoint: Path) -> tuple[str, ...]:
    return (*_detector(training, "--eval-only"), "MODEL.WEIGHTS", f"{checkpoint}")


def _classification_metrics(folder: Path, file: str = "result.json") -> Metrics:
    path = folder / file
    try:
        return {"top1": 100 * json.loads(path.read_text())["top1"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"expected top1 in {path}, found {error!r}") from None


def _classification_settings(
    config: Path, overrides: Sequence[str], arch: str
) -> Mapping[str, Any]:
    from lth_plugins import transfer
    from lth_plugins.transfer.config import recipe

    # The ticket is not known yet, and counts by itself.
    loaded = transfer.load_config(config, [*overrides, f"arch={arch}", "ticket=any"])
    return {**recipe(loaded), **data_identity(loaded.data)}


def data_identity(data: "Data") -> dict[str, Any]:
    """The root of a dataset of image folders, which is all that identifies it.

    A recipe leaves the root out, so that a run resumes after its data have moved.
    """
    return {"data_root": data.root} if data.name == "imagefolder" else {}


def _file_settings(*distributions: str) -> Callable[[Path, Sequence[str], str], Mapping[str, Any]]:
    """Settings of a framework's own configurations: the files that make them up, and its version.

    The version, by the first name of its distribution that is installed, stands for the files that
    are in the framework.
    """

    def settings(config: Path, overrides: Sequence[str], arch: str) -> Mapping[str, Any]:
        for override in overrides:
            if "=" not in override:
                raise ConfigError(f"expected key=value in the overrides of {config}: {override!r}")
        files = [hashlib.sha256(path.read_bytes()).hexdigest() for path in with_bases(config)]
        versions = (_version(name) for name in distributions)
        version = next((v for v in versions if v is not None), None)
        return {"files": files, "overrides": list(overrides), "arch": arch, "framework": version}

    return settings


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


_BOX_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")

for _name, _tool in {
    "classification": Tool(
        _classify,
        _classification_metrics,
        _classification_settings,
        metrics=("top1",),
        framework="pytorch_lightning",
        install="make setup",
        paired=True,
        evaluation=Evaluation(
            lambda folder: folder / "model.safetensors",
            _evaluate_classifier,
            lambda folder: _classification_metrics(folder, "evaluation.json"),
        ),
    ),
    "segmentation": Tool(
        _segment,
        lambda folder: mmengine_metrics(folder, "aAcc"),
        _file_settings("onedl-mmsegmentation", "mmsegmentation"),
        metrics=("mIoU", "mAcc", "aAcc", "mDice", "mFscore", "mPrecision", "mRecall"),
        framework="mmseg",
        install="make setup",
        label_maps="predictions",
        progress=(
            r"\[ *(\d+)/(\d+)\].* eta: ([\d:]+)",
            r"step (\d+) of (\d+), about (.+) left",
        ),
        paired=True,
        evaluation=Evaluation(last_mmengine_checkpoint, _evaluate_segmentor, mmengine_tested),
    ),
    "detection": Tool(
        _detect,
        detectron2_metrics,
        _file_settings("detectron2"),
        metrics=tuple(f"{kind}/{name}" for kind in ("bbox", "segm") for name in _BOX_METRICS),
        framework="detectron2",
        install="make detectron2",
        boxes="inference/coco_instances_results.json",
        progress=(
            r"step (\d+) of (\d+), about (.+) left",
            r"Inference done (\d+)/(\d+)\..* ETA=([\d:]+)",
        ),
        paired=True,
        evaluation=Evaluation(
            lambda folder: folder / "model_final.pth", _evaluate_detector, detectron2_evaluated
        ),
    ),
    "script": Tool(
        _script,
        script_metrics,
        _file_settings(),
        metrics=(),
        framework="torch",
        install="make setup",
        searches=False,
    ),
}.items():
    TOOLS.register(_name, _tool)
