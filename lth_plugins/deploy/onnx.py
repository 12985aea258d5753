"""ONNX: a model written by PyTorch's own exporter, and checked with onnxruntime against it.

`resnet` gives the trunk of any host's checkpoint or ticket as a plain module. What is no module of
tensors, such as a detector of detectron2, has its own: `lth_plugins.detectron2.export_onnx`.
"""

import logging
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from lth_plugins.errors import RunError, TicketError
from lth_plugins.masking.narrowing import narrow_to
from lth_plugins.ticket.arch import STAGES, ResNet
from lth_plugins.ticket.foreign.convert import report_choice
from lth_plugins.ticket.keys import State
from lth_plugins.ticket.trunk import read_trunk

logger = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""How far onnxruntime's outputs may be from PyTorch's, relative to the largest value."""


class Trunk(nn.Module):
    """A ResNet's features after each stage, the highest resolution first.

    Args:
        resnet: torchvision's or timm's.
    """

    def __init__(self, resnet: nn.Module) -> None:
        super().__init__()
        stem = ("conv1", "bn1", "relu" if hasattr(resnet, "relu") else "act1", "maxpool")
        self.stem = nn.Sequential(*(getattr(resnet, name) for name in stem))
        self.stages = nn.ModuleList(getattr(resnet, stage) for stage in STAGES)
        self.train(resnet.training)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Features of images, [N, channels, height, width], normalised as the trunk expects."""
        features = [self.stem(images)]
        for stage in self.stages:
            features.append(stage(features[-1]))
        return tuple(features[1:])


def resnet(state: State, prefix: str | None = None) -> nn.Module:
    """torchvision's ResNet, or timm's where torchvision has none, with the trunk of a state dict.

    Args:
        state: in any known dialect, also of a compacted model, whose widths the ResNet has then;
            bottlenecks must have their stride in the 3x3 convolution. Masks and thresholds in it
            are applied.
        prefix: which trunk, if there are several (`locate`).

    Raises:
        TicketError: if no known layout fits, the trunk holds more than a plain ResNet's or has its
            strides elsewhere, or timm is needed and not installed, or has no such network either.
    """
    trunk = read_trunk(state, prefix, compacted=True)
    arch, weights = trunk.arch, trunk.weights
    check_full_width(arch)
    report_choice(trunk.layout, state)
    if trunk.layout.dialect.name == "caffe2" and arch.name.startswith("resnet") and arch.bottleneck:
        raise TicketError(
            f"expected a {arch.name} with its strides in the 3x3 convolutions, found Caffe2's "
            "names, whose ResNets have them in the first 1x1 ones: export the host's own model "
            "with lth_plugins.deploy.onnx.export_onnx"
        )
    model = untrained(arch)
    narrow_to(model, weights)
    model.load_state_dict(weights, strict=False)  # counters may be missing
    return model


def check_full_width(arch: ResNet) -> None:
    """Raise ``TicketError`` for a slimmed trunk, which is no ResNet that others have."""
    if arch.widths:
        raise TicketError(
            f"expected a {arch.name} of the full width or a compacted one, found a slimmed one: "
            "export the whole model, of a detector with --eval-only --onnx"
        )


def untrained(arch: ResNet) -> nn.Module:
    """torchvision's ResNet, or timm's where torchvision has none, to evaluate, without classifier.

    Raises:
        RunError: if timm is needed and not installed.
        TicketError: if timm has no such network either.
    """
    if not arch.deep_stem:
        model = torchvision.models.get_model(arch.name, weights=None)
        if arch.channels != 3:
            model.conv1 = nn.Conv2d(arch.channels, 64, 7, stride=2, padding=3, bias=False)
        model.fc = nn.Identity()
        return model.eval()
    try:
        import timm
    except ImportError:
        raise RunError(f"a {arch.name} needs timm: pip install timm") from None
    if not timm.is_model(arch.name):
        raise TicketError(
            f"neither torchvision nor timm has a {arch.name}: export the host's own model with "
            "lth_plugins.deploy.onnx.export_onnx"
        )
    return timm.create_model(arch.name, num_classes=0, in_chans=arch.channels).eval()


def export_onnx(
    model: nn.Module,
    images: Tensor,
    path: str | PathLike[str],
    reference: nn.Module | None = None,
) -> float:
    """Write a model to an ONNX file that was checked on these images.

    Args:
        model: in evaluation mode; called with images, returns a tensor or a tuple of them.
        images: what to trace and check it with, [N, channels, height, width], N of 2 or more. N,
            height and width are free in the file.
        path: the file; weights of more than 2 GB go beside it.
        reference: the model whose outputs the file must have; by default that which is written.

    Returns:
        The largest difference of an output of onnxruntime from PyTorch's, relative to its largest
        value.

    Raises:
        RunError: if a package is missing.
        TicketError: if that difference is more than `TOLERANCE`; nothing is written then.
    """
    check_packages()
    sizes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    with torch.no_grad():
        program = torch.onnx.export(
            model, (images,), dynamo=True, dynamic_shapes=(sizes,), verbose=False
        )
        expected = (model if reference is None else reference)(images)
    assert program is not None
    wanted = (expected,) if isinstance(expected, Tensor) else tuple(expected)
    return write_checked(Path(path), program.save, [(images, wanted)])


def export_traced(
    model: nn.Module,
    images: Sequence[Tensor],
    found: Sequence[Mapping[str, Tensor]],
    path: str | PathLike[str],
    opset: int,
) -> float:
    """Write a detector, which finds another number of objects in each image, by tracing it.

    The file takes one image, ``image``; its height and width, and the number of objects, are free.
    A warning tells if there is no object in any image.

    Args:
        model: in evaluation mode; called with an image, [3, height, width], returns tensors.
        images: the first is traced, all are checked.
        found: what PyTorch finds in each, by the outputs' names, in the model's order.
        path: the file.
        opset: of the file.

    Returns:
        As `export_onnx`.

    Raises:
        RunError, TicketError: as `export_onnx`; also if another number of objects is found.
    """
    check_packages()
    if not any(len(value) for fields in found for value in fields.values()):
        logger.warning(
            "The detector finds no object in any of the %d images that %s is checked on: boxes, "
            "classes and scores are not checked. Give images it finds something in",
            *(len(images), path),
        )
    names = list(found[0])
    axes = {"image": {1: "height", 2: "width"}, **{name: {0: "objects"} for name in names}}

    @torch.no_grad()
    def write(file: str) -> None:
        torch.onnx.export(
            model,
            (images[0],),
            file,
            dynamo=False,
            opset_version=opset,
            input_names=["image"],
            output_names=names,
            dynamic_axes=axes,
        )

    cases = zip(images, (tuple(fields.values()) for fields in found), strict=True)
    return write_checked(Path(path), write, cases)


def check_packages() -> None:
    """Raise `RunError` if a package is missing that an export needs."""
    try:
        import onnx  # noqa: F401 (PyTorch's exporters import it)
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise RunError(f"{error}: pip install 'lth_plugins[export]'") from None


Align = Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]
"""Outputs that are wanted, and those that were found; returns the latter."""


def write_checked(
    path: Path,
    write: Callable[[str], object],
    cases: Iterable[tuple[Tensor, Sequence[Tensor]]],
    align: Align | None = None,
) -> float:
    """Write an ONNX file, whose model has one input, if onnxruntime computes what PyTorch does.

    Args:
        path: the file.
        write: writes it, and what goes beside it, to the path that it is given.
        cases: inputs, and PyTorch's outputs of each.
        align: gives onnxruntime's outputs the order of PyTorch's, where that is no promise.

    Returns:
        The largest difference of an output from PyTorch's, relative to its largest value.

    Raises:
        TicketError: if shapes differ, or that difference is more than `TOLERANCE`. An older file is
            as it was then.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        unchecked = Path(folder, path.name)
        write(str(unchecked))
        off = _check(unchecked, cases, align)
        if not off <= TOLERANCE:
            raise TicketError(
                f"expected onnxruntime to compute what PyTorch does, found outputs {off:.2g} of "
                f"the largest value apart: {path} is not written"
            )
        for file in Path(folder).iterdir():
            file.replace(path.parent / file.name)
    logger.info("%s is %.1g from PyTorch's outputs", path, off)
    return off


def _check(
    path: Path, cases: Iterable[tuple[Tensor, Sequence[Tensor]]], align: Align | None
) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    off = 0.0
    for images, wanted in cases:
        found = [torch.from_numpy(got) for got in session.run(None, {entry.name: images.numpy()})]
        found = found if align is None else align(wanted, found)
        off = max(off, *(_apart(got, want) for got, want in zip(found, wanted, strict=True)))
    return off


def _apart(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest value.

    Infinite if shapes differ, or there is one that is not a number.
    """
    if found.shape != wanted.shape:
        return math.inf
    if wanted.numel() == 0:
        return 0.0
    apart = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))
    return math.inf if math.isnan(apart) else apart
