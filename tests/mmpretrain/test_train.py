"""The initialiser and the hook serve mmpretrain's stock ResNet: its config, its Runner."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mmpretrain.models  # noqa: F401  # fills mmpretrain's registry
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmpretrain.registry import MODELS
from PIL import Image

import lth_plugins as lth
from lth_plugins.digits import DigitDataset

CONFIG = Path(__file__).parents[2] / "configs/mmpretrain/resnet50_in1k_ticket.py"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as files, a folder a class."""
    folder = tmp_path_factory.mktemp("images")
    for i, (image, label) in zip(range(8), DigitDataset("train", 32), strict=False):
        (folder / str(label)).mkdir(exist_ok=True)
        Image.fromarray(np.asarray(image)).save(folder / str(label) / f"{i}.png")
    return folder


@pytest.fixture
def tiny_config(images: Path, ticket18_file: Path, tmp_path: Path) -> Callable[..., Config]:
    """The shipped config at depth 18, for two steps on small images."""

    def make(**overrides: Any) -> Config:
        cfg = Config.fromfile(CONFIG)
        cfg.work_dir = str(tmp_path / "run")
        classes = len(list(images.iterdir()))
        pipeline = cfg.train_dataloader.dataset.pipeline
        cfg.train_dataloader.dataset = dict(
            type="CustomDataset", data_root=str(images), pipeline=pipeline
        )
        options: dict[str, Any] = {
            "model.backbone.depth": 18,
            "model.backbone.init_cfg.checkpoint": str(ticket18_file),
            "model.head.in_channels": 512,
            "model.head.num_classes": classes,
            "model.head.topk": (1,),
            "data_preprocessor.num_classes": classes,
            "train_dataloader.dataset.pipeline.1.scale": 32,
            "train_dataloader.batch_size": 4,
            "train_dataloader.num_workers": 0,
            "train_dataloader.persistent_workers": False,
            "train_cfg.max_epochs": 1,
            "default_hooks.checkpoint.save_optimizer": False,
            "log_level": "WARNING",
        }
        cfg.merge_from_dict({**options, **overrides})
        for split in ("val", "test"):
            cfg.merge_from_dict({f"{split}_{x}": None for x in ("cfg", "dataloader", "evaluator")})
        return cfg

    return make


def test_a_ticket_is_trained_by_mmpretrains_runner(
    tiny_config: Callable[..., Config], ticket18: lth.Ticket
) -> None:
    cfg = tiny_config()
    Runner.from_cfg(cfg).train()

    final = lth.Ticket.load(Path(cfg.work_dir) / "final.ticket")
    assert final.masks == ticket18.masks
    assert final.meta.parent == ticket18.meta.parent and final.meta.source == CONFIG.stem
    saved = torch.load(Path(cfg.work_dir) / "epoch_1.pth", weights_only=False)["state_dict"]
    for name, mask in ticket18.masks.items():
        assert not saved[f"backbone.{name}"][~mask].any(), name
        assert not torch.equal(saved[f"backbone.{name}"], ticket18.sparse_weights()[name]), name
    # An ordinary checkpoint: the stock model has the same keys.
    del cfg.model.backbone.init_cfg
    init_default_scope("mmpretrain")
    MODELS.build(cfg.model).load_state_dict(saved)


def test_input_that_is_not_the_tickets_is_refused_in_mmpretrains_terms(
    tiny_config: Callable[..., Config],
) -> None:
    cfg = tiny_config(**{"data_preprocessor.to_rgb": False})
    with pytest.raises(lth.TicketError, match=r"data_preprocessor = dict\(mean=.* to_rgb=True\)"):
        Runner.from_cfg(cfg).train()
