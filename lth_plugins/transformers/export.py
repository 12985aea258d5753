"""ONNX files of transformers' detectors and segmentors, checked with onnxruntime."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lth_plugins.deploy.onnx import check_packages, write_checked

_OUTPUTS = ("logits", "pred_boxes", "class_queries_logits", "masks_queries_logits")
_TRACED = ("rt_detr_v2",)  # PyTorch 2.11's other exporter knows no aten._is_all_true
_OPSET = 17


def export_onnx(model: PreTrainedModel, images: Tensor, path: str | PathLike[str]) -> float:
    """Write a detector or segmentor to an ONNX file that was checked on these images.

    The file takes images of this number and size, ``images``, and gives what the image processor's
    ``post_process_…`` functions read: ``logits`` and a detector's ``pred_boxes``, or
    ``class_queries_logits`` and ``masks_queries_logits``. A detector that chooses its queries by
    scores may give them in another order.

    Args:
        model: on the CPU; a compacted or slimmed one, too.
        images: as the image processor makes them, [N, channels, height, width].
        path: the file.

    Returns:
        The largest difference of an output of onnxruntime from PyTorch's, relative to its largest
        value.

    Raises:
        RunError, TicketError: as `lth_plugins.deploy.onnx.export_onnx`.
    """
    check_packages()
    with torch.no_grad():
        found = model.eval()(pixel_values=images)
        names = [name for name in _OUTPUTS if getattr(found, name, None) is not None]
        wanted = [getattr(found, name) for name in names]
    options: dict[str, Any] = {"input_names": ["images"]}
    options |= {"dynamo": True, "external_data": False, "verbose": False}
    if model.config.model_type in _TRACED:
        options |= {"dynamo": False, "opset_version": _OPSET}

    @torch.no_grad()
    def write(file: str) -> None:
        torch.onnx.export(_Outputs(model, names), (images,), file, output_names=names, **options)

    align = _in_the_order_of if "pred_boxes" in names else None
    return write_checked(Path(path), write, [(images, wanted)], align)


class _Outputs(nn.Module):
    """Images in, tensors out."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, names
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        found = self.model(pixel_values=images)
        return tuple(getattr(found, name) for name in self.names)


def _in_the_order_of(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> list[Tensor]:
    """What was found of each query, [N, queries, …], in the order of the nearest one wanted."""
    apart = torch.cdist(torch.cat(list(wanted), 2), torch.cat(list(found), 2), p=torch.inf)
    order = apart.argmin(2)
    if any(len(row.unique()) < len(row) for row in order):  # two wanted are near the same one
        return list(found)
    return [torch.stack([each[row] for each, row in zip(one, order, strict=True)]) for one in found]
