"""What the mmseg tests share: digit scenes, a tiny config to train on them, a ResNet-50 ticket."""

import importlib.util
import uuid
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torchvision

import lth_plugins as lth

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "configs/mmseg/digits/fcn_r18_ticket.py"


def load_tool(name: str) -> ModuleType:
    """tools/NAME.py as a module, to call its main."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tool() -> Callable[[str], ModuleType]:
    return load_tool


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six training and two test scenes of 64 px."""
    folder = tmp_path_factory.mktemp("data") / "digit_scenes"
    arguments = f"--out {folder} --train 6 --test 2 --min-size 64 --max-size 64".split()
    assert load_tool("make_digit_scenes").main(arguments) == 0
    return folder


@pytest.fixture(scope="session")
def tiny_options(scenes: Path) -> dict[str, Any]:
    """What to override in the digits config so that it takes seconds."""
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
    from mmengine.config import Config

    def make(overrides: dict[str, Any] | None = None) -> Config:
        cfg = Config.fromfile(DIGITS)
        cfg.work_dir = str(tmp_path / "run")
        cfg.experiment_name = uuid.uuid4().hex  # by default the time, which two runs may share
        cfg.merge_from_dict(
            {**tiny_options, "model.backbone.init_cfg.checkpoint": str(ticket18_file)}
        )
        cfg.merge_from_dict(overrides or {})
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
