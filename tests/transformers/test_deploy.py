"""Models of transformers made narrower, and as ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import lth_plugins as lth
import lth_plugins.transformers as lt
from tests.transformers.models import processor_for, small

KIND = "UperNetForSemanticSegmentation"


class Logits(nn.Module):
    """What an ONNX file holds: images in, logits out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images).logits


def test_a_segmentor_is_slimmed_and_exported(ticket18: lth.Ticket, tmp_path: Path) -> None:
    model, images = small(KIND), torch.randn(1, 3, 64, 64)
    lt.attach_ticket(model, processor_for(KIND), ticket18)
    slim = lth.slim(model, images, flops=0.6, forward=lambda m: m(pixel_values=images))
    sizes = [sum(p.numel() for p in one.parameters()) for one in (slim, model)]
    assert sizes[0] < 0.8 * sizes[1]
    lth.attached(slim).verify()
    wanted = Logits(slim.eval())
    path = tmp_path / "slim.onnx"
    torch.onnx.export(wanted, (images,), path, dynamo=True, external_data=False, verbose=False)
    found = onnxruntime.InferenceSession(path).run(None, {"images": images.numpy()})[0]
    with torch.no_grad():
        assert wanted(images).numpy() == pytest.approx(found, abs=1e-5)
