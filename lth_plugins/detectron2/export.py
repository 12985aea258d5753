"""ONNX: a whole detector of detectron2, checked with onnxruntime against PyTorch."""

from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch
from detectron2.export import TracingAdapter
from detectron2.modeling.meta_arch import GeneralizedRCNN, PanopticFPN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from torch import Tensor, nn

from lth_plugins.deploy.onnx import check_packages, export_traced
from lth_plugins.ticket import TicketError

_OPSET = 16  # the first with RoIAlign as detectron2 has it, aligned


def export_onnx(model: nn.Module, images: Sequence[Tensor], path: str | PathLike[str]) -> float:
    """Write a detector to an ONNX file that was checked on these images.

    The file takes one image, ``image``, and gives what the model's instances have, each as a
    tensor of that name: ``pred_boxes``, in pixels of that image, ``pred_classes`` and ``scores``;
    a Mask R-CNN's ``pred_masks`` are inside their boxes, [N, 1, 28, 28]. It is made by PyTorch's
    tracing exporter: `torch.export` does not take detectron2's lists of dictionaries.

    Args:
        model: an R-CNN or a dense detector, in evaluation mode, on the CPU.
        images: what the model is given as ``image``, [3, height, width]: resized, in the order of
            ``INPUT.FORMAT``, in [0, 255]. The first is traced, all are checked. Height and width
            are free in the file. A warning tells if the model finds nothing in any of them.
        path: the file.

    Returns:
        The largest difference of an output of onnxruntime from PyTorch's, relative to its largest
        value.

    Raises:
        TicketError: if the model is none of these, a package is missing, onnxruntime finds another
            number of objects, or that difference is more than `lth_plugins.deploy.onnx.TOLERANCE`.
            Nothing is written then.
    """
    if isinstance(model, PanopticFPN) or not isinstance(model, GeneralizedRCNN | DenseDetector):
        raise TicketError(
            f"expected an R-CNN or a dense detector, found a {type(model).__name__}: "
            "only these are exported whole, its trunk is by tools/ticket.py export"
        )
    check_packages()
    images = [image.float() for image in images]
    found = [_infer(model, [{"image": image}]) for image in images]
    traced = TracingAdapter(model, [{"image": images[0]}], _infer).eval()
    return export_traced(traced, images, found, path, _OPSET)


@torch.no_grad()
def _infer(model: nn.Module, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
    """What a detector finds in one image, by the names of its fields."""
    if isinstance(model, GeneralizedRCNN):  # which would paste masks into the image
        (found,) = model.inference(inputs, do_postprocess=False)
    else:
        found = model(inputs)[0]["instances"]
    fields = found.get_fields()
    # The adapter would sort them, too.
    return {name: getattr(fields[name], "tensor", fields[name]) for name in sorted(fields)}
