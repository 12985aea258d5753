"""Tickets as the trunks of torchvision's detectors and segmentors.

`detection` and `segmentation` build torchvision's own models by torchvision's names, with BatchNorm
that trains, and put a ticket on them. The name says the family and the trunk: what torchvision has
for ResNet-50 (``fasterrcnn_resnet50_fpn_v2``) is built for every ResNet of torchvision
(``fasterrcnn_resnet18_fpn_v2``). The training loop stays the user's, as torchvision's references
are scripts.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.mask_rcnn import MaskRCNN
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3
from torchvision.models.segmentation.fcn import FCN, FCNHead
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.ops.misc import FrozenBatchNorm2d

from lth_plugins.deploy import onnx
from lth_plugins.errors import ConfigError, unknown
from lth_plugins.masking.attachment import attach
from lth_plugins.masking.hosting import frozen_statistics, has_statistics, warn_if_untested
from lth_plugins.masking.input import ModelInput, check_input, check_rgb
from lth_plugins.masking.loading import watch_loading
from lth_plugins.pruning.search import scripted
from lth_plugins.pruning.search.scripted import Build, Fit
from lth_plugins.pruning.search.search import Search
from lth_plugins.ticket import Given, InputSpec, Ticket, TicketError, Wording, load_given
from lth_plugins.ticket.arch import STAGES

warn_if_untested("torchvision", "0.26", "0.26")

DETECTORS: Mapping[str, type[nn.Module]] = {
    "fasterrcnn": FasterRCNN,
    "maskrcnn": MaskRCNN,
    "retinanet": RetinaNet,
    "fcos": FCOS,
}
SEGMENTORS: Mapping[str, tuple[type[nn.Module], Callable[[int, int], nn.Module]]] = {
    "deeplabv3": (DeepLabV3, DeepLabHead),
    "fcn": (FCN, FCNHead),
}


def detection(
    name: str, ticket: Given, *, allow_other_checkpoint: bool = False, **options: Any
) -> nn.Module:
    """torchvision's detector of this name, on a ticket.

    The model normalises images itself: ``image_mean`` and ``image_std`` are the ticket's. All of it
    trains.

    Args:
        name: ``fasterrcnn_…_fpn``, ``maskrcnn_…_fpn``, ``retinanet_…_fpn`` or ``fcos_…_fpn`` with
            the ticket's architecture for …, and ``_v2`` where torchvision has one.
        ticket: what to train. A `Choice` also says how to change it.
        allow_other_checkpoint: load checkpoints of other tickets, too, with a warning.
        options: those of torchvision's function, such as ``num_classes`` and ``min_size``.

    Returns:
        A model of torchvision's class with the stock keys. It refuses checkpoints that were trained
        with another ticket or input.

    Raises:
        ConfigError: if the name or an option is unknown, or an option contradicts a ticket.
        TicketError: if the ticket cannot be read, is of another trunk or wants another input.
    """
    family, arch, stock = _parsed(name)
    _check_options(options, _options_of(DETECTORS[family]))
    layers = options.pop("trainable_backbone_layers", None)
    if layers not in (None, len(STAGES) + 1):
        raise ConfigError(
            f"expected trainable_backbone_layers of {len(STAGES) + 1} or none, found {layers!r}: "
            "pruned stages must adapt. To freeze one all the same, write "
            "model.backbone.body.layer1.requires_grad_(False) after this"
        )
    chosen, load_weights = _load(ticket, arch, name)
    spec = chosen.meta.input
    mean, std = options.get("image_mean"), options.get("image_std")
    asked = InputSpec(
        spec.format, spec.mean if mean is None else mean, spec.std if std is None else std
    )
    advice = ": leave out image_mean and image_std, which are the ticket's by default"
    check_input("the ticket", ModelInput.of(spec), ModelInput.of(asked), advice)
    options |= {"image_mean": list(asked.mean), "image_std": list(asked.std)}

    model: Any = torchvision.models.get_model(stock, weights=None, weights_backbone=None, **options)
    if arch != _STOCK:
        trunk = torchvision.models.get_model(arch, weights=None)
        model.backbone = _on_trunk(model.backbone, trunk)
    return _with_ticket(model, chosen, load_weights, allow_other_checkpoint)


def segmentation(
    name: str,
    ticket: Given,
    *,
    num_classes: int = 21,
    aux_loss: bool = False,
    allow_other_checkpoint: bool = False,
    **options: Any,
) -> nn.Module:
    """torchvision's segmentor of this name, on a ticket.

    torchvision normalises in the data's transforms: give them ``mean`` and ``std`` of
    ``lth_plugins.attached(model).meta.input``.

    Args:
        name: ``deeplabv3_…`` or ``fcn_…`` with the ticket's architecture for …. Trunks of
            bottlenecks end at stride 8, as torchvision's do; others, whose blocks torchvision does
            not dilate, at stride 32.
        ticket: as `detection`'s.
        num_classes: with the background.
        aux_loss: whether it also predicts from layer3.
        allow_other_checkpoint: as `detection`'s.
        options: none; named here to refuse those of torchvision that a ticket contradicts.

    Returns:
        As `detection`.

    Raises:
        ConfigError, TicketError: as `detection`.
    """
    family, _, arch = name.partition("_")
    if family not in SEGMENTORS or not arch:
        raise unknown("segmentor", name, [f"{known}_{_STOCK}" for known in SEGMENTORS])
    _check_options(options, ("num_classes", "aux_loss", *_REFUSED))
    chosen, load_weights = _load(ticket, arch, name)
    dilated = chosen.arch.bottleneck
    trunk: Any = torchvision.models.get_model(
        arch, weights=None, replace_stride_with_dilation=[False, dilated, dilated]
    )
    returned = {"layer4": "out", **({"layer3": "aux"} if aux_loss else {})}
    kind, head = SEGMENTORS[family]
    auxiliary = FCNHead(trunk.inplanes // 2, num_classes) if aux_loss else None
    body = torchvision.models._utils.IntermediateLayerGetter(trunk, returned)
    model = kind(body, head(trunk.inplanes, num_classes), auxiliary)
    return _with_ticket(model, chosen, load_weights, allow_other_checkpoint)


def task_search(
    build: Build, fit: Fit, ticket: Given, out: str | PathLike[str], **settings: Any
) -> Search:
    """`lth_plugins.task_search` for the models above, whose necks and predictors it knows.

    ``scope="backbone+neck"`` prunes the feature pyramid, too, and ``"all"`` also the heads, but not
    the layers that predict classes, boxes and masks.
    """
    dense, _ = load_given(ticket, _WORDING, original=True)
    names = {"neck": "backbone.fpn.", "predictors": _PREDICTORS}
    return scripted.task_search(build, fit, dense, out, **{**names, **settings})


def export_onnx(model: nn.Module, images: Sequence[Tensor], path: str | PathLike[str]) -> float:
    """Write a detector or segmentor to an ONNX file that was checked on these images.

    A detector's file takes one image in [0, 1], ``image``, and gives ``boxes``, ``scores``,
    ``labels`` and a Mask R-CNN's ``masks``. A segmentor's takes normalised ones of one size, and
    gives logits.

    Args:
        model: in evaluation mode, on the CPU.
        images: as the model takes them, [3, height, width] each; of a segmentor two or more.
        path: the file.

    Returns:
        The largest difference of an output of onnxruntime from PyTorch's, relative to its largest
        value.

    Raises:
        RunError, TicketError: as `lth_plugins.deploy.onnx.export_onnx`.
    """
    if isinstance(model, DeepLabV3 | FCN):
        return onnx.export_onnx(_Logits(model), torch.stack(list(images)), path)
    with torch.no_grad():
        found = [dict(sorted(model([image])[0].items())) for image in images]
    return onnx.export_traced(_OneImage(model), images, found, path, _OPSET)


class _OneImage(nn.Module):
    """What a detector finds in one image, in the order of the names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(value for _, value in sorted(self.model([image])[0].items()))


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)["out"]


_WORDING = Wording(path="ticket")
_STOCK = "resnet50"  # the trunk of torchvision's own detectors
_OPSET = 16  # the first with RoIAlign as torchvision has it
_PREDICTORS = (
    *("*.cls_logits", "*.bbox_pred", "*.bbox_reg", "*.bbox_ctrness", "*.cls_score"),
    *("*.mask_fcn_logits", "classifier.4", "aux_classifier.4"),
)
_REFUSED = ("weights", "weights_backbone", "pretrained", "pretrained_backbone", "norm_layer")


def _parsed(name: str) -> tuple[str, str, str]:
    """The family and the trunk in a detector's name, and torchvision's name of it on a ResNet-50.

    Raises:
        ConfigError: if torchvision has no such detector.
    """
    known = set(torchvision.models.list_models(torchvision.models.detection))
    match = re.fullmatch(r"([^_]+)_(.+)_fpn(|_v2)", name)
    stock = f"{match[1]}_{_STOCK}_fpn{match[3]}" if match else name
    if match is None or match[1] not in DETECTORS or stock not in known:
        names = (f"{family}_{_STOCK}_fpn{v2}" for family in DETECTORS for v2 in ("", "_v2"))
        raise unknown("detector", name, [one for one in names if one in known])
    return match[1], match[2], stock


def _options_of(kind: type[nn.Module]) -> set[str]:
    """What torchvision's function passes on; its own ``**kwargs`` ignores what is unknown."""
    takes = [one for one in kind.__mro__ if one in DETECTORS.values()]
    named = {"num_classes", "progress", "trainable_backbone_layers", *_REFUSED}
    for one in (*takes, GeneralizedRCNNTransform):
        named |= set(inspect.signature(one).parameters)
    return named - {"backbone", "kwargs"}


def _check_options(options: dict[str, Any], known: Any) -> None:
    """Refuse options that are unknown, or that would undo the ticket; drop those that ask nothing.

    Raises:
        ConfigError: naming the first.
    """
    for option in options:
        if option not in known:
            raise unknown("option", option, sorted(known))
    norm = options.pop("norm_layer", nn.BatchNorm2d)
    name = f"norm_layer={getattr(norm, '__name__', norm)}"
    if norm is FrozenBatchNorm2d:
        own = "replace its BatchNorm after this"
        raise ConfigError(frozen_statistics(name, "write norm_layer=torch.nn.BatchNorm2d", own))
    if norm is not nn.BatchNorm2d:
        raise ConfigError(
            f"expected norm_layer=torch.nn.BatchNorm2d, whose statistics are part of a ticket, "
            f"found {name}: leave it out. For several GPUs write "
            "torch.nn.SyncBatchNorm.convert_sync_batchnorm(model) after this"
        )
    for option in _REFUSED:
        if value := options.pop(option, None):
            raise ConfigError(
                f"{option}={value!r} would be loaded over the ticket: leave it out. Weights to "
                "start from are made a ticket (`tools/ticket.py import`, lth_plugins.Ticket.dense)"
            )


def _load(ticket: Given, arch: str, name: str) -> tuple[Ticket, bool]:
    """The ticket of a model, and whether its weights are used.

    Raises:
        ConfigError: if torchvision has no such trunk.
        TicketError: if the ticket cannot be read, is not of the trunk that the model's name says,
            or not for RGB.
    """
    loaded, load_weights = load_given(ticket, _WORDING)
    own = loaded.meta.arch
    if arch != own:
        raise TicketError(
            f"expected a ticket of {arch} for {name!r}, found one of {own}: write "
            f"{name.replace(arch, own)!r}, or give a ticket of {arch}"
        )
    if arch not in torchvision.models.list_models():
        raise ConfigError(
            f"torchvision has no {arch}: use the ticket in a host that has, or take one of "
            "another architecture"
        )
    check_rgb(loaded.meta.input, "torchvision's transforms give models RGB")
    return loaded, load_weights


def _on_trunk(stock: Any, trunk: Any) -> nn.Module:
    """A feature pyramid as the stock one, on another trunk."""
    widths = [trunk.inplanes // 2 ** (4 - int(layer[-1])) for layer in stock.body.return_layers]
    extra = stock.fpn.extra_blocks
    if isinstance(extra, LastLevelP6P7) and not extra.use_P5:
        extra = LastLevelP6P7(trunk.inplanes, stock.out_channels)
    norm = nn.BatchNorm2d if has_statistics(stock.fpn) else None
    layers = stock.body.return_layers
    return BackboneWithFPN(trunk, layers, widths, stock.out_channels, extra, norm)


def _with_ticket(
    model: nn.Module, ticket: Ticket, load_weights: bool, allow_other_checkpoint: bool
) -> nn.Module:
    attach(model, ticket, load_weights)
    watch_loading(
        model,
        allow_other_checkpoint=allow_other_checkpoint,
        model_input=ModelInput.of(ticket.meta.input),
    )
    return model
