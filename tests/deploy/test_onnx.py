"""ONNX files: onnxruntime computes what PyTorch does, on real digit scenes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from torch import Tensor, nn

import lth_plugins as lth
from lth_plugins.deploy.onnx import Trunk, export_onnx, resnet
from lth_plugins.digits import render_scene
from lth_plugins.pruning.structure import Channels, structured
from lth_plugins.ticket.dialects import from_torchvision


def scenes(side: int, count: int = 2) -> Tensor:
    """Images of digits, normalised."""
    rng = np.random.default_rng(0)
    drawn = [render_scene(rng, "test", min_size=side, max_size=side).image for _ in range(count)]
    images = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 255
    return (images - 0.45) / 0.225


@pytest.fixture(scope="module")
def channels18(ticket18: lth.Ticket) -> lth.Ticket:
    return structured(ticket18, Channels(multiple=8))


def run(path: Path, images: Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images.numpy()})


def test_the_features_are_the_hosts(channels18: lth.Ticket) -> None:
    model = timm.create_model("resnet18", features_only=True, out_indices=(1, 2, 3, 4))
    lth.attach(model, channels18)
    spelled = from_torchvision(channels18.sparse_weights(), channels18.arch, "detectron2", "b.")
    with torch.no_grad():
        wanted = model.eval()(scenes(64))
        found = Trunk(lth.compact(resnet(spelled)))(scenes(64))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, wanted, strict=True))


def test_what_onnxruntime_computes_otherwise_is_refused(tmp_path: Path) -> None:
    class Noise(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images + torch.randn_like(images)

    (tmp_path / "noise.onnx").write_text("an older one")
    with pytest.raises(lth.TicketError, match="noise.onnx is not written"):
        export_onnx(Noise().eval(), scenes(64), tmp_path / "noise.onnx")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["an older one"]


def test_what_is_no_number_is_refused(tmp_path: Path) -> None:
    class Logarithm(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return (images - 100).log()

    with pytest.raises(lth.TicketError, match="found outputs inf"):
        export_onnx(Logarithm().eval(), scenes(64), tmp_path / "log.onnx")


def test_the_tool_exports_the_compacted_trunk_of_a_hosts_checkpoint(
    ticket_tool: Callable[..., Any], channels18: lth.Ticket, tmp_path: Path
) -> None:
    state = from_torchvision(channels18.sparse_weights(), channels18.arch, "mmseg", "backbone.")
    torch.save({"state_dict": state}, tmp_path / "iter_1.pth")
    out = tmp_path / "trunk.onnx"
    done = ticket_tool("export", tmp_path / "iter_1.pth", out, "--size", 64)
    assert "onnxruntime's outputs are within" in done.stdout, done.stderr
    assert out.stat().st_size < 0.6 * 4 * sum(value.numel() for value in state.values())

    masked = Trunk(resnet(state))
    for images in (scenes(64), scenes(96, count=1)):  # any number, any size
        with torch.no_grad():
            expected = masked(images)
        for got, want in zip(run(out, images), expected, strict=True):
            assert torch.allclose(torch.from_numpy(got), want, atol=1e-4)


def test_a_compacted_checkpoint_has_the_same_trunk(channels18: lth.Ticket) -> None:
    small = lth.compact(resnet(channels18.sparse_weights()))
    spelled = from_torchvision(small.state_dict(), channels18.arch, "detectron2", "backbone.")
    again = lth.compact(resnet(spelled))  # as the tool exports it
    with torch.no_grad():
        features = zip(Trunk(small)(scenes(64)), Trunk(again)(scenes(64)), strict=True)
        assert all(torch.equal(one, other) for one, other in features)


def test_what_is_wider_or_uneven_inside_is_no_compacted_checkpoint(channels18: lth.Ticket) -> None:
    state = lth.compact(resnet(channels18.sparse_weights())).state_dict()
    for width in (63, 65):
        wrong = {**state, "layer1.0.conv1.weight": torch.zeros(width, 64, 3, 3)}
        with pytest.raises(lth.TicketError, match="of another shape .such as layer1.0"):
            resnet(wrong)
