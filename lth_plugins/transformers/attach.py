"""`attach_ticket`: a ticket on a model of transformers, and its input in the image processor."""

import logging
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lth_plugins.errors import LthError, TicketError
from lth_plugins.masking.attachment import Attachment, attach, attached, check_channels
from lth_plugins.masking.input import ModelInput
from lth_plugins.masking.loading import watch_loading
from lth_plugins.masking.norms import train_norms
from lth_plugins.ticket import Given, Layout, Wording, load_given, locate
from lth_plugins.transformers.input import input_of, settings_for
from lth_plugins.transformers.names import load_by_both_names

logger = logging.getLogger(__name__)

WORDING = Wording(
    path="ticket in attach_ticket",
    trunk_only="outside=False in the Choice for attach_ticket",
    stride_in_1x1="downsample_in_bottleneck=True in its backbone_config",
    stride_in_3x3="downsample_in_bottleneck=False in its backbone_config",
    channels="num_channels={} in its backbone_config",
    other_checkpoint="allow_other_checkpoint=True in attach_ticket",
)
"""What the core's messages call the options of `attach_ticket`."""


def attach_ticket(
    model: PreTrainedModel,
    image_processor: Any,
    ticket: Given,
    *,
    load_weights: bool = True,
    keep_input: bool = False,
    allow_frozen_norm: bool = False,
    allow_other_checkpoint: bool = False,
) -> Attachment:
    """Put a ticket on a model, and its input into the image processor.

    Call it on the whole model, after ``from_pretrained`` and before the Trainer is made. The frozen
    BatchNorm of DETR and its relatives becomes one that trains, under the same state-dict keys:
    the statistics of a dense network are wrong for a sub-network.

    Args:
        model: with a ResNet as its backbone: transformers' ``ResNetBackbone`` or
            ``RTDetrResNetBackbone``, or timm's.
        image_processor: makes the model's input. Its mean and std, where they are its defaults,
            become the ticket's. None, or another kind, only with ``keep_input``.
        ticket: a ticket, a path, a catalog name or ``hf://owner/repo[/file][@sha256:…]``; or a
            `lth_plugins.ticket.Choice`, which also says how to change it.
        load_weights: False keeps the model's own weights, masked.
        keep_input: accept an image processor that returns another input than the ticket's.
        allow_frozen_norm: keep frozen BatchNorm, for a ticket whose statistics are its own.
        allow_other_checkpoint: load a checkpoint that was trained with other masks, or dense, under
            the ticket's; a warning says how many of its weights they zero.

    Returns:
        A handle to verify, detach and export.

    Raises:
        LthError: if there is no such ticket, or it contradicts the model or the image processor.
            Both are unchanged then.
    """
    ticket, own_weights = load_given(ticket, WORDING)
    load_weights &= own_weights
    if not isinstance(model, PreTrainedModel):
        raise TicketError(
            f"expected a model of transformers, not compiled or wrapped yet, found a "
            f"{type(model).__name__}: give the model itself. lth_plugins.attach is for any other"
        )
    layout = _locate(model)
    _check_config(model.config)
    check_channels(layout.arch.channels, ticket.meta.input, WORDING)
    processor = getattr(image_processor, "image_processor", image_processor)
    wanted = ModelInput.of(ticket.meta.input)
    known = hasattr(processor, "image_mean")
    if not (known or keep_input):
        raise TicketError(
            "expected the image processor that makes the model's input, found "
            f"{processor if processor is None else type(processor).__name__}: give it, or write "
            f"keep_input=True in attach_ticket if something else gives the model {wanted}"
        )
    before = attached(model)
    set_before = None if before is None else ModelInput.of(before.meta.input)
    settings = settings_for(processor, wanted, keep_input, set_before) if known else {}

    frozen = {} if allow_frozen_norm else train_norms(model, layout)
    try:
        handle = attach(model, ticket, load_weights, wording=WORDING)
    except LthError:
        for path, norm in frozen.items():
            model.set_submodule(path, norm)
        raise
    for name, value in settings.items():
        setattr(processor, name, value)
    watch_loading(
        model,
        wording=WORDING,
        allow_other_checkpoint=allow_other_checkpoint,
        model_input=input_of(processor) if known else wanted,
    )
    load_by_both_names(model)
    if settings:
        logger.info("Set the ticket's input in the %s: %s", type(processor).__name__, wanted)
    if frozen:
        kind = type(next(iter(frozen.values()))).__name__
        logger.info("Replaced %d %s in the trunk by BatchNorm that trains", len(frozen), kind)
    _warn_of_a_frozen_trunk(model, layout)
    return handle


def _locate(model: nn.Module) -> Layout:
    try:
        return locate(model)
    except LthError as error:
        kinds = dict.fromkeys(type(module).__name__ for module in model.modules())
        backbones = [kind for kind in kinds if kind.endswith("Backbone")]
        found = " and ".join(backbones) or "none of transformers' backbones"
        raise TicketError(
            f"expected a ResNet as the backbone of the {type(model).__name__}, found {found}: "
            "build the model with backbone_config=ResNetConfig(…), RTDetrResNetConfig(…) or "
            f"TimmBackboneConfig(backbone='resnet50', …). {error}"
        ) from error


def _check_config(own: Any) -> None:
    """Refuse a configuration that asks for pre-trained weights of the backbone."""
    for config in (own, getattr(own, "backbone_config", None)):
        kwargs = getattr(config, "backbone_kwargs", None) or {}
        if getattr(config, "use_pretrained_backbone", False) or kwargs.get("pretrained"):
            raise TicketError(
                f"expected a {type(config).__name__} without pre-trained weights of the backbone, "
                "found use_pretrained_backbone=True, so that they would be loaded over the "
                "ticket's: write use_pretrained_backbone=False"
            )


def _warn_of_a_frozen_trunk(model: nn.Module, layout: Layout) -> None:
    keys = [key for name, key in layout.keys.items() if name in layout.arch.prunable]
    if not any(model.get_parameter(key).requires_grad for key in keys):
        logger.warning(
            "All convolutions of the trunk are frozen, as transformers freezes a ResNetBackbone in "
            "DETR and its relatives. To train them write "
            "model.get_submodule(%r).requires_grad_(True)",
            layout.prefix.rstrip("."),
        )
