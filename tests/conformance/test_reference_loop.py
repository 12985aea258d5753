"""torchvision's reference loop for detectors, as its users run it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lth_plugins as lth
from lth_plugins.resilience.sigterm import Stopped
from tests.conformance.test_trainers import stop
from tests.conformance.trainers import Torchvision, Training, at


def test_torchvisions_reference_loop_resumes_bit_for_bit(
    scenes: Path, ticket18_file: Path, ticket18: lth.Ticket, tmp_path: Path
) -> None:
    """With its warm-up, mixed precision and the scaler of gradients."""
    # Not FCOS: where it convolves one pixel, PyTorch 2.11's bfloat16 leaves gradients to chance.
    host = Torchvision("fasterrcnn_resnet18_fpn")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    host.train(Training(scenes, whole, ticket18_file, 3, options=["amp"]))
    with pytest.raises(Stopped):
        stopping = at({2: stop})
        host.train(Training(scenes, stopped, ticket18_file, 3, stopping, options=["amp"]))
    host.train(Training(scenes, stopped, ticket18_file, 3, options=["amp"], resume=True))
    last = [torch.load(one / "model_3.pth", weights_only=True) for one in (whole, stopped)]
    expected, found = last
    for name, value in expected["model"].items():
        assert torch.equal(found["model"][name], value), name
    expected, found = (checkpoint["parts"] for checkpoint in last)
    assert found["lr_scheduler"] == expected["lr_scheduler"]
    assert found["scaler"] == expected["scaler"] and expected["scaler"]["scale"] > 1
    for folder in (whole, stopped):
        assert lth.Ticket.load(folder / "final.ticket").masks == ticket18.masks
