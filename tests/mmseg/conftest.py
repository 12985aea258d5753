"""What the mmseg tests share: digit scenes, a tiny config to train on them, a ResNet-50 ticket."""

import importlib
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torchvision

import lth_plugins as lth
from lth_plugins.commands import scenes as scenes_tool

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "configs/mmseg/digits/fcn_r18_ticket.py"


@pytest.fixture(autouse=True)
def _own_visualizer() -> Iterator[None]:
    forget_visualizers()
    yield
    forget_visualizers()


def forget_visualizers() -> None:
    """mmengine has one visualizer per name and process, which writes to the first run's folder."""
    from mmseg.visualization import SegLocalVisualizer

    SegLocalVisualizer._instance_dict.clear()


@pytest.fixture(scope="module")
def quiet() -> None:
    """Models are built in mmseg's scope, and say nothing of each parameter that they initialise."""
    from mmengine.logging import MMLogger
    from mmengine.registry import init_default_scope

    init_default_scope("mmseg")
    MMLogger.get_instance("mmengine").setLevel("WARNING")


@pytest.fixture(scope="session")
def tool() -> Callable[[str], ModuleType]:
    """A command's module, by its name."""
    return lambda name: importlib.import_module(f"lth_plugins.commands.{name}")


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six training and two test scenes of 64 px."""
    folder = tmp_path_factory.mktemp("data") / "digit_scenes"
    arguments = f"--out {folder} --train 6 --test 2 --min-size 64 --max-size 64".split()
    assert scenes_tool.main(arguments) == 0
    return folder


@pytest.fixture(scope="session")
def tiny_options(scenes: Path) -> dict[str, Any]:
    return options_of(scenes)


def options_of(scenes: Path) -> dict[str, Any]:
    """What to override in the digits config so that it takes seconds on these scenes."""
    return {
        "model.data_preprocessor.size": (64, 64),
        "train_dataloader.dataset.data_root": str(scenes),
        "val_dataloader.dataset.data_root": str(scenes),
        "test_dataloader.dataset.data_root": str(scenes),
        "train_dataloader.dataset.pipeline.2.crop_size": (64, 64),
        "train_dataloader.batch_size": 2,
        "train_cfg.max_iters": 2,
        "train_cfg.val_interval": 1000,
        "default_hooks.checkpoint.interval": 1,
        "log_level": "WARNING",
    }


@pytest.fixture
def tiny_config(
    tiny_options: dict[str, Any], ticket18_file: Path, tmp_path: Path
) -> Callable[..., Any]:
    """The digits config of a run of two iterations, as a function of what to override."""

    def make(overrides: dict[str, Any] | None = None) -> Any:
        return digits_config(tmp_path / "run", ticket18_file, tiny_options, overrides or {})

    return make


def digits_config(work_dir: Path, ticket: Path, *options: dict[str, Any]) -> Any:
    from mmengine.config import Config

    cfg = Config.fromfile(DIGITS)
    cfg.work_dir = str(work_dir)
    cfg.experiment_name = uuid.uuid4().hex  # by default the time, which two runs may share
    cfg.merge_from_dict({"model.backbone.init_cfg.checkpoint": str(ticket)})
    for overrides in options:
        cfg.merge_from_dict(overrides)
    return cfg


@pytest.fixture(scope="session")
def search_config(tiny_options: dict[str, Any], dense18_file: Path) -> Callable[..., Any]:
    """A config that finds tickets in two iterations per round, as a function of where and how."""

    def make(work_dir: Path, overrides: dict[str, Any] | None = None, **imp: Any) -> Any:
        from lth_plugins.mmseg import apply_ticket

        options = (tiny_options, {"launcher": "none"}, {"imp": {"rounds": 2, **imp}})
        cfg = digits_config(work_dir, dense18_file, *options, overrides or {})
        apply_ticket(cfg)
        return cfg

    return make


@pytest.fixture(scope="session")
def ticket50() -> lth.Ticket:
    """A ResNet-50 ticket of about 67 % sparsity."""
    torch.manual_seed(0)
    state = torchvision.models.resnet50().state_dict()
    meta = lth.TicketMeta("resnet50", source="test", round=5)
    return lth.Ticket(lth.prune(state, 1 - 0.8**5), state, meta)


@pytest.fixture(scope="session")
def ticket50_file(ticket50: lth.Ticket, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ticket50.save(tmp_path_factory.mktemp("tickets") / "r50_round_05.ticket")
