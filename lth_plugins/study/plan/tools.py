"""The tools that a study trains tickets with: how each is told what to do, and what it measures.

Adding one is a row in `TOOLS`.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lth_plugins import transfer
from lth_plugins.errors import TicketError
from lth_plugins.pretrain.config import Data
from lth_plugins.study.plan.paths import tool
from lth_plugins.study.run.results import Metrics, detectron2_metrics, mmengine_metrics
from lth_plugins.transfer.config import recipe


@dataclass(frozen=True)
class Training:
    """What a tool is to train.

    Attributes:
        config: the tool's configuration file.
        overrides: key=value changes to it.
        arch: the architecture.
        ticket: the masks, and the weights that survive them.
        kind: a row of `runs.KINDS`; "reinit" for a narrower network.
        weights: the dense ticket whose weights to use, where the kind needs others than the
            ticket's; else None.
        seed: of the training and of a random mask.
        out: folder for the results.
    """

    config: Path
    overrides: Sequence[str]
    arch: str
    ticket: Path
    kind: str
    weights: Path | None
    seed: int
    out: Path


@dataclass(frozen=True)
class Tool:
    """A tool that trains tickets on a task.

    Attributes:
        command: script and arguments for a training.
        read: the metrics in a folder of results, all in percent.
        settings: what a configuration with overrides and an architecture comes to, as JSON has
            it: all that decides a result, apart from the rest of a `Training`.
        metrics: what it can measure, each higher where better; the first is compared by default.
        framework: a module that it needs.
        install: what installs that.
    """

    command: Callable[[Training], tuple[str, ...]]
    read: Callable[[Path], Metrics]
    settings: Callable[[Path, Sequence[str], str], Mapping[str, Any]]
    metrics: tuple[str, ...]
    framework: str
    install: str

    @property
    def missing(self) -> str | None:
        """Why it cannot run here; None where its framework is installed, even if broken."""
        spec = importlib.util.find_spec(self.framework)
        if spec is not None and spec.origin is not None:  # a mere folder of that name has none
            return None
        return f"{self.framework} is not installed (`{self.install}` looks for it again)"

    def measure(self, folder: Path) -> Metrics:
        """The metrics in a folder of results, those that are compared.

        Raises:
            TicketError: if there are none.
        """
        found = self.read(folder)
        return {name: float(found[name]) for name in self.metrics if name in found}


def _classify(training: Training) -> tuple[str, ...]:
    options = {
        "random": ["random=true"],
        "reversed": ["reverse=true"],
        "reinit": ["load_weights=false"],
    }
    weights = [] if training.weights is None else [f"weights={training.weights}"]
    return (
        *(tool("tools/train_cls.py"), f"{training.config}", "--ticket", f"{training.ticket}"),
        *(*training.overrides, f"arch={training.arch}", f"seed={training.seed}"),
        *(*weights, *options.get(training.kind, []), f"out={training.out}"),
    )


def _segment(training: Training) -> tuple[str, ...]:
    init = "model.backbone.init_cfg"
    options = {
        "random": [f"{init}.random=True", f"{init}.seed={training.seed}"],
        "reversed": [f"{init}.reverse=True"],
        "reinit": [f"{init}.load_weights=False"],
    }
    weights = [] if training.weights is None else [f"{init}.weights={training.weights}"]
    return (
        *(tool("tools/train_seg.py"), f"{training.config}", "--ticket", f"{training.ticket}"),
        *("--work-dir", f"{training.out}", "--resume", "--cfg-options"),
        *(*training.overrides, f"randomness.seed={training.seed}"),
        *(*weights, *options.get(training.kind, [])),
    )


def _detect(training: Training) -> tuple[str, ...]:
    node = "MODEL.TICKET"
    options = {
        "random": [f"{node}.RANDOM", "True", f"{node}.RANDOM_SEED", f"{training.seed}"],
        "reversed": [f"{node}.REVERSE", "True"],
        "reinit": [f"{node}.LOAD_WEIGHTS", "False"],
    }
    weights = [] if training.weights is None else [f"{node}.WEIGHTS", f"{training.weights}"]
    overrides = [part for override in training.overrides for part in override.split("=", 1)]
    return (
        *(tool("tools/train_det.py"), "--config-file", f"{training.config}", "--resume"),
        *(f"{node}.PATH", f"{training.ticket}", *overrides, "SEED", f"{training.seed}"),
        *(*weights, *options.get(training.kind, []), "OUTPUT_DIR", f"{training.out}"),
    )


def _classification_metrics(folder: Path) -> Metrics:
    path = folder / "result.json"
    try:
        return {"top1": 100 * json.loads(path.read_text())["top1"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TicketError(f"expected top1 in {path}, found {error!r}") from None


def _classification_settings(
    config: Path, overrides: Sequence[str], arch: str
) -> Mapping[str, Any]:
    # The ticket is not known yet, and counts by itself.
    loaded = transfer.load_config(config, [*overrides, f"arch={arch}", "ticket=any"])
    return {**recipe(loaded), **data_identity(loaded.data)}


def data_identity(data: Data) -> dict[str, Any]:
    """What tells a data set from others of its name: of folders of pictures, where they are.

    A recipe leaves that out, so that an output folder goes on where its data have moved.
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
                raise TicketError(f"expected key=value in the overrides of {config}: {override!r}")
        files = [hashlib.sha256(path.read_bytes()).hexdigest() for path in _with_bases(config)]
        versions = (_version(name) for name in distributions)
        version = next((v for v in versions if v is not None), None)
        return {"files": files, "overrides": list(overrides), "arch": arch, "framework": version}

    return settings


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _with_bases(config: Path) -> list[Path]:
    """A configuration and the files that it is based on, as far as they lie beside it.

    Neither file is executed, so bases that it computes, such as those in a framework, are left out.
    """
    if not config.is_file():
        raise TicketError(f"expected a configuration file, found none at {config}: check the path")
    files = [config]
    for file in files:
        try:
            names = list(_base_names(file))
        except (SyntaxError, ValueError, yaml.YAMLError) as error:
            raise TicketError(f"{file} cannot be read as a configuration: {error}") from None
        found = [(file.parent / name) for name in names]
        files += [path for path in found if path.is_file() and path not in files]
    return files


def _base_names(config: Path) -> Iterator[str]:
    """The texts in what a configuration gives as ``_base_`` (mmengine) or ``_BASE_`` (YAML)."""
    if config.suffix == ".py":
        for statement in ast.parse(config.read_text()).body:
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "_base_":
                for node in ast.walk(statement.value):
                    if isinstance(node, ast.Constant) and isinstance(node.value, str):
                        yield node.value
        return
    root = yaml.compose(config.read_text(), yaml.SafeLoader)
    for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
        if key.value == "_BASE_":
            nodes = value.value if isinstance(value, yaml.SequenceNode) else [value]
            yield from (node.value for node in nodes if isinstance(node, yaml.ScalarNode))


_BOX_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")

TOOLS: Mapping[str, Tool] = {
    "classification": Tool(
        _classify,
        _classification_metrics,
        _classification_settings,
        metrics=("top1",),
        framework="pytorch_lightning",
        install="make setup",
    ),
    "segmentation": Tool(
        _segment,
        lambda folder: mmengine_metrics(folder, "aAcc"),
        _file_settings("onedl-mmsegmentation", "mmsegmentation"),
        metrics=("mIoU", "mAcc", "aAcc", "mDice", "mFscore", "mPrecision", "mRecall"),
        framework="mmseg",
        install="make setup",
    ),
    "detection": Tool(
        _detect,
        detectron2_metrics,
        _file_settings("detectron2"),
        metrics=tuple(f"{kind}/{name}" for kind in ("bbox", "segm") for name in _BOX_METRICS),
        framework="detectron2",
        install="make detectron2",
    ),
}
"""What tickets can be transferred to, by name."""
