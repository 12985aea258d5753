"""Slimming a detector to a share of its time of inference, in detectron2's own trainer."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import lth_plugins as lth

pytestmark = pytest.mark.detectron2

SLIM = {"SLIM.END": 2, "SLIM.PERIOD": 1, "SLIM.SIZE": 64, "MODEL.RPN.POST_NMS_TOPK_TEST": 100}


def test_a_training_ends_with_a_faster_detector(
    train_det: ModuleType, command: Callable[..., Any], tmp_path: Path
) -> None:
    # The command line replaces the budget of the config.
    options = {**SLIM, "SLIM.FLOPS": 0.9}
    train_det.main(command("fpn", "--prune-latency", "0.8", options=options))
    small = torch.load(tmp_path / "out/slim.pth", weights_only=True)["model"]
    whole = torch.load(tmp_path / "out/model_final.pth", weights_only=True)
    assert sum(v.numel() for v in small.values()) < 0.9 * sum(
        v.numel() for v in whole["model"].values()
    )
    assert "backbone.fpn_output2" in whole["trainer"]["hooks"]["SlimHook"]["cost"]["layers"]


def test_two_budgets_are_refused(
    train_det: ModuleType, command: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command("fpn", "--prune-flops", "0.5", "--prune-latency", "0.6")
    assert "two budgets" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command("fpn", "--prune-latency", "0.6", "--imp-rounds", "2")
    assert "leave out --imp-rounds" in capsys.readouterr().err
    with pytest.raises(lth.ConfigError, match="found both, 0.5 and 0.6"):
        train_det.read_config(
            command("fpn", options={**SLIM, "SLIM.FLOPS": 0.5, "SLIM.LATENCY": 0.6})
        )
    with pytest.raises(lth.ConfigError, match="found 0.0"):
        train_det.read_config(command("fpn", "--prune-latency", "0"))
