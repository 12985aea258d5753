"""Slimming a segmentor to a share of its time of inference, by mmengine's Runner."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.mmseg


def test_a_training_ends_with_a_faster_segmentor(
    tiny_config: Callable[..., Any], tool: Callable[..., Any], tmp_path: Path, capsys: Any
) -> None:
    cfg = tiny_config({"train_cfg.max_iters": 3})
    file, run, train = tmp_path / "config.py", tmp_path / "run", tool("seg")
    # The command line replaces the budget of the config.
    cfg.custom_hooks = [*cfg.custom_hooks, {"type": "SlimHook", "flops": 0.9, "period": 1}]
    cfg.dump(file)
    with pytest.raises(SystemExit):
        train.main([f"{file}", "--prune-flops", "0.5", "--prune-latency", "0.6"])
    assert "two budgets" in capsys.readouterr().err
    assert train.main([f"{file}", "--prune-latency", "0.8", "--work-dir", f"{run}"]) == 0
    small = torch.load(run / "slim.pth", weights_only=True)["state_dict"]
    whole = torch.load(run / "iter_3.pth", weights_only=False)
    assert sum(v.numel() for v in small.values()) < 0.9 * sum(
        v.numel() for v in whole["state_dict"].values()
    )
    assert "decode_head.convs.0.conv" in whole["slimming"]["cost"]["layers"]
