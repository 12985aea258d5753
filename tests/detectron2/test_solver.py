"""The optimizer of a fine-tuning: AdamW, and a learning rate of its own for the trunk."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer as stock

import lth_plugins as lth
from lth_plugins.detectron2 import add_solver_config, apply_ticket_input, build_optimizer
from lth_plugins.ticket import locate

pytestmark = pytest.mark.detectron2


@pytest.fixture
def solver_cfg(tiny_cfg: Callable[..., CfgNode]) -> Callable[..., CfgNode]:
    def make(kind: str, **solver: Any) -> CfgNode:
        """A small config with these keys of ``SOLVER``."""
        cfg = tiny_cfg(kind)
        apply_ticket_input(cfg)
        add_solver_config(cfg)
        cfg.merge_from_list([x for key, v in solver.items() for x in (f"SOLVER.{key}", v)])
        return cfg

    return make


def rates(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    return {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("kind", ["fpn", "c4"])
def test_the_trunk_has_a_learning_rate_of_its_own(
    kind: str, solver_cfg: Callable[..., CfgNode]
) -> None:
    cfg = solver_cfg(kind, BASE_LR=0.5, BACKBONE_MULTIPLIER=0.125)
    model = build_model(cfg)
    found = rates(build_optimizer(cfg, model))
    trunk = set(locate(model).keys.values())
    assert len(trunk) > 60 and not any("fpn" in name for name in trunk)
    for name, parameter in model.named_parameters():
        assert found[id(parameter)] == (0.0625 if name in trunk else 0.5), name


def test_adamw_clips_gradients_as_detectron2_does(solver_cfg: Callable[..., CfgNode]) -> None:
    cfg = solver_cfg("fpn", OPTIMIZER="ADAMW", BASE_LR=0.001, WEIGHT_DECAY=0.05)
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    optimizer = build_optimizer(cfg, build_model(cfg))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert type(optimizer).__name__ == "AdamWWithGradientClip"
    assert {group["weight_decay"] for group in optimizer.param_groups} >= {0.05}


@pytest.mark.parametrize("has_keys", [True, False])
def test_the_default_is_detectron2s_own(has_keys: bool, solver_cfg: Callable[..., CfgNode]) -> None:
    cfg = solver_cfg("fpn")
    if not has_keys:
        del cfg.SOLVER["OPTIMIZER"], cfg.SOLVER["BACKBONE_MULTIPLIER"]
    model = build_model(cfg)
    ours, theirs = build_optimizer(cfg, model), stock(cfg, model)
    assert repr(ours) == repr(theirs) and rates(ours) == rates(theirs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["SOLVER.OPTIMIZER", "adam"], "unknown SOLVER.OPTIMIZER 'adam'; known are SGD, ADAMW"),
        (["SOLVER.BACKBONE_MULTIPLIER", "-1."], "BACKBONE_MULTIPLIER to be 0 or more, found -1"),
    ],
)
def test_invalid_settings_are_refused_before_anything_is_written(
    options: list[str], message: str, train_det: ModuleType, command: Callable[..., object]
) -> None:
    args = command("fpn", options=dict([options]))
    with pytest.raises(lth.ConfigError, match=message):
        train_det.read_config(args)
