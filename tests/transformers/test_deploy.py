"""Models of transformers made narrower, and as ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import torch

import lth_plugins as lth
import lth_plugins.transformers as lt
from lth_plugins.pruning.structure import Channels, structured
from lth_plugins.transformers.export import _in_the_order_of
from tests.transformers.models import processor_for, small

SEGMENTOR, DETECTOR = "UperNetForSemanticSegmentation", "RTDetrV2ForObjectDetection"


def trained(model: Any) -> Any:
    """With other weights behind the trunk: all queries of a fresh detector score the same."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "backbone" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_a_segmentor_is_slimmed_and_exported(ticket18: lth.Ticket, tmp_path: Path) -> None:
    model, images = small(SEGMENTOR), torch.randn(1, 3, 64, 64)
    lt.attach_ticket(model, processor_for(SEGMENTOR), ticket18)
    slim = lth.slim(model, images, flops=0.6, forward=lambda m: m(pixel_values=images))
    sizes = [sum(p.numel() for p in one.parameters()) for one in (slim, model)]
    assert sizes[0] < 0.8 * sizes[1]
    lth.attached(slim).verify()
    assert lt.export_onnx(slim, images, tmp_path / "slim.onnx") < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "slim.onnx")
    assert [entry.name for entry in session.get_inputs()] == ["images"]
    assert [entry.name for entry in session.get_outputs()] == ["logits"]


def test_a_detector_is_compacted_and_exported(ticket18: lth.Ticket, tmp_path: Path) -> None:
    model, images = trained(small(DETECTOR)), torch.randn(1, 3, 64, 64)
    channels = structured(lth.Ticket.dense(ticket18.weights), Channels(density=0.3, multiple=8))
    lt.attach_ticket(model, processor_for(DETECTOR), channels)
    compact = lth.compact(model)
    assert sum(p.numel() for p in compact.parameters()) < sum(p.numel() for p in model.parameters())
    assert lt.export_onnx(compact, images, tmp_path / "model.onnx") < 1e-5


def test_queries_are_compared_in_whatever_order_and_each_once() -> None:
    logits, boxes = torch.randn(2, 5, 3), torch.rand(2, 5, 4)
    order = torch.tensor([3, 1, 0, 4, 2])
    found = [logits[:, order], boxes[:, order]]
    aligned = _in_the_order_of([logits, boxes], found)
    assert torch.equal(aligned[0], logits) and torch.equal(aligned[1], boxes)
    found[0][:, 1], found[1][:, 1] = found[0][:, 0], found[1][:, 0]
    assert not torch.equal(_in_the_order_of([logits, boxes], found)[0], logits)
