"""Tickets in a LazyConfig: wrap the model, or its backbone, in `with_ticket`."""

import logging
from os import PathLike
from typing import Any, TypeVar

from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from lth_plugins.masking.attachment import attach
from lth_plugins.masking.hosting import (
    frozen_stages,
    frozen_statistics,
    has_statistics,
    no_statistics,
    without_ticket,
)
from lth_plugins.masking.input import ModelInput, check_input, rounded
from lth_plugins.masking.loading import refuse_to_run, watch_loading
from lth_plugins.ticket import Choice, NotFound, TicketError, Wording, locate
from lth_plugins.ticket.meta import COLOURS

logger = logging.getLogger(__name__)

_WORDING = Wording(
    path="`ticket` of with_ticket",
    trunk_only="rest=False in with_ticket",
    stride_in_1x1="stages with stride_in_1x1=True",
    stride_in_3x3="stages with stride_in_1x1=False",
    channels="model.backbone.bottom_up.stem.in_channels={0} and model.pixel_mean of {0} values",
    other_checkpoint="allow_other_checkpoint=True in with_ticket",
    load_compacted="lth_plugins.detectron2.CompactCheckpointer",
)

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def with_ticket(
    module: ModuleT,
    ticket: str | PathLike[str],
    load_weights: bool = True,
    keep_input: bool = False,
    allow_frozen_norm: bool = False,
    allow_other_checkpoint: bool = False,
    **options: Any,
) -> ModuleT:
    """Put a ticket on a module that a LazyConfig describes.

    In a config, as its last line about the model, so that the lines before read as usual::

        model = L(with_ticket)(module=model, ticket="round_07.ticket")

    Args:
        module: a whole model, or any part of it that holds the trunk. Its input can be
            checked on a whole model only; the data loader's ``image_format`` is for the config to
            set.
        ticket: a path, a catalog name or ``hf://owner/repo[/file][@sha256:…]``. Where it is not
            there, the module infers from a trained checkpoint, and refuses to train.
        load_weights: False keeps the random initialisation, masked.
        keep_input: accept another input than the ticket's.
        allow_frozen_norm: accept FrozenBN, for a ticket whose BN statistics are its own.
        allow_other_checkpoint: load a checkpoint that was trained with other masks, or dense, under
            the ticket's; a warning says how many of its weights they zero.
        options: ``weights``, ``reverse``, ``random`` and ``seed`` of `lth_plugins.ticket.Choice`,
            and ``rest``, its ``outside``. What the ticket prunes outside the trunk needs the whole
            model; for a part of it, ``rest=False``.

    Returns:
        The module itself.

    Raises:
        TicketError: if the ticket cannot be read, or the module contradicts it. The module is
            unchanged then.
    """
    outside = options.pop("rest", True)
    choice = Choice(ticket, load_weights=load_weights, outside=outside, wording=_WORDING, **options)
    if not has_statistics(module):
        raise TicketError(no_statistics("the backbone", _TRAINABLE))
    model_input = _model_input(module) if hasattr(module, "pixel_mean") else None
    try:
        loaded = choice.load()
    except NotFound as error:
        logger.warning(without_ticket(error))
        refuse_to_run(module, without_ticket(error))
    else:
        trained = ModelInput.of(loaded.meta.input)
        if not keep_input and model_input is not None:
            check_input("the ticket", trained, model_input, _input_lines(trained))
        if loaded.sparsity and not allow_frozen_norm:
            _check_norm(module)
        attach(module, loaded, load_weights, wording=_WORDING)
    watch_loading(
        module,
        wording=_WORDING,
        allow_other_checkpoint=allow_other_checkpoint,
        model_input=model_input,
    )
    return module


def _model_input(module: Any) -> ModelInput:
    # Some models do not say their format, as they need it only to show images of their input.
    mean, std = rounded(module.pixel_mean), rounded(module.pixel_std)
    return ModelInput(getattr(module, "input_format", None), mean, std)


def _input_lines(trained: ModelInput) -> str:
    order = f'model.input_format = dataloader.train.mapper.image_format = "{trained.format}"\n'
    return (
        f". Write in the config\nmodel.pixel_mean = {list(trained.mean)}\n"
        f"model.pixel_std = {list(trained.std)}\n"
        f"{order if trained.format in COLOURS else ''}"
        "or keep_input=True in with_ticket to train on that input all the same"
    )


_TRAINABLE = 'write norm="SyncBN" (or "BN" on one device) for its stem and stages'


def _check_norm(module: nn.Module) -> None:
    norms = {
        name: module.get_submodule(key.removesuffix(".running_var"))
        for name, key in locate(module).keys.items()
        if name.startswith("layer") and name.endswith(".running_var")
    }
    frozen = [name for name, norm in norms.items() if isinstance(norm, FrozenBatchNorm2d)]
    if len(frozen) == len(norms):
        accept = "allow_frozen_norm=True in with_ticket"
        raise TicketError(frozen_statistics('norm="FrozenBN"', _TRAINABLE, accept))
    if frozen:
        logger.warning(frozen_stages("freeze_at", "0 or 1"))
